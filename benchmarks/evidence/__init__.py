"""The page of evidence: every claim and every bar beside what the benchmarks measured, written from their files alone."""

"""Benchmarks: ratios measured in one run, against a limit or a peer, with hardware and versions."""

"""What the runs under long tails and label noise say of the claims for learned weights."""

import statistics

from benchmarks.evidence._catalogue import Measured
from benchmarks.evidence._findings import Finding, share_verdict, spread

TAILS, NOISES = ("tail-10", "tail-50"), ("uniform-20", "uniform-40", "pair-20", "pair-40")


def errors(measured: Measured, method: str, data: str, scenario: str, part: str) -> list[float]:
    rows = measured.fairness.get((data, scenario, method), [])
    return [100 * row["errors"]["robust"][part] for row in rows]


PUBLISHED = ("CAAT (ReMargin)", "CAAT (gradient)", "CAAT (fixed bound)")
WIDER = ("CAAT, anti-adversaries x 4", "CAAT x 4, soft")
SIMPLER = ("logit adjustment + TRADES", "class weights + TRADES", "TRADES, meta-data too")
SETS = ("digits", "fashion-mnist")


def gain(measured: Measured, method: str, data: str, scenario: str, part: str) -> float:
    """Points of robust error below TRADES, means over seeds."""
    ours, theirs = (statistics.mean(errors(measured, name, data, scenario, part)) for name in (method, "TRADES"))
    return theirs - ours


def fairness(measured: Measured) -> Finding | None:
    if not measured.fairness:
        return None
    told, counts = [], []
    for method in (*PUBLISHED, *WIDER):
        parts = []
        for data in SETS:
            met = [
                s
                for s in (*TAILS, *NOISES)
                if gain(measured, method, data, s, "worst") >= 5 and gain(measured, method, data, s, "average") >= -1
            ]
            parts.append(f"{data} {len(met)} of 6{' (' + ', '.join(met) + ')' if met else ''}")
            if method in PUBLISHED:
                counts.append(len(met))
        told.append(f"{method}: {', '.join(parts)}")
    return Finding(
        [*told, "Means of three seeds; x 4: anti-adversaries move four times as far, which is ours"],
        share_verdict(sum(counts), 12 * len(PUBLISHED)),
    )


def trade_off(measured: Measured) -> Finding | None:
    if not measured.fairness:
        return None
    told, better, cases = [], 0, 0
    for method in (*PUBLISHED, *WIDER, *SIMPLER):
        parts = []
        for label, scenarios in (("long tails", TAILS), ("label noise", NOISES)):
            for data in SETS:
                gains = [gain(measured, method, data, scenario, "average") for scenario in scenarios]
                parts.append(f"{spread(gains, '+.1f')} {data}, {label}")
                if method in PUBLISHED:
                    better, cases = better + sum(g > 0 for g in gains), cases + len(gains)
        told.append(f"{method}: {'; '.join(parts)}")
    told.append(
        "Points of robust error below TRADES, means and ranges over scenarios of three seeds each; the last three are simpler remedies"
    )
    return Finding(told, share_verdict(better, cases))

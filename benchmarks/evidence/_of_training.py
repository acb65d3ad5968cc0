"""What the runs of the robust objectives say of the claims: BETA training and ARMOR."""

import re
import statistics
from typing import Any

from benchmarks.evidence._catalogue import Measured
from benchmarks.evidence._findings import NOT_SHOWN, OPPOSITE, PARTLY, SHOWN, Finding, share_verdict, spread


def objective_runs(measured: Measured, data: str, objective: str) -> dict[int, dict[str, Any]]:
    return {
        content["run"]["seed"]: content
        for content in measured.contents("objectives")
        if content["run"]["data"] == data and content["run"]["objective"] == objective and content["run"]["setting"] == "cpu"
    }


SETS = {"mnist": "MNIST", "cifar10": "CIFAR-10 subset"}


def overfitting(measured: Measured) -> Finding | None:
    told, less = [], []
    for data, title in SETS.items():
        lost = {
            name: {
                s: 100 * (run["best"]["standard"] - run["last"]["standard"])
                for s, run in objective_runs(measured, data, name).items()
            }
            for name in ("at", "beta", "smoothed-beta")
        }
        if not all(lost.values()):
            return None
        parts = [
            f"{title_} {spread(list(lost[name].values()), '+.1f')}"
            for name, title_ in (("at", "PGD training"), ("beta", "BETA training"), ("smoothed-beta", "its smoothed form"))
        ]
        told.append(
            f"{title}, points of robust accuracy lost from the best epoch to the last, {len(lost['at'])} seeds: {', '.join(parts)}"
        )
        less += [lost["beta"][seed] < lost["at"][seed] for seed in lost["at"]]
    verdict = SHOWN if all(less) else NOT_SHOWN if sum(less) <= len(less) / 2 else PARTLY
    return Finding(
        [
            *told,
            f"BETA training lost less in {sum(less)} of {len(less)} pairs of runs, of 20 epochs each",
        ],
        verdict,
    )


def beta_robustness(measured: Measured) -> Finding | None:
    told, close = [], []
    for data, title in SETS.items():
        at, beta = (objective_runs(measured, data, name) for name in ("at", "beta"))
        if not at or not beta:
            return None
        ahead = [100 * (beta[seed]["best"]["standard"] - at[seed]["best"]["standard"]) for seed in at]
        told.append(
            f"{title}: {spread(ahead, '+.1f')} points above PGD training, {len(ahead)} seeds, best epochs, standard protocol"
        )
        close.append(abs(statistics.mean(ahead)) <= 2)
    return Finding(told, share_verdict(sum(close), len(close)))


def armor(measured: Measured) -> Finding | None:
    told, fewer, pairs, means = [], 0, 0, []
    for data, title in SETS.items():
        parts = []
        for name, shown in (
            ("at", "PGD training"),
            ("trades", "TRADES"),
            ("mart", "MART"),
            ("udr", "UDR"),
            ("beta", "BETA training"),
        ):
            plain, with_armor = objective_runs(measured, data, name), objective_runs(measured, data, f"armor-{name}")
            if not plain or not with_armor:
                return None
            gained = [100 * (with_armor[seed]["best"]["standard"] - plain[seed]["best"]["standard"]) for seed in plain]
            fewer, pairs = fewer + sum(g < 0 for g in gained), pairs + len(gained)
            means.append(statistics.mean(gained))
            parts.append(f"{shown} {spread(gained, '+.1f')}")
        told.append(f"{title}, points of robust accuracy that ARMOR (KL, radius 0.1) adds, three seeds: {'; '.join(parts)}")
    told.append(f"Fewer robust images in {fewer} of {pairs} pairs of runs. One radius, not tuned")
    verdict = SHOWN if min(means) > 0 else OPPOSITE if max(means) < 0 else PARTLY
    return Finding(told, verdict)


def binary(measured: Measured) -> Finding | None:
    contents = measured.contents("binary features")
    if not contents:
        return None
    found = re.findall(
        r"^  (natural|rFGSM training|ARMOR, insertions) +clean ([\d.]+) +robust ([\d.]+) (\(.*\))?",
        contents[0]["printed"],
        re.MULTILINE,
    )
    robust = {name: float(value) for name, _, value, _ in found}
    told = [f"{name}: {value} {width} robust, {clean} clean" for name, clean, value, width in found]
    told.append("Digits cut at one half, at most five insertions, three seeds; the paper's malware data are not public")
    return Finding(told, SHOWN if robust["ARMOR, insertions"] > robust["rFGSM training"] else NOT_SHOWN)

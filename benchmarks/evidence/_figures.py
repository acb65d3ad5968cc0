"""The two figures of the page."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.evidence._catalogue import Measured
from benchmarks.evidence._of_optimizers import transfer_rows
from benchmarks.evidence._of_training import SETS, objective_runs
from benchmarks.evidence._of_weights import NOISES, TAILS, errors
from benchmarks.evidence._speed import bars

mpl.use("Agg")
from matplotlib import pyplot as plt

OBJECTIVES = {"at": "PGD", "trades": "TRADES", "mart": "MART", "udr": "UDR", "beta": "BETA"}
METHODS = {
    "CAAT (fixed bound)": "CAAT, fixed",
    "CAAT (ReMargin)": "CAAT, ReMargin",
    "CAAT x 4, soft": "CAAT, x 4",
    "logit adjustment + TRADES": "logit adjustment",
    "TRADES, meta-data too": "meta-data too",
}


def _transfer(panel: Any, measured: Measured) -> None:
    rows = transfer_rows(measured)[::-1]
    for place, row in enumerate(rows):
        panel.plot([row.low, row.top], [place, place], color="lightgrey", linewidth=4, zorder=1)
    marks = (
        ("best clean training", "low", "o", "tab:grey"),
        ("robust-small-v1", "shipped", "D", "tab:blue"),
        ("PGD training", "top", "s", "tab:red"),
    )
    for label, field, marker, colour in marks:
        panel.scatter(
            [getattr(row, field) for row in rows], range(len(rows)), label=label, marker=marker, color=colour, s=22, zorder=2
        )
    panel.set_yticks(range(len(rows)), [row.target for row in rows], fontsize=7)
    panel.set_xlabel("robust accuracy, means over seeds")
    panel.set_title("meta-optimizer: transfer without adversarial examples", fontsize=9)
    panel.legend(fontsize=7, loc="upper left")


def _armor(panel: Any, measured: Measured) -> None:
    for shift, (data, title) in zip((-0.18, 0.18), SETS.items(), strict=True):
        for place, name in enumerate(OBJECTIVES):
            plain, reweighted = objective_runs(measured, data, name), objective_runs(measured, data, f"armor-{name}")
            gains = [100 * (reweighted[s]["best"]["standard"] - plain[s]["best"]["standard"]) for s in plain if s in reweighted]
            if gains:
                colour = "tab:blue" if data == "mnist" else "tab:orange"
                panel.bar(place + shift, statistics.mean(gains), 0.34, color=colour, label=title if place == 0 else None)
                panel.scatter([place + shift] * len(gains), gains, color="black", s=6, zorder=3)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(range(len(OBJECTIVES)), list(OBJECTIVES.values()), fontsize=8)
    panel.set_ylabel("points of robust accuracy")
    panel.set_title("ARMOR: what reweighting adds (dots: seeds)", fontsize=9)
    panel.legend(fontsize=7)


def _weights(panel: Any, measured: Measured) -> None:
    scenarios = [(data, scenario) for data in ("digits", "fashion-mnist") for scenario in (*TAILS, *NOISES)]
    table = [
        [
            statistics.mean(errors(measured, "TRADES", *place, "average"))
            - statistics.mean(errors(measured, method, *place, "average"))
            for place in scenarios
        ]
        for method in METHODS
    ]
    panel.imshow(table, cmap="RdBu", vmin=-12, vmax=12, aspect="auto")
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            panel.text(
                column, row, f"{value:+.0f}", ha="center", va="center", fontsize=7, color="white" if abs(value) > 8 else "black"
            )
    panel.set_xticks(
        range(len(scenarios)), [f"{data[:7]} {scenario}" for data, scenario in scenarios], rotation=60, ha="right", fontsize=7
    )
    panel.set_yticks(range(len(METHODS)), list(METHODS.values()), fontsize=8)
    panel.set_title("weights: points of robust error below TRADES", fontsize=9)


def _bounds(panel: Any, measured: Measured) -> None:
    (content,) = measured.contents("bounds")
    rows = content["orders"]
    x = [float(epsilon) for epsilon in rows]
    for key, label, marker in (
        ("all", "sets of any size (exact)", "s"),
        ("order 2", "pairs", "o"),
        ("sinkhorn", "Sinkhorn", "x"),
    ):
        panel.plot(x, [row[key] for row in rows.values()], marker=marker, label=label, linewidth=1)
    panel.set_xticks(x)
    panel.set_xlabel("epsilon, l2")
    panel.set_ylabel("lowest possible risk, digits")
    panel.set_title("bounds: what small sets and Sinkhorn miss", fontsize=9)
    panel.legend(fontsize=7)


def draw_claims(measured: Measured, path: Path) -> None:
    """Four panels; one whose files are missing says so."""
    figure, panels = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    parts = (("transfer", _transfer), ("objectives", _armor), ("fairness", _weights), ("bounds", _bounds))
    for panel, (name, draw) in zip(panels.flat, parts, strict=True):
        if measured.files(name):
            draw(panel, measured)
        else:
            panel.text(0.5, 0.5, f"not measured: {name}", ha="center", va="center")
            panel.set_axis_off()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_speed(measured: Measured, path: Path) -> None:
    """Every bar as a share of its limit."""
    found = bars(measured)[::-1]
    figure, panel = plt.subplots(figsize=(10, 1.2 + 0.2 * len(found)), layout="constrained")
    for place, bar in enumerate(found):
        ends = (
            [bar.lowest / bar.limit, bar.highest / bar.limit] if bar.most else [bar.limit / bar.highest, bar.limit / bar.lowest]
        )
        panel.plot(ends, [place, place], color="lightgrey", linewidth=4, zorder=1)
        panel.scatter(bar.strain, place, color="tab:blue" if bar.met else "tab:red", s=18, zorder=2)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_yticks(range(len(found)), [bar.what for bar in found], fontsize=7)
    panel.set_ylim(-1, len(found))
    panel.set_xlabel("measured over its limit (left of 1: met; grey: lowest to highest round)")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)

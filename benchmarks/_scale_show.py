"""The table and the figure of `benchmarks.scale`, from the lines of its file."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._scale_fit import Exponent, exponent
from benchmarks._scale_series import SERIES

SEEN = 4 * 2**20
"""Bytes below which a peak says more about pages and pools than about the part."""
FEWEST = 3

Line = Mapping[str, Any]
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Attacks by points", ("PGD, by points", "APGD, by points", "Square, by points")),
    ("Attacks by parameters", ("PGD, by parameters", "APGD, by parameters", "Square, by parameters")),
    ("Attacks by steps", ("PGD, by steps", "APGD, by steps", "Square, by steps")),
    ("Unrolled attack, its gradient", ("Unrolled, by steps", "Unrolled, checkpointed, by steps")),
    ("Evaluation", ("evaluate, quick, by points", "evaluate, standard, by points")),
    ("Dual solver", ("dual, KL, by batch", "dual, Alpha 2, by batch")),
    ("Conflict edges", ("edges, MNIST, l2, by points", "edges, MNIST, l_inf, by points", "edges, synthetic, l2, by points")),
    ("Conflict edges by dimensions", ("edges, synthetic, l2, by dimensions",)),
    ("Maximum flow, order 2", ("maximum flow, order 2, by edges",)),
    ("Linear program and Sinkhorn", ("linear program, order 3, by points", "Sinkhorn, order 2, by points")),
    ("Sinkhorn by classes", ("Sinkhorn, order 3, by classes",)),
    ("Step of an update rule", ("step, Adam, by parameters", "step, interpretable, by parameters", "step, LSTM, by parameters")),
    (
        "Gradient streams by parameters",
        ("factor_gradients, factors, by parameters", "factor_gradients, tangent, by parameters"),
    ),
    ("Gradient streams by batch", ("factor_gradients, factors, by batch", "factor_gradients, tangent, by batch")),
    (
        "Meta-gradient by unroll length",
        tuple(f"meta-gradient, {way}, by unroll length" for way in ("whole graph", "recomputed", "PES")),
    ),
    (
        "Meta-training by optimizees",
        tuple(
            f"meta-training, {way}, by optimizees" for way in ("1 task, 1 process", "2 tasks, 1 process", "2 tasks, 2 processes")
        ),
    ),
    ("Weights' hypergradient", ("hypergradient, jvp, by parameters", "hypergradient, double_backward, by parameters")),
    ("CAAT by meta-batch", ("CAAT, by meta-batch",)),
    ("training.fit, one step", ("fit, 1 process, by parameters", "fit, 2 processes, by parameters")),
)


class Found(NamedTuple):
    """A series with what was measured of it, ascending in size; exponents are None where too few points tell them."""

    name: str
    sizes: list[float]
    seconds: list[list[float]]
    memory: list[float]
    time_exponent: Exponent | None
    memory_exponent: Exponent | None


def found(lines: Sequence[Line]) -> dict[str, Found]:
    """Every series that has a point, in the order of the table of series."""
    result = {}
    for name in SERIES:
        points = sorted((line for line in lines if line["series"] == name), key=lambda line: line["size"])
        if not points:
            continue
        sizes, seconds = [line["size"] for line in points], [line["seconds"] for line in points]
        memory = [float(line["memory_bytes"]) for line in points]
        large = [(size, [value]) for size, value in zip(sizes, memory, strict=True) if value >= SEEN]
        result[name] = Found(
            name,
            sizes,
            seconds,
            memory,
            exponent(sizes, seconds) if len(sizes) >= FEWEST else None,
            exponent(*zip(*large, strict=True)) if len(large) >= FEWEST else None,
        )
    return result


def table(lines: Sequence[Line]) -> list[str]:
    """Rows of a Markdown table."""
    heads = ("part", "sizes", "seconds", "exponent", "theory", "last two", "memory, MiB", "exponent", "theory", "last two")
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, one in found(lines).items():
        series = SERIES[name]
        ends = [statistics.median(seconds) for seconds in (one.seconds[0], one.seconds[-1])]
        mebibytes = [one.memory[0] / 2**20, one.memory[-1] / 2**20]
        cells = [
            name,
            f"{_size(one.sizes[0])} to {_size(one.sizes[-1])} ({len(one.sizes)})",
            f"{_number(ends[0])} to {_number(ends[1])}",
            *_exponent(one.time_exponent, repeated=True),
            f"{mebibytes[0]:.1f} to {mebibytes[1]:.1f}",
            *_exponent(one.memory_exponent, repeated=False),
        ]
        cells.insert(4, _theory(series.time))
        cells.insert(8, _theory(series.memory))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _exponent(one: Exponent | None, *, repeated: bool) -> tuple[str, str]:
    if one is None:
        return "-", "-"
    error = "" if math.isinf(one.error) else f" ± {one.error:.2f}"
    spread = f" ({one.lowest:.2f} to {one.highest:.2f})" if repeated else ""
    return f"{one.slope:.2f}{error}{spread}", f"{one.last:.2f}"


def _theory(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _size(value: float) -> str:
    return f"{value:,.0f}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _short(value: float) -> str:
    """1863690 as 1.9M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.2g}{name}" if value < 100 * unit else f"{value / unit:.0f}{name}"
    return f"{value:g}"


def draw(lines: Sequence[Line], path: Path) -> None:
    """Small multiples: seconds as full lines against the left axis, memory as dashed ones against the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    known = found(lines)
    panels = [(title, [known[name] for name in names if name in known]) for title, names in PANELS]
    panels = [(title, rows) for title, rows in panels if rows]
    columns = 4
    figure, grid = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(18, 3.5 * -(-len(panels) // columns)), squeeze=False
    )
    for place in grid.flat:
        place.set_visible(False)
    for place, (title, rows) in zip(grid.flat, panels, strict=False):
        place.set_visible(True)
        right = place.twinx()
        for number, one in enumerate(rows):
            colour = f"C{number}"
            medians = [statistics.median(seconds) for seconds in one.seconds]
            spread = [[m - min(s) for m, s in zip(medians, one.seconds, strict=True)]]
            spread.append([max(s) - m for m, s in zip(medians, one.seconds, strict=True)])
            told = one.name.rpartition(", by ")[0]
            slope = f": {one.time_exponent.slope:.2f}" if one.time_exponent else ""
            place.errorbar(one.sizes, medians, yerr=spread, color=colour, marker="o", markersize=4, label=told + slope)
            right.plot(one.sizes, [max(value, 4096) / 2**20 for value in one.memory], color=colour, linestyle=":", marker="x")
        for axis in (place, right):
            axis.set_xscale("log")
            axis.set_yscale("log")
        place.set_title(title, fontsize=11)
        place.set_xlabel(SERIES[rows[0].name].axis)
        place.set_ylabel("CPU seconds (full)")
        right.set_ylabel("MiB (dotted)", color="grey")
        place.legend(fontsize=7, loc="upper left")
        for axis in (place, right):  # room for the legend
            low, high = axis.get_ylim()
            axis.set_ylim(low, high * (high / low) ** 0.4)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        ticks: list[float] = []
        for size in sorted({size for one in rows for size in one.sizes}):
            if not ticks or size >= 1.8 * ticks[-1]:  # nearer ones would overlap
                ticks.append(size)
        place.xaxis.set_major_locator(FixedLocator(ticks))
        place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        place.xaxis.set_minor_formatter(NullFormatter())
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    print(f"wrote {path}")

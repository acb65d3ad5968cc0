"""What ``metarobust bound`` does once its flags are read: points, bounds, table, files."""

import math
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch

from metarobust import __version__
from metarobust._checks import is_out_of_memory
from metarobust._files import json_text, read_json, write_atomically
from metarobust.bounds import RiskBound, plot_curve, risk_curve
from metarobust.command_line._bound_reports import ModelReport, doubts, rows
from metarobust.command_line._demo import writable_folder
from metarobust.command_line._evaluate_run import _device
from metarobust.command_line._notes import say
from metarobust.command_line._points import listed, read_points
from metarobust.data import LabelledImages
from metarobust.evaluation._inputs import data_digest

if TYPE_CHECKING:
    from metarobust.command_line._bound import Bound

SCOPE = "The bound is for these points (the empirical distribution), not for the population that they come from."
COLUMNS = ("epsilon", "lower", "upper", "exact", "order", "pairs", "ties", "seconds")


def run_bound(
    flags: "Bound",
    *,
    epsilons: list[float],
    order: int | str,
    classes: list[int] | None,
    reports: Sequence[ModelReport],
) -> None:
    """Read the points, bound, print, write."""
    device = _device(flags.device)
    points = read_points(
        flags.data, part=flags.part, root=flags.root, download=flags.download, classes=classes, examples=flags.examples
    )
    out = writable_folder(flags.out)
    if flags.kept.exists():
        print(f"going on from {flags.kept}", flush=True)
    content = content_of(flags, epsilons, order, classes, points)
    refuse_strangers(out / "bounds.json", content)
    doing = f"close pairs among {len(points):,} points, then {len(epsilons)} bounds"
    with warnings.catch_warnings(record=True) as warned, _busy(doing):
        warnings.simplefilter("always", UserWarning)
        try:
            bounds = risk_curve(
                points.images.to(device),
                points.labels.to(device),
                norm=flags.norm,
                epsilons=epsilons,
                order=order,
                method=flags.method,
                closed=flags.closed,
                most_sets=flags.most_sets,
                checkpoint=flags.kept,
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            remedy = "pass a smaller --examples" if device.type == "cpu" else "pass --device cpu"
            raise ValueError(f"--device must have room for the points, {device} has not; {remedy}") from error
    title = _title(flags, points, classes)
    reports = [report.beside(points) for report in reports]
    _print(title, bounds, reports, order)
    sentences = [*dict.fromkeys(str(warning.message) for warning in warned), *doubts(reports, bounds)]
    for sentence in sentences:
        say(sentence)
    content["settings"] |= {"device": str(device), "threads": torch.get_num_threads()}
    content |= {
        "bounds": [bound.as_dict() | {"best_robust_accuracy": 1 - bound.lower} for bound in bounds],
        "models": rows(reports, bounds),
        "doubts": sentences,
        "versions": {
            "metarobust": __version__,
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    text = json_text(content)
    write_atomically(out / "bounds.json", lambda path: path.write_text(text))
    table = _markdown(title, bounds, [*_conclusion(bounds, reports, order), *sentences])
    write_atomically(out / "bounds.md", lambda path: path.write_text(table))
    names = [report.name + (", on other points" if report.other_points else "") for report in reports]
    models = [(name, report.epsilon, report.risk) for name, report in zip(names, reports, strict=True)]
    plot_curve(bounds, out / "bounds.png", models=models)
    flags.kept.unlink(missing_ok=True)
    print(f"wrote bounds.json, bounds.md and bounds.png to {out}")


def content_of(
    flags: "Bound", epsilons: list[float], order: int | str, classes: list[int] | None, points: LabelledImages
) -> dict[str, Any]:
    """What the bounds are of: the beginning of bounds.json."""
    return {
        "scope": SCOPE,
        "data": {
            "name": Path(flags.data).name,
            "part": None if flags.data.endswith(".npz") else flags.part or "test",
            "classes": classes,
            "examples": len(points),
            "digest": data_digest(points.images, points.labels),
        },
        "settings": {
            "norm": flags.norm,
            "epsilons": epsilons,
            "order": order,
            "method": flags.method,
            "closed": flags.closed,
            "most_sets": flags.most_sets,
        },
    }


def refuse_strangers(path: Path, content: dict[str, Any]) -> None:
    """Bounds of other points or settings stay; those of the same are computed again and come out alike."""
    if not path.exists():
        return
    try:
        there = read_json(path)
        same = there["data"] == content["data"] and content["settings"].items() <= there["settings"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        got = f"{path.parent}, whose bounds.json is of other points or settings"
        raise ValueError(f"--out must be a folder without other bounds, got {got}; pass another --out, or move it away")


@contextmanager
def _busy(text: str) -> Iterator[None]:
    """A spinner on standard error while someone watches; how far the work is, nobody knows before the pairs are found."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _title(flags: "Bound", points: LabelledImages, classes: list[int] | None) -> str:
    part = "" if flags.data.endswith(".npz") else f", {flags.part or 'test'} part"
    chosen = "" if classes is None else f", classes {listed(classes)}"
    norm = flags.norm.replace("l", "l_", 1)
    return f"{len(points):,} points of {Path(flags.data).name}{part}{chosen}; {norm}; method {flags.method}"


def _cells(bound: RiskBound) -> list[str]:
    exact = "yes" if bound.exact else "no"
    seconds = bound.seconds["solution"] + bound.seconds["witnesses"]
    risks = f"{bound.lower:.6f}", f"{bound.upper:.6f}"
    return [f"{bound.epsilon:.4g}", *risks, exact, str(bound.order), str(bound.pairs), str(bound.ties), f"{seconds:.2f}"]


def _conclusion(bounds: Sequence[RiskBound], reports: Sequence[ModelReport], order: int | str) -> list[str]:
    """The bounds in words, and each report beside the bound that holds at its epsilon."""
    best = (f"{_accuracy(bound)} at epsilon {bound.epsilon:.4g}" for bound in bounds)
    said = [f"Best possible robust accuracy on these points (1 - risk): {', '.join(best)}."]
    for report in reports:
        bound = report.bound(bounds)
        beside = "measured on other points than the bound's" if report.other_points else "no bound was computed up to there"
        if bound is not None:
            beside = f"any classifier's is at least {bound.lower:.4f} (bound at epsilon {bound.epsilon:.4g})"
        said.append(f"{report.name}: measured robust risk {report.risk:.4f} at epsilon {report.epsilon:.4g}; {beside}.")
    said += _remarks(bounds, order)
    return [*said, SCOPE]


def _accuracy(bound: RiskBound) -> str:
    """The best accuracy, rounded to the outside where it lies between two numbers."""
    if bound.exact:
        return f"{1 - bound.lower:.4f}"
    return f"between {math.floor(1e4 * (1 - bound.upper)) / 1e4:.4f} and {math.ceil(1e4 * (1 - bound.lower)) / 1e4:.4f}"


def _remarks(bounds: Sequence[RiskBound], order: int | str) -> list[str]:
    """What a reader may wonder at: open brackets, ties, nothing to bound."""
    said = []
    if not all(bound.exact for bound in bounds):
        why = f"sets of more than {order} points were left out: --order auto counts them"
        if order == "auto":
            why = "the search for larger sets reached --most-sets: raise it"
        if bounds[0].method == "sinkhorn":
            why = "Sinkhorn's are approximate: --method exact closes most"
        said.append(f"A bracket stays open where {why}.")
    if any(bound.ties for bound in bounds):
        ties = "counted as conflicts" if bounds[0].closed else "not counted as conflicts"
        said.append(f"Ties are pairs within rounding of 2 epsilon, {ties}.")
    if all(bound.pairs == 0 for bound in bounds):
        said.append("No two points of different classes are close enough to conflict: nothing is bounded here.")
    return said


def _print(title: str, bounds: Sequence[RiskBound], reports: Sequence[ModelReport], order: int | str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(title, "bold"))
    table = Table(title="adversarial risk of the best possible classifier, between lower and upper", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for bound in bounds:
        table.add_row(*_cells(bound))
    console.print(table)
    console.print(Text(f"looking for close pairs, once for all radii: {bounds[0].seconds['pairs']:.2f} s"))
    for sentence in _conclusion(bounds, reports, order):
        console.print(Text(sentence))


def _markdown(title: str, bounds: Sequence[RiskBound], said: Sequence[str]) -> str:
    header = [f"# {title}", "", "Adversarial risk of the best possible classifier, between lower and upper.", ""]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(bound)) + " |" for bound in bounds]
    return "\n".join([*header, *lines, "", *(f"- {sentence}" for sentence in said)]) + "\n"

"""A report as one figure: accuracy against epsilon, and the most perturbed examples beside their clean selves."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metarobust._checks import message
from metarobust._files import write_atomically
from metarobust._tensors import norms
from metarobust.evaluation._table import threat_model_text

if TYPE_CHECKING:
    from metarobust.evaluation._report import RobustnessReport

SHOWN = 5
BLUE, RED, GREY = "#2b6cb0", "#c1272d", "#8c8c8c"


def draw_report(report: "RobustnessReport", path: Path) -> Path:
    """Write the figure to ``path``; the picture panels are left out for inputs that are no images, or when nothing broke."""
    # Figure and canvas without pyplot: no global state, no backend to choose, no window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    formats = FigureCanvasAgg.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in formats:
        raise ValueError(message("path", "a file that ends in one of ." + ", .".join(sorted(formats)), path, "write report.png"))
    rows = most_perturbed(report)
    figure = Figure(figsize=(12.5, 5.2) if rows else (6.0, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report.examples} examples, {threat_model_text(report)}")
    if rows:
        halves: Any = figure.subfigures(1, 2, width_ratios=[1.0, 1.25])
        _draw_curve(halves[0].subplots(), report)
        _draw_examples(halves[1], report, rows)
    else:
        _draw_curve(figure.subplots(), report)
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind))


def most_perturbed(report: "RobustnessReport") -> list[int]:
    """Rows of the broken examples that moved furthest in l2, if the inputs are images of 1 or 3 channels."""
    x, x_adv = report.inputs, report.adversarial_examples
    broken = (report.broken_by >= 0).nonzero().squeeze(1)
    if x.dim() != 4 or x.shape[1] not in (1, 3) or len(broken) == 0:
        return []
    # l2 whatever the threat model's norm: in l_inf almost every example moves by exactly epsilon.
    moved = norms(x_adv[broken].double() - x[broken].double(), "l2")
    return broken[moved.argsort(descending=True, stable=True)][:SHOWN].tolist()


def _draw_curve(axes: Any, report: "RobustnessReport") -> None:
    epsilon, settings = report.settings["epsilon"], report.settings
    if report.epsilon_curve:
        curve = list(report.epsilon_curve)
        label = f"short attack on {settings['checked_examples']} examples (a check)"
        if len(curve) > 2:  # the last radius covers the box, and would push all others into a corner
            radius, accuracy = curve.pop()
            label += f";\n{100 * accuracy:.3g} % at {radius:.3g}: anywhere in the box"
        radii, accuracies = zip(*curve, strict=True)
        axes.plot(radii, [100 * a for a in accuracies], "-o", color=GREY, markersize=4, linewidth=1.5, label=label)
    low, high = report.worst_case_interval
    worst = 100 * report.worst_case_accuracy
    reach = [[worst - 100 * low], [100 * high - worst]]
    axes.plot([0], [100 * report.clean_accuracy], "s", color=BLUE, markersize=7, label="clean", zorder=3)
    axes.errorbar(
        [epsilon], [worst], yerr=reach, fmt="D", color=RED, markersize=7, capsize=4, label="worst case, 95 % interval", zorder=3
    )
    axes.set_xlabel(f"epsilon ({settings['norm'].replace('l', 'l_', 1)} radius, input units)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title("Accuracy against epsilon", fontsize=11)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")


def _draw_examples(figure: Any, report: "RobustnessReport", rows: list[int]) -> None:
    figure.suptitle("Most perturbed of the broken examples (by l_2 distance)", fontsize=11)
    grid = figure.subplots(3, len(rows), squeeze=False)
    names = list(report.attacks)
    for column, row in enumerate(rows):
        clean, moved = report.inputs[row].float(), report.adversarial_examples[row].float()
        change = moved - clean
        largest = change.abs().max().item()
        label, found = int(report.labels[row]), int(report.adversarial_predictions[row])
        _show(
            grid[0][column], _in_box(clean, report), f"no. {row}: label {label}\npredicted {int(report.clean_predictions[row])}"
        )
        _show(grid[1][column], _in_box(moved, report), f"predicted {found}\n{_short(names[int(report.broken_by[row])])}", RED)
        _show(grid[2][column], 0.5 + change / (2 * max(largest, 1e-12)), _scale(largest, len(change)), diverging=True)
    for line, name in enumerate(("clean", "adversarial", "difference")):
        grid[line][0].set_ylabel(name, fontsize=10)


def _short(name: str, most: int = 20) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _scale(largest: float, channels: int) -> str:
    return f"blue -{largest:.2g}, red +{largest:.2g}" if channels == 1 else f"grey 0, full ±{largest:.2g}"


def _in_box(image: torch.Tensor, report: "RobustnessReport") -> torch.Tensor:
    lower, upper = report.settings["lower"], report.settings["upper"]
    return (image - lower) / (upper - lower)


def _show(axes: Any, image: torch.Tensor, title: str, colour: str = "black", *, diverging: bool = False) -> None:
    """Draw ``image [1 or 3, height, width]``, values in [0, 1]; grey means no change where it is a difference."""
    pixels = image.clamp(0, 1).movedim(0, -1).numpy()
    if pixels.shape[-1] == 1:
        axes.imshow(pixels[..., 0], cmap="RdBu_r" if diverging else "gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title, fontsize=8, color=colour)
    axes.set_xticks([])
    axes.set_yticks([])

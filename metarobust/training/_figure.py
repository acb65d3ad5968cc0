"""The course of a training run as one figure: robust overfitting shows as a robust accuracy that falls while the loss does."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarobust._checks import message
from metarobust._files import write_atomically

if TYPE_CHECKING:
    from metarobust.training._result import TrainingResult

BLUE, RED, GREY = "#2b6cb0", "#c1272d", "#8c8c8c"


def draw_history(result: "TrainingResult", path: Path, title: str | None) -> Path:
    """Write the figure to ``path``; the panel of accuracies is left out for a run without validation."""
    # Figure and canvas without pyplot: no global state, no backend to choose, no window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    formats = FigureCanvasAgg.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in formats:
        raise ValueError(message("path", "a file that ends in one of ." + ", .".join(sorted(formats)), path, "write run.png"))
    validated = result.best_epoch is not None
    figure = Figure(figsize=(10.0, 4.2) if validated else (5.6, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    if title is not None:
        figure.suptitle(title, fontsize=11)
    if validated:
        _draw_accuracies(panels[0], result)
    epochs = [record.epoch for record in result.history]
    panels[-1].plot(epochs, [record.loss for record in result.history], "-", color=GREY, marker="o", markersize=3)
    panels[-1].set_ylabel("training loss (objective)")
    panels[-1].set_title("Training", fontsize=11)
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind))


def _draw_accuracies(axes: Any, result: "TrainingResult") -> None:
    epochs = [record.epoch for record in result.history]
    for name, colour in (("clean", BLUE), ("robust", RED)):
        values = [100 * getattr(record, f"{name}_accuracy") for record in result.history]
        axes.plot(epochs, values, "-", color=colour, marker="o", markersize=3, label=name)
    assert result.best_epoch is not None
    best, gap = result.history[result.best_epoch - 1], result.overfitting_gap
    assert best.robust_accuracy is not None
    assert gap is not None
    label = f"best robust: {100 * best.robust_accuracy:.1f} % (epoch {best.epoch})"
    if best.epoch < len(result.history):
        label += f",\n{100 * gap:.1f} points above the last epoch"
    axes.plot([best.epoch], [100 * best.robust_accuracy], "D", color=RED, markersize=8, label=label, zorder=3)
    axes.set_ylabel("validation accuracy (%)")
    axes.set_ylim(-3, 103)
    axes.set_title("Validation", fontsize=11)
    axes.legend(frameon=False, loc="best")

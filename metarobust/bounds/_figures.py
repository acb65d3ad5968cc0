"""Bounds at several radii as one figure, with models beside them."""

import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarobust._checks import message, require
from metarobust._files import write_atomically

if TYPE_CHECKING:
    from metarobust.bounds._result import RiskBound

BLACK, GREY = "#222222", "#d9d9d9"
COLOURS = ("#c1272d", "#2b6cb0", "#e9a15b", "#7a4fa3", "#4aa3a2", "#8c6d31")


def plot_curve(
    bounds: Sequence["RiskBound"], path: str | os.PathLike[str], *, models: Sequence[tuple[str, float, float]] = ()
) -> Path:
    """Draw the brackets of `risk_curve` against epsilon, and robust risks of models on the same axes.

    The optimal risk grows with epsilon, so each lower end holds at every larger radius too: the grey steps are where no
    classifier gets on these points. Each upper end holds at every smaller radius. A model inside the grey was attacked too
    weakly, or measured on other points.

    Args:
        bounds: of one norm, on the same points, in any order.
        path: a file that ends in ``.png``, ``.pdf``, ``.svg`` or another format of matplotlib; written atomically.
        models: triples of name, epsilon (input units) and robust risk, ``1 - report.worst_case_accuracy``; points of one name
            are joined by a line.

    Raises:
        ValueError: no bound, bounds of several norms or of other points, an unknown file format.

    Example:
        >>> import tempfile
        >>> from metarobust.bounds import risk_curve
        >>> x, y = torch.tensor([[0.0], [0.4], [1.0]]), torch.tensor([0, 1, 1])
        >>> curve = risk_curve(x, y, norm="l2", epsilons=[0.1, 0.2, 0.5])
        >>> plot_curve(curve, Path(tempfile.mkdtemp()) / "curve.png", models=[("mine", 0.2, 0.6)]).name
        'curve.png'
    """
    # Figure and canvas without pyplot: no global state, no backend to choose, no window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if not isinstance(bounds, Sequence):
        raise TypeError(message("bounds", "a list of RiskBounds", type(bounds).__name__, "write plot_curve([bound], path)"))
    require(len(bounds) > 0, "bounds", "at least one RiskBound", "none")
    of = {(bound.norm, bound.examples) for bound in bounds}
    require(len(of) == 1, "bounds", "of one norm and on the same points", f"(norm, examples) {sorted(of)}")
    formats = FigureCanvasAgg.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in formats:
        raise ValueError(message("path", "a file that ends in one of ." + ", .".join(sorted(formats)), path, "write curve.png"))
    figure = Figure(figsize=(7.2, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    _draw_bounds(axes, sorted(bounds, key=lambda bound: bound.epsilon), [epsilon for _, epsilon, _ in models])
    _draw_models(axes, models)
    highest = max([bound.upper for bound in bounds] + [risk for _, _, risk in models])
    axes.set_ylim(0, min(1.0, 1.15 * highest) if highest > 0.02 else 1.0)
    axes.set_xlabel(f"epsilon ({bounds[0].norm.replace('l', 'l_', 1)} radius, input units)")
    axes.set_ylabel("adversarial risk")
    best: Any = axes.secondary_yaxis("right", functions=(_other, _other))
    best.set_ylabel("robust accuracy")
    axes.set_title(f"Adversarial risk that no classifier beats on these {bounds[0].examples:,} points", fontsize=11)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind))


def _draw_bounds(axes: Any, bounds: Sequence["RiskBound"], further: Sequence[float]) -> None:
    epsilons = [bound.epsilon for bound in bounds]
    lower, upper = [bound.lower for bound in bounds], [bound.upper for bound in bounds]
    # The last step goes on a little, or as far as there are models: it holds at every larger radius.
    single = epsilons[0] == epsilons[-1]  # then its own size is the scale, and the axis begins at 0
    on = 0.3 * (epsilons[0] or 1.0) if single else 0.04 * (epsilons[-1] - epsilons[0])
    end = max([epsilons[-1] + on, *further])
    reach, floor = [*epsilons, end], [*lower, lower[-1]]
    axes.fill_between(reach, 0, floor, step="post", color=GREY, linewidth=0, label="no classifier gets here, on these points")
    # The optimal risk grows with epsilon: an upper end holds at every smaller radius, a lower end at every larger one.
    begin = min([0.0 if single else epsilons[0], *further])
    axes.step([begin, *epsilons], [upper[0], *upper], where="pre", color=BLACK, linewidth=1.0, label="some classifier gets here")
    exact = [bound for bound in bounds if bound.exact]
    if exact:
        at = [bound.epsilon for bound in exact], [bound.lower for bound in exact]
        axes.plot(*at, "o", color=BLACK, markersize=5, label="best possible, exact", zorder=4, clip_on=False)
    broad = [bound for bound in bounds if not bound.exact]
    if broad:
        middle = [(bound.lower + bound.upper) / 2 for bound in broad]
        half = [(bound.upper - bound.lower) / 2 for bound in broad]
        at = [bound.epsilon for bound in broad], middle
        axes.errorbar(
            *at,
            yerr=half,
            fmt="none",
            ecolor=BLACK,
            elinewidth=1.8,
            capsize=4,
            label="best possible, within the bracket",
            zorder=4,
        )


def _draw_models(axes: Any, models: Sequence[tuple[str, float, float]]) -> None:
    names = list(dict.fromkeys(name for name, _, _ in models))
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        points = sorted((epsilon, risk) for of, epsilon, risk in models if of == name)
        label = f"{name} (measured)"
        axes.plot(
            *zip(*points, strict=True), "-D", color=colour, markersize=6, linewidth=1.2, label=label, zorder=5, clip_on=False
        )


def _other(share: Any) -> Any:
    """Accuracy from risk, and back."""
    return 1 - share

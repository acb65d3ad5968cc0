"""What a divergence must provide to the dual solver, and the safeguarded Newton method that its inner problem uses."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import floating, require

MOST_ITERATIONS = 200
PRECISION = 1e-12
RESIDUAL = 1e-11
SMALL = 1e-4  # below it a series beats differences of exponentials: both are then good to 1e-12


class Tilt(NamedTuple):
    r"""The weights :math:`w = \arg\max_w \{\sum_i w_i z_i - D(w \| P)\}` and how they move with z.

    The derivative is the symmetric matrix :math:`J = \partial w / \partial z = \operatorname{diag}(h) - [h\,w] M [h\,w]^\top`.

    Attributes:
        ratio: w / P, ``[n]``.
        divergence: D(w || P).
        curvature: h, ``[n]``.
        correction: the entries hh, hw, ww of M.
        inner: the inner variable, a starting point for a nearby problem.
    """

    ratio: np.ndarray
    divergence: float
    curvature: np.ndarray
    correction: tuple[float, float, float]
    inner: float


class Divergence(Protocol):
    """How far weights are from the base weights: a value, and the worst-case weights under it as a penalty."""

    def __call__(self, weights: Tensor, base_weights: Tensor | None = None) -> Tensor:
        """D(weights || base weights), a scalar in float64.

        Args:
            weights: ``[n]``, floating point, a distribution.
            base_weights: ``[n]``, likewise; uniform by default.
        """
        ...

    def tilt(self, z: np.ndarray, base: np.ndarray, start: float | None = None) -> Tilt:
        """The maximiser of ``w @ z - D(w || base)`` for float64 ``z [n]`` and ``base [n]``, positive with sum 1.

        An entry of ``z`` may be -inf: the example is out of reach. ``start``: the ``inner`` of a nearby problem, if known.
        """
        ...


def distributions(weights: Tensor, base_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both arguments of a divergence in float64, the base weights uniform by default.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: not one row each of the same length, or no distribution.
    """
    floating("weights", weights)
    base = torch.full_like(weights, 1 / max(1, len(weights)), dtype=torch.float64) if base_weights is None else base_weights
    for name, value in (("weights", weights), ("base_weights", base)):
        floating(name, value)
        require(value.dim() == 1 and len(value) > 0, name, "of shape [n] with n >= 1", list(value.shape))
        total = float(value.detach().double().sum())
        least, remedy = float(value.detach().min()), f"divide by {name}.sum()"
        require(least >= 0, name, "a distribution: entries >= 0 of sum 1", f"an entry of {least:g}")
        require(abs(total - 1) < 1e-3, name, "a distribution: entries >= 0 of sum 1", f"a sum of {total:g}", remedy)
    require(len(base) == len(weights), "base_weights", f"of shape [{len(weights)}]", list(base.shape))
    return weights.double(), base.double()


def log_mean(base: np.ndarray, changes: np.ndarray) -> float:
    """``log(base @ (1 + changes))``, accurate when the changes are tiny and when they are near -1."""
    change = float(base @ changes)
    return float(np.log1p(change)) if change > -0.5 else float(np.log(base @ (1 + changes)))


def increasing_root(
    function: Callable[[float], tuple[float, float]], low: float, high: float, start: float, *, unit: float
) -> tuple[float, float, float]:
    """The root of an increasing function, given with its slope, in an interval that brackets it: Newton, else bisection.

    Stops where a step is below ``1e-12 * max(unit, |x|)``. Returns the root and the last bracket, which is as narrow if the
    function jumps over 0 as seen in float64.
    """
    x = start if low < start < high else (low + high) / 2
    last = before = high - low
    for _ in range(MOST_ITERATIONS):
        value, slope = function(x)
        if value == 0:
            return x, x, x
        low, high = (low, x) if value > 0 else (x, high)
        precision = PRECISION * max(unit, abs(x))
        if high - low <= precision:
            break
        step = -value / slope if slope > 0 else float("inf")
        if abs(step) <= precision and abs(value) <= RESIDUAL:
            return x + step, low, high
        # A Newton step must stay inside and, over two steps, halve; otherwise the interval is halved.
        if not (low < x + step < high and precision < abs(step) <= before / 2):
            step = (low + high) / 2 - x
        x += step
        before, last = last, abs(step)
    return x, low, high

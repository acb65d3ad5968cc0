"""The alpha-divergence of order above 1."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import finite, require
from metarobust.divergences._tilt import SMALL, Tilt, distributions, increasing_root


@dataclass(frozen=True, kw_only=True)
class Alpha:
    r"""Alpha-divergence :math:`D(w \| P) = (\sum_i P_i (w_i / P_i)^a - 1) / (a (a - 1))` of order a > 1.

    Its worst-case weights are polynomial and exactly 0 for small losses:
    :math:`w_i = P_i (1 + (a - 1)(z_i - \nu))_+^{1/(a-1)}`, with nu such that they sum to 1. Order 2 is half of chi-squared; the
    limit at order 1 is `KL`. At orders below 1 the divergence does not keep the weights on the sample, so they are not
    offered. Birrell and Ebrahimi (2025), arXiv 2309.03791, f-divergence case; the conjugate is in its centred form here.
    Calling it gives the divergence, a scalar in float64.

    Args:
        order: a, above 1.

    Raises:
        ValueError: an order of at most 1.

    Example:
        >>> Alpha(order=2)(torch.tensor([1.0, 0.0]))  # (2^(a-1) - 1) / (a (a - 1))
        tensor(0.5000, dtype=torch.float64)
    """

    order: float

    def __post_init__(self) -> None:
        finite("order", self.order)
        require(self.order > 1, "order", "> 1", self.order, "the limit at order 1 is divergences.KL()")

    def __call__(self, weights: Tensor, base_weights: Tensor | None = None) -> Tensor:
        w, base = distributions(weights, base_weights)
        power = self.order - 1
        ratio = w / torch.where(base > 0, base, 1)
        infinite = torch.where((base == 0) & (w > 0), torch.inf, 0.0)
        change = torch.expm1(power * torch.where(ratio > 0, ratio, 1).log()) / power  # (r^(a-1) - 1) / (a - 1)
        return (base * (ratio * change - (ratio - 1)) / self.order + infinite).sum()

    @np.errstate(all="ignore")  # logarithms of 0 and overflow are meant
    def tilt(self, z: np.ndarray, base: np.ndarray, start: float | None = None) -> Tilt:
        r"""The root nu of ``base @ p(z - nu) = 1``, where :math:`p(y) = (1 + (a-1) y)_+^{1/(a-1)}`.

        Newton's method runs on :math:`((\sum P p)^{a-1} - 1) / (a-1)`, which is linear in nu for KL and where all of many equal
        examples are active, and piecewise linear at order 2.
        """
        power = self.order - 1
        top = int(z.argmax())
        z = z - z[top]

        def excess(negative: float) -> tuple[float, float]:
            changes = power * np.maximum(z + negative, -1 / power)
            ratio_less_1 = np.expm1(np.log1p(changes) / power)
            total_less_1 = float(base @ ratio_less_1)
            slope = float(base @ _divided(ratio_less_1 + 1, changes + 1))
            log_total = float(np.log1p(max(total_less_1, -1.0)))
            return float(np.expm1(power * log_total)) / power, slope * float(np.exp((power - 1) * log_total))

        # The example of the largest z alone has P p <= 1; and all p >= 1 at nu = min z.
        spread = -float(z.min())
        high = min(spread, float(np.expm1(-power * np.log(base[top]))) / power, 1e300)
        guess = spread * start if start else min(-float(base @ np.maximum(z, -high)), high / 2)
        negative, low, high = increasing_root(excess, 0.0, high, guess, unit=0.0) if high > 0 else (0.0, 0.0, 0.0)
        y = np.maximum(z + negative, -1 / power)
        logs = np.log1p(power * y) / power
        ratio = np.exp(logs)
        total = float(base @ ratio)
        if np.abs(y).max() < SMALL / self.order:  # the series of `_divergence` in y
            third, fourth = (2 - self.order) / 3, (2 - self.order) * (3 - 2 * self.order) / 8
            divergence = float(base @ (y * y * (0.5 + y * (third + y * fourth))))
        else:
            # Where an example just turns active, p may jump as seen in float64.
            if abs(total - 1) > 1e-12 and high - low <= 1e-11 * high:
                ratio = self._mixture(z + low, z + high, base)
                logs = np.log(ratio)
                y = np.expm1(power * logs) / power
            else:
                ratio /= total
            divergence = float(base @ (ratio * y - np.expm1(logs))) / self.order
        curvature = base * np.exp(np.where(ratio > 0, (1 - power) * logs, -np.inf))
        inner = negative / spread if 0 < spread < np.inf else 0.0
        total = float(curvature.sum())
        return Tilt(ratio, divergence, curvature, (1 / total if total > 0 else 0.0, 0.0, 0.0), inner)

    def _mixture(self, low: np.ndarray, high: np.ndarray, base: np.ndarray) -> np.ndarray:
        """Between the weights on the two sides of the root, those that sum to 1."""
        power = self.order - 1
        below, above = (np.exp(np.log1p(power * np.maximum(y, -1 / power)) / power) for y in (low, high))
        missing, gap = 1 - float(base @ below), float(base @ (above - below))
        ratio = below + (above - below) * min(max(missing / gap, 0.0), 1.0) if gap > 0 else above
        return ratio / (base @ ratio)


def _divided(ratio: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The slope p'(y) = p / (1 + (a - 1) y), 0 where p is."""
    return np.divide(ratio, base, out=np.zeros_like(ratio), where=base > 0)

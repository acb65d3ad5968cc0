"""The Renyi divergence of the base weights from the worst-case weights (reversed order)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import finite, require
from metarobust.divergences._tilt import SMALL, Tilt, distributions, increasing_root, log_mean


@dataclass(frozen=True, kw_only=True)
class Renyi:
    r"""Renyi divergence in reversed order, :math:`D(w \| P) = R_a(P \| w) = \log(\sum_i P_i^a w_i^{1-a}) / (a (a - 1))`.

    Its worst-case weights have a heavy tail and are never 0: :math:`w_i \propto P_i (\rho - z_i)^{-1/a}`, with rho above all z
    such that :math:`\sum_i w_i (\rho - z_i) = 1/a` (Birrell and Ebrahimi, 2025, arXiv 2309.03791, Renyi case). R_a(P || w)
    alone does not force w to live on the sample: over all distributions part of the mass could go to the worst point of the
    whole space. Here w is restricted to the examples whose base weight is positive. Calling it gives the divergence, a
    scalar in float64.

    Args:
        order: a, above 0 and not 1. For a > 1 every positive weight is needed: the divergence is infinite if one is 0.

    Raises:
        ValueError: an order of at most 0, or 1.

    Example:
        >>> Renyi(order=0.5)(torch.tensor([1.0, 0.0]))  # log(n) / (1 - a) for a < 1
        tensor(1.3863, dtype=torch.float64)
    """

    order: float

    def __post_init__(self) -> None:
        finite("order", self.order, above=0)
        require(self.order != 1, "order", "different from 1", self.order, "for a value near the limit write order=1.001")

    def __call__(self, weights: Tensor, base_weights: Tensor | None = None) -> Tensor:
        w, base = distributions(weights, base_weights)
        a = self.order
        terms = torch.where(base > 0, a * torch.where(base > 0, base, 1).log() + (1 - a) * w.log(), -torch.inf)
        infinite = torch.where((base == 0) & (w > 0), torch.inf, 0.0).sum()
        return terms.logsumexp(0) / (a * (a - 1)) + infinite

    @np.errstate(all="ignore")  # logarithms of 0 and overflow are meant
    def tilt(self, z: np.ndarray, base: np.ndarray, start: float | None = None) -> Tilt:
        r"""With :math:`\rho = \max z + e^q` and :math:`d = \max z - z`: the root q of :math:`\log(e^q + E_w d) + \log a`.

        In q the function is close to linear, with slope 1 for small d and 1/a for large ones.
        """
        a = self.order
        distances = z.max() - z
        logs = np.log(distances)
        if a > 1 and logs.max() == np.inf:
            return Tilt(np.zeros_like(z), float("inf"), np.zeros_like(z), (0.0, 0.0, 0.0), 0.0)

        high = -float(np.log(a))

        def excess(q: float) -> tuple[float, float]:
            lengths = np.logaddexp(0, logs - q)  # log of (rho - z) / e^q
            weights = base * np.exp(-lengths / a)
            total = float(weights.sum())
            inverse = float(weights @ np.exp(-lengths)) / total
            exponents = lengths * (1 - 1 / a)
            largest = float(exponents.max())
            log_mean_length = largest + float(np.log(base @ np.exp(exponents - largest))) - float(np.log(total))
            return log_mean_length + q - high, (1 - 1 / a) * float(np.exp(-log_mean_length)) + inverse / a

        q = high
        if logs.max() > -np.inf:
            low, width = high - 1, 1.0
            while excess(low)[0] > 0:
                low, width = low - 4 * width, 4 * width
            guess = start if start is not None else (low + high) / 2
            q, _, _ = increasing_root(excess, low, high, guess, unit=1.0)
        lengths = np.logaddexp(0, logs - q)
        shares = -lengths / a
        changes = np.expm1(shares)
        u = shares - (log_mean(base, changes) if base @ changes > -0.5 else float(np.log(base @ np.exp(shares))))
        ratio = np.exp(u)
        return Tilt(ratio, self._divergence(u, base), *self._curvature(base * ratio, lengths + q), q)

    def _divergence(self, logs: np.ndarray, base: np.ndarray) -> float:
        """From the logarithms of w / P: ``log1p(base @ (expm1((1 - a) u) - (1 - a) expm1(u)))`` without cancellation."""
        a = self.order
        if logs.min() > -SMALL / max(1, a) and logs.max() < SMALL / max(1, a):
            b = 1 - a
            half = float(base @ (logs * logs * (0.5 + logs * ((b + 1) / 6 + logs * (b * b + b + 1) / 24))))
            return float(np.log1p(a * (a - 1) * half)) / (a * (a - 1))
        exponents = (1 - a) * logs
        largest = float(exponents.max())
        if largest < 300:
            change = float(base @ (np.expm1(exponents) - (1 - a) * np.expm1(logs)))
            return (float(np.log1p(change)) if change > -0.5 else float(np.log(base @ np.exp(exponents)))) / (a * (a - 1))
        return (largest + float(np.log(base @ np.exp(exponents - largest)))) / (a * (a - 1))

    def _curvature(self, w: np.ndarray, log_lengths: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
        """h = w / (a (rho - z)) and M, from the derivative of the condition that defines rho."""
        a = self.order
        h = w * np.exp(np.minimum(-log_lengths, 690.0)) / a
        total = a * float(h.sum())
        scale = a * (a - 1) / total  # at least a - 1 > -1
        return h, (a / total / (1 + scale), scale / (1 + scale), -(a - 1) / (1 + scale))

"""The Kullback-Leibler divergence."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarobust.divergences._tilt import SMALL, Tilt, distributions, log_mean


@dataclass(frozen=True, kw_only=True)
class KL:
    r"""Kullback-Leibler divergence :math:`D(w \| P) = \sum_i w_i \log (w_i / P_i)`.

    Its worst-case weights are exponential in the loss, :math:`w_i \propto P_i e^{z_i}` (Birrell and Ebrahimi, 2025,
    arXiv 2309.03791, KL case). Calling it gives the divergence, a scalar in float64 that is differentiable where w > 0.

    Example:
        >>> KL()(torch.tensor([1.0, 0.0]))  # all weight on one of two examples: log 2
        tensor(0.6931, dtype=torch.float64)
    """

    def __call__(self, weights: Tensor, base_weights: Tensor | None = None) -> Tensor:
        w, base = distributions(weights, base_weights)
        ratio = w / torch.where(base > 0, base, 1)
        infinite = torch.where((base == 0) & (w > 0), torch.inf, 0.0)
        return (torch.xlogy(w, ratio) + infinite).sum()

    @np.errstate(all="ignore")  # logarithms of 0 and overflow are meant
    def tilt(self, z: np.ndarray, base: np.ndarray, start: float | None = None) -> Tilt:
        """``w = softmax(log P + z)``; J is the covariance ``diag(w) - w w^T``."""
        y = z - z.max()
        shift = _log_partition(y, base)
        logs = np.maximum(y - shift, -1e300)
        ratio = np.exp(logs)
        w = base * ratio
        if logs.min() > -SMALL and logs.max() < SMALL:  # r log r - r + 1 without cancellation, r = e^u
            divergence = float(base @ (logs * logs * (0.5 + logs * (1 / 3 + logs / 8))))
        else:
            divergence = float(base @ (ratio * logs - np.expm1(logs)))
        return Tilt(ratio, divergence, w, (1.0, 0.0, 0.0), shift)


def _log_partition(y: np.ndarray, base: np.ndarray) -> float:
    """``log(base @ exp(y))`` for ``y <= 0`` with maximum 0."""
    changes = np.expm1(y)
    if base @ changes > -0.5:
        return log_mean(base, changes)
    return float(np.log(base @ np.exp(y)))

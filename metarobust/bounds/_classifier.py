"""The classifier that the dual potentials describe."""

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import floating, message
from metarobust._tensors import flat
from metarobust.bounds._conflicts import ConflictGraph

PAIRS_AT_ONCE = 2**22


class RobustClassifier:
    r"""Probabilities from potentials, :math:`f_k(x') = \max \{q_i : y_i = k, \|x' - x_i\| \le \epsilon\}`.

    What the maxima leave over goes to the class of the nearest point. Since the potentials of every set of balls that meet sum
    to at most 1, each point ``x_i`` is answered rightly with probability at least ``q_i`` anywhere in its ball (Garcia Trillos
    et al., 2024, section 2, for the indicator cost). It knows the points by heart: elsewhere it guarantees nothing.

    Call it with ``[batch, ...]`` in input units; it returns probabilities ``[batch, classes]``, float64. It has no gradient.

    Args:
        graph: which points conflict; `RiskBound.classifier` passes it on.
        guarantee: the potentials q, float64 ``[n]``.
        shape: of one input, without the batch.

    Example:
        >>> from metarobust.bounds import adversarial_risk_bound
        >>> from metarobust.threat_models import ThreatModel
        >>> x, y = torch.tensor([[0.0], [0.4], [0.5], [1.0]]), torch.tensor([0, 1, 1, 1])
        >>> classifier = adversarial_risk_bound(x, y, ThreatModel(norm="l2", epsilon=0.3)).classifier()
        >>> classifier(torch.tensor([[0.25], [0.9]])).tolist()
        [[0.0, 1.0], [0.0, 1.0]]
    """

    def __init__(self, graph: ConflictGraph, guarantee: np.ndarray, shape: tuple[int, ...]) -> None:
        self.graph, self.shape = graph, shape
        device = graph.points.x.device
        self.x = graph.points.x.double() * graph.points.unit
        self.y = torch.from_numpy(graph.points.y).to(device)
        self.guarantee = torch.from_numpy(guarantee).to(device)
        self.classes = int(self.y.max()) + 1
        # In float64 a matrix product is precise enough unless the balls are tiny beside the points themselves.
        precise = graph.epsilon > 1e-3 * float(self.x.abs().max()) * self.x.shape[1] ** 0.5
        self.mode = ("" if precise else "donot_") + "use_mm_for_euclid_dist"

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """``x [batch, ...]`` in input units to probabilities ``[batch, classes]``, float64, on the device of the points."""
        floating("x", x)
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(message("x", f"of shape [batch, {', '.join(map(str, self.shape))}]", list(x.shape)))
        rows = flat(x).double().to(self.x.device)
        at_once = max(1, PAIRS_AT_ONCE // max(1, len(self.x)))
        parts = [self._probabilities(part) for part in rows.split(at_once)]
        return torch.cat(parts) if parts else rows.new_zeros(0, self.classes)

    def _probabilities(self, x: Tensor) -> Tensor:
        p = 2.0 if self.graph.norm == "l2" else float("inf")
        distance = torch.cdist(x, self.x, p=p, compute_mode=self.mode)
        probability = self._promised(distance <= self.graph.radius)
        # A move to the boundary is rounded to one side or the other. Balls that x misses by no more get what is left over, so
        # that the promises of the balls around x stay whole.
        rounding = 1e-5 * self.graph.epsilon + 1e-6 * torch.linalg.vector_norm(x, ord=p, dim=1, keepdim=True)
        wanted = (self._promised(distance <= self.graph.radius + rounding) - probability).clamp(min=0)
        left = 1 - probability.sum(1, keepdim=True)
        probability += wanted * (left / wanted.sum(1, keepdim=True).clamp(min=1e-300)).clamp(0, 1)
        nearest = self.y[distance.argmin(1)]
        left = (1 - probability.sum(1, keepdim=True)).clamp(min=0)
        return probability.scatter_add_(1, nearest[:, None], left)

    def _promised(self, inside: Tensor) -> Tensor:
        """Per class the largest guarantee among the points whose balls hold x; in all at most 1."""
        promised = torch.where(inside, self.guarantee, 0.0)
        probability = promised.new_zeros(len(inside), self.classes)
        probability.scatter_reduce_(1, self.y.expand(len(inside), -1), promised, "amax")
        return probability / probability.sum(1, keepdim=True).clamp(min=1)

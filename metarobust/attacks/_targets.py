"""Which wrong classes a targeted search goes for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust._checks import choice, integer, require
from metarobust._tensors import norms
from metarobust.attacks._common import input_gradient
from metarobust.losses import targeted_margin
from metarobust.threat_models import ThreatModel
from metarobust.types import Model

TARGETS = ("all", "top_logits", "nearest", "halving")
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


@dataclass(frozen=True, kw_only=True)
class TargetSet:
    """A choice of target classes; ``count`` bounds their number (None: every wrong class)."""

    kind: str
    count: int | None = None

    def __post_init__(self) -> None:
        choice("targets", self.kind, TARGETS)
        if self.count is not None:
            integer("target_count", self.count, least=1)
        needs_count = self.kind in ("top_logits", "nearest")
        require(
            needs_count == (self.count is not None),
            "target_count",
            f"{'given' if needs_count else 'None'} with targets={self.kind!r}",
            self.count,
            "write target_count=3" if needs_count else "write targets='top_logits' to bound the number of targets",
        )

    def choose(self, model: Model, x: Tensor, y: Tensor, logits: Tensor, threat_model: ThreatModel) -> Tensor:
        """Targets ``[batch, count]``, most promising first; never the label."""
        wrong = logits.scatter(1, y[:, None], float("-inf"))
        available = logits.shape[1] - 1
        count = available if self.count is None else min(self.count, available)
        if self.kind != "nearest":
            return wrong.topk(count, dim=1).indices
        return (
            self._distances(model, x, y, wrong.topk(available, dim=1).indices, threat_model)
            .topk(count, dim=1, largest=False)
            .indices
        )

    def halvings(self, group: int, steps: int) -> dict[int, int]:
        """After which steps how many rows per example go on: half of them after each quarter of the steps."""
        if self.kind != "halving":
            return {}
        found, rows = {}, group
        for quarter in (1, 2, 3):
            rows = (rows + 1) // 2
            if quarter * steps // 4 > 0:
                found[quarter * steps // 4] = rows
        return found

    def _distances(self, model: Model, x: Tensor, y: Tensor, wrong: Tensor, threat_model: ThreatModel) -> Tensor:
        r"""First-order distance to each boundary, :math:`-M_j / \|\nabla M_j\|_*`, ``[batch, classes]``; inf at the label."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = model(leaf)
            distances = torch.full_like(logits, float("inf")).detach()
            for target in wrong.T:
                value = targeted_margin(logits, y, target)
                slope = norms(input_gradient(value, leaf, retain_graph=True), DUAL[threat_model.norm])
                distance = -value.detach() / slope.clamp(min=torch.finfo(slope.dtype).tiny)
                distances.scatter_(1, target[:, None], distance[:, None].to(distances.dtype))
        return distances

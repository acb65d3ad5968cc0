"""Gradient ascent and random search in turn, each from the other's best point."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust._checks import finite, integer, message, require
from metarobust.attacks._beta import BETA
from metarobust.attacks._common import checked
from metarobust.attacks._counting import record_call
from metarobust.attacks._square import Square
from metarobust.attacks._worst_case import margins_of
from metarobust.threat_models import ThreatModel
from metarobust.types import Model


@dataclass(frozen=True, kw_only=True)
class Alternating:
    """BETA, then rounds of Square and BETA on the examples that came closest, each from the best point found so far.

    The two searches fail for different reasons: gradient steps end in local maxima and saturated regions, random windows are
    blind to what many pixels do together. Started at each other's best point they break examples that neither breaks alone
    (figures in docs/papers/beta.md). A misclassified example is finished. Each round works on the share ``closest`` of those
    that stand, the ones of largest margin: budget goes where success is near.

    This combination is the library's own. For l1, where Square is not defined, the rounds are BETA from new random points.

    Args:
        threat_model: ball and box, in input units.
        steps: gradient steps of each ascent, by APGD's step rule.
        rounds: rounds of random search and ascent after the first ascent.
        queries: queries of the random search in each round.
        closest: share of the standing examples of a call that each round works on, in (0, 1]; at least one example.
        target_count: wrong classes that each ascent goes for in a round, those with the highest logits at its start; the
            first ascent goes for all and halves their number three times.
        memory_budget: bytes that saved activations may take, see `BETA`.
        initial_fraction: share of the coordinates in the first windows of the random search, which begins near its goal; in
            (0, 1].

    Raises:
        ValueError: on a call, for inputs outside the box or labels outside the classes.
        TypeError: on a call, for inputs or labels of the wrong dtype.

    Example:
        >>> attack = Alternating(threat_model=ThreatModel(norm="linf", epsilon=0.1), steps=10, queries=20)
        >>> x_adv = attack(lambda x: x, torch.tensor([[0.55, 0.45]]), torch.tensor([0]), generator=torch.Generator())
        >>> bool(x_adv.argmax(1) == 1)
        True
    """

    threat_model: ThreatModel
    steps: int = 30
    rounds: int = 3
    queries: int = 1000
    closest: float = 0.15
    target_count: int = 3
    memory_budget: int | None = None
    initial_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel", repr(self.threat_model)))
        integer("rounds", self.rounds, least=0)
        integer("queries", self.queries, least=1)
        finite("closest", self.closest, above=0.0)
        require(self.closest <= 1, "closest", "at most 1 (every standing example)", self.closest)
        integer("target_count", self.target_count, least=1)
        _ = self._ascent("halving")

    def _ascent(self, targets: str) -> BETA:
        return BETA(
            threat_model=self.threat_model,
            steps=self.steps,
            step_rule="apgd",
            targets=targets,
            target_count=None if targets == "halving" else self.target_count,
            survivors_only=True,
            memory_budget=self.memory_budget,
        )

    @torch.inference_mode(False)
    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached, inside ball and box."""
        x, y = checked(self.threat_model, model, x, y)
        record_call(len(x))
        if len(x) == 0 or self.threat_model.epsilon == 0:
            return x.clone()
        found = self._ascent("halving")(model, x, y, generator=generator)
        reached = margins_of(model, found, y)
        ascent, search = self._ascent("top_logits"), self._search()
        for _ in range(self.rounds):
            standing = (reached <= 0).nonzero().squeeze(1)
            if len(standing) == 0:
                break
            count = math.ceil(self.closest * len(standing))
            rows = standing[reached[standing].topk(count).indices.sort().values]
            begin = found[rows]
            if search is not None:
                begin = search(model, x[rows], y[rows], generator=generator, start=begin)
            moved = ascent(model, x[rows], y[rows], generator=generator, start=begin if search is not None else None)
            margins = margins_of(model, moved, y[rows])
            better = margins > reached[rows]
            found[rows[better]], reached[rows[better]] = moved[better], margins[better]
        return found

    def _search(self) -> Square | None:
        if self.threat_model.norm == "l1":
            return None
        return Square(threat_model=self.threat_model, queries=self.queries, initial_fraction=self.initial_fraction)

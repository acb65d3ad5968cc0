"""The worst of several attacks, example by example."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust import _checks
from metarobust._checks import called, message, require
from metarobust.attacks._common import buffers_kept, checked, checked_logits
from metarobust.attacks._counting import record_call
from metarobust.losses import margin
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack, Model

AT_ONCE = 128
"""Rows of a forward pass without a graph."""


@dataclass(frozen=True)
class WorstCase:
    """Attacks in order, each on the examples that withstood those before; per example the point of largest margin.

    The examples' own points are candidates too, so an example that is misclassified already is returned as it is.

    Args:
        attacks: attacks on the same threat model, cheap ones first.

    Raises:
        ValueError: no attack, or attacks with different threat models.

    Example:
        >>> from metarobust.attacks import FGSM, PGD
        >>> from metarobust.threat_models import ThreatModel
        >>> threat_model = ThreatModel(norm="linf", epsilon=0.1)
        >>> attack = WorstCase((FGSM(threat_model=threat_model), PGD(threat_model=threat_model, steps=20)))
        >>> attack(lambda x: x, torch.tensor([[0.55, 0.45]]), torch.tensor([0]))
        tensor([[0.4500, 0.5500]])
    """

    attacks: Sequence[Attack]

    def __post_init__(self) -> None:
        if isinstance(self.attacks, str) or not isinstance(self.attacks, Sequence):
            raise TypeError(
                message("attacks", "a sequence of attacks", type(self.attacks).__name__, "write [FGSM(...), PGD(...)]")
            )
        require(len(self.attacks) > 0, "attacks", "at least one attack", "none")
        for attack in self.attacks:
            if isinstance(attack, type) or not callable(attack):
                raise TypeError(
                    message("attacks", "a sequence of attacks", f"an element {attack!r}", "write [FGSM(...), PGD(...)]")
                )
        kinds = {repr(attack.threat_model) for attack in self.attacks if hasattr(attack, "threat_model")}  # type: ignore[attr-defined]
        require(len(kinds) <= 1, "attacks", "of one threat model", " and ".join(sorted(kinds)))
        object.__setattr__(self, "attacks", tuple(self.attacks))

    @torch.inference_mode(False)
    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached, inside ball and box."""
        record_call(len(x))
        threat_model = self._threat_model
        _checks.model(model)
        if threat_model is not None:
            x, y = checked(threat_model, model, x, y)
        found = x.detach().clone()
        if len(x) == 0:
            return found
        highest = margins_of(model, found, y)
        for attack in self.attacks:
            standing = (highest <= 0).nonzero().squeeze(1)
            if len(standing) == 0:
                break
            moved = attack(model, x[standing], y[standing], generator=generator)
            reached = margins_of(model, moved, y[standing])
            better = reached > highest[standing]
            found[standing[better]], highest[standing[better]] = moved[better], reached[better]
        return found

    @property
    def _threat_model(self) -> ThreatModel | None:
        return next((attack.threat_model for attack in self.attacks if hasattr(attack, "threat_model")), None)  # type: ignore[attr-defined]


@torch.no_grad()
def margins_of(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus the label's own, ``[batch]``; positive exactly when misclassified."""
    with buffers_kept(model):
        pairs = zip(x.split(AT_ONCE), y.split(AT_ONCE), strict=True)
        logits = torch.cat([checked_logits(called(model, rows), own) for rows, own in pairs])
    return margin(logits if logits.element_size() >= 4 else logits.float(), y)

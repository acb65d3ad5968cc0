"""What the objectives share: the check of an attack, and the point that it finds."""

from typing import Any

import torch
from torch import Tensor

from metarobust._checks import message
from metarobust.types import Attack, Model


def check_attack(attack: Any) -> None:
    """Check that ``attack`` can be called on a batch; a class that was not instantiated cannot."""
    if isinstance(attack, type) or not callable(attack):
        remedy = f"write {attack.__name__}(threat_model=...)" if isinstance(attack, type) else "write PGD(threat_model=...)"
        raise TypeError(message("attack", "an attack", repr(attack), remedy))


def attacked(attack: Attack, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    """The attack's point, a constant for the gradient in the parameters even if the attack keeps its graph."""
    return attack(model, x, y, generator=generator).detach()

"""What the objectives share: the check of an attack, the point that it finds, and the loss between two rows of logits."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from metarobust._checks import message
from metarobust.types import Attack, Model


@runtime_checkable
class PairLoss(Protocol):
    """An objective that comes apart: where it moves x, and what it charges for the logits there.

    ``reads_clean`` says whether the charge depends on the logits at x. Without, ``clean`` is not read.
    """

    @property
    def reads_clean(self) -> bool: ...

    def moved(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor: ...

    def charge(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor: ...


@runtime_checkable
class BallLoss(PairLoss, Protocol):
    """A `PairLoss` for which any attack inside a ball may find the points.

    ``climbed`` is what such an attack climbs in the moved logits: the charge, or the part of it that moves, or what the authors
    of the objective climb instead.
    """

    def climbed(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor: ...


def check_attack(attack: Any) -> None:
    """Check that ``attack`` can be called on a batch; a class that was not instantiated cannot."""
    if isinstance(attack, type) or not callable(attack):
        remedy = f"write {attack.__name__}(threat_model=...)" if isinstance(attack, type) else "write PGD(threat_model=...)"
        raise TypeError(message("attack", "an attack", repr(attack), remedy))


def check_robust_loss(loss: Any) -> None:
    """Check that ``loss`` can be called on a batch; a class that was not instantiated cannot."""
    if isinstance(loss, type) or not callable(loss):
        remedy = f"write {loss.__name__}(...)" if isinstance(loss, type) else "write AdversarialTraining(attack=...)"
        raise TypeError(message("robust_loss", "a robust loss", repr(loss), remedy))


def attacked(attack: Attack, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    """The attack's point, a constant for the gradient in the parameters even if the attack keeps its graph."""
    moved = attack(model, x, y, generator=generator)
    if not isinstance(moved, Tensor) or moved.shape != x.shape:
        got = f"shape {list(moved.shape)}" if isinstance(moved, Tensor) else type(moved).__name__
        raise ValueError(message("attack", f"a function that returns the moved x, {list(x.shape)}", got))
    return moved.detach()

"""What the objectives share: the check of an attack, the point that it finds, and the loss between two rows of logits."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from metarobust._checks import message
from metarobust.types import Attack, Model


@runtime_checkable
class PairLoss(Protocol):
    r"""A robust loss that comes apart: where it moves x, and what it charges for the logits there.

    What comes apart can be combined further: `ARMOR` with a transport cost moves x in its own way and asks for the charge, and
    `CAAT` and `MetaWeightNet` charge adversaries and anti-adversaries alike. `AdversarialTraining`, `TRADES`, `MART` and `UDR`
    come apart; a class of your own with these four members does too.

    Attributes:
        reads_clean: whether the charge depends on the logits at x. Without, ``clean`` is not read.

    Example:
        >>> from metarobust.attacks import PGD
        >>> from metarobust.losses import cross_entropy
        >>> from metarobust.threat_models import ThreatModel
        >>> class SquaredChange:
        ...     '''Cross-entropy, and how far the logits move.'''
        ...     reads_clean, attack = True, PGD(threat_model=ThreatModel(epsilon=0.1), steps=2)
        ...     def moved(self, model, x, y, *, generator=None):
        ...         return self.attack(model, x, y, generator=generator)
        ...     def charge(self, clean, moved, y):
        ...         return cross_entropy(clean, y) + (moved - clean).square().sum(dim=1)
        ...     def __call__(self, model, x, y, *, generator=None):
        ...         return self.charge(model(x), model(self.moved(model, x, y, generator=generator)), y)
        >>> isinstance(SquaredChange(), PairLoss), isinstance(SquaredChange(), BallLoss)
        (True, False)
    """

    @property
    def reads_clean(self) -> bool:
        """Whether the charge depends on the logits at x."""
        ...

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """One loss per example, ``[batch]``: the charge at the points that `moved` finds.

        Args:
            model, x, y, generator: as in `moved`.
        """
        ...

    def moved(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The points, like ``x``, a constant for gradients.

        Args:
            model: from inputs to logits.
            x: ``[batch, ...]``, input units.
            y: ``[batch]``, int64.
            generator: of the noise, on the CPU.
        """
        ...

    def charge(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        """One loss per example, ``[batch]``.

        Args:
            clean: logits ``[batch, classes]`` at x.
            moved: logits ``[batch, classes]`` at the moved points.
            y: ``[batch]``, int64.
        """
        ...


@runtime_checkable
class BallLoss(PairLoss, Protocol):
    """A `PairLoss` for which any attack inside a ball may find the points, as `CAAT` does with radii of its own.

    Example:
        >>> from metarobust.objectives import TRADES, UDR
        >>> from metarobust.threat_models import ThreatModel
        >>> [isinstance(loss(threat_model=ThreatModel(epsilon=0.1)), BallLoss) for loss in (TRADES, UDR)]
        [True, False]
    """

    def climbed(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        """What such an attack climbs, ``[batch]``: the charge, the part of it that moves, or what its authors climb.

        Args:
            clean, moved, y: as in `charge`.
        """
        ...


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

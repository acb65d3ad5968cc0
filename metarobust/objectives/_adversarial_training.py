"""Adversarial training: the loss at the attacked point."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust._checks import require
from metarobust.losses import Loss, known_loss, loss_function
from metarobust.objectives._common import attacked, check_attack
from metarobust.types import Attack, Model


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    r"""Adversarial training: :math:`\ell(f(x'), y)` with :math:`x'` from an attack (Madry et al., 2018).

    arXiv 1706.06083, eq. 2.1, where the attack is PGD on the cross-entropy.

    :math:`x'` is a constant for the gradient in the parameters. By Danskin's theorem that gradient is the one of
    :math:`\max_{x'} \ell(f(x'), y)` where the attack reaches a unique maximum of the same loss; with another loss, or an inexact
    attack, it drops the term through :math:`x'`.

    The attack leaves mode and BatchNorm statistics as they are; then one forward pass over the attacked batch, and none over the
    clean one, moves the statistics of a model in training mode.

    Args:
        attack: any attack, such as `metarobust.attacks.PGD`.
        loss: ``"cross_entropy"``, ``"margin"``, ``"dlr"``, or a callable ``(logits, y) -> [batch]``.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the attack's noise.

    Raises:
        TypeError: an attack that cannot be called.
        ValueError: an unknown loss.

    Example:
        >>> from metarobust.attacks import FGSM
        >>> from metarobust.threat_models import ThreatModel
        >>> objective = AdversarialTraining(attack=FGSM(threat_model=ThreatModel(norm="linf", epsilon=0.1)))
        >>> model, x, y = torch.nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> losses = objective(model, x, y)
        >>> losses.mean().backward()
        >>> losses.shape
        torch.Size([4])
    """

    attack: Attack
    loss: str | Loss = "cross_entropy"

    def __post_init__(self) -> None:
        check_attack(self.attack)
        loss_function(self.loss)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one loss per example, ``[batch]``."""
        logits = model(self.moved(model, x, y, generator=generator))
        return self.charge(logits, logits, y)

    @property
    def reads_clean(self) -> bool:
        """Whether `charge` reads the logits at x."""
        return False

    def moved(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The points that the attack on ``model`` finds from ``x`` with labels ``y`` and noise from ``generator``, detached."""
        return attacked(self.attack, model, x, y, generator)

    def charge(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        """The loss ``[batch]`` of the logits ``moved [batch, classes]`` for the labels ``y``; ``clean`` is not read."""
        losses = known_loss(self.loss)(moved, y)
        require(
            losses.shape == y.shape, "loss", f"a function that returns [{len(y)}]", f"shape {list(losses.shape)}", "drop the mean"
        )
        return losses

    def climbed(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        """What an attack climbs in the logits ``moved``, ``[batch]``, given the logits ``clean`` at x and the labels ``y``."""
        return self.charge(clean, moved, y)

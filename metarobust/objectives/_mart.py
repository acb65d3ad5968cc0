"""MART: boosted cross-entropy at the attacked point, and consistency where the clean prediction is unsure."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust._checks import finite
from metarobust.losses import boosted_cross_entropy, cross_entropy, kl_divergence
from metarobust.objectives._common import attacked, check_attack
from metarobust.types import Attack, Model


@dataclass(frozen=True, kw_only=True)
class MART:
    r"""MART: :math:`BCE(f(x'), y) + \beta\, KL(p(x) \| p(x'))\, (1 - p_y(x))` (Wang et al., 2020).

    "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020.
    :math:`BCE = -\log p_y - \log(1.0001 - \max_{k \ne y} p_k)` is `metarobust.losses.boosted_cross_entropy`, and :math:`x'` comes
    from an attack on the cross-entropy. :math:`x'` is a constant for the gradient in the parameters; everything else, the weight
    :math:`1 - p_y(x)` too, is differentiated. The attack climbs another loss than the one that is charged, so the envelope
    theorem does not apply: the term through :math:`x'` is dropped, as published. The weight is summed over the wrong classes,
    so that it needs no guard against rounding (the published code writes 1.0000001 for 1).

    The attack leaves mode and BatchNorm statistics as they are. The loss takes two forward passes, over the clean batch and
    over the attacked one, as published: in training mode each batch is normalised by its own statistics, and both passes, the
    clean one first, move the running statistics.

    Args:
        attack: the attack that finds :math:`x'`; in the paper `metarobust.attacks.PGD` on the cross-entropy.
        beta: weight of the KL term, at least 0.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the attack's noise.

    Raises:
        TypeError: an attack that cannot be called.
        ValueError: a negative or non-finite beta; on a call, fewer than two classes.

    Example:
        >>> from metarobust.attacks import PGD
        >>> from metarobust.threat_models import ThreatModel
        >>> objective = MART(attack=PGD(threat_model=ThreatModel(norm="linf", epsilon=0.1)), beta=6.0)
        >>> model, x, y = torch.nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> losses = objective(model, x, y, generator=torch.Generator().manual_seed(0))
        >>> losses.mean().backward()
        >>> losses.shape
        torch.Size([4])
    """

    attack: Attack
    beta: float = 6.0

    def __post_init__(self) -> None:
        check_attack(self.attack)
        finite("beta", self.beta, least=0.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one loss per example, ``[batch]``."""
        x_adv = self.moved(model, x, y, generator=generator)
        logits = model(x)
        return self.charge(logits, model(x_adv), y)

    @property
    def reads_clean(self) -> bool:
        """Whether `charge` reads the logits at x."""
        return True

    def moved(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The points that the attack on ``model`` finds from ``x`` with labels ``y`` and noise from ``generator``, detached."""
        return attacked(self.attack, model, x, y, generator)

    def charge(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        """The loss ``[batch]`` of the logits ``[batch, classes]``, ``clean`` at x and ``moved`` at x', for the labels ``y``."""
        # A sum of wrong probabilities keeps its digits where 1 - p_y would round to 0.
        doubt = clean.softmax(1).scatter(1, y[:, None], 0.0).sum(1)
        return boosted_cross_entropy(moved, y) + self.beta * kl_divergence(clean, moved) * doubt

    def climbed(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        """What an attack climbs in the logits ``moved``, ``[batch]``, given the logits ``clean`` at x and the labels ``y``."""
        return cross_entropy(moved, y)

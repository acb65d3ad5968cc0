"""UDR: adversarial training against moves that are free inside a ball and cost something outside."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust._checks import finite, integer, message
from metarobust.attacks import TransportAscent
from metarobust.losses import cross_entropy
from metarobust.threat_models import ThreatModel
from metarobust.transport_costs import SoftHinge
from metarobust.types import Model


@dataclass(frozen=True, kw_only=True)
class UDR:
    r"""Unified distributional robustness: cross-entropy at the point that is worth its transport (Bui et al., 2022).

    "A Unified Wasserstein Distributional Robustness Framework for Adversarial Training", arXiv 2202.13437, with the l_inf soft
    ball: the charge is :math:`CE(f(x'), y)` at

    .. math:: x' = \arg\max_{x'} CE(f(x'), y) - s\, c(x', x), \qquad
        c = \tfrac{w}{2} \sum_j \bigl(|x'_j - x_j| - \epsilon\bigr)_+^2.

    x' is a constant for the gradient in the parameters. The cost does not depend on them, so this is the gradient of the maximum
    (Danskin) where the ascent reaches a unique one. As the multiplier s grows this is adversarial training in the ball.

    The published training lowers s from 1 while the mean move is below epsilon; here s is a constant. Under `ARMOR` the dual sets
    s for every batch from its radius, exactly. The ascent follows the gradient of CE - s c and keeps the best point; the
    published one adds a sign step and a shrinking step that maximise no common objective.

    Args:
        threat_model: l_inf ball and box, in input units.
        multiplier: s, greater than 0.
        weight: w, in 1 / input units squared, greater than 0. Default ``1 / step_size``, as published.
        steps: number of gradient steps, at least 1.
        step_size: mean length of a step, input units. Default ``2.5 * epsilon / steps``.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the random start.

    Raises:
        TypeError: no threat model; settings of the wrong type.
        ValueError: a ball that is not l_inf, a setting out of range.

    Example:
        >>> objective = UDR(threat_model=ThreatModel(norm="linf", epsilon=0.1))
        >>> model, x, y = torch.nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> objective(model, x, y, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4])
    """

    threat_model: ThreatModel
    multiplier: float = 1.0
    weight: float | None = None
    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel", repr(self.threat_model)))
        finite("multiplier", self.multiplier, above=0.0)
        integer("steps", self.steps, least=1)
        for name in ("weight", "step_size"):
            if getattr(self, name) is not None:
                finite(name, getattr(self, name), above=0.0)
        _ = self.attack

    @property
    def attack(self) -> TransportAscent:
        """The ascent of CE - s c."""
        step_size = 2.5 * self.threat_model.epsilon / self.steps if self.step_size is None else self.step_size
        finite("epsilon or step_size", step_size, above=0.0)
        cost = SoftHinge(threat_model=self.threat_model, weight=1 / step_size if self.weight is None else self.weight)
        return TransportAscent(
            transport_cost=cost, scale=self.multiplier, steps=self.steps, step_size=step_size, random_start=True
        )

    @property
    def reads_clean(self) -> bool:
        """Whether `charge` reads the logits at x."""
        return False

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one loss per example, ``[batch]``."""
        logits = model(self.moved(model, x, y, generator=generator))
        return self.charge(logits, logits, y)

    def moved(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The points that the ascent on ``model`` finds from ``x`` with labels ``y`` and noise from ``generator``, detached."""
        return self.attack(model, x, y, generator=generator)

    def charge(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        """The loss ``[batch]`` of the logits ``moved [batch, classes]`` for the labels ``y``; ``clean`` is not read."""
        return cross_entropy(moved, y)

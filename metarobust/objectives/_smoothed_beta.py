"""Training on the points of all targets of the best targeted attack, weighted by how far each gets."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metarobust._checks import finite, require
from metarobust.attacks import BETA
from metarobust.losses import cross_entropy, targeted_margin
from metarobust.objectives._beta_training import built_attack
from metarobust.threat_models import ThreatModel
from metarobust.types import Model


@dataclass(frozen=True, kw_only=True)
class SmoothedBETATraining:
    r"""Cross-entropy at the best point of every wrong class, :math:`\sum_{j \ne y} \lambda_j\, CE(f(x + \eta_j), y)`.

    .. math:: \eta_j = \arg\max_{\|\eta\| \le \epsilon} M_j(x + \eta), \qquad
        \lambda_j = \operatorname{softmax}_j\bigl(\mu M_j(x + \eta_j)\bigr), \qquad M_j(x) = f(x)_j - f(x)_y.

    A smoothed form of the training of Robey et al. (2024), arXiv 2306.11035: :math:`\lambda` maximises
    :math:`\sum_j \lambda_j M_j` plus its entropy divided by :math:`\mu`, in place of the one best class of `BETATraining`. As
    :math:`\mu` grows it becomes `BETATraining`; at 0 it is the plain mean over the wrong classes. With two classes both are the
    same. :math:`\lambda` and the points are constants for the gradient in the parameters.

    The attack computes all these points anyway, but the outer pass, forward and backward with a graph, takes
    ``batch * (classes - 1)`` rows in place of ``batch``, and activations in memory grow as much. The attack leaves mode and
    BatchNorm statistics as they are; the one outer pass moves the statistics of a model in training mode.

    Args:
        threat_model: ball and box, in input units.
        mu: sharpness of the weights, in 1 / logit, at least 0.
        steps: number of gradient steps, at least 1.
        step_rule: of the attack, see `metarobust.attacks.BETA`.
        random_start: False starts at x.
        attack: a BETA that takes the place of ``threat_model``; ``steps``, ``step_rule`` and ``random_start`` are not read.
            The sum runs over its targets, if it goes for less than all wrong classes.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the attack's noise.

    Raises:
        TypeError: neither a threat model nor an attack, or both; settings of the wrong type.
        ValueError: a setting out of range, an attack that drops examples (``survivors_only``); on a call, inputs outside the
            box or labels outside the classes.

    Example:
        >>> objective = SmoothedBETATraining(threat_model=ThreatModel(norm="linf", epsilon=0.1), mu=1.0)
        >>> model, x, y = torch.nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> losses = objective(model, x, y, generator=torch.Generator().manual_seed(0))
        >>> losses.mean().backward()
        >>> losses.shape
        torch.Size([4])
    """

    threat_model: ThreatModel | None = None
    mu: float
    steps: int = 10
    step_rule: str = "rmsprop"
    random_start: bool = True
    attack: BETA | None = None

    def __post_init__(self) -> None:
        finite("mu", self.mu, least=0.0)
        require(not self._attack.survivors_only, "survivors_only", "False in an attack to train on", True)

    @cached_property
    def _attack(self) -> BETA:
        return built_attack(self)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one loss per example, ``[batch]``."""
        points, targets = self._attack.each_target(model, x, y, generator=generator)
        labels = y.repeat_interleave(targets.shape[1])
        logits = model(points.flatten(0, 1))
        margins = targeted_margin(logits.detach(), labels, targets.flatten()).view_as(targets)
        weights = (self.mu * margins).softmax(1)
        return (weights * cross_entropy(logits, labels).view_as(targets)).sum(1)

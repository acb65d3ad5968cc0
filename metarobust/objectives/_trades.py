"""TRADES: clean cross-entropy plus the largest change of the predicted distribution inside the ball."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust._checks import finite, integer, message
from metarobust._tensors import normal
from metarobust.attacks import PGD
from metarobust.attacks._common import buffers_kept, check_step_size, checked, checked_logits
from metarobust.attacks._counting import record_call
from metarobust.attacks._gradient import _ascend
from metarobust.losses import cross_entropy, kl_divergence
from metarobust.objectives._common import attacked, check_attack
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack, Model


@dataclass(frozen=True, kw_only=True)
class TRADES:
    r"""TRADES: :math:`CE(f(x), y) + \beta\, KL(p(x) \| p(x'))` (Zhang et al., 2019, arXiv 1901.08573, algorithm 1).

    :math:`p = softmax(f)`, and :math:`x'` maximises the KL divergence by projected steepest ascent (signs for l_inf, normalised
    gradients for l2) from a small Gaussian start, because the gradient is zero at x itself. :math:`x'` is a constant for the
    gradient in the parameters, p(x) and p(x') are not. Since the cross-entropy does not depend on :math:`x'`, this is the
    gradient of the maximum (Danskin) where the ascent reaches a unique one. The KL has several local maxima, even
    for a linear model of two classes; the noise decides which one is climbed.

    The ascent leaves mode and BatchNorm statistics as they are. The loss then takes two forward passes, over the clean batch
    and over the attacked one, as published: in training mode each batch is normalised by its own statistics, as it was in the
    ascent, so the KL that was climbed is the KL that is charged; both passes, the clean one first, move the running statistics.
    In training mode the ascent sees batch statistics; the published code attacks in evaluation mode.

    Args:
        threat_model: ball and box, in input units.
        beta: weight of the KL term, at least 0. At 0 the loss is the clean cross-entropy, and nothing is attacked.
        steps: number of gradient steps, at least 1.
        step_size: length of one step in the ball's norm, input units. Default ``2.5 * epsilon / steps``, as `PGD`.
        start_std: standard deviation of the start, input units, greater than 0.
        attack: finds :math:`x'` in place of the ascent of the KL, and then takes the place of ``threat_model``; ``steps``,
            ``step_size`` and ``start_std`` are not read.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the noise.

    Raises:
        TypeError: neither a threat model nor an attack, or both; settings of the wrong type.
        ValueError: a setting out of range; on a call, inputs outside the box or labels outside the classes.

    Example:
        >>> from metarobust.threat_models import ThreatModel
        >>> objective = TRADES(threat_model=ThreatModel(norm="linf", epsilon=0.1), beta=6.0)
        >>> model, x, y = torch.nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> losses = objective(model, x, y, generator=torch.Generator().manual_seed(0))
        >>> losses.mean().backward()
        >>> losses.shape
        torch.Size([4])
    """

    threat_model: ThreatModel | None = None
    beta: float = 6.0
    steps: int = 10
    step_size: float | None = None
    start_std: float = 1e-3
    attack: Attack | None = None

    def __post_init__(self) -> None:
        if self.attack is not None:
            check_attack(self.attack)
            if self.threat_model is not None:
                raise TypeError(message("threat_model", "None beside an attack, which has its own", repr(self.threat_model)))
        elif not isinstance(self.threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel, or an attack in its place", repr(self.threat_model)))
        finite("beta", self.beta, least=0.0)
        integer("steps", self.steps, least=1)
        if self.step_size is not None:
            finite("step_size", self.step_size, above=0.0)
        if self.threat_model is not None:
            check_step_size(self.step_size, self.threat_model)
        finite("start_std", self.start_std, above=0.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one loss per example, ``[batch]``."""
        if self.beta == 0:
            return cross_entropy(model(x), y)
        # Before the passes that are differentiated, so that the graph of the clean pass need not wait for the ascent.
        x_adv = self.moved(model, x, y, generator=generator)
        logits = model(x)
        return self.charge(logits, model(x_adv), y)

    @property
    def reads_clean(self) -> bool:
        """Whether `charge` reads the logits at x."""
        return True

    def moved(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The points that the attack on ``model`` finds, detached; ``x`` at beta 0. Labels ``y``, noise from ``generator``."""
        if self.beta == 0:
            return x.detach()
        return attacked(self._ascend_kl if self.attack is None else self.attack, model, x, y, generator)

    def charge(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        """The loss ``[batch]`` of the logits ``[batch, classes]``, ``clean`` at x and ``moved`` at x', for the labels ``y``."""
        return cross_entropy(clean, y) + self.beta * kl_divergence(clean, moved)

    def climbed(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        """What an attack climbs in the logits ``moved``, ``[batch]``, given the logits ``clean`` at x and the labels ``y``."""
        return kl_divergence(clean, moved)

    @torch.inference_mode(False)
    def _ascend_kl(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The point of large KL divergence from p(x), shaped like ``x``, inside ball and box."""
        assert self.threat_model is not None
        x, y = checked(self.threat_model, model, x, y)
        if len(x) == 0 or self.threat_model.epsilon == 0:
            record_call(len(x))
            return x.clone()
        with torch.no_grad(), buffers_kept(model):
            logits = checked_logits(model(x), y)
        start = self.threat_model.project(x + self.start_std * normal(x.shape, like=x, generator=generator), x)
        step_size = 2.5 * self.threat_model.epsilon / self.steps if self.step_size is None else self.step_size
        ascent = PGD(threat_model=self.threat_model, loss=lambda moved, _: kl_divergence(logits, moved))
        return _ascend(ascent, model, x, y, start, steps=self.steps, step_size=step_size)

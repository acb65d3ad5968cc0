"""Attacks that follow the input gradient: FGSM and PGD, against the model or for it."""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from metarobust._checks import called, choice, integer, message, require
from metarobust.attacks._common import buffers_kept, check_step_size, checked, checked_logits, input_gradient
from metarobust.attacks._counting import record_call
from metarobust.losses import Loss, known_loss, loss_function
from metarobust.threat_models import ThreatModel
from metarobust.types import Model

DIRECTIONS = ("adversary", "anti_adversary")


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """The fast gradient sign method: one step of length epsilon (Goodfellow et al., 2015, arXiv 1412.6572, section 4).

    For l2 and l1 the step follows the direction of steepest ascent in that norm.

    Args:
        threat_model: ball and box, in input units.
        loss: ``"cross_entropy"``, ``"margin"``, or a callable ``(logits, y) -> [batch]``.
        direction: ``"adversary"`` raises the loss, ``"anti_adversary"`` lowers it.

    Example:
        >>> attack = FGSM(threat_model=ThreatModel(norm="linf", epsilon=0.1))
        >>> attack(lambda x: x, torch.tensor([[0.6, 0.4]]), torch.tensor([0]))
        tensor([[0.5000, 0.5000]])
    """

    threat_model: ThreatModel
    loss: str | Loss = "cross_entropy"
    direction: str = "adversary"

    def __post_init__(self) -> None:
        _check(self)

    @torch.inference_mode(False)
    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached, inside ball and box."""
        x, y = checked(self.threat_model, model, x, y)
        return _ascend(self, model, x, y, x, steps=1, step_size=self.threat_model.epsilon)


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient descent: k steps of steepest ascent, each projected back (Madry et al., 2018, arXiv 1706.06083).

    Maximises the per-example loss over the threat model's ball and box; ``direction="anti_adversary"`` minimises it
    (Zhou et al., 2023). The model is called in the mode it is in, on ``restarts * batch`` rows at once. With one restart the
    last iterate is the result, after exactly ``steps`` forward-backward passes; with several, one more forward pass picks,
    per example, the last iterate that fools the model, and among several the one of the largest loss.

    Args:
        threat_model: ball and box, in input units.
        steps: number of gradient steps, at least 1.
        step_size: length of one step in the ball's norm, input units. Default ``2.5 * epsilon / steps`` (Madry et al., 2018).
        random_start: begin at a uniform point of the ball; the first restart too.
        restarts: independent runs; the best is kept per example.
        loss: ``"cross_entropy"``, ``"margin"``, or a callable ``(logits, y) -> [batch]``.
        direction: ``"adversary"`` raises the loss, ``"anti_adversary"`` lowers it.

    A call takes ``generator``, a CPU generator that random starts are drawn from; without one they come from torch's global
    generator, like any ``torch.rand``.

    Raises:
        ValueError: on a call, for inputs outside the box or labels outside the classes.
        TypeError: on a call, for inputs or labels of the wrong dtype.

    Example:
        >>> attack = PGD(threat_model=ThreatModel(norm="linf", epsilon=0.1), steps=10)
        >>> x_adv = attack(lambda x: x, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), generator=torch.Generator())
        >>> x_adv
        tensor([[0.5000, 0.5000]])
    """

    threat_model: ThreatModel
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    loss: str | Loss = "cross_entropy"
    direction: str = "adversary"

    def __post_init__(self) -> None:
        integer("steps", self.steps, least=1)
        integer("restarts", self.restarts, least=1)
        require(
            self.random_start or self.restarts == 1,
            "restarts",
            "1 without a random start (every restart would be the same)",
            self.restarts,
            "write random_start=True",
        )
        _check(self)
        check_step_size(self.step_size, self.threat_model)

    @torch.inference_mode(False)
    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached, inside ball and box."""
        x, y = checked(self.threat_model, model, x, y)
        step_size = 2.5 * self.threat_model.epsilon / self.steps if self.step_size is None else self.step_size
        rows, targets = x, y
        if self.restarts > 1:
            rows = repeat(x, "batch ... -> (restarts batch) ...", restarts=self.restarts)
            targets = repeat(y, "batch -> (restarts batch)", restarts=self.restarts)
        start = self.threat_model.sample(rows, generator=generator) if self.random_start else rows
        moved = _ascend(self, model, rows, targets, start, steps=self.steps, step_size=step_size)
        if self.restarts == 1:
            return moved
        with torch.no_grad(), buffers_kept(model):
            logits = model(moved)
            reached, wrong = known_loss(self.loss)(logits, targets), logits.argmax(1) != targets
        if self.direction == "anti_adversary":
            reached, wrong = -reached, ~wrong
        # Success first, loss second: a restart that flips the prediction beats one with a larger loss that does not.
        rank = reached.argsort().argsort() + wrong * len(reached)
        best = rearrange(rank, "(restarts batch) -> restarts batch", restarts=self.restarts).argmax(0)
        moved = rearrange(moved, "(restarts batch) ... -> restarts batch ...", restarts=self.restarts)
        return moved[best, torch.arange(len(x), device=x.device)]


def _check(attack: FGSM | PGD) -> None:
    if not isinstance(attack.threat_model, ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel", repr(attack.threat_model)))
    loss_function(attack.loss)
    choice("direction", attack.direction, DIRECTIONS)


def _ascend(attack: FGSM | PGD, model: Model, x: Tensor, y: Tensor, start: Tensor, *, steps: int, step_size: float) -> Tensor:
    """``steps`` projected steps from ``start``; the sum of losses decouples the rows, so one backward pass serves all."""
    record_call(len(x))
    threat_model, loss = attack.threat_model, known_loss(attack.loss)
    if len(x) == 0 or threat_model.epsilon == 0:
        return x.clone()
    signed_step = step_size if attack.direction == "adversary" else -step_size
    lowest, highest = threat_model.bounds(x) if threat_model.norm == "linf" else (x, x)
    x_adv = start.clone()
    with torch.enable_grad(), buffers_kept(model):
        for step in range(steps):
            leaf = x_adv.detach().requires_grad_()
            logits = model(leaf) if step else checked_logits(called(model, leaf), y)
            gradient = input_gradient(loss(logits, y), leaf)
            if threat_model.norm == "linf":  # direction and projection, fused and in place
                x_adv.add_(gradient.sign(), alpha=signed_step).clamp_(lowest, highest)
            else:
                direction = threat_model.ascent_direction(gradient if signed_step > 0 else -gradient, x_adv)
                x_adv = threat_model.project(x_adv + step_size * direction, x)
    return x_adv

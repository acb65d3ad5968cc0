"""Attacks on binary inputs whose bits can be set and not cleared."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust._checks import called, finite, integer, message, require
from metarobust._tensors import flat, per_example, uniform
from metarobust.attacks._common import buffers_kept, checked, checked_logits, input_gradient
from metarobust.attacks._counting import record_call
from metarobust.losses import Loss, known_loss, loss_function
from metarobust.threat_models import ThreatModel
from metarobust.types import Model

UNIT_BOX = ThreatModel(norm="l1", epsilon=0.0)


@dataclass(frozen=True, kw_only=True)
class RandomRoundingFGSM:
    r"""rFGSM^k: sign steps in the relaxed cube, rounded at random, with every bit of x kept (Al-Dujaili et al., 2018).

    "Adversarial Deep Learning for Robust Detection of Binary Encoded Malware", arXiv 1801.02950: ``steps`` steps
    :math:`z \leftarrow clip(z + \eta\, sign\, \nabla l(z))` from z = x, then :math:`x' = x \lor 1[z > U]` with U uniform per bit,
    and x itself where the loss fell. This attack evaluates; for an ascent that weighs each insertion, and looks at binary
    points only, see `TransportAscent` with `transport_costs.Insertion`. One call takes ``steps`` forward-backward passes and one
    forward pass.

    The budget of insertions is an addition: the published attack has none. Of more insertions than it allows, those stay whose
    gradient is largest at the last relaxed point.

    Args:
        threat_model: l1 ball on the unit box; epsilon is the largest number of insertions per example. None: no limit.
        steps: number of sign steps, at least 1.
        step_size: length of a step in the relaxed cube. Default 0.02, as published.
        loss: ``"cross_entropy"``, ``"margin"``, or a callable ``(logits, y) -> [batch]``.

    A call takes ``x [batch, ...]`` of zeros and ones, floating-point, and ``generator``, a CPU generator that U is drawn from;
    without one it comes from torch's global generator.

    Raises:
        ValueError: a threat model that is no l1 ball on the unit box, a setting out of range; on a call, inputs other than 0
            and 1 or labels outside the classes.
        TypeError: settings, inputs or labels of the wrong type.

    Example:
        >>> attack = RandomRoundingFGSM(threat_model=ThreatModel(norm="l1", epsilon=1))
        >>> w = torch.tensor([3.0, 1.0, -2.0, 5.0])
        >>> attack(lambda x: torch.stack([0 * x[:, 0], x @ w], 1), torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([0]))
        tensor([[1., 0., 0., 1.]])
    """

    threat_model: ThreatModel | None = None
    steps: int = 50
    step_size: float = 0.02
    loss: str | Loss = "cross_entropy"

    def __post_init__(self) -> None:
        ball = self.threat_model
        if ball is not None:
            if not isinstance(ball, ThreatModel):
                raise TypeError(message("threat_model", "a ThreatModel, or None for any number of insertions", repr(ball)))
            fits = (ball.norm, ball.lower, ball.upper) == ("l1", 0.0, 1.0)
            remedy = "write ThreatModel(norm='l1', epsilon=5) for at most 5 insertions"
            require(fits, "threat_model", "an l1 ball on the box [0, 1]", repr(ball), remedy)
        integer("steps", self.steps, least=1)
        finite("step_size", self.step_size, above=0.0)
        loss_function(self.loss)

    @torch.inference_mode(False)
    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached: zeros and ones, every one of ``x`` kept."""
        x, y = checked(UNIT_BOX, model, x, y)
        check_binary(x)
        record_call(len(x))
        if len(x) == 0 or (self.threat_model is not None and self.threat_model.epsilon < 1):
            return x.clone()
        loss, relaxed = known_loss(self.loss), x.clone()
        natural = gradient = x  # both are overwritten in the first of at least one step
        with torch.enable_grad(), buffers_kept(model):
            for step in range(self.steps):
                leaf = relaxed.detach().requires_grad_()
                logits = model(leaf) if step else checked_logits(called(model, leaf), y)
                losses = loss(logits, y)
                gradient = input_gradient(losses, leaf)
                natural = losses.detach() if step == 0 else natural
                relaxed = (relaxed + self.step_size * gradient.sign()).clamp(0.0, 1.0)
            inserted = (relaxed > uniform(x.shape, like=x, generator=generator)) & (x == 0)
            x_adv = torch.where(self._within_budget(inserted, gradient), 1.0, x)
            with torch.no_grad():
                reached = loss(model(x_adv), y)
        return torch.where(per_example(reached >= natural, x), x_adv, x)

    def _within_budget(self, inserted: Tensor, gradient: Tensor) -> Tensor:
        """The insertions of largest gradient, as many as the budget allows."""
        if self.threat_model is None:
            return inserted
        worth = flat(gradient).masked_fill(~flat(inserted), -torch.inf)
        first = worth.argsort(1, descending=True)[:, : int(self.threat_model.epsilon)]
        chosen = torch.zeros_like(flat(inserted)).scatter_(1, first, True)
        return inserted & chosen.reshape(inserted.shape)


def check_binary(x: Tensor) -> None:
    """Raise a sentence unless every value of the inputs is 0 or 1."""
    others = int(((x != 0) & (x != 1)).sum())
    remedy = "write (x > 0.5).to(x.dtype), or take NormPower(norm='l1') for inputs in between"
    require(others == 0, "x", "0 or 1 everywhere for an attack that inserts bits", f"{others} other values", remedy)

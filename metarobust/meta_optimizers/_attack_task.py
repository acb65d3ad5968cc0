"""The task on which a meta-optimizer learns to attack: the perturbed examples are what it optimises."""

import torch
from torch import Tensor

from metarobust._checks import choice, labels, message, require
from metarobust.attacks._common import checked
from metarobust.attacks._gradient import DIRECTIONS
from metarobust.attacks._unrolled import input_gradient_with_graph, on_copied_buffers
from metarobust.losses import Loss, loss_function
from metarobust.threat_models import ThreatModel
from metarobust.types import Model, Streams


class AttackTask:
    r"""Examples under attack, each an optimizee of its own: ``meta_train`` learns the rule that moves them.

    The one parameter tensor is the perturbed batch ``[examples, ...]``, its gradient that of minus the attack's loss, and the
    meta-loss minus ``meta_objective`` per example, both at a point of ball and box: meta-training hands every new point to
    :meth:`project` before it goes on. (Projecting inside the losses instead would leave the points outside, where the
    gradient through the projection is 0 in l_inf, and would train on other paths than the attack then takes.) So the learned
    rule meets in training exactly the steps that :class:`metarobust.attacks.Unrolled` takes with it:

        rule = learned.as_gradient_transformation(total_steps=10, stacked=True)
        attack = Unrolled(threat_model=threat_model, update_rule=rule, steps=10)

    ``stacked=True`` because meta-training treats the first axis as copies: no example sees the statistics of another. There is
    one stream of gradients: use ``LSTMOptimizer(gradient_source="gradient", initial_learning_rate=...)``, the latter in input
    units.

    Args:
        model: the classifier under attack, any callable; nothing in it is trained.
        x: examples, in the box.
        y: their labels.
        threat_model: ball and box.
        loss: whose gradient the rule sees: ``"cross_entropy"``, ``"margin"``, ..., or a callable ``(logits, y) -> [batch]``.
        meta_objective: what the rule learns to raise, likewise. The margin is the one whose sign decides.
        direction: ``"adversary"`` raises both, ``"anti_adversary"`` lowers both.
        random_start: start at a uniform point of the ball, as the attack then does, instead of at x.

    Raises:
        ValueError: x lies outside the box, there is no example, or a name is unknown.
        TypeError: x is not floating point or y not int64.

    Example:
        >>> from metarobust.meta_optimizers import LSTMOptimizer, meta_train
        >>> def sample_task(generator):
        ...     x = torch.rand(8, 4, generator=generator)
        ...     return AttackTask(model=lambda x: x.square(), x=x, y=x.argmax(1), threat_model=ThreatModel(epsilon=0.1))
        >>> optimizer = LSTMOptimizer(gradient_source="gradient", initial_learning_rate=0.05)
        >>> learned = meta_train(optimizer, sample_task, iterations=2, total_steps=4, unroll=4, slots=1)
        >>> len(learned.losses)
        2
    """

    def __init__(
        self,
        *,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        loss: str | Loss = "cross_entropy",
        meta_objective: str | Loss = "margin",
        direction: str = "adversary",
        random_start: bool = False,
    ) -> None:
        if not isinstance(threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel", repr(threat_model)))
        choice("direction", direction, DIRECTIONS)
        self.x, self.y = checked(threat_model, model, x, y)
        require(len(x) > 0, "x", "at least one example", "none")
        self.optimizees, self.model = len(x), on_copied_buffers(model)
        with torch.no_grad():
            labels(y, examples=len(x), classes=self.model(self.x).shape[-1])
        self.threat_model, self.random_start = threat_model, random_start
        self._loss, self._meta_objective = loss_function(loss), loss_function(meta_objective)
        self._sign = -1 if direction == "adversary" else 1

    def initial_parameters(self, *, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The start: one tensor shaped like x, in ball and box."""
        return (self.threat_model.sample(self.x, generator=generator) if self.random_start else self.x.clone(),)

    def project(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``parameters``, back in ball and box; meta-training calls this after each update, the graph kept."""
        return tuple(self.threat_model.project(p, self.x) for p in parameters)

    @torch.enable_grad()
    def streams(
        self, parameters: tuple[Tensor, ...], *, generator: torch.Generator, create_graph: bool = False
    ) -> tuple[Tensor, Streams]:
        """What the rule lowers, ``[examples]``, and its gradient; the second stream is zero."""
        del generator  # the examples are fixed
        (point,) = parameters if create_graph else (parameters[0].detach().requires_grad_(),)
        losses = self._sign * self._loss(self.model(point), self.y)
        gradient = input_gradient_with_graph(losses, point, create_graph=create_graph)
        return losses.detach(), Streams((gradient,), (torch.zeros_like(gradient),))

    def meta_loss(self, parameters: tuple[Tensor, ...], *, generator: torch.Generator) -> Tensor:
        """Minus the meta-objective (the objective itself for an anti-adversary) at the parameters, ``[examples]``."""
        del generator
        return self._sign * self._meta_objective(self.model(parameters[0]), self.y)

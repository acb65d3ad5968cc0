"""An attack that keeps its graph: differentiate through it, or learn the rule that drives it."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torchopt.base import GradientTransformation

from metarobust import _checks
from metarobust._checks import called, choice, integer, message
from metarobust._tensors import tree_detach
from metarobust.attacks._common import buffers_kept, checked, checked_logits, input_gradient
from metarobust.attacks._counting import record_call
from metarobust.attacks._gradient import DIRECTIONS
from metarobust.losses import Loss, known_loss, loss_function
from metarobust.threat_models import ThreatModel
from metarobust.types import Model


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    r"""Projected steps of any TorchOpt rule, as a differentiable function of the model, of the rule and of ``x``.

    With u the rule's update and P the Euclidean projection onto ball and box, from :math:`x_0 = x` or a random start,

    .. math:: x_{t+1} = P_x\bigl(x_t + u_t(\mp\nabla_{x_t} \ell(f(x_t), y))\bigr), \qquad t = 0, \dots, steps - 1.

    The rule minimises, so it is fed the gradient of minus the loss (of the loss itself for ``"anti_adversary"``); its
    "parameters" are the tuple ``(x_t,)``. Any :class:`torchopt.base.GradientTransformation` will do: ``torchopt.sgd(lr)``,
    ``torchopt.chain(...)``, ``LSTMOptimizer(gradient_source="gradient").as_gradient_transformation(total_steps=steps,
    stacked=True)``, where ``stacked`` gives each example its own statistics.

    **Unlike the result of every other attack, the result is not detached when gradients are enabled at the call:** it carries the
    graph to the model's parameters, to tensors inside the rule (a step size, a network) and to ``x``. Under ``torch.no_grad()``
    no graph is built and the call obeys the :class:`metarobust.types.Attack` protocol in full; elsewhere append ``.detach()``.

    What the derivative is: exact almost everywhere. Where ball or box hold a coordinate, it moves with its bound, so it has
    derivative 0 in the step that was cut off. A rule made of signs has derivative 0 almost everywhere, so nothing flows
    through its steps; use one that is smooth in the gradient. Where an input gradient is exactly 0, ``torchopt.adam`` needs
    ``eps_root > 0`` to keep its derivative finite. TorchOpt reads a step size when a rule is made: to learn one, make the rule
    anew after each change, or pass a schedule, ``torchopt.sgd(lambda count: step_size)``. The model must be twice
    differentiable, which compiled models are not.

    A model in training mode uses batch statistics and its buffers stay as they were.

    Args:
        threat_model: ball and box, in input units.
        update_rule: a TorchOpt gradient transformation; it must not write in place when told ``inplace=False``.
        steps: gradient steps, at least 1; each costs one forward-backward pass.
        loss: ``"cross_entropy"``, ``"margin"``, ..., or a callable ``(logits, y) -> [batch]``.
        direction: ``"adversary"`` raises the loss, ``"anti_adversary"`` lowers it.
        random_start: begin at a uniform point of the ball, drawn from the call's ``generator``, instead of at ``x``.
        truncation: keep the graph of the last so many steps only; the point and the rule's state are detached before them, and
            the earlier steps build no graph, so memory does not grow with ``steps``. None keeps the whole graph.
        activation_checkpointing: store only the points and states between steps and recompute each step in the backward pass:
            the same gradients in less memory and about half as much time again.

    Raises:
        ValueError: on a call, for inputs outside the box or labels outside the classes.
        TypeError: a rule that is no gradient transformation; on a call, inputs or labels of the wrong dtype.

    Example:
        >>> import torchopt
        >>> step_size = torch.tensor(0.1, requires_grad=True)
        >>> attack = Unrolled(threat_model=ThreatModel(norm="l2", epsilon=0.5), update_rule=torchopt.sgd(step_size), steps=3)
        >>> x_adv = attack(lambda x: x, torch.tensor([[0.6, 0.4]]), torch.tensor([0]))
        >>> torch.autograd.grad(x_adv[0, 1], step_size)[0] > 0
        tensor(True)
    """

    threat_model: ThreatModel
    update_rule: GradientTransformation
    steps: int = 10
    loss: str | Loss = "cross_entropy"
    direction: str = "adversary"
    random_start: bool = False
    truncation: int | None = None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel", repr(self.threat_model)))
        if not isinstance(self.update_rule, GradientTransformation):
            remedy = "write torchopt.sgd(0.1), or meta_optimizer.as_gradient_transformation(total_steps=..., stacked=True)"
            raise TypeError(message("update_rule", "a TorchOpt GradientTransformation", repr(self.update_rule), remedy))
        integer("steps", self.steps, least=1)
        loss_function(self.loss)
        choice("direction", self.direction, DIRECTIONS)
        if self.truncation is not None:
            integer("truncation", self.truncation, least=1)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, inside ball and box; with its graph when gradients are enabled."""
        differentiable = torch.is_grad_enabled()  # read before leaving inference mode, which switches gradients on
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable), buffers_kept(model):
            centre, y = checked(self.threat_model, model, x, y)
            if differentiable:
                centre, model = (x if x.requires_grad else centre), on_copied_buffers(model)
            return self._attack(model, centre, y, generator)

    def _attack(self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        record_call(len(x))
        if len(x) == 0 or self.threat_model.epsilon == 0:
            return x.clone()
        x_adv = self.threat_model.sample(x, generator=generator) if self.random_start else x.clone()
        state = self.update_rule.init(cast("Any", (x_adv,)))
        kept = min(self.steps, self.truncation or self.steps)
        if kept < self.steps:
            with torch.no_grad():
                for _ in range(self.steps - kept):
                    x_adv, state = self._step(x_adv, state, model, x, y)
            x_adv, state = tree_detach((x_adv, state))
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for _ in range(kept):
            if recompute:
                x_adv, state = cast("Any", checkpoint(self._step, x_adv, state, model, x, y, use_reentrant=False))
            else:
                x_adv, state = self._step(x_adv, state, model, x, y)
        return x_adv

    def _step(self, x_adv: Tensor, state: Any, model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        """One step; its graph is kept exactly when gradients are enabled."""
        keep_graph = torch.is_grad_enabled()
        point = x_adv if keep_graph and x_adv.requires_grad else x_adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = checked_logits(called(model, point), y)
            losses = _checks.losses(known_loss(self.loss)(logits, y), examples=len(y))
            gradient = input_gradient_with_graph(losses, point, create_graph=keep_graph)
        downhill = -gradient if self.direction == "adversary" else gradient
        updates, state = self.update_rule.update(cast("Any", (downhill,)), state, params=cast("Any", (x_adv,)), inplace=False)
        moved = x_adv + cast("Any", updates)[0].to(x.dtype)  # whatever the precision that the rule computes in
        return self.threat_model.project(moved, x), state


def input_gradient_with_graph(losses: Tensor, x: Tensor, *, create_graph: bool) -> Tensor:
    """Gradient of the summed losses, differentiable itself when ``create_graph``."""
    found = None
    if create_graph and losses.requires_grad:
        found = torch.autograd.grad(losses.sum(), x, create_graph=True, allow_unused=True)[0]
    return input_gradient(losses, x) if found is None else found  # which explains a missing gradient


def on_copied_buffers(model: Model) -> Model:
    """A module in training mode on copies of its buffers: putting the originals back in place would break the kept graph."""
    if not isinstance(model, nn.Module):
        return model
    copies = {
        f"{name}.{own}" if name else own: buffer.clone()
        for name, module in model.named_modules()
        if module.training
        for own, buffer in module.named_buffers(recurse=False)
    }
    return (lambda rows: functional_call(model, copies, (rows,))) if copies else model

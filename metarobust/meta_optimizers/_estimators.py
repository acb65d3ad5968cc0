"""Two ways to a meta-gradient: back-propagation through a window of steps, and persistent evolution strategies."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchopt import apply_updates, pytree
from torchopt.base import GradientTransformation

from metarobust._tensors import tree_detach
from metarobust.types import Task

ESTIMATORS = ("second_order", "first_order", "pes")


@dataclass
class Slot:
    """One task in progress: everything needed to continue it, all randomness included.

    ``horizon`` is the age at which it ends, ``total_steps`` the T that the rule is told. With persistent evolution strategies
    ``parameters`` and ``state`` are those of the run with added noise, ``mirror`` those of the run with subtracted noise, and
    ``noise`` is the sum of all the noise that the run has met, one tensor per meta-parameter.
    """

    task_seed: int
    task: Task
    generator: torch.Generator
    parameters: tuple[Tensor, ...]
    state: Any
    age: int
    horizon: int
    total_steps: int
    mirror: tuple[tuple[Tensor, ...], Any] | None = None
    noise: tuple[Tensor, ...] | None = None


class Window(NamedTuple):
    """What some steps give: the weighted sum of their meta-losses, the sum of the weights, and where the optimizees are after."""

    total: Tensor
    weights: float
    parameters: tuple[Tensor, ...]
    state: Any

    @property
    def loss(self) -> Tensor:
        """The weighted mean."""
        return self.total / self.weights


Start = tuple[tuple[Tensor, ...], Any]
"""Parameters and state that steps begin with."""


def advanced(
    task: Task,
    rule: GradientTransformation,
    streams: Any,
    state: Any,
    parameters: tuple[Tensor, ...],
    *,
    seen: tuple[Tensor, ...] | None = None,
) -> tuple[tuple[Tensor, ...], Any]:
    """Parameters and state after one step of the rule, which is shown ``seen`` (default: the parameters).

    A task whose optimizee is constrained, as a perturbation is, has a method ``project``.
    """
    updates, state = rule.update(streams, state, params=cast("Any", parameters if seen is None else seen), inplace=False)
    parameters = cast("Any", apply_updates(cast("Any", parameters), updates, inplace=False))
    return (cast("Any", task).project(parameters) if hasattr(task, "project") else parameters), state


def unroll(
    slot: Slot,
    rule: GradientTransformation,
    settings: Any,
    start: Start,
    *,
    steps: tuple[int, int] | None = None,
    graph: bool = True,
) -> Window:
    """Advance a task by one unroll from ``start``, or by the steps of it that are asked for (from, to). The age stays.

    The graph is kept unless ``graph`` is off.
    """
    parameters, state = start
    begin, end = steps or (0, settings.unroll)
    exact = graph and settings.estimator == "second_order"
    total, weights = torch.zeros(()), 0.0
    if exact:  # the first gradient of an unroll needs a graph to keep
        parameters = tuple(p.requires_grad_() for p in parameters)
    for position in range(begin + 1, end + 1):
        _, streams = slot.task.streams(parameters, generator=slot.generator, create_graph=exact)
        with torch.set_grad_enabled(graph):
            seen = parameters if exact else tree_detach(parameters)
            parameters, state = advanced(slot.task, rule, streams, state, parameters, seen=seen)
            if position % settings.meta_loss_every == 0 or position == settings.unroll:
                weight = 0.3 + settings.late_weight * (slot.age + position) / slot.total_steps
                losses = slot.task.meta_loss(parameters, generator=slot.generator)
                total = total + weight * losses.clamp(max=settings.loss_cap).mean()
                weights += weight
    return Window(total, weights, parameters, state)


def backpropagated(
    slot: Slot, rule: GradientTransformation, settings: Any, meta_parameters: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """Meta-loss and meta-gradient of one unroll by back-propagation; advances the slot and cuts its graph."""
    if settings.recompute_every is not None:
        loss, gradients, end = _recomputed(slot, rule, settings, meta_parameters)
    else:
        window = unroll(slot, rule, settings, (slot.parameters, slot.state))
        gradients = torch.autograd.grad(window.loss, meta_parameters, allow_unused=True)
        loss, end = window.loss.item(), (window.parameters, window.state)
    slot.parameters, slot.state = tree_detach(end)
    slot.age += settings.unroll
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(meta_parameters, gradients, strict=True)]
    return loss, found


def _recomputed(
    slot: Slot, rule: GradientTransformation, settings: Any, meta_parameters: Sequence[Tensor]
) -> tuple[float, list[Tensor], Start]:
    """The same meta-gradient with the graph of ``recompute_every`` steps in memory at a time.

    All steps are taken once without a graph, keeping what each part begins with; then the parts are taken again, the last first,
    each with its graph, and the loss's derivatives by what a part ends with are carried into it.
    """
    kept, now, total, weights = [], (slot.parameters, slot.state), 0.0, 0.0
    for begin in range(0, settings.unroll, settings.recompute_every):
        steps = (begin, min(begin + settings.recompute_every, settings.unroll))
        kept.append((steps, slot.generator.get_state(), now))
        window = unroll(slot, rule, settings, now, steps=steps, graph=False)
        now = tree_detach((window.parameters, window.state))
        total, weights = total + window.total.item(), weights + window.weights
    end = (slot.generator.get_state(), now)
    gradients = [torch.zeros_like(p) for p in meta_parameters]
    later: list[Tensor | None] = []
    for steps, randomness, (parameters, state) in reversed(kept):
        slot.generator.set_state(randomness)
        leaves, form = pytree.tree_flatten(tree_detach((parameters, state)))
        leaves = [leaf.requires_grad_() if _differentiable(leaf) else leaf for leaf in leaves]
        window = unroll(slot, rule, settings, cast("Start", pytree.tree_unflatten(form, leaves)), steps=steps)
        ends = [leaf for leaf in pytree.tree_leaves(cast("Any", (window.parameters, window.state))) if _differentiable(leaf)]
        sources = [*meta_parameters, *(leaf for leaf in leaves if _differentiable(leaf))]
        # What neither the losses nor later steps depend on has no derivative to carry.
        carried = zip(ends, later or [None] * len(ends), strict=True)
        products = ((end * d).sum() for end, d in carried if d is not None and end.requires_grad)
        objective = window.total / weights + sum(products, torch.zeros(()))
        found = torch.autograd.grad(objective, cast("Any", sources), allow_unused=True)
        own, later = found[: len(gradients)], list(found[len(gradients) :])
        gradients = [a if b is None else a + b for a, b in zip(gradients, own, strict=True)]
    slot.generator.set_state(end[0])
    return total / weights, gradients, end[1]


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def persistent_evolution(
    slot: Slot,
    rule: GradientTransformation,
    settings: Any,
    meta_parameters: Sequence[Tensor],
    fresh: Sequence[Tensor],
) -> tuple[float, list[Tensor]]:
    r"""Meta-loss and a meta-gradient by persistent evolution strategies (Vicol, Metz and Sohl-Dickstein, 2021, algorithm 2).

    Two copies of the task go on side by side, with the meta-parameters moved by :math:`+\epsilon` and :math:`-\epsilon`, the
    ``fresh`` noise :math:`\epsilon \sim N(0, \sigma^2 I)`, under the same randomness. The estimate of an unroll is

    .. math:: \frac{L_+ - L_-}{2 \sigma^2} \sum_{u} \epsilon_u

    over all the noise since the task began. So the noise of an earlier unroll is credited with the losses of a later one: unlike
    back-propagation through one window, the estimate is not biased towards what pays soon. (arXiv 2112.13835)
    """
    mirror = (slot.parameters, slot.state) if slot.mirror is None else slot.mirror
    slot.noise = tuple(fresh) if slot.noise is None else tuple(a + b for a, b in zip(slot.noise, fresh, strict=True))
    randomness, windows = slot.generator.get_state(), []
    for sign, start in ((1.0, (slot.parameters, slot.state)), (-1.0, mirror)):
        slot.generator.set_state(randomness)
        with moved(meta_parameters, fresh, sign):
            windows.append(unroll(slot, rule, settings, start, graph=False))
    slot.parameters, slot.state = windows[0].parameters, windows[0].state
    slot.mirror = (windows[1].parameters, windows[1].state)
    slot.age += settings.unroll
    plus, minus = windows[0].loss.item(), windows[1].loss.item()
    return (plus + minus) / 2, [(plus - minus) / (2 * settings.noise**2) * noise for noise in slot.noise]


@contextmanager
def moved(parameters: Sequence[Tensor], by: Sequence[Tensor], sign: float) -> Iterator[None]:
    """Parameters moved for the duration of the block; afterwards bit for bit what they were."""
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, step in zip(parameters, by, strict=True):
                p.add_(step, alpha=sign)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)

"""The attacked point as a function of the parameters: through the steps that led to it, or from its optimality."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation

from metarobust._tensors import flat, norms, per_example
from metarobust.attacks import Unrolled
from metarobust.attacks._common import buffers_kept, input_gradient
from metarobust.attacks._step_rules import RMSpropSteps
from metarobust.attacks._unrolled import input_gradient_with_graph, on_copied_buffers
from metarobust.losses import cross_entropy, targeted_margin
from metarobust.threat_models import ThreatModel
from metarobust.types import Model


def rival(logits: Tensor, y: Tensor) -> Tensor:
    """The wrong class of the highest logit, ``[batch]``."""
    return logits.detach().scatter(1, y[:, None], float("-inf")).argmax(1)


# Through the steps ---------------------------------------------------------------------------------------------------


def climbed(climb: Unrolled, model: Model, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The last point of ``climb`` from ``start``, with its graph when gradients are enabled; buffers are kept."""
    with buffers_kept(model):
        if torch.is_grad_enabled():
            model = on_copied_buffers(model)
        x_adv, state = start, climb.update_rule.init(cast("Any", (start,)))
        for _ in range(climb.steps):
            x_adv, state = climb._step(x_adv, state, model, x, y)
    return x_adv


def rmsprop(threat_model: ThreatModel, steps: int) -> GradientTransformation:
    """The RMSprop of `BETA`, with its rate, as an update rule that can be differentiated."""
    rate, decay = RMSpropSteps(threat_model, steps).rate, RMSpropSteps.DECAY
    least = 1e-24  # keeps 0 / 0, and the infinite slope of the root at 0, away from gradients that are 0
    if threat_model.norm == "linf":
        return torchopt.rmsprop(rate, decay, eps=0.0, initial_scale=least)

    def init(params: Any) -> Any:
        return tuple(flat(point).new_full((len(point),), least) for point in params)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        """Steepest ascent, its length set by the gradient's dual norm; ``updates`` point downhill."""
        (downhill,), (point,), (square,) = updates, params, state
        dual = norms(downhill, "l2" if threat_model.norm == "l2" else "linf")
        square = decay * square + (1 - decay) * dual.square()
        length = rate * dual / square.sqrt()
        return (per_example(length, point) * threat_model.ascent_direction(-downhill, point),), (square,)

    return GradientTransformation(cast("Any", init), cast("Any", update))


# From optimality -----------------------------------------------------------------------------------------------------


def cross_entropy_at_optimum(
    model: Model, x_adv: Tensor, x: Tensor, y: Tensor, threat_model: ThreatModel, *, damping: float, iterations: int
) -> Tensor:
    """Cross-entropy ``[batch]`` at the maximiser ``x_adv`` of its best margin M, whose gradient knows how that point moves.

    With G the input gradient of M at the constant ``x_adv``, the total derivative of the cross-entropy is its partial one plus
    that of ``u . G``; ``u`` solves the adjoint system on the directions in which the point is free to move.
    """
    if not torch.is_grad_enabled():
        return cross_entropy(model(x_adv), y)
    point = x_adv.detach().requires_grad_()
    logits = model(point)
    losses = cross_entropy(logits, y)
    gain = input_gradient_with_graph(targeted_margin(logits, y, rival(logits, y)), point, create_graph=True)
    slope = flat(input_gradient(losses, point, retain_graph=True))
    tangent, multiplier = free_directions(threat_model, x_adv, x, gain.detach())

    def curvature(direction: Tensor) -> Tensor:
        return tangent((multiplier + damping) * direction - hessian_product(gain, point, direction))

    # Relative to the whole slope: where that is normal to the sphere, as for two classes, the projection leaves rounding only.
    tolerance = norms(slope, "l2")[:, None] * torch.finfo(slope.dtype).eps ** 0.75
    direction = conjugate_gradient(curvature, tangent(slope), tolerance, iterations)
    term = (direction * flat(gain)).sum(1)
    return losses + (term - term.detach())


def hessian_product(gradient: Tensor, point: Tensor, direction: Tensor) -> Tensor:
    """H times ``direction [batch, dimensions]``, with H the derivative of ``gradient`` in ``point``; 0 where there is none."""
    found = None
    if gradient.requires_grad:
        found = torch.autograd.grad(gradient, point, direction.view_as(point), retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(direction) if found is None else flat(found)


def free_directions(
    threat_model: ThreatModel, x_adv: Tensor, x: Tensor, gradient: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The projection of ``[batch, dimensions]`` onto the directions that ball and box leave, and the multiplier of an l2 ball.

    A bound or a sphere holds only if the gradient presses against it: where it does not, the point is no maximum and free to
    move away.
    """
    point, gradient = flat(x_adv), flat(gradient)
    rounding = 4 * torch.finfo(x.dtype).eps * max(abs(threat_model.lower), abs(threat_model.upper))
    linf = threat_model.norm == "linf"
    lowest, highest = (flat(bound) for bound in threat_model.bounds(x)) if linf else (threat_model.lower, threat_model.upper)
    held = ((point >= highest - rounding) & (gradient >= 0)) | ((point <= lowest + rounding) & (gradient <= 0))
    if linf:
        return lambda v: v.masked_fill(held, 0), point.new_zeros(len(point), 1)
    # On the sphere G = mu r holds for the free coordinates of gradient G and radius r.
    radius = flat(x_adv - x).masked_fill(held, 0)
    length = norms(radius, "l2")[:, None].clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    pressure = (gradient * radius).sum(1, keepdim=True)
    reached = threat_model.distance(x_adv, x)[:, None] >= threat_model.epsilon - rounding * point.shape[1] ** 0.5
    on_sphere = reached & (pressure > 0)
    normal, multiplier = torch.where(on_sphere, radius / length, 0), torch.where(on_sphere, pressure / length**2, 0)

    def tangent(v: Tensor) -> Tensor:
        v = v.masked_fill(held, 0)
        return v - normal * (normal * v).sum(1, keepdim=True)

    return tangent, multiplier


def conjugate_gradient(operator: Callable[[Tensor], Tensor], b: Tensor, tolerance: Tensor, iterations: int) -> Tensor:
    """Solve ``operator(u) = b`` per row, ``[batch, dimensions]``; rows do not see each other.

    A row ends when its residual is at most its ``tolerance [batch, 1]``, or at a direction without positive curvature; there it
    keeps the solution that it has, 0 at the first one. (`torchopt.linear_solve.solve_cg` takes the batch for one system: one
    row without a maximum would spoil all.)
    """
    solution, residual, direction = torch.zeros_like(b), b, b
    square = residual.square().sum(1, keepdim=True)
    going = square > tolerance.square()
    for _ in range(iterations):
        if not going.any():
            break
        turned = operator(direction)
        curvature = (direction * turned).sum(1, keepdim=True)
        going = going & (curvature > 0)
        step = torch.where(going, square / curvature, 0)
        solution, residual = solution + step * direction, residual - step * turned
        before, square = square, residual.square().sum(1, keepdim=True)
        going = going & (square > tolerance.square())
        direction = torch.where(going, residual + square / before * direction, 0)
    return solution

"""Derivatives at the optimum: of the value by the envelope theorem, of the weights by the implicit function theorem."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarobust.dro._dual import Solution


class Value(torch.autograd.Function):
    """The value: its derivatives are the weights w in the losses, -s w in the costs, lambda in the radius, -B in kappa."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, costs: Tensor | None, radius: Tensor, kappa: Tensor, solution: Solution) -> Tensor:
        ctx.save_for_backward(losses, costs, radius, kappa)
        ctx.solution = solution
        return torch.tensor(solution.value, dtype=torch.float64, device=losses.device)

    @staticmethod
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        losses, costs, radius, kappa = ctx.saved_tensors
        solution: Solution = ctx.solution
        # When a graph is asked for, the derivatives have derivatives of their own.
        optimum = Optimum.apply if torch.is_grad_enabled() else Optimum.values
        weights, scale, budget = optimum(losses, costs, radius, kappa, solution)
        moved = by_value * weights
        by_costs = None
        if costs is not None and ctx.needs_input_grad[1]:
            by_costs = torch.where(moved != 0, -scale * moved, 0)
        by_radius = by_value * (scale - kappa if 0 < solution.multiplier < np.inf else solution.multiplier)
        return moved, by_costs, by_radius, -by_value * budget, None


class Optimum(torch.autograd.Function):
    r"""Weights ``[n, m]``, scale s and budget B of a solution with their first derivatives.

    With w the weights of examples, l and c the losses and costs of their candidates (means by shares), z = l / s - c,
    v = l / s, t = log s and :math:`J = \partial w / \partial z`, the weights move by :math:`dw = J (dl / s - dc - v\, dt)`.

    * While the multiplier is 0, :math:`dt = d\kappa / \kappa` and :math:`dB = v^\top dw + w^\top dc`.
    * Otherwise B is the radius, so that :math:`v^\top J v\, dt = v^\top J (dl / s - dc) + w^\top dc - d\epsilon`.
    * At a kink two candidates of an example tie, which fixes s; their mixture absorbs the change of the budget. Several examples
      that tie at once are taken together, as if they were one.
    """

    @staticmethod
    def values(
        losses: Tensor, costs: Tensor | None, radius: Tensor, kappa: Tensor, solution: Solution
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs, without derivatives."""
        weights = torch.from_numpy(solution.weights[:, None] * solution.shares).to(losses.device)
        numbers = torch.tensor([solution.scale, solution.reweighting + solution.transport], dtype=torch.float64)
        scale, budget = numbers.to(losses.device)
        return weights, scale.clone(), budget.clone()

    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, costs: Tensor | None, radius: Tensor, kappa: Tensor, solution: Solution
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(losses, costs, radius, kappa)
        ctx.solution = solution
        return Optimum.values(losses, costs, radius, kappa, solution)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, by_weights: Tensor, by_scale: Tensor, by_budget: Tensor
    ) -> tuple[Tensor | None, ...]:
        solution: Solution = ctx.solution
        inputs = [x for x in ctx.saved_tensors if x is not None]
        with torch.no_grad():
            found = _pulled_back(solution, by_weights, by_scale, by_budget)
        if torch.is_grad_enabled():  # derivatives that are missing must not look like zeros
            found = tuple(_Last.apply(gradient, *inputs) for gradient in found)
        return (*(gradient if need else None for gradient, need in zip(found, ctx.needs_input_grad[:4], strict=True)), None)


class _Last(torch.autograd.Function):
    """A gradient that must not be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the weights of worst_case_expectation can be differentiated once, and its value twice; "
            "detach the weights where they are held constant"
        )


def _pulled_back(
    solution: Solution, by_weights: Tensor, by_scale: Tensor, by_budget: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the three outputs, pulled back to losses and costs ``[n, m]``, radius and kappa."""
    rows = np.stack([solution.weights, solution.tilt.curvature, solution.relative_losses])
    weights, curvature, v = torch.from_numpy(rows).to(by_weights.device)
    shares = torch.from_numpy(solution.shares).to(by_weights.device)
    zero, scale = torch.zeros_like(by_budget), solution.scale
    if not 0 < scale < np.inf:  # all on the maximum, or all as it was: neither moves
        table = shares * weights[:, None]
        return torch.zeros_like(shares), table * by_budget if scale == 0 else torch.zeros_like(shares), zero, zero
    reference = int(solution.tilt.curvature.argmax())
    hh, hw, ww = solution.tilt.correction

    def moved(x: Tensor) -> Tensor:
        """J x; a constant is taken off first, which J annuls, against cancellation."""
        x = x - x[reference]
        h, w = curvature @ x, weights @ x
        return curvature * (x - hh * h - hw * w) - weights * (hw * h + ww * w)

    by_example = (shares * by_weights).sum(1)
    if solution.mixed is not None:
        mixed = torch.from_numpy(solution.mixed).to(by_weights.device)
        held = weights * torch.from_numpy((solution.mixed != 0).any(1)).to(by_weights.device)
        price = solution.kink_price
        by_mixture = (held[:, None] * mixed * by_weights).sum() / price
        by_z = moved(by_example - by_mixture * v)
        by_log_scale = scale * by_scale - v @ by_z
        pinned = mixed * (by_log_scale * held / price)[:, None]
        losses = shares * (by_z / scale)[:, None] + pinned / scale
        return losses, -shares * (by_z + by_mixture * weights)[:, None] - pinned, by_mixture + by_budget, zero
    if solution.multiplier == 0:
        by_z = moved(by_example + by_budget * v)
        by_log_scale = scale * by_scale - v @ by_z
        return shares * (by_z / scale)[:, None], shares * (by_budget * weights - by_z)[:, None], zero, by_log_scale / scale
    by_z = moved(by_example)
    direction = moved(v)
    change = (scale * by_scale - v @ by_z) / (v @ direction)  # v J v > 0, or no multiplier were needed
    by_z = by_z + change * direction
    return shares * (by_z / scale)[:, None], shares * (change * weights - by_z)[:, None], by_budget - change, zero

"""Derivatives of the Sinkhorn bound: of the balls round sets of points, and of the fixed point of the sweeps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metarobust.bounds._conflicts import ConflictGraph
from metarobust.bounds._enclosing import enclosing_balls
from metarobust.bounds._sinkhorn_sweeps import Incidence, solved

NUMBERS_AT_ONCE = 2**22
SOLVED = 1e-12


def squared_radii(x: Tensor, sets: np.ndarray, graph: ConflictGraph) -> Tensor:
    r"""Squared radii of the smallest balls round the sets.

    In l2, :math:`r^2 = \max_\lambda \sum_a \lambda_a \|x_a - \sum_b \lambda_b x_b\|^2`: where the maximum sits may be held fixed
    for the gradient (Danskin).
    """
    size = sets.shape[1]
    where = np.full(sets.shape, 0.5)
    if graph.norm == "l2" and size > 2 and len(sets):
        where = enclosing_balls(graph.squares(sets, precise=True))[1]
    radii = _box_radii if graph.norm == "linf" else _ball_radii
    return _InParts.apply(x, radii, torch.from_numpy(sets).to(x.device), torch.from_numpy(where).to(x.device))


def _box_radii(corners: Tensor, _: Tensor) -> Tensor:
    return ((corners.amax(1) - corners.amin(1)).amax(1) / 2).square()


def _ball_radii(corners: Tensor, where: Tensor) -> Tensor:
    centre = (where[:, :, None] * corners).sum(1, keepdim=True)
    return (where * (corners - centre).square().sum(2)).sum(1)


class _InParts(torch.autograd.Function):
    """A function of the coordinates ``[sets, size, dimensions]`` of many sets, too many numbers to be kept at once.

    They are read from ``x`` part by part, and again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor, Tensor], Tensor], sets: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        ctx.parts = [part.split(max(1, NUMBERS_AT_ONCE // max(1, sets.shape[1] * x.shape[1]))) for part in (sets, where)]
        return torch.cat([function(x[members], position) for members, position in zip(*ctx.parts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        total, begin = torch.zeros_like(x), 0
        for members, position in zip(*ctx.parts, strict=True):
            with torch.enable_grad():
                corners = x[members].requires_grad_()
                value = ctx.function(corners, position) @ gradient[begin : begin + len(members)]
            (part,) = torch.autograd.grad(value, corners)
            total.index_add_(0, members.reshape(-1), part.flatten(0, 1))
            begin += len(members)
        return total, None, None, None


class ImplicitRisk(torch.autograd.Function):
    """Attaches the derivative at the fixed point to a value that was computed without a graph."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weight: Tensor, cost: Tensor, log_mass: Tensor, incidence: Incidence, regularisation: float
    ) -> Tensor:
        ctx.save_for_backward(log_mass)
        ctx.incidence, ctx.regularisation = incidence, regularisation
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (log_mass,) = ctx.saved_tensors
        mass = log_mass.exp()
        potential = solved(ctx.incidence, mass, ctx.incidence.covered(mass), SOLVED)
        by_weight = gradient * (1 - potential)
        by_cost = gradient * mass * (1 - ctx.incidence.total(potential)) / ctx.regularisation
        return None, by_weight, by_cost, None, None, None

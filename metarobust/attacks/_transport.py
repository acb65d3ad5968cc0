"""Ascent of the loss minus a price for moving: the inner problem of transport-regularised robust optimisation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metarobust._checks import finite, integer, message, require
from metarobust._tensors import per_example
from metarobust.attacks._common import buffers_kept, checked, checked_logits, input_gradient
from metarobust.attacks._counting import record_call
from metarobust.attacks._insertion import check_binary
from metarobust.losses import Loss, loss_function
from metarobust.threat_models import ThreatModel
from metarobust.transport_costs import HardBall, Insertion, TransportCost
from metarobust.types import Model

TIE = 1e-6
"""Relative difference up to which a moved point counts as good as x at the scale that ``rescale`` returned last."""


class TransportSearch(NamedTuple):
    """What `TransportAscent.search` found.

    Attributes:
        x_adv: the best points, shaped like ``x``, detached, inside the domain.
        losses: loss at ``x_adv``, ``[batch]``.
        costs: transport cost of ``x_adv``, ``[batch]``, without the scale.
        natural_losses: loss at ``x``, ``[batch]``.
        scale: the scale s that ``x_adv`` was judged by.
    """

    x_adv: Tensor
    losses: Tensor
    costs: Tensor
    natural_losses: Tensor
    scale: float


Rescale = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True, kw_only=True)
class TransportAscent:
    transport_cost: TransportCost
    scale: float = 1.0
    steps: int = 10
    step_size: float | None = None
    loss: str | Loss = "cross_entropy"
    random_start: bool = False
    rescalings: int = 3

    def __post_init__(self) -> None:
        cost = self.transport_cost
        if isinstance(cost, type) or not isinstance(cost, TransportCost):
            raise TypeError(message("transport_cost", "a transport cost", repr(cost), "write NormPower(weight=1.0)"))
        _check_scale("scale", self.scale)
        integer("steps", self.steps, least=1)
        integer("rescalings", self.rescalings, least=0)
        loss_function(self.loss)
        if isinstance(cost, Insertion):
            if self.step_size is not None:
                integer("step_size", self.step_size, least=1)
            require(not self.random_start, "random_start", "False for Insertion", True)
            return
        if self.step_size is not None:
            finite("step_size", self.step_size, above=0.0)
        require(
            self.step_size is not None or cost.reach is not None,
            "step_size",
            f"given for {type(cost).__name__}, which has no radius to take it from",
            None,
            "write the mean length of a step in input units: the distance to search, times 2.5, over the number of steps",
        )

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached, inside the domain of the cost."""
        return self.search(model, x, y, generator=generator).x_adv

    @torch.inference_mode(False)
    def search(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        rescale: Rescale | None = None,
    ) -> TransportSearch:
        cost, scale = self.transport_cost, float(self.scale)
        x, y = checked(self._ball(0.0), model, x, y)
        if isinstance(cost, Insertion):
            check_binary(x)
        record_call(len(x))
        if len(x) == 0:
            nothing = x.new_zeros(0)
            return TransportSearch(x.clone(), nothing, nothing.clone(), nothing.clone(), scale)
        lengths, moments = self._lengths(), self._moments()
        free = max(1, sum(2 * sum(lengths[: step + 1]) < sum(lengths) for step in range(self.steps)))
        point = x.clone()
        if self.random_start and cost.reach != 0:
            radius = cost.reach if cost.reach is not None else lengths[0]
            point = cost.project(self._ball(radius).sample(x, generator=generator), x)
        with buffers_kept(model):
            natural, gradient = self._evaluate(model, x, y, first=True, differentiate=not self.random_start)
            best = _Best(x, natural, torch.zeros_like(natural), torch.zeros_like(natural, dtype=torch.bool))
            for step, length in enumerate(lengths):
                if step > 0 or self.random_start:
                    losses, gradient = self._evaluate(model, point, y)
                    best = best.or_better(point, losses, cost.cost(point, x), x, scale)
                if rescale is not None and step in moments:
                    scale = _rescaled(rescale, natural, best)
                if not cost.reach and (scale == math.inf or cost.reach == 0):
                    return TransportSearch(x.clone(), natural, torch.zeros_like(natural), natural, scale)
                assert gradient is not None
                price = 0.0 if step < free and scale < math.inf else scale
                point = cost.step(point, x, gradient, scale=price, length=length)
            losses, _ = self._evaluate(model, point, y, differentiate=False)
            best = best.or_better(point, losses, cost.cost(point, x), x, scale)
        if rescale is not None:
            scale = _rescaled(rescale, natural, best)
        return best.unless_natural(x, natural, scale, slack=0.0 if rescale is None else TIE)

    def _ball(self, radius: float) -> ThreatModel:
        cost = self.transport_cost
        radius = min(radius, cost.upper - cost.lower) if cost.norm == "linf" else radius
        return ThreatModel(norm=cost.norm, epsilon=radius, lower=cost.lower, upper=cost.upper)

    def _lengths(self) -> list[float]:
        """The length of each step."""
        cost = self.transport_cost
        if isinstance(cost, Insertion):
            return [1 if self.step_size is None else self.step_size] * self.steps
        mean = self.step_size if self.step_size is not None else 2.5 * (cost.reach or 0.0) / self.steps
        if isinstance(cost, HardBall):
            return [mean] * self.steps
        return [2 * mean * (self.steps - step) / (self.steps + 1) for step in range(self.steps)]

    def _moments(self) -> set[int]:
        """Steps before which the scale is renewed; the first is one."""
        return {round(part * self.steps / (self.rescalings + 1)) for part in range(self.rescalings + 1)}

    def _evaluate(
        self, model: Model, point: Tensor, y: Tensor, *, first: bool = False, differentiate: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Losses at a point and, if asked for, their input gradient."""
        with torch.set_grad_enabled(differentiate):
            leaf = point.detach().requires_grad_(differentiate)
            logits = model(leaf)
            if first:
                checked_logits(logits, y)
            losses = loss_function(self.loss)(logits, y)
            return losses.detach(), input_gradient(losses, leaf) if differentiate else None


class _Best(NamedTuple):
    """Of the points of each example other than x that were evaluated, the best at the scale of the moment."""

    points: Tensor
    losses: Tensor
    costs: Tensor
    moved: Tensor

    def or_better(self, points: Tensor, losses: Tensor, costs: Tensor, x: Tensor, scale: float) -> "_Best":
        kept = torch.where(self.moved, _phi(self.losses, self.costs, scale), -math.inf)
        moved = (points != x).flatten(1).any(1)
        better = moved & (_phi(losses, costs, scale) > kept)
        return _Best(
            torch.where(per_example(better, x), points, self.points),
            torch.where(better, losses, self.losses),
            torch.where(better, costs.to(losses.dtype), self.costs),
            self.moved | better,
        )

    def unless_natural(self, x: Tensor, natural: Tensor, scale: float, *, slack: float) -> TransportSearch:
        phi = _phi(self.losses, self.costs, scale)
        stays = ~self.moved | ~(phi >= natural.double() - slack * (1 + self.losses.double().abs()))
        return TransportSearch(
            torch.where(per_example(stays, x), x, self.points),
            torch.where(stays, natural, self.losses),
            torch.where(stays, 0.0, self.costs),
            natural,
            scale,
        )


def _phi(losses: Tensor, costs: Tensor, scale: float) -> Tensor:
    """``loss - scale * cost`` in float64; what costs nothing is free at an infinite scale too."""
    costs = costs.double()
    return losses.double() - torch.where(costs > 0, scale * costs, 0.0)


def _check_scale(name: str, value: object) -> None:
    expected = "a number >= 0 (inf: only what costs nothing)"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message(name, expected, repr(value)))
    require(value >= 0, name, expected, value)


def _rescaled(rescale: Rescale, natural: Tensor, best: _Best) -> float:
    scale = rescale(torch.stack([natural, best.losses], 1), torch.stack([torch.zeros_like(best.costs), best.costs], 1))
    _check_scale("the scale that rescale returns", scale)
    return float(scale)

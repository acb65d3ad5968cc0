"""Ascent of the loss minus a price for moving: the inner problem of transport-regularised robust optimisation."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from metarobust import _checks
from metarobust._checks import called, finite, integer, message, require
from metarobust._tensors import per_example
from metarobust.attacks._common import buffers_kept, checked, checked_logits, input_gradient
from metarobust.attacks._counting import record_call
from metarobust.attacks._insertion import check_binary
from metarobust.losses import Loss, known_loss, loss_function
from metarobust.transport_costs import HardBall, Insertion, TransportCost
from metarobust.types import Model

TIE = 1e-6
"""How much worse than x, relative to 1 + loss, a moved point may be and still be kept at a scale that a dual has solved for."""

Rescale: TypeAlias = Callable[[Tensor, Tensor], float]


class TransportSearch(NamedTuple):
    """What `TransportAscent.search` found.

    Attributes:
        x_adv: the best points, shaped like ``x``, detached, inside the domain of the cost.
        losses: loss at ``x_adv``, ``[batch]``.
        costs: transport cost of ``x_adv``, ``[batch]``, without the scale.
        natural_losses: loss at ``x``, ``[batch]``.
        scale: the scale s that the points were judged by last.
    """

    x_adv: Tensor
    losses: Tensor
    costs: Tensor
    natural_losses: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True)
class TransportAscent:
    r"""Maximises :math:`\Phi = l(f(x'), y) - s\, c(x', x)` per example, what a dual of price s expects of an adversary.

    This is :math:`\Phi` of `dro.worst_case_expectation` (Birrell and Ebrahimi, 2025, arXiv 2309.03791). Each step is steepest
    ascent of the whole of it at the current point, in the norm of the cost and inside its domain; where the best point for the
    gradient at hand is nearer, the step ends there (see ``step`` of the costs). The result is the best point by :math:`\Phi` of
    all that were evaluated, x among them, which costs nothing.

    The lengths of the steps fall linearly, :math:`2 \bar h (T - t) / (T + 1)` for t = 0 to T - 1 with the mean
    :math:`\bar h` = ``step_size``: the iterates pass a maximum along a line once and then alternate around it, ever closer, to at
    most the last length :math:`2 \bar h / (T + 1)`. A `HardBall` gets the equal steps of `PGD`, an `Insertion` equal numbers of
    bits. The first steps, as many as make up less than half of the way and at least one, disregard the price: where an example is
    classified with confidence its loss is flat, and any price would hold it at x, whatever there is to gain further out. What
    is left of the way suffices to come back, from three steps on.

    For a linear loss, and travel of 1.2 to 2.5 times the distance to the optimum in 20 steps, at least 99.8 % of the largest
    :math:`\Phi` was reached in every case tried (powers from 1.5 to 2.5, three norms, the hinge, with and without a binding box).
    At power 1 and below, :math:`\Phi` has several maxima, and the result need not be the largest.

    A call takes exactly ``steps`` forward-backward passes and one forward pass; a random start takes one more forward pass.

    Args:
        transport_cost: from `metarobust.transport_costs`. Its weight and ``scale`` multiply: :math:`\Phi` is loss - scale * cost.
        scale: s, at least 0. 0: moving is free in the domain; inf: only what costs nothing is allowed, as for a dual of radius 0.
        steps: number of gradient steps, at least 1.
        step_size: mean length of a step in the norm of the cost, input units; for `Insertion` the largest number of bits that a
            step flips, default 1. The default of a ball is ``2.5 * epsilon / steps``. Costs without a free distance have no
            default: ``steps * step_size`` should be about 2.5 times the furthest move that may pay off.
        loss: ``"cross_entropy"``, ``"margin"``, or a callable ``(logits, y) -> [batch]``.
        random_start: begin at a uniform point of the free ball, or of a ball of radius ``step_size`` without one. Needed where
            the loss has gradient 0 at x, as a divergence from the prediction at x. Not for `Insertion`.
        rescalings: how often `search` renews the scale during the ascent, after the first time before it and before the last time
            at its end; evenly spread.

    A call takes ``generator``, a CPU generator that a random start is drawn from; without one it comes from torch's global
    generator. It returns the points; `search` returns their losses and costs too.

    Raises:
        TypeError: a transport cost that is none, a setting of the wrong type; on a call, inputs or labels of the wrong dtype.
        ValueError: a setting out of range, or no step size where it is needed; on a call, inputs outside the box (not 0 or 1 for
            `Insertion`) or labels outside the classes.

    Example:
        >>> from metarobust.transport_costs import NormPower
        >>> attack = TransportAscent(transport_cost=NormPower(weight=5.0), steps=40, step_size=0.02, loss="margin")
        >>> attack(lambda x: x, torch.tensor([[0.6, 0.4]]), torch.tensor([0]))  # maximises a + b - 5 (a^2 + b^2)
        tensor([[0.5000, 0.5000]])
    """

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
            raise TypeError(message("transport_cost", "a transport cost, as NormPower(weight=1.0)", repr(cost)))
        _check_scale("scale", self.scale)
        integer("steps", self.steps, least=1)
        integer("rescalings", self.rescalings, least=0)
        loss_function(self.loss)
        if isinstance(cost, Insertion):
            require(not self.random_start, "random_start", "False for Insertion", self.random_start)
            if self.step_size is not None:
                integer("step_size (the bits of one step)", self.step_size, least=1)
            return
        if self.step_size is not None:
            finite("step_size", self.step_size, above=0.0)
        require(
            self.step_size is not None or cost.free_ball.epsilon > 0 or isinstance(cost, HardBall),
            "step_size",
            f"given for {cost!r}, which has no radius to take it from",
            None,
            f"write step_size=2.5 * distance / {self.steps} with the furthest distance that may pay off, in input units",
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
        """The best points with losses, costs and the scale that they were judged by.

        ``rescale(losses [batch, 2], costs [batch, 2]) -> float`` makes attack and dual share one scale: what it returns replaces
        ``scale``. The columns are x and the best moved point so far; before the first move, when it is first called, both are
        x. It is called again ``rescalings`` times during the ascent (fewer if there are fewer steps) and after the last step,
        for an empty batch as often, so that processes that share a scale stay in step. The best points are judged anew at each
        scale, by the losses and costs that were stored. During the ascent the scale moves to the geometric mean of itself and the
        renewed one, at its end to the renewed one.
        The second column keeps the best moved point even where x is better, because a dual may ask for a mixture of the two,
        at a scale where they are equally good; for the same reason the result is the moved point when it is as good as x up
        to rounding (1e-6). Without ``rescale``, it is never worse than x.

        Args:
            model, x, y, generator: as in a call, see `metarobust.types.Attack`.
            rescale: ``rescale(losses [batch, 2], costs [batch, 2]) -> float``, a new scale, as said above.
        """
        cost, scale, free_ball = self.transport_cost, float(self.scale), self.transport_cost.free_ball
        x, y = checked(free_ball, model, x, y)
        if isinstance(cost, Insertion):
            check_binary(x)
        record_call(len(x))
        lengths, point = self._lengths(), x.clone()
        free = max(1, sum(2 * way < sum(lengths) for way in accumulate(lengths)))
        moments = {part * self.steps // (self.rescalings + 1) for part in range(self.rescalings + 1)}
        if len(x) == 0:
            nothing = _Best(x, x.new_zeros(0), x.new_zeros(0), x.new_zeros(0, dtype=torch.bool))
            if rescale is not None:
                for _ in range(len(moments) + 1):
                    scale = _rescaled(rescale, nothing.losses, nothing)
                    if self._stuck(scale):
                        break
            return TransportSearch(point, nothing.losses, nothing.costs, nothing.losses, scale)
        if self.random_start:
            radius = free_ball.epsilon if free_ball.epsilon > 0 else sum(lengths) / self.steps
            radius = min(radius, free_ball.upper - free_ball.lower) if free_ball.norm == "linf" else radius
            point = cost.project(replace(free_ball, epsilon=radius).sample(x, generator=generator), x)
        with buffers_kept(model):
            natural, gradient = self._evaluate(model, x, y, first=True, differentiate=not self.random_start)
            best = _Best(x, natural, torch.zeros_like(natural), torch.zeros_like(natural, dtype=torch.bool))
            for step, length in enumerate(lengths):
                if step > 0 or self.random_start:
                    losses, gradient = self._evaluate(model, point, y)
                    best = best.or_better(point, losses, cost.cost(point, x), x, scale)
                if rescale is not None and step in moments:
                    scale = _halfway(scale if step > 0 else None, _rescaled(rescale, natural, best))
                if self._stuck(scale):
                    return TransportSearch(x.clone(), natural, torch.zeros_like(natural), natural.clone(), scale)
                assert gradient is not None
                point = cost.step(point, x, gradient, scale=0.0 if step < free else scale, length=length)
            losses, _ = self._evaluate(model, point, y, differentiate=False)
            best = best.or_better(point, losses, cost.cost(point, x), x, scale)
        if rescale is not None:
            scale = _rescaled(rescale, natural, best)
        return best.or_natural(x, natural, scale, slack=0.0 if rescale is None else TIE)

    def _stuck(self, scale: float) -> bool:
        """Whether no move is allowed."""
        cost = self.transport_cost
        return cost.free_ball.epsilon == 0 and (scale == math.inf or isinstance(cost, HardBall))

    def _lengths(self) -> list[float]:
        """The length of each step, or the number of bits for insertions."""
        cost, steps = self.transport_cost, self.steps
        if isinstance(cost, Insertion):
            return [1 if self.step_size is None else self.step_size] * steps
        mean = 2.5 * cost.free_ball.epsilon / steps if self.step_size is None else self.step_size
        if isinstance(cost, HardBall):
            return [mean] * steps
        return [2 * mean * (steps - step) / (steps + 1) for step in range(steps)]

    def _evaluate(
        self, model: Model, point: Tensor, y: Tensor, *, first: bool = False, differentiate: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Losses at a point and, if asked for, their input gradient."""
        with torch.set_grad_enabled(differentiate):
            leaf = point.detach().requires_grad_(differentiate)
            logits = checked_logits(called(model, leaf), y) if first else model(leaf)
            losses = _checks.losses(known_loss(self.loss)(logits, y), examples=len(y))
            return losses.detach(), input_gradient(losses, leaf) if differentiate else None


class _Best(NamedTuple):
    """Of the evaluated points of each example other than x, the best at the scale of the moment; ``moved``: there is one."""

    points: Tensor
    losses: Tensor
    costs: Tensor
    moved: Tensor

    def or_better(self, points: Tensor, losses: Tensor, costs: Tensor, x: Tensor, scale: float) -> "_Best":
        """With new points in the place of those that they beat."""
        kept = torch.where(self.moved, _phi(self.losses, self.costs, scale), -math.inf)
        better = (points != x).flatten(1).any(1) & (_phi(losses, costs, scale) > kept)
        return _Best(
            torch.where(per_example(better, x), points, self.points),
            torch.where(better, losses, self.losses),
            torch.where(better, costs.to(losses.dtype), self.costs),
            self.moved | better,
        )

    def or_natural(self, x: Tensor, natural: Tensor, scale: float, *, slack: float) -> TransportSearch:
        """The result, with x where the moved point is worse by more than the slack."""
        least = natural.double() - slack * (1 + natural.double().abs())
        moved = self.moved & (_phi(self.losses, self.costs, scale) >= least)
        return TransportSearch(
            torch.where(per_example(moved, x), self.points, x),
            torch.where(moved, self.losses, natural),
            torch.where(moved, self.costs, 0.0),
            natural,
            scale,
        )


def _phi(losses: Tensor, costs: Tensor, scale: float) -> Tensor:
    """``loss - scale * cost`` in float64; what costs nothing is free at an infinite scale too."""
    costs = costs.double()
    return losses.double() - torch.where(costs > 0, scale * costs, 0.0)


def _check_scale(name: str, value: object) -> None:
    expected = "a number >= 0 (inf allows only what costs nothing)"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message(name, expected, repr(value)))
    require(value >= 0, name, expected, value)


def _halfway(scale: float | None, renewed: float) -> float:
    """The geometric mean of a scale and its renewal; the renewal alone at first, or where one of them is 0 or inf.

    A dear price makes cheap moves, and these a low price: undamped, the two may alternate for ever.
    """
    if scale is None or min(scale, renewed) <= 0 or max(scale, renewed) == math.inf:
        return renewed
    return math.sqrt(scale) * math.sqrt(renewed)


def _rescaled(rescale: Rescale, natural: Tensor, best: _Best) -> float:
    losses, costs = torch.stack([natural, best.losses], 1), torch.stack([torch.zeros_like(best.costs), best.costs], 1)
    scale = rescale(losses, costs)
    _check_scale("the result of rescale", scale)
    return float(scale)

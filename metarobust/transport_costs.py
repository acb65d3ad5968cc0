"""What it costs an adversary to move x to x': hard balls, powers of norms, balls with soft edges, insertions of bits."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from metarobust._checks import choice, finite, message, moved, require
from metarobust._tensors import flat, norms, per_example
from metarobust.threat_models import NORMS, Norm, ThreatModel

__all__ = ["HardBall", "Insertion", "NormPower", "SoftHinge", "TransportCost"]

TOLERANCE = 1e-5
"""How far outside ball or box a point may lie, input units, as in `ThreatModel.contains`; more where the dtype rounds more."""

MAXIMISER_ROUNDS = 12
"""Rounds of the fixed point that the l2 step solves: at power 1.5 or 2.5 each halves the error, at power 2 one is enough."""


@runtime_checkable
class TransportCost(Protocol):
    """The price of moving an example, and the step that an ascent of ``loss - scale * cost`` takes at that price."""

    @property
    def free_ball(self) -> ThreatModel:
        """The moves that cost nothing, with the box; epsilon is 0 where there are none. Its norm measures the steps."""
        ...

    def cost(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Cost of each ``x_adv``, ``[batch]``: at least 0, 0 at ``x``, inf outside the domain; differentiable where finite."""
        ...

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """A point of the domain nearest to ``x_adv``, shaped like ``x``."""
        ...

    def step(self, x_adv: Tensor, x: Tensor, gradient: Tensor, *, scale: float, length: float) -> Tensor:
        """The next point of the ascent from ``x``, inside the domain, at most ``length`` away from ``x_adv`` in that norm.

        ``gradient`` is the loss's at ``x_adv``, ``scale`` the price of the cost.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class HardBall:
    """Cost 0 inside ball and box, inf outside: the adversary of ordinary adversarial training.

    Args:
        threat_model: ball and box, in input units.

    Example:
        >>> cost = HardBall(threat_model=ThreatModel(norm="linf", epsilon=0.1))
        >>> cost.cost(torch.tensor([[0.6], [0.8]]), torch.tensor([[0.5], [0.5]]))
        tensor([0., inf])
    """

    threat_model: ThreatModel

    def __post_init__(self) -> None:
        _check_threat_model(self.threat_model)

    @property
    def free_ball(self) -> ThreatModel:
        return self.threat_model

    def cost(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """0 inside, inf outside, ``[batch]``; the gradient is 0."""
        moved(x_adv, x)
        ball = self.threat_model
        # Every coordinate may be rounded by the spacing of numbers at the ends of the box; the norm adds that up.
        coordinates = flat(x[:1]).shape[1] ** {"linf": 0.0, "l2": 0.5, "l1": 1.0}[ball.norm]
        rounding = torch.finfo(x.dtype).eps * (max(abs(ball.lower), abs(ball.upper)) * coordinates + ball.epsilon)
        inside = ball.contains(x_adv, x, tolerance=max(TOLERANCE, rounding))
        return _inside(flat(x_adv - x).sum(1) * 0, inside)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of ball and box, as `ThreatModel.project`."""
        return self.threat_model.project(x_adv, x)

    def step(self, x_adv: Tensor, x: Tensor, gradient: Tensor, *, scale: float, length: float) -> Tensor:
        """The step of `attacks.PGD`; inside the ball the scale has nothing to multiply."""
        return self.project(x_adv + length * self.threat_model.ascent_direction(gradient, x_adv), x)


@dataclass(frozen=True, kw_only=True)
class NormPower:
    r"""Cost :math:`L \|x' - x\|_p^q` inside the box, inf outside (Birrell and Ebrahimi, 2025, arXiv 2309.03791).

    At power 1 and below a linear loss is best served by all or nothing: the far end of the box, or no move.

    Args:
        weight: L > 0, units of the loss per (input unit)^q at scale 1.
        norm: p: ``"linf"``, ``"l2"`` or ``"l1"``.
        power: q > 0.
        lower: smallest valid input value.
        upper: largest valid input value.

    Example:
        >>> NormPower(weight=0.1, power=2.0).cost(torch.tensor([[0.3, 0.4]]), torch.zeros(1, 2))
        tensor([0.0250])
    """

    weight: float
    norm: Norm = "l2"
    power: float = 2.0
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        finite("weight", self.weight, above=0.0)
        choice("norm", self.norm, NORMS)
        finite("power", self.power, above=0.0)
        _ = self.free_ball

    @property
    def free_ball(self) -> ThreatModel:
        return ThreatModel(norm=self.norm, epsilon=0.0, lower=self.lower, upper=self.upper)

    def cost(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Cost per example, ``[batch]``; the gradient at ``x_adv = x`` is 0, also where the power has no finite one."""
        moved(x_adv, x)
        paid = self.weight * _power(norms(x_adv - x, self.norm), self.power)
        return _inside(paid, _in_box(x_adv, self.free_ball))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """``x_adv`` clipped to the box."""
        return x_adv.clamp(self.lower, self.upper)

    def step(self, x_adv: Tensor, x: Tensor, gradient: Tensor, *, scale: float, length: float) -> Tensor:
        r"""Steepest ascent of :math:`g \cdot x' - s L \|x' - x\|_p^q` for the gradient g at ``x_adv``, ended near its maximiser.

        The norm is kept as it is and not replaced by its gradient, which jumps where coordinates tie (linf) or return to 0
        (l1). At ``x`` itself the slope of the cost counts as 0. For q > 1 the step ends in the maximiser if that is within its
        length (l2), or at the largest radius that a maximiser can have.
        """
        price = scale * self.weight * self.power
        radius = norms(x_adv - x, self.norm)
        slope = torch.where(radius > 0, price * torch.where(radius > 0, radius, 1.0) ** (self.power - 1), 0.0)
        step = {"linf": self._linf, "l2": self._l2, "l1": self._l1}[self.norm]
        moved = self.project(step(x_adv, x, gradient, slope, length), x)
        if price == 0 or self.power <= 1:
            return moved
        if self.norm == "l2":
            best = self._l2_maximiser(x, gradient, price)
            return torch.where(per_example(norms(best - x_adv, "l2") <= length, x), best, moved)
        # Where the slope exceeds the gradient's dual norm, every direction loses; but no step is longer than its length.
        dual = norms(gradient, {"linf": "l1", "l1": "linf"}[self.norm])
        furthest = torch.maximum((dual / price) ** (1 / (self.power - 1)), radius - length)
        reached = norms(moved - x, self.norm)
        share = torch.where(reached > furthest, furthest / torch.where(reached > 0, reached, 1.0), 1.0)
        return torch.where(per_example(share < 1, x), x + per_example(share, x) * (moved - x), moved)

    def _l2_maximiser(self, x: Tensor, gradient: Tensor, price: float) -> Tensor:
        r"""The point of the box at :math:`d = clip(t g)` with the t that makes :math:`t\, s L q \|d\|^{q - 2}` equal to 1.

        Without a clip that is the radius :math:`(\|g\|_2 / (s L q))^{1 / (q - 1)}`. From there t moves monotonically to the
        solution, because the left side grows by a factor between those of t and of t^(q - 1).
        """
        # Logarithms in float64: no power leaves its range, however steep or flat the loss.
        tiny, furthest = torch.finfo(torch.float64).tiny, math.log(1e4 * (self.upper - self.lower))
        size = norms(gradient, "l2").double().clamp(min=tiny).log() - math.log(price)
        unit, low, high = self.free_ball.ascent_direction(gradient), self.lower - x, self.upper - x
        wish = (size / (self.power - 1)).clamp(max=furthest)  # log of t times the size of g
        move = (per_example(wish.exp(), x).to(x.dtype) * unit).clamp(low, high)
        for _ in range(MAXIMISER_ROUNDS):
            reached = norms(move, "l2").double().clamp(min=tiny).log()
            wish = wish + (size - wish + (2 - self.power) * reached) / max(1.0, self.power - 1)
            wish = wish.clamp(max=furthest)
            move = (per_example(wish.exp(), x).to(x.dtype) * unit).clamp(low, high)
        return x + move

    def _l2(self, x_adv: Tensor, x: Tensor, gradient: Tensor, slope: Tensor, length: float) -> Tensor:
        """A normalised step; coordinates that the box holds take no share of its length."""
        outward = self.free_ball.ascent_direction(x_adv - x)
        total = gradient - per_example(slope, x) * outward
        held = torch.where(total > 0, x_adv >= self.upper, x_adv <= self.lower)
        return x_adv + length * self.free_ball.ascent_direction(total.masked_fill(held, 0.0))

    def _linf(self, x_adv: Tensor, x: Tensor, gradient: Tensor, slope: Tensor, length: float) -> Tensor:
        """Every coordinate by ``length`` along its sign, but none further than the radius at which the slope balances.

        That radius is a weighted quantile: the last at which the coordinates that can still grow gain more than the slope.
        """
        sign, gain = flat(gradient).sign(), flat(gradient).abs()
        lowest = flat((x_adv - length).clamp(min=self.lower) - x)
        highest = flat((x_adv + length).clamp(max=self.upper) - x)
        ends = torch.where(sign > 0, highest, -lowest)
        nearest = torch.maximum(lowest, -highest).clamp(min=0).amax(1, keepdim=True)
        kinks, order = ends.sort(1, descending=True)
        gained = gain.gather(1, order).cumsum(1)
        enough = (gained <= slope[:, None]).sum(1, keepdim=True)
        radius = torch.cat([kinks, nearest], 1).gather(1, enough)
        radius = torch.maximum(radius, nearest)
        wish = torch.where(sign == 0, flat(x_adv - x), sign * radius)
        wish = wish.clamp(-radius, radius)
        return x + torch.maximum(lowest, torch.minimum(wish, highest)).reshape(x.shape)

    def _l1(self, x_adv: Tensor, x: Tensor, gradient: Tensor, slope: Tensor, length: float) -> Tensor:
        """The length goes to the coordinates of largest gain, each as far as the box, or ``x`` on the way back, allows."""
        move, gradient, x_flat = flat(x_adv - x), flat(gradient), flat(x)
        away = torch.where(move == 0, gradient.sign(), move.sign())
        outward_gain = gradient * away - slope[:, None]
        returns = (outward_gain < 0) & (move != 0)
        room = torch.where(away > 0, self.upper - x_flat, x_flat - self.lower) - move.abs()
        room = torch.where(returns, move.abs(), room.clamp(min=0))
        gain = torch.where(returns, -outward_gain, outward_gain.clamp(min=0)).masked_fill(room == 0, 0.0)
        ordered, order = gain.sort(1, descending=True)
        room = room.gather(1, order)
        share = torch.minimum(room, (length - (room.cumsum(1) - room)).clamp(min=0)) * (ordered > 0)
        taken = torch.zeros_like(move).scatter_(1, order, share)
        return x + (move + torch.where(returns, -away, away) * taken).reshape(x.shape)


@dataclass(frozen=True, kw_only=True)
class SoftHinge:
    r"""Cost :math:`(L / 2) \sum_j (|x'_j - x_j| - \epsilon)_+^2` inside the box, inf outside: an l_inf ball with a soft edge.

    From UDR (Bui et al., 2022, arXiv 2202.13437). A scale of inf makes it a `HardBall`.

    Args:
        threat_model: l_inf ball and box, in input units; moves within the ball cost nothing.
        weight: L > 0, units of the loss per (input unit)^2 at scale 1.

    Example:
        >>> cost = SoftHinge(threat_model=ThreatModel(norm="linf", epsilon=0.1), weight=200.0)
        >>> cost.cost(torch.tensor([[0.6, 0.7]]), torch.tensor([[0.5, 0.5]]))
        tensor([1.0000])
    """

    threat_model: ThreatModel
    weight: float

    def __post_init__(self) -> None:
        _check_threat_model(self.threat_model)
        norm = self.threat_model.norm
        require(norm == "linf", "threat_model", "an l_inf ball for SoftHinge", f"norm={norm!r}", "write norm='linf'")
        finite("weight", self.weight, above=0.0)

    @property
    def free_ball(self) -> ThreatModel:
        return self.threat_model

    def cost(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Cost per example, ``[batch]``; an excess within rounding is none, so that the ball is free at a scale of inf too."""
        moved(x_adv, x)
        ball = self.threat_model
        excess = flat(x_adv - x).abs() - ball.epsilon
        rounding = 4 * torch.finfo(x.dtype).eps * max(abs(ball.lower), abs(ball.upper))
        excess = torch.where(excess > rounding, excess, 0.0)
        return _inside(self.weight / 2 * excess.square().sum(1), _in_box(x_adv, ball))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """``x_adv`` clipped to the box."""
        return x_adv.clamp(self.threat_model.lower, self.threat_model.upper)

    def step(self, x_adv: Tensor, x: Tensor, gradient: Tensor, *, scale: float, length: float) -> Tensor:
        r"""A sign step, ended where the cost's gradient balances the loss's: at :math:`|d_j| = \epsilon + |g_j| / (s L)`."""
        price = scale * self.weight
        excess = gradient.abs() / price if price > 0 else torch.full_like(gradient, torch.inf)
        wish = x + gradient.sign() * (self.threat_model.epsilon + excess)
        # Without a gradient every point of the ball is as good as another.
        wish = torch.where(gradient == 0, x_adv.clamp(*self.threat_model.bounds(x)), wish)
        return self.project(wish.clamp(x_adv - length, x_adv + length), x)


@dataclass(frozen=True, kw_only=True)
class Insertion:
    r"""Cost :math:`L \|x' - x\|_1^q` of setting bits, on :math:`x' \ge x`, both in :math:`\{0, 1\}^d`; inf otherwise.

    For binary features that can be added and not removed, as a program's imports (Al-Dujaili et al., 2018, arXiv 1801.02950).

    Args:
        weight: L > 0, units of the loss per bit^q at scale 1.
        power: q > 0.

    Example:
        >>> cost = Insertion(weight=0.5)
        >>> cost.cost(torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        tensor([1., inf])
    """

    weight: float
    power: float = 1.0

    def __post_init__(self) -> None:
        finite("weight", self.weight, above=0.0)
        finite("power", self.power, above=0.0)

    @property
    def free_ball(self) -> ThreatModel:
        return ThreatModel(norm="l1", epsilon=0.0)

    def cost(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Cost per example, ``[batch]``."""
        moved(x_adv, x)
        paid = self.weight * _power(norms(x_adv - x, "l1"), self.power)
        binary = ((x_adv == 0) | (x_adv == 1)) & ((x == 0) | (x == 1))
        return _inside(paid, flat(binary & (x_adv >= x)).all(1))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Every bit that is set in ``x`` or larger than 1/2 in ``x_adv``."""
        return torch.maximum((x_adv > 0.5).to(x.dtype), x)

    def step(self, x_adv: Tensor, x: Tensor, gradient: Tensor, *, scale: float, length: float) -> Tensor:
        """The ``length`` most profitable flips on the way to the best set of insertions to first order in the loss.

        That set is known exactly for any power: the bits of largest gradient, as many as pay for their joint cost. Bits
        that were inserted and are not in it are removed; bits of ``x`` stay.
        """
        gain = flat(gradient).masked_fill(flat(x) > 0, -torch.inf)
        ordered, order = torch.where(gain > 0, gain, -torch.inf).sort(1, descending=True)
        price = scale * self.weight
        paid = price * torch.arange(1, gain.shape[1] + 1, dtype=gain.dtype, device=gain.device) ** self.power
        worth = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(1) - paid], 1)
        count = worth.argmax(1, keepdim=True)
        place = torch.empty_like(order).scatter_(1, order, torch.arange(gain.shape[1], device=order.device).expand_as(order))
        wished, inserted = place < count, flat(x_adv > x)
        last = count.clamp(min=1).to(gain.dtype)
        marginal = price * (last**self.power - (last - 1) ** self.power)
        urgency = (gain - marginal).abs().masked_fill(wished == inserted, -1.0)
        first = urgency.argsort(1, descending=True)[:, : int(length)]
        flips = torch.zeros_like(wished).scatter_(1, first, True) & (wished != inserted)
        return torch.where(flips.reshape(x.shape), 1 - x_adv, x_adv)


def _check_threat_model(value: object) -> None:
    if not isinstance(value, ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel", repr(value)))


def _inside(paid: Tensor, inside: Tensor) -> Tensor:
    """The cost inside the domain, inf outside."""
    return torch.where(inside, paid, torch.inf)


def _in_box(x_adv: Tensor, box: ThreatModel) -> Tensor:
    return flat((x_adv >= box.lower - TOLERANCE) & (x_adv <= box.upper + TOLERANCE)).all(1)


def _power(radius: Tensor, power: float) -> Tensor:
    """``radius ** power`` with gradient 0 at 0, where the true one is infinite for a power below 1."""
    positive = radius > 0
    return torch.where(positive, torch.where(positive, radius, 1.0) ** power, 0.0)

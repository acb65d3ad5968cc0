"""What the adversary may do: a ball of radius epsilon around each example, cut by the box of valid inputs."""

from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from metarobust._checks import choice, finite, floating, message, moved, require
from metarobust._tensors import flat, normal, norms, per_example, uniform

__all__ = ["NORMS", "Norm", "ThreatModel"]

Norm: TypeAlias = Literal["linf", "l2", "l1"]
"""A norm that a ball can be measured in."""
NORMS: tuple[Norm, ...] = get_args(Norm)
"""All of them."""


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    r"""The set :math:`\{x' : \|x' - x\| \le \epsilon,\ lower \le x' \le upper\}` around each example ``x``.

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        epsilon: radius of the ball, in input units (8-bit images scaled to [0, 1]: ``8 / 255``, not ``8``). NumPy's numbers
            become Python's, here and in the box.
        lower: smallest valid input value.
        upper: largest valid input value.

    Raises:
        ValueError: an unknown norm, a negative or non-finite epsilon, an l_inf epsilon wider than the box, an empty box.

    Example:
        >>> threat_model = ThreatModel(norm="l2", epsilon=1.0)
        >>> x = torch.tensor([[0.5, 0.9]])
        >>> threat_model.project(torch.tensor([[0.5, 3.0]]), x)  # the box stops it before the ball does
        tensor([[0.5000, 1.0000]])
    """

    norm: Norm = "linf"
    epsilon: float = 8 / 255
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        choice("norm", self.norm, NORMS)
        for name in ("epsilon", "lower", "upper"):
            value = getattr(self, name)
            if isinstance(value, Real) and type(value) not in (int, float, bool):  # NumPy's numbers: one repr for one ball
                object.__setattr__(self, name, float(value))
        finite("lower", self.lower)
        finite("upper", self.upper)
        require(self.lower < self.upper, "lower", f"< upper (={self.upper:g})", self.lower, "write lower=0.0, upper=1.0")
        remedy = "for 8-bit images in [0, 1] write 8 / 255"
        if not isinstance(self.epsilon, (int, float)) or isinstance(self.epsilon, bool):
            if isinstance(self.epsilon, Tensor):
                remedy = "write float(epsilon)"
            raise TypeError(message("epsilon", "a number >= 0 in input units", repr(self.epsilon), remedy))
        require(0 <= self.epsilon < float("inf"), "epsilon", ">= 0 in input units", self.epsilon, remedy)
        width = self.upper - self.lower
        require(
            self.norm != "linf" or self.epsilon <= width,
            "epsilon",
            f"at most {width:g} (= upper - lower) in input units for l_inf",
            self.epsilon,
            f"for 8-bit images in [0, 1] write {self.epsilon:g} / 255",
        )

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """``norm`` of ``x_adv - x`` per example, shape ``[batch]``."""
        moved(x_adv, x)
        return norms(x_adv - x, self.norm)

    def contains(self, x_adv: Tensor, x: Tensor, *, tolerance: float = 1e-5) -> Tensor:
        """Whether each ``x_adv`` lies in the ball of its ``x`` and in the box, up to a ``tolerance`` in input units; bool."""
        moved(x_adv, x)
        inside_box = ((x_adv >= self.lower - tolerance) & (x_adv <= self.upper + tolerance)).flatten(1).all(1)
        return inside_box & (self.distance(x_adv, x) <= self.epsilon + tolerance)

    def bounds(self, x: Tensor, *, radius: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The l_inf ball of ``x`` cut by the box, as ``(lowest, highest)`` per coordinate; it encloses every other ball.

        ``radius [batch]`` gives each example its own in place of epsilon.
        """
        reach = self.epsilon if radius is None else per_example(radius, x)
        return (x - reach).clamp_(min=self.lower), (x + reach).clamp_(max=self.upper)

    def project(self, x_adv: Tensor, x: Tensor, *, radius: Tensor | None = None) -> Tensor:
        r"""Euclidean projection of ``x_adv`` onto the intersection of ball and box; ``x`` must lie in the box.

        The intersection is projected onto exactly, not ball first and box second. By the optimality conditions the moved
        magnitudes are, per coordinate with room :math:`b_i` in the box and wish :math:`|v_i|`:
        l_inf :math:`\min(|v_i|, b_i, \epsilon)`; l2 :math:`\min(s|v_i|, b_i)`; l1 :math:`\min((|v_i| - \lambda)_+, b_i)`,
        with one scalar per example that puts the result on the ball. Differentiable in both arguments, exactly.
        ``radius [batch]``, a constant, gives each example its own in place of epsilon.
        """
        moved(x_adv, x)
        if radius is not None:
            require(radius.shape == x.shape[:1], "radius", f"of shape [{len(x)}], one per example", list(radius.shape))
            radius = radius.detach().to(x)
        if self.norm == "linf":
            return x_adv.clamp(*self.bounds(x, radius=radius))
        reach = self.epsilon if radius is None else radius[:, None]
        with torch.no_grad():
            move = flat(x_adv - x)
            room = flat(torch.where(x_adv >= x, self.upper - x, x - self.lower)).clamp(min=0)
            find = _l2_magnitudes if self.norm == "l2" else _l1_magnitudes
            magnitudes = find(move.abs(), room, reach)
            projected = (x + torch.copysign(magnitudes, move).reshape(x.shape)).clamp(self.lower, self.upper)
        if not torch.is_grad_enabled() or not (x_adv.requires_grad or x.requires_grad):
            return projected
        formula = self._differentiable_projection(x_adv, x, projected, reach)
        return projected + (formula - formula.detach())

    def _differentiable_projection(self, x_adv: Tensor, x: Tensor, projected: Tensor, reach: float | Tensor) -> Tensor:
        """The l2 or l1 projection, in a form that autograd differentiates rightly.

        Near almost every point the coordinates that the box holds, and those that an l1 ball sets back to ``x``, stay the same.
        So the formula is written for these sets held fixed, in the signed move, and autograd gives the implicit derivative:
        finite for the tiniest move, and right where a coordinate did not move at all, which a formula in absolute values misses.
        """
        move = flat(x_adv - x)
        edge = torch.where(move > 0, flat(self.upper - x), flat(self.lower - x))
        with torch.no_grad():
            reached = flat(projected - x)
            rounding = 4 * torch.finfo(x.dtype).eps * max(abs(self.lower), abs(self.upper))
            held = (move != 0) & (move.abs() >= edge.abs()) & ((reached - edge).abs() <= rounding)
            cut = torch.where(move.abs() > edge.abs(), edge, move)
            outside = torch.linalg.vector_norm(cut, ord=2 if self.norm == "l2" else 1, dim=1, keepdim=True) > reach
        if self.norm == "l2":  # the free coordinates share what the held ones leave of the squared radius
            budget = reach**2 - edge.masked_fill(~held, 0).square().sum(1, keepdim=True)
            free = move.masked_fill(held, 0).square().sum(1, keepdim=True)
            tiny = torch.finfo(x.dtype).tiny
            shrunk = move * (budget.clamp(min=tiny) / torch.where(outside, free, 1).clamp(min=tiny)).sqrt()
        else:  # the free coordinates are shortened by one length, such that the radius is used up
            free = ~held & (reached != 0)
            spent = edge.abs().masked_fill(~held, 0).sum(1, keepdim=True) + move.abs().masked_fill(~free, 0).sum(1, keepdim=True)
            shrunk = free * (move - move.sign() * (spent - reach) / free.sum(1, keepdim=True).clamp(min=1))
        return x + torch.where(held, edge, torch.where(outside, shrunk, move)).reshape(x.shape)

    def sample(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A uniform point of the ball of each ``x``, clipped to the box; noise is drawn by ``generator`` on the CPU and moved."""
        floating("x", x)
        if self.norm == "linf":
            noise = uniform(x.shape, like=x, generator=generator).mul_(2).sub_(1)
        else:
            dimensions = max(1, x[:1].numel())
            if self.norm == "l2":
                noise = normal(x.shape, like=x, generator=generator)
            else:  # a difference of exponentials is Laplace noise, whose direction is uniform on the l1 sphere
                uniforms = uniform((2, *x.shape), like=x, generator=generator).clamp_(min=1e-30).log_()
                noise = uniforms[0] - uniforms[1]
            radius = uniform((x.shape[0],), like=x, generator=generator) ** (1 / dimensions)
            noise = noise * per_example(radius / norms(noise, self.norm).clamp(min=1e-30), x)
        return (x + self.epsilon * noise).clamp_(self.lower, self.upper)

    def ascent_direction(self, gradient: Tensor, x: Tensor | None = None) -> Tensor:
        """Steepest ascent for a ``gradient``, of unit length in ``norm``: sign, normalised gradient, or one coordinate (l1).

        For l1, coordinates of ``x`` that the box lets move no further are passed over. A zero gradient gives zero.
        """
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "l2":
            # Largest entry first: the square of a tiny or huge gradient would leave the range of float32.
            largest = norms(gradient, "linf").clamp(min=torch.finfo(gradient.dtype).tiny)
            gradient = gradient / per_example(largest, gradient)
            return gradient / per_example(norms(gradient, "l2").clamp(min=0.5), gradient)
        magnitude = flat(gradient).abs()
        if x is not None:
            stuck = torch.where(gradient > 0, x >= self.upper, x <= self.lower)
            magnitude = magnitude.masked_fill(flat(stuck), 0)
        if gradient.numel() == 0:
            return gradient
        best = magnitude.argmax(1, keepdim=True)
        direction = torch.zeros_like(magnitude).scatter_(1, best, flat(gradient).sign().gather(1, best))
        return (direction * (magnitude > 0)).reshape(gradient.shape)


def _l2_magnitudes(wish: Tensor, room: Tensor, epsilon: float | Tensor) -> Tensor:
    """``min(s * wish, room)`` with the largest ``s <= 1`` whose length is at most epsilon; ``[batch, dimensions]``.

    ``epsilon`` is one number, or ``[batch, 1]``.

    ``s`` grows monotonically while coordinates join the set that the box stops, so the loop ends exactly, after a few rounds.
    """
    stopped = torch.zeros_like(wish, dtype=torch.bool)
    while True:
        spent = room.masked_fill(~stopped, 0).square().sum(1, keepdim=True)
        free = wish.masked_fill(stopped, 0).square().sum(1, keepdim=True)
        scale = ((epsilon**2 - spent).clamp(min=0) / free.clamp(min=torch.finfo(free.dtype).tiny)).sqrt().clamp(max=1)
        magnitudes = torch.minimum(wish * scale, room)
        now = stopped | (wish * scale > room)
        if torch.equal(now, stopped):
            return magnitudes
        stopped = now


def _l1_magnitudes(wish: Tensor, room: Tensor, epsilon: float | Tensor) -> Tensor:
    """``min((wish - shift)_+, room)`` with the smallest ``shift >= 0`` whose sum is at most epsilon; ``[batch, dimensions]``.

    ``epsilon`` is one number, or ``[batch, 1]``.

    The sum is piecewise linear in the shift with kinks at ``wish`` and ``wish - room``: sort the kinks, find the segment.
    Float64 inside, because the running sums of thousands of coordinates lose too much in float32.
    """
    if wish.numel() == 0:
        return wish
    dtype = wish.dtype
    wish, room = wish.double(), room.double()
    reach = torch.minimum(wish, room)
    kinks, order = torch.cat([wish - reach, wish], 1).sort(1)
    # Passing a kink `wish - reach` starts the descent of one coordinate (slope -1), passing `wish` ends it.
    slope_change = torch.cat([-torch.ones_like(wish), torch.ones_like(wish)], 1).gather(1, order)
    slope = slope_change.cumsum(1)
    total = reach.sum(1, keepdim=True) + torch.cat(
        [torch.zeros_like(kinks[:, :1]), (slope[:, :-1] * kinks.diff(dim=1)).cumsum(1)], 1
    )
    segment = ((total >= epsilon).sum(1, keepdim=True) - 1).clamp(min=0)
    start, height = kinks.gather(1, segment), total.gather(1, segment)
    steepness = -slope.gather(1, segment)
    shift = start + (height - epsilon) / steepness.clamp(min=1)
    shift = shift.masked_fill(reach.sum(1, keepdim=True) <= epsilon, 0)
    return torch.minimum((wish - shift).clamp(min=0), reach).to(dtype)

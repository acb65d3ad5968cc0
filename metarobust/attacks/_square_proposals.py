"""The proposals of the Square attack: windows at the ends of an l_inf ball, bumps that move length inside an l2 ball."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from metarobust.threat_models import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How the coordinates of an example lie: ``channels`` and the ``sides`` of each, in row-major order."""

    channels: int
    sides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "Grid":
        shape = tuple(x.shape[1:]) or (1,)
        return cls(channels=shape[0], sides=shape[1:]) if len(shape) > 1 else cls(channels=1, sides=shape)

    @property
    def places(self) -> int:
        return prod(self.sides)

    def window(self, fraction: float, *, bump: bool = False) -> tuple[int, ...]:
        """Sides of the cube that holds about ``fraction`` of the places, cut to the grid; for a bump odd and at least 3."""
        side = round((fraction * self.places) ** (1 / len(self.sides)))
        side = max(side, 3) | 1 if bump else max(side, 1)
        return tuple(min(side, length) for length in self.sides)

    def offsets(self, window: tuple[int, ...], device: torch.device) -> Tensor:
        """Places of a window's coordinates, seen from its first one."""
        offsets = torch.zeros((), dtype=torch.int64, device=device)
        for side, length in zip(window, self.sides, strict=True):
            offsets = offsets[..., None] * length + torch.arange(side, device=device)
        return offsets.flatten()

    def corners(self, numbers: Tensor, window: tuple[int, ...]) -> Tensor:
        """Place of the first coordinate of a window laid at random: uniform ``numbers [..., axes]`` to ``[...]``."""
        corner = torch.zeros(numbers.shape[:-1], dtype=torch.int64, device=numbers.device)
        for axis, (side, length) in enumerate(zip(window, self.sides, strict=True)):
            corner = corner * length + (numbers[..., axis] * (length - side + 1)).long()
        return corner


class _LinfProposals:
    """Stripes and windows at the two ends of the l_inf ball (algorithm 2); ``x`` is ``[rows, channels, places]``."""

    def __init__(self, threat_model: ThreatModel, x: Tensor, grid: Grid) -> None:
        self.grid = grid
        self.lowest, self.highest = (_inward(bound, x) for bound in threat_model.bounds(_wide(x)))
        self.numbers_to_start = grid.channels * grid.sides[-1]
        self.numbers = len(grid.sides) + grid.channels

    def start(self, numbers: Tensor) -> Tensor:
        """Stripes: one sign per channel and column, the last axis."""
        stripe = (numbers >= 0.5).view(len(numbers), self.grid.channels, self.grid.sides[-1])
        up = stripe.repeat(1, 1, self.grid.places // self.grid.sides[-1])
        return torch.where(up, self.highest, self.lowest)

    def keep(self, left: Tensor) -> None:
        self.lowest, self.highest = self.lowest[left], self.highest[left]

    def plan(self, numbers: Tensor, points: Tensor, fraction: float) -> None:
        """Lay the windows of the coming proposals: ``numbers [proposals, rows, self.numbers]``."""
        window, axes = self.grid.window(fraction), len(self.grid.sides)
        self.offsets = self.grid.offsets(window, points.device)
        self.corners = self.grid.corners(numbers, window)[..., None, None]
        self.up = numbers[..., axes:, None] >= 0.5

    def propose(self, points: Tensor, position: int) -> Tensor:
        self.index = (self.corners[position] + self.offsets).expand(-1, self.grid.channels, -1)
        self.old = points.gather(2, self.index)
        low, high, up = self.lowest.gather(2, self.index), self.highest.gather(2, self.index), self.up[position]
        unchanged = (torch.where(up, high, low) == self.old).flatten(1).all(1)
        self.new = torch.where(up ^ unchanged[:, None, None], high, low)
        return points.scatter(2, self.index, self.new)

    def accept(self, points: Tensor, accepted: Tensor) -> None:
        points.scatter_(2, self.index, torch.where(accepted[:, None, None], self.new, self.old))


class _L2Proposals:
    """Bumps that move length from one window to another (algorithm 3); ``x`` is ``[rows, channels, places]``.

    A proposal's length is at most epsilon by construction, and the clipping to the box that follows moves every coordinate
    towards ``x``, which lies in the box: it cannot leave the ball.
    """

    def __init__(self, threat_model: ThreatModel, x: Tensor, grid: Grid) -> None:
        self.threat_model, self.x, self.grid = threat_model, x, grid
        # Rounding of the lengths, in single precision, must not carry a point out of the ball.
        self.squared_epsilon = (threat_model.epsilon * (1 - 1e-5)) ** 2
        self.tile = tuple(max(length // 5, 1) for length in grid.sides)
        self.tiles = prod(length // side for length, side in zip(grid.sides, self.tile, strict=True))
        self.numbers_to_start = self.tiles * (grid.channels + 1)
        self.numbers = 2 * len(grid.sides) + 1 + grid.channels

    def start(self, numbers: Tensor) -> Tensor:
        """A grid of at least five bumps per axis, each with its own sign per channel and its own orientation."""
        bumps, tile_of, within, inside = _two_bumps(self.tile, _wide(self.x)), *_tiling(self.grid.sides, self.tile)
        tile_of, within, inside = (t.to(self.x.device) for t in (tile_of, within, inside))
        axis = (numbers[:, : self.tiles] * len(bumps)).long()[:, tile_of]
        sign = (numbers[:, self.tiles :] >= 0.5).view(-1, self.grid.channels, self.tiles)[:, :, tile_of]
        move = torch.where(sign, 1.0, -1.0) * (bumps[axis, within] * inside)[:, None]
        length = torch.linalg.vector_norm(move, dim=(1, 2), keepdim=True)
        return self._placed(self.x, move * (self.squared_epsilon**0.5 / length))

    def _placed(self, x: Tensor, move: Tensor) -> Tensor:
        """``x + move`` inside the box, in the dtype of ``x`` and never farther from it."""
        return _inward((x + move).clamp_(self.threat_model.lower, self.threat_model.upper), x)

    def keep(self, left: Tensor) -> None:
        self.x = self.x[left]

    def plan(self, numbers: Tensor, points: Tensor, fraction: float) -> None:
        """Lay the windows of the coming proposals: ``numbers [proposals, rows, self.numbers]``."""
        window, axes = self.grid.window(fraction, bump=True), len(self.grid.sides)
        self.offsets = self.grid.offsets(window, points.device)
        self.corners = self.grid.corners(numbers[..., : 2 * axes].unflatten(-1, (2, axes)), window)[..., None, None]
        self.bumps = _two_bumps(window, _wide(self.x))
        self.axis = (numbers[..., 2 * axes] * len(self.bumps)).long()
        self.sign = torch.where(numbers[..., 2 * axes + 1 :, None] >= 0.5, 1.0, -1.0).to(self.bumps)
        # Afresh for every plan, so that the rounding of the updates in between does not add up.
        self.spent = (_wide(points) - self.x).square().sum((1, 2))

    def propose(self, points: Tensor, position: int) -> Tensor:
        index = (self.corners[position] + self.offsets).expand(-1, -1, self.grid.channels, -1)
        self.index_1, self.index_2 = index.unbind(1)
        self.old_1, self.old_2 = points.gather(2, self.index_1), points.gather(2, self.index_2)
        x_1, self.x_2 = self.x.gather(2, self.index_1), self.x.gather(2, self.index_2)
        moved = _wide(self.old_1) - x_1
        proposal = points.scatter(2, self.index_2, self.x_2)
        # Squared length of the union of both windows: the second, and of the first what emptying the second has left.
        freed = (_wide(self.old_2) - self.x_2).square().sum(2) + (_wide(proposal.gather(2, self.index_1)) - x_1).square().sum(2)
        unused = (self.squared_epsilon - self.spent).clamp(min=0)[:, None] / self.grid.channels
        tiny, bump = torch.finfo(moved.dtype).tiny ** 0.5, self.bumps[self.axis[position]][:, None]
        direction = bump * self.sign[position] + moved / torch.linalg.vector_norm(moved, dim=2, keepdim=True).clamp(min=tiny)
        length = torch.linalg.vector_norm(direction, dim=2, keepdim=True).clamp(min=tiny)
        self.new_1 = self._placed(x_1, direction * ((freed + unused).sqrt()[..., None] / length))
        self.new_spent = self.spent - freed.sum(1) + (_wide(self.new_1) - x_1).square().sum((1, 2))
        return proposal.scatter_(2, self.index_1, self.new_1)

    def accept(self, points: Tensor, accepted: Tensor) -> None:
        mask = accepted[:, None, None]
        points.scatter_(2, self.index_2, torch.where(mask, self.x_2, self.old_2))
        points.scatter_(2, self.index_1, torch.where(mask, self.new_1, self.old_1))  # last: it wins where the windows overlap
        self.spent = torch.where(accepted, self.new_spent, self.spent)


PROPOSALS = {"linf": _LinfProposals, "l2": _L2Proposals}


def _two_bumps(window: tuple[int, ...], like: Tensor) -> Tensor:
    r"""The shapes :math:`\eta` of the l2 proposals, one per axis to split, of unit length: ``[axes, coordinates]``.

    Each half is :math:`\eta_u = \sum_{k=d(u)}^{n} (k+1)^{-2}` at Chebyshev distance ``d`` from its centre, the second negated.
    """

    def bump(sides: tuple[int, ...]) -> Tensor:
        distance = torch.zeros((), dtype=torch.int64)
        for side in sides:
            distance = torch.maximum(distance[..., None], (torch.arange(side) - side // 2).abs())
        heights = torch.arange(1, max(sides) // 2 + 2, dtype=torch.float64).pow(-2).flip(0).cumsum(0).flip(0)
        return heights[distance] / heights[distance].norm()

    shapes = []
    for axis, side in enumerate(window):
        halves = [(*window[:axis], part, *window[axis + 1 :]) for part in (side // 2, side - side // 2)]
        shapes.append(torch.cat([bump(halves[0]), -bump(halves[1])], axis).flatten())
    bumps = torch.stack(shapes)
    return (bumps / bumps.norm(dim=1, keepdim=True)).to(like)


def _tiling(sides: tuple[int, ...], tile: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """For each place of a grid: the centred tile it lies in, its place in that tile, and whether any tile covers it."""
    tile_of, within, inside = (torch.tensor([value]) for value in (0, 0, True))
    for length, side in zip(sides, tile, strict=True):
        covered = length // side * side
        at = torch.arange(length) - (length - covered) // 2
        inside = (inside[:, None] & (at >= 0) & (at < covered)).flatten()
        at = at.clamp(0, covered - 1)
        tile_of = (tile_of[:, None] * (length // side) + at // side).flatten()
        within = (within[:, None] * side + at % side).flatten()
    return tile_of, within, inside


def _wide(x: Tensor) -> Tensor:
    """``x`` in single precision where its own is lower: distances need more digits than a half-precision input has."""
    return x.float() if x.element_size() < 4 else x


def _inward(target: Tensor, x: Tensor) -> Tensor:
    """``target`` rounded to the dtype of ``x``, and never farther from ``x`` than ``target`` is."""
    if target.dtype == x.dtype:
        return target
    move, rounded = target - x, target.to(x.dtype)
    # One to two units in the last place back: a rounding from there ends inside, or at x.
    back = target - torch.copysign(target.abs() * torch.finfo(x.dtype).eps, move)
    inside = torch.where((back - x) * move > 0, back, x).to(x.dtype)
    return torch.where((rounded - x.to(target)).abs() > move.abs(), inside, rounded)

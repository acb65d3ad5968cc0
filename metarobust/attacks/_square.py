"""Square: an attack by random search that asks the model for logits and never for a gradient."""

from bisect import bisect_left
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from metarobust._checks import finite, integer, labels, message, require
from metarobust._tensors import flat
from metarobust.attacks._common import buffers_kept, checked, checked_start
from metarobust.attacks._counting import record_call
from metarobust.losses import Loss, loss_function
from metarobust.threat_models import ThreatModel
from metarobust.types import Model

# Numbers of proposals after which the window's share of the input is halved: the paper's, for 10,000 queries.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Proposals whose random numbers are drawn at once: the same for every call, so that more queries only continue a search.
BLOCK = 64
# Finished rows leave the batch when they are at least this share of it.
FINISHED_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Square:
    r"""The Square Attack: random search, one square window at a time (Andriushchenko et al., 2020, arXiv 1912.00049).

    One proposal per query. A proposal is kept when it raises the loss or is misclassified; a misclassified example is finished
    and is asked for no more. A window holds the share :math:`p` of the coordinates of a channel, :math:`p` halving after 10,
    50, 200, 500, 1000, 2000, 4000, 6000 and 8000 proposals, whatever ``queries`` is: the same generator gives the same search,
    only longer, so more queries never do worse.

    - l_inf (algorithm 2) starts from vertical stripes of :math:`\pm\epsilon`; a proposal sets a window to :math:`x+\epsilon` or
      :math:`x-\epsilon`, by one random sign per channel, clipped to the box. A proposal that would change nothing tries the
      opposite signs.
    - l2 (algorithm 3) starts from a grid of :math:`\pm\eta` bumps of length :math:`\epsilon`; a proposal empties a window
      :math:`W_2` and gives its squared length, with what the ball has left, to :math:`W_1`, along
      :math:`\rho\,\eta/\|\eta\| + \nu_{W_1}/\|\nu_{W_1}\|` per channel, :math:`\nu` being the perturbation so far.

    Windows are squares over all channels of ``[channels, height, width]``, runs of neighbours on ``[dimensions]`` and
    ``[channels, length]``, cubes on more axes; no side is longer than its axis. The model is called in the mode it is in,
    without gradients, on the unfinished rows (in training mode, where BatchNorm couples rows, on all): once on the clean input,
    which is not counted, and at most ``queries`` times on perturbed ones, the start being the first. The result is the
    misclassified point, or else the one of the largest loss, never below that of the clean input.

    Args:
        threat_model: ball and box, in input units; l_inf or l2.
        queries: largest number of perturbed points that the model is asked for, per example.
        initial_fraction: share of the coordinates in the first windows (``p_init``), in (0, 1]; default as in AutoAttack
            (Croce and Hein, 2020, arXiv 2003.01690).
        loss: ``"margin"``, ``"cross_entropy"``, or a callable ``(logits, y) -> [batch]``.

    A call takes ``generator``, a CPU generator (without one: torch's global generator). An example's noise does not depend on
    which others are finished.

    Raises:
        ValueError: an l1 ball, no query, a fraction outside (0, 1]; on a call, inputs or labels out of range.
        TypeError: on a call, for inputs or labels of the wrong dtype.

    Example:
        >>> attack = Square(threat_model=ThreatModel(norm="linf", epsilon=0.2), queries=50)
        >>> attack(lambda x: x.round(), torch.tensor([[0.6, 0.4]]), torch.tensor([0]), generator=torch.Generator().manual_seed(0))
        tensor([[0.4000, 0.6000]])
    """

    threat_model: ThreatModel
    queries: int = 5000
    initial_fraction: float = 0.8
    loss: str | Loss = "margin"

    def __post_init__(self) -> None:
        if not isinstance(self.threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel", repr(self.threat_model)))
        norm = self.threat_model.norm
        require(norm in PROPOSALS, "norm", "'linf' or 'l2' for Square", repr(norm), "for l1 write PGD(..., loss='margin')")
        integer("queries", self.queries, least=1)
        finite("initial_fraction", self.initial_fraction, above=0.0)
        require(self.initial_fraction <= 1, "initial_fraction", "at most 1 (the whole input)", self.initial_fraction)
        loss_function(self.loss)

    @torch.inference_mode(False)
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached, inside ball and box.

        ``start``, points inside ball and box shaped like ``x``, takes the place of stripes and bumps; begin with a small
        ``initial_fraction`` then.
        """
        x, y = checked(self.threat_model, x, y)
        if start is not None:
            start = checked_start(self.threat_model, start, x)
        record_call(len(x))
        if x.numel() == 0 or self.threat_model.epsilon == 0:
            return x.clone()
        with torch.no_grad(), buffers_kept(model):
            return _search(self, model, x, y, generator, start)


def _search(
    attack: Square, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, start: Tensor | None
) -> Tensor:
    """Random search (algorithm 1) on all unfinished rows at once, each laid out as ``[channels, places]``."""
    grid, loss_of = _Grid.of(x), loss_function(attack.loss)

    def ask(points: Tensor, y: Tensor, *, first: bool = False) -> tuple[Tensor, Tensor]:
        logits = model(points.view(-1, *x.shape[1:]))
        if first:
            labels(y, examples=len(y), classes=logits.shape[-1])
        wrong = logits.argmax(1) != y  # before the loss, which might write into the logits
        return loss_of(logits, y), wrong

    def noise(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cpu").to(x.device)

    # The model gets copies throughout: one that writes into its input must not reach the points of the search.
    result = flat(x).clone().view(len(x), grid.channels, grid.places)
    clean_loss, wrong = ask(result.clone(), y, first=True)
    # In training mode BatchNorm makes a row's logits depend on the others: then finished rows stay in the batch, unmoved.
    coupled = isinstance(model, nn.Module) and any(module.training for module in model.modules())
    rows = torch.arange(len(x), device=x.device) if coupled else (~wrong).nonzero().squeeze(1)
    wrong, y, clean_loss = wrong[rows], y[rows], clean_loss[rows]
    if wrong.all():  # also where no row is left
        return result.view(x.shape)
    proposals = PROPOSALS[attack.threat_model.norm](attack.threat_model, result[rows], grid)
    if start is None:
        points = proposals.start(noise(len(x), proposals.numbers_to_start)[rows])
    else:
        points = flat(start).clone().view_as(result)[rows]
    points = torch.where(wrong[:, None, None], result[rows], points)
    loss, finished = ask(points.clone(), y)
    finished |= wrong

    check_every = 1 if x.device.type == "cpu" else 8  # elsewhere a look at `finished` waits for the device
    numbers, planned = points, 0
    for proposal in range(1, attack.queries):
        position = (proposal - 1) % BLOCK
        stale = position == 0 or proposal - 1 in HALVED_AFTER
        if (proposal - 1) % check_every == 0:
            count = int(finished.sum())
            if count == len(rows):
                break
            if count and not coupled and count >= FINISHED_SHARE * len(rows):
                result[rows[finished]] = points[finished]
                left = (~finished).nonzero().squeeze(1)
                rows, y, clean_loss, loss, points, finished = (t[left] for t in (rows, y, clean_loss, loss, points, finished))
                proposals.keep(left)
                stale = True
        if position == 0:  # noise for every row, finished or not: an example's search is its own
            numbers = noise(BLOCK, len(x), proposals.numbers)
        if stale:
            proposals.plan(numbers[position:, rows], points, _fraction(attack.initial_fraction, proposal))
            planned = position
        new_loss, wrong = ask(proposals.propose(points, position - planned), y)
        accepted = ((new_loss > loss) | wrong) & ~finished
        proposals.accept(points, accepted)
        loss = torch.where(accepted, new_loss, loss)
        finished |= wrong
    better = finished | (loss > clean_loss)
    result[rows[better]] = points[better]
    return result.view(x.shape)


def _fraction(initial_fraction: float, proposal: int) -> float:
    """Share of the coordinates of a channel in the window of a proposal, counted from 1."""
    return initial_fraction / 2 ** bisect_left(HALVED_AFTER, proposal)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """How the coordinates of an example lie: ``channels`` and the ``sides`` of each, in row-major order."""

    channels: int
    sides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "_Grid":
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

    def __init__(self, threat_model: ThreatModel, x: Tensor, grid: _Grid) -> None:
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

    def __init__(self, threat_model: ThreatModel, x: Tensor, grid: _Grid) -> None:
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

"""Which points of different classes lie within a radius of each other: an exact list, found without comparing all coordinates."""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import message
from metarobust.bounds._points import Points

MOST_PAIRS = 50_000_000
ROWS, COLUMNS = 4096, 8192
SAMPLE = 1024
LONG = 4096
EXACT_COST = 5.0  # comparing two whole points, over one multiply-add of the filter per dimension of a point


class Pairs(NamedTuple):
    """Pairs of points with different labels, ``first < second``, sorted; ``distance`` in input units, float64.

    ``error`` bounds the error of a squared distance; distances near a threshold that was named have none.
    """

    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray
    error: float

    def within(self, radius: float) -> "Pairs":
        """The pairs at most ``radius`` apart."""
        near = self.distance <= radius
        return Pairs(self.first[near], self.second[near], self.distance[near], self.error)

    def count_within(self, radius: float) -> int:
        """How many pairs are at most ``radius`` apart."""
        return int(np.count_nonzero(self.distance <= radius))

    def sorted(self) -> "Pairs":
        """By first point, then by second."""
        order = np.lexsort((self.second, self.first))
        return Pairs(self.first[order], self.second[order], self.distance[order], self.error)


class Filter(Protocol):
    """Tells cheaply which pairs may be close: of two blocks of points, candidates that hold every pair within the radius."""

    def candidates(self, rows: slice, columns: slice) -> Tensor:
        """Bool ``[rows, columns]``."""
        ...


def pairs_within(points: Points, norm: str, radius: float, thresholds: Sequence[float] = ()) -> Pairs:
    """All pairs of points of different classes at most ``radius`` apart (up to rounding), in input units.

    Blocks of two classes go through a filter that is one matrix product; whoever passes is compared in all coordinates. Memory
    grows with the number of pairs found. Distances near one of the ``thresholds`` are computed in double precision, so that
    ties are decided there alone.

    Raises:
        ValueError: more than 50 million pairs.
    """
    reach = radius * (1 + 4 * points.rounding) / points.unit
    passes: Filter = (_ProjectionFilter if norm == "l2" else _LevelFilter)(points, reach)
    measure = _Measure(points, norm, reach)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    total = 0
    for rows, columns in _blocks(points.y):
        near = passes.candidates(rows, columns).nonzero()
        square = measure.squares(rows, columns, near)
        close = (square <= reach**2 + measure.error).nonzero().squeeze(1)
        first, second = (near[close] + near.new_tensor([rows.start, columns.start])).to(torch.int32).cpu().unbind(1)
        found.append((first, second, square[close].double().cpu()))
        total += len(close)
        if total > MOST_PAIRS:
            remedy = "the bound is near its ceiling there: choose a smaller epsilon or fewer points"
            raise ValueError(message("epsilon", "small enough for 50 million conflicting pairs", f"{total} and more", remedy))
    first, second, square = (torch.cat(parts) for parts in zip(*found, strict=True)) if found else _nothing()
    exact = square.clamp(min=0).sqrt()
    for threshold in {radius / points.unit, *(threshold / points.unit for threshold in thresholds)}:
        rows = ((square - threshold**2).abs() <= measure.error).nonzero().squeeze(1)
        exact[rows] = distances(points.x, first[rows], second[rows], norm, precise=True).cpu()
    pairs = Pairs(first.numpy(), second.numpy(), exact.numpy() * points.unit, measure.error * points.unit**2)
    return pairs.within(radius * (1 + 2 * points.rounding)).sorted()


class _Measure:
    """Squared distances of the candidates of a block, off by at most ``error``, in units of ``x``.

    On a CPU the l2 ones come from one sampled matrix product, which reads each point from the cache instead of copying it per
    pair. Where rounding would then hide too much (points far from each other and from their mean, or reduced precision), and for
    l_inf, the pairs are gathered and subtracted.
    """

    def __init__(self, points: Points, norm: str, reach: float) -> None:
        self.x, self.norm, self.error = points.x, norm, 4e-5 * reach**2
        self.sampled = norm == "l2" and points.x.device.type == "cpu" and not _products_are_reduced()
        if self.sampled:
            self.centred = points.x - points.x.mean(0)
            self.square = self.centred.square().sum(1)
            error = 6 * (points.x.shape[1] + 8) * torch.finfo(points.x.dtype).eps / 2 * self.square.max().item()
            self.sampled = error <= 1e-2 * reach**2
            self.error = error if self.sampled else self.error

    def squares(self, rows: slice, columns: slice, near: Tensor) -> Tensor:
        if not self.sampled:
            return distances(self.x, near[:, 0] + rows.start, near[:, 1] + columns.start, self.norm).square()
        left, right = self.centred[rows], self.centred[columns]
        crow = torch.searchsorted(near[:, 0].contiguous(), torch.arange(len(left) + 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # says that sparse tensors are in beta
            pattern = torch.sparse_csr_tensor(crow, near[:, 1].contiguous(), left.new_zeros(len(near)), (len(left), len(right)))
            product = torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
        return product.mul_(-2).add_(self.square[rows][near[:, 0]]).add_(self.square[columns][near[:, 1]])


def distances(x: Tensor, first: Tensor, second: Tensor, norm: str, *, precise: bool = False) -> Tensor:
    """Distance of each pair in units of ``x``; ``precise`` in float64 (differences of 8-bit levels are then exact)."""
    first, second = first.to(x.device), second.to(x.device)
    dtype = torch.float64 if precise else x.dtype
    at_once = max(1, 2**18 // max(1, x.shape[1])) if x.device.type == "cpu" else max(1, 2**27 // max(1, x.shape[1]))
    order = 2.0 if norm == "l2" else float("inf")
    parts = []
    for i, j in zip(first.split(at_once), second.split(at_once), strict=True):
        difference = x.index_select(0, i).to(dtype).sub_(x.index_select(0, j).to(dtype))
        # A running sum of 100,000 equal squares in float32 is off by more than the band that is computed again: sum by parts.
        lengths = [torch.linalg.vector_norm(part, ord=order, dim=1) for part in difference.split(LONG, 1)]
        parts.append(lengths[0] if len(lengths) == 1 else torch.linalg.vector_norm(torch.stack(lengths), ord=order, dim=0))
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=dtype)


def _nothing() -> tuple[Tensor, Tensor, Tensor]:
    none = torch.zeros(0, dtype=torch.int32)
    return none, none, torch.zeros(0, dtype=torch.float64)


def _blocks(y: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Blocks that hold every pair of different labels once; rows of one block share their label (``y`` is sorted)."""
    ends = np.flatnonzero(np.diff(y)) + 1
    for begin, end in zip([0, *ends], ends, strict=False):
        for row in range(int(begin), int(end), ROWS):
            for column in range(int(end), len(y), COLUMNS):
                yield slice(row, min(row + ROWS, int(end))), slice(column, min(column + COLUMNS, len(y)))


class _ProjectionFilter:
    r"""l2: an orthonormal projection ``P`` and the length of what it leaves out never lengthen a distance,

    .. math:: \|x - x'\|^2 \ge \|P x - P x'\|^2 + (\|x - P^\top P x\| - \|x' - P^\top P x'\|)^2,

    and with the leading principal directions they hardly shorten it. The right side is one matrix product over a few columns.
    """

    def __init__(self, points: Points, reach: float) -> None:
        x = points.x - points.x.mean(0)
        directions = _principal_directions(x)
        sample = torch.from_numpy(np.random.default_rng(0).permutation(len(x))[:SAMPLE]).to(x.device)
        different = torch.from_numpy(points.y)[sample.cpu()].to(x.device)
        different = different[:, None] != different
        best, cost = x, float("inf")
        for count in (0, 8, 16, 32, 64, 128, 256, 512):
            if count >= min(x.shape[1], directions.shape[1] + 1):
                break
            seen = _seen(x[sample], directions[:, :count])
            passing = ((torch.cdist(seen, seen) <= reach) & different).double().mean().item()
            if count + EXACT_COST * x.shape[1] * passing < cost:
                best, cost = count, count + EXACT_COST * x.shape[1] * passing
        z = _seen(x, directions[:, :best]) if isinstance(best, int) and best + 1 < x.shape[1] else x
        square = z.square().sum(1, keepdim=True)
        one = torch.ones_like(square)
        self.left, self.right = torch.cat([z.mul(-2), square, one], 1), torch.cat([z, one, square], 1)
        # The rounding of a dot product of m terms is at most m u times the product of the lengths, u the unit roundoff: here
        # 4 + 2 squared lengths, for the product and for the squares in it; the projection's own rounding is smaller. TF32 and
        # bfloat16 products, where the user has allowed them, have a larger u. A length left out is the root of a difference of
        # squares, so what these lose in float64 counts by its root.
        unit = torch.finfo(x.dtype).eps / 2
        if x.dtype == torch.float32 and _products_are_reduced():
            unit = 2.0**-8
        longest = square.max().item()
        lost = (4 * (x.shape[1] + 8) * torch.finfo(torch.float64).eps * longest) ** 0.5
        self.limit = (reach + lost) ** 2 + 6 * (self.left.shape[1] + 8) * unit * longest
        self.buffer = x.new_empty(ROWS * COLUMNS)

    def candidates(self, rows: slice, columns: slice) -> Tensor:
        left, right = self.left[rows], self.right[columns]
        product = self.buffer[: len(left) * len(right)].view(len(left), len(right))
        return torch.mm(left, right.T, out=product) <= self.limit


def _products_are_reduced() -> bool:
    """Whether the user allows float32 matrix products in TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through `fp32_precision` of a backend, after which this question is no longer answered
        return True


def _principal_directions(x: Tensor) -> Tensor:
    """Orthonormal ``[dimensions, count]``, float64: leading principal directions of at most 8,192 centred points."""
    step = -(-len(x) // 8192)
    some = x[::step].double()
    if x.shape[1] <= 1024:
        return torch.linalg.eigh(some.T @ some).eigenvectors.flip(1)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        found = torch.svd_lowrank(some, q=min(256, *some.shape), niter=2)[2]
    return torch.linalg.qr(found).Q


def _seen(x: Tensor, directions: Tensor) -> Tensor:
    """``(P x, |x - P^T P x|)`` in the precision of ``x``, computed in float64 by parts."""
    parts = []
    for part in x.split(8192):
        exact = part.double()
        inside = exact @ directions
        rest = (exact.square().sum(1) - inside.square().sum(1)).clamp(min=0).sqrt()
        parts.append(torch.cat([inside, rest[:, None]], 1).to(x.dtype))
    return torch.cat(parts)


class _LevelFilter:
    r"""l_inf: in coordinate ``c`` with level :math:`a_c`, a point with :math:`x_c \le a_c` and one with
    :math:`x'_c > a_c + r` are further apart than r. The number of such coordinates is one product of 0/1 matrices."""

    def __init__(self, points: Points, reach: float) -> None:
        x = points.x
        wide = reach * (1 + 4 * points.rounding)
        sample = torch.from_numpy(np.random.default_rng(0).permutation(len(x))[:SAMPLE]).to(x.device)
        some, y = x[sample], torch.from_numpy(points.y).to(x.device)[sample]
        level, share = _best_levels(some, wide)
        order = share.argsort(descending=True)
        order = order[share[order] > 0]
        best, cost = len(order), float("inf")
        counts = {min(count, len(order)) for count in (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)}
        for count in sorted(counts):
            left, right = _low_and_high(some, level, order[:count], wide)
            passing = (((left @ right.T) == 0) & (y[:, None] != y)).double().mean().item()
            if 2 * count + EXACT_COST * x.shape[1] * passing < cost:
                best, cost = count, 2 * count + EXACT_COST * x.shape[1] * passing
        self.left, self.right = _low_and_high(x, level, order[:best], wide)
        self.buffer = x.new_empty(ROWS * COLUMNS, dtype=torch.float32)

    def candidates(self, rows: slice, columns: slice) -> Tensor:
        left, right = self.left[rows], self.right[columns]
        product = self.buffer[: len(left) * len(right)].view(len(left), len(right))
        return torch.mm(left, right.T, out=product) < 0.5


def _best_levels(some: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Per coordinate the level that separates most pairs of the sample, and the share of pairs that it separates."""
    ascending = some.sort(0).values
    level, most = ascending[0].clone(), some.new_zeros(some.shape[1])
    below = torch.linspace(0, len(some) - 1, 17, device=some.device).long()[:-1]
    for row in below.tolist():
        candidate = ascending[row]
        share = (some <= candidate).to(some.dtype).mean(0) * (some > candidate + reach).to(some.dtype).mean(0)
        better = share > most
        level, most = torch.where(better, candidate, level), torch.where(better, share, most)
    return level, most


def _low_and_high(x: Tensor, level: Tensor, coordinates: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    some, level = x[:, coordinates], level[coordinates]
    low, high = (some <= level).float(), (some > level + reach).float()
    return torch.cat([low, high], 1), torch.cat([high, low], 1)

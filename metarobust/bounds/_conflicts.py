"""The conflict graph at one epsilon, and the sets of points in it that a potential promises too much."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from metarobust.bounds._enclosing import feasible
from metarobust.bounds._pairs import Pairs, distances
from metarobust.bounds._points import Points

AT_ONCE = 2**21
VIOLATION = 1e-9


class Overfull(NamedTuple):
    """Feasible sets of at least three points whose potentials sum to more than 1.

    Attributes:
        sets: one array ``[sets, size]`` per size, the largest potential first.
        excess: per size, ``[sets]``, sum of the potentials minus 1.
        complete: whether the search has seen every such set.
    """

    sets: list[np.ndarray]
    excess: list[np.ndarray]
    complete: bool

    def __len__(self) -> int:
        return sum(len(some) for some in self.sets)


@dataclass(frozen=True, kw_only=True)
class ConflictGraph:
    """Points and the pairs whose balls meet. A set of points is feasible if all balls round its points share a point."""

    points: Points
    pairs: Pairs
    norm: str
    epsilon: float
    closed: bool

    @property
    def radius(self) -> float:
        """Largest radius of an enclosing ball that counts as within epsilon, in input units."""
        return self.epsilon * (1 + self.points.rounding if self.closed else 1 - self.points.rounding)

    def overfull(self, potential: np.ndarray, largest: int, most: int) -> Overfull:
        r"""Every feasible set S of 3 to ``largest`` points with :math:`\sum_{i \in S} q_i > 1`, of at most ``most`` candidates.
        Points of potential 0 are left out of the sets.

        Sets grow by falling potential. A set with sum over 1 that has at most ``largest`` points in the end satisfies, at every
        prefix of m points with last potential q, ``sum + (largest - m) q > 1``: nothing else needs to be looked at. Prefixes of
        feasible sets are feasible, so infeasible ones are dropped at once.
        """
        grower = _Grower(self, potential, largest)
        prefixes, complete = grower.pairs(), True
        found: list[np.ndarray] = []
        for size in range(3, largest + 1):
            grown: list[np.ndarray] = []
            for part, count in _parts(prefixes, grower.extensions(prefixes)):
                most -= int(count.sum())
                if most < 0:
                    complete = False
                    break
                grown.append(grower.grow(part, count))
            prefixes = np.concatenate(grown) if grown else np.zeros((0, size), dtype=np.int64)
            found.append(prefixes[grower.q[prefixes].sum(1) > 1 + VIOLATION])
            if not complete or len(prefixes) == 0:
                break
        excess = [grower.q[sets].sum(1) - 1 for sets in found]
        return Overfull([grower.order[sets] for sets in found], excess, complete)

    def squares(self, sets: np.ndarray, *, precise: bool = False) -> np.ndarray:
        """Squared distances ``[sets, size, size]`` in input units, float64, from the coordinates."""
        size = sets.shape[1]
        square = np.zeros((len(sets), size, size))
        for a in range(size):
            for b in range(a):
                ends = torch.from_numpy(sets[:, a]), torch.from_numpy(sets[:, b])
                found = distances(self.points.x, *ends, self.norm, precise=precise).double().cpu().numpy()
                square[:, a, b] = square[:, b, a] = (found * self.points.unit) ** 2
        return square

    def fits(self, sets: np.ndarray, square: np.ndarray) -> np.ndarray:
        """Whether each clique ``[sets, size]`` is feasible, from the squared distances of its pairs.

        Near the radius these are computed again, in float64.
        """
        if self.norm == "linf" or len(sets) == 0:
            return np.ones(len(sets), dtype=bool)  # boxes that meet pairwise share a point
        # A squared radius is a sum of squared distances with weights of at most 1/2 in all: it errs by no more than they do.
        error = self.pairs.error + 1e-9 * self.radius**2
        inside = feasible(square, max(self.radius**2 - error, 0.0) ** 0.5) & (error < self.radius**2)
        near = np.flatnonzero(feasible(square, (self.radius**2 + error) ** 0.5) & ~inside)
        inside[near] = feasible(self.squares(sets[near], precise=True), self.radius)
        return inside


class _Grower:
    """Sets as rows of ranks: rank 0 has the largest potential. ``q`` falls with the rank, ``order`` leads back to points."""

    def __init__(self, graph: ConflictGraph, potential: np.ndarray, largest: int) -> None:
        self.graph, self.largest = graph, largest
        self.order = np.argsort(-potential, kind="stable")
        rank = np.empty_like(self.order)
        rank[self.order] = np.arange(len(rank))
        self.q = potential[self.order]
        ends = np.stack([rank[graph.pairs.first], rank[graph.pairs.second]])
        self.low, self.high = ends.min(0), ends.max(0)
        # Only the two largest of a set must nearly fill it: between later members pairs of small potentials count as well.
        useful = np.flatnonzero(self.q[self.high] > 0)
        by_rank = useful[np.lexsort((self.high[useful], self.low[useful]))]
        self.low, self.high, self.distance = self.low[by_rank], self.high[by_rank], graph.pairs.distance[by_rank]
        self.begin = np.searchsorted(self.low, np.arange(len(rank) + 1))
        self.key = self.low.astype(np.int64) * len(rank) + self.high
        # Within the neighbours of one rank q falls, so those of sufficient potential come first: found by one search.
        self.falling = 2.0 * self.low + (1 - self.q[self.high])

    def pairs(self) -> np.ndarray:
        sets = np.stack([self.low, self.high], 1)
        total = self.q[sets].sum(1) + (self.largest - 2) * self.q[self.high]
        return sets[total > 1 + VIOLATION]

    def extensions(self, prefixes: np.ndarray) -> np.ndarray:
        """Per prefix the number of neighbours of its last member whose potential suffices."""
        last = prefixes[:, -1]
        need = (1 + VIOLATION - self.q[prefixes].sum(1)) / (self.largest - prefixes.shape[1])
        end = np.searchsorted(self.falling, 2.0 * last + (1 - np.maximum(need, 0)), side="left")
        return np.maximum(np.minimum(end, self.begin[last + 1]) - self.begin[last], 0)

    def grow(self, prefixes: np.ndarray, count: np.ndarray) -> np.ndarray:
        """All feasible prefixes with one more member, of the ``count`` first neighbours of each last member."""
        row = np.repeat(np.arange(len(prefixes)), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        added = self.high[self.begin[prefixes[row, -1]] + within]
        grown = np.concatenate([prefixes[row], added[:, None]], 1)
        for member in range(prefixes.shape[1] - 1):
            grown = grown[self._places(grown[:, member], grown[:, -1]) >= 0]
        return grown[self._fits(grown)]

    def _places(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Where the pairs stand in the list; -1 for those that are none."""
        key = low * len(self.q) + high
        place = np.searchsorted(self.key, key)
        place[place == len(self.key)] = 0
        return np.where(self.key[place] == key, place, -1) if len(self.key) else np.full(len(key), -1)

    def _fits(self, grown: np.ndarray) -> np.ndarray:
        if self.graph.norm == "linf":
            return np.ones(len(grown), dtype=bool)
        size = grown.shape[1]
        square = np.zeros((len(grown), size, size))
        for b in range(size):
            for a in range(b):
                square[:, a, b] = square[:, b, a] = self.distance[self._places(grown[:, a], grown[:, b])] ** 2
        return self.graph.fits(self.order[grown], square)


def _parts(prefixes: np.ndarray, extensions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The prefixes, and how many candidates each grows to, in parts of about two million candidates."""
    ends = np.flatnonzero(np.diff(np.cumsum(extensions) // AT_ONCE)) + 1
    return zip(np.split(prefixes, ends), np.split(extensions, ends), strict=True)


def conflicts(points: Points, pairs: Pairs, norm: str, epsilon: float, *, closed: bool) -> ConflictGraph:
    """The graph at one epsilon, from pairs that may be found for a larger one."""
    # A ball of radius 0 is its centre, which belongs to it however the ball is meant.
    graph = ConflictGraph(points=points, pairs=pairs, norm=norm, epsilon=epsilon, closed=closed or epsilon == 0)
    return replace(graph, pairs=pairs.within(2 * graph.radius))

"""Orders 3 and more: the packing linear program, in which only constraints that were broken ever appear."""

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from metarobust.bounds._conflicts import VIOLATION, ConflictGraph, Overfull
from metarobust.bounds._flow import PairBound

MOST_ROWS = 20_000


class Packing:
    r"""Maximise :math:`\sum_i w_i q_i` with :math:`0 \le q \le 1` and :math:`\sum_{i \in S} q_i \le 1` for the feasible sets S.

    It begins at the order-2 optimum. Connected components without a broken constraint keep their solution; in the others a
    linear program (HiGHS) holds the pairs that carry mass and the constraints that were broken so far, and is solved until none
    is broken.

    Attributes:
        potential: ``[points]``, the solution so far.
        sets: one array ``[sets, size]`` per group of constraints.
        mass: per group, ``[sets]``, their multipliers: the adversary's masses, up to rounding.
        rounds: linear programs solved.
    """

    def __init__(self, graph: ConflictGraph, start: PairBound) -> None:
        self.graph, self.weight = graph, graph.points.weight
        ends = graph.pairs.first, graph.pairs.second
        n = len(self.weight)
        adjacency = csr_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(n, n))
        self.component = connected_components(adjacency, directed=False)[1]
        self.potential = start.potential.copy()
        carrying = start.mass > 0
        pairs = np.stack(ends, 1)[carrying]
        self.sets: list[np.ndarray] = [pairs]
        self.mass: list[np.ndarray] = [start.mass[carrying]]
        self.rounds = 0

    def reach(self, order: int, most: int) -> bool:
        """Satisfy every set of at most ``order`` points; False where a search stopped after ``most`` candidates."""
        active = np.zeros(len(self.weight), dtype=bool)
        while True:
            broken = self.graph.overfull(self.potential, order, most)
            rows = _worst(broken) + self._broken_pairs()
            if not any(len(some) for some in rows):
                return broken.complete
            for some in rows:
                active |= np.isin(self.component, self.component[np.unique(some)])
            self.sets += rows
            self.mass += [np.zeros(len(some)) for some in rows]
            self._solve(active)
            if not broken.complete:
                return False

    def _broken_pairs(self) -> list[np.ndarray]:
        first, second = self.graph.pairs.first, self.graph.pairs.second
        excess = self.potential[first] + self.potential[second] - 1
        broken = np.flatnonzero(excess > VIOLATION)
        broken = broken[np.argsort(-excess[broken], kind="stable")[:MOST_ROWS]]
        return [np.stack([first[broken], second[broken]], 1)]

    def _solve(self, active: np.ndarray) -> None:
        """The linear program on the active components; multipliers of constraints outside stay."""
        variable = np.cumsum(active) - 1
        inside = [active[sets[:, 0]] for sets in self.sets]
        rows = [variable[sets[where]] for sets, where in zip(self.sets, inside, strict=True)]
        lengths = np.concatenate([np.full(len(some), some.shape[1]) for some in rows])
        indices = np.concatenate([some.ravel() for some in rows])
        matrix = csr_array(
            (np.ones(len(indices)), indices, np.concatenate([[0], np.cumsum(lengths)])), shape=(len(lengths), active.sum())
        )
        weight = self.weight[active]
        scale = 1 / weight.mean()
        options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
        found = linprog(-scale * weight, A_ub=matrix, b_ub=np.ones(len(lengths)), bounds=(0, 1), method="highs", options=options)
        if not found.success:
            raise RuntimeError(f"the linear program of the bound failed: {found.message}")
        self.rounds += 1
        self.potential[active] = found.x
        multiplier = np.maximum(-found.ineqlin.marginals, 0) / scale
        for mass, where in zip(self.mass, inside, strict=True):
            mass[where], multiplier = multiplier[: where.sum()], multiplier[where.sum() :]


def _worst(broken: Overfull) -> list[np.ndarray]:
    """Per size the sets whose constraint is broken most."""
    by_excess = (np.argsort(-excess, kind="stable")[:MOST_ROWS] for excess in broken.excess)
    return [sets[some] for sets, some in zip(broken.sets, by_excess, strict=True)]

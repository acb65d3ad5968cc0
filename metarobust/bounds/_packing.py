"""Orders 3 and more: the packing linear program, in which only constraints that were broken ever appear."""

import highspy
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from metarobust.bounds._conflicts import VIOLATION, ConflictGraph, Overfull
from metarobust.bounds._flow import PairBound

MOST_ROWS = 20_000
TOLERANCE = 1e-10


class Packing:
    r"""Maximise :math:`\sum_i w_i q_i` with :math:`0 \le q \le 1` and :math:`\sum_{i \in S} q_i \le 1` for the feasible sets S.

    It begins at the order-2 optimum. Connected components without a broken constraint keep their solution; in the others a
    linear program holds the pairs that carry mass and the constraints that were broken so far, until none is broken. Each round
    adds rows, and HiGHS goes on from the last basis by dual simplex.

    Attributes:
        potential: ``[points]``, the solution so far.
        rounds: linear programs solved.
    """

    def __init__(self, graph: ConflictGraph, start: PairBound) -> None:
        self.graph, self.weight = graph, graph.points.weight
        ends = graph.pairs.first, graph.pairs.second
        n = len(self.weight)
        adjacency = csr_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(n, n))
        self.component = connected_components(adjacency, directed=False)[1]
        self.potential, self.rounds = start.potential.copy(), 0
        carrying = start.mass > 0
        self._kept = np.stack(ends, 1)[carrying], start.mass[carrying]  # of the components outside the program
        self._rows: list[np.ndarray] = []
        self._known: set[bytes] = set()
        self._variable = np.full(n, -1)
        self._program: highspy.Highs | None = None
        self._scale = 1 / self.weight.mean()

    def reach(self, order: int, most: int) -> bool:
        """Satisfy every set of at most ``order`` points; False where a search stopped after ``most`` candidates."""
        while True:
            # Pairs first: they are found at once, and where many are broken, so are more triples than anyone wants to list.
            while len(pairs := self._fresh(self._broken_pairs())):
                self._solve([pairs])
            broken = self.graph.overfull(self.potential, order, most)
            rows = [some for some in map(self._fresh, _worst(broken)) if len(some)]
            if rows:
                self._solve(rows)
            if not rows or not broken.complete:
                return broken.complete

    def masses(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Constraints, one array ``[sets, size]`` per group, and their multipliers: the adversary's masses, up to rounding."""
        sets, mass = [self._kept[0], *self._rows], [self._kept[1]]
        if self._program is not None:
            # Minimising the negative makes the multipliers of upper bounds negative.
            multiplier = np.maximum(-np.array(self._program.getSolution().row_dual), 0) / self._scale
            mass += np.split(multiplier, np.cumsum([len(some) for some in self._rows])[:-1])
        return sets, mass

    def _fresh(self, sets: np.ndarray) -> np.ndarray:
        """The sets without those that are rows already: the solver may leave one broken by its tolerance, again and again."""
        keys = [members.tobytes() for members in np.sort(sets, 1)]
        fresh = np.array([key not in self._known for key in keys], dtype=bool)
        self._known.update(keys)
        return sets[fresh]

    def _broken_pairs(self) -> np.ndarray:
        first, second = self.graph.pairs.first, self.graph.pairs.second
        excess = self.potential[first] + self.potential[second] - 1
        broken = np.flatnonzero(excess > VIOLATION)
        broken = broken[np.argsort(-excess[broken], kind="stable")[:MOST_ROWS]]
        return np.stack([first[broken], second[broken]], 1)

    def _solve(self, rows: list[np.ndarray]) -> None:
        """Add the rows, with the components that they reach for the first time, and solve on."""
        program = self._program = self._program or _quiet_solver()
        reached = np.isin(self.component, self.component[np.unique(np.concatenate([some.ravel() for some in rows]))])
        added = np.flatnonzero(reached & (self._variable < 0))
        self._variable[added] = (self._variable >= 0).sum() + np.arange(len(added))
        cost = -self._scale * self.weight[added]
        none = np.zeros(0)
        program.addCols(
            len(added),
            cost,
            np.zeros(len(added)),
            np.ones(len(added)),
            0,
            np.zeros(len(added), np.int32),
            none.astype(np.int32),
            none,
        )
        pairs, mass = self._kept
        inside = self._variable[pairs[:, 0]] >= 0 if len(pairs) else np.zeros(0, dtype=bool)
        self._kept = pairs[~inside], mass[~inside]
        for some in (pairs[inside], *rows):
            count, size = some.shape
            if count:
                starts = np.arange(0, count * size, size, dtype=np.int32)
                columns = self._variable[some].astype(np.int32).ravel()
                free = np.full(count, -highspy.kHighsInf)
                program.addRows(count, free, np.ones(count), count * size, starts, columns, np.ones(count * size))
                self._rows.append(some)
        program.run()
        status = program.getModelStatus()
        if status != highspy.HighsModelStatus.kOptimal:
            raise RuntimeError(f"the linear program of the bound ended without an optimum: {status}")
        self.rounds += 1
        inside = self._variable >= 0
        self.potential[inside] = np.clip(np.array(program.getSolution().col_value)[self._variable[inside]], 0, 1)


def _quiet_solver() -> highspy.Highs:
    solver = highspy.Highs()
    for name, value in {
        "output_flag": False,
        "primal_feasibility_tolerance": TOLERANCE,
        "dual_feasibility_tolerance": TOLERANCE,
    }.items():
        solver.setOptionValue(name, value)
    return solver


def _worst(broken: Overfull) -> list[np.ndarray]:
    """Per size the sets whose constraint is broken most."""
    by_excess = (np.argsort(-excess, kind="stable")[:MOST_ROWS] for excess in broken.excess)
    return [sets[some] for sets, some in zip(broken.sets, by_excess, strict=True)]

"""Solving one conflict graph up to the order asked for."""

from typing import NamedTuple

import numpy as np

from metarobust.bounds._conflicts import ConflictGraph
from metarobust.bounds._flow import pair_bound
from metarobust.bounds._packing import Packing


class Solution(NamedTuple):
    """A primal and a dual solution; neither needs to be exact, the bracket is computed from what they prove.

    Attributes:
        order: sets of at most this many points are all accounted for.
        potential: ``[points]``, in [0, 1].
        sets: one array ``[sets, size]`` of points per group of constraints.
        mass: per group, ``[sets]``, multipliers.
        earlier: ``[points]``, potentials of order 2, which may guarantee more than those of a climb that was cut short.
    """

    order: int
    potential: np.ndarray
    sets: list[np.ndarray]
    mass: list[np.ndarray]
    earlier: np.ndarray | None = None


def classes(graph: ConflictGraph) -> int:
    """Number of classes that have a point: no set is larger."""
    return len(np.unique(graph.points.y))


def solve(graph: ConflictGraph, order: int | str, most_sets: int) -> Solution:
    """Order 2 by maximum flow, then, as far as asked, larger sets by linear programs."""
    points, pairs = graph.points, graph.pairs
    by_pairs = pair_bound(pairs.first, pairs.second, points.weight, points.copies)
    packing = Packing(graph, by_pairs)
    largest, reached = classes(graph), 2
    for size in range(3, (largest if order == "auto" else min(int(order), largest)) + 1):
        if order == "auto":
            # Larger sets may be broken although those of one point more are not: potentials of 1/4 satisfy every set of four
            # points, but not five. So the certificate looks at all sizes.
            overfull = graph.overfull(packing.potential, largest, most_sets)
            if overfull.complete and len(overfull) == 0:
                break
        elif size < int(order) and size < largest:
            continue  # a search up to the order finds the smaller sets too
        if not packing.reach(size, most_sets):
            break
        reached = size
    return Solution(reached, packing.potential, *packing.masses(), by_pairs.potential if packing.rounds else None)

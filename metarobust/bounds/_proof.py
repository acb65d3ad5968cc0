"""What is proved at one radius: a plan that forces a risk on every classifier, and a classifier that has hardly more."""

import time
import warnings
from typing import NamedTuple

import numpy as np

from metarobust.bounds._conflicts import VIOLATION, ConflictGraph
from metarobust.bounds._plan import Plan, repaired
from metarobust.bounds._sinkhorn import solve_by_sinkhorn
from metarobust.bounds._solution import classes, solve

EXACT = 1e-7


class Proof(NamedTuple):
    """The two witnesses of one radius, and the risks that they prove.

    Attributes:
        lower: risk that ``plan`` forces on every classifier.
        upper: risk of the classifier with ``guarantee``.
        order: sets of at most this many points are all accounted for.
        sets: for 3 and more points, how many sets of that size were constraints.
        potential: ``[points]``, the dual optimum.
        guarantee: ``[points]``, probability of the right answer.
        plan: sets of points that meet, with masses.
        seconds: wall time of solution and witnesses.
        warnings: what the solver had to say.
    """

    lower: float
    upper: float
    order: int
    sets: dict[int, int]
    potential: np.ndarray
    guarantee: np.ndarray
    plan: Plan
    seconds: dict[str, float]
    warnings: list[str]


def prove(graph: ConflictGraph, method: str, order: int | str, most_sets: int) -> Proof:
    """Solve up to the order, and turn the solution into witnesses."""
    points, begin = graph.points, time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        solution = (solve if method == "exact" else solve_by_sinkhorn)(graph, order, most_sets)
    told = [str(each.message) for each in said if each.category is UserWarning]
    for each in said:
        if each.category is not UserWarning:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    solved = time.perf_counter()
    plan = repaired(solution.sets, solution.mass, points.weight)
    guarantee = _guarantee(graph, solution.potential, most_sets)
    if solution.earlier is not None and plan.risk < float(points.weight @ (1 - guarantee)) - EXACT:
        guarantee = max(guarantee, _guarantee(graph, solution.earlier, most_sets), key=points.weight.__matmul__)
    upper = float(points.weight @ (1 - guarantee))
    sizes = [(some.shape[1], len(some)) for some in solution.sets if some.shape[1] > 2]
    return Proof(
        lower=min(plan.risk, upper),
        upper=upper,
        order=solution.order,
        sets={size: sum(count for of, count in sizes if of == size) for size, _ in sorted(sizes)},
        potential=solution.potential,
        guarantee=guarantee,
        plan=plan,
        seconds={"solution": solved - begin, "witnesses": time.perf_counter() - solved},
        warnings=told,
    )


def _guarantee(graph: ConflictGraph, potential: np.ndarray, most_sets: int) -> np.ndarray:
    """Potentials lowered until no feasible set sums to more than 1, or those of a constant answer where these are better."""
    points = graph.points
    overfull = graph.overfull(potential, classes(graph), most_sets)
    if overfull.complete:
        first, second = graph.pairs.first, graph.pairs.second
        largest = np.ones(len(potential))
        for end in (first, second):  # a linear program that was cut short, or Sinkhorn, may break pairs too
            np.maximum.at(largest, end, potential[first] + potential[second])
        for sets, excess in zip(overfull.sets, overfull.excess, strict=True):
            np.maximum.at(largest, sets, 1 + excess[:, None])
    else:
        largest = np.maximum(_sum_over_classes(graph, potential), 1)
    lowered = potential / largest
    if (2 * potential % 1).any():  # rounded values: constraints hold up to the tolerance of the search only
        lowered /= 1 + VIOLATION
    of_class = np.bincount(points.y, points.weight)
    if of_class.max() > points.weight @ lowered:
        lowered = (points.y == of_class.argmax()).astype(np.float64)
    return lowered


def _sum_over_classes(graph: ConflictGraph, potential: np.ndarray) -> np.ndarray:
    """Each point's potential and the largest among its neighbours of each class: no set round it can sum to more."""
    y = graph.points.y.astype(np.int64)
    first, second = graph.pairs.first, graph.pairs.second
    end, other = np.concatenate([first, second]).astype(np.int64), np.concatenate([second, first])
    key, place = np.unique(end * (y.max() + 1) + y[other], return_inverse=True)
    highest = np.zeros(len(key))
    np.maximum.at(highest, place, potential[other])
    return potential + np.bincount(key // (y.max() + 1), highest, len(y))

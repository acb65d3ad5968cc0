"""The bracket on the optimal adversarial risk: what any classifier must suffer on the given points."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from metarobust._checks import choice, finite, integer, message, require
from metarobust.bounds._conflicts import VIOLATION, ConflictGraph, conflicts
from metarobust.bounds._pairs import pairs_within
from metarobust.bounds._plan import repaired
from metarobust.bounds._points import as_points
from metarobust.bounds._result import RiskBound, per_example
from metarobust.bounds._sinkhorn import solve_by_sinkhorn
from metarobust.bounds._solution import Solution, classes, solve
from metarobust.threat_models import ThreatModel

EXACT = 1e-7
MOST_SETS = 5_000_000


def adversarial_risk_bound(
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    order: int | str = "auto",
    method: str = "exact",
    weights: Tensor | None = None,
    closed: bool = True,
    most_sets: int = MOST_SETS,
) -> RiskBound:
    r"""Bracket the smallest adversarial risk that any classifier can have on these points.

    For points :math:`x_i` with labels :math:`y_i` and weights :math:`w_i` of sum 1, over all probabilistic classifiers f,

    .. math:: R^* = \min_f \sum_i w_i \sup_{\|x' - x_i\| \le \epsilon} (1 - f_{y_i}(x')).

    By duality (Garcia Trillos, Jacobs, Kim, 2023) :math:`1 - R^* = \max \sum_i w_i q_i` over :math:`0 \le q \le 1` with
    :math:`\sum_{i \in S} q_i \le 1` for every set S of points of different classes whose balls share a point. Keeping only sets
    of at most L points gives a lower bound that grows with L (Garcia Trillos et al., 2024, arXiv 2401.09191, section 3).

    The lower end is the risk that the returned `RiskBound.attack` forces on every classifier, the upper end the risk of the
    returned `RiskBound.classifier`: neither trusts a solver. **The bound is for these points with these weights (the empirical
    distribution), not for the population that they were drawn from:** a classifier that knows them may do as well on them, and
    on others worse.

    Args:
        x: points in input units, ``[examples, ...]``, finite. They need not lie in the box of ``threat_model``; where they do,
            the box changes nothing, because every optimal move stays in the convex hull of the points.
        y: labels from 0, int64 ``[examples]``.
        threat_model: ``"l2"`` or ``"linf"`` and epsilon in input units.
        order: the largest sets that count: 2 (by maximum flow), 3 or more (by linear programming), or ``"auto"``, which climbs
            until the bracket closes, no set is left or ``most_sets`` is spent.
        method: ``"exact"``, or ``"sinkhorn"`` for the paper's entropic algorithm (see `sinkhorn_risk` for its settings).
        weights: of the examples, at least 0, float ``[examples]``; normalised to sum 1. Default: all equal.
        closed: balls contain their boundary, so that two points exactly ``2 * epsilon`` apart conflict (8-bit images have such
            ties; for them distances are compared as integers). False leaves out every pair within rounding of ``2 * epsilon``:
            a relative 1e-9 for 8-bit images and float64 data, 1e-6 for other float32 data. That much longer than epsilon the
            moves of the attack may be, too.
        most_sets: candidate sets that one search for broken constraints may look at; beyond it the bracket may stay open.

    Raises:
        ValueError: another norm, wrong shapes, NaN, negative labels or weights, more than 50 million conflicting pairs.
        TypeError: x is not floating point or y not int64.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> bound = adversarial_risk_bound(x, torch.tensor([0, 1]), ThreatModel(norm="l2", epsilon=0.5))
        >>> bound.lower, bound.upper, bound.exact
        (0.5, 0.5, True)
    """
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel", repr(threat_model)))
    bounds = _bounds(
        x,
        y,
        threat_model.norm,
        [float(threat_model.epsilon)],
        order=order,
        method=method,
        weights=weights,
        closed=closed,
        most_sets=most_sets,
    )
    return bounds[0]


def risk_curve(
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    epsilons: Sequence[float],
    order: int | str = "auto",
    method: str = "exact",
    weights: Tensor | None = None,
    closed: bool = True,
    most_sets: int = MOST_SETS,
) -> list[RiskBound]:
    """`adversarial_risk_bound` at several radii, in the order given; close pairs are looked for once, at the largest.

    Args:
        x, y, order, method, weights, closed, most_sets: as for `adversarial_risk_bound`.
        norm: ``"l2"`` or ``"linf"``.
        epsilons: radii in input units, at least 0.

    Example:
        >>> x, y = torch.tensor([[0.0], [0.4], [1.0]]), torch.tensor([0, 1, 1])
        >>> [round(bound.lower, 4) for bound in risk_curve(x, y, norm="l2", epsilons=[0.1, 0.2, 0.5])]
        [0.0, 0.3333, 0.3333]
    """
    if isinstance(epsilons, (int, float, str)):
        raise TypeError(message("epsilons", "a list of radii", repr(epsilons), f"write epsilons=[{epsilons}]"))
    require(len(epsilons) > 0, "epsilons", "at least one radius", "none")
    for epsilon in epsilons:
        if isinstance(epsilon, str):
            raise TypeError(message("epsilons", "a list of radii", repr(epsilon), f"write {epsilon} as a number"))
    return _bounds(
        x, y, norm, [float(e) for e in epsilons], order=order, method=method, weights=weights, closed=closed, most_sets=most_sets
    )


def _bounds(
    x: Tensor,
    y: Tensor,
    norm: str,
    epsilons: list[float],
    *,
    order: int | str,
    method: str,
    weights: Tensor | None,
    closed: bool,
    most_sets: int,
) -> list[RiskBound]:
    remedy = "l1 balls have no such solver here" if norm == "l1" else ""
    require(norm in ("l2", "linf"), "norm", "'l2' or 'linf'", repr(norm), remedy)
    choice("method", method, ("exact", "sinkhorn"))
    if order != "auto":
        integer("order", order, least=2)
    integer("most_sets", most_sets, least=1)
    for epsilon in epsilons:
        finite("epsilon", epsilon, least=0)
    begin = time.perf_counter()
    points = as_points(x, y, weights)
    largest = max(epsilons)
    pairs = pairs_within(points, norm, 2 * largest, [2 * epsilon for epsilon in epsilons])
    seconds = {"pairs": time.perf_counter() - begin}
    found = []
    for epsilon in epsilons:
        graph = conflicts(points, pairs, norm, epsilon, closed=closed)
        some, every = (len(pairs.within(2 * replace(graph, closed=c).radius).first) for c in (False, True))
        ties = every - some
        begin = time.perf_counter()
        solution = (solve if method == "exact" else solve_by_sinkhorn)(graph, order, most_sets)
        seconds["solution"] = time.perf_counter() - begin
        found.append(_bound(graph, solution, method, most_sets, ties, seconds, x))
    return found


def _bound(
    graph: ConflictGraph, solution: Solution, method: str, most_sets: int, ties: int, seconds: dict[str, float], x: Tensor
) -> RiskBound:
    """The two witnesses of a solution, and the risks that they prove."""
    begin = time.perf_counter()
    points = graph.points
    plan = repaired(solution.sets, solution.mass, points.weight)
    guarantee = _guarantee(graph, solution.potential, most_sets)
    if solution.earlier is not None and plan.risk < float(points.weight @ (1 - guarantee)) - EXACT:
        guarantee = max(guarantee, _guarantee(graph, solution.earlier, most_sets), key=points.weight.__matmul__)
    upper = float(points.weight @ (1 - guarantee))
    lower = min(plan.risk, upper)
    sizes = [(some.shape[1], len(some)) for some in solution.sets if some.shape[1] > 2]
    return RiskBound(
        lower=lower,
        upper=upper,
        exact=upper - lower <= EXACT,
        order=solution.order,
        potentials=per_example(solution.potential, points.origin),
        guarantees=per_example(guarantee, points.origin),
        norm=graph.norm,
        epsilon=graph.epsilon,
        closed=graph.closed,
        method=method,
        examples=len(x),
        points=len(points.y),
        pairs=len(graph.pairs.first),
        sets={size: sum(count for of, count in sizes if of == size) for size, _ in sorted(sizes)},
        ties=ties,
        seconds=seconds | {"witnesses": time.perf_counter() - begin},
        _graph=graph,
        _guarantee=guarantee,
        _plan=plan,
        _shape=tuple(x.shape[1:]),
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

"""The bracket by the paper's entropic algorithm: Sinkhorn sweeps over all sets of points, and a rounding that keeps a bound."""

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import message
from metarobust.bounds._conflicts import ConflictGraph
from metarobust.bounds._sinkhorn_sweeps import (
    Incidence,
    finished,
    incidence_of,
    rounded,
    sweep_until_balanced,
    warn_unless_balanced,
)
from metarobust.bounds._solution import Solution, classes

REGULARISATION = 0.05
TOLERANCE = 1e-4
MOST_ITERATIONS = 1000
AUTO_ORDER = 3
NEGLIGIBLE = 1e-9  # risk that may be lost by leaving out the sets of least mass


def feasible_sets(graph: ConflictGraph, order: int, most_sets: int) -> list[np.ndarray] | None:
    """Every feasible set of at most ``order`` points, one array per size; None if ``most_sets`` do not suffice."""
    singles = np.arange(len(graph.points.y))[:, None]
    pairs = np.stack([graph.pairs.first, graph.pairs.second], 1).astype(np.int64)
    largest = min(order, classes(graph))
    if largest < 3:
        return [singles, pairs]
    larger = graph.overfull(np.ones(len(singles)), largest, most_sets)  # three potentials of 1 sum to more than 1
    return [singles, pairs, *larger.sets] if larger.complete else None


def too_many(order: int, most_sets: int) -> ValueError:
    """Sinkhorn needs all sets at once, unlike the linear program."""
    remedy = "write a smaller order, a smaller epsilon or a larger most_sets"
    expected = f"small enough to list its sets within most_sets (={most_sets}) candidates"
    return ValueError(message("order", expected, order, remedy))


def solve_by_sinkhorn(graph: ConflictGraph, order: int | str, most_sets: int) -> Solution:
    r"""A transport plan and potentials by entropic regularisation (Garcia Trillos et al., 2024, the Sinkhorn algorithm with
    rounding); both only approximate, so the bracket stays open. Newton steps take over where the sweeps are too slow.

    Order ``"auto"`` means 3 points, or 2 where ``most_sets`` does not suffice to list all triples.

    The potentials are first divided by the largest sum over a set, because :math:`x_S \le \min_{i \in S} w_i` keeps these sums
    below :math:`1 + \eta \log \max_i w_i`, well under the 1 that is allowed. Then each class in turn is raised to the most that
    the others leave it, the step that the Sinkhorn update tends to as the regularisation vanishes.

    Raises:
        ValueError: listing the sets of the order asked for takes more than ``most_sets`` candidates.
    """
    wanted = AUTO_ORDER if order == "auto" else int(order)
    groups = feasible_sets(graph, wanted, most_sets)
    if groups is None and order != "auto":
        raise too_many(wanted, most_sets)
    if groups is None:
        wanted, groups = 2, feasible_sets(graph, 2, most_sets)
        assert groups is not None
    device = graph.points.x.device
    incidence = incidence_of(groups, graph.points.y, device)
    log_weight = torch.from_numpy(graph.points.weight).to(device).log()
    with torch.no_grad():
        kernel = torch.full_like(incidence.size, -1 / REGULARISATION)
        scaling = sweep_until_balanced(incidence, kernel, log_weight, TOLERANCE, MOST_ITERATIONS)
        scaling = finished(incidence, scaling, log_weight, TOLERANCE)
        warn_unless_balanced(scaling, TOLERANCE, "write method='exact'", stacklevel=5)
        mass = rounded(incidence, scaling.log_mass, log_weight).exp()
        potential = _raised(incidence, scaling.potential * REGULARISATION)
    mass = torch.where(mass > NEGLIGIBLE / len(mass), mass, 0.0)
    parts = mass.split([len(sets) for sets in groups])
    reached = max(2, min(wanted, classes(graph)))
    return Solution(reached, potential.cpu().numpy(), groups[1:], [part.cpu().numpy() for part in parts[1:]])


def _raised(incidence: Incidence, potential: Tensor) -> Tensor:
    """Potentials in [0, 1] that no point could raise alone, up to the constraints that the given ones already break."""
    potential = (potential / incidence.total(potential).max().clamp(min=1e-12)).clamp(0, 1)
    total = incidence.total(potential)
    for block in incidence.blocks:
        old = potential[block.points]
        room = torch.full_like(old, torch.inf).scatter_reduce_(0, block.member, 1 - total[block.set], "amin")
        new = (old + room).clamp(0, 1)
        total.index_add_(0, block.set, (new - old)[block.member])
        potential[block.points] = new
    return potential

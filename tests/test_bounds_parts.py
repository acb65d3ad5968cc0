"""The parts of the bounds, each against an independent reference: linear programs, enumeration, geometry by coordinates."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from scipy.spatial.distance import cdist

from metarobust.bounds import RiskBound, _pairs, adversarial_risk_bound
from metarobust.bounds._conflicts import ConflictGraph
from metarobust.bounds._enclosing import enclosing_balls, feasible, triangle_radius
from metarobust.bounds._flow import pair_bound
from metarobust.bounds._packing import Packing
from metarobust.bounds._pairs import pairs_within
from metarobust.bounds._plan import repaired
from metarobust.bounds._points import as_points
from metarobust.bounds._proof import _guarantee
from metarobust.threat_models import ThreatModel

METRIC = {"l2": "euclidean", "linf": "chebyshev"}


# The references


def all_pairs(x: np.ndarray, y: np.ndarray, norm: str, radius: float) -> np.ndarray:
    """``[pairs, 2]``: pairs of different labels at most ``radius`` apart, by comparing everything in float64."""
    near = (cdist(x, x, METRIC[norm]) <= radius) & (y[:, None] != y)
    return np.argwhere(np.triu(near))


def enclosing_radius(x: np.ndarray) -> float:
    """Radius of the smallest ball round the rows of x: the best of the circumcentres of all subsets."""
    best = np.inf
    for size in range(1, len(x) + 1):
        for subset in itertools.combinations(range(len(x)), size):
            sides = x[list(subset[1:])] - x[subset[0]]
            gram = sides @ sides.T
            centre = x[subset[0]] + np.linalg.lstsq(gram, gram.diagonal() / 2, rcond=None)[0] @ sides
            best = min(best, np.linalg.norm(x - centre, axis=1).max())
    return best


def feasible_sets(x: np.ndarray, y: np.ndarray, norm: str, epsilon: float, largest: int) -> Iterator[tuple[int, ...]]:
    """All sets of at most ``largest`` points of different labels whose closed balls share a point."""
    near = cdist(x, x, METRIC[norm]) <= 2 * epsilon
    for size in range(1, largest + 1):
        for members in itertools.combinations(range(len(x)), size):
            if len(set(y[list(members)])) < size or not near[np.ix_(members, members)].all():
                continue
            if norm == "linf" or size < 3 or enclosing_radius(x[list(members)]) <= epsilon:
                yield members


def packing_optimum(sets: list[tuple[int, ...]], weight: np.ndarray) -> float:
    """The largest sum of ``w_i q_i`` under which no set holds more than 1, by HiGHS."""
    matrix = np.array([[i in members for i in range(len(weight))] for members in sets], dtype=float)
    scale, tight = 1e3 / weight.max(), {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(-scale * weight, A_ub=matrix, b_ub=np.ones(len(sets)), bounds=(0, 1), method="highs", options=tight)
    assert found.success
    return -found.fun / scale


def random_instance(
    rng: np.random.Generator, points: int, classes: int, weights: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = rng.normal(size=(points, int(rng.integers(1, 4)))), rng.integers(0, classes, points)
    weight = {
        "unit": np.ones(points),
        "integer": rng.integers(1, 6, points).astype(float),
        "real": rng.exponential(size=points) ** 2,
        "wide": 10 ** rng.uniform(-9, 0, points),
    }[weights]
    return x, y, weight


def bound_of(x: Any, y: Any, norm: str, epsilon: float, **options: Any) -> RiskBound:
    if "weights" in options:
        options["weights"] = torch.as_tensor(options["weights"])
    return adversarial_risk_bound(
        torch.as_tensor(x), torch.as_tensor(y), ThreatModel(norm=norm, epsilon=epsilon, upper=1e3), **options
    )


def graph_of(x: np.ndarray, y: np.ndarray, norm: str, epsilon: float, weight: np.ndarray | None = None) -> ConflictGraph:
    """The graph, with points in the order of the merged data; ``y`` must ascend and no point repeat for indices to agree."""
    points = as_points(torch.as_tensor(x), torch.as_tensor(y), None if weight is None else torch.as_tensor(weight))
    pairs = pairs_within(points, norm, 2 * epsilon)
    return ConflictGraph(points=points, pairs=pairs, norm=norm, epsilon=epsilon, closed=True)


# Order 2


def check_pair_bound(first: np.ndarray, second: np.ndarray, weight: np.ndarray, count: np.ndarray | None) -> np.ndarray:
    """Primal and dual are feasible, half-integral and of the value that HiGHS finds; returns the potentials."""
    weight = weight / weight.sum()
    found = pair_bound(first, second, weight, count)
    covered = np.bincount(first, found.mass, len(weight)) + np.bincount(second, found.mass, len(weight))
    assert (found.mass >= 0).all()
    assert (covered <= weight + 1e-12).all()
    assert np.isin(found.potential, [0, 0.5, 1]).all()
    assert (found.potential[first] + found.potential[second] <= 1).all()
    sets = list(zip(first.tolist(), second.tolist(), strict=True))
    optimum = packing_optimum(sets, weight) if sets else 1.0
    assert weight @ found.potential == pytest.approx(optimum, abs=1e-9)
    assert 1 - found.mass.sum() == pytest.approx(optimum, abs=1e-9)
    return found.potential


@pytest.mark.parametrize("weights", ["unit", "integer", "real", "wide"])
def test_flow_equals_the_linear_program(weights: str) -> None:
    rng = np.random.default_rng(0)
    halves = 0
    for instance in range(75):
        points, classes = int(rng.integers(2, 40)), 2 + instance % 4
        x, y, weight = random_instance(rng, points, classes, weights)
        norm = ("l2", "linf")[instance % 2]
        first, second = all_pairs(x, y, norm, float(rng.uniform(0.2, 1.5))).T
        count = weight.astype(np.int64) if weights in ("unit", "integer") else None
        potential = check_pair_bound(first, second, weight, count)
        if classes == 2:
            assert np.isin(potential, [0, 1]).all()  # a bipartite graph has a deterministic optimal classifier
        halves += (potential == 0.5).sum()
    assert halves > 10 or weights == "wide"


@pytest.mark.parametrize("weights", ["unit", "integer", "real"])
def test_a_half_remains_only_where_every_optimum_has_it(weights: str) -> None:
    """Against all 3^n half-integral potentials."""
    rng = np.random.default_rng(1)
    every = np.array(list(itertools.product([0, 0.5, 1], repeat=7)))
    halves, decided = 0, 0
    for _ in range(40):
        weight = {"unit": np.ones(7), "integer": rng.integers(1, 4, 7), "real": rng.integers(1, 4, 7) / 7.7}[weights].astype(
            float
        )
        first, second = np.argwhere(np.triu(rng.random((7, 7)) < rng.uniform(0.2, 0.6), 1)).T
        if len(first) == 0:
            continue
        count = weight.astype(np.int64) if weights != "real" else None
        potential = check_pair_bound(first, second, weight, count)
        allowed = every[(every[:, first] + every[:, second] <= 1).all(1)]
        value = allowed @ weight
        always = (allowed[value > value.max() - 1e-9] == 0.5).all(0)
        np.testing.assert_array_equal(potential == 0.5, always)
        halves, decided = halves + always.sum(), decided + (~always).sum()
    assert min(halves, decided) > 20


def test_real_weights_of_many_points_are_as_exact_as_whole_ones() -> None:
    """Real weights go through scaled flows; whole ones, which HiGHS need not confirm, through one exact flow."""
    rng = np.random.default_rng(2)
    x, y, count = rng.normal(size=(3000, 2)), rng.integers(0, 5, 3000), rng.integers(1, 1000, 3000)
    first, second = all_pairs(x, y, "l2", 0.05).T
    weight = count / count.sum()
    whole, real = pair_bound(first, second, weight, count), pair_bound(first, second, weight, None)
    assert real.mass.sum() == pytest.approx(whole.mass.sum(), abs=1e-12)
    assert weight @ real.potential == pytest.approx(weight @ whole.potential, abs=1e-12)
    np.testing.assert_array_equal(real.potential, whole.potential)


# Larger sets


@pytest.mark.parametrize(
    ("norm", "classes", "points"), [("l2", 3, 12), ("l2", 4, 14), ("linf", 4, 14), ("linf", 6, 11), ("l2", 6, 10)]
)
def test_bound_equals_the_linear_program_over_all_sets(norm: str, classes: int, points: int) -> None:
    rng = np.random.default_rng(classes + points)
    orders = []
    for instance in range(9):
        x, y, weight = random_instance(rng, points, classes, ("unit", "integer", "real")[instance % 3])
        epsilon = float(rng.uniform(0.3, 1.2))
        share = weight / weight.sum()
        sets = list(feasible_sets(x, y, norm, epsilon, classes))
        for order in range(2, classes + 1):
            bound = bound_of(x, y, norm, epsilon, weights=weight, order=order)
            some = [members for members in sets if len(members) <= order]
            assert bound.lower == pytest.approx(1 - packing_optimum(some, share), abs=1e-7)
        optimum = 1 - packing_optimum(sets, share)
        bound = bound_of(x, y, norm, epsilon, weights=weight)
        assert bound.exact
        assert bound.lower == pytest.approx(optimum, abs=1e-7)
        assert bound.upper == pytest.approx(optimum, abs=1.1e-7)
        orders.append(bound.order)
    assert max(orders) > 2


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_bracket_holds_when_the_search_is_cut_short(norm: str) -> None:
    rng = np.random.default_rng(3)
    brackets: dict[int, list[bool]] = {}
    for instance in range(10):
        x, y = rng.normal(size=(14, 2)), rng.integers(0, 5, 14)
        weight = rng.exponential(size=14) if instance % 2 else np.ones(14)
        epsilon = float(rng.uniform(0.4, 1.0))
        optimum = 1 - packing_optimum(list(feasible_sets(x, y, norm, epsilon, 5)), weight / weight.sum())
        for most_sets, order in itertools.product((1, 5, 30, 10**6), ("auto", 3, 5)):
            bound = bound_of(x, y, norm, epsilon, weights=weight, most_sets=most_sets, order=order)
            assert bound.lower <= optimum + 1e-9
            assert bound.upper >= optimum - 1e-9
            assert bound.lower <= bound.upper
            brackets.setdefault(most_sets, []).append(bound.exact)
    assert not all(brackets[1])
    assert sum(brackets[1]) < sum(brackets[10**6])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_search_finds_every_overfull_set(norm: str) -> None:
    """Potentials of any shape, small ones at the end of a set included."""
    rng = np.random.default_rng(4)
    sizes = set()
    for classes in (3, 4, 5) * 8:
        x, y = rng.normal(size=(13, 2)), np.sort(rng.integers(0, classes, 13))
        graph = graph_of(x, y, norm, 0.8)
        potential = rng.random(13) ** rng.choice([1, 3]) * rng.choice([0.3, 0.6, 1])
        found = graph.overfull(potential, classes, 10**6)
        assert found.complete
        listed = {
            tuple(sorted(row)): excess
            for sets, some in zip(found.sets, found.excess, strict=True)
            for row, excess in zip(sets.tolist(), some, strict=True)
        }
        expected = {
            members: potential[list(members)].sum() - 1
            for members in feasible_sets(x, y, norm, 0.8, classes)
            if len(members) > 2 and potential[list(members)].sum() > 1 + 1e-9
        }
        assert listed == pytest.approx(expected)
        sizes |= {len(members) for members in expected}
    assert sizes == {3, 4, 5}


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_guarantee_keeps_every_set_at_1_for_whatever_potentials(norm: str) -> None:
    rng = np.random.default_rng(5)
    for most_sets in (1, 20, 10**6) * 5:
        x, y = rng.normal(size=(12, 2)), np.sort(rng.integers(0, 4, 12))
        graph = graph_of(x, y, norm, 0.7)
        guarantee = _guarantee(graph, rng.random(12), most_sets)
        for members in feasible_sets(x, y, norm, 0.7, 4):
            assert guarantee[list(members)].sum() <= 1 + 1e-12


def five_points_of_a_quarter() -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Boxes whose order-3 optimum breaks a set of five points but none of four, as coordinates, labels and potentials.

    Five mutual neighbours (1/4 each) and a ring of five more for each two that follow each other: of the ring's points
    (1/2 each) one neighbours these two. Each point has its own coordinate: it stands at 0, its neighbours at 1, others at 2.
    """
    potential = [0.25] * 5 + [0.5] * 25
    y = [0, 1, 2, 3, 4]
    neighbours = list(itertools.combinations(range(5), 2))
    for corner in range(5):
        ring = [5 + 5 * corner + step for step in range(5)]
        two = {corner, (corner + 1) % 5}
        third = next(label for label in range(5) if label not in two)
        others = [label for label in range(5) if label != third]
        y += [third, others[0], others[1], others[0], others[1]]
        neighbours += [tuple(sorted((ring[step], ring[(step + 1) % 5]))) for step in range(5)]
        neighbours += [(point, ring[0]) for point in two]
    x = np.full((30, 30), 2.0)
    for a, b in neighbours:
        x[a, b] = x[b, a] = 1.0
    np.fill_diagonal(x, 0.0)
    return x, np.array(y), potential


def test_a_set_of_five_may_be_broken_though_none_of_four_is() -> None:
    """So the absence of broken sets one larger than the order is no certificate from order 3 on; all sizes are looked at."""
    x, y, potential = five_points_of_a_quarter()
    rng = np.random.default_rng(6)
    sets = list(feasible_sets(x, y, "linf", 0.5, 5))
    assert max(map(len, sets)) == 5
    # Any weights under which tight sets cover each point make these potentials optimal.
    weight = np.zeros(30)
    for members in sets:
        if len(members) in (2, 3) and sum(potential[i] for i in members) == 1:
            weight[list(members)] += rng.uniform(1, 2)
    assert (weight > 0).all()
    weight /= weight.sum()
    third, fourth, fifth = (bound_of(x, y, "linf", 0.5, weights=weight, order=order) for order in (3, 4, 5))
    np.testing.assert_allclose(third.potentials, potential, atol=1e-7)
    assert fourth.lower == pytest.approx(third.lower, abs=1e-8)
    assert fifth.lower > fourth.lower + 1e-4
    assert not third.exact
    assert not fourth.exact
    auto = bound_of(x, y, "linf", 0.5, weights=weight)
    assert auto.exact
    assert auto.order == 5
    assert auto.lower == pytest.approx(1 - packing_optimum(sets, weight), abs=1e-8)


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("size", [3, 4, 5])
def test_ties_of_sets_are_decided_in_float64(size: int, closed: bool) -> None:
    """Points far from the mean, where distances from a matrix product in float32 are off by more than the rounding of ties."""
    rng = np.random.default_rng(12)
    potential = np.tile([0.5, 0.0], size)
    for _ in range(8):
        near = torch.from_numpy(rng.normal(size=(size, 12)) + 30 / math.sqrt(12)).float()
        exact = enclosing_radius(near.double().numpy())
        points = as_points(torch.stack([near, -near], 1).flatten(0, 1), torch.arange(size).repeat_interleave(2), None)
        pairs = pairs_within(points, "l2", 4 * exact, [2 * exact])
        assert pairs.error > 1e-5 * exact**2
        for epsilon, inside in ((exact * (1 - 3e-6), False), (exact, closed), (exact * (1 + 3e-6), True)):
            graph = ConflictGraph(points=points, pairs=pairs, norm="l2", epsilon=epsilon, closed=closed)
            found = graph.overfull(potential, size, 10**6)
            assert found.complete
            assert any(len(sets) for sets in found.sets if sets.shape[1] == size) == inside


def test_plan_is_exact_for_whatever_multipliers() -> None:
    rng = np.random.default_rng(7)
    for _ in range(30):
        weight = rng.random(8)
        sets = [np.array(list(itertools.combinations(range(8), size))) for size in (2, 3, 4)]
        mass = [rng.random(len(some)) * (rng.random(len(some)) < 0.3) for some in sets]
        plan = repaired(sets, mass, weight)
        covered = np.zeros(8)
        for of_size, masses in zip(plan.sets, plan.mass, strict=True):
            for members, amount in zip(of_size.tolist(), masses.tolist(), strict=True):
                assert amount > 0
                covered[members] += amount
                assert any(set(members) <= set(row) for some in sets for row in some.tolist())
        np.testing.assert_allclose(covered, weight, atol=1e-14)


def test_plan_keeps_what_is_right_already() -> None:
    plan = repaired([np.array([[0, 1], [1, 2]])], [np.array([0.25, 0.25])], np.array([0.25, 0.5, 0.25]))
    assert [sets.tolist() for sets in plan.sets] == [[[0, 1], [1, 2]]]
    assert [mass.tolist() for mass in plan.mass] == [[0.25, 0.25]]
    assert plan.risk == 0.5


def test_plan_gives_up_an_excess_of_rounding_size() -> None:
    """No set is taken apart for it: all that cover the point shrink a little."""
    mass = np.array([0.25, 0.25]) * (1 + 5e-13)
    plan = repaired([np.array([[0, 1], [1, 2]])], [mass], np.array([0.25, 0.5, 0.25]))
    assert [len(sets) for sets in plan.sets if sets.shape[1] == 2] == [2]
    assert plan.mass[-1].tolist() == pytest.approx([0.25, 0.25], rel=2e-16)
    assert plan.risk == pytest.approx(0.5, rel=1e-15)


# Enclosing balls


def squares_of(x: np.ndarray) -> np.ndarray:
    return ((x[:, :, None] - x[:, None]) ** 2).sum(-1)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("dimensions", [1, 2, 3, 7])
def test_enclosing_balls(size: int, dimensions: int) -> None:
    """More points than dimensions + 1 are affinely dependent; further sets repeat points or lie on a line."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(24, size, dimensions))
    x[6:12, 1] = x[6:12, 0]
    x[12:18] = x[12:18, :1] + rng.normal(size=(6, size, 1)) * x[12:18, -1:]
    x[18:20] = np.round(x[18:20])
    radius, where = enclosing_balls(squares_of(x))
    np.testing.assert_allclose(radius, [enclosing_radius(some) for some in x], atol=1e-7)
    assert (where >= 0).all()
    np.testing.assert_allclose(where.sum(1), 1)
    centre = np.einsum("sm,smd->sd", where, x)
    np.testing.assert_allclose(np.linalg.norm(x - centre[:, None], axis=2).max(1), radius, atol=1e-7)
    if size == 3:
        sides = np.sqrt(squares_of(x)[:, (0, 0, 1), (1, 2, 2)])
        np.testing.assert_allclose(triangle_radius(sides), radius, atol=1e-7)
    for slack in (-1e-6, 1e-6):
        large = radius > 1e-3
        assert (feasible(squares_of(x[large]), 1.0) == (radius[large] <= 1.0)).all()
        scaled = squares_of(x[large] / radius[large, None, None])
        assert (feasible(scaled, 1 + slack) == (slack > 0)).all()


def test_enclosing_balls_by_minimisation() -> None:
    """The reference above against a general solver."""
    rng = np.random.default_rng(9)
    for size, dimensions in ((3, 2), (4, 3), (5, 2), (5, 6)):
        x = rng.normal(size=(size, dimensions))
        start = np.append(x.mean(0), 10.0)
        held = {"type": "ineq", "fun": lambda v, x=x: v[-1] - ((x - v[:-1]) ** 2).sum(1)}
        found = minimize(lambda v: v[-1], start, constraints=held, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500})
        assert enclosing_radius(x) == pytest.approx(found.fun**0.5, abs=1e-6)


def test_triangle_radius_of_needles() -> None:
    """Sides of 1 and an angle near 0: the circumcircle is known in closed form."""
    angle = np.array([1e-3, 1e-5, 1e-7])
    sides = np.stack([np.ones(3), np.ones(3), 2 * np.sin(angle / 2)], 1)
    np.testing.assert_allclose(triangle_radius(sides), 0.5 / np.cos(angle / 2), rtol=1e-12)
    assert triangle_radius(np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 2.0, 3.0]])).tolist() == [0, 0.5, 1.5]


# Enumeration


def data(kind: str, points: int, dimensions: int, dtype: torch.dtype) -> torch.Tensor:
    rng = np.random.default_rng(10)
    spread = rng.normal(size=(points, dimensions)) * np.geomspace(1, 0.05, dimensions)
    low_rank = rng.normal(size=(points, 3)) @ rng.normal(size=(3, dimensions)) + 1e-3 * rng.normal(size=(points, dimensions))
    x = {
        "spread": spread,
        "offset": 1000 + 0.1 * spread,
        "clusters": 0.1 * spread + 1000 * (rng.integers(0, 2, (points, 1)) * np.eye(1, dimensions)),
        "low_rank": low_rank,
        "constant": np.full((points, dimensions), 0.3) + (rng.random((points, dimensions)) < 0.02),
        "8_bit": rng.integers(0, 30, (points, dimensions)) / 255,
    }[kind]
    return torch.as_tensor(x).to(dtype)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["spread", "offset", "clusters", "low_rank", "constant", "8_bit"])
@pytest.mark.parametrize("dimensions", [1, 12, 70])
def test_enumeration_equals_comparing_everything(
    kind: str, dtype: torch.dtype, norm: str, dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pairs, "ROWS", 17)
    monkeypatch.setattr(_pairs, "COLUMNS", 29)
    x = data(kind, 150, dimensions, dtype)
    y = torch.arange(150) % 4
    points = as_points(x, y, None)
    exact = points.x.double().numpy() * points.unit
    every = cdist(exact, exact, METRIC[norm])
    different = np.triu(points.y[:, None] != points.y)
    for quantile in (0, 0.02, 0.3):
        radius = float(np.quantile(every[different], quantile))
        found = pairs_within(points, norm, radius)
        expected = np.argwhere(different & (every <= radius * (1 + 2 * points.rounding) + 1e-14 * (quantile == 0)))
        np.testing.assert_array_equal(np.stack([found.first, found.second], 1), expected)
        off = np.abs(found.distance**2 - every[found.first, found.second] ** 2)
        assert (off <= found.error + 1e-12 * radius**2).all()
        assert found.error <= 0.011 * radius**2


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_enumeration_of_many_dimensions(norm: str) -> None:
    """Above 1,024 dimensions the principal directions are only approximate."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2000, generator=generator) * torch.linspace(1, 0.01, 2000)
    points = as_points(x, torch.arange(60) % 3, None)
    exact = points.x.double().numpy()
    different = np.triu(points.y[:, None] != points.y)
    radius = float(np.median(cdist(exact, exact, METRIC[norm])[different]))
    found = pairs_within(points, norm, radius)
    expected = np.argwhere(different & (cdist(exact, exact, METRIC[norm]) <= radius * (1 + 2e-6)))
    np.testing.assert_array_equal(np.stack([found.first, found.second], 1), expected)


def test_filter_allows_for_the_rounding_of_what_a_projection_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corners of a cube far from the mean: the tiny rest of a vector is lost in its squared length, but ties must pass."""
    monkeypatch.setattr(_pairs, "EXACT_COST", 1e3)  # so that the eight directions of the corners are projected on
    missed = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        corners = 1000.0 * (1 - 2 * ((rng.permutation(256)[:200, None] >> np.arange(8)) & 1)).repeat(2, 0)
        rest = np.zeros((400, 4))
        rest[:, 0] = np.tile([3e-6, 3e-6 + 0.01], 200) * rng.permutation([1, -1] * 100).repeat(2)
        points = as_points(torch.from_numpy(np.concatenate([corners, rest], 1)), torch.arange(400) % 2, None)
        missed += 200 - len(pairs_within(points, "l2", 0.01 * (1 + 1e-8)).first)
    assert missed == 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_distances_of_long_vectors_are_summed_accurately(norm: str) -> None:
    """150,000 equal differences, the size of a photograph: the worst case for a running sum in float32."""
    x = torch.zeros(3, 150_528)
    x[1], x[2] = 0.7, 0.9
    size = float(x[1].double().norm() if norm == "l2" else x[1, 0].double())
    found = pairs_within(as_points(x, torch.tensor([0, 1, 1]), None), norm, size)
    assert len(found.first) == 1
    assert found.distance[0] == pytest.approx(size, rel=1e-12)


def test_distances_at_every_threshold_are_exact() -> None:
    x = data("spread", 80, 30, torch.float32)
    points = as_points(x, torch.arange(80) % 2, None)
    exact = cdist(points.x.double(), points.x.double())
    thresholds = sorted(exact[np.triu(points.y[:, None] != points.y)])[::200]
    found = pairs_within(points, "l2", thresholds[-1], thresholds)
    for threshold in thresholds:
        near = np.abs(found.distance - threshold) <= 1e-6 * threshold
        assert near.any()
        np.testing.assert_allclose(found.distance[near], exact[found.first, found.second][near], rtol=1e-14)


def test_too_many_pairs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pairs, "MOST_PAIRS", 100)
    points = as_points(torch.rand(40, 2), torch.arange(40) % 2, None)
    with pytest.raises(
        ValueError, match="^epsilon must be small enough for 50 million conflicting pairs, got .* choose a smaller"
    ):
        pairs_within(points, "l2", 10.0)


# Points


def test_points_merge_duplicates_and_keep_what_they_stand_for() -> None:
    x = torch.tensor([[1.0], [0.0], [-0.0], [1.0], [0.0], [0.3]])
    y = torch.tensor([1, 0, 0, 1, 1, 0])
    points = as_points(x, y, torch.tensor([1.0, 2, 2, 1, 1, 0]))
    assert points.y.tolist() == [0, 1, 1]
    assert points.origin.tolist() == [1, 0, 0, 1, 2, -1]
    assert points.first.tolist() == [1, 0, 4]
    np.testing.assert_allclose(points.weight, [4 / 7, 2 / 7, 1 / 7])
    np.testing.assert_allclose(points.share, np.array([1, 2, 2, 1, 1, 0]) / 7)
    equal = as_points(x, y, torch.tensor([0.3, 0.3, 0.3, 0.3, 0.3, 0.0]))
    assert equal.copies is not None
    assert equal.copies.tolist() == [2, 2, 1]


def test_8_bit_images_are_recognised_however_they_were_scaled() -> None:
    levels, y = torch.arange(256)[:, None], torch.zeros(256, dtype=torch.int64)
    single, double = levels.float(), levels.double()
    scaled = (single / 255, single * (1 / 255), double / 255, double * (1 / 255))
    for x in (*scaled, scaled[0].double(), scaled[1].double(), scaled[2].float()):
        points = as_points(x, y, None)
        assert points.unit == 1 / 255
        assert torch.equal(points.x, levels.to(x.dtype))
    for x in (single / 256, single / 255 + 1e-6, -single / 255, single / 254, double / 255 + 1e-8):
        points = as_points(x, y, None)
        assert points.unit == 1
        assert torch.equal(points.x, x)


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_packing_leaves_nothing_broken(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(30, 2)), np.sort(rng.integers(0, 5, 30))
    graph = graph_of(x, y, "linf", 0.4)
    weight = graph.points.weight
    packing = Packing(graph, pair_bound(graph.pairs.first, graph.pairs.second, weight, graph.points.copies))
    assert packing.reach(5, 10**6)
    assert len(graph.overfull(packing.potential, 5, 10**6)) == 0
    assert (packing.potential[graph.pairs.first] + packing.potential[graph.pairs.second] <= 1 + 1e-9).all()

"""The Sinkhorn bound: never above the exact one, close to it where it should be, and with the derivatives that it claims."""

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metarobust.bounds import adversarial_risk_bound, sinkhorn_risk
from metarobust.bounds._conflicts import conflicts
from metarobust.bounds._enclosing import enclosing_balls
from metarobust.bounds._pairs import pairs_within
from metarobust.bounds._points import as_points
from metarobust.bounds._sinkhorn_gradient import squared_radii
from metarobust.bounds._sinkhorn_sweeps import finished, incidence_of, rounded, solved, sweep_until_balanced
from metarobust.data import load_digits
from metarobust.threat_models import ThreatModel

L2 = ThreatModel(norm="l2", epsilon=0.4)


def random_points(examples: int, dimensions: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(examples, dimensions, generator=generator, dtype=torch.float64)
    weights = torch.rand(examples, generator=generator, dtype=torch.float64) + 0.2
    return x, torch.arange(examples) % classes, weights


def circles() -> tuple[Tensor, Tensor]:
    """The authors' own test: four circles of twelve points, centres (+-0.6, +-0.6), radius 1, epsilon 1."""
    angle = torch.arange(12) * torch.pi / 6
    circle = torch.stack([angle.cos(), angle.sin()], 1).double()
    centres = 0.6 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    return (circle + centres[:, None]).flatten(0, 1), torch.arange(4).repeat_interleave(12)


def digits(per_class: int) -> tuple[Tensor, Tensor]:
    data = load_digits()
    rows = torch.cat([(data.labels == label).nonzero()[:per_class, 0] for label in range(10)])
    return data.images[rows], data.labels[rows]


# Values -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "exact", "authors"), [(2, 1 / 2, 0.5061), (3, 1 / 3, 0.3672), (4, 1 / 4, 0.3359)])
def test_circles_are_bounded_at_least_as_tightly_as_by_the_authors_code(order: int, exact: float, authors: float) -> None:
    """Barycentre masses, 1 - risk. Theirs are rounded with a factor that is too small."""
    x, y = circles()
    threat_model = ThreatModel(norm="l2", epsilon=1.0)
    settings: dict[str, Any] = {"order": order, "regularisation": 0.1, "tolerance": 1e-5}
    swept = sinkhorn_risk(x, y, threat_model, gradient="unrolled", **settings).item()
    assert exact <= 1 - swept <= authors
    newton = sinkhorn_risk(x, y, threat_model, **settings).item()
    assert newton == pytest.approx(swept, abs=1e-5)


@pytest.mark.parametrize(
    ("regularisation", "tolerance", "as_published", "with_the_right_factor"),
    [(0.03, 1e-3, 0.329885, 0.341610), (0.05, 1e-3, 0.333778, 0.338463), (0.1, 1e-3, 0.298979, 0.301983)],
)
def test_digits_gain_from_the_right_factor(
    regularisation: float, tolerance: float, as_published: float, with_the_right_factor: float
) -> None:
    x, y = digits(50)
    threat_model = ThreatModel(norm="l2", epsilon=1.1)
    risk = sinkhorn_risk(
        x, y, threat_model, regularisation=regularisation, tolerance=tolerance, gradient="unrolled", most_iterations=500
    ).item()
    assert as_published < with_the_right_factor <= risk < 0.343, "the exact value of order 2 is 0.343"


def test_rounding_scales_by_the_factor_itself() -> None:
    incidence = incidence_of([np.array([[0], [1]]), np.array([[0, 1]])], np.array([0, 1]), torch.device("cpu"))
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mass = rounded(incidence, torch.tensor([0.3, 0.2, 0.3], dtype=torch.float64).log(), weight.log()).exp()
    torch.testing.assert_close(mass, torch.tensor([0.15, 0.2, 0.15], dtype=torch.float64), msg="0.6 had to become 0.3")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, ThreatModel, int]:
    examples = draw(st.integers(1, 10))
    x, _, weights = random_points(examples, draw(st.integers(1, 3)), 2, draw(st.integers(0, 10_000)))
    if draw(st.booleans()):
        x = (4 * x).round() / 4  # duplicates and ties
    y = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=examples, max_size=examples)))
    norm, epsilon = draw(st.sampled_from(["l2", "linf"])), draw(st.sampled_from([0.0, 0.1, 0.125, 0.25, 0.4, 0.7]))
    return x, y, weights, ThreatModel(norm=norm, epsilon=epsilon), draw(st.integers(2, 4))


@settings(max_examples=60, deadline=None)
@given(
    problem=problems(),
    regularisation=st.sampled_from([0.3, 0.05, 0.01]),
    gradient=st.sampled_from(["implicit", "unrolled"]),
    sweeps=st.integers(1, 20),
    softness=st.sampled_from([0.0, 0.3]),
)
def test_it_is_a_lower_bound_whenever_the_sweeps_stop(
    problem: tuple[Tensor, Tensor, Tensor, ThreatModel, int], regularisation: float, gradient: str, sweeps: int, softness: float
) -> None:
    x, y, weights, threat_model, order = problem
    exact = adversarial_risk_bound(x, y, threat_model, weights=weights, order=order)
    risk = sinkhorn_risk(
        x, y, threat_model, weights=weights, order=order, regularisation=regularisation,
        softness=softness, gradient=gradient, tolerance=0.0, most_iterations=sweeps,
    )  # fmt: skip
    assert -1e-12 <= risk.item() <= exact.lower + 1e-9
    assert risk.dtype == torch.float64
    assert risk.shape == ()
    bracket = adversarial_risk_bound(x, y, threat_model, weights=weights, order=order, method="sinkhorn")
    assert bracket.lower <= exact.lower + 1e-9
    assert bracket.upper >= exact.upper - 1e-9 if exact.exact else bracket.upper >= exact.lower - 1e-9
    assert bracket.order == max(2, min(order, len(y.unique())))


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l2", 3), ("linf", 3)])
def test_it_tends_to_the_exact_value_as_the_regularisation_vanishes(norm: str, order: int) -> None:
    x, y, weights = random_points(30, 2, 3, seed=1)
    threat_model = ThreatModel(norm=norm, epsilon=0.08)
    exact = adversarial_risk_bound(x, y, threat_model, weights=weights, order=order).lower
    gaps = [
        exact - sinkhorn_risk(x, y, threat_model, weights=weights, order=order, regularisation=eta).item()
        for eta in (0.2, 0.05, 0.02)
    ]
    assert all(gap > 20 * after for gap, after in pairwise(gaps)), gaps
    assert gaps[0] > 0.01
    assert abs(gaps[-1]) < 1e-9


def test_a_tiny_regularisation_is_exact_and_neither_overflows_nor_warns() -> None:
    x, y, weights = random_points(40, 2, 3)
    threat_model = ThreatModel(norm="l2", epsilon=0.1)
    exact = adversarial_risk_bound(x, y, threat_model, weights=weights, order=3).lower
    weights.requires_grad_()
    risk = sinkhorn_risk(x, y, threat_model, weights=weights, order=3, regularisation=1e-3)
    risk.backward()
    assert risk.item() == pytest.approx(exact, abs=1e-9)
    assert weights.grad is not None
    assert weights.grad.isfinite().all()
    swept = sinkhorn_risk(x, y, threat_model, regularisation=1e-9, tolerance=0.0, most_iterations=3, gradient="unrolled")
    assert 0 <= swept.item() <= 1


def test_newton_steps_end_where_sweeps_crawl() -> None:
    """A pair of equal weights: the singletons have to lose almost all their mass, which sweeps take from them as 1 / k."""
    incidence = incidence_of([np.array([[0], [1]]), np.array([[0, 1]])], np.array([0, 1]), torch.device("cpu"))
    log_weight = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    slow = sweep_until_balanced(incidence, torch.full((3,), -20.0, dtype=torch.float64), log_weight, 1e-6, 200)
    assert slow.sweeps == 200
    assert slow.error > 1e-3
    done = finished(incidence, slow, log_weight)
    assert done.error < 1e-13
    # x s^-2 = exp(1 / eta) with x + s = 1/2
    single = (np.sqrt(1 + 2 * np.exp(20.0)) - 1) / (2 * np.exp(20.0))
    torch.testing.assert_close(done.log_mass.exp(), torch.tensor([single, single, 0.5 - single], dtype=torch.float64))
    torch.testing.assert_close(incidence.total(done.potential) - 20, done.log_mass)


def test_conjugate_gradients_solve_the_system() -> None:
    groups = [np.arange(6)[:, None], np.array([[0, 2], [0, 3], [1, 3], [3, 4], [2, 5]]), np.array([[0, 3, 4]])]
    incidence = incidence_of(groups, np.array([0, 0, 1, 1, 2, 2]), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(len(incidence.size), generator=generator, dtype=torch.float64)
    right = torch.rand(6, generator=generator, dtype=torch.float64)
    matrix = torch.zeros(6, len(mass), dtype=torch.float64)
    for column, members in enumerate(members for sets in groups for members in sets):
        matrix[members, column] = 1
    torch.testing.assert_close(incidence.covered(mass), matrix @ mass)
    torch.testing.assert_close(incidence.total(right), matrix.T @ right)
    torch.testing.assert_close(
        solved(incidence, mass, right, 1e-12), torch.linalg.solve(matrix @ mass.diag() @ matrix.T, right), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99999, 1.00001])
def test_two_points_have_a_closed_form(norm: str, share: float) -> None:
    """Pair mass m and singleton masses s of two points: m + s = 1/2 and m = s^2 exp((2 - c) / eta)."""
    x = torch.tensor([[0.0, 0.0], [0.8 * share, 0.1 if norm == "linf" else 0.0]], dtype=torch.float64)
    risk = sinkhorn_risk(x, torch.tensor([0, 1]), ThreatModel(norm=norm, epsilon=0.4), softness=0.3, regularisation=0.2)
    closeness = max(share, 0.125 if norm == "linf" else 0.0) ** 2
    cost = 1 + 0.3 * closeness / (1 - closeness)
    factor = float(np.exp((2 - cost) / 0.2)) if share < 1 else 0.0
    expected = 0.5 - (np.sqrt(1 + 2 * factor) - 1) / (2 * factor) if factor > 1e-12 else 0.0
    assert risk.item() == pytest.approx(expected, abs=1e-9)
    assert expected > 0.04 or share > 0.9


@pytest.mark.parametrize("size", [2, 3, 4])
def test_radii_are_those_of_the_smallest_balls(size: int) -> None:
    x, y, _ = random_points(4 * size, 3, size)
    y = y.sort().values
    sets = np.arange(4 * size).reshape(size, 4).T
    corners = x[torch.from_numpy(sets)]
    distance = (corners[:, :, None] - corners[:, None]).norm(dim=3)
    for norm, expected in (
        ("l2", torch.from_numpy(enclosing_balls(distance.square().numpy())[0])),
        ("linf", (corners.amax(1) - corners.amin(1)).amax(1) / 2),
    ):
        points = as_points(x, y, None)
        graph = conflicts(points, pairs_within(points, norm, 2.0), norm, 1.0, closed=True)
        torch.testing.assert_close(squared_radii(x, sets, graph), expected.square())


# The bracket ------------------------------------------------------------------------------------------------------------


def test_the_bracket_of_digits_is_narrow_and_its_attack_is_one() -> None:
    """Potentials straight from the sweeps would give the upper end 0.33: they are too small by the entropy."""
    x, y = digits(50)
    threat_model = ThreatModel(norm="l2", epsilon=0.8)
    exact = adversarial_risk_bound(x, y, threat_model)
    bracket = adversarial_risk_bound(x, y, threat_model, method="sinkhorn")
    assert exact.exact
    assert exact.lower - 5e-4 < bracket.lower <= exact.lower <= bracket.upper < exact.lower + 1e-3
    assert (bracket.order, bracket.method, bracket.exact) == (3, "sinkhorn", False)
    assert set(bracket.sets) <= {3}
    attack = bracket.attack()
    assert attack.risk(bracket.classifier()) >= bracket.lower - 1e-9
    moved = (attack.positions[attack.position] - x.double()[attack.example]).flatten(1).norm(dim=1)
    assert moved.max() <= 0.8 + 1e-6
    per_example = torch.zeros(len(x), dtype=torch.float64).index_add_(0, attack.example, attack.probability)
    torch.testing.assert_close(per_example, torch.ones(len(x), dtype=torch.float64))


def test_order_auto_means_triples_if_they_can_be_listed() -> None:
    x, y, _ = random_points(30, 2, 4)
    threat_model = ThreatModel(norm="l2", epsilon=0.3)
    auto = adversarial_risk_bound(x, y, threat_model, method="sinkhorn")
    assert auto.order == 3
    assert auto.lower == adversarial_risk_bound(x, y, threat_model, method="sinkhorn", order=3).lower
    assert adversarial_risk_bound(x, y, threat_model, method="sinkhorn", order=4).lower > auto.lower
    assert adversarial_risk_bound(x, y, threat_model, method="sinkhorn", most_sets=10).order == 2
    sentence = "order must be small enough to list its sets within most_sets (=10) candidates, got 3; write a smaller order"
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        adversarial_risk_bound(x, y, threat_model, method="sinkhorn", order=3, most_sets=10)
    with pytest.raises(ValueError, match="a smaller epsilon or a larger most_sets"):
        sinkhorn_risk(x, y, threat_model, order=3, most_sets=10)


# Two classes: optimal transport -----------------------------------------------------------------------------------------


def two_classes() -> tuple[Tensor, Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    x[25:] += 1.5
    distance = torch.cdist(x[:25], x[25:], compute_mode="donot_use_mm_for_euclid_dist")
    return x, torch.arange(50) // 25, (distance > 2 * 0.3).double().numpy()


def import_ot() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("ot")


def test_two_classes_are_an_optimal_transport_problem() -> None:
    """Between two classes of mass 1/2, a conflicting pair that shares mass m costs the classifier m once. With every class
    rescaled to mass 1, the share that transport must send farther than 2 epsilon is C, the rest meets: risk = (1 - C) / 2."""
    ot = import_ot()
    x, y, cost = two_classes()
    mass = np.full(25, 1 / 25)
    threat_model = ThreatModel(norm="l2", epsilon=0.3)
    exact = (1 - float(ot.emd2(mass, mass, cost))) / 2
    assert 0.05 < exact < 0.4
    assert adversarial_risk_bound(x, y, threat_model).lower == pytest.approx(exact, abs=1e-9)
    for regularisation, near in ((0.1, 5e-3), (0.05, 2e-4)):
        ours = sinkhorn_risk(x, y, threat_model, regularisation=regularisation).item()
        plan = ot.sinkhorn(mass, mass, cost, regularisation, numItermax=20_000, stopThr=1e-6)
        theirs = (1 - float((plan * cost).sum())) / 2
        assert exact - near < ours <= exact
        assert exact - near < theirs <= exact + 1e-5


# Derivatives ------------------------------------------------------------------------------------------------------------


def slopes(threat_model: ThreatModel, step: float = 1e-5, **settings: Any) -> list[tuple[float, float]]:
    """Claimed and central-difference derivatives along random directions, of x and of the weights."""
    x, y, weights = random_points(12, 3, 4)
    inputs = [x.requires_grad_(), weights.requires_grad_()]

    def risk(*inputs: Tensor) -> Tensor:
        return sinkhorn_risk(inputs[0], y, threat_model, weights=inputs[1], softness=0.2, **settings)

    gradients = torch.autograd.grad(risk(*inputs), inputs)
    generator = torch.Generator().manual_seed(1)
    found = []
    with torch.no_grad():
        for place in (0, 0, 1, 1):
            direction = torch.randn(inputs[place].shape, generator=generator, dtype=torch.float64)
            ends = [risk(*[v + sign * step * direction if k == place else v for k, v in enumerate(inputs)]) for sign in (1, -1)]
            found.append(((gradients[place] * direction).sum().item(), (ends[0] - ends[1]).item() / (2 * step)))
    return found


@pytest.mark.parametrize(("norm", "epsilon"), [("l2", 0.4), ("linf", 0.3)])
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
def test_gradients_are_central_differences(norm: str, epsilon: float, order: int, gradient: str) -> None:
    """Few sweeps: an unrolled gradient is that of these sweeps, an implicit one that of the fixed point."""
    for claimed, measured in slopes(
        ThreatModel(norm=norm, epsilon=epsilon),
        order=order, gradient=gradient, regularisation=0.1, tolerance=0.0, most_iterations=4,
    ):  # fmt: skip
        assert abs(measured) > 1e-4
        assert claimed == pytest.approx(measured, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_implicit_and_unrolled_gradients_agree_at_convergence(norm: str) -> None:
    x, y, weights = random_points(12, 3, 4)
    threat_model = ThreatModel(norm=norm, epsilon=0.3)
    found = []
    for gradient in ("implicit", "unrolled"):
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        risk = sinkhorn_risk(
            inputs[0], y, threat_model, weights=inputs[1], order=3, regularisation=0.2, softness=0.2,
            tolerance=0.0, most_iterations=100, gradient=gradient,
        )  # fmt: skip
        found.append([risk.detach(), *torch.autograd.grad(risk, inputs)])
    for implicit, unrolled in zip(*found, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-8, atol=1e-10)


def test_isolated_equal_pairs_have_the_gradient_of_the_smoothed_minimum() -> None:
    """Two points that conflict, weights (a, b): risk min(a, b), smoothed; by symmetry each weight counts half of it at a = b."""
    weights = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.0], [0.1], [9.0]], dtype=torch.float64)
    risk = sinkhorn_risk(x, torch.tensor([0, 1, 0]), L2, weights=weights, most_iterations=5, tolerance=1e-9)
    risk.backward()
    # the pair's mass is 1/4: with m = min(a, b) / (a + b + c) the derivatives are (1/2 - m) / 4, the same, and -m / 4
    torch.testing.assert_close(
        weights.grad, torch.tensor([0.0625, 0.0625, -0.0625], dtype=torch.float64), rtol=0, atol=1e-3
    )  # fmt: skip


def test_only_relative_weights_matter() -> None:
    x, y, weights = random_points(12, 2, 3)
    weights.requires_grad_()
    risk = sinkhorn_risk(x, y, L2, weights=weights, order=3)
    assert sinkhorn_risk(x, y, L2, weights=7 * weights, order=3).item() == pytest.approx(risk.item(), abs=1e-10)
    (gradient,) = torch.autograd.grad(risk, weights)
    assert (gradient * weights).sum().abs() < 1e-10
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
def test_examples_of_weight_zero_take_no_part(gradient: str) -> None:
    x, y, weights = random_points(12, 2, 3)
    weights[[2, 7]] = 0
    kept = weights > 0
    inputs = [x.requires_grad_(), weights.requires_grad_()]
    settings: dict[str, Any] = {"order": 3, "softness": 0.1, "regularisation": 0.1, "gradient": gradient}
    risk = sinkhorn_risk(x, y, L2, weights=weights, **settings)
    assert risk.item() == pytest.approx(sinkhorn_risk(x[kept], y[kept], L2, weights=weights[kept], **settings).item(), abs=1e-12)
    for gradients in torch.autograd.grad(risk, inputs):
        assert (gradients[[2, 7]] == 0).all()
        assert gradients.abs().max() > 1e-4


def test_duplicates_have_gradients_of_their_own() -> None:
    x, y, weights = random_points(12, 2, 3)
    x[3] = x[0]  # of one class

    def risk(x: Tensor) -> Tensor:
        return sinkhorn_risk(x, y, L2, weights=weights, softness=0.2, regularisation=0.1, order=3)

    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(risk(given), given)
    for row in (0, 3):
        step = torch.zeros_like(x)
        step[row, 1] = 1e-5
        measured = (risk(x + step) - risk(x - step)).item() / 2e-5
        assert abs(measured) > 1e-4
        assert gradient[row, 1].item() == pytest.approx(measured, rel=1e-5)


def test_gradients_reach_images_in_their_own_precision() -> None:
    """Grey levels k / 255: conflicts are counted in integers, gradients come from the values."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randint(256, (12, 1, 3, 3), generator=generator).float() / 255).requires_grad_()
    y = torch.arange(12) % 3
    threat_model = ThreatModel(norm="l2", epsilon=0.8)

    def risk(x: Tensor) -> Tensor:
        return sinkhorn_risk(x, y, threat_model, softness=0.1, regularisation=0.1, order=3)

    (gradient,) = torch.autograd.grad(risk(x), x)
    assert gradient.dtype == torch.float32
    direction = torch.randn(x.shape, generator=generator).double()
    with torch.no_grad():
        measured = (risk(x.double() + 1e-6 * direction) - risk(x.double() - 1e-6 * direction)).item() / 2e-6
    assert abs(measured) > 1e-3
    assert (gradient * direction).sum().item() == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_coinciding_points_and_single_classes_have_finite_gradients(gradient: str, epsilon: float) -> None:
    threat_model = ThreatModel(norm="l2", epsilon=epsilon)
    for y, expected in ((torch.tensor([0, 1, 2]), 0.5), (torch.zeros(3, dtype=torch.int64), 0.0)):
        x, weights = torch.zeros(3, 2, requires_grad=True), torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
        risk = sinkhorn_risk(
            x, y, threat_model, weights=weights, order=3, regularisation=0.02, softness=0.1, gradient=gradient, tolerance=1e-5
        )
        assert risk.item() == pytest.approx(expected, abs=1e-4), "the largest of the weights 0.5, 0.3, 0.2 is answered rightly"
        by_x, by_weight = torch.autograd.grad(risk, (x, weights))
        assert (by_x == 0).all()
        torch.testing.assert_close(by_weight, expected * torch.tensor([-1.0, 1.0, 1.0]), rtol=0, atol=1e-3)


# Arguments --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"order": 1}, ValueError, "order must be an integer >= 2, got 1"),
        ({"order": "auto"}, TypeError, "order must be an integer >= 2, got 'auto'"),
        ({"regularisation": 0.0}, ValueError, "regularisation must be a finite number > 0, got 0.0"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be a finite number >= 0, got -1.0"),
        ({"most_iterations": 0}, ValueError, "most_iterations must be an integer >= 1, got 0"),
        ({"softness": -0.1}, ValueError, "softness must be a finite number >= 0, got -0.1"),
        ({"gradient": "none"}, ValueError, "gradient must be one of 'implicit', 'unrolled', got 'none'"),
        ({"most_sets": 0}, ValueError, "most_sets must be an integer >= 1, got 0"),
        ({"weights": torch.tensor([-1.0, 1.0])}, ValueError, "weights must be finite and at least 0"),
        ({"threat_model": ThreatModel(norm="l1", epsilon=1.0)}, ValueError, "threat_model.norm must be 'l2' or 'linf', got 'l1'"),
        ({"threat_model": 0.5}, TypeError, "threat_model must be a ThreatModel, got 0.5"),
        ({"x": torch.tensor([[0.0], [torch.nan]])}, ValueError, "x must be finite"),
        ({"x": torch.zeros(2, 1, requires_grad=True)}, ValueError, "softness must be > 0 for a gradient in x, got 0.0; write"),
    ],
)
def test_bad_arguments_get_a_sentence(settings: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 1), "y": torch.tensor([0, 1]), "threat_model": L2} | settings
    with pytest.raises(error, match=sentence):
        sinkhorn_risk(**arguments)


def test_no_softness_is_asked_for_where_no_gradient_is_recorded() -> None:
    with torch.no_grad():
        assert sinkhorn_risk(torch.zeros(2, 1, requires_grad=True), torch.tensor([0, 1]), L2).item() > 0.49


def test_too_few_sweeps_are_reported() -> None:
    x, y, weights = random_points(12, 2, 3)
    with pytest.warns(
        UserWarning, match="Sinkhorn stopped after 1 sweeps at a marginal error of .* the bound is valid but looser"
    ):
        sinkhorn_risk(x, y, L2, weights=weights, most_iterations=1, gradient="unrolled")
    sinkhorn_risk(x, y, L2, weights=weights, most_iterations=1)  # Newton steps do the rest


# GPU --------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_gpu_gives_the_same_values_and_gradients(norm: str, gradient: str) -> None:
    x, y, weights = random_points(40, 3, 4)
    threat_model = ThreatModel(norm=norm, epsilon=0.2)
    found = []
    for device in ("cpu", "cuda"):
        inputs = [v.detach().to(device).requires_grad_() for v in (x, weights)]
        risk = sinkhorn_risk(
            inputs[0], y.to(device), threat_model, weights=inputs[1], order=3, softness=0.2, regularisation=0.1, gradient=gradient
        )
        assert risk.device.type == device
        bracket = adversarial_risk_bound(x.to(device), y.to(device), threat_model, weights=weights.to(device), method="sinkhorn")
        ends = torch.tensor([bracket.lower, bracket.upper], dtype=torch.float64)
        found.append([v.detach().cpu() for v in (risk, *torch.autograd.grad(risk, inputs), ends)])
    for host, device in zip(*found, strict=True):
        torch.testing.assert_close(device, host, rtol=1e-7, atol=1e-9)

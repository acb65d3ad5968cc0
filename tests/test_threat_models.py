"""Threat models: exact projections onto ball and box, sampling, steepest ascent, membership, and readable errors."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq
from scipy.stats import kstest

from metarobust.threat_models import NORMS, ThreatModel

ROUNDING = 1e-9
every_norm = pytest.mark.parametrize("norm", NORMS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def length(move, norm):
    return torch.linalg.vector_norm(move.flatten(1), ord={"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)


def reference_projection(v, x, norm, epsilon, lower, upper):
    """One example in NumPy: minimise the Lagrangian per coordinate, then find the multiplier by root bracketing."""
    if norm == "linf":
        return np.clip(np.clip(v, x - epsilon, x + epsilon), lower, upper)

    def minimiser(multiplier):
        wish = v - x
        shrunk = {"l2": np.abs(wish) / (1 + multiplier), "l1": np.maximum(np.abs(wish) - multiplier, 0)}
        move = np.sign(wish) * shrunk[norm]
        return np.clip(x + move, lower, upper)

    def excess(multiplier):
        return np.linalg.norm(minimiser(multiplier) - x, ord={"l2": 2, "l1": 1}[norm]) - epsilon

    if excess(0.0) <= 0:
        return minimiser(0.0)
    largest = 1.0
    while excess(largest) > 0:
        largest *= 2
    return minimiser(brentq(excess, 0.0, largest, xtol=1e-15, rtol=1e-14))


@st.composite
def problems(draw):
    """A threat model, a point of its box, a point to project and a feasible point, with one to six coordinates."""
    dimensions = draw(st.integers(1, 6))

    def vector(low, high):
        elements = st.floats(low, high, allow_subnormal=False)
        return torch.from_numpy(draw(arrays(np.float64, (1, dimensions), elements=elements)))

    norm = draw(st.sampled_from(NORMS))
    epsilon = draw(st.floats(0, 1.5, allow_subnormal=False))
    threat_model = ThreatModel(norm=norm, epsilon=epsilon, lower=-0.5, upper=1.0)
    x, v, raw = vector(-0.5, 1.0), vector(-4, 4), vector(-4, 4)
    size = length(raw, norm).clamp(min=1e-9)
    feasible = (x + raw * (epsilon / size).clamp(max=1)).clamp(-0.5, 1.0)  # clipping towards x keeps it in the ball
    return threat_model, x, v, feasible


# Projection ----------------------------------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("epsilon", [0.02, 0.7, 1.0])
@pytest.mark.parametrize("spread", [0.05, 0.5, 5.0])
def test_projection_equals_an_independent_reference(norm, epsilon, spread):
    threat_model = ThreatModel(norm=norm, epsilon=epsilon, lower=-0.2, upper=1.1)
    x = rand(6, 2, 5, 4) * 1.3 - 0.2
    x[0] = -0.2  # a corner of the box: half of all wishes are impossible
    v = x + spread * randn(6, 2, 5, 4, seed=1)
    got = threat_model.project(v, x)
    for row in range(len(x)):
        want = reference_projection(v[row].ravel().numpy(), x[row].ravel().numpy(), norm, epsilon, -0.2, 1.1)
        np.testing.assert_allclose(got[row].ravel().numpy(), want, atol=1e-10)


@settings(deadline=None, max_examples=200)
@given(problems())
def test_projection_is_optimal_feasible_and_idempotent(problem):
    threat_model, x, v, feasible = problem
    p = threat_model.project(v, x)
    assert threat_model.contains(p, x, tolerance=ROUNDING).all()
    # The variational inequality characterises the Euclidean projection onto a convex set.
    assert ((v - p) * (feasible - p)).sum() <= ROUNDING
    torch.testing.assert_close(threat_model.project(p, x), p, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(threat_model.project(feasible, x), feasible, rtol=0, atol=ROUNDING)


@every_norm
def test_points_strictly_inside_come_back_unchanged(norm):
    threat_model = ThreatModel(norm=norm, epsilon=0.5)
    x = 0.3 + 0.4 * rand(4, 3, 2)
    inside = x + 0.01 * (rand(4, 3, 2, seed=1) - 0.5)
    torch.testing.assert_close(threat_model.project(inside, x), inside, rtol=0, atol=1e-15)


@every_norm
def test_projection_is_equivariant_under_permutations_of_rows_and_coordinates(norm):
    threat_model = ThreatModel(norm=norm, epsilon=0.6)
    x, v = rand(5, 7), rand(5, 7) + randn(5, 7, seed=1)
    rows, columns = torch.randperm(5, generator=seeded(2)), torch.randperm(7, generator=seeded(3))
    p = threat_model.project(v, x)
    torch.testing.assert_close(threat_model.project(v[rows], x[rows]), p[rows], rtol=0, atol=1e-14)
    torch.testing.assert_close(threat_model.project(v[:, columns], x[:, columns]), p[:, columns], rtol=0, atol=1e-14)


@every_norm
def test_radius_zero_projects_to_the_centre(norm):
    x, v = rand(3, 4), randn(3, 4, seed=1)
    torch.testing.assert_close(ThreatModel(norm=norm, epsilon=0).project(v, x), x, rtol=0, atol=1e-15)


@every_norm
def test_a_wide_ball_leaves_the_clipping_to_the_box(norm):
    x, v = rand(3, 4), 5 * randn(3, 4, seed=1)
    assert torch.equal(ThreatModel(norm=norm, epsilon=1 if norm == "linf" else 100).project(v, x), v.clamp(0, 1))


@every_norm
@pytest.mark.parametrize("epsilon", [1.0, 12.0])
def test_single_precision_projection_of_a_colour_image_stays_in_the_ball(norm, epsilon):
    threat_model = ThreatModel(norm=norm, epsilon=min(epsilon, 1.0) if norm == "linf" else epsilon)
    x = rand(4, 3, 32, 32, dtype=torch.float32)
    v = x + randn(4, 3, 32, 32, seed=1, dtype=torch.float32)
    p = threat_model.project(v, x)
    assert p.dtype == torch.float32
    excess = (threat_model.distance(p.double(), x.double()) - threat_model.epsilon).max().item()
    assert excess <= 1e-5, f"{norm} projection leaves the ball of radius {threat_model.epsilon} by {excess:.1e}"
    torch.testing.assert_close(p.double(), threat_model.project(v.double(), x.double()), rtol=0, atol=1e-5)


# Empty batches -------------------------------------------------------------------------------------------------------


@every_norm
def test_an_empty_batch_passes_through_everything(norm):
    threat_model, x = ThreatModel(norm=norm, epsilon=0.5), torch.zeros(0, 3, 8, 8)
    for result in (threat_model.project(x, x), threat_model.sample(x), threat_model.ascent_direction(x, x)):
        assert result.shape == x.shape
    assert threat_model.distance(x, x).shape == threat_model.contains(x, x).shape == (0,)


# Sampling ------------------------------------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_lie_inside_ball_and_box_and_vary(norm, dtype):
    threat_model = ThreatModel(norm=norm, epsilon=0.6)
    x = rand(50, 2, 3, dtype=dtype)
    sample = threat_model.sample(x, generator=seeded())
    assert sample.shape == x.shape
    assert sample.dtype == dtype
    assert threat_model.contains(sample, x, tolerance=1e-6).all()
    assert sample.min() >= 0
    assert sample.max() <= 1
    assert (threat_model.distance(sample, x) > 1e-3).all()


@every_norm
def test_samples_come_from_the_generator_alone(norm):
    threat_model, x = ThreatModel(norm=norm, epsilon=0.5), rand(4, 5)
    before = torch.get_rng_state()
    generator = seeded(3)
    first, second = (threat_model.sample(x, generator=generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, threat_model.sample(x, generator=seeded(3)))
    assert not torch.equal(first, second)


@every_norm
def test_samples_are_uniform_in_a_ball_that_the_box_does_not_cut(norm):
    """In d dimensions (radius / epsilon)^d is uniform on [0, 1], and by symmetry so are the signs and the axes."""
    threat_model = ThreatModel(norm=norm, epsilon=0.5, lower=-10, upper=10)
    x = torch.zeros(4000, 3, dtype=torch.float64)
    move = threat_model.sample(x, generator=seeded()) - x
    assert kstest(((length(move, norm) / 0.5) ** 3).numpy(), "uniform").pvalue > 1e-3
    longest = move.abs().argmax(1).bincount(minlength=3) / len(x)
    torch.testing.assert_close(longest, torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    torch.testing.assert_close((move > 0).double().mean(0), torch.full((3,), 0.5).double(), rtol=0, atol=0.03)


# Steepest ascent -----------------------------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("shape", [(5, 7), (5, 2, 3, 4), (1, 1)])
def test_ascent_direction_has_unit_length_and_reaches_the_dual_norm(norm, shape):
    gradient = randn(*shape)
    direction = ThreatModel(norm=norm).ascent_direction(gradient)
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    assert direction.shape == gradient.shape
    torch.testing.assert_close(length(direction, norm), torch.ones(shape[0], dtype=torch.float64))
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), length(gradient, dual))


@every_norm
def test_zero_gradient_gives_zero_direction(norm):
    gradient = torch.zeros(3, 2, 2)
    gradient[1] = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    direction = ThreatModel(norm=norm).ascent_direction(gradient, torch.full_like(gradient, 0.5))
    assert direction.isfinite().all()
    assert (direction[[0, 2]] == 0).all()
    torch.testing.assert_close(length(direction[1:2], norm), torch.ones(1))


@every_norm
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_ascent_direction_does_not_depend_on_the_scale_of_the_gradient(norm, scale):
    """A confident classifier has gradients near 1e-25 in single precision; their squares underflow."""
    threat_model, gradient = ThreatModel(norm=norm), randn(4, 6, dtype=torch.float32)
    torch.testing.assert_close(threat_model.ascent_direction(gradient * scale), threat_model.ascent_direction(gradient))


def test_l1_ascent_passes_over_coordinates_that_the_box_stops():
    threat_model = ThreatModel(norm="l1")
    gradient = torch.tensor([[5.0, -4.0, 1.0], [5.0, -4.0, 1.0], [5.0, -4.0, 1.0], [5.0, -4.0, 0.0]])
    x = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.5, 0.5], [1.0, 0.0, 0.5], [1.0, 0.0, 0.5]])
    want = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert torch.equal(threat_model.ascent_direction(gradient, x), want)


# Membership ----------------------------------------------------------------------------------------------------------


def test_distance_is_the_norm_per_example():
    x, x_adv = torch.zeros(2, 1, 2), torch.tensor([[[0.3, -0.4]], [[0.0, 1.0]]])
    for norm, want in {"linf": [0.4, 1.0], "l2": [0.5, 1.0], "l1": [0.7, 1.0]}.items():
        torch.testing.assert_close(ThreatModel(norm=norm).distance(x_adv, x), torch.tensor(want))


@every_norm
def test_contains_judges_ball_and_box_row_by_row(norm):
    threat_model = ThreatModel(norm=norm, epsilon=0.2)
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.95, 0.5], [0.05, 0.5]])
    x_adv = torch.tensor([[0.69, 0.5], [0.71, 0.5], [1.01, 0.5], [-0.01, 0.5]])
    assert threat_model.contains(x_adv, x).tolist() == [True, False, False, False]
    assert threat_model.contains(x_adv, x, tolerance=0.02).all()


def test_bounds_enclose_the_ball_and_leave_their_argument_alone():
    x = torch.tensor([[0.1, 0.5, 0.9]])
    lowest, highest = ThreatModel(norm="linf", epsilon=0.2).bounds(x)
    torch.testing.assert_close(lowest, torch.tensor([[0.0, 0.3, 0.7]]))
    torch.testing.assert_close(highest, torch.tensor([[0.3, 0.7, 1.0]]))
    assert torch.equal(x, torch.tensor([[0.1, 0.5, 0.9]]))


# Construction --------------------------------------------------------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
REMEDY = "for 8-bit images in [0, 1] write 8 / 255"
NO_NUMBER = "epsilon must be a number >= 0 in input units, got "
NOT_POSITIVE = "epsilon must be >= 0 in input units, got "


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"epsilon": 8},
            ValueError,
            f"epsilon must be at most 1 (= upper - lower) in input units for l_inf, got 8; {REMEDY}",
        ),
        ({"epsilon": 4, "upper": 3.0}, ValueError, "at most 3 (= upper - lower) in input units for l_inf, got 4"),
        ({"epsilon": -0.1}, ValueError, f"{NOT_POSITIVE}-0.1; {REMEDY}"),
        ({"epsilon": NAN}, ValueError, f"{NOT_POSITIVE}nan; {REMEDY}"),
        ({"epsilon": INFINITY, "norm": "l2"}, ValueError, f"{NOT_POSITIVE}inf; {REMEDY}"),
        ({"epsilon": "8/255"}, TypeError, f"{NO_NUMBER}'8/255'; {REMEDY}"),
        ({"epsilon": True}, TypeError, f"{NO_NUMBER}True; {REMEDY}"),
        ({"epsilon": None}, TypeError, f"{NO_NUMBER}None; {REMEDY}"),
        ({"epsilon": torch.tensor(0.1)}, TypeError, f"{NO_NUMBER}tensor(0.1000); write float(epsilon)"),
        ({"norm": "l_inf"}, ValueError, "norm must be one of 'linf', 'l2', 'l1', got 'l_inf'; write 'linf'"),
        ({"norm": "L2"}, ValueError, "got 'L2'; write 'l2'"),
        ({"norm": "Linf"}, ValueError, "got 'Linf'; write 'linf'"),
        ({"norm": "l3"}, ValueError, "norm must be one of 'linf', 'l2', 'l1', got 'l3'"),
        ({"norm": 2}, ValueError, "norm must be one of 'linf', 'l2', 'l1', got 2"),
        ({"lower": 1.0}, ValueError, "lower must be < upper (=1), got 1.0"),
        ({"lower": 0.5, "upper": -0.5}, ValueError, "lower must be < upper (=-0.5), got 0.5"),
        ({"lower": NAN}, ValueError, "lower must be a finite number, got nan"),
        ({"upper": INFINITY}, ValueError, "upper must be a finite number, got inf"),
        ({"upper": "1"}, TypeError, "upper must be a finite number, got '1'"),
    ],
)
def test_a_bad_threat_model_is_refused_in_one_sentence(arguments, error, text):
    with pytest.raises(error) as caught:
        ThreatModel(**arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)])
def test_numbers_of_other_libraries_become_floats_with_the_same_repr(number):
    threat_model = ThreatModel(epsilon=number, lower=-number, upper=number + number)
    assert repr(threat_model) == "ThreatModel(norm='linf', epsilon=0.5, lower=-0.5, upper=1.0)"
    assert ThreatModel(epsilon=np.float32(0.1)).epsilon == float(np.float32(0.1))
    assert repr(ThreatModel(epsilon=1)) == "ThreatModel(norm='linf', epsilon=1, lower=0.0, upper=1.0)"


def test_a_ball_as_wide_as_the_box_is_allowed():
    assert ThreatModel(norm="linf", epsilon=1).epsilon == 1
    assert ThreatModel(norm="l2", epsilon=8).epsilon == 8


def test_a_threat_model_is_a_frozen_value_with_a_log_line_for_a_repr():
    threat_model = ThreatModel(norm="l2", epsilon=0.5)
    assert repr(threat_model) == "ThreatModel(norm='l2', epsilon=0.5, lower=0.0, upper=1.0)"
    assert threat_model == ThreatModel(norm="l2", epsilon=0.5)
    assert len({threat_model, ThreatModel(norm="l2", epsilon=0.5)}) == 1
    with pytest.raises(AttributeError):
        threat_model.epsilon = 1.0
    with pytest.raises(TypeError):
        ThreatModel("l2", 0.5)

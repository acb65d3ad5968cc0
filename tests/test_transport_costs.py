"""Transport costs: closed forms, gradients by central differences, and one step of the ascent that pays them."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metarobust.threat_models import ThreatModel
from metarobust.transport_costs import HardBall, Insertion, NormPower, SoftHinge, TransportCost

NORMS = ("linf", "l2", "l1")


def uniform(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BALL = ThreatModel(norm="linf", epsilon=0.1)
COSTS = {
    **{f"ball_{norm}": HardBall(threat_model=ThreatModel(norm=norm, epsilon=0.3)) for norm in NORMS},
    **{f"{p}_{q}": NormPower(weight=0.7, norm=p, power=q) for p in NORMS for q in (0.5, 1.0, 1.5, 2.5)},
    "hinge": SoftHinge(threat_model=BALL, weight=3.0),
    "insertion": Insertion(weight=0.7, power=1.5),
    "insertion_concave": Insertion(weight=0.7, power=0.5),
}
POWERS = {name: cost for name, cost in COSTS.items() if isinstance(cost, NormPower)}
every_cost = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)


def points(cost, rows=5, dimensions=6):
    """x and a point of the domain, of shape ``[rows, 2, dimensions / 2]``."""
    x, moved = uniform(rows, 2, dimensions // 2), uniform(rows, 2, dimensions // 2, seed=3)
    if isinstance(cost, Insertion):
        x = (x > 0.5).double()
    return x, cost.project(moved, x)


@every_cost
def test_a_cost_is_a_frozen_value_that_is_zero_at_x_and_infinite_outside(cost):
    x, moved = points(cost)
    assert isinstance(cost, TransportCost)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cost.weight = 1.0
    assert cost.cost(x, x).shape == (5,)
    assert (cost.cost(x, x) == 0).all()
    assert (cost.cost(moved, x) >= 0).all()
    assert cost.cost(moved, x).isfinite().all()
    assert (cost.cost(x + 2, x) == torch.inf).all()
    assert (cost.cost(x - 2, x) == torch.inf).all()
    assert cost.cost(x[:0], x[:0]).shape == (0,)


@every_cost
def test_projections_lie_in_the_domain_and_stay_there(cost):
    x, _ = points(cost)
    wild = x + 3 * normal(*x.shape)
    projected = cost.project(wild, x)
    assert cost.cost(projected, x).isfinite().all()
    torch.testing.assert_close(cost.project(projected, x), projected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in COSTS if "ball" not in name])
def test_gradients_of_costs_are_central_differences(name):
    cost = COSTS[name]
    if isinstance(cost, Insertion):  # the formula is that of NormPower, on corners only
        cost = NormPower(weight=0.7, norm="l1", power=cost.power)
    x, moved = points(cost)
    moved.requires_grad_()
    (gradient,) = torch.autograd.grad(cost.cost(moved, x).sum(), moved)
    numeric, h = torch.zeros_like(moved), 1e-6
    with torch.no_grad():
        for index in itertools.product(*map(range, moved.shape)):
            shift = torch.zeros_like(moved)
            shift[index] = h
            numeric[index] = (cost.cost(moved + shift, x).sum() - cost.cost(moved - shift, x).sum()) / (2 * h)
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)
    assert gradient.abs().max() > 0.01


@every_cost
def test_the_gradient_at_x_is_zero_also_for_powers_below_one(cost):
    """The norm's own gradient to the power of q < 1 is infinite there, 0 * inf in autograd."""
    x, _ = points(cost)
    moved = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cost.cost(moved, x).sum(), moved)
    assert (gradient == 0).all()


def test_costs_by_hand():
    x, moved = torch.full((1, 3), 0.5), torch.tensor([[0.8, 0.5, 0.1]])  # moves of 0.3, 0, 0.4

    def price(cost, moved=moved, x=x):
        return cost.cost(moved, x).item()

    assert price(NormPower(weight=2.0, norm="l2", power=3.0)) == pytest.approx(2 * 0.5**3)
    assert price(NormPower(weight=2.0, norm="linf", power=0.5)) == pytest.approx(2 * 0.4**0.5)
    assert price(NormPower(weight=2.0, norm="l1", power=1.0)) == pytest.approx(2 * 0.7)
    assert price(SoftHinge(threat_model=BALL, weight=3.0)) == pytest.approx(1.5 * (0.2**2 + 0.3**2))
    assert price(HardBall(threat_model=ThreatModel(norm="l1", epsilon=0.71))) == 0
    assert price(HardBall(threat_model=ThreatModel(norm="l1", epsilon=0.69))) == math.inf
    bits, set_bits = torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 3)
    assert price(Insertion(weight=3.0, power=2.0), set_bits, bits) == 12
    assert price(Insertion(weight=3.0), bits * 0, bits) == math.inf, "a bit of x was removed"
    assert price(Insertion(weight=3.0), bits + 0.5 * (1 - bits), bits) == math.inf, "half a bit was set"


def test_rounding_does_not_throw_points_out_of_a_ball():
    """Many coordinates in low precision: the l1 length of a projected point exceeds epsilon by more than 1e-5."""
    for dtype, dimensions in ((torch.float32, 200_000), (torch.bfloat16, 300)):
        x = uniform(2, dimensions).to(dtype)
        for norm in NORMS:
            ball = ThreatModel(norm=norm, epsilon={"linf": 0.1, "l2": 3.0, "l1": 20.0}[norm])
            moved = ball.project(x + normal(2, dimensions).to(dtype), x)
            assert (HardBall(threat_model=ball).cost(moved, x) == 0).all()


# One step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in COSTS if "insertion" not in name])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_step_stays_in_the_domain_and_is_no_longer_than_allowed(name, data):
    cost = COSTS[name]
    seed, length = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.003, 0.05, 0.4, 5.0]))
    scale = data.draw(st.sampled_from([0.0, 0.1, 1.0, 30.0]))
    x = uniform(4, 5, seed=seed)
    start = cost.project(uniform(4, 5, seed=seed + 1), x)
    gradient = normal(4, 5, seed=seed) * data.draw(st.sampled_from([1e-12, 1.0, 1e6]))
    gradient[0] = 0
    moved = cost.step(start, x, gradient, scale=scale, length=length)
    assert cost.cost(moved, x).isfinite().all()
    assert (moved >= 0).all()
    assert (moved <= 1).all()
    ball = dataclasses.replace(cost.free_ball, epsilon=min(1.0, length))
    longest = length * (2 if isinstance(cost, HardBall) else 1)  # a projection onto a convex set does not lengthen it in l2 only
    assert (ball.distance(moved, start) <= longest + 1e-9).all()


@pytest.mark.parametrize("name", POWERS)
def test_the_price_is_read_at_the_current_point(name):
    """A step goes outward while the loss gains more than the scaled cost there, and back where it gains less."""
    cost, x = POWERS[name], torch.full((2, 4), 0.5, dtype=torch.float64)
    direction = {"linf": [1, 1, -1, 1], "l2": [0.5, 0.5, -0.5, 0.5], "l1": [0, 0, -1, 0]}[cost.norm]
    direction = torch.tensor(direction, dtype=torch.float64)
    slopes = {"linf": [0.4, 0.3, -0.2, 0.1], "l2": [0.5, 0.5, -0.5, 0.5], "l1": [0.1, 0.2, -1.0, 0.3]}[cost.norm]
    slopes = torch.tensor(slopes, dtype=torch.float64)  # dual norm 1
    radius, length, scale = 0.25, 0.01, 3.0
    balance = scale * cost.weight * cost.power * radius ** (cost.power - 1)
    gradient = torch.stack([1.05 * balance * slopes, 0.95 * balance * slopes])
    moved = cost.step(x + radius * direction, x, gradient, scale=scale, length=length)
    outward, inward = 0.26, 0.24
    if cost.power > 1:  # no further than the maximiser of the linear loss
        factors = [factor ** (1 / (cost.power - 1)) for factor in (1.05, 0.95)]
        outward = min(outward, factors[0] * radius)
        inward = max(inward, factors[1] * radius) if cost.norm == "l2" else inward
    expected = torch.tensor([outward, inward], dtype=torch.float64)
    torch.testing.assert_close(cost.free_ball.distance(moved, x), expected)
    torch.testing.assert_close(moved, x + expected[:, None] * direction)


@pytest.mark.parametrize("norm", NORMS)
def test_coordinates_that_the_box_holds_take_no_part_of_a_step(norm):
    x = torch.tensor([[1.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
    gradient = torch.tensor([[100.0, -100.0, 1.0, -0.5]], dtype=torch.float64)
    cost = NormPower(weight=1.0, norm=norm)
    moved = cost.step(x, x, gradient, scale=1.0, length=0.1)
    assert cost.free_ball.distance(moved, x).item() == pytest.approx(0.1)
    assert torch.equal(moved[:, :2], x[:, :2])


@pytest.mark.parametrize("power", [1.1, 1.5, 2.0, 3.0, 5.0])
def test_a_long_l2_step_ends_in_the_maximiser_within_the_box(power):
    x, gradient, tolerance = uniform(9, 7), normal(9, 7), 1e-2 if power < 1.5 else 1e-4
    for radius in (0.02, 0.5, 1.3):
        cost = NormPower(weight=1.0, power=power)
        scale = float(torch.linalg.vector_norm(gradient, dim=1).mean()) / (power * radius ** (power - 1))
        family = [(gradient * t).clamp(-x, 1 - x) for t in torch.logspace(-8, 4, 3001).double()]
        best = torch.stack([(d * gradient).sum(1) - scale * cost.cost(x + d, x) for d in family]).amax(0)
        for start in (x, cost.project(x + 0.1 * normal(9, 7, seed=5), x)):
            moved = cost.step(start, x, gradient, scale=scale, length=100.0)
            assert ((moved - x) * gradient).sum(1).sub(scale * cost.cost(moved, x)).ge(best * (1 - tolerance)).all()
    for dtype in (torch.float16, torch.float32, torch.float64):  # nothing overflows, nothing is 0 / 0
        for size in (0.0, 1e-30, 1e-4, 1e4):
            moved = cost.step(x.to(dtype), x.to(dtype), (size * gradient).to(dtype), scale=scale, length=0.1)
            assert moved.isfinite().all()
    torch.testing.assert_close(cost.step(x, x, 0 * gradient, scale=scale, length=0.1), x)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_steps_where_the_norm_has_kinks_are_the_best_of_a_grid(norm):
    """The step maximises gradient . x' - slope * norm exactly, where it may go: no grid point does better."""
    cost, length = NormPower(weight=1.0, norm=norm, power=1.0), 0.2
    ticks = torch.linspace(0, 1, 101, dtype=torch.float64)
    grid = torch.cartesian_prod(ticks, ticks)
    for seed in range(60):
        x, start = (torch.round(uniform(1, 2, seed=k) * 100) / 100 for k in (2 * seed, 2 * seed + 1))
        gradient, scale = normal(1, 2, seed=seed), float(uniform(1, seed=seed)) * 2
        moved = cost.step(start, x, gradient, scale=scale, length=length)

        def gain(z, x=x, gradient=gradient, scale=scale):
            return (z * gradient).sum(1) - scale * cost.free_ball.distance(z, x)

        near = grid[cost.free_ball.distance(grid, start) <= length + 1e-9]
        if norm == "l1":  # a coordinate stops at x
            near = near[((near - x) * (start - x) >= -1e-9).all(1)]
        assert gain(moved) >= gain(near).max() - 1e-9


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "text"),
    [
        (NormPower, {"weight": 0.0}, ValueError, "weight must be a finite number > 0, got 0.0"),
        (NormPower, {"weight": 1.0, "norm": "l3"}, ValueError, "norm must be one of 'linf', 'l2', 'l1', got 'l3'"),
        (NormPower, {"weight": 1.0, "power": 0}, ValueError, "power must be a finite number > 0, got 0"),
        (NormPower, {"weight": 1.0, "lower": 1.0}, ValueError, "lower must be < upper (=1), got 1.0"),
        (HardBall, {"threat_model": 0.1}, TypeError, "threat_model must be a ThreatModel, got 0.1"),
        (SoftHinge, {"threat_model": ThreatModel(norm="l2"), "weight": 1.0}, ValueError,
         "threat_model must be an l_inf ball for SoftHinge, got norm='l2'; write norm='linf'"),
        (Insertion, {"weight": -1.0}, ValueError, "weight must be a finite number > 0, got -1.0"),
        (Insertion, {"weight": 1.0, "power": math.inf}, ValueError, "power must be a finite number > 0, got inf"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_sentence(kind, arguments, error, text):
    with pytest.raises(error) as caught:
        kind(**arguments)
    assert text in str(caught.value)

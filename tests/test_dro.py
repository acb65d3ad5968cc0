"""Divergences and the worst-case expectation: brute-force primal, limits, derivatives by central differences, invariances."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from metarobust.divergences import KL, Alpha, Divergence, Renyi
from metarobust.dro import WorstCase, worst_case_expectation

DIVERGENCES: list[Any] = [
    KL(),
    Alpha(order=1.1),
    Alpha(order=2),
    Alpha(order=5),
    Renyi(order=0.5),
    Renyi(order=1.25),
    Renyi(order=2.95),
]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def random_problem(seed: int, n: int = 4, candidates: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and costs ``[n, candidates]``, the first candidate natural and of cost 0, and base weights."""
    random = np.random.default_rng(seed)
    losses = np.sort(random.exponential(size=(n, candidates)), axis=1)
    costs = np.sort(0.3 * random.random((n, candidates)), axis=1)
    costs[:, 0] = 0
    return tensor(losses), tensor(costs), tensor(random.dirichlet(np.full(n, 3.0)))


# The divergences


def reference_divergence(divergence: Any, w: np.ndarray, base: np.ndarray) -> tuple[float, np.ndarray]:
    """The definition (armor spec, section 1) for positive weights, and its gradient in them."""
    ratio = w / base
    if isinstance(divergence, KL):
        return float(w @ np.log(ratio)), np.log(ratio) + 1
    a = divergence.order
    if isinstance(divergence, Alpha):
        return float(base @ (ratio**a - 1)) / (a * (a - 1)), ratio ** (a - 1) / (a - 1)
    total = float(base @ ratio ** (1 - a))
    return math.log(total) / (a * (a - 1)), -(ratio**-a) / (a * total)


@every_divergence
def test_a_divergence_is_its_definition(divergence: Divergence) -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        w, base = random.dirichlet(np.ones(6), size=2)
        torch.testing.assert_close(divergence(tensor(w), tensor(base)), tensor(reference_divergence(divergence, w, base)[0]))
    assert divergence(tensor(base), tensor(base)).abs() < 1e-14
    assert divergence(tensor(np.full(4, 0.25))).abs() < 1e-14


def test_weight_outside_the_sample_is_infinitely_far() -> None:
    for divergence in DIVERGENCES:
        assert divergence(tensor([0.5, 0.5]), tensor([1.0, 0.0])) == math.inf
    assert Renyi(order=2)(tensor([1.0, 0.0])) == math.inf


@pytest.mark.parametrize("make", [lambda: Alpha(order=1), lambda: Alpha(order=0.5), lambda: Alpha(order=math.inf)])
def test_alpha_needs_an_order_above_1(make: Any) -> None:
    with pytest.raises(ValueError, match="order must be"):
        make()


@pytest.mark.parametrize("order", [0, -1, 1, math.nan])
def test_renyi_needs_a_positive_order_other_than_1(order: float) -> None:
    with pytest.raises(ValueError, match="order must be"):
        Renyi(order=order)


def test_divergences_reject_what_is_no_distribution() -> None:
    with pytest.raises(ValueError, match="weights must be a distribution"):
        KL()(torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match=r"base_weights must be of shape \[2\]"):
        KL()(torch.tensor([0.5, 0.5]), torch.full((3,), 1 / 3))
    with pytest.raises(TypeError, match="weights must be a floating-point tensor"):
        KL()(torch.tensor([1, 0]))


# The primal problem


def primal(divergence: Any, losses: Tensor, costs: Tensor, base: Tensor, radius: float, kappa: float, near: Tensor) -> float:
    """The convex program over the weights of all candidates, by SLSQP from the natural point and from between it and ``near``.

    Every local maximum is global; but the method may get stuck, hence two starts.
    """
    gains, c, p = losses.numpy(), costs.numpy(), base.numpy()
    (n, m), least = gains.shape, 1e-11

    def budget(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = reference_divergence(divergence, flat.reshape(n, m).sum(1), p)
        return value + float(flat @ c.ravel()), np.repeat(slope, m) + c.ravel()

    natural = np.zeros((n, m))
    natural[:, 0] = p
    best = -math.inf
    for start in (natural, (natural + near.numpy()) / 2):
        found = minimize(
            lambda x: kappa * budget(x)[0] - x @ gains.ravel(),
            np.maximum(start.ravel(), least),
            jac=lambda x: kappa * budget(x)[1] - gains.ravel(),
            bounds=[(least, 1)] * (n * m),
            constraints=[
                {"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
                {"type": "ineq", "fun": lambda x: radius - budget(x)[0], "jac": lambda x: -budget(x)[1]},
            ],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        if budget(found.x)[0] <= radius + 1e-9 and abs(found.x.sum() - 1) < 1e-9:
            best = max(best, -float(found.fun))
    return best


def checked(divergence: Any, losses: Tensor, costs: Tensor | None, base: Tensor, radius: float, kappa: float) -> WorstCase:
    """The solution, after its weights proved feasible and as good as the value says: a lower bound on the primal value."""
    worst = worst_case_expectation(losses, divergence=divergence, radius=radius, kappa=kappa, base_weights=base, costs=costs)
    table = worst.weights.reshape(len(losses), -1)
    assert worst.converged
    assert (table >= 0).all()
    torch.testing.assert_close(table.sum(), tensor(1.0), rtol=0, atol=1e-12)
    spent = tensor(worst.reweighting + worst.transport)
    distance = divergence(table.sum(1), base / base.sum())
    torch.testing.assert_close(distance, tensor(worst.reweighting), rtol=1e-8, atol=1e-12)
    transport = tensor(0.0) if costs is None else (table * torch.where(table > 0, costs.reshape(table.shape), 0)).sum()
    torch.testing.assert_close(transport, tensor(worst.transport), rtol=1e-10, atol=1e-14)
    assert spent <= radius * (1 + 1e-9)
    assert worst.multiplier == 0 or spent >= radius * (1 - 1e-9)
    attained = (table * losses.reshape(table.shape)).sum() - kappa * spent
    torch.testing.assert_close(attained, worst.value, rtol=1e-9, atol=1e-9)
    return worst


PROBLEMS = ((0, 0.03), (1, 0.3), (2, 0.03), (3, 0.3), (4, 1.0), (5, 0.1), (6, 3.0), (7, 1e-3))


@pytest.mark.parametrize("kappa", [0.0, 0.1])
@every_divergence
def test_the_dual_equals_the_primal(divergence: Divergence, kappa: float) -> None:
    for seed, radius in PROBLEMS:
        losses, costs, base = random_problem(seed, n=2 + seed % 4)
        worst = checked(divergence, losses, costs, base, radius, kappa)
        assert abs(primal(divergence, losses, costs, base, radius, kappa, worst.weights) - worst.value) < 1e-6


def test_the_problems_above_include_kinks_and_idle_budgets() -> None:
    mixed, idle = 0, 0
    for kappa in (0.0, 0.1):
        for seed, radius in PROBLEMS:
            losses, costs, base = random_problem(seed, n=2 + seed % 4)
            worst = checked(KL(), losses, costs, base, radius, kappa)
            mixed += bool(((worst.weights > 0).sum(1) > 1).any())
            idle += worst.multiplier == 0
    assert mixed >= 2
    assert idle >= 1


def dual(divergence: Any, losses: Tensor, costs: Tensor, base: Tensor, multiplier: float, scale: float, radius: float) -> float:
    """The dual function of the armor spec, section 1, at one multiplier: above the primal value wherever it is evaluated."""
    phi, p, s = (losses - scale * costs).amax(1).numpy(), base.numpy(), scale
    if isinstance(divergence, KL):
        shift = phi.max()
        return multiplier * radius + shift + s * math.log(float(p @ np.exp((phi - shift) / s)))
    a = divergence.order
    if isinstance(divergence, Alpha):

        def inner(nu: float) -> float:
            y = np.maximum(phi - nu, 0) / s
            conjugate = (a - 1) ** (a / (a - 1)) / a * y ** (a / (a - 1)) + 1 / (a * (a - 1))
            return nu + s * float(p @ conjugate)

        bounds = (phi.min() - 2 * s / (a - 1), phi.max())
    else:

        def inner(q: float) -> float:
            rho = phi.max() + math.exp(q)
            total = float(p @ (rho - phi) ** ((a - 1) / a))
            return rho - s / (a - 1) * math.log(total) + s / a * (math.log(s) - math.log(a) - 1)

        bounds = (math.log(s / a) - 25, math.log(s / a))
    found = minimize_scalar(inner, bounds=bounds, method="bounded", options={"xatol": 1e-12, "maxiter": 500})
    return multiplier * radius + float(found.fun)


@pytest.mark.parametrize("kappa", [0.0, 0.1])
@every_divergence
def test_a_batch_attains_the_dual_bound(divergence: Divergence, kappa: float) -> None:
    """Feasible weights attain the value (a lower bound), and the dual of the spec at the multiplier reaches no lower."""
    for seed, radius in ((0, 1e-3), (1, 0.05), (2, 0.4), (3, 1.5)):
        losses, costs, base = random_problem(seed, n=128, candidates=3)
        worst = checked(divergence, losses, costs, base, radius, kappa)
        upper = dual(divergence, losses, costs, base, worst.multiplier, worst.scale, radius)
        assert abs(upper - worst.value) < 1e-8


# Derivatives


def solved(divergence: Any, base: Tensor, inputs: list[Tensor]) -> WorstCase:
    """The solution as a function of losses, radius, kappa and, if given, costs of all candidates but the first."""
    losses, radius, kappa, *costs = inputs
    return worst_case_expectation(
        losses,
        divergence=divergence,
        radius=radius,
        kappa=kappa,
        base_weights=base,
        costs=torch.cat([torch.zeros_like(costs[0][:, :1]), costs[0]], 1) if costs else None,
    )


def jacobian(function: Any, inputs: list[Tensor]) -> Tensor:
    inputs = [x.clone().requires_grad_() for x in inputs]
    found = function(inputs)
    rows = [torch.autograd.grad(entry, inputs, retain_graph=True) for entry in found]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def central_differences(function: Any, inputs: list[Tensor], step: float) -> Tensor:
    columns = []
    for position, x in enumerate(inputs):
        for entry in range(x.numel()):
            sides = []
            for sign in (1, -1):
                moved = x.clone()
                moved.view(-1)[entry] += sign * step
                sides.append(function([*inputs[:position], moved, *inputs[position + 1 :]]).detach())
            columns.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(columns, 1)


def check_derivatives(divergence: Any, base: Tensor, inputs: list[Tensor], step: float = 1e-5) -> None:
    def function(x: list[Tensor]) -> Tensor:
        worst = solved(divergence, base, x)
        return torch.cat([worst.value[None], worst.weights.flatten()])

    claimed, measured = jacobian(function, inputs), central_differences(function, inputs, step)
    torch.testing.assert_close(claimed[0], measured[0], rtol=1e-6, atol=1e-8, msg=lambda m: f"value: {m}")
    torch.testing.assert_close(claimed[1:], measured[1:], rtol=1e-5, atol=1e-7, msg=lambda m: f"weights: {m}")
    assert claimed[1:].abs().max() > 1e-3 or not claimed[1:].any()


@pytest.mark.parametrize(("radius", "kappa"), [(0.05, 0.0), (0.4, 0.0), (0.1, 0.2), (1.5, 2.0)])
@every_divergence
def test_derivatives_of_value_and_weights_without_costs(divergence: Divergence, radius: float, kappa: float) -> None:
    losses, _, base = random_problem(0, n=5)
    worst = worst_case_expectation(losses[:, 1], divergence=divergence, radius=radius, kappa=kappa, base_weights=base)
    assert kappa < 2 or worst.multiplier == 0, "the last case is that of an idle budget"
    inputs = [losses[:, 1], tensor(radius), tensor(kappa)]
    inputs = inputs if kappa else [inputs[0], inputs[1], tensor(1e-2)]
    check_derivatives(divergence, base, inputs)
    check_second_derivatives(divergence, base, inputs)


@pytest.mark.parametrize("regime", ["smooth", "kink", "idle"])
@every_divergence
def test_derivatives_of_value_and_weights_with_costs(divergence: Divergence, regime: str) -> None:
    done = 0
    for seed in range(30):
        losses, costs, base = random_problem(seed, n=3, candidates=3)
        radius, kappa = (2.0, 1.0) if regime == "idle" else (0.2, 0.05)
        worst = worst_case_expectation(losses, divergence=divergence, radius=radius, kappa=kappa, base_weights=base, costs=costs)
        share = (worst.weights / worst.weights.sum(1, keepdim=True).clamp(min=1e-9)).flatten()
        mixed = share[(share > 0) & (share < 1)]
        found = "idle" if worst.multiplier == 0 else "kink" if len(mixed) else "smooth"
        if found != regime or (mixed < 0.02).any():
            continue
        check_derivatives(divergence, base, [losses, tensor(radius), tensor(kappa), costs[:, 1:]], step=1e-6)
        if done == 1:
            check_second_derivatives(divergence, base, [losses, tensor(radius), tensor(kappa), costs[:, 1:]])
            return
        done += 1
    pytest.fail("fewer than two such problems")


def test_the_derivative_of_float32_losses_arrives_in_float32() -> None:
    losses = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)
    radius = torch.tensor(0.2, requires_grad=True)
    worst = worst_case_expectation(losses, divergence=KL(), radius=radius)
    assert (worst.value.dtype, worst.weights.dtype) == (torch.float32, torch.float32)
    by_losses, by_radius = torch.autograd.grad(worst.value, [losses, radius], retain_graph=True)
    torch.testing.assert_close(by_losses, worst.weights.detach())
    torch.testing.assert_close(by_radius, torch.tensor(worst.multiplier, dtype=torch.float32))
    (learned,) = torch.autograd.grad((worst.weights * losses.detach()).sum(), radius)
    torch.testing.assert_close(learned, by_radius)  # the mean loss under the weights grows by the multiplier as well


def test_the_value_may_be_differentiated_twice_but_the_weights_once() -> None:
    losses = tensor([0.0, 1.0, 3.0]).requires_grad_()
    worst = worst_case_expectation(losses, divergence=KL(), radius=0.2)
    (gradient,) = torch.autograd.grad(worst.weights[0], losses, create_graph=True)
    with pytest.raises(RuntimeError, match="weights .* once, and its value twice"):
        torch.autograd.grad(gradient.square().sum(), losses)


def check_second_derivatives(divergence: Any, base: Tensor, inputs: list[Tensor]) -> None:
    """The gradient of the value, as a function of its inputs: its Jacobian against central differences."""

    def gradient(x: list[Tensor]) -> Tensor:
        x = [entry if entry.requires_grad else entry.clone().requires_grad_() for entry in x]
        found = torch.autograd.grad(solved(divergence, base, x).value, x, create_graph=True)
        return torch.cat([part.flatten() for part in found])

    claimed, measured = jacobian(gradient, inputs), central_differences(gradient, inputs, 1e-6)
    torch.testing.assert_close(claimed, measured, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(claimed, claimed.T, rtol=1e-8, atol=1e-9)


@every_divergence
def test_a_radius_is_learned_through_a_training_step(divergence: Divergence) -> None:
    """One gradient step on the value, then a fresh loss: its derivative in the radius, against central differences."""
    random = np.random.default_rng(0)
    x, fresh = tensor(random.normal(size=(8, 3))), tensor(random.normal(size=(5, 3)))

    def after_a_step(inputs: list[Tensor]) -> Tensor:
        theta = tensor([0.3, -0.2, 0.5]).requires_grad_()
        losses = torch.nn.functional.softplus(x @ theta)
        value = worst_case_expectation(losses, divergence=divergence, radius=inputs[0]).value
        (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
        return torch.nn.functional.softplus(fresh @ (theta - gradient)).sum()[None]

    radius = [tensor(0.1)]
    claimed, measured = jacobian(after_a_step, radius), central_differences(after_a_step, radius, 1e-6)
    torch.testing.assert_close(claimed, measured, rtol=1e-6, atol=1e-8)
    assert claimed.abs() > 1e-3


def test_duplicates_at_a_kink_are_treated_alike() -> None:
    losses = tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.1]]).requires_grad_()
    costs = tensor([[0.0, 0.5], [0.0, 0.5], [0.0, 0.4]])
    worst = worst_case_expectation(losses, divergence=KL(), radius=0.15, costs=costs)
    assert (worst.weights[:2] > 0).all(), "both candidates of both are used: the kink"
    torch.testing.assert_close(worst.weights[0], worst.weights[1])
    (gradient,) = torch.autograd.grad(worst.weights[:2, 1].sum(), losses)
    torch.testing.assert_close(gradient[0], gradient[1])


# Limits


@every_divergence
def test_radius_0_is_the_mean_of_the_worst_losses_in_a_hard_ball(divergence: Divergence) -> None:
    losses, _, base = random_problem(3, n=5)
    worst = checked(divergence, losses, None, base, 0.0, 0.0)
    torch.testing.assert_close(worst.value, base @ losses[:, 1])
    torch.testing.assert_close(worst.weights.sum(1), base)
    assert (worst.multiplier, worst.reweighting) == (math.inf, 0.0)
    torch.testing.assert_close(checked(divergence, losses, None, base, 0.0, 0.7).value, base @ losses[:, 1])


@every_divergence
def test_radius_0_is_the_mean_natural_loss_with_costs(divergence: Divergence) -> None:
    losses, costs, base = random_problem(3, n=5)
    worst = checked(divergence, losses, costs, base, 0.0, 0.0)
    torch.testing.assert_close(worst.value, base @ losses[:, 0])
    losses.requires_grad_()
    worst = worst_case_expectation(losses, divergence=divergence, radius=0.0, base_weights=base, costs=costs)
    (gradient,) = torch.autograd.grad(worst.value, losses)
    torch.testing.assert_close(gradient, torch.stack([base, torch.zeros_like(base)], 1))
    assert not torch.autograd.grad(worst.weights.square().sum(), losses)[0].any()
    losses = losses.detach()
    near = checked(divergence, losses, costs, base, 1e-14, 0.0)
    torch.testing.assert_close(near.value, worst.value, rtol=0, atol=1e-5)


@every_divergence
def test_small_radii_add_a_standard_deviation(divergence: Divergence) -> None:
    losses, _, base = random_problem(5, n=8)
    mean = base @ losses[:, 1]
    deviation = (base @ (losses[:, 1] - mean).square()).sqrt()
    for radius in (1e-4, 1e-8, 1e-16, 1e-24):
        worst = checked(divergence, losses[:, 1], None, base, radius, 0.0)
        near = 20 * math.sqrt(radius) * deviation
        assert abs((worst.value - mean) - math.sqrt(2 * radius) * deviation) <= near * math.sqrt(radius) + 1e-15
        assert abs(worst.multiplier * math.sqrt(2 * radius) - deviation) <= near + 1e-15


@pytest.mark.parametrize(
    ("divergence", "threshold"),
    [(KL(), math.log(8))]
    + [(Alpha(order=a), (8 ** (a - 1) - 1) / (a * (a - 1))) for a in (1.1, 2, 5)]
    + [(Renyi(order=0.5), math.log(8) / 0.5)],
    ids=repr,
)
def test_the_maximum_is_reached_at_the_threshold(divergence: Divergence, threshold: float) -> None:
    losses = tensor([0.1, 3.0, 0.2, 2.9, 1.0, 1.1, 0.0, 2.0])
    above = worst_case_expectation(losses, divergence=divergence, radius=threshold * (1 + 1e-9))
    assert (above.multiplier, above.value) == (0.0, 3.0)
    assert above.reweighting == pytest.approx(threshold, rel=1e-12)
    torch.testing.assert_close(above.weights, tensor([0.0, 1, 0, 0, 0, 0, 0, 0]), rtol=0, atol=1e-15)
    below = worst_case_expectation(losses, divergence=divergence, radius=threshold * (1 - 1e-6))
    assert below.multiplier > 0
    assert below.value < 3.0


@pytest.mark.parametrize("order", [1.25, 2.95, 30])
def test_renyi_above_1_reaches_the_maximum_at_no_radius(order: float) -> None:
    losses = tensor([0.0, 1.0, 2.0])
    values = [worst_case_expectation(losses, divergence=Renyi(order=order), radius=r) for r in (0.5, 1.0, 2.0, 1e4)]
    assert all(a.value < b.value for a, b in pairwise(values[:3])) or order == 30
    assert (values[-1].weights[:2] < 1e-6).all()
    torch.testing.assert_close(values[-1].value, tensor(2.0))


@every_divergence
def test_a_large_radius_shares_the_maximum_by_base_weights(divergence: Divergence) -> None:
    losses, base = tensor([0.5, 2.0, 2.0, 1.0]), tensor([0.1, 0.2, 0.6, 0.1])
    worst = worst_case_expectation(losses, divergence=divergence, radius=1e3, base_weights=base)
    torch.testing.assert_close(worst.value, tensor(2.0))
    torch.testing.assert_close(worst.weights, tensor([0, 0.25, 0.75, 0]), rtol=0, atol=1e-6)
    expected = -math.log(0.8) if isinstance(divergence, KL) else None
    assert expected is None or worst.reweighting == pytest.approx(expected)


def test_the_threshold_with_transport() -> None:
    """KL: -log sum P exp(-cost of reaching the maximum), armor spec section 3."""
    losses, costs = tensor([[0.0, 1.0, 1.0], [0.5, 0.8, 1.0]]), tensor([[0.0, 0.3, 0.2], [0.0, 0.1, 0.6]])
    threshold = -math.log((math.exp(-0.2) + math.exp(-0.6)) / 2)
    above = worst_case_expectation(losses, divergence=KL(), radius=threshold + 1e-9, costs=costs)
    assert (above.value, above.multiplier) == (1.0, 0.0)
    assert above.reweighting + above.transport == pytest.approx(threshold)
    assert worst_case_expectation(losses, divergence=KL(), radius=threshold - 1e-6, costs=costs).value < 1.0


@every_divergence
def test_equal_losses_keep_the_base_weights(divergence: Divergence) -> None:
    for kappa in (0.0, 0.1):
        for radius in (0.0, 1e-3, 10.0):
            worst = worst_case_expectation(torch.full((5,), 1.7), divergence=divergence, radius=radius, kappa=kappa)
            assert (worst.multiplier, worst.reweighting, worst.transport) == (0.0, 0.0, 0.0)
            torch.testing.assert_close(worst.value, torch.tensor(1.7))
            torch.testing.assert_close(worst.weights, torch.full((5,), 0.2))


@every_divergence
def test_one_example(divergence: Divergence) -> None:
    assert worst_case_expectation(tensor([2.5]), divergence=divergence, radius=0.3, kappa=0.1).value == 2.5
    # One candidate of loss 1 and cost 1/2 beside the natural one: the share that the budget allows moves.
    losses = tensor([[0.0, 1.0]]).requires_grad_()
    worst = worst_case_expectation(losses, divergence=divergence, radius=0.2, costs=tensor([[0.0, 0.5]]))
    torch.testing.assert_close(worst.weights, tensor([[0.6, 0.4]]))
    torch.testing.assert_close(worst.value, tensor(0.4))
    assert worst.multiplier == pytest.approx(2)
    assert (worst.reweighting, worst.transport) == (0.0, pytest.approx(0.2))
    (gradient,) = torch.autograd.grad(worst.value, losses)
    torch.testing.assert_close(gradient, worst.weights.detach())


@every_divergence
def test_extreme_offsets_spreads_and_radii(divergence: Divergence) -> None:
    losses, _, base = random_problem(9, n=7)
    losses = losses[:, 1]
    plain = worst_case_expectation(losses, divergence=divergence, radius=0.2, base_weights=base)
    offset = worst_case_expectation(losses + 1e6, divergence=divergence, radius=0.2, base_weights=base)
    torch.testing.assert_close(offset.value - 1e6, plain.value, rtol=0, atol=1e-8)
    torch.testing.assert_close(offset.weights, plain.weights, rtol=1e-6, atol=1e-9)
    for scale in (1e-12, 1e-200, 1e200):
        scaled = worst_case_expectation(losses * scale, divergence=divergence, radius=0.2, base_weights=base)
        torch.testing.assert_close(scaled.value / scale, plain.value)
        torch.testing.assert_close(scaled.weights, plain.weights)
    for radius in (1e-300, 1e-30, 1e-10, 50.0, 1e10, 1e300):
        for kappa in (0.0, 1e-8, 1e8):
            checked(divergence, losses, None, base, radius, kappa)


@pytest.mark.parametrize(
    "divergence", [Alpha(order=10), Alpha(order=40), Alpha(order=1 + 1e-7), Renyi(order=40), Renyi(order=1e-3)]
)
def test_extreme_orders(divergence: Divergence) -> None:
    """At high orders an example turns active so steeply that its weight jumps between neighbouring numbers."""
    for seed in range(10):
        losses, costs, base = random_problem(seed, n=5)
        for radius in (1e-3, 0.05, 0.5, 3.0):
            checked(divergence, losses[:, 1], None, base, radius, 0.0)
            checked(divergence, losses, costs, base, radius, 0.05)


def test_alpha_and_renyi_tend_to_kl() -> None:
    losses, costs, base = random_problem(2, n=5)
    for radius in (1e-3, 0.1, 0.6):
        values = [
            worst_case_expectation(losses, divergence=d, radius=radius, base_weights=base, costs=costs)
            for d in (KL(), Alpha(order=1 + 1e-6), Renyi(order=1e-6))
        ]
        for other in values[1:]:
            torch.testing.assert_close(other.value, values[0].value, rtol=0, atol=1e-5)
            torch.testing.assert_close(other.weights, values[0].weights, rtol=0, atol=1e-4)


@every_divergence
def test_examples_of_base_weight_0_are_left_out(divergence: Divergence) -> None:
    losses, costs, base = random_problem(6, n=4)
    more = torch.cat([losses[:1] + 50, losses, losses[:1] - 50])
    zeros = torch.cat([tensor([0.0]), base, tensor([0.0])])
    found = checked(divergence, more, torch.cat([costs[:1], costs, costs[:1]]), zeros, 0.2, 0.0)
    expected = checked(divergence, losses, costs, base, 0.2, 0.0)
    torch.testing.assert_close(found.value, expected.value)
    torch.testing.assert_close(found.weights[1:-1], expected.weights)
    assert not found.weights[[0, -1]].any()


def test_base_weights_are_normalised() -> None:
    losses, costs, base = random_problem(6, n=4)
    found = worst_case_expectation(losses, divergence=KL(), radius=0.2, base_weights=7 * base.float(), costs=costs)
    expected = worst_case_expectation(losses, divergence=KL(), radius=0.2, base_weights=base, costs=costs)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-6, atol=0)


@every_divergence
def test_small_divergences_are_as_precise_as_large_ones(divergence: Divergence) -> None:
    """D / size^2 is nearly linear in the size of z, also where a series takes over."""
    z, base = np.array([-1.0, -0.3, 0.0]), np.array([0.2, 0.1, 0.7])

    def curve(size: float) -> float:
        return divergence.tilt(size * z, base).divergence / size**2

    for size in (1e-3, 1e-4, 5e-5, 2e-5, 1e-5):
        line = curve(4 * size) + 3 * (curve(3 * size) - curve(4 * size))
        assert abs(curve(size) / line - 1) < 50 * size**2 + 1e-10
    assert curve(1e-9) == pytest.approx(curve(1e-5), rel=1e-4)


@every_divergence
def test_a_rare_outlier_that_nearly_fixes_the_scale(divergence: Divergence) -> None:
    """The budget may fall so steeply in s that neighbouring numbers spend too much and too little."""
    losses, base = tensor([1300.0, 0.07, 1.47]), tensor([2e-26, 1e-23, 1.0])
    for radius in 10.0 ** np.arange(-11, -5, 0.5):
        checked(divergence, losses, None, base, radius, 0.0)


def test_an_infinite_cost_takes_a_candidate_away() -> None:
    losses, costs, base = random_problem(6, n=4)
    more = torch.cat([losses, tensor([[9.0], [8.0], [1.0], [2.0]])], 1)
    walls = torch.cat([costs, torch.full((4, 1), math.inf, dtype=torch.float64)], 1)
    for kappa, radius in ((0.0, 0.2), (0.1, 0.0), (0.0, 50.0)):
        found = worst_case_expectation(more, divergence=KL(), radius=radius, kappa=kappa, base_weights=base, costs=walls)
        expected = worst_case_expectation(losses, divergence=KL(), radius=radius, kappa=kappa, base_weights=base, costs=costs)
        torch.testing.assert_close(found.value, expected.value)
        torch.testing.assert_close(found.weights[:, :2], expected.weights)


def test_candidates_in_a_hard_ball_count_by_the_worst() -> None:
    losses, _, base = random_problem(8, n=6, candidates=4)
    found = checked(KL(), losses, None, base, 0.2, 0.05)
    expected = checked(KL(), losses.amax(1), None, base, 0.2, 0.05)
    torch.testing.assert_close(found.value, expected.value)
    torch.testing.assert_close(found.weights.sum(1), expected.weights)


# Invariances


weighted_losses = st.lists(st.tuples(st.floats(-10, 10), st.floats(0.01, 1)), min_size=1, max_size=12)
radii = st.floats(-8, 2).map(lambda exponent: 10**exponent)
anything = settings(max_examples=12, deadline=None, derandomize=True)


def case(entries: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    losses, base = tensor(entries).T
    return losses, base / base.sum()


@every_divergence
@anything
@given(entries=weighted_losses, radius=radii, kappa=st.sampled_from([0.0, 0.1, 3.0]), factor=st.floats(0.01, 100))
def test_invariances(divergence: Divergence, entries: Any, radius: float, kappa: float, factor: float) -> None:
    losses, base = case(entries)
    worst = checked(divergence, losses, None, base, radius, kappa)
    spread = float(losses.max() - losses.min())
    near: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9 * (1 + spread)}
    assert base @ losses - 1e-9 <= worst.value <= losses.max() + 1e-9
    larger = checked(divergence, losses, None, base, 1.5 * radius, kappa)
    assert larger.value >= worst.value - 1e-9
    shifted = checked(divergence, losses + 7.0, None, base, radius, kappa)
    torch.testing.assert_close(shifted.value, worst.value + 7.0, **near)
    scaled = checked(divergence, factor * losses, None, base, radius, factor * kappa)
    torch.testing.assert_close(scaled.value / factor, worst.value, **near)
    flipped = checked(divergence, losses.flip(0), None, base.flip(0), radius, kappa)
    torch.testing.assert_close(flipped.value, worst.value, **near)
    part = 0.3 * base[0]
    split = torch.cat([part[None], base]).index_fill(0, torch.tensor([1]), float(base[0] - part))
    apart = checked(divergence, torch.cat([losses[:1], losses]), None, split, radius, kappa)
    torch.testing.assert_close(apart.value, worst.value, **near)
    torch.testing.assert_close(apart.weights[:2].sum(), worst.weights[0], rtol=1e-5, atol=1e-6)


@every_divergence
@anything
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), candidates=st.integers(1, 4), radius=radii)
def test_candidates_and_costs(divergence: Divergence, seed: int, n: int, candidates: int, radius: float) -> None:
    losses, costs, base = random_problem(seed, n, candidates)
    worst = checked(divergence, losses, costs, base, radius, 0.0)
    free = checked(divergence, losses, None, base, radius, 0.0)
    assert worst.value <= free.value + 1e-9, "costs never help"
    assert base @ losses[:, 0] - 1e-9 <= worst.value
    assert checked(divergence, losses, costs, base, 1.5 * radius, 0.0).value >= worst.value - 1e-9


# Bad input, and how it is run


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"losses": torch.tensor([0.0, math.nan])}, "losses must be finite, got NaN or infinite values; find them with"),
        ({"losses": torch.tensor([0.0, math.inf])}, "losses must be finite"),
        ({"losses": torch.zeros(0)}, r"losses must be of shape \[n\] or \[n, candidates\], not empty, got \[0\]"),
        ({"losses": torch.zeros(2, 2, 2)}, "losses must be of shape"),
        ({"radius": -0.1}, "radius must be a finite number >= 0, got -0.1"),
        ({"radius": torch.tensor(-0.1)}, "radius must be a finite number >= 0"),
        ({"radius": torch.tensor([0.1])}, "radius must be a number or a scalar tensor"),
        ({"radius": math.nan}, "radius must be a finite number >= 0"),
        ({"radius": torch.tensor(0.0, requires_grad=True)}, "radius must be > 0 to be differentiated, got 0"),
        ({"kappa": -1.0}, "kappa must be a finite number >= 0"),
        ({"base_weights": torch.tensor([0.5, -0.5])}, "base_weights must be finite and >= 0, and not all 0"),
        ({"base_weights": torch.zeros(2)}, "base_weights must be finite and >= 0, and not all 0"),
        ({"base_weights": torch.tensor([0.5, math.nan])}, "base_weights must be finite and >= 0"),
        ({"base_weights": torch.ones(3)}, r"base_weights must be of shape \[2\], got \[3\]"),
        ({"base_weights": torch.ones(2, requires_grad=True)}, "base_weights must be constants, .* write base_weights.detach()"),
        ({"costs": torch.tensor([-1.0, 0.0])}, "costs must be >= 0"),
        ({"costs": torch.tensor([math.nan, 0.0])}, "costs must be >= 0"),
        ({"costs": torch.tensor([math.inf, 0.0])}, "costs must be finite for at least one candidate per example"),
        ({"costs": torch.zeros(2, 1)}, r"costs must be shaped like the losses, \[2\], got \[2, 1\]"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"losses": torch.tensor([0.0, 1.0]), "divergence": KL(), "radius": 0.1} | change
    with pytest.raises(ValueError, match=text):
        worst_case_expectation(arguments.pop("losses"), **arguments)


def test_a_divergence_is_an_object_that_provides_weights() -> None:
    for divergence in ("kl", KL):
        with pytest.raises(TypeError, match=r"divergence must be divergences.KL\(\), Alpha"):
            worst_case_expectation(torch.tensor([0.0, 1.0]), divergence=divergence, radius=0.1)  # pyright: ignore


def test_integers_are_no_losses() -> None:
    with pytest.raises(TypeError, match="losses must be a floating-point tensor, got torch.int64"):
        worst_case_expectation(torch.tensor([0, 1]), divergence=KL(), radius=0.1)


@every_divergence
def test_a_radius_that_no_candidate_fits_into_fails_loudly(divergence: Divergence) -> None:
    """Only adversarial candidates, armor spec section 3: the dual is unbounded below."""
    losses, costs = tensor([1.0, 2.0]), tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="radius must be > 0.5, .* got 0.1; add each natural example as a candidate of cost 0"):
        worst_case_expectation(losses, divergence=divergence, radius=0.1, costs=costs)
    floor = {"KL()": -math.log((math.exp(-0.5) + math.exp(-0.1)) / 2)}.get(repr(divergence))
    if floor is not None:
        costs = tensor([0.5, 0.1])
        with pytest.raises(ValueError, match=f"radius must be > {floor:.6g}"):
            worst_case_expectation(losses, divergence=divergence, radius=floor - 1e-9, costs=costs)
        checked(divergence, losses, costs, tensor([0.5, 0.5]), floor + 1e-4, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_arithmetic_is_float64_whatever_comes_in(dtype: torch.dtype) -> None:
    losses = torch.tensor([1000.0, 1001.0, 1003.0]).to(dtype)
    found = worst_case_expectation(losses, divergence=KL(), radius=0.1)
    exact = worst_case_expectation(losses.double(), divergence=KL(), radius=0.1)
    assert found.multiplier == exact.multiplier
    assert torch.equal(found.weights, exact.weights.to(dtype))
    assert torch.equal(found.value, exact.value.to(dtype))


@every_divergence
def test_iterations_do_not_synchronise_with_a_device(divergence: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: one copy to the host, and no number is read from a tensor."""
    losses, costs, _ = random_problem(4, n=32, candidates=3)
    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def method(self: Tensor, *arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return original(self, *arguments, **options)

        return method

    for name in ("cpu", "item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(Tensor, name, counted(name))
    for radius in (0.0, 1e-3, 0.1, 1.0):
        calls.clear()
        worst_case_expectation(losses, divergence=divergence, radius=radius, costs=costs)
        assert calls == ["cpu"]

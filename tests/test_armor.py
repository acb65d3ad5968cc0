"""ARMOR and UDR: limits, gradients against central differences, the shared scale, and the defects of the published code."""

import math
import re

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from metarobust.attacks import FGSM, PGD
from metarobust.divergences import KL, Alpha, Renyi
from metarobust.dro import worst_case_expectation
from metarobust.losses import cross_entropy
from metarobust.objectives import ARMOR, MART, TRADES, UDR, AdversarialTraining, BETATraining, PairLoss
from metarobust.threat_models import ThreatModel
from metarobust.transport_costs import HardBall, Insertion, NormPower, SoftHinge

LINF = ThreatModel(norm="linf", epsilon=0.1)
ATTACK = PGD(threat_model=LINF, steps=3)
ROBUST_LOSSES = {
    "adversarial_training": AdversarialTraining(attack=ATTACK),
    "trades": TRADES(threat_model=LINF, steps=3),
    "mart": MART(attack=ATTACK),
    "beta_training": BETATraining(threat_model=LINF, steps=3),
}
COSTS = {
    "hard_ball": HardBall(threat_model=LINF),
    "norm_power": NormPower(weight=2.0, power=1.5),
    "soft_hinge": SoftHinge(threat_model=LINF, weight=20.0),
}
every_loss = pytest.mark.parametrize("robust_loss", ROBUST_LOSSES.values(), ids=ROBUST_LOSSES)
every_cost = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
every_divergence = pytest.mark.parametrize("divergence", [KL(), Alpha(order=2), Renyi(order=1.25)], ids=repr)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(size=12, dimensions=6, classes=4):
    x = torch.rand(size, dimensions, generator=seeded(1), dtype=torch.float64) * 0.4 + 0.3
    return x, torch.randint(classes, (size,), generator=seeded(2))


def network(dimensions=6, classes=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(dimensions, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def searched(objective, model, x, y):
    """The points of an objective with a transport cost, and the scale that they were judged by."""
    return objective._search(objective._ascent, objective.robust_loss, model, x, y, torch.arange(len(x)), seeded())


def gradients(scalar, model):
    return [g.clone() for g in torch.autograd.grad(scalar, list(model.parameters()))]


def assert_same(these, those, tolerance=1e-10):
    for a, b in zip(these, those, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"natural_weight": 0.5}, {"robust_classes": (0,)}], ids=["", "natural", "classes"])
def test_a_batch_of_no_examples_has_loss_zero(settings):
    """As it has for every robust loss, whose mean is then taken by nobody."""
    attack = PGD(threat_model=ThreatModel(norm="linf", epsilon=0.1), steps=1)
    x, y = batch()
    objective = ARMOR(robust_loss=AdversarialTraining(attack=attack), divergence=KL(), radius=0.1, **settings)
    assert objective(network(), x[:0], y[:0], generator=seeded()).loss.item() == 0


@every_loss
@every_divergence
def test_radius_zero_is_the_mean_of_the_robust_loss_in_value_and_gradient(robust_loss, divergence):
    """With a hard ball this is plain adversarial training, TRADES, MART: every weight is 1 / n."""
    model, (x, y) = network(), batch()
    result = ARMOR(robust_loss=robust_loss, divergence=divergence, radius=0.0)(model, x, y, generator=seeded())
    plain = robust_loss(model, x, y, generator=seeded()).mean()
    torch.testing.assert_close(result.loss, plain, rtol=1e-12, atol=0)
    assert_same(gradients(result.loss, model), gradients(plain, model))
    assert torch.equal(result.worst_case.weights, torch.full_like(result.worst_case.weights, 1 / len(x)))


@pytest.mark.parametrize("cost", [COSTS["norm_power"], NormPower(weight=0.5, norm="linf", power=1.0)], ids=repr)
def test_radius_zero_with_a_soft_cost_is_the_natural_mean(cost):
    model, (x, y) = network(), batch()
    objective = ARMOR(robust_loss=AdversarialTraining(attack=ATTACK), divergence=KL(), radius=0.0, transport_cost=cost,
                      step_size=0.1)  # fmt: skip
    torch.testing.assert_close(objective(model, x, y).loss, cross_entropy(model(x), y).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_radius_zero_leaves_the_free_moves_inside_a_soft_ball(dtype):
    """What costs nothing is allowed at any price: the mean over the ball, not the natural one."""
    model, (x, y) = network().to(dtype), batch()
    x = x.to(dtype)
    objective = ARMOR(robust_loss=UDR(threat_model=LINF, steps=20), divergence=KL(), radius=0.0)
    strong = AdversarialTraining(attack=PGD(threat_model=LINF, steps=100, random_start=False))(model, x, y).mean()
    natural = cross_entropy(model(x), y).mean()
    found = objective(model, x, y, generator=seeded()).loss
    assert float((found - natural).detach()) > 0.97 * float((strong - natural).detach()) > 0.1


def test_large_radius_is_the_largest_robust_loss():
    model, (x, y) = network(), batch()
    for robust_loss in ROBUST_LOSSES.values():
        losses = robust_loss(model, x, y, generator=seeded())
        result = ARMOR(robust_loss=robust_loss, divergence=KL(), radius=10.0)(model, x, y, generator=seeded())
        torch.testing.assert_close(result.loss, losses.max())
        assert result.worst_case.multiplier == 0


def test_udr_with_a_large_multiplier_stays_in_the_ball_and_with_a_small_one_leaves_it():
    model, (x, y) = network(), batch()
    reach = {}
    for multiplier in (1e-3, 1e6):
        moved = UDR(threat_model=LINF, multiplier=multiplier, steps=20).moved(model, x, y, generator=seeded())
        reach[multiplier] = float((moved - x).abs().max())
    assert reach[1e6] <= 0.1 + 1e-5
    assert reach[1e-3] > 0.15


def test_udr_maximises_the_loss_minus_its_own_cost():
    """For a linear loss of slope a: |d_j| = epsilon + |a_j| / (s w), in the box."""
    a = torch.tensor([0.5, -0.2, 0.05], dtype=torch.float64)
    x, y = torch.full((1, 3), 0.5, dtype=torch.float64), torch.tensor([0])
    objective = UDR(threat_model=LINF, multiplier=2.0, weight=4.0, steps=200, step_size=0.005)
    # Two classes of margin m(x): the cross-entropy log(1 + e^m) has slope sigmoid(m) a, nearly a for a large m.
    moved = objective.moved(lambda x: torch.stack([torch.zeros_like(x[:, 0]), 40 + x @ a], 1), x, y, generator=seeded())
    torch.testing.assert_close((moved - x)[0], (0.1 + a.abs() / 8) * a.sign(), rtol=0, atol=5e-3)


# Gradients ------------------------------------------------------------------------------------------------------------


def central_differences(value, model, step=1e-6):
    found = []
    for parameter in model.parameters():
        gradient = torch.zeros_like(parameter)
        for i in range(parameter.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[i] += sign * step
                ends.append(float(value().detach()))
                with torch.no_grad():
                    parameter.view(-1)[i] -= sign * step
            gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
        found.append(gradient)
    return found


@every_divergence
@pytest.mark.parametrize("settings", [{}, {"natural_weight": 0.3}, {"robust_classes": (1, 3)}, {"kappa": 0.2}], ids=str)
def test_the_gradient_is_that_of_the_whole_objective_where_the_attack_is_exact(divergence, settings):
    """For two logits per class pair of a linear model FGSM is exact, so the envelope theorem covers weights and points."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Linear(5, 2).double()
    x, y = batch(9, 5, 2)
    y = (y + 2 * (torch.arange(9) % 2)) % 4  # labels 0 to 3; the classes 2 and 3 share the logits of 0 and 1
    four = lambda x: torch.cat([model(x), model(x) - 30], 1)  # noqa: E731
    y = torch.where(y > 1, y - 2, y) if "robust_classes" not in settings else y % 2 + 0
    settings = settings | ({"robust_classes": (1,)} if "robust_classes" in settings else {})
    objective = ARMOR(robust_loss=AdversarialTraining(attack=FGSM(threat_model=LINF)), divergence=divergence, radius=0.1,
                      **settings)  # fmt: skip

    def value():
        return objective(four, x, y).loss

    assert_same(gradients(value(), model), central_differences(value, model), 1e-6)


@every_cost
@pytest.mark.parametrize("build", [lambda: AdversarialTraining(attack=ATTACK), lambda: TRADES(threat_model=LINF)])
def test_the_gradient_with_a_cost_is_that_of_the_dual_of_the_points_found(cost, build):
    model, (x, y) = network(), batch()
    loss = build()
    objective = ARMOR(robust_loss=loss, divergence=KL(), radius=0.2, transport_cost=cost, step_size=0.1)
    seen = []
    result = objective(lambda x: seen.append(x.detach().clone()) or model(x), x, y, generator=seeded())
    moved = seen[-1]
    assert not torch.equal(moved, x)
    costs = torch.stack([torch.zeros(len(x)).double(), cost.cost(moved, x)], 1)

    def value():
        clean = model(x)
        table = torch.stack([loss.charge(clean, clean, y), loss.charge(clean, model(moved), y)], 1)
        return worst_case_expectation(table, divergence=KL(), radius=0.2, costs=costs).value

    torch.testing.assert_close(result.loss, value(), rtol=1e-10, atol=0)
    assert_same(gradients(result.loss, model), central_differences(value, model), 1e-6)


def test_a_radius_can_be_learned_through_the_loss():
    model, (x, y) = network(), batch()
    radius = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    result = ARMOR(robust_loss=ROBUST_LOSSES["adversarial_training"], divergence=KL(), radius=radius, natural_weight=0.25)(
        model, x, y, generator=seeded()
    )
    slope = torch.autograd.grad(result.loss, radius)[0]
    torch.testing.assert_close(float(slope), 0.75 * result.worst_case.multiplier)


# What it is made of ---------------------------------------------------------------------------------------------------


@every_loss
def test_natural_weight_mixes_the_natural_mean_in(robust_loss):
    model, (x, y) = network(), batch()
    settings = {"robust_loss": robust_loss, "divergence": KL(), "radius": 0.1}
    pure = ARMOR(**settings)(model, x, y, generator=seeded())
    mixed = ARMOR(**settings, natural_weight=0.3)(model, x, y, generator=seeded())
    natural = cross_entropy(model(x), y).mean()
    torch.testing.assert_close(mixed.loss, 0.3 * natural + 0.7 * pure.loss, rtol=1e-12, atol=0)
    assert mixed.natural == pytest.approx(float(natural.detach()), rel=1e-12)
    assert math.isnan(pure.natural)


@pytest.mark.parametrize(
    "robust_loss", [ROBUST_LOSSES["adversarial_training"], ROBUST_LOSSES["beta_training"]], ids=["at", "beta"]
)
def test_classes_that_the_model_does_not_have_are_refused(robust_loss):
    model, (x, y) = network(), batch()
    objective = ARMOR(robust_loss=robust_loss, divergence=KL(), radius=0.1, robust_classes=[1, 9])
    with pytest.raises(ValueError, match="robust_classes must be below 4, the classes that the model has logits for, got 9"):
        objective(model, x, y)


@pytest.mark.parametrize("classes", [(0,), (1, 3), (0, 1, 2, 3), [1]], ids=str)
@pytest.mark.parametrize("natural_weight", [0.0, 0.4])
def test_only_the_chosen_classes_are_moved_and_reweighted(classes, natural_weight):
    model, (x, y) = network(), batch()
    attack = PGD(threat_model=LINF, steps=3, random_start=False)
    loss = AdversarialTraining(attack=attack)
    objective = ARMOR(robust_loss=loss, divergence=KL(), radius=0.1, robust_classes=classes, natural_weight=natural_weight)
    y = torch.where(y == 1, 0, y) if classes == [1] else y  # then no example of the chosen class is there
    result = objective(model, x, y)
    chosen = torch.isin(y, torch.tensor(classes))
    natural = cross_entropy(model(x), y)
    robust = natural[~chosen].sum() / len(y)
    if chosen.any():
        losses = loss(model, x[chosen], y[chosen])
        worst = worst_case_expectation(losses, divergence=KL(), radius=0.1)
        robust = robust + worst.value * chosen.sum() / len(y)
        torch.testing.assert_close(result.worst_case.weights.squeeze(1), worst.weights.detach())
    else:
        assert result.worst_case is None
        assert result.diagnostics == {}
    expected = natural_weight * natural.mean() + (1 - natural_weight) * robust
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cost", [None, *COSTS.values()], ids=["no_cost", *COSTS])
@pytest.mark.parametrize("robust_loss", [ROBUST_LOSSES["trades"], ROBUST_LOSSES["mart"]], ids=["trades", "mart"])
def test_chosen_classes_with_every_loss_and_cost_are_the_same_objective_on_their_rows(robust_loss, cost):
    """The last rows only, so that rows of the batch and rows among the chosen differ."""
    model, (x, _) = network(), batch()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 3, 3, 3, 3])
    settings = {"robust_loss": robust_loss, "divergence": KL(), "radius": 0.2, "transport_cost": cost}
    settings["step_size"] = None if cost is None else 0.1
    result = ARMOR(**settings, robust_classes=(3,))(model, x, y, generator=seeded())
    alone = ARMOR(**settings)(model, x[8:], y[8:], generator=seeded())
    expected = alone.loss * 4 / 12 + cross_entropy(model(x[:8]), y[:8]).sum() / 12
    torch.testing.assert_close(result.loss, expected, rtol=1e-10, atol=0)
    assert_same(gradients(result.loss, model), gradients(expected, model))
    assert result.natural == pytest.approx(float(cross_entropy(model(x), y).mean().detach()))
    weights = result.worst_case.weights.sum(1)
    assert result.diagnostics["largest_weight"] == pytest.approx(4 * float(weights.max()))


@pytest.mark.parametrize(("weight", "radius"), [(0.3, 0.1), (1.0, 0.1), (3.0, 0.5), (3.0, 0.01)])
def test_a_linear_loss_with_a_quadratic_cost_has_a_closed_form(weight, radius):
    r"""Every point gains g^2 / (4 s L): the dual is lambda eps + s log mean exp(l / s) + g^2 / (4 s L)."""
    a = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    x = torch.rand(10, 3, generator=seeded(5), dtype=torch.float64) * 2
    y = torch.zeros(10, dtype=torch.int64)
    model = lambda x: torch.stack([0 * x[:, 0], x @ a], 1)  # noqa: E731
    wide = ThreatModel(norm="linf", epsilon=0.1, lower=-50.0, upper=50.0)
    loss = AdversarialTraining(attack=PGD(threat_model=wide), loss=lambda logits, y: logits[:, 1])
    cost = NormPower(weight=weight, lower=-50.0, upper=50.0)
    losses, gain = (x @ a).numpy(), float(a @ a) / (4 * weight)
    dual = lambda s: s * radius + s * np.log(np.mean(np.exp(losses / s))) + gain / s  # noqa: E731
    exact = scipy.optimize.minimize_scalar(dual, bounds=(1e-2, 1e3), method="bounded", options={"xatol": 1e-12}).fun
    objective = ARMOR(robust_loss=loss, divergence=KL(), radius=radius, transport_cost=cost, steps=40, step_size=0.1)
    found = float(objective(model, x, y).loss)
    reweighting = float(worst_case_expectation(x @ a, divergence=KL(), radius=radius).value)
    assert found <= exact + 1e-9
    assert exact - found < 0.005 * (exact - reweighting), "moving must gain what it can"


@every_cost
@pytest.mark.parametrize("radius", [0.01, 0.3])
def test_the_budget_is_spent_exactly_and_reported_in_two_parts(cost, radius):
    model, (x, y) = network(), batch()
    objective = ARMOR(robust_loss=AdversarialTraining(attack=ATTACK), divergence=KL(), radius=radius, transport_cost=cost,
                      step_size=0.1)  # fmt: skip
    worst = objective(model, x, y, generator=seeded()).worst_case
    assert worst.multiplier > 0
    assert worst.reweighting + worst.transport == pytest.approx(radius, rel=1e-6)
    assert (worst.transport > 0) == (not isinstance(cost, HardBall))


def test_every_result_can_be_logged():
    model, (x, y) = network(), batch()
    diagnostics = ARMOR(robust_loss=UDR(threat_model=LINF), divergence=KL(), radius=0.1)(model, x, y).diagnostics
    assert list(diagnostics) == ["multiplier", "scale", "reweighting", "transport", "largest_weight"]
    assert all(math.isfinite(value) for value in diagnostics.values())


# Defects of the published code (armor, section 10) ---------------------------------------------------------------------


@every_divergence
def test_weights_sum_to_one_and_no_multiplier_is_ever_stale(divergence):
    """Items 1 and 3: published weights come from a multiplier that lags, or is frozen; their sum is a hidden learning rate."""
    model, (x, y) = network(), batch()
    objective = ARMOR(robust_loss=ROBUST_LOSSES["trades"], divergence=divergence, radius=0.2)
    for scale in (0.01, 1.0):  # all losses equal to log 4 nearly, then spread out
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        result = objective(model, x, y, generator=seeded())
        assert float(result.worst_case.weights.sum()) == pytest.approx(1, abs=1e-12)
        assert result.worst_case.reweighting == pytest.approx(0.2, rel=1e-6), "a stale multiplier spends another budget"
        assert any(g.abs().max() > 0 for g in gradients(result.loss, model))


def test_the_radius_has_its_effect_in_the_first_step():
    """Item 2: in the published CIFAR-10 runs the radius moves the multiplier by at most 0.31 in all 78,200 steps."""
    model, (x, y) = network(), batch()
    values = []
    for radius in (0.02, 0.2, 1.0):
        result = ARMOR(robust_loss=ROBUST_LOSSES["trades"], divergence=Alpha(order=6), radius=radius)(
            model, x, y, generator=seeded()
        )
        assert result.worst_case.reweighting == pytest.approx(radius, rel=1e-6)
        values.append(float(result.loss.detach()))
    assert values[0] < values[1] - 0.05 < values[2] - 0.1


def test_attack_and_dual_use_one_scale_with_kappa_in_it():
    """Items 4 and 6: the ascent must climb loss - s cost with the s = lambda + kappa of the dual, also at lambda = 0."""
    model, (x, y) = network(), batch()
    cost = NormPower(weight=30.0)
    for radius, kappa in ((0.1, 0.0), (0.1, 0.3), (1e3, 0.3)):
        objective = ARMOR(robust_loss=AdversarialTraining(attack=ATTACK), divergence=KL(), radius=radius, kappa=kappa,
                          transport_cost=cost, steps=40, step_size=0.05)  # fmt: skip
        found = searched(objective, model, x, y)
        worst = objective(model, x, y, generator=seeded()).worst_case
        assert found.scale == pytest.approx(worst.scale, rel=1e-6)
        # At the optimum of loss - s cost its gradient vanishes (no coordinate of this batch reaches the box).
        leaf = found.x_adv.clone().requires_grad_()
        assert bool(((leaf > 0) & (leaf < 1)).all())
        gain = cross_entropy(model(leaf), y) - worst.scale * cost.cost(leaf, x)
        left = torch.autograd.grad(gain.sum(), leaf)[0].norm(dim=1)
        scale = torch.autograd.grad(cross_entropy(model(leaf), y).sum(), leaf)[0].norm(dim=1)
        assert float((left / scale).median()) < 0.1
    assert worst.multiplier == 0
    assert worst.scale == 0.3


def test_points_stay_in_the_box():
    """Item 5: the published attack has neither ball nor box."""
    model, (x, y) = network(), batch()
    x = x.clone()
    x[:, 0], x[:, 1] = 0.0, 1.0
    for cost in COSTS.values():
        objective = ARMOR(robust_loss=AdversarialTraining(attack=ATTACK), divergence=KL(), radius=3.0, transport_cost=cost,
                          step_size=0.5)  # fmt: skip
        found = searched(objective, model, x, y).x_adv
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1


def test_a_small_radius_is_feasible_because_x_itself_is_a_candidate():
    """Item 7: with one candidate of cost 0.5 a radius of 0.1 allows nothing, and the published bisection ends at its cap."""
    model, (x, y) = network(), batch()
    cost = NormPower(weight=500.0, norm="linf", power=1.0)  # any move at all is dear
    objective = ARMOR(robust_loss=AdversarialTraining(attack=ATTACK), divergence=KL(), radius=1e-3, transport_cost=cost,
                      step_size=0.1)  # fmt: skip
    worst = objective(model, x, y, generator=seeded()).worst_case
    assert worst.converged
    assert worst.reweighting + worst.transport == pytest.approx(1e-3, rel=1e-6)


def test_renyi_takes_a_transport_cost():
    """Item 8: the published Renyi variant knows the hard ball only."""
    model, (x, y) = network(), batch()
    objective = ARMOR(robust_loss=UDR(threat_model=LINF), divergence=Renyi(order=1.25), radius=0.1)
    worst = objective(model, x, y, generator=seeded()).worst_case
    assert worst.transport > 0


@pytest.mark.parametrize("cost", [None, COSTS["norm_power"]], ids=["hard_ball", "norm_power"])
def test_a_loss_that_is_not_finite_stops_with_the_row(cost):
    """Item 9: the published loop prints that training is invalid and goes on."""
    model, (x, y) = network(), batch()

    def broken(x):
        logits = model(x)
        return torch.where(torch.arange(len(x))[:, None] == 4, torch.nan, logits)

    attack = lambda model, x, y, generator=None: x  # noqa: E731
    objective = ARMOR(robust_loss=AdversarialTraining(attack=attack), divergence=KL(), radius=0.1, transport_cost=cost,
                      step_size=None if cost is None else 0.1)  # fmt: skip
    with pytest.raises(FloatingPointError, match="NaN or infinite for 1 of 12 examples, the first in row 4 of the batch"):
        objective(broken, x, y)


def test_a_bad_row_is_counted_in_the_whole_batch():
    model, (x, y) = network(), batch()
    label = int(y[4])
    attack = lambda model, x, y, generator=None: x  # noqa: E731
    objective = ARMOR(robust_loss=AdversarialTraining(attack=attack), divergence=KL(), radius=0.1, robust_classes=(label,))
    first = int((y == label).nonzero()[0])
    with pytest.raises(FloatingPointError, match=f"the first in row {first} of the batch"):
        objective(lambda x: model(x) * torch.nan, x, y)
    assert first != 0, "otherwise every way of counting gives it"


@every_cost
@pytest.mark.parametrize("robust_loss", [ROBUST_LOSSES["trades"], ROBUST_LOSSES["mart"]], ids=["trades", "mart"])
def test_the_ascent_climbs_what_is_charged(robust_loss, cost):
    """TRADES and MART charge for the change of the prediction at x, which the ascent must compare with too."""
    model, (x, y) = network(), batch()
    model = nn.Sequential(nn.BatchNorm1d(6).double(), model)
    objective = ARMOR(robust_loss=robust_loss, divergence=KL(), radius=0.2, transport_cost=cost, step_size=0.05)
    before = int(model[0].num_batches_tracked)
    found = searched(objective, model, x, y)
    assert int(model[0].num_batches_tracked) == before
    clean = model(x)
    torch.testing.assert_close(found.natural_losses, robust_loss.charge(clean, clean, y).detach())
    plain = network()
    found = searched(objective, plain, x, y)
    torch.testing.assert_close(found.losses, robust_loss.charge(plain(x), plain(found.x_adv), y).detach())
    assert bool((found.x_adv != x).any())


def test_mart_keeps_the_attack_of_its_baseline():
    """Section 8: the published ARMOR attacks the whole MART loss where the baseline attacks the cross-entropy: a confound."""
    model, (x, y) = network(), batch()
    points = []
    for objective in (ROBUST_LOSSES["mart"], ARMOR(robust_loss=ROBUST_LOSSES["mart"], divergence=KL(), radius=0.1)):
        seen = []
        objective(lambda x, seen=seen: seen.append(x.detach().clone()) or model(x), x, y, generator=seeded())
        points.append(seen[-1])
    assert torch.equal(*points)


def test_a_natural_loss_that_is_not_finite_stops_with_the_row_too():
    model, (x, y) = network(), batch()
    y = torch.cat([torch.zeros(6), torch.ones(6)]).long()

    def broken(x):
        logits = model(x)
        return torch.where((torch.arange(len(x))[:, None] == 3) & (len(x) == 12), torch.nan, logits)

    attack = lambda model, x, y, generator=None: x  # noqa: E731
    objective = ARMOR(robust_loss=AdversarialTraining(attack=attack), divergence=KL(), radius=0.1, robust_classes=(1,))
    with pytest.raises(FloatingPointError, match="natural loss is NaN or infinite for 1 of 12 examples, the first in row 3"):
        objective(broken, x, y)


@pytest.mark.parametrize("wrong", [lambda v: v.mean(), lambda v: v[:, None], lambda v: v[:-1]], ids=["mean", "column", "short"])
def test_a_robust_loss_of_the_wrong_shape_is_refused(wrong):
    model, (x, y) = network(), batch()
    loss = lambda model, x, y, generator=None: wrong(cross_entropy(model(x), y))  # noqa: E731
    with pytest.raises(ValueError, match=re.escape("robust_loss must be one that returns a loss per example, [12], got shape")):
        ARMOR(robust_loss=loss, divergence=KL(), radius=0.1)(model, x, y)
    with pytest.raises(TypeError, match="robust_loss must be one that returns a loss per example, got tuple"):
        ARMOR(robust_loss=lambda model, x, y, generator=None: (x, y), divergence=KL(), radius=0.1)(model, x, y)


@pytest.mark.parametrize("cost", [None, COSTS["norm_power"]], ids=["hard_ball", "norm_power"])
def test_a_clean_pass_before_the_objective_can_be_differentiated_with_it(cost):
    """BatchNorm in training mode saves its statistics for the backward pass; an attack puts them back without harm."""
    model, (x, y) = network(), batch()
    model = nn.Sequential(nn.Linear(6, 6).double(), nn.BatchNorm1d(6).double(), model)
    objective = ARMOR(robust_loss=AdversarialTraining(attack=ATTACK), divergence=KL(), radius=0.1, transport_cost=cost,
                      step_size=None if cost is None else 0.1)  # fmt: skip
    together = gradients(cross_entropy(model(x), y).mean() + objective(model, x, y, generator=seeded()).loss, model)
    apart = [
        gradients(cross_entropy(model(x), y).mean(), model),
        gradients(objective(model, x, y, generator=seeded()).loss, model),
    ]
    assert_same(together, [a + b for a, b in zip(*apart, strict=True)])


def test_bfloat16_losses_are_weighted_in_higher_precision():
    model, (x, y) = network().bfloat16(), batch()
    objective = ARMOR(robust_loss=AdversarialTraining(attack=lambda model, x, y, generator=None: x), divergence=KL(), radius=0.1)
    result = objective(model, x.bfloat16(), y)
    assert float(result.worst_case.weights.sum()) == pytest.approx(1, abs=1e-12)
    assert result.loss.dtype == torch.float32


@every_cost
def test_nothing_is_left_in_the_model(cost):
    """Item 12: published attacks leave gradients in the parameters; here not even BatchNorm hears of an attack."""
    model, (x, y) = network(), batch()
    model = nn.Sequential(nn.BatchNorm1d(6).double(), model)
    objective = ARMOR(robust_loss=AdversarialTraining(attack=ATTACK), divergence=KL(), radius=0.1, transport_cost=cost,
                      step_size=None if cost is None else 0.1)  # fmt: skip
    result = objective(model, x, y, generator=seeded())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert int(model[0].num_batches_tracked) == 2  # the clean pass and the one at the moved points
    result.loss.backward()


# Settings -------------------------------------------------------------------------------------------------------------

SETTINGS = {"robust_loss": ROBUST_LOSSES["adversarial_training"], "divergence": KL(), "radius": 0.1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"robust_loss": TRADES}, "robust_loss must be a robust loss, got"),
        ({"robust_loss": "trades"}, "write AdversarialTraining(attack=...)"),
        ({"divergence": KL}, "divergence must be divergences.KL(), Alpha(order=...) or Renyi(order=...), got"),
        ({"radius": -0.1}, "radius must be a finite number >= 0, got -0.1"),
        ({"radius": torch.tensor(-0.1)}, "radius must be a finite number >= 0, got -0.1"),
        ({"radius": "0.1"}, "radius must be a finite number >= 0, got '0.1'"),
        ({"kappa": math.inf}, "kappa must be a finite number >= 0, got inf"),
        ({"natural_weight": 1.5}, "natural_weight must be a share from 0 to 1, got 1.5"),
        ({"robust_classes": 1}, "robust_classes must be a tuple of class indices, got 1; write robust_classes=(1,)"),
        ({"robust_classes": ()}, "robust_classes must be not empty, got (); write robust_classes=(1,)"),
        ({"steps": 5}, "steps must be None without a transport cost, got 5; give it to the attack, or to UDR"),
        ({"step_size": 0.1}, "step_size must be None without a transport cost, got 0.1"),
        ({"robust_classes": (-1,)}, "robust_classes must be an integer >= 0, got -1"),
        ({"transport_cost": NormPower}, "transport_cost must be a transport cost, as NormPower(weight=1.0), got"),
        ({"transport_cost": NormPower(weight=1.0)}, "step_size must be given for NormPower"),
        (
            {"transport_cost": HardBall(threat_model=LINF), "robust_loss": ROBUST_LOSSES["beta_training"]},
            "robust_loss must be AdversarialTraining, TRADES, MART, UDR or another PairLoss beside a transport cost, got BETA",
        ),
        (
            {"transport_cost": Insertion(weight=1.0), "robust_loss": ROBUST_LOSSES["trades"]},
            "robust_loss must be AdversarialTraining for binary features, got TRADES; TRADES needs a start off the data",
        ),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_sentence(changes, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        ARMOR(**SETTINGS | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"threat_model": None}, "threat_model must be a ThreatModel, got None"),
        ({"threat_model": ThreatModel(norm="l2", epsilon=0.5)}, "linf"),
        ({"multiplier": 0.0}, "multiplier must be a finite number > 0, got 0"),
        ({"weight": -1.0}, "weight must be a finite number > 0, got -1"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"threat_model": ThreatModel(epsilon=0.0)}, "step_size"),
    ],
)
def test_bad_settings_of_udr_end_in_one_sentence(changes, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        UDR(**{"threat_model": LINF} | changes)


# A robust loss of one's own ---------------------------------------------------------------------------------------------


class OwnLoss:
    """The charge of TRADES at beta 2 at the points of an attack, as a user would write it."""

    reads_clean, attack = True, ATTACK

    def moved(self, model, x, y, *, generator=None):
        return self.attack(model, x, y, generator=generator)

    def charge(self, clean, moved, y):
        return TRADES(threat_model=ATTACK.threat_model, beta=2.0).charge(clean, moved, y)

    def __call__(self, model, x, y, *, generator=None):
        return self.charge(model(x), model(self.moved(model, x, y, generator=generator)), y)


@pytest.mark.parametrize("with_cost", [False, True])
def test_a_loss_of_ones_own_that_comes_apart_is_one_of_the_package(with_cost):
    settings = {"transport_cost": COSTS["soft_hinge"], "steps": 3, "step_size": 0.05} if with_cost else {}
    theirs = TRADES(attack=ATTACK, beta=2.0)
    assert isinstance(OwnLoss(), PairLoss)
    model, (x, y) = network(), batch()
    objectives = [ARMOR(robust_loss=loss, divergence=KL(), radius=0.1, **settings) for loss in (OwnLoss(), theirs)]
    own, packaged = (objective(model, x, y, generator=seeded(3)) for objective in objectives)
    torch.testing.assert_close(own.loss, packaged.loss)
    assert own.loss.isfinite()

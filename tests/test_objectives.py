"""Robust losses: values against the published formulas, gradients, limits, and what a call leaves as it was."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metarobust.attacks import FGSM, PGD, count_calls
from metarobust.losses import cross_entropy, margin
from metarobust.objectives import MART, TRADES, AdversarialTraining, BETATraining, SmoothedBETATraining
from metarobust.threat_models import ThreatModel
from metarobust.types import RobustLoss

LINF = ThreatModel(norm="linf", epsilon=0.1)
L2 = ThreatModel(norm="l2", epsilon=0.3)
NOTHING = ThreatModel(norm="linf", epsilon=0.0)

TABLE = {
    "adversarial_training": lambda threat_model: AdversarialTraining(attack=PGD(threat_model=threat_model, steps=3)),
    "adversarial_training_margin": lambda t: AdversarialTraining(attack=FGSM(threat_model=t, loss="margin"), loss="margin"),
    "trades": lambda threat_model: TRADES(threat_model=threat_model, steps=3),
    "trades_of_an_attack": lambda threat_model: TRADES(attack=PGD(threat_model=threat_model, steps=3)),
    "mart": lambda threat_model: MART(attack=PGD(threat_model=threat_model, steps=3)),
    "beta_training": lambda threat_model: BETATraining(threat_model=threat_model, steps=3),
}
NOT_AT_ONE_CONSTANT_POINT = {  # their gradients: tests/test_beta_training.py
    "beta_training_unrolled": lambda t: BETATraining(threat_model=t, steps=3, hypergradient="unrolled"),
    "beta_training_implicit": lambda t: BETATraining(threat_model=t, steps=3, hypergradient="implicit"),
    "smoothed_beta_training": lambda threat_model: SmoothedBETATraining(threat_model=threat_model, mu=1.0, steps=3),
}
ALL = TABLE | NOT_AT_ONE_CONSTANT_POINT
every_objective = pytest.mark.parametrize("build", ALL.values(), ids=ALL)
every_norm = pytest.mark.parametrize("threat_model", [LINF, L2, ThreatModel(norm="l1", epsilon=0.5)], ids=lambda t: t.norm)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(size=5, dimensions=6, classes=4):
    x = torch.rand(size, dimensions, generator=seeded(1), dtype=torch.float64) * 0.4 + 0.3
    return x, torch.randint(classes, (size,), generator=seeded(2))


def network(dimensions=6, classes=4, normalised=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(dimensions, 8), *([nn.BatchNorm1d(8)] if normalised else []), nn.Tanh(), nn.Linear(8, classes)]
        return nn.Sequential(*layers).double()


def recorded(model):
    """The model, and a list that every batch it is called on is added to."""
    seen = []

    def call(x):
        seen.append(x.detach().clone())
        return model(x)

    return call, seen


def attacked_point(objective, model, x, y):
    """Where the loss was taken: the last batch that an objective calls the model on."""
    call, seen = recorded(model)
    objective(call, x, y, generator=seeded())
    return seen[-1]


def held(x_adv):
    """An attack that always returns these points."""
    return lambda model, x, y, generator=None: x_adv


def with_point_held(objective, x_adv):
    if isinstance(objective, AdversarialTraining):
        return AdversarialTraining(attack=held(x_adv), loss=objective.loss)
    if isinstance(objective, BETATraining):
        return AdversarialTraining(attack=held(x_adv))
    return type(objective)(attack=held(x_adv), beta=objective.beta)


# Values --------------------------------------------------------------------------------------------------------------


def published_trades(model, x, x_adv, y, beta):
    """The mean loss, written as in the paper's code, whose KL is summed and divided by the batch size."""
    divergence = F.kl_div(model(x_adv).log_softmax(1), model(x).softmax(1), reduction="sum") / len(x)
    return F.cross_entropy(model(x), y) + beta * divergence


def published_mart(model, x, x_adv, y, beta):
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    label = F.one_hot(y, p.shape[1]).bool()
    boosted = -q[label].log() - (1.0001 - q.masked_fill(label, 0).amax(1) + 1e-12).log()
    return boosted + beta * (p * (p.log() - (q + 1e-12).log())).sum(1) * (1.0000001 - p[label])


@every_norm
@pytest.mark.parametrize("beta", [0.5, 6.0])
def test_trades_with_equal_weights_is_the_published_mean(threat_model, beta):
    model, (x, y) = network(), batch()
    objective = TRADES(threat_model=threat_model, beta=beta, steps=3)
    x_adv = attacked_point(objective, model, x, y)
    losses = objective(model, x, y, generator=seeded())
    torch.testing.assert_close(losses.mean(), published_trades(model, x, x_adv, y, beta), rtol=1e-12, atol=0)
    for i in range(len(x)):
        alone = published_trades(model, x[i : i + 1], x_adv[i : i + 1], y[i : i + 1], beta)
        torch.testing.assert_close(losses[i], alone, rtol=1e-12, atol=0)


@every_norm
def test_mart_is_the_published_formula(threat_model):
    model, (x, y) = network(), batch()
    objective = MART(attack=PGD(threat_model=threat_model, steps=3), beta=5.0)
    x_adv = attacked_point(objective, model, x, y)
    expected = published_mart(model, x, x_adv, y, 5.0)
    torch.testing.assert_close(objective(model, x, y, generator=seeded()), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_adversarial_training_is_the_loss_at_the_attacked_point(loss):
    model, (x, y) = network(), batch()
    attack = PGD(threat_model=LINF, steps=3)
    x_adv = attack(model, x, y, generator=seeded())
    losses = AdversarialTraining(attack=attack, loss=loss.__name__)(model, x, y, generator=seeded())
    assert torch.equal(losses, loss(model(x_adv), y))
    assert torch.equal(losses, AdversarialTraining(attack=attack, loss=loss)(model, x, y, generator=seeded()))


@pytest.mark.parametrize(("threat_model", "dual"), [(LINF, 1), (L2, 2)], ids=["linf", "l2"])
def test_trades_of_a_linear_model_of_two_classes_has_a_closed_form(threat_model, dual):
    """The KL is convex in the logit difference, least at x: the ascent ends at the side of the ball where the noise begins."""
    w, b = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64), 0.3
    x, y = torch.full((8, 3), 0.5, dtype=torch.float64), torch.arange(8) % 2
    noise = torch.randn(x.shape, generator=seeded(3)).double()
    side = (noise @ w).sign()
    assert len(side.unique()) == 2

    def model(x):
        return torch.stack([torch.zeros_like(x[:, 0]), x @ w + b], 1)

    # For l2 the part of the start across the gradient fades with the projections; a tiny start makes it negligible.
    objective = TRADES(threat_model=threat_model, beta=2.0, steps=10, start_std=1e-7)
    losses = objective(model, x, y, generator=seeded(3))
    clean = x @ w + b
    moved = clean + side * threat_model.epsilon * torch.linalg.vector_norm(w, ord=dual)
    p, q = clean.sigmoid(), moved.sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    expected = F.softplus(torch.where(y == 1, -clean, clean)) + 2 * divergence
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)


@every_norm
def test_the_ascent_of_trades_raises_the_divergence_inside_ball_and_box(threat_model):
    model, (x, y) = network(), batch(size=20)
    x_adv = attacked_point(TRADES(threat_model=threat_model), model, x, y)
    assert threat_model.contains(x_adv, x, tolerance=1e-12).all()
    assert not x_adv.requires_grad

    def changed(points):
        return F.kl_div(model(points).log_softmax(1), model(x).softmax(1), reduction="none").sum(1)

    assert (changed(x_adv) > changed(threat_model.sample(x, generator=seeded(5)))).all()


def test_the_ascent_of_trades_starts_from_small_gaussian_noise_that_the_ball_cuts():
    model, (x, y) = network(), batch()
    call, seen = recorded(model)
    TRADES(threat_model=LINF, start_std=0.07)(call, x, y, generator=seeded(4))
    noise = 0.07 * torch.randn(x.shape, generator=seeded(4)).double()
    assert (noise.abs() > LINF.epsilon).any()
    torch.testing.assert_close(seen[1], x + noise.clamp(-LINF.epsilon, LINF.epsilon), rtol=0, atol=1e-15)


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=lambda t: t.norm)
def test_a_step_of_trades_climbs_the_divergence_from_the_clean_prediction(threat_model):
    model, (x, y) = network(), batch()
    objective = TRADES(threat_model=threat_model, steps=1, step_size=0.05, start_std=0.02)
    start = (x + 0.02 * torch.randn(x.shape, generator=seeded()).double()).requires_grad_()
    divergence = F.kl_div(model(start).log_softmax(1), model(x).softmax(1), reduction="sum")
    (gradient,) = torch.autograd.grad(divergence, start)
    direction = gradient.sign() if threat_model.norm == "linf" else F.normalize(gradient, dim=1)
    expected = start.detach() + 0.05 * direction
    assert threat_model.contains(expected, x, tolerance=0).all()
    torch.testing.assert_close(attacked_point(objective, model, x, y), expected, rtol=1e-10, atol=0)


# Limits --------------------------------------------------------------------------------------------------------------


def test_beta_0_trades_is_the_clean_cross_entropy_and_attacks_nothing():
    model, (x, y) = network(), batch()
    with count_calls() as counter:
        losses = TRADES(threat_model=LINF, beta=0.0)(model, x, y)
    assert torch.equal(losses, cross_entropy(model(x), y))
    assert counter.calls == 0


def test_epsilon_0_leaves_the_clean_loss():
    model, (x, y) = network(), batch()
    clean = cross_entropy(model(x), y)
    assert torch.equal(TABLE["adversarial_training"](NOTHING)(model, x, y), clean)
    assert torch.equal(TABLE["trades"](NOTHING)(model, x, y), clean)
    assert torch.equal(TABLE["trades_of_an_attack"](NOTHING)(model, x, y), clean)
    torch.testing.assert_close(TABLE["mart"](NOTHING)(model, x, y), published_mart(model, x, x, y, 0.0), rtol=1e-7, atol=0)


def test_mart_stays_finite_and_keeps_the_digits_of_its_weight_for_sure_predictions():
    def model(x):
        return 60.0 * torch.stack([x[:, 0], 0 * x[:, 0]], 1)

    x, y = torch.ones(1, 1), torch.tensor([0])
    loss = MART(attack=held(-x), beta=1e26)(model, x, y)
    doubt = math.exp(-60)  # 1 - p_y, which rounds to 0
    assert loss.item() == pytest.approx(60 - math.log(1e-4) + 1e26 * 60 * doubt, rel=1e-5)
    x = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    losses = MART(attack=held(-x))(model, x, torch.tensor([0, 0]))
    assert losses.isfinite().all()
    assert torch.autograd.grad(losses.sum(), x)[0].isfinite().all()


# Gradients -----------------------------------------------------------------------------------------------------------


def central_differences(function, parameters, step=1e-6):
    """Derivative of a number in each entry of the parameters, which are moved in place and put back."""
    gradients = []
    for parameter in parameters:
        gradient = torch.zeros_like(parameter)
        for index in range(parameter.numel()):
            entry, values = parameter.data.view(-1), []
            kept = entry[index].item()
            for moved in (kept + step, kept - step):
                entry[index] = moved
                values.append(function().item())
            entry[index] = kept
            gradient.view(-1)[index] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


@pytest.mark.parametrize("build", TABLE.values(), ids=TABLE)
def test_parameter_gradients_are_central_differences_with_the_attacked_point_held(build):
    model, (x, y) = network(), batch()
    objective, parameters = build(LINF), list(model.parameters())
    weights = torch.linspace(0.5, 2.0, len(x), dtype=torch.float64)
    gradients = torch.autograd.grad(weights @ objective(model, x, y, generator=seeded()), parameters)
    frozen = with_point_held(objective, attacked_point(objective, model, x, y))
    with torch.no_grad():
        expected = central_differences(lambda: weights @ frozen(model, x, y), parameters)
    for gradient, difference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["adversarial_training", "trades"])
def test_where_the_attack_is_exact_the_gradient_is_that_of_the_maximum(name):
    """A linear model of two classes: the attack is run again at each moved parameter, and the envelope theorem holds."""
    (x, y), model, objective = batch(classes=2), nn.Linear(6, 2).double(), TABLE[name](LINF)
    nn.init.uniform_(model.weight, 0.5, 1.5, generator=seeded())
    with torch.no_grad():
        model.weight[0].neg_()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(objective(model, x, y, generator=seeded()).sum(), parameters)
    expected = central_differences(lambda: objective(model, x, y, generator=seeded()).sum(), parameters)
    for gradient, difference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-7)


def test_an_attack_that_keeps_its_graph_is_cut_off():
    model, (x, y) = network(), batch()
    parameters = list(model.parameters())

    def shift(model, x, y, *, generator=None):
        return x + 0.1 * model(x).mean()

    x_adv = shift(model, x, y).detach()
    for build in (lambda a: AdversarialTraining(attack=a), lambda a: TRADES(attack=a), lambda a: MART(attack=a)):
        losses, expected = (build(attack)(model, x, y).sum() for attack in (shift, held(x_adv)))
        pairs = zip(torch.autograd.grad(losses, parameters), torch.autograd.grad(expected, parameters), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


# What a call leaves as it was, and what it moves ---------------------------------------------------------------------


@every_objective
def test_one_loss_per_example_and_no_trace_in_gradients_or_global_noise(build):
    model, (x, y) = network(), batch()
    objective, before = build(LINF), torch.get_rng_state()
    losses = objective(model, x, y, generator=seeded())
    assert isinstance(objective, RobustLoss)
    assert losses.shape == (5,)
    assert losses.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@every_objective
def test_the_same_generator_gives_the_same_loss(build):
    model, (x, y) = network(), batch()
    objective = build(L2)  # signs would lead every start to the same corner
    first, again, other = (objective(model, x, y, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    if "FGSM" not in repr(objective):
        assert not torch.equal(first, other)


@every_objective
def test_batch_statistics_move_by_the_passes_of_the_loss_alone(build):
    """TRADES and MART: clean batch, then attacked batch; the others: the attacked one only; each once and in training mode."""
    model, (x, y) = network(normalised=True), batch()
    objective, twin = build(LINF), copy.deepcopy(model)
    call, seen = recorded(model)
    losses = objective(call, x, y, generator=seeded())  # a closure hides the module, so the attack's passes move it too
    losses.sum().backward()
    model, untouched = copy.deepcopy(twin), copy.deepcopy(twin)
    losses = objective(model, x, y, generator=seeded())
    losses.sum().backward()
    passes = [x, seen[-1]] if isinstance(objective, (TRADES, MART)) else seen[-1:]
    for rows in passes:
        twin(rows)
    assert all(m.training for m in model.modules())
    for (name, moved), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(moved, expected), name
    assert not torch.equal(model[1].running_mean, untouched[1].running_mean)
    untouched.eval()
    objective(untouched, x, y, generator=seeded()).sum().backward()
    assert not any(m.training for m in untouched.modules())
    assert int(untouched[1].num_batches_tracked) == 0


@every_objective
def test_every_call_of_an_attack_is_counted_once(build):
    model, (x, y) = network(), batch()
    with count_calls() as counter:
        build(LINF)(model, x, y)
        build(NOTHING)(model, x, y)
        build(LINF)(model, x[:0], y[:0])
    assert (counter.calls, counter.examples) == (3, 10)


@every_objective
def test_an_empty_batch_has_no_losses(build):
    model, (x, y) = network(), batch()
    losses = build(LINF)(model, x[:0], y[:0], generator=seeded())
    assert losses.shape == (0,)
    losses.sum().backward()


@every_objective
def test_losses_can_be_looked_at_without_gradients(build):
    model, (x, y) = network(), batch()
    expected = build(LINF)(model, x, y, generator=seeded()).detach()
    for silence in (torch.no_grad, torch.inference_mode):
        with silence():
            losses = build(LINF)(model, x.clone(), y.clone(), generator=seeded())
        assert torch.equal(losses, expected)


@every_objective
def test_training_in_a_plain_loop_lowers_the_loss(build):
    model, y = network(), torch.arange(8) % 4
    x = 0.2 + 0.6 * F.one_hot(y, 6).double()  # farther apart than the attack reaches
    objective, optimizer = build(LINF), torch.optim.Adam(model.parameters(), lr=0.03)
    means = []
    for _ in range(40):
        optimizer.zero_grad()
        mean = objective(model, x, y, generator=seeded()).mean()
        mean.backward()
        optimizer.step()
        means.append(mean.item())
    assert means[-1] < 0.8 * means[0]


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: AdversarialTraining(attack=PGD), "got <class 'metarobust.attacks._gradient.PGD'>; write PGD(threat_model=...)"),
        (lambda: AdversarialTraining(attack="pgd"), "attack must be an attack, got 'pgd'; write PGD(threat_model=...)"),
        (lambda: AdversarialTraining(attack=PGD(threat_model=LINF), loss="hinge"), "loss must be one of 'cross_entropy', "),
        (lambda: TRADES(), "threat_model must be a ThreatModel, or an attack in its place, got None"),
        (lambda: TRADES(threat_model=0.1), "threat_model must be a ThreatModel, or an attack in its place, got 0.1"),
        (lambda: TRADES(threat_model=LINF, attack=held(None)), "threat_model must be None beside an attack, which has its own"),
        (lambda: TRADES(attack=FGSM), "write FGSM(threat_model=...)"),
        (lambda: TRADES(threat_model=LINF, beta=-1.0), "beta must be a finite number >= 0, got -1"),
        (lambda: TRADES(threat_model=LINF, beta=math.inf), "beta must be a finite number >= 0, got inf"),
        (lambda: TRADES(threat_model=LINF, steps=0), "steps must be an integer >= 1, got 0"),
        (lambda: TRADES(threat_model=LINF, step_size=0.0), "step_size must be a finite number > 0, got 0"),
        (lambda: TRADES(threat_model=LINF, start_std=0.0), "start_std must be a finite number > 0, got 0"),
        (lambda: MART(attack=None), "attack must be an attack, got None"),
        (lambda: MART(attack=PGD(threat_model=LINF), beta="6"), "beta must be a finite number >= 0, got '6'"),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_sentence(build, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        build()


@every_objective
def test_bad_batches_end_in_one_sentence(build):
    model, (x, y) = network(), batch()
    with pytest.raises(ValueError, match=r"x must be in the box \[0, 1\]"):
        build(LINF)(model, x + 1, y)
    with pytest.raises(ValueError, match=r"y must be in \[0, 4\)"):
        build(LINF)(model, x, y + 4)

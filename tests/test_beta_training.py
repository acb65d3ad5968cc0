"""BETA training: each target's point, and hypergradients against central differences of the whole bilevel problem in float64."""

import copy
import dataclasses
import pickle
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import nn
from torchopt.base import EmptyState, GradientTransformation

from metarobust.attacks import APGD, BETA, PGD, count_calls
from metarobust.losses import cross_entropy, margin, targeted_margin
from metarobust.objectives import AdversarialTraining, BETATraining, SmoothedBETATraining
from metarobust.objectives._hypergradient import conjugate_gradient, rival
from metarobust.threat_models import ThreatModel

DIMENSIONS, CLASSES = 6, 4
LINF = ThreatModel(norm="linf", epsilon=0.1)
L2 = ThreatModel(norm="l2", epsilon=0.3)
L1 = ThreatModel(norm="l1", epsilon=0.5)
every_norm = pytest.mark.parametrize("threat_model", [LINF, L2, L1], ids=lambda t: t.norm)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(activation=nn.Tanh, classes=CLASSES, scale=1.5):
    model = nn.Sequential(nn.Linear(DIMENSIONS, 16), activation(), nn.Linear(16, classes)).double()
    generator = seeded(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (scale / p.shape[-1] ** 0.5))
    return model


def linear(classes=CLASSES):
    model, generator = nn.Linear(DIMENSIONS, classes).double(), seeded(6)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def batch(size=8, *, near_the_box=False, classes=CLASSES):
    x = torch.rand(size, DIMENSIONS, generator=seeded(1), dtype=torch.float64)
    return x if near_the_box else 0.4 * x + 0.3, torch.arange(size) % classes


def recorded(model):
    """The model, and a list that every batch it is called on is added to."""
    seen = []

    def call(x):
        seen.append(x.detach().clone())
        return model(x)

    return call, seen


def flat_gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


def derivative(function, model, direction, size=2e-6):
    """Of a tensor along one direction of all parameters: central differences of fourth order, everything computed anew."""
    with torch.no_grad():
        start = nn.utils.parameters_to_vector(model.parameters()).clone()
        found = 0
        for place, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1), (0, 0)):
            nn.utils.vector_to_parameters(start + place * size * direction, model.parameters())
            found = found + weight * function() / (12 * size)
    return found


def some_direction(model, seed=9):
    return torch.randn(sum(p.numel() for p in model.parameters()), generator=seeded(seed), dtype=torch.float64)


def check_every_example(losses, function, model, rel=1e-7):
    """The derivative of each example's loss, along one direction."""
    direction = some_direction(model)
    expected = derivative(function, model, direction)
    found = torch.stack([flat_gradient(loss, model) @ direction for loss in losses])
    torch.testing.assert_close(found, expected, rtol=rel, atol=rel)
    return found


# The point of each target --------------------------------------------------------------------------------------------


def target_margins(model, points, y, targets):
    """``[batch, targets]``."""
    logits = model(points.flatten(0, 1)).view(*targets.shape, -1)
    own = y[:, None, None].expand(*targets.shape, 1)
    return (logits.gather(2, targets[..., None]) - logits.gather(2, own)).squeeze(2)


@every_norm
@pytest.mark.parametrize("rule", ["rmsprop", "sign", "apgd"])
@pytest.mark.parametrize("options", [{}, {"restarts": 3}, {"targets": "halving"}, {"memory_budget": 1000}], ids=str)
def test_the_best_target_is_the_point_that_the_attack_returns(threat_model, rule, options):
    model, (x, y) = network(), batch(near_the_box=True)
    attack = BETA(threat_model=threat_model, steps=5, step_rule=rule, **options)
    x_adv = attack(model, x, y, generator=seeded())
    points, targets = attack.each_target(model, x, y, generator=seeded())
    assert (targets.sort(1).values == torch.tensor([[j for j in range(CLASSES) if j != label] for label in y])).all()
    margins = target_margins(model, points, y, targets)
    torch.testing.assert_close(margins.amax(1), margin(model(x_adv), y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(points[torch.arange(len(x)), margins.argmax(1)], x_adv, rtol=0, atol=0)
    assert threat_model.contains(points.flatten(0, 1), x.repeat_interleave(CLASSES - 1, 0), tolerance=1e-12).all()
    assert not points.requires_grad


@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"targets": "top_logits", "target_count": 2}], ids=str)
def test_each_target_has_the_best_of_all_points_that_the_search_looked_at(options):
    model, (x, y) = network(), batch(near_the_box=True)
    attack = BETA(threat_model=L2, steps=4, memory_budget=10**9, **options)
    call, seen = recorded(model)
    points, targets = attack.each_target(call, x, y, generator=seeded())
    group = targets.shape[1] * attack.restarts
    steps = [rows.view(len(x), group, DIMENSIONS) for rows in seen if len(rows) == len(x) * group]
    assert len(steps) == attack.steps + 1
    candidates = torch.cat([x[:, None], *steps], 1)
    repeated = [target[:, None].expand(-1, candidates.shape[1]) for target in targets.T]
    reached = torch.stack([target_margins(model, candidates, y, target) for target in repeated], 1)
    torch.testing.assert_close(target_margins(model, points, y, targets), reached.amax(2), rtol=1e-12, atol=1e-12)
    assert torch.equal(points, candidates[torch.arange(len(x))[:, None], reached.argmax(2)])


def test_the_point_of_a_target_may_come_from_the_row_of_another():
    """One step from a random start: some rows land where another class gains more than in its own row."""
    model, (x, y) = network(scale=4), batch(40, near_the_box=True)
    attack = BETA(threat_model=L2, steps=1, memory_budget=10**9)
    call, seen = recorded(model)
    points, targets = attack.each_target(call, x, y, generator=seeded())
    ends = [rows.view(40, CLASSES - 1, DIMENSIONS) for rows in seen if len(rows) == 40 * (CLASSES - 1)]
    own = torch.stack([(points == rows).all(2) for rows in (x[:, None].expand_as(points), *ends)]).any(0)
    assert 0 < (~own).sum() < own.numel() / 2
    # The clean point counts for every class too: a bad row does not hide it.
    clean = target_margins(model, x[:, None].expand_as(points), y, targets)
    assert (target_margins(model, points, y, targets) >= clean).all()


def test_points_of_each_target_cost_the_same_passes():
    model, (x, y) = network(), batch()
    calls = []
    for method in (lambda a: a, lambda a: a.each_target):
        call, seen = recorded(model)
        method(BETA(threat_model=LINF, steps=5))(call, x, y, generator=seeded())
        calls.append([len(rows) for rows in seen])
    assert calls[0] == calls[1]


def test_points_of_each_target_for_a_batch_of_none_a_ball_of_none_and_random_passes():
    model, (x, y) = network(), batch()
    attack = BETA(threat_model=LINF, steps=5)
    points, targets = attack.each_target(model, x[:0], y[:0])
    assert (points.shape, targets.shape) == ((0, 0, DIMENSIONS), (0, 0))
    call, seen = recorded(model)
    points, targets = dataclasses.replace(attack, threat_model=ThreatModel(epsilon=0.0)).each_target(call, x, y)
    assert max(len(rows) for rows in seen) == len(x), "nothing climbs"
    assert targets.shape == (len(x), CLASSES - 1)
    assert torch.equal(points, x[:, None].expand(-1, CLASSES - 1, -1))
    once, again = (
        dataclasses.replace(attack, eot_samples=samples).each_target(model, x, y, generator=seeded()) for samples in (1, 3)
    )
    torch.testing.assert_close(once[0], again[0], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="survivors_only must be False for a point of each target"):
        BETA(threat_model=LINF, survivors_only=True).each_target(model, x, y)
    with pytest.raises(ValueError, match=r"x must be in the box \[0, 1\]"):
        attack.each_target(model, x + 1, y)


# As published --------------------------------------------------------------------------------------------------------


@every_norm
def test_without_a_hypergradient_it_is_the_cross_entropy_at_the_point_held_constant(threat_model):
    model, (x, y) = network(), batch()
    x_adv = BETA(threat_model=threat_model, steps=4, step_rule="apgd")(model, x, y, generator=seeded())
    for objective in (
        BETATraining(threat_model=threat_model, steps=4, step_rule="apgd"),
        BETATraining(attack=BETA(threat_model=threat_model, steps=4, step_rule="apgd")),
    ):
        losses = objective(model, x, y, generator=seeded())
        expected = F.cross_entropy(model(x_adv), y, reduction="none")
        assert torch.equal(losses, expected)
        assert torch.equal(flat_gradient(losses.mean(), model), flat_gradient(expected.mean(), model))


def test_the_fields_build_the_attack():
    model, (x, y) = network(), batch()
    for fields in ({"steps": 3}, {"steps": 3, "step_rule": "sign"}, {"steps": 3, "random_start": False}):
        expected = cross_entropy(model(BETA(threat_model=L2, **fields)(model, x, y, generator=seeded())), y)
        assert torch.equal(BETATraining(threat_model=L2, **fields)(model, x, y, generator=seeded()), expected)
        sharp = SmoothedBETATraining(threat_model=L2, mu=1e9, **fields)(model, x, y, generator=seeded())
        torch.testing.assert_close(sharp, expected, rtol=1e-12, atol=1e-12)


def test_passes_of_one_call():
    model, (x, y) = network(), batch()
    rows, passes = len(x) * (CLASSES - 1), {}
    for hypergradient in ("none", "unrolled", "implicit"):
        call, seen = recorded(model)
        BETATraining(threat_model=LINF, steps=7, hypergradient=hypergradient)(call, x, y, generator=seeded())
        passes[hypergradient] = Counter(len(batch) for batch in seen if len(batch) >= len(x))  # smaller ones measure memory
    assert passes["none"] == {rows: 8, len(x): 2}
    assert passes["unrolled"] == {rows: 8, len(x): 2 + 1 + 7}
    assert passes["implicit"] == {rows: 8, len(x): 2}
    call, seen = recorded(model)
    SmoothedBETATraining(threat_model=LINF, mu=1.0, steps=7)(call, x, y, generator=seeded())
    assert Counter(len(batch) for batch in seen if len(batch) >= len(x)) == {rows: 9, len(x): 1}


@pytest.mark.parametrize("hypergradient", ["none", "unrolled", "implicit"])
def test_two_classes_and_a_linear_model_are_adversarial_training_on_the_margin(hypergradient):
    """Both attacks reach the corner, and by Danskin's theorem nothing is dropped there."""
    model, (x, y) = linear(classes=2), batch(classes=2)
    attack = PGD(threat_model=LINF, loss="margin")
    expected = AdversarialTraining(attack=attack)(model, x, y, generator=seeded())
    for objective in (
        BETATraining(threat_model=LINF, hypergradient=hypergradient),
        SmoothedBETATraining(threat_model=LINF, mu=0.3),
    ):
        losses = objective(model, x, y, generator=seeded())
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(flat_gradient(losses.sum(), model), flat_gradient(expected.sum(), model))
    difference = model.weight[1] - model.weight[0]
    towards = torch.where(y == 0, 1.0, -1.0) * (model(x)[:, 1] - model(x)[:, 0])
    torch.testing.assert_close(expected, F.softplus(towards + LINF.epsilon * difference.abs().sum()), rtol=1e-10, atol=0)


def test_it_charges_an_adversarial_point_where_adversarial_training_charges_a_harmless_one():
    """The affine counterexample of tests/test_search.py: cross-entropy 0.973 at -1, and 0.752 at +1, where the rival wins."""

    def model(t):
        label = 0.1 + 2 * (1 + t)
        return torch.cat([label, label + 0.2 * t - 0.1, torch.zeros_like(t)], 1)

    ball = ThreatModel(norm="linf", epsilon=1.0, lower=-1.0, upper=1.0)
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])
    exact = AdversarialTraining(attack=PGD(threat_model=ball, steps=50, random_start=False))(model, x, y)
    assert exact.item() == pytest.approx(0.973, abs=1e-3)
    assert BETATraining(threat_model=ball)(model, x, y, generator=seeded()).item() == pytest.approx(0.752, abs=1e-3)


# Through the steps ---------------------------------------------------------------------------------------------------

RULES = {
    "beta's rmsprop": lambda: None,
    "sgd": lambda: torchopt.sgd(0.05),
    "adam": lambda: torchopt.adam(0.05, eps_root=1e-8),
}


@every_norm
@pytest.mark.parametrize("near_the_box", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_unrolled_gradient_is_that_of_the_whole_climb(threat_model, near_the_box, rule):
    model, (x, y) = network(scale=2), batch(near_the_box=near_the_box)
    threat_model = dataclasses.replace(threat_model, epsilon=2 * threat_model.epsilon)
    objective = BETATraining(threat_model=threat_model, steps=5, hypergradient="unrolled", update_rule=RULES[rule]())
    call, seen = recorded(model)
    losses = objective(call, x, y, generator=seeded())
    found = check_every_example(losses, lambda: objective(model, x, y, generator=seeded()), model)
    constant = cross_entropy(model(seen[-1]), y)
    assert torch.equal(losses, constant)
    partial = torch.stack([flat_gradient(loss, model) @ some_direction(model) for loss in constant])
    moved = (found - partial).norm() > 1e-3 * partial.norm()
    assert moved or (threat_model.norm == "l1" and rule == "beta's rmsprop")  # steps along one coordinate end in corners


@every_norm
def test_the_climb_is_the_one_of_beta(threat_model):
    """From the same start, for the class of BETA's best point, to the last point of BETA's own row for that class."""
    model, (x, y) = network(scale=3), batch(40, near_the_box=True)
    threat_model = dataclasses.replace(threat_model, epsilon=3 * threat_model.epsilon)
    call, seen = recorded(model)
    objective = BETATraining(attack=BETA(threat_model=threat_model, steps=6, memory_budget=10**9), hypergradient="unrolled")
    objective(call, x, y, generator=seeded())
    start = threat_model.sample(x, generator=seeded())
    best = objective._attack(model, x, y, start=start)
    order = model(start).scatter(1, y[:, None], float("-inf")).topk(CLASSES - 1, dim=1).indices
    place = (order == rival(model(best), y)[:, None]).nonzero()[:, 1]
    last = [rows for rows in seen if len(rows) == len(x) * (CLASSES - 1)][-1].view(len(x), CLASSES - 1, DIMENSIONS)
    torch.testing.assert_close(seen[-1], last[torch.arange(len(x)), place], rtol=0, atol=1e-12)
    assert len(place.unique()) > 1


def test_without_a_random_start_the_climb_begins_at_x():
    model, (x, y) = network(), batch()
    objective = BETATraining(threat_model=L2, steps=2, random_start=False, hypergradient="unrolled")
    call, seen = recorded(model)
    losses = objective(call, x, y)
    at_x = [position for position, rows in enumerate(seen) if torch.equal(rows, x)]
    assert at_x[-1] == len(seen) - 3  # x, a point between, and the pass of the loss
    assert torch.equal(losses, objective(model, x, y))


def test_steps_made_of_signs_have_no_derivative():
    def update(updates, state, *, params=None, inplace=True):
        return tuple(-0.02 * g.sign() for g in updates), state

    rule = GradientTransformation(lambda params: EmptyState(), update)
    model, (x, y) = network(), batch()
    call, seen = recorded(model)
    objective = BETATraining(threat_model=LINF, steps=3, hypergradient="unrolled", update_rule=rule)
    losses = objective(call, x, y, generator=seeded())
    expected = flat_gradient(cross_entropy(model(seen[-1]), y).sum(), model)
    torch.testing.assert_close(flat_gradient(losses.sum(), model), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("hypergradient", ["unrolled", "implicit"])
@pytest.mark.parametrize("threat_model", [LINF, L2], ids=lambda t: t.norm)
def test_gradients_stay_finite_where_the_model_is_flat(threat_model, hypergradient):
    model, (x, y) = network(activation=nn.ReLU), batch()
    with torch.no_grad():
        model[2].weight.zero_()
    losses = BETATraining(threat_model=threat_model, hypergradient=hypergradient)(model, x, y, generator=seeded())
    assert flat_gradient(losses.sum(), model).isfinite().all()


# From optimality -----------------------------------------------------------------------------------------------------


def slope_and_hessian(model, x, y, target):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(targeted_margin(model(x), y, target).sum(), x, create_graph=True)
        rows = [torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])]
    return slope.detach(), torch.stack(rows, 1)


@dataclass
class Optimum:
    """The maximiser of the best margin, found once by long projected ascent; each call polishes it by Newton's method.

    The constraints that hold at the maximiser are kept: they are those of nearby parameters too.
    """

    model: Any
    x: Any
    y: Any
    threat_model: ThreatModel
    steps: int = 700

    def __post_init__(self):
        model, x, y, threat_model = self.model, self.x, self.y, self.threat_model
        point = BETA(threat_model=threat_model, steps=50)(model, x, y, generator=seeded())
        self.target = rival(model(point), y)
        for _ in range(self.steps):
            leaf = point.detach().requires_grad_()
            (slope,) = torch.autograd.grad(targeted_margin(model(leaf), y, self.target).sum(), leaf)
            point = threat_model.project(point + 0.1 * slope, x)
        low, high = threat_model.bounds(x) if threat_model.norm == "linf" else (threat_model.lower, threat_model.upper)
        self.held = (point <= low) | (point >= high)
        on_sphere = threat_model.distance(point, x) > threat_model.epsilon * (1 - 1e-9)
        self.on_sphere = on_sphere & torch.tensor(threat_model.norm == "l2")
        self.point = point
        polished = self(model, x, y)
        assert torch.equal(rival(model(polished), y), self.target)
        torch.testing.assert_close(polished, point, rtol=0, atol=1e-6)
        assert threat_model.contains(polished, x, tolerance=1e-12).all()

    def __call__(self, model, x, y):
        """Newton's method on the conditions of Karush, Kuhn and Tucker, in the point and the sphere's multiplier."""
        point, n = self.point, x.shape[1]
        slope, _ = slope_and_hessian(model, point, y, self.target)
        free = (point - x).masked_fill(self.held, 0)
        multiplier = torch.where(self.on_sphere, (slope * free).sum(1) / free.square().sum(1), 0)
        off = torch.cat([self.held, ~self.on_sphere[:, None]], 1)
        for _ in range(6):
            slope, hessian = slope_and_hessian(model, point, y, self.target)
            radius = point - x
            ball = 0.5 * (self.threat_model.epsilon**2 - radius.square().sum(1, keepdim=True))
            wrong = torch.cat([slope - multiplier[:, None] * radius, ball], 1).masked_fill(off, 0)
            matrix = torch.zeros(len(x), n + 1, n + 1, dtype=x.dtype)
            matrix[:, :n, :n] = hessian - multiplier[:, None, None] * torch.eye(n)
            matrix[:, :n, n] = matrix[:, n, :n] = -radius
            matrix = matrix.masked_fill(off[:, :, None] | off[:, None, :], 0) + torch.diag_embed(off.to(x.dtype))
            step = torch.linalg.solve(matrix, -wrong)
            point, multiplier = point + step[:, :n], multiplier + step[:, n]
        assert wrong.abs().max() < 1e-12
        return point.detach()


@dataclass(frozen=True, kw_only=True)
class Solved(BETA):
    """BETA whose point comes from elsewhere."""

    solve: Any = None

    def __call__(self, model, x, y, *, generator=None, start=None):
        return self.solve(model, x, y)


def implicit(threat_model, solve, **settings):
    return BETATraining(attack=Solved(threat_model=threat_model, solve=solve), hypergradient="implicit", **settings)


CASES = {
    "l_inf, some coordinates inside": (ThreatModel(norm="linf", epsilon=0.3), False),
    "l_inf and the box": (ThreatModel(norm="linf", epsilon=0.3), True),
    "on the sphere": (ThreatModel(norm="l2", epsilon=0.3), False),
    "on the sphere and the box": (ThreatModel(norm="l2", epsilon=0.5), True),
    "in the box, inside the sphere": (ThreatModel(norm="l2", epsilon=2.5), False),
}


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("case", CASES)
def test_the_implicit_gradient_is_that_of_the_whole_bilevel_problem(case, activation):
    threat_model, near_the_box = CASES[case]
    model, (x, y) = network(activation, scale=3 if activation is nn.Tanh else 5), batch(near_the_box=near_the_box)
    solve = Optimum(model, x, y, threat_model)
    share = solve.held.double().mean()
    assert solve.on_sphere.all() == (case.startswith("on the sphere"))
    assert (share > 0) == (case != "on the sphere")
    losses = implicit(threat_model, solve)(model, x, y)
    found = check_every_example(losses, lambda: cross_entropy(model(solve(model, x, y)), y), model)
    constant = cross_entropy(model(solve.point), y)
    torch.testing.assert_close(losses, constant, rtol=1e-9, atol=0)
    partial = torch.stack([flat_gradient(loss, model) @ some_direction(model) for loss in constant])
    if activation is nn.Tanh:
        assert share < 1
        dropped = (found - partial).norm() / found.norm()
        assert dropped > 0.01, "the term that is dropped as published"


class Bowl(nn.Module):
    """Class 1 gains ``-(x - c)' A (x - c) / 2`` on class 0, whose maximum is at c; class 2 gains ``v' x`` less a lot."""

    def __init__(self, curvature):
        super().__init__()
        self.centre = nn.Parameter(torch.tensor([0.42, 0.55, 0.9], dtype=torch.float64))
        self.curvature = curvature
        self.v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def forward(self, x):
        away = x - self.centre
        bowl = 3 - ((away @ self.curvature) * away).sum(1) / 2
        return torch.stack([torch.zeros_like(bowl), bowl, x @ self.v], 1)


STEEP = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, 0.3], [0.5, 0.3, 1.5]], dtype=torch.float64)


def test_a_quadratic_margin_has_a_closed_form():
    """The coordinate that l_inf holds stays; with the centre c the others move by dx = dc_F + A_FF^-1 A_FH dc_H."""
    model, threat_model = Bowl(STEEP), ThreatModel(norm="linf", epsilon=0.2)
    x, y = torch.full((1, 3), 0.5, dtype=torch.float64), torch.tensor([0])
    free, held = [0, 1], [2]
    away = -torch.linalg.solve(STEEP[free][:, free], STEEP[free][:, held] @ (0.7 - model.centre[held]))
    optimum = x.clone()
    optimum[0, free], optimum[0, 2] = (model.centre[free] + away).detach(), 0.7
    losses = implicit(threat_model, lambda *_: optimum)(model, x, y)
    p = model(optimum).softmax(1)[0]
    by_x = p[1] * -(STEEP @ (optimum[0] - model.centre)) + p[2] * model.v
    by_centre = p[1] * (STEEP @ (optimum[0] - model.centre))
    moves = torch.zeros(3, 3, dtype=torch.float64)
    moves[free, free] = 1.0
    moves[:2, 2] = torch.linalg.solve(STEEP[free][:, free], STEEP[free][:, held]).squeeze(1)
    torch.testing.assert_close(flat_gradient(losses.sum(), model), by_centre + by_x @ moves, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("threat_model", [ThreatModel(norm="linf", epsilon=0.2), ThreatModel(norm="l2", epsilon=0.2)])
def test_a_bound_that_the_gradient_does_not_press_against_does_not_hold(threat_model):
    """Pushed to the far side of the ball, every coordinate is free again."""
    model, (x, y) = Bowl(STEEP), (torch.full((1, 3), 0.5, dtype=torch.float64), torch.tensor([0]))
    pushed = threat_model.project(torch.where(model.centre > 0.5, 0.0, 1.0)[None].double(), x)
    losses = implicit(threat_model, lambda *_: pushed)(model, x, y)
    p = model(pushed).softmax(1)[0].detach()
    away = STEEP @ (pushed[0] - model.centre).detach()
    assert (away * (pushed - x)[0] > 0).all()
    torch.testing.assert_close(flat_gradient(losses.sum(), model), p[1] * away + (p[2] * model.v - p[1] * away))


@pytest.mark.parametrize("case", ["l_inf and the box", "on the sphere", "on the sphere and the box"])
def test_with_two_classes_there_is_nothing_to_drop(case):
    threat_model, near_the_box = CASES[case]
    model, (x, y) = network(classes=2, scale=3), batch(near_the_box=near_the_box, classes=2)
    solve = Optimum(model, x, y, threat_model)
    losses = implicit(threat_model, solve)(model, x, y)
    constant = cross_entropy(model(solve(model, x, y)), y)
    torch.testing.assert_close(flat_gradient(losses.sum(), model), flat_gradient(constant.sum(), model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("along_one_input", [False, True])
def test_a_linear_model_on_the_sphere_has_a_closed_form(along_one_input):
    """Also where one coordinate takes the whole radius: it is the ball that holds it, not a bound of its own."""
    model, threat_model = linear(), ThreatModel(norm="l2", epsilon=0.2)
    with torch.no_grad():
        if along_one_input:
            model.weight[:2, 1:] = 0
            model.bias[2:] -= 10
    x, y = batch(classes=2 if along_one_input else CLASSES)
    target = rival(model(BETA(threat_model=threat_model)(model, x, y, generator=seeded())), y)

    def moved(model):
        difference = model.weight[target] - model.weight[y]
        return x + threat_model.epsilon * difference / difference.norm(dim=1, keepdim=True)

    losses = implicit(threat_model, lambda *_: moved(model).detach())(model, x, y)
    expected = cross_entropy(model(moved(model)), y)
    torch.testing.assert_close(losses, expected)
    for loss, exact in zip(losses, expected, strict=True):
        torch.testing.assert_close(flat_gradient(loss, model), flat_gradient(exact, model), rtol=1e-9, atol=1e-12)
    constant = cross_entropy(model(moved(model).detach()), y)
    term = flat_gradient(expected.sum(), model) - flat_gradient(constant.sum(), model)
    assert term.norm() > (1e-6 if along_one_input else 1e-2)


def test_a_piecewise_linear_network_loses_the_term_in_l_inf_and_keeps_it_in_l2():
    model, (x, y) = network(nn.ReLU, scale=2), batch(3)
    x_adv = BETA(threat_model=LINF)(model, x, y, generator=seeded())
    gradients = [
        flat_gradient(losses.sum(), model)
        for losses in (implicit(LINF, lambda *_: x_adv)(model, x, y), cross_entropy(model(x_adv), y))
    ]
    assert torch.equal(*gradients)
    threat_model = ThreatModel(norm="l2", epsilon=0.05)
    solve = Optimum(model, x, y, threat_model, steps=300)
    check_every_example(
        implicit(threat_model, solve)(model, x, y), lambda: cross_entropy(model(solve(model, x, y)), y), model, rel=1e-6
    )


def test_damping_draws_the_gradient_towards_the_one_without_the_term():
    threat_model, _ = CASES["on the sphere"]
    model, (x, y) = network(scale=3), batch()
    solve = Optimum(model, x, y, threat_model)
    constant = flat_gradient(cross_entropy(model(solve.point), y).sum(), model)

    def term(damping):
        return (flat_gradient(implicit(threat_model, solve, damping=damping)(model, x, y).sum(), model) - constant).norm()

    sizes = [term(damping) for damping in (0.0, 1.0, 10.0, 1e9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-6 * sizes[0]
    assert sizes[1] < 0.95 * sizes[0]
    # One direction only: the damped curvature is the curvature plus the damping.
    bowl, x, y = Bowl(2 * torch.eye(3, dtype=torch.float64)), torch.full((1, 3), 0.5, dtype=torch.float64), torch.tensor([0])
    ball, centre = ThreatModel(norm="linf", epsilon=0.5), bowl.centre.detach()[None].clone()
    p = bowl(centre).softmax(1)[0, 2].detach()
    gradient = flat_gradient(implicit(ball, lambda *_: centre, damping=3.0)(bowl, x, y).sum(), bowl)
    torch.testing.assert_close(gradient, p * bowl.v * 2 / (2 + 3))


def test_a_point_that_is_no_maximum_loses_the_term_and_spoils_no_other():
    """The second example stands at the bottom of a bowl turned over."""

    class Turned(Bowl):
        def forward(self, x):
            logits = super().forward(x)
            return torch.stack([logits[:, 0], torch.where(x[:, 0] > 0.5, 4 - logits[:, 1], logits[:, 1]), logits[:, 2]], 1)

    model, ball = Turned(STEEP), ThreatModel(norm="linf", epsilon=0.5)
    centre = model.centre.detach()
    with torch.no_grad():
        model.centre[0] = 0.6
    points = torch.stack([torch.tensor([0.3, *centre[1:]]), torch.tensor([0.6, *centre[1:]])]).double()
    x, y = torch.full((2, 3), 0.5, dtype=torch.float64), torch.tensor([0, 0])
    losses = implicit(ball, lambda *_: points)(model, x, y)
    constant = cross_entropy(model(points), y)
    torch.testing.assert_close(flat_gradient(losses[1], model), flat_gradient(constant[1], model), rtol=0, atol=0)
    alone = implicit(ball, lambda *_: points[:1])(model, x[:1], y[:1])
    torch.testing.assert_close(flat_gradient(losses[0], model), flat_gradient(alone[0], model), rtol=1e-12, atol=0)
    assert not torch.allclose(flat_gradient(losses[0], model), flat_gradient(constant[0], model), rtol=1e-2)


def test_conjugate_gradients_solve_every_row_by_itself():
    root = torch.randn(5, 7, 7, generator=seeded(), dtype=torch.float64)
    matrices = root @ root.mT + 0.1 * torch.eye(7)
    matrices[3] = -matrices[3]
    b = torch.randn(5, 7, generator=seeded(1), dtype=torch.float64)
    b[1] = 0
    tolerance = 1e-12 * b.norm(dim=1, keepdim=True)
    calls = []

    def product(v):
        calls.append(v)
        return (matrices @ v[..., None]).squeeze(2)

    found = conjugate_gradient(product, b, tolerance, 50)
    expected = torch.linalg.solve(matrices, b)
    expected[3] = 0
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    by_torchopt = torchopt.linear_solve.solve_cg(rtol=1e-12)(lambda v: matrices[0] @ v, b[0])
    torch.testing.assert_close(found[0], by_torchopt, rtol=1e-7, atol=1e-9)
    assert len(calls) < 25
    calls.clear()
    conjugate_gradient(product, b, tolerance, 3)
    assert len(calls) == 3


@pytest.mark.parametrize("case", ["on the sphere", "on the sphere and the box"])
def test_iterations_bound_the_hessian_vector_products_and_too_many_do_no_harm(case):
    """On the sphere rounding would lead out of the tangent space again, if it were not stopped in time."""
    threat_model, near_the_box = CASES[case]
    model, (x, y) = network(scale=3), batch(near_the_box=near_the_box)
    solve = Optimum(model, x, y, threat_model)
    exact, rough, late = (
        flat_gradient(implicit(threat_model, solve, iterations=count)(model, x, y).sum(), model) for count in (20, 1, 300)
    )
    assert 1e-4 < (exact - rough).norm() / exact.norm() < 0.5
    torch.testing.assert_close(late, exact, rtol=1e-9, atol=1e-9)


# Smoothed ------------------------------------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("mu", [0.0, 0.7, 5.0])
def test_the_smoothed_loss_is_the_sum_over_the_wrong_classes(threat_model, mu):
    model, (x, y) = network(), batch()
    attack = BETA(threat_model=threat_model, steps=4)
    points, targets = attack.each_target(model, x, y, generator=seeded())
    losses = SmoothedBETATraining(attack=attack, mu=mu)(model, x, y, generator=seeded())
    expected = []
    with torch.no_grad():
        weights = [F.softmax(mu * m, 0) for m in target_margins(model, points, y, targets)]
    for i, label in enumerate(y):
        at_points = F.cross_entropy(model(points[i]), label.repeat(CLASSES - 1), reduction="none")
        expected.append((weights[i] * at_points).sum() if mu else at_points.mean())
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(flat_gradient(losses.sum(), model), flat_gradient(sum(expected), model), rtol=1e-10, atol=1e-14)


@every_norm
def test_sharp_weights_are_beta_training_exactly(threat_model):
    model, (x, y) = network(), batch(40)
    for attack in (BETA(threat_model=threat_model, steps=4), BETA(threat_model=threat_model, steps=4, restarts=2)):
        sharp = SmoothedBETATraining(attack=attack, mu=1e12)(model, x, y, generator=seeded())
        best = BETATraining(attack=attack)(model, x, y, generator=seeded())
        torch.testing.assert_close(sharp, best, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(flat_gradient(sharp.sum(), model), flat_gradient(best.sum(), model), rtol=1e-11, atol=1e-13)


def test_with_two_classes_the_weights_do_nothing():
    model, (x, y) = network(classes=2), batch(classes=2)
    expected = BETATraining(threat_model=L2)(model, x, y, generator=seeded())
    for mu in (0.0, 3.0):
        losses = SmoothedBETATraining(threat_model=L2, mu=mu)(model, x, y, generator=seeded())
        torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)


# What a call leaves as it was ----------------------------------------------------------------------------------------


OBJECTIVES = {
    "none": lambda t: BETATraining(threat_model=t, steps=3),
    "unrolled": lambda t: BETATraining(threat_model=t, steps=3, hypergradient="unrolled"),
    "implicit": lambda t: BETATraining(threat_model=t, steps=3, hypergradient="implicit"),
    "smoothed": lambda t: SmoothedBETATraining(threat_model=t, steps=3, mu=1.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("threat_model", [LINF, L2], ids=lambda t: t.norm)
def test_images_in_single_precision_and_batch_statistics(name, threat_model):
    """In training mode only the pass of the loss moves the statistics, and the gradient still flows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES))
    x, y = torch.rand(6, 1, 4, 4, generator=seeded()), torch.arange(6) % CLASSES
    x = x.contiguous(memory_format=torch.channels_last)
    objective, before = OBJECTIVES[name](threat_model), torch.get_rng_state()
    with count_calls() as counter:
        losses = objective(model, x, y, generator=seeded())
    assert (counter.calls, counter.examples) == (1, 6)
    assert int(model[1].num_batches_tracked) == 1
    losses.mean().backward()
    assert losses.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    model.eval()
    statistics = copy.deepcopy(dict(model.named_buffers()))
    losses = objective(model, x, y, generator=seeded())
    losses.sum().backward()
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    model.train()
    with torch.no_grad():
        objective(model, x, y, generator=seeded())
    assert int(model[1].num_batches_tracked) == 2
    model.eval()
    losses = objective(model, x, y, generator=seeded())
    with torch.inference_mode():
        silent = objective(model, x.clone(), y.clone(), generator=seeded())
    assert torch.equal(silent, losses)
    assert objective(model, x[:0], y[:0]).shape == (0,)
    assert torch.equal(OBJECTIVES[name](ThreatModel(epsilon=0.0))(model, x, y), cross_entropy(model(x), y)) or name == "smoothed"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_can_be_stored(name):
    model, (x, y) = network(), batch()
    objective = OBJECTIVES[name](L2)
    losses = objective(model, x, y, generator=seeded())
    again = pickle.loads(pickle.dumps(objective))
    assert again == objective
    assert torch.equal(again(model, x, y, generator=seeded()), losses)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [BETATraining, lambda **fields: SmoothedBETATraining(mu=1.0, **fields)])
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "threat_model must be a ThreatModel, or a BETA as attack in its place, got None"),
        ({"threat_model": 0.1}, "threat_model must be a ThreatModel, or a BETA as attack in its place, got 0.1"),
        ({"attack": BETA}, "write BETA(threat_model=...), or use AdversarialTraining"),
        ({"attack": APGD(threat_model=LINF)}, "attack must be a BETA, got APGD("),
        ({"attack": BETA(threat_model=LINF), "threat_model": LINF}, "threat_model must be None beside an attack"),
        ({"threat_model": LINF, "steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"threat_model": LINF, "step_rule": "adam"}, "step_rule must be one of 'rmsprop', 'sign', 'apgd', got 'adam'"),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_sentence(build, fields, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        build(**fields)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: BETATraining(threat_model=LINF, hypergradient="ift"), "hypergradient must be one of 'none', 'unrolled', "),
        (lambda: BETATraining(threat_model=L1, hypergradient="implicit"),
         "norm must be 'linf' or 'l2' with hypergradient='implicit', got 'l1'; write hypergradient='unrolled'"),
        (lambda: BETATraining(threat_model=LINF, update_rule=torchopt.sgd(0.1)), "update_rule must be None without the steps"),
        (lambda: BETATraining(threat_model=LINF, hypergradient="unrolled", update_rule=0.1),
         "update_rule must be a TorchOpt GradientTransformation, got 0.1"),
        (lambda: BETATraining(threat_model=LINF, damping=-1.0), "damping must be a finite number >= 0, got -1"),
        (lambda: BETATraining(threat_model=LINF, iterations=0), "iterations must be an integer >= 1, got 0"),
        (lambda: SmoothedBETATraining(threat_model=LINF, mu=-1.0), "mu must be a finite number >= 0, got -1"),
        (lambda: SmoothedBETATraining(attack=BETA(threat_model=LINF, survivors_only=True), mu=1.0),
         "survivors_only must be False in an attack to train on, got True"),
    ],
)  # fmt: skip
def test_bad_settings_of_one_class_end_in_one_sentence(build, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        build()

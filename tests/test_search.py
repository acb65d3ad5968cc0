"""APGD and BETA beyond the contract: closed forms, a plain reference, and the bookkeeping of many rows."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metarobust.attacks import APGD, BETA, FGSM, PGD, Alternating, Square, WorstCase
from metarobust.attacks._memory import halving_on_out_of_memory, rows_within
from metarobust.attacks._step_rules import checkpoints
from metarobust.losses import cross_entropy, dlr, margin, targeted_dlr, targeted_margin
from metarobust.models import cnn
from metarobust.threat_models import ThreatModel

DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}
RULES = ("rmsprop", "sign", "apgd")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def affine(classes=5, dimensions=12):
    """Logits W x + b: the best margin of class j over an inactive box is M_j(x) + epsilon * ||w_j - w_y||_dual."""
    weight = torch.randn(classes, dimensions, generator=seeded(1), dtype=torch.float64)
    bias = torch.randn(classes, generator=seeded(2), dtype=torch.float64)
    return (lambda x: x @ weight.T + bias), weight


def smooth(classes=4, dtype=torch.float64):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, classes)).to(dtype)
    generator = seeded(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model.eval().requires_grad_(False)


def images(size=8, dtype=torch.float64):
    return torch.rand(size, 1, 4, 4, generator=seeded(4), dtype=torch.float64).to(dtype)


# Where cross-entropy ascent fails ------------------------------------------------------------------------------------


def counterexample(classes):
    """An affine classifier of a scalar input in [-1, 1] whose cross-entropy rises away from its only adversarial end."""

    def model(t):
        t = t.flatten(1).squeeze(1)
        label = 0.1 + 2 * (1 + t)
        rival = label + 0.2 * t - 0.1
        return torch.stack([label, rival, *[torch.zeros_like(t)] * (classes - 2)], 1)

    return model, ThreatModel(norm="linf", epsilon=1.0, lower=-1.0, upper=1.0)


@pytest.mark.parametrize(
    ("classes", "at_minus", "at_plus"), [(2, 0.554, 0.744), (3, 0.973, 0.752), (4, 1.267, 0.760), (10, 2.195, 0.805)]
)
def test_the_counterexample_has_the_cross_entropies_of_its_closed_form(classes, at_minus, at_plus):
    model, _ = counterexample(classes)
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    losses = cross_entropy(model(ends), torch.zeros(2, dtype=torch.int64))
    assert losses.tolist() == pytest.approx([at_minus, at_plus], abs=6e-4)


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_cross_entropy_ascent_misses_the_adversarial_example_that_beta_finds(classes):
    model, threat_model = counterexample(classes)
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for attack in (FGSM(threat_model=threat_model), PGD(threat_model=threat_model, steps=50, random_start=False)):
        assert attack(model, x, y).item() == -1
        assert margin(model(attack(model, x, y)), y).item() == pytest.approx(-0.1)
    for rule in RULES:
        x_adv = BETA(threat_model=threat_model, step_rule=rule, random_start=False)(model, x, y)
        assert x_adv.item() == pytest.approx(1)
        assert margin(model(x_adv), y).item() == pytest.approx(0.1)


def test_with_two_classes_cross_entropy_finds_it():
    model, threat_model = counterexample(2)
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    x_adv = PGD(threat_model=threat_model, steps=50, random_start=False)(model, x, y)
    assert x_adv.item() == 1
    assert margin(model(x_adv), y).item() > 0


# Closed forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("rule", RULES)
def test_beta_is_exact_on_affine_logits(norm, rule):
    model, weight = affine()
    threat_model = ThreatModel(norm=norm, epsilon=0.7, lower=-50, upper=50)
    x, y = torch.randn(9, 12, generator=seeded(5), dtype=torch.float64), torch.arange(9) % 5
    steps = 60
    reached = margin(model(BETA(threat_model=threat_model, steps=steps, step_rule=rule)(model, x, y, generator=seeded())), y)
    clean = model(x) - model(x).gather(1, y[:, None])
    gain = 0.7 * torch.linalg.vector_norm(weight[None] - weight[y][:, None], ord=DUAL[norm], dim=2)
    best = (clean + gain).scatter(1, y[:, None], float("-inf")).amax(1)
    assert (reached <= best + 1e-9).all()
    torch.testing.assert_close(reached, best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", ["top_logits", "nearest"])
def test_one_target_is_the_best_by_its_own_measure(targets):
    """On affine logits the first-order distance is exact; the two measures choose different classes here."""
    model, weight = affine()
    threat_model = ThreatModel(norm="l2", epsilon=0.3, lower=-50, upper=50)
    x = torch.randn(40, 12, generator=seeded(5), dtype=torch.float64)
    logits = model(x)
    y = logits.argmax(1)
    margins = (logits - logits.gather(1, y[:, None])).scatter(1, y[:, None], float("-inf"))
    distances = -margins / (weight[None] - weight[y][:, None]).norm(dim=2).clamp(min=1e-12)
    want = margins.argmax(1) if targets == "top_logits" else distances.argmin(1)
    assert (margins.argmax(1) != distances.argmin(1)).any()
    attack = BETA(threat_model=threat_model, steps=40, step_rule="sign", targets=targets, target_count=1, random_start=False)
    moved = attack(model, x, y) - x
    towards = torch.nn.functional.cosine_similarity(moved, weight[want] - weight[y], dim=1)
    torch.testing.assert_close(towards, torch.ones(40, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_with_two_classes_the_margin_and_the_cross_entropy_lead_the_same_way(rule):
    """There CE = log(1 + exp(M)), monotone in M: sign steps, and APGD's comparisons of losses, cannot tell them apart."""
    model, threat_model = smooth(classes=2), ThreatModel(norm="linf", epsilon=0.1)
    x, y = images(), torch.arange(8) % 2
    beta = BETA(threat_model=threat_model, steps=20, step_rule="apgd")(model, x, y, generator=seeded())
    by_cross_entropy = APGD(threat_model=threat_model, steps=20)(model, x, y, generator=seeded())
    torch.testing.assert_close(margin(model(by_cross_entropy), y), margin(model(beta), y), rtol=0, atol=1e-4)
    other = BETA(threat_model=threat_model, steps=60, step_rule=rule)(model, x, y, generator=seeded())
    torch.testing.assert_close(cross_entropy(model(other), y), cross_entropy(model(beta), y), rtol=1e-2, atol=0)


def test_losses_of_autoattack_have_their_definitions():
    z = torch.tensor([[5.0, 1.0, 4.0, 2.0, 0.0]], dtype=torch.float64)
    y, target = torch.tensor([0]), torch.tensor([3])
    assert dlr(z, y).item() == pytest.approx(-(5 - 4) / (5 - 2))
    assert dlr(z, torch.tensor([2])).item() == pytest.approx((5 - 4) / (5 - 2))
    assert targeted_dlr(z, y, target).item() == pytest.approx(-(5 - 2) / (5 - (2 + 1) / 2))
    assert targeted_margin(z, y, target).item() == -3
    torch.testing.assert_close(dlr(7 * z + 3, y), dlr(z, y))


@pytest.mark.parametrize(("loss", "targets", "classes"), [("dlr", None, 2), ("dlr", 2, 3)])
def test_too_few_classes_for_dlr_are_told_what_to_use(loss, targets, classes):
    attack = APGD(threat_model=ThreatModel(), loss=loss, targets=targets)
    with pytest.raises(ValueError, match=f"logits must be of at least {classes + 1} classes .* got {classes}; use loss='margin'"):
        attack(smooth(classes), images(), torch.zeros(8, dtype=torch.int64), generator=seeded())


# APGD against a plain reference ------------------------------------------------------------------------------------------


def test_checkpoints_are_those_of_autoattack():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(30)[:7] == [6, 11, 15, 18, 20, 21, 22]
    assert checkpoints(10) == [2, 3, 4, 5, 6, 7, 8, 9]


def plain_apgd(model, x, y, start, threat_model, steps, loss):
    """Algorithm 1 for one example, written out in the order of the paper; returns the points visited."""

    def value_and_gradient(point):
        leaf = point.clone().requires_grad_()
        value = loss(model(leaf), y).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient

    def ahead(point, gradient, length):
        return threat_model.project(point + length * threat_model.ascent_direction(gradient), x)

    length, visited = 2 * threat_model.epsilon, [start]
    value, gradient = value_and_gradient(start)
    values = [value]
    best_point, best_value, best_gradient = start, value, gradient
    halved, best_at_check, last = True, value, 0
    previous, point = start, start
    marks = checkpoints(steps)
    for step in range(1, steps + 1):
        z = ahead(point, gradient, length)
        a = 1.0 if step == 1 else 0.75
        new = threat_model.project(point + a * (z - point) + (1 - a) * (point - previous), x) if step > 1 else z
        previous, point = point, new
        visited.append(point)
        value, gradient = value_and_gradient(point)
        values.append(value)
        if value > best_value:
            best_point, best_value, best_gradient = point, value, gradient
        if step in marks:
            rises = sum(values[i] > values[i - 1] for i in range(last + 1, step + 1))
            stuck = rises <= 0.75 * (step - last)
            stalled = not halved and best_value <= best_at_check
            halved, best_at_check, last = stuck or stalled, best_value, step
            if halved:
                length, point, gradient = length / 2, best_point, best_gradient
    return visited


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [7, 40])
def test_apgd_visits_the_points_of_a_plain_implementation(norm, steps):
    model, threat_model = smooth(), ThreatModel(norm=norm, epsilon=0.3 if norm == "linf" else 1.0)
    x, y = images(5), torch.arange(5) % 4
    asked = []

    def watched(points):
        asked.append(points.detach().clone())
        return model(points)

    APGD(threat_model=threat_model, steps=steps, random_start=False)(watched, x, y)
    visited = asked[-(steps + 1) :]
    for row in range(5):
        want = plain_apgd(model, x[row : row + 1], y[row : row + 1], x[row : row + 1], threat_model, steps, cross_entropy)
        torch.testing.assert_close(torch.stack([v[row] for v in visited]), torch.cat(want), rtol=0, atol=1e-6)


# Bookkeeping -------------------------------------------------------------------------------------------------------------

VARIANTS = [
    {"step_rule": rule, "targets": targets, "target_count": count, "restarts": restarts}
    for rule, (targets, count), restarts in itertools.product(
        RULES, [("all", None), ("top_logits", 2), ("nearest", 2), ("halving", None)], [1, 2]
    )
]


@pytest.mark.parametrize("settings_", VARIANTS, ids=lambda s: "-".join(str(v) for v in s.values()))
@pytest.mark.parametrize("survivors_only", [False, True])
def test_chunks_do_not_change_a_bit(settings_, survivors_only):
    """Chunks of one example. A row of this model sums its own entries: its rounding does not depend on the batch."""
    weight = torch.randn(4, 16, generator=seeded(1), dtype=torch.float64)

    def model(x):
        return torch.tanh((x.flatten(1)[:, None] * weight).sum(2))

    x = images()
    y = model(x).argmax(1)
    attack = BETA(threat_model=ThreatModel(epsilon=0.2), steps=12, survivors_only=survivors_only, **settings_)
    whole = attack(model, x, y, generator=seeded())
    assert torch.equal(dataclasses.replace(attack, memory_budget=1)(model, x, y, generator=seeded()), whole)


def test_the_memory_budget_bounds_the_rows_of_a_pass():
    model, x = cnn([4, 8]).eval(), torch.rand(30, 1, 8, 8, generator=seeded())
    rows = []

    def watched(points):
        rows.append(len(points))
        return model(points)

    per_row = 2**20 // rows_within(2**20, model, x)
    attack = BETA(threat_model=ThreatModel(epsilon=0.01), steps=2, memory_budget=40 * per_row + per_row // 2)
    attack(watched, x, torch.zeros(30, dtype=torch.int64), generator=seeded())
    assert max(rows) == 36  # four examples with nine targets each


def test_activations_and_state_are_counted_without_the_parameters():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1000), nn.Sigmoid())  # the sigmoid keeps its output, 4,000 bytes a row
    assert rows_within(425_600, model, torch.rand(3, 16)) == 100  # and four tensors of 64 bytes
    assert rows_within(1, model, torch.rand(3, 16)) == 1


def test_activations_of_every_layer_of_a_deep_network_are_counted():
    """Layer by layer memory is free again, and the next layer gets the same address: each counts all the same."""
    widths = [16, 512, 64, 512, 32, 256, 512, 10]
    layers = [(nn.Linear(a, b), nn.Sigmoid()) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(nn.Flatten(), *(layer for pair in layers for layer in pair))
    per_row = 4 * (sum(widths) + 3 * widths[0])  # every sigmoid's output and the input; three tensors of state
    assert rows_within(100 * per_row, model, torch.rand(3, 16)) == 100
    assert rows_within(100 * per_row - 1, model, torch.rand(3, 16)) == 99


def test_out_of_memory_halves_the_chunk_and_loses_nothing():
    model = smooth()
    x, y = images(), torch.arange(8) % 4
    attack = BETA(threat_model=ThreatModel(epsilon=0.2), steps=6)
    want = attack(model, x, y, generator=seeded())
    sizes = []

    def small(points):
        sizes.append(len(points))
        if len(points) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(points)

    torch.testing.assert_close(attack(small, x, y, generator=seeded()), want, rtol=0, atol=1e-12)
    assert 24 in sizes
    assert max(sizes[-5:]) == 6

    def hopeless(points):
        if len(points) > 8:
            return model(points)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        halving_on_out_of_memory(lambda part: hopeless(x[part]), 8, 8)
    with pytest.raises(RuntimeError, match="another reason"):
        halving_on_out_of_memory(lambda part: (_ for _ in ()).throw(RuntimeError("another reason")), 8, 8)


def rows_per_step(attack, model, x, y):
    """Rows of each forward pass after the measurement of memory and the look at the clean batch."""
    rows = []

    def watched(points):
        rows.append(len(points))
        return model(points)

    attack(watched, x, y, generator=seeded())
    return rows[3:]


def test_passes_are_counted_as_documented():
    model, x, y = smooth(), images(), torch.arange(8) % 4
    threat_model = ThreatModel(epsilon=0.05)
    assert rows_per_step(BETA(threat_model=threat_model, steps=5), model, x, y) == [24] * 6
    assert rows_per_step(BETA(threat_model=threat_model, steps=5, restarts=2, eot_samples=3), model, x, y) == [144] * 6
    assert rows_per_step(APGD(threat_model=threat_model, steps=5, restarts=2), model, x, y) == [16] * 6
    halving = BETA(threat_model=threat_model, steps=8, targets="halving", restarts=2)
    assert rows_per_step(halving, model, x, y) == [48, 48, 48, 24, 24, 16, 16, 8, 8]


def test_finished_examples_are_asked_no_more():
    """A linear model whose examples have different leads: each falls in its own step."""

    def model(x):
        return torch.stack([x[:, 0], x[:, 1], x[:, 1] - 5], 1)

    lead = torch.linspace(0.02, 0.9, 20, dtype=torch.float64)
    x = torch.stack([0.5 + lead / 2, 0.5 - lead / 2], 1)
    y = torch.zeros(20, dtype=torch.int64)
    attack = BETA(threat_model=ThreatModel(epsilon=0.4), steps=20, random_start=False, survivors_only=True)
    rows = rows_per_step(attack, model, x, y)
    assert rows[0] == 40
    assert rows[-1] <= 12
    assert rows == sorted(rows, reverse=True)
    whole = dataclasses.replace(attack, survivors_only=False)(model, x, y)
    stopped = attack(model, x, y)
    assert torch.equal(margin(model(stopped), y) > 0, margin(model(whole), y) > 0)
    assert (margin(model(whole), y) >= margin(model(stopped), y)).all()


def test_misclassified_examples_stay_where_they_are_for_survivors_only():
    model, x = smooth(), images()
    y = (model(x).argmax(1) + torch.arange(8) % 2) % 4
    x_adv = BETA(threat_model=ThreatModel(epsilon=0.05), steps=3, survivors_only=True)(model, x, y, generator=seeded())
    assert torch.equal(x_adv[1::2], x[1::2])
    assert not torch.equal(x_adv[::2], x[::2])


def test_cross_credit_counts_classes_that_no_row_goes_for():
    """The only target's logit cannot overtake; the way there carries a third class over the label."""

    def model(x):
        return torch.stack([torch.full_like(x[:, 0], 0.5), 0.4 + 0.01 * x[:, 0], 3 * x[:, 0] - 1.6], 1)

    x, y = torch.full((1, 1), 0.5), torch.zeros(1, dtype=torch.int64)
    attack = BETA(threat_model=ThreatModel(epsilon=0.3), steps=10, targets="top_logits", target_count=1)
    assert model(attack(model, x, y, generator=seeded())).argmax(1).item() == 2


def test_a_point_that_fools_the_model_beats_one_of_larger_loss():
    """Cross-entropy is larger at the other end of the ball, where the prediction stays right (3a of Robey et al.)."""
    model, threat_model = counterexample(10)
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    attack = APGD(threat_model=threat_model, steps=10, restarts=20)
    assert margin(model(attack(model, x, y, generator=seeded())), y).item() > 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("rule", RULES)
def test_more_restarts_and_a_start_are_never_worse(norm, rule):
    model, x, y = smooth(), images(), torch.arange(8) % 4
    threat_model = ThreatModel(norm=norm, epsilon={"linf": 0.2, "l2": 0.5, "l1": 1.0}[norm])
    attack = BETA(threat_model=threat_model, steps=4, step_rule=rule)
    one, three = (margin(model(dataclasses.replace(attack, restarts=r)(model, x, y, generator=seeded())), y) for r in (1, 3))
    assert (three >= one - 1e-12).all()
    start = threat_model.sample(x, generator=seeded(9))
    warm = margin(model(attack(model, x, y, generator=seeded(), start=start)), y)
    assert (warm >= margin(model(start), y) - 1e-12).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_larger_ball_and_more_steps_raise_the_margin(norm):
    model, x, y = smooth(), images(), torch.arange(8) % 4
    radii = {"linf": (0.02, 0.1, 0.3), "l2": (0.1, 0.4, 1.0), "l1": (0.2, 1.0, 3.0)}[norm]
    by_radius = [
        margin(model(BETA(threat_model=ThreatModel(norm=norm, epsilon=e), steps=40)(model, x, y, generator=seeded())), y)
        for e in radii
    ]
    assert (by_radius[1] > by_radius[0]).all()
    assert (by_radius[2] > by_radius[1]).all()
    threat_model = ThreatModel(norm=norm, epsilon=radii[1])
    by_steps = [
        margin(model(BETA(threat_model=threat_model, steps=s, step_rule="apgd")(model, x, y, generator=seeded())), y).mean()
        for s in (2, 10, 60)
    ]
    assert by_steps[0] <= by_steps[1] + 1e-3
    assert by_steps[1] <= by_steps[2] + 1e-3


def test_expectation_over_transformation_finds_what_single_passes_miss():
    """Noise with a standard deviation far above the signal: a mean over passes recovers the direction."""
    noise = seeded(6)
    weight = torch.randn(16, generator=seeded(1)) / 4

    def model(x):
        shaken = x.flatten(1) @ weight
        kick = 30 * torch.randn(len(x), 16, generator=noise)
        score = shaken + ((x.flatten(1) - x.flatten(1).detach()) * kick).sum(1)  # randomises the gradient, not the value
        return torch.stack([score, -score], 1)

    x = torch.full((20, 1, 4, 4), 0.5)
    y = torch.zeros(20, dtype=torch.int64) + int((weight.sum() / 2) < 0)
    attack = BETA(threat_model=ThreatModel(epsilon=0.3), steps=1, random_start=False)
    score = {
        samples: margin(model(dataclasses.replace(attack, eot_samples=samples)(model, x, y)), y).mean() for samples in (1, 4000)
    }
    assert score[4000] > score[1] + 0.3


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    shape=st.sampled_from([(3,), (1, 4, 4), (2, 3), (3, 2, 5)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    epsilon=st.floats(0.01, 0.9),
    size=st.integers(1, 4),
    attack=st.sampled_from(
        [
            lambda tm: BETA(threat_model=tm, steps=4),
            lambda tm: BETA(threat_model=tm, steps=4, step_rule="sign", targets="halving"),
            lambda tm: BETA(threat_model=tm, steps=4, step_rule="apgd", restarts=2),
            lambda tm: APGD(threat_model=tm, steps=6, loss="dlr"),
            lambda tm: WorstCase([APGD(threat_model=tm, steps=3), BETA(threat_model=tm, steps=3)]),
            lambda tm: Alternating(threat_model=tm, steps=3, queries=5, rounds=1),
        ]
    ),
)
def test_inside_ball_and_box_and_never_worse_than_the_clean_point(norm, shape, dtype, epsilon, size, attack):
    dimensions = torch.Size(shape).numel()
    weight = torch.randn(4, dimensions, generator=seeded(1))

    def model(x):
        return torch.tanh(x.float().flatten(1) @ weight.T)

    threat_model = ThreatModel(norm=norm, epsilon=epsilon)
    x = torch.rand(size, *shape, generator=seeded(2)).to(dtype)
    y = torch.arange(size) % 4
    x_adv = attack(threat_model)(model, x, y, generator=seeded())
    assert x_adv.dtype == dtype
    assert x_adv.shape == x.shape
    slack = 1e-5 if dtype != torch.bfloat16 else 0.02
    assert threat_model.contains(x_adv.double(), x.double(), tolerance=slack).all()
    assert (margin(model(x_adv), y) >= margin(model(x), y) - 1e-6).all()


# Several attacks ---------------------------------------------------------------------------------------------------------


def test_worst_case_runs_each_attack_on_the_survivors_of_those_before():
    sizes = []

    @dataclasses.dataclass(frozen=True)
    class Marks:
        rows: tuple
        threat_model: ThreatModel

        def __call__(self, model, x, y, *, generator=None):
            sizes.append(len(x))
            moved = x.clone()
            for row in self.rows:
                moved[(x[:, 0] - row).abs() < 1e-6] = torch.tensor([0.45, 0.55])
            return moved

    threat_model = ThreatModel(epsilon=0.1)
    x, y = torch.tensor([[0.52, 0.48], [0.54, 0.46], [0.53, 0.47], [0.2, 0.8]]), torch.zeros(4, dtype=torch.int64)
    attack = WorstCase([Marks((0.52,), threat_model), Marks((0.54, 0.52), threat_model), Marks((), threat_model)])
    x_adv = attack(lambda x: x, x, y)
    assert sizes == [3, 2, 1]
    assert (x_adv.argmax(1) == torch.tensor([1, 1, 0, 1])).all()
    assert torch.equal(x_adv[2:], x[2:])


@pytest.mark.parametrize(
    ("attacks", "error", "text"),
    [
        ([], ValueError, "attacks must be at least one attack, got none"),
        (FGSM(threat_model=ThreatModel()), TypeError, r"attacks must be a sequence of attacks, got FGSM; write \[FGSM"),
        ([1], TypeError, "got an element 1"),
        ([FGSM(threat_model=ThreatModel()), FGSM(threat_model=ThreatModel(epsilon=0.1))], ValueError, "of one threat model"),
    ],
)
def test_worst_case_refuses_what_is_no_list_of_attacks(attacks, error, text):
    with pytest.raises(error, match=text):
        WorstCase(attacks)


def test_alternating_breaks_what_neither_part_breaks():
    """Two locks: random windows must open a gate that has no gradient, and many small moves must then add up.

    The second pixel's rounded value multiplies a sum over the other pixels; one without the other leaves the label on top.
    """

    def model(x):
        x = x.flatten(1)
        gate = (x[:, 0] * 5).round() / 5
        opened = (gate >= 0.8).to(x.dtype)
        score = opened + 0.3 * x[:, 1:].sum(1) - 1.3 * 0.3 * 15 * 0.5 - 0.8
        return torch.stack([torch.zeros_like(score), score], 1)

    x, y = torch.full((6, 1, 4, 4), 0.5), torch.zeros(6, dtype=torch.int64)
    threat_model = ThreatModel(epsilon=0.3)
    alternating = Alternating(threat_model=threat_model, steps=10, queries=100, closest=1.0)
    ascent = BETA(threat_model=threat_model, steps=200, step_rule="apgd", random_start=False)
    assert (model(ascent(model, x, y)).argmax(1) == 0).all()
    assert (model(alternating(model, x, y, generator=seeded())).argmax(1) == 1).all()


BAD = [
    (BETA, {"steps": 0}, "steps must be an integer >= 1, got 0"),
    (BETA, {"step_rule": "adam"}, "step_rule must be one of 'rmsprop', 'sign', 'apgd', got 'adam'"),
    (BETA, {"targets": "some"}, "targets must be one of 'all', 'top_logits', 'nearest', 'halving', got 'some'"),
    (BETA, {"targets": "nearest"}, "target_count must be given with targets='nearest', got None; write target_count=3"),
    (BETA, {"target_count": 3}, "target_count must be None with targets='all', got 3; write targets='top_logits'"),
    (BETA, {"restarts": 2, "random_start": False}, "restarts must be 1 without a random start"),
    (BETA, {"eot_samples": 0}, "eot_samples must be an integer >= 1, got 0"),
    (BETA, {"memory_budget": 0}, "memory_budget must be an integer >= 1, got 0"),
    (BETA, {"threat_model": "linf"}, "threat_model must be a ThreatModel, got 'linf'"),
    (APGD, {"loss": "hinge"}, "loss must be one of 'cross_entropy', 'margin', 'dlr', got 'hinge'"),
    (APGD, {"targets": 0}, "targets must be an integer >= 1, got 0"),
    (Alternating, {"closest": 0.0}, "closest must be a finite number > 0, got 0.0"),
    (Alternating, {"closest": 2.0}, "closest must be at most 1 (every standing example), got 2.0"),
    (Alternating, {"rounds": -1}, "rounds must be an integer >= 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "arguments", "text"), BAD)
def test_bad_settings_are_refused_in_one_sentence(attack, arguments, text):
    with pytest.raises((ValueError, TypeError)) as caught:
        attack(**{"threat_model": ThreatModel(), **arguments})
    assert text in str(caught.value)


@pytest.mark.parametrize("attack", [BETA(threat_model=ThreatModel()), Square(threat_model=ThreatModel())])
def test_a_start_outside_the_ball_is_refused(attack):
    model, x, y = smooth(), images(), torch.arange(8) % 4
    with pytest.raises(ValueError, match=r"start must be inside .* got 8 examples outside; write threat_model.project"):
        attack(model, x, y, generator=seeded(), start=1 - x)
    with pytest.raises(ValueError, match=r"start must be of the shape of x, \[8, 1, 4, 4\], got \[4, 1, 4, 4\]"):
        attack(model, x, y, generator=seeded(), start=x[:4])

"""Transport costs and the attacks that pay them: closed forms, exhaustive enumeration, and the contract of every attack."""

import copy
import dataclasses
import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metarobust.attacks import PGD, RandomRoundingFGSM, TransportAscent, count_calls
from metarobust.divergences import KL
from metarobust.dro import worst_case_expectation
from metarobust.losses import cross_entropy
from metarobust.threat_models import ThreatModel
from metarobust.transport_costs import HardBall, Insertion, NormPower, SoftHinge
from metarobust.types import Attack

NORMS = ("linf", "l2", "l1")
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
FAR = {"lower": -1e3, "upper": 1e3}  # a box that stops nothing
BALL = ThreatModel(norm="linf", epsilon=0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, seed=1):
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def normal(*shape, seed=2):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def second_logit(logits, y):
    return logits[:, 1]


def linear(slopes, x):
    """A model whose second logit is ``slopes . (x' - x)``: the loss `second_logit` is linear, with one slope per example."""
    return lambda moved: torch.stack([0 * moved.flatten(1).sum(1), ((moved - x) * slopes).flatten(1).sum(1)], 1)


def ascend_linear(cost, slopes, x, **settings):
    """Phi and result of the ascent for a linear loss."""
    attack = TransportAscent(transport_cost=cost, loss=second_logit, **settings)
    found = attack.search(linear(slopes, x), x, torch.zeros(len(x), dtype=torch.int64))
    return phi_of(found), found


def phi_of(found):
    return found.losses.double() - found.scale * found.costs.double()


def network(*layers, inputs=16, classes=3, seed=2):
    """A small classifier with parameters from a fixed seed; ``layers`` come after the first linear one."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), *layers, nn.Tanh(), nn.Linear(8, classes)).double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


# Linear losses, whose best points are known --------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [20, 40])
@pytest.mark.parametrize("power", [1.5, 2.0, 2.5])
@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_loss_without_a_box_is_moved_to_the_known_radius(norm, power, steps):
    """a . d - s L ||d||^q is largest at the radius (||a||_* / (s L q))^(1 / (q - 1)), where it is (1 - 1/q) ||a||_* r."""
    slopes, x = normal(8, 12), uniform(8, 12)
    size = torch.linalg.vector_norm(slopes, ord=DUAL[norm], dim=1)
    for scale, weight in ((0.4, 3.0), (5.0, 0.9), (0.05, 7.0)):
        slopes_here = slopes / size[:, None] * size.mean()
        radius = (size.mean() / (scale * weight * power)) ** (1 / (power - 1))
        best = (1 - 1 / power) * size.mean() * radius
        for travel in (1.17, 2.39):
            cost = NormPower(weight=weight, norm=norm, power=power, **FAR)
            phi, found = ascend_linear(cost, slopes_here, x, scale=scale, steps=steps, step_size=float(travel * radius / steps))
            assert (phi <= best * (1 + 1e-9)).all()
            assert (phi >= 0.998 * best).all()
            torch.testing.assert_close(cost.free_ball.distance(found.x_adv, x), radius.expand(8), rtol=0.06, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_an_optimum_much_nearer_than_a_step_is_found(norm):
    """The radius is a hundredth of the last step's length, and a thousandth of the first one's."""
    slopes, x, radius = normal(8, 12), uniform(8, 12), 1e-4
    slopes = slopes / torch.linalg.vector_norm(slopes, ord=DUAL[norm], dim=1, keepdim=True)
    for power in (1.5, 2.0, 3.0):
        cost = NormPower(weight=1 / (power * radius ** (power - 1)), norm=norm, power=power, **FAR)
        phi, _ = ascend_linear(cost, slopes, x, steps=10, step_size=0.05)
        assert (phi >= 0.99 * (1 - 1 / power) * radius).all()


def best_in_the_box(slopes, x, norm, power, price):
    """The largest a . d - price * ||d||_p^q in the unit box by a fine search over the one parameter of its solution."""
    size, room = slopes.abs(), torch.where(slopes > 0, 1 - x, x)
    if norm == "l1":
        order = size.argsort(1, descending=True)
        size, room = size.gather(1, order), room.gather(1, order)
        before = room.cumsum(1) - room
        family = [torch.minimum(room, (r - before).clamp(min=0)) for r in torch.linspace(0, room.shape[1], 4001).double()]
    elif norm == "linf":
        family = [room.clamp(max=float(r)) for r in torch.linspace(0, 1, 2001)]
    else:
        family = [torch.minimum(room, t * size) for t in torch.logspace(-4, 4, 2001).double()]
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    return torch.stack([(size * d).sum(1) - price * torch.linalg.vector_norm(d, ord=order, dim=1) ** power for d in family]).amax(
        0
    )


@pytest.mark.parametrize("power", [1.0, 1.5, 2.5])
@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_loss_in_the_box_is_moved_to_the_best_point(norm, power):
    slopes, x = normal(16, 20), uniform(16, 20)
    slopes = slopes / torch.linalg.vector_norm(slopes, ord=DUAL[norm], dim=1, keepdim=True)
    reach = {"linf": 0.4, "l2": 1.3, "l1": 3.0}[norm]
    price = 1 / (power * reach ** (power - 1)) * (0.6 if power == 1 else 1)
    travel = {"linf": 1.0, "l2": 4.0, "l1": 20.0}[norm] if power == 1 else reach
    best = best_in_the_box(slopes, x, norm, power, price)
    phi, found = ascend_linear(NormPower(weight=price, norm=norm, power=power), slopes, x, steps=40, step_size=2.5 * travel / 40)
    at_the_edge = (found.x_adv == 0) | (found.x_adv == 1)
    assert at_the_edge.any(), "the box stopped nothing: the test shows nothing"
    assert (phi >= 0.99 * best).all()
    assert (best > 0.05).all()


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("norm", NORMS)
def test_all_or_nothing_at_power_one_and_below(norm, power):
    """One room for all coordinates: the far corner pays off, or x does."""
    slopes, x = normal(12, 4), torch.full((12, 4), 0.5, dtype=torch.float64)
    if norm == "l1":
        slopes[:, 1:] = 0  # one coordinate to fill
    if norm == "l2":
        slopes = slopes.sign()  # straight into the corner
    far = slopes.sign() * 0.5
    gain, paid = (far * slopes).sum(1), NormPower(weight=1.0, norm=norm, power=power).cost(x + far, x)
    scale = float((gain / paid).median()) * 1.001
    best = (gain - scale * paid).clamp(min=0)
    if norm != "l2":
        assert (best == 0).any()
        assert (best > 0).any()
    for scale_here in (scale, 0.9 * scale):
        best = (gain - scale_here * paid).clamp(min=0)
        cost = NormPower(weight=1.0, norm=norm, power=power)
        distance = {"linf": 0.5, "l2": 1.0, "l1": 0.5}[norm]
        phi, found = ascend_linear(cost, slopes, x, scale=scale_here, steps=20, step_size=2.5 * distance / 20)
        torch.testing.assert_close(phi, best, rtol=0.01, atol=1e-12)
        assert torch.equal(found.x_adv[best == 0], x[best == 0])
        torch.testing.assert_close(found.x_adv[best > 0], (x + far)[best > 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("box", [{}, FAR])
@pytest.mark.parametrize("scale", [0.5, 4.0, 100.0])
def test_the_hinge_moves_each_coordinate_to_its_own_best_place(box, scale):
    """|d_j| = epsilon + |a_j| / (s L), cut by the box; the loss's gradient is not hidden behind its sign."""
    slopes, x = normal(6, 30), uniform(6, 30)
    cost = SoftHinge(threat_model=ThreatModel(norm="linf", epsilon=0.1, **box), weight=5.0)
    wish = (x + slopes.sign() * (0.1 + slopes.abs() / (scale * 5.0))).clamp(cost.free_ball.lower, cost.free_ball.upper)
    best = ((wish - x) * slopes).sum(1) - scale * cost.cost(wish, x)
    furthest = float((wish - x).abs().max())
    for steps in (20, 40):
        phi, found = ascend_linear(cost, slopes, x, scale=scale, steps=steps, step_size=2.5 * furthest / steps)
        assert (phi >= 0.998 * best).all()
        torch.testing.assert_close(found.x_adv, wish, rtol=0, atol=0.1 * furthest)
    if furthest < 0.25:
        phi, _ = ascend_linear(cost, slopes, x, scale=scale, steps=20)
        assert (phi >= 0.998 * best).all()


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_phi_rises_when_the_scale_falls(data):
    norm, power = data.draw(st.sampled_from(NORMS)), data.draw(st.sampled_from([1.5, 2.0, 3.0]))
    seed, scale = data.draw(st.integers(0, 999)), data.draw(st.floats(0.2, 5.0))
    ratio = data.draw(st.floats(0.2, 1.0))
    slopes, x = normal(3, 4, seed=seed), uniform(3, 4, seed=seed)
    cost = NormPower(weight=1.0, norm=norm, power=power)
    dear, _ = ascend_linear(cost, slopes, x, scale=scale, steps=40, step_size=0.1)
    cheap, _ = ascend_linear(cost, slopes, x, scale=ratio * scale, steps=40, step_size=0.1)
    assert (cheap >= dear * 0.99).all()


# The search ----------------------------------------------------------------------------------------------------------


SOFT = {
    "l2": NormPower(weight=2.0),
    "linf_1.5": NormPower(weight=2.0, norm="linf", power=1.5),
    "l1_1": NormPower(weight=0.3, norm="l1", power=1.0),
    "l2_0.5": NormPower(weight=0.3, power=0.5),
    "hinge": SoftHinge(threat_model=BALL, weight=20.0),
    "ball_l2": HardBall(threat_model=ThreatModel(norm="l2", epsilon=0.5)),
}


@pytest.mark.parametrize("cost", SOFT.values(), ids=SOFT)
@pytest.mark.parametrize("random_start", [False, True])
@given(seed=st.integers(0, 999), scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]))
@settings(max_examples=8, deadline=None)
def test_a_search_reports_its_points_rightly_and_never_does_worse_than_x(cost, random_start, seed, scale):
    model, x, y = network(seed=seed), uniform(6, 16, seed=seed), torch.arange(6) % 3
    attack = TransportAscent(transport_cost=cost, scale=scale, steps=7, step_size=0.1, random_start=random_start)
    found = attack.search(model, x, y, generator=seeded(seed))
    with torch.no_grad():
        torch.testing.assert_close(found.losses, cross_entropy(model(found.x_adv), y))
        torch.testing.assert_close(found.natural_losses, cross_entropy(model(x), y))
    torch.testing.assert_close(found.costs, cost.cost(found.x_adv, x))
    assert found.costs.isfinite().all()
    assert (phi_of(found) >= found.natural_losses).all()
    assert torch.equal(attack(model, x, y, generator=seeded(seed)), found.x_adv)


def test_the_best_point_is_kept_and_not_the_last():
    """A loss with one narrow ridge that the steps cross: the best of the points that the model saw comes back."""
    seen = []

    def model(x):
        seen.append(x.detach().clone())
        height = torch.exp(-((x[:, :1] - 0.31) ** 2) / 0.003) * 5 + x[:, :1]
        return torch.cat([torch.zeros_like(height), height], 1)

    x, cost = torch.tensor([[0.2], [0.1]], dtype=torch.float64), NormPower(weight=0.3)
    attack = TransportAscent(transport_cost=cost, steps=9, step_size=0.09, loss=second_logit)
    found = attack.search(model, x, torch.zeros(2, dtype=torch.int64))
    points = torch.stack(seen)
    heights = torch.stack([model(row)[:, 1] - cost.cost(row, x) for row in points])
    assert torch.equal(found.x_adv, points[heights.argmax(0), torch.arange(2)])
    assert (heights[-1] < heights.amax(0) - 0.01).all(), "the last point is the best: the test shows nothing"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("power", [0.7, 1.0, 2.0])
def test_an_example_leaves_a_plain_where_its_loss_is_flat(norm, power):
    """Softplus, as cross-entropy: flat at x, steep beyond a boundary. The price alone would hold it at x, at any step size."""

    def model(x):
        z = 60 * (x[:, :1] - 0.4)
        return torch.cat([torch.zeros_like(z), z], 1)

    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    cost = NormPower(weight=5.0, norm=norm, power=power)
    assert cross_entropy(model(x + 1), y) - 5 > 25
    for steps in (10, 80):
        found = TransportAscent(transport_cost=cost, steps=steps, step_size=2.5 / steps).search(model, x, y)
        assert phi_of(found) > 25


@pytest.mark.parametrize("norm", NORMS)
def test_a_hard_ball_is_climbed_by_the_steps_of_pgd(norm):
    model, x, y = network(), uniform(8, 16), torch.arange(8) % 3
    ball = ThreatModel(norm=norm, epsilon={"linf": 0.1, "l2": 0.4, "l1": 1.0}[norm])
    runs = [PGD(threat_model=ball, steps=k, step_size=0.25 * ball.epsilon, random_start=False)(model, x, y) for k in range(1, 11)]
    losses = torch.stack([cross_entropy(model(run), y) for run in [x, *runs]])
    found = TransportAscent(transport_cost=HardBall(threat_model=ball), scale=123.0, steps=10).search(model, x, y)
    torch.testing.assert_close(found.losses, losses.amax(0).detach())
    assert torch.equal(found.x_adv, torch.stack([x, *runs])[losses.argmax(0), torch.arange(8)])
    assert (found.costs == 0).all()


def test_infinite_and_zero_scales():
    """inf allows what costs nothing, as in the dual of radius 0; 0 makes every move in the domain free."""
    slopes, x = normal(5, 6), uniform(5, 6)
    cost = NormPower(weight=1.0, norm="linf", power=2.0)
    _, found = ascend_linear(cost, slopes, x, scale=math.inf, step_size=0.5)
    assert torch.equal(found.x_adv, x)
    assert (found.costs == 0).all()
    assert found.scale == math.inf
    _, found = ascend_linear(cost, slopes, x, scale=0.0, step_size=0.5)
    assert torch.equal(found.x_adv, (slopes > 0).double())
    for hinge in (SoftHinge(threat_model=BALL, weight=1.0), HardBall(threat_model=BALL)):
        _, found = ascend_linear(hinge, slopes, x, scale=math.inf)
        torch.testing.assert_close(found.x_adv, (x + 0.1 * slopes.sign()).clamp(0, 1))
        _, single = ascend_linear(hinge, slopes.float(), x.float(), scale=math.inf)
        torch.testing.assert_close(single.x_adv, found.x_adv.float())
    flat_hinge = SoftHinge(threat_model=ThreatModel(epsilon=0), weight=1.0)
    _, found = ascend_linear(flat_hinge, slopes, x, scale=math.inf, step_size=0.1)
    assert torch.equal(found.x_adv, x)


def test_passes_are_the_steps_and_one_more():
    rows, model = [], network()

    def counted(x):
        rows.append(x.requires_grad)
        return model(x)

    x, y = uniform(6, 16), torch.arange(6) % 3
    attack = TransportAscent(transport_cost=NormPower(weight=1.0), steps=4, step_size=0.1)
    attack(counted, x, y)
    assert rows == [True] * 4 + [False]
    rows.clear()
    dataclasses.replace(attack, random_start=True)(counted, x, y, generator=seeded())
    assert rows == [False] + [True] * 4 + [False]


def test_a_random_start_leaves_a_point_without_a_gradient():
    """The loss is the squared change of the logits: flat at x itself."""
    model, x, y = network(), uniform(6, 16), torch.arange(6) % 3
    clean = model(x).detach()

    def change(logits, y):
        return (logits - clean).square().sum(1)

    attack = TransportAscent(transport_cost=NormPower(weight=0.1), steps=10, step_size=0.1, loss=change)
    assert torch.equal(attack(model, x, y), x)
    found = dataclasses.replace(attack, random_start=True).search(model, x, y, generator=seeded())
    assert (phi_of(found) > 0.1).all()


# Sharing the scale with a dual ---------------------------------------------------------------------------------------


def rescaled(answers, *, steps=8, rescalings=3, cost=None, model=None, **settings):
    """Run a search whose rescale gives these answers in turn, the last one for ever; return it with what rescale was shown."""
    shown = []

    def rescale(losses, costs):
        shown.append((losses.clone(), costs.clone()))
        return answers[min(len(shown), len(answers)) - 1]

    x, y = uniform(6, 16), torch.arange(6) % 3
    cost = NormPower(weight=1.0) if cost is None else cost
    attack = TransportAscent(transport_cost=cost, scale=77.0, steps=steps, step_size=0.1, rescalings=rescalings, **settings)
    return attack.search(network() if model is None else model, x, y, generator=seeded(), rescale=rescale), shown


@pytest.mark.parametrize(
    ("steps", "rescalings", "calls"), [(8, 3, 5), (8, 0, 2), (1, 3, 2), (2, 3, 3), (20, 6, 8)]
)  # fmt: skip
@pytest.mark.parametrize("random_start", [False, True])
def test_rescale_is_called_before_during_and_after_the_ascent(steps, rescalings, calls, random_start):
    found, shown = rescaled([0.5], steps=steps, rescalings=rescalings, random_start=random_start)
    assert len(shown) == calls
    assert all(losses.shape == costs.shape == (6, 2) for losses, costs in shown)
    assert all(torch.equal(losses[:, 0], found.natural_losses) and (costs[:, 0] == 0).all() for losses, costs in shown)
    if not random_start:
        assert torch.equal(shown[0][0][:, 1], found.natural_losses)
        assert (shown[0][1] == 0).all()
    assert all((costs[:, 1] > 0).all() for _, costs in shown[1:])
    assert found.scale == 0.5


@pytest.mark.parametrize("cost", [NormPower(weight=1.0), HardBall(threat_model=ThreatModel(epsilon=0))])
@pytest.mark.parametrize(("steps", "answers"), [(8, [0.5]), (1, [0.5]), (8, [0.5, 0.5, math.inf])])
def test_an_empty_batch_asks_for_the_scale_as_often_as_any_other(cost, steps, answers):
    """Processes that gather their candidates must call equally often."""
    calls = []
    for size in (0, 1, 6):
        calls.append(0)

        def rescale(losses, costs):
            calls[-1] += 1
            return answers[min(calls[-1], len(answers)) - 1]

        attack = TransportAscent(transport_cost=cost, steps=steps, step_size=0.1)
        found = attack.search(network(), uniform(size, 16), torch.arange(size) % 3, rescale=rescale)
        assert found.scale == answers[min(calls[-1], len(answers)) - 1]
    assert calls[0] == calls[1] == calls[2] > 0


def test_the_scale_of_the_last_answer_decides():
    dear, shown = rescaled([0.1, 0.1, 0.1, 0.1, 1e6])
    assert (shown[-1][0][:, 1] - 0.1 * shown[-1][1][:, 1] > dear.natural_losses + 0.01).all()
    assert torch.equal(dear.losses, dear.natural_losses)
    assert (dear.costs == 0).all()
    cheap, shown = rescaled([1e6, 1e6, 1e6, 1e6, 0.0])
    assert (cheap.losses >= cheap.natural_losses).all()
    assert (cheap.costs > 0).any()
    assert torch.equal(cheap.losses, shown[-1][0].amax(1))


def test_answers_steer_the_ascent():
    """With a constant answer the search is the one at that scale; the attack's own scale is not read."""
    x, y, cost = uniform(6, 16), torch.arange(6) % 3, NormPower(weight=1.0)
    for scale in (0.05, 0.8):
        found, _ = rescaled([scale])
        plain = TransportAscent(transport_cost=cost, scale=scale, steps=8, step_size=0.1).search(network(), x, y)
        torch.testing.assert_close(found.x_adv, plain.x_adv)
    stuck, shown = rescaled([math.inf])
    assert len(shown) == 1
    assert stuck.scale == math.inf
    assert torch.equal(stuck.x_adv, x)


@pytest.mark.parametrize("norm", NORMS)
def test_a_moved_point_stays_a_candidate_where_x_is_better(norm):
    """At this price some steps end at x itself, which a dual has as the other column anyway."""
    found, shown = rescaled([1e6], cost=NormPower(weight=1.0, norm=norm, power=1.0), steps=20)
    assert all((costs[:, 1] > 0).all() for _, costs in shown[1:])
    assert (found.costs == 0).all()


@pytest.mark.parametrize(("excess", "kept"), [(-1e-8, 1), (1e-8, 1), (1e-3, 0)])
def test_ties_up_to_rounding_keep_the_moved_point(excess, kept):
    """A dual ends at the very scale where an example is worth as much at x as moved, and mixes the two."""

    def tie(losses, costs):
        gain = losses[:, 1] - losses[:, 0]
        return float((gain / costs[:, 1]).max()) * (1 + excess) if (costs[:, 1] > 0).any() else 0.2

    x, y = uniform(6, 16), torch.arange(6) % 3
    attack = TransportAscent(transport_cost=NormPower(weight=1.0), steps=8, step_size=0.1, rescalings=0)
    assert (attack.search(network(), x, y, rescale=tie).costs > 0).sum() == kept


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.5])
def test_attack_and_dual_end_at_one_scale(radius):
    model, x, y = network(), uniform(40, 16), torch.arange(40) % 3

    def solve(losses, costs):
        return worst_case_expectation(losses, divergence=KL(), radius=radius, costs=costs)

    cost = NormPower(weight=1.0, power=2.0)
    attack = TransportAscent(transport_cost=cost, steps=10, step_size=0.1)
    found = attack.search(model, x, y, rescale=lambda losses, costs: solve(losses, costs).scale)
    losses = torch.stack([found.natural_losses, found.losses], 1)
    worst = solve(losses, torch.stack([torch.zeros_like(found.costs), found.costs], 1))
    assert worst.scale == pytest.approx(found.scale, rel=1e-4)
    still = worst_case_expectation(found.natural_losses, divergence=KL(), radius=radius)
    assert worst.transport > 0.1 * radius
    assert worst.value > still.value + 0.01
    for wrong in (found.scale / 3, found.scale * 3):  # the points of another scale serve this dual no better
        other = dataclasses.replace(attack, scale=wrong).search(model, x, y)
        losses = torch.stack([other.natural_losses, other.losses], 1)
        value = solve(losses, torch.stack([torch.zeros_like(other.costs), other.costs], 1)).value
        assert value <= worst.value * 1.001


# Insertions ----------------------------------------------------------------------------------------------------------


def bits(*shape, share=0.3, seed=4):
    return (uniform(*shape, seed=seed) < share).double()


def best_insertions(model, x, y, cost, scale, loss=cross_entropy):
    """The largest Phi of each example over every set of insertions."""
    cube = torch.tensor(list(itertools.product([0.0, 1.0], repeat=x.shape[1])), dtype=x.dtype)
    best = []
    for row, label in zip(x, y, strict=True):
        reachable = cube[(cube >= row).all(1)]
        losses = loss(model(reachable), label.expand(len(reachable)))
        best.append((losses - scale * cost.cost(reachable, row.expand_as(reachable))).max())
    return torch.stack(best).detach()


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("bits_at_once", [1, 2, 10])
def test_insertions_into_a_linear_model_are_exactly_the_best(power, bits_at_once):
    w, x, y = normal(9), bits(20, 9), torch.zeros(20, dtype=torch.int64)
    cost = Insertion(weight=1.0, power=power)

    def model(rows):
        return torch.stack([0 * rows[:, 0], rows @ w], 1)

    for scale in (0.02, 0.3, 0.7):
        attack = TransportAscent(transport_cost=cost, scale=scale, steps=24, step_size=bits_at_once, loss=second_logit)
        found = attack.search(model, x, y)
        best = best_insertions(model, x, y, cost, scale, second_logit)
        torch.testing.assert_close(phi_of(found), best)
        assert (found.x_adv >= x).all()
        assert ((found.x_adv == 0) | (found.x_adv == 1)).all()


def test_insertions_into_a_small_network_are_often_the_best_and_never_better():
    """The gradient at a corner is only a guess of what a flip does. Seen here: the best in 97 % of the cases."""
    shares, cost = [], Insertion(weight=0.2)
    for seed in range(6):
        model, x, y = network(inputs=8, seed=seed), bits(30, 8, seed=seed), torch.arange(30) % 3
        found = TransportAscent(transport_cost=cost, steps=10).search(model, x, y)
        best = best_insertions(model, x, y, cost, 1.0)
        assert (phi_of(found) <= best + 1e-9).all()
        assert (phi_of(found) - found.natural_losses).sum() >= 0.9 * (best - found.natural_losses).sum()
        shares.append((phi_of(found) >= best - 1e-9).double().mean())
    assert torch.stack(shares).mean() > 0.9


def test_an_insertion_that_lost_its_worth_is_removed():
    """The first bit gains most at x and hinders once the second is set."""

    def model(x):
        first, second = x[:, :1], x[:, 1:2]
        height = 2 * first + 1.5 * second - 3 * first * second + 0 * x.sum(1, keepdim=True)
        return torch.cat([torch.zeros_like(height), height], 1)

    cost, x = Insertion(weight=1.0), torch.zeros(1, 3)
    start = torch.tensor([[1.0, 1.0, 0.0]])
    gradient = torch.tensor([[-1.0, -1.5, 0.0]])  # of the model at start
    moved = cost.step(start, x, gradient, scale=0.1, length=1)
    assert torch.equal(moved, torch.tensor([[1.0, 0.0, 0.0]]))
    kept = cost.step(start, start, gradient, scale=0.1, length=3)
    assert torch.equal(kept, start), "bits of x itself were removed"
    attack = TransportAscent(transport_cost=cost, scale=0.1, steps=8, loss=second_logit)
    found = attack.search(model, x, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(phi_of(found), torch.tensor([1.9], dtype=torch.float64))


def test_a_step_flips_at_most_as_many_bits_as_allowed():
    seen, model = [], network(inputs=30)

    def watched(x):
        seen.append(x.detach().clone())
        return model(x)

    x, y = bits(5, 30), torch.arange(5) % 3
    for allowed in (None, 4):
        seen.clear()
        TransportAscent(transport_cost=Insertion(weight=1e-3), steps=6, step_size=allowed)(watched, x, y)
        flips = (torch.stack(seen).diff(dim=0) != 0).sum(2)
        assert flips.max() == (allowed or 1)
        assert (flips[0] == (allowed or 1)).all(), "the first step uses what it may"


# Random rounding -----------------------------------------------------------------------------------------------------


def two_logits(w):
    return lambda x: torch.stack([0 * x[:, 0], x @ w], 1)


def test_a_bit_is_inserted_with_the_probability_that_its_relaxed_value_says():
    w = torch.ones(4000, dtype=torch.float64)
    w[2000:] = -1
    x, y = torch.zeros(1, 4000, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for steps, share in ((10, 0.2), (25, 0.5), (50, 1.0)):
        x_adv = RandomRoundingFGSM(steps=steps)(two_logits(w), x, y, generator=seeded())
        assert float(x_adv[:, :2000].mean()) == pytest.approx(share, abs=0.04)
        assert (x_adv[:, 2000:] == 0).all()


def test_bits_of_x_stay_although_the_relaxed_point_lost_them():
    w, x = torch.tensor([-1.0, 1.0, -1.0]), torch.tensor([[1.0, 0.0, 0.0]])
    x_adv = RandomRoundingFGSM(steps=60)(two_logits(w), x, torch.tensor([0]), generator=seeded())
    assert torch.equal(x_adv, torch.tensor([[1.0, 1.0, 0.0]]))


def test_the_relaxed_point_does_not_leave_the_cube():
    """The first bit hinders until the second is half set. It waits at 0 and is set in the end."""

    def model(x):
        height = x[:, :1] * (x[:, 1:] - 0.45) + x[:, 1:]
        return torch.cat([torch.zeros_like(height), height], 1)

    x, y = torch.zeros(20, 2), torch.zeros(20, dtype=torch.int64)
    x_adv = RandomRoundingFGSM(steps=16, step_size=0.1, loss=second_logit)(model, x, y, generator=seeded())
    assert (x_adv == 1).all()


@pytest.mark.parametrize("budget", [0, 0.5, 1, 3, 100])
def test_a_budget_keeps_the_insertions_of_largest_gradient(budget):
    w = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, -1.0], dtype=torch.float64)
    x, y = torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    x[1, 1] = 1
    attack = RandomRoundingFGSM(threat_model=ThreatModel(norm="l1", epsilon=budget))
    want = {0: [[], []], 0.5: [[], []], 1: [[1], [3]], 3: [[1, 3, 4], [2, 3, 4]], 100: [[0, 1, 2, 3, 4], [0, 2, 3, 4]]}[budget]
    x_adv = attack(two_logits(w), x, y, generator=seeded())
    assert [(row > 0).nonzero().flatten().tolist() for row in x_adv - x] == want
    assert attack.threat_model is not None
    assert attack.threat_model.contains(x_adv, x).all()


def test_an_example_whose_loss_fell_goes_back():
    """Each bit gains alone, both together lose."""

    def model(x):
        height = x[:, :2].sum(1, keepdim=True) - 3 * x.prod(1, keepdim=True)
        return torch.cat([torch.zeros_like(height), height], 1)

    x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    attack = RandomRoundingFGSM(steps=1, step_size=1.0, loss=second_logit)
    x_adv = attack(model, x, torch.tensor([0, 0]), generator=seeded())
    assert torch.equal(x_adv, torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]))


# The contract, as tests/test_attacks.py has it for attacks in a ball -------------------------------------------------

RANDOM = ("random_start", "random_rounding", "random_rounding_budget")
ATTACKS = {
    **{f"{p}_{q}": TransportAscent(transport_cost=NormPower(weight=0.5, norm=p, power=q), steps=5, step_size=0.1)
       for p in NORMS for q in (0.5, 1.0, 2.0)},
    "hinge": TransportAscent(transport_cost=SoftHinge(threat_model=BALL, weight=5.0), steps=5),
    "random_start": TransportAscent(transport_cost=NormPower(weight=0.5), steps=5, step_size=0.1, random_start=True),
    "insertion": TransportAscent(transport_cost=Insertion(weight=0.01), steps=5, step_size=2),
    "random_rounding": RandomRoundingFGSM(steps=10, step_size=0.05),
    "random_rounding_budget": RandomRoundingFGSM(threat_model=ThreatModel(norm="l1", epsilon=3.0), steps=10, step_size=0.05),
}  # fmt: skip
every_attack = pytest.mark.parametrize("name", ATTACKS)


def contract_batch(name, size=6, dtype=torch.float64):
    """Inputs in the box, binary for those who insert, the first two rows at its corners."""
    x = uniform(size, 1, 4, 4).to(dtype)
    if "insertion" in name or "rounding" in name:
        x = (x > 0.6).to(dtype)
    x[:1], x[1:2] = 0, 1
    return x, torch.arange(size) % 3


@every_attack
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_detached_values_in_the_domain(name, dtype):
    attack, (x, y) = ATTACKS[name], contract_batch(name, dtype=dtype)
    assert isinstance(attack, Attack)
    assert attack == copy.deepcopy(attack)
    with count_calls() as counter:
        x_adv = attack(network().to(dtype), x.requires_grad_(), y, generator=seeded())
    assert (counter.calls, counter.examples) == (1, 6)
    assert (x_adv.shape, x_adv.dtype) == (x.shape, dtype)
    assert not x_adv.requires_grad
    assert x_adv.data_ptr() != x.data_ptr()
    cost = getattr(attack, "transport_cost", Insertion(weight=1.0))
    assert cost.cost(x_adv, x.detach()).isfinite().all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, x)


@every_attack
def test_model_inputs_and_global_randomness_stay_untouched(name):
    model = network(nn.BatchNorm1d(8, dtype=torch.float64), nn.Dropout(0.0))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    x, y = contract_batch(name)
    x.requires_grad_()
    before, state = x.detach().clone(), {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [parameter.grad for parameter in model.parameters()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ATTACKS[name](model, x, y, generator=seeded())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert torch.equal(x, before)
    assert x.grad is None
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert (gradient == 7.0).all()


@every_attack
def test_one_generator_one_result(name):
    attack, model, (x, y) = ATTACKS[name], network(), contract_batch(name)
    first = attack(model, x, y, generator=seeded(5))
    assert torch.equal(attack(model, x, y, generator=seeded(5)), first)
    assert torch.equal(attack(model, x, y, generator=seeded(6)), first) == (name not in RANDOM)


@every_attack
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_grad_modes_closures_and_memory_layouts_do_not_matter(name, context):
    attack, model, (x, y) = ATTACKS[name], network(), contract_batch(name)
    want = attack(model, x, y, generator=seeded())
    with context():
        assert torch.equal(attack(model, x * 1.0, y + 0, generator=seeded()), want)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    parameters = {key: value * scale for key, value in model.named_parameters()}
    result = attack(lambda rows: torch.func.functional_call(model, parameters, (rows,)), x, y, generator=seeded())
    assert torch.equal(result, want)
    assert scale.grad is None
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attack(model, transposed, y, generator=seeded()), want)


@every_attack
def test_batches_of_none_and_one_and_permuted(name):
    attack, model = ATTACKS[name], network()
    for size in (0, 1):
        x, y = contract_batch(name, size)
        assert attack(model, x, y, generator=seeded()).shape == x.shape
    if name not in RANDOM:
        x, y = contract_batch(name)
        order = torch.randperm(6, generator=seeded(7))
        torch.testing.assert_close(attack(model, x[order], y[order]), attack(model, x, y)[order], rtol=0, atol=1e-12)


@every_attack
def test_a_broadcast_gradient_and_no_gradient_at_all(name):
    x, _ = contract_batch(name)
    y = torch.zeros(6, dtype=torch.int64)

    def total(x):
        sum_of_all = x.flatten(1).sum(1)
        return torch.stack([sum_of_all, -sum_of_all, 2 * sum_of_all], 1)

    assert ATTACKS[name](total, x, y, generator=seeded()).isfinite().all()
    x_adv = ATTACKS[name](lambda x: total(0 * x), x, y, generator=seeded())
    assert torch.equal(x_adv, x) or name == "hinge" or name in RANDOM  # whatever is free may move


@every_attack
def test_bad_batches_are_refused_in_one_sentence(name):
    attack, model, (x, y) = ATTACKS[name], network(), contract_batch(name)
    for spoilt, labels, error, text in (
        (x * 255, y, ValueError, "x must be in the box [0, 1]"),
        (x / 0, y, ValueError, "x must be finite"),
        (x, y.float(), TypeError, "y must be class indices of dtype torch.int64"),
        (x, y + 1, ValueError, "y must be in [0, 3)"),
    ):
        with pytest.raises(error) as caught:
            attack(model, spoilt, labels, generator=seeded())
        assert text in str(caught.value)
    with pytest.raises(ValueError, match="the model's logits must depend differentiably on x"):
        attack(model=lambda x: x.new_zeros(len(x), 3), x=x, y=y, generator=seeded())


@pytest.mark.parametrize("name", ["insertion", "random_rounding"])
def test_inputs_that_are_not_binary_get_a_sentence(name):
    x, y = contract_batch("l2")
    with pytest.raises(
        ValueError, match="x must be 0 or 1 everywhere for an attack that inserts bits, got 64 other values; write"
    ):
        ATTACKS[name](network(), x, y)


SOMETHING, BALL_COST, BITS = NormPower(weight=1.0), HardBall(threat_model=BALL), Insertion(weight=1.0)
FLAT_HINGE = SoftHinge(threat_model=ThreatModel(epsilon=0), weight=1.0)
BAD_ASCENTS = [
    ({"transport_cost": BALL}, TypeError, "transport_cost must be a transport cost, as NormPower(weight=1.0), got ThreatModel("),
    ({"transport_cost": NormPower}, TypeError, "transport_cost must be a transport cost, as NormPower(weight=1.0), got <class"),
    ({"transport_cost": SOMETHING}, ValueError,
     f"step_size must be given for {SOMETHING!r}, which has no radius to take it from, got None; "
     "write step_size=2.5 * distance / 10 with the furthest distance that may pay off, in input units"),
    ({"transport_cost": FLAT_HINGE}, ValueError, "step_size must be given for SoftHinge("),
    ({"transport_cost": SOMETHING, "step_size": 0.0}, ValueError, "step_size must be a finite number > 0, got 0.0"),
    ({"transport_cost": BALL_COST, "scale": -1.0}, ValueError, "scale must be a number >= 0"),
    ({"transport_cost": BALL_COST, "scale": math.nan}, ValueError, "scale must be a number >= 0"),
    ({"transport_cost": BALL_COST, "scale": None}, TypeError, "scale must be a number >= 0"),
    ({"transport_cost": BALL_COST, "steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
    ({"transport_cost": BALL_COST, "rescalings": -1}, ValueError, "rescalings must be an integer >= 0, got -1"),
    ({"transport_cost": BALL_COST, "loss": "hinge"}, ValueError, "loss must be one of"),
    ({"transport_cost": BITS, "step_size": 0.5}, TypeError, "step_size (the bits of one step) must be an integer >= 1, got 0.5"),
    ({"transport_cost": BITS, "random_start": True}, ValueError, "random_start must be False for Insertion, got True"),
]  # fmt: skip
BAD_ROUNDINGS = [
    (
        {"threat_model": ThreatModel()},
        ValueError,
        "threat_model must be an l1 ball on the box [0, 1], got ThreatModel(norm='linf'",
    ),
    ({"threat_model": 5}, TypeError, "threat_model must be a ThreatModel, or None for any number of insertions, got 5"),
    ({"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
    ({"step_size": 0.0}, ValueError, "step_size must be a finite number > 0, got 0.0"),
]


@pytest.mark.parametrize(
    ("attack", "arguments", "error", "text"),
    [(TransportAscent, *row) for row in BAD_ASCENTS] + [(RandomRoundingFGSM, *row) for row in BAD_ROUNDINGS],
)
def test_bad_settings_are_refused_in_one_sentence(attack, arguments, error, text):
    with pytest.raises(error) as caught:
        attack(**arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize(("answer", "error"), [(-1.0, ValueError), (math.nan, ValueError), (torch.tensor(1.0), TypeError)])
def test_a_bad_answer_of_rescale_is_refused_in_one_sentence(answer, error):
    with pytest.raises(error, match="the result of rescale must be a number >= 0"):
        rescaled([answer])

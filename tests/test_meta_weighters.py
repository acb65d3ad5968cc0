"""What CAAT is made of: characteristics, weighting network, bounds by gradients; and FRL's balance of classes."""

import copy
import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from weighting_setting import Watched, batch, classifier, copied_state, rand, randn, same_state, seeded, threat

from metarobust.attacks import PGD
from metarobust.losses import cross_entropy
from metarobust.meta_weighters import (
    FRL,
    ClassStatistics,
    GradientBound,
    HeldOutErrors,
    PerturbationBound,
    ReMargin,
    WeightingNetwork,
    held_out_errors,
    training_characteristics,
)
from metarobust.objectives import TRADES
from metarobust.threat_models import ThreatModel

# Characteristics ------------------------------------------------------------------------------------------------------


def slow_characteristics(row: list[float], label: int) -> list[float]:
    """Loss, length of the gradient, margin and negative entropy with fifty digits."""
    with localcontext() as context:
        context.prec = 50
        logits = [Decimal(z) for z in row]
        total = sum(((z - max(logits)).exp() for z in logits), Decimal(0))
        log_p = [z - max(logits) - total.ln() for z in logits]
        p = [v.exp() for v in log_p]
        gradient = [p[j] - (1 if j == label else 0) for j in range(len(p))]
        others = [p[j] for j in range(len(p)) if j != label]
        found = (
            -log_p[label],
            sum((g * g for g in gradient), Decimal(0)).sqrt(),
            p[label] - max(others),
            sum((a * b for a, b in zip(p, log_p, strict=True)), Decimal(0)),
        )
        return [float(v) for v in found]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), classes=st.integers(2, 5), size=st.integers(1, 4))
def test_characteristics_are_those_of_a_slow_reference(data: Any, classes: int, size: int) -> None:
    numbers = st.lists(st.floats(-40, 40), min_size=classes, max_size=classes)
    rows = data.draw(st.lists(numbers, min_size=size, max_size=size))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size))
    counts = data.draw(st.lists(st.integers(1, 50), min_size=classes, max_size=classes))
    statistics = ClassStatistics(counts)
    statistics.update(torch.tensor([0.25, 1.5]), torch.tensor([0, 0]))
    found = training_characteristics(torch.tensor(rows, dtype=torch.float64), torch.tensor(labels), statistics)
    assert found.shape == (size, 6)
    for values, row, label in zip(found.tolist(), rows, labels, strict=True):
        loss, norm, margin, entropy = slow_characteristics(row, label)
        class_loss = 0.875 if label == 0 else math.log(classes)
        expected = [loss, class_loss, norm, margin, entropy, counts[label] / sum(counts)]
        assert values == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_gradient_norm_is_the_length_of_the_gradient_and_keeps_its_digits() -> None:
    logits, y = randn(5, 4).requires_grad_(), torch.tensor([0, 1, 2, 3, 0])
    statistics = ClassStatistics([1, 1, 1, 1])
    (gradient,) = torch.autograd.grad(cross_entropy(logits, y).sum(), logits)
    found = training_characteristics(logits, y, statistics)
    assert not found.requires_grad
    torch.testing.assert_close(found[:, 2], gradient.norm(dim=1), rtol=1e-12, atol=0)
    sure = torch.tensor([[25.0, 0.0, 0.0, 0.0]])  # 1 - p_y is 4e-11: a float32 of p_y holds no trace of it
    norm = training_characteristics(sure, torch.tensor([0]), statistics)[0, 2].item()
    assert norm == pytest.approx(slow_characteristics(sure[0].tolist(), 0)[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_characteristics_of_huge_logits_are_finite(dtype: torch.dtype) -> None:
    rows = [[6e4, -6e4, 0.0]] * 3 + [[6e4, 6e4, -6e4]] * 3
    found = training_characteristics(torch.tensor(rows, dtype=dtype), torch.arange(6) % 3, ClassStatistics([1, 1, 1]))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.isfinite().all()
    half, ln2 = 0.5**0.5, math.log(2)
    expected = [[0, 1, 0], [2**0.5, -1, 0], [2**0.5, -1, 0], [half, 0, -ln2], [half, 0, -ln2], [1.5**0.5, -0.5, -ln2]]
    torch.testing.assert_close(found[:, 2:5], torch.tensor(expected).to(found), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_the_class_loss_is_the_exponentially_forgetting_mean(sizes: list[int], seed: int) -> None:
    y, losses = torch.randint(3, (sum(sizes),), generator=seeded(seed)), 5 * rand(sum(sizes), seed=seed)
    statistics = ClassStatistics([8, 5, 7])
    for values, labels in zip(losses.split(sizes), y.split(sizes), strict=True):
        statistics.update(values.requires_grad_(), labels)
    after = [sum(sizes[t + 1 :]) for t, size in enumerate(sizes) for _ in range(size)]
    for c in range(3):
        own = [(math.exp(-after[i] / 20), losses[i].item()) for i in range(len(y)) if y[i] == c]
        expected = sum(w * v for w, v in own) / sum(w for w, _ in own) if own else math.log(3)
        assert statistics.class_loss[c].item() == pytest.approx(expected, rel=1e-12)
    assert statistics.share.tolist() == [0.4, 0.25, 0.35]
    assert not statistics.loss_sum.requires_grad


def test_characteristics_read_the_statistics_and_leave_them() -> None:
    statistics, logits, y = ClassStatistics(torch.tensor([3, 0, 2])), randn(4, 3), torch.tensor([0, 1, 2, 2])
    before = copied_state(statistics)
    first = training_characteristics(logits, y, statistics)
    assert same_state(statistics, before)
    statistics.update(first[:, 0], y)
    second = training_characteristics(logits, y, statistics)
    torch.testing.assert_close(first[:, 1], torch.full((4,), math.log(3), dtype=torch.float64))
    expected = torch.stack([first[0, 0], first[1, 0], first[2:, 0].mean(), first[2:, 0].mean()])
    torch.testing.assert_close(second[:, 1], expected)
    assert torch.equal(first[:, [0, 2, 3, 4, 5]], second[:, [0, 2, 3, 4, 5]])
    again = ClassStatistics([3, 0, 2])
    again.load_state_dict(statistics.state_dict())
    assert torch.equal(training_characteristics(logits, y, again), second)


@pytest.mark.parametrize("counts", [[3], [2, -1], [0, 0], torch.tensor([0.5, 0.5]), torch.ones(2, 2, dtype=torch.int64)])
def test_statistics_want_counts(counts: Any) -> None:
    with pytest.raises(ValueError, match=r"counts must be at least two integers >= 0.*; write labels.bincount"):
        ClassStatistics(counts)


def test_characteristics_refuse_what_does_not_fit() -> None:
    statistics, y = ClassStatistics([1, 1, 1]), torch.tensor([0, 2])
    for logits in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=r"logits must be \[batch, 3\], for the 3 classes"):
            training_characteristics(logits, y, statistics)
    for labels in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match=r"y must be in \[0, 3\)"):
            training_characteristics(torch.zeros(2, 3), labels, statistics)
    with pytest.raises(TypeError, match="int64"):
        training_characteristics(torch.zeros(2, 3), y.float(), statistics)
    with pytest.raises(TypeError, match="statistics must be a ClassStatistics"):
        training_characteristics(torch.zeros(2, 3), y, torch.ones(3))  # type: ignore[arg-type]


# Network --------------------------------------------------------------------------------------------------------------

BOTH, ALL = ("adversary", "anti_adversary"), ("natural", "adversary", "anti_adversary")


def weighting_network(seed: int = 0, **changes: Any) -> WeightingNetwork:
    return WeightingNetwork(generator=seeded(seed), **changes)


@settings(max_examples=40, deadline=None)
@given(temperature=st.floats(1e-3, 10), branches=st.sampled_from([BOTH, ("natural", "adversary"), ALL]), seed=st.integers(0, 9))
def test_weights_sum_to_1(temperature: float, branches: Any, seed: int) -> None:
    network = weighting_network(seed, branches=branches)
    network.temperature = temperature
    network.observe(rand(30, 6))
    found = network(3 * randn(8, 6, seed=seed))
    assert found.weights.shape == (8, len(branches))
    assert found.bound is None
    assert (found.weights >= 0).all()
    torch.testing.assert_close(found.weights.sum(1), torch.ones(8), rtol=0, atol=1e-6)


def test_weights_are_the_softmax_and_of_one_branch_the_sigmoid() -> None:
    for branches, squash in ((ALL, lambda z: z.softmax(1)), (("adversary",), torch.sigmoid)):
        network = weighting_network(branches=branches, temperature=0.7, hidden=(5, 4)).double()
        network.observe(rand(30, 6))
        z, layers = network.standardised(rand(8, 6, seed=3)), network.layers
        for layer in (layers[0], layers[2]):
            z = (z @ layer.weight.T + layer.bias).clamp(min=0)
        z = z @ layers[4].weight.T + layers[4].bias
        torch.testing.assert_close(network(rand(8, 6, seed=3)).weights, squash(z / 0.7), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("favoured", [0.75, 0.4])
@pytest.mark.parametrize("branches", [BOTH, ALL, ("adversary",)])
def test_a_new_network_favours_the_adversary_as_much_as_asked(branches: Any, favoured: float, temperature: float) -> None:
    for seed in range(3):
        network = weighting_network(
            seed, branches=branches, favoured=favoured, temperature=temperature, bound_range=(0.25, 3.0)
        ).double()
        others = [(1 - favoured) / (len(branches) - 1)] * (len(branches) - 1) if len(branches) > 1 else []
        expected = others.copy()
        expected.insert(branches.index("adversary"), favoured)
        unobserved = network(rand(1, 6))  # without statistics no characteristic counts
        values = rand(200, 6, seed=seed)
        network.observe(values)
        average = network(values.mean(0, keepdim=True))
        for found in (unobserved, average):
            torch.testing.assert_close(found.weights[0], torch.tensor(expected).double(), rtol=2e-6, atol=0)
            torch.testing.assert_close(found.bound, torch.ones(1).double(), rtol=1e-6, atol=0)
        weights = network(values).weights
        assert (weights[:, branches.index("adversary")] - favoured).abs().max() < 0.05
        assert weights.std(0).min() > 1e-4
        if favoured == 0.75 and len(branches) > 1:
            assert (weights.argmax(1) == branches.index("adversary")).all()


def test_the_weight_of_an_example_depends_on_no_other_and_observe_alone_changes_it() -> None:
    network, values = weighting_network(), randn(12, 6, seed=4)
    network.observe(randn(40, 6, seed=1))
    state = copied_state(network)
    together = network.train()(values).weights
    alone = torch.cat([network.eval()(row[None]).weights for row in values])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(network(values.flip(0)).weights.flip(0), together, rtol=1e-5, atol=0)
    assert same_state(network, state)
    network.observe(3 + randn(40, 6, seed=2))
    assert (network(values).weights - together).abs().max() > 1e-4
    empty = copied_state(network)
    network.observe(torch.zeros(0, 6))
    assert same_state(network, empty)


def test_characteristics_are_standardised_by_all_that_was_observed_and_later_by_the_latest() -> None:
    network, values = weighting_network(memory=100), 2 + 3 * randn(60, 6)
    for part in values.split([7, 30, 23]):
        network.observe(part)
    found = network.double().standardised(values)
    torch.testing.assert_close(found, (values - values.mean(0)) / values.std(0, correction=0), rtol=1e-9, atol=1e-12)
    network.observe(torch.ones(50, 6))  # 110 examples, 100 are remembered: the new 50 count half
    torch.testing.assert_close(network.mean, 0.5 * values.mean(0) + 0.5, rtol=1e-12, atol=0)
    torch.testing.assert_close(network.square, 0.5 * values.square().mean(0) + 0.5, rtol=1e-12, atol=0)
    network.observe(torch.full((300, 6), 2.0))  # more than is remembered
    torch.testing.assert_close(network.mean, torch.full((6,), 2.0, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, -5.0, 1e6])
def test_a_characteristic_that_does_not_vary_counts_as_0(constant: float, dtype: torch.dtype) -> None:
    network = weighting_network()
    for seed in range(5):
        values = rand(33, 6, seed=seed).to(dtype)
        values[:, 1] = constant
        network.observe(values)
    values = rand(4, 6, seed=9).to(dtype)
    found = network.standardised(values)
    assert found.dtype == torch.float32
    assert (found[:, 1] == 0).all()
    assert (found[:, [0, 2, 3, 4, 5]] != 0).all()
    values[:, 2] = torch.tensor([1e9, -1e9, 1e30, -1e30])
    assert network.standardised(values)[:, 2].tolist() == [10, -10, 10, -10]


def test_a_cold_network_gives_every_example_one_branch() -> None:
    network = weighting_network(branches=ALL, favoured=1 / 3)
    network.observe(randn(50, 6))
    values = randn(20, 6, seed=1)
    warm = network(values).weights
    network.temperature = 1e-6
    cold = network(values).weights
    torch.testing.assert_close(cold, nn.functional.one_hot(warm.argmax(1), 3).float(), rtol=0, atol=1e-6)
    network.temperature = 1e6
    torch.testing.assert_close(network(values).weights, torch.full((20, 3), 1 / 3), rtol=0, atol=1e-5)
    single = weighting_network(branches=("adversary",), favoured=0.5)
    single.observe(randn(50, 6))
    values = values[(single(values).weights[:, 0] - 0.5).abs() > 1e-4]
    above = single(values).weights > 0.5
    single.temperature = 1e-9
    assert torch.equal(single(values).weights, above.float())


def test_the_published_temperature_lets_the_gradient_reach_next_to_no_example() -> None:
    """With the initialisation of torch and 0.001: only examples within 0.02 of a tie; with 1 all of them."""
    network = weighting_network(favoured=0.5)
    with torch.no_grad():
        network.layers[-1].weight.mul_(10)  # the network begins with a tenth of what torch initialises
    network.observe(randn(400, 6))
    values = randn(400, 6, seed=1)
    reached, ties = {}, (network.layers(network.standardised(values)) @ torch.tensor([1.0, -1.0])).abs()
    for temperature in (1.0, 0.1, 0.001):
        network.temperature = temperature
        scores = network.layers(network.standardised(values)).detach().requires_grad_()
        weights = (scores / temperature).softmax(1)
        assert torch.equal(weights, network(values).weights)
        (slopes,) = torch.autograd.grad(weights[:, 0].sum(), scores)
        reached[temperature] = slopes.abs().amax(1) > 1e-6
    assert reached[1.0].all()
    assert reached[0.1].all()
    assert reached[0.001].double().mean() < 0.12
    assert torch.equal(reached[0.001], ties < ties[reached[0.001]].max() + 1e-9)
    assert ties[reached[0.001]].max() < 0.021


def test_bounds_stay_between_lowest_and_highest() -> None:
    network = weighting_network(bound_range=(0.5, 3.0), hidden=4)
    network.observe(randn(50, 6))
    for shift, end in ((30.0, 3.0), (-30.0, 0.5)):
        moved = copy.deepcopy(network)
        with torch.no_grad():
            moved.layers[-1].bias[-1] += shift
        found = moved(randn(10, 6))
        torch.testing.assert_close(found.bound, torch.full((10,), end), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.weights, network(randn(10, 6)).weights)
    bound = network(randn(10, 6)).bound
    assert bound is not None
    network.temperature = 1e-3  # of the weights, not of the bound
    values = randn(10, 6).requires_grad_()
    assert not network(values.detach()).weights.sum().isnan()
    assert (
        torch.autograd.grad(network(values).weights[:, 0].sum(), [values, network.layers[0].weight], allow_unused=True)[0] is None
    )
    assert torch.equal(network(randn(10, 6)).bound, bound)
    assert bound.requires_grad
    assert bound.std() > 0


def test_a_generator_decides_the_initial_weights_and_the_global_one_stays() -> None:
    before = torch.get_rng_state()
    one, two, other = weighting_network(3), weighting_network(3), weighting_network(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_state(one, copied_state(two))
    assert not same_state(one, copied_state(other))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [copied_state(WeightingNetwork()) for _ in range(2)]
        torch.manual_seed(0)
        assert same_state(WeightingNetwork(), drawn[0])
        assert not same_state(WeightingNetwork(), drawn[0])


def test_a_state_dict_brings_back_the_bits() -> None:
    network, values = weighting_network(branches=ALL, bound_range=(0.5, 2.0)), randn(9, 6, seed=5)
    network.observe(randn(40, 6))
    again = weighting_network(1, branches=ALL, bound_range=(0.5, 2.0))
    again.load_state_dict(network.state_dict())
    for found, expected in zip(again(values), network(values), strict=True):
        assert torch.equal(found, expected)
    for both in (network, again):
        both.observe(randn(7, 6, seed=6))
    assert same_state(again, copied_state(network))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"branches": ("adversary", "friend")}, "branches must be one of 'natural', 'adversary', 'anti_adversary', got 'friend'"),
        ({"branches": ("anti_adversary", "adversary")}, "branches must be a part of"),
        ({"branches": ("adversary", "adversary")}, "branches must be a part of"),
        ({"branches": ("natural", "anti_adversary")}, "branches must be such that 'adversary' is among them"),
        ({"favoured": 1.0}, "favoured must be < 1, got 1.0"),
        ({"favoured": 0.0}, "favoured must be a finite number > 0, got 0.0"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"bound_range": (1.0, 2.0)}, "bound_range must be two factors with 0 < lowest < 1 < highest"),
        ({"bound_range": (0.5, 0.9)}, "bound_range must be two factors with 0 < lowest < 1 < highest"),
        ({"inputs": 0}, "inputs must be an integer >= 1"),
        ({"hidden": (5, 0)}, "hidden must be an integer >= 1"),
        ({"memory": 0}, "memory must be an integer >= 1"),
    ],
)
def test_bad_settings_of_a_network_end_in_one_sentence(changes: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence):
        WeightingNetwork(**changes)


def test_a_network_refuses_other_characteristics_and_temperatures() -> None:
    network = weighting_network()
    for values in (torch.zeros(3, 5), torch.zeros(6), [0.0] * 6):
        for use in (network, network.observe):
            with pytest.raises(ValueError, match=r"characteristics must be a tensor \[batch, 6\]"):
                use(values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        network.temperature = -1.0
    assert network.temperature == 1


# Bounds by gradients --------------------------------------------------------------------------------------------------


def observed(*norms: float) -> Tensor:
    found = torch.zeros(len(norms), 6, dtype=torch.float64)
    found[:, 2] = torch.tensor(norms)
    return found


@pytest.mark.parametrize("power", [0.5, 1.0, -1.0, 0.0])
def test_the_gradient_bound_is_its_formula(power: float) -> None:
    bound = GradientBound(power=power, lowest=0.25, highest=3.0, memory=4)
    assert isinstance(bound, PerturbationBound)
    bound.observe(observed(0.1, 0.3, 0.2))
    assert bound.average.item() == pytest.approx(0.2)
    bound.observe(observed(0.7, 0.5))  # five seen, four remembered: the two count half
    assert bound.average.item() == pytest.approx(0.4)
    bound.observe(observed())
    found = bound(observed(0.4, 0.2, 0.5, 1.4, 0.001, 0.0), torch.zeros(6, dtype=torch.int64))
    powers = [ratio**power if ratio or power >= 0 else math.inf for ratio in (1, 0.5, 1.25, 3.5, 0.0025, 0)]
    assert found.tolist() == pytest.approx([min(max(value, 0.25), 3.0) for value in powers])
    again = GradientBound(power=power, lowest=0.25, highest=3.0, memory=4)
    again.load_state_dict(bound.state_dict())
    assert torch.equal(again(observed(0.3), torch.tensor([0])), bound(observed(0.3), torch.tensor([0])))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lowest": -0.1}, "lowest must be a finite number >= 0"),
        ({"lowest": 1.1}, "lowest and highest must be such that 1 lies between them"),
        ({"highest": 0.9}, "lowest and highest must be such that 1 lies between them"),
        ({"power": float("nan")}, "power must be a finite number"),
        ({"memory": 0}, "memory must be an integer >= 1"),
    ],
)
def test_bad_settings_of_a_gradient_bound_end_in_one_sentence(changes: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence):
        GradientBound(**changes)


# Balance of classes ---------------------------------------------------------------------------------------------------


def errors(natural: list[float], boundary: list[float], averages: tuple[float, float]) -> HeldOutErrors:
    return HeldOutErrors(torch.tensor(natural), torch.tensor(boundary), *averages)


def test_remargin_by_hand() -> None:
    balance = ReMargin(classes=2, tolerance=0.1, weight_rate=0.5, margin_rate=0.25, limit=0.5, halving=2)
    epochs = [
        # natural and boundary errors; multipliers of the natural loss, the boundary loss and the margin after them
        (([0.1, 0.5], [0.2, 0.6], (0.3, 0.4)), [0, 0.05], [0, 0.1], [-0.075, 0.025]),
        (([0.0, 1.0], [0.5, 0.0], (0.5, 0.25)), [0, 0.25], [0.15, 0], [-0.0375, -0.0625]),
        (([1.0, 0.0], [0.0, 0.9], (0.2, 0.1)), [0.175, 0.175], [0.05, 0.35], [-0.0875, 0.1125]),  # the rate is halved
        (([1.0, 1.0], [0.0, 0.0], (0.2, 0.1)), [0.25, 0.25], [0, 0.25], [-0.1375, 0.0625]),  # 0.35 + 0.35 is over the limit
        # A quarter of the rate; errors that no model makes, to reach the limits of multiplier and factor.
        (([0.2, 0.2], [1.0, 5.1], (0.2, 0.0)), [0.2375, 0.2375], [0.1125 / 1.725, 0.75 / 1.725], [0.0875, 1.3125]),
    ]
    for epoch, (found, natural, boundary, margin) in enumerate(epochs):
        balance.start_epoch(errors(*found), epoch=epoch)
        assert balance.natural_multiplier.tolist() == pytest.approx(natural, abs=1e-7)
        assert balance.boundary_multiplier.tolist() == pytest.approx(boundary, abs=1e-7)
        assert balance.margin_multiplier.tolist() == pytest.approx(margin, abs=1e-7)
        for weights, (one, other) in ((balance.natural_weights, natural), (balance.boundary_weights, boundary)):
            assert weights.tolist() == pytest.approx([0.5 + (one - other) / 2, 0.5 + (other - one) / 2], abs=1e-7)
        expected = [min(max(math.exp(2 * m), 0.98), 2.5) for m in margin]
        assert balance.factors.tolist() == pytest.approx(expected, abs=1e-6)
        assert balance(torch.zeros(3, 6), torch.tensor([1, 0, 1])).tolist() == pytest.approx([expected[c] for c in (1, 0, 1)])
    assert balance.factors[1] == 2.5


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(2, 6), epochs=st.integers(1, 8), seed=st.integers(0, 99), limit=st.floats(0, 0.99))
def test_class_weights_are_positive_and_sum_to_1(classes: int, epochs: int, seed: int, limit: float) -> None:
    balance, generator = ReMargin(classes=classes, limit=limit, weight_rate=2.0, tolerance=0.02), seeded(seed)
    assert isinstance(balance, PerturbationBound)
    for epoch in range(epochs):
        natural, boundary = torch.rand(2, classes, generator=generator)
        balance.start_epoch(HeldOutErrors(natural, boundary, float(natural.mean()), float(boundary.mean())), epoch=epoch)
        for weights in (balance.natural_weights, balance.boundary_weights):
            assert weights.sum().item() == pytest.approx(1)
            assert (weights > 0).all()
        for multiplier in (balance.natural_multiplier, balance.boundary_multiplier):
            assert (multiplier >= 0).all()
            assert multiplier.sum() <= limit + 1e-12
        assert ((balance.factors >= 0.98) & (balance.factors <= 2.5)).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": 1}, "classes must be an integer >= 2"),
        ({"limit": 1.0}, "limit must be < 1, so that class weights are positive"),
        ({"tolerance": -0.1}, "tolerance must be a finite number >= 0"),
        ({"lowest": 0.0}, "lowest must be a finite number > 0"),
        ({"lowest": 1.5}, "lowest and highest must be such that 1 lies between them"),
        ({"halving": 0}, "halving must be an integer >= 1"),
    ],
)
def test_bad_settings_of_remargin_end_in_one_sentence(changes: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence):
        ReMargin(**{"classes": 3, **changes})


class Marked(nn.Module):
    """Its logits are the first three columns of x; the fourth says where the attack moves the label away."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.seen = nn.BatchNorm1d(3), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((len(x), self.training, self.norm.training))
        return x[:, :3]


def rolled(model: Any, x: Tensor, y: Tensor, *, generator: Any = None) -> Tensor:
    assert not model.training
    return torch.where(x[:, 3:] > 0, torch.cat([x[:, :3].roll(1, 1), x[:, 3:]], 1), x)


def test_held_out_errors_by_hand() -> None:
    # (label, predicted, attacked): class 0 has one natural and two boundary errors of four, class 1 one boundary error of two,
    # class 3 one natural error of one, which the attack cannot break again; class 2 has no example.
    rows = [(0, 0, True), (0, 1, False), (0, 0, True), (0, 0, False), (1, 1, True), (1, 1, False), (3, 2, True)]
    y = torch.tensor([label for label, _, _ in rows])
    x = torch.zeros(7, 4)
    for i, (_, predicted, attacked) in enumerate(rows):
        x[i, predicted], x[i, 3] = 1.0, float(attacked)
    model = Marked()
    model.norm.eval()
    state = copied_state(model)
    found = held_out_errors(model, x, y, classes=4, attack=rolled, generator=seeded(), batch_size=3)
    assert found.natural.tolist() == pytest.approx([1 / 4, 0, 2 / 7, 1])
    assert found.boundary.tolist() == pytest.approx([2 / 4, 1 / 2, 3 / 7, 0])
    assert (found.natural_average, found.boundary_average) == pytest.approx((2 / 7, 3 / 7))
    assert [size for size, _, _ in model.seen] == [3, 3, 3, 3, 1, 1]
    assert not any(one or other for _, one, other in model.seen)
    assert (model.training, model.norm.training) == (True, False)
    assert same_state(model, state)
    whole = held_out_errors(model, x, y, classes=4, attack=rolled, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(found[:2], whole[:2], strict=True))


def test_natural_and_boundary_errors_are_together_the_robust_ones() -> None:
    model, (x, y) = classifier(), batch(60)
    y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % 4
    attack = PGD(threat_model=ThreatModel(epsilon=0.4), steps=5)
    found = held_out_errors(model, x, y, classes=4, attack=attack, generator=seeded(), batch_size=100)
    moved = attack(model, x, y, generator=seeded())
    robust = (model(x).argmax(1) == y) & (model(moved).argmax(1) == y)
    assert found.natural_average > 0.1
    assert found.boundary_average > 0.1
    assert found.natural_average + found.boundary_average == pytest.approx(1 - robust.double().mean().item())
    for c in y.unique().tolist():
        expected = 1 - robust[y == c].double().mean().item()
        assert (found.natural + found.boundary)[c].item() == pytest.approx(expected)


def with_margins(norm: str = "linf", **changes: Any) -> FRL:
    """FRL whose multipliers differ from class to class; factors 0.98, 1.22, 1.65 and 2.5."""
    objective = FRL(threat_model=threat(norm), held_out=batch(16, seed=7), steps=5, **changes)
    values = {"margin": [-1.0, 0.1, 0.25, 1.0], "natural": [0.3, 0.0, 0.05, 0.1], "boundary": [0.0, 0.2, 0.1, 0.05]}
    for name, multipliers in values.items():
        getattr(objective.balance, f"{name}_multiplier").copy_(torch.tensor(multipliers, dtype=torch.float64))
    return objective


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_frl_without_its_two_parts_is_trades_to_the_last_bit(norm: str, training: bool) -> None:
    results = []
    frl = with_margins(norm, beta=3.0, reweight=False, remargin=False)
    for objective in (frl, TRADES(threat_model=threat(norm), beta=3.0, steps=5)):
        model, (x, y) = classifier(normalised=True).train(training), batch()
        losses = objective(model, x, y, generator=seeded(3))
        losses.mean().backward()
        results.append([losses.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("reweight", [True, False])
def test_frl_is_its_formula_with_the_radii_of_the_classes(reweight: bool) -> None:
    objective, model, (x, y) = with_margins(beta=2.0, reweight=reweight), Watched(classifier()), batch(11)
    losses = objective(model, x, y, generator=seeded())
    moved, factors = model.inputs[-1], torch.tensor([0.98, math.exp(0.2), math.exp(0.5), 2.5], dtype=torch.float64)
    assert [len(v) for v in model.inputs] == [11] * 7  # clean, five steps, moved
    reach = (moved - x).abs().amax(1)
    assert (reach <= 0.1 * factors[y] + 1e-9).all()
    assert (reach > 0.1 * factors[y] - 1e-9).double().mean() > 0.5
    clean, there = model.inner(x), model.inner(moved)
    natural = -clean.log_softmax(1)[torch.arange(11), y]
    divergence = (clean.softmax(1) * (clean.log_softmax(1) - there.log_softmax(1))).sum(1)
    a0 = torch.tensor([0.25 + 0.3 - 0.1125, 0.25 - 0.1125, 0.25 + 0.05 - 0.1125, 0.25 + 0.1 - 0.1125], dtype=torch.float64)
    a1 = torch.tensor([0.25 - 0.0875, 0.25 + 0.2 - 0.0875, 0.25 + 0.1 - 0.0875, 0.25 + 0.05 - 0.0875], dtype=torch.float64)
    if not reweight:
        a0 = a1 = torch.ones(4).double()
    shares = a0[y] / a0[y].mean(), a1[y] / a1[y].mean()
    torch.testing.assert_close(losses, shares[0] * natural + 2 * shares[1] * divergence, rtol=1e-10, atol=0)
    mean = (a0[y] * natural).sum() / a0[y].sum() + 2 * (a1[y] * divergence).sum() / a1[y].sum()
    torch.testing.assert_close(losses.mean(), mean, rtol=1e-10, atol=0)


def test_the_gradient_of_frl_is_that_of_central_differences() -> None:
    objective, model, (x, y) = with_margins(), classifier(), batch()
    gradients = torch.autograd.grad(objective(model, x, y, generator=seeded()).mean(), list(model.parameters()))
    h = 1e-6
    with torch.no_grad():
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            for index in (0, p.numel() - 1):
                values = []
                for step in (h, -2 * h):
                    p.view(-1)[index] += step
                    values.append(objective(model, x, y, generator=seeded()).mean().item())
                p.view(-1)[index] += h
                assert gradient.flatten()[index].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-8)


def test_start_epoch_of_frl_moves_the_balance_and_leaves_the_model() -> None:
    held_out = batch(40, seed=7)
    objective = FRL(threat_model=threat(), held_out=held_out)
    model = classifier(normalised=True)
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, modes = copied_state(model), [m.training for m in model.modules()]
    objective.start_epoch(model, epoch=0, epochs=3, generator=seeded())
    assert same_state(model, state)
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    attack = PGD(threat_model=threat(), steps=20, step_size=0.025)
    expected = ReMargin(classes=4)
    found = held_out_errors(model, *held_out, classes=4, attack=attack, generator=seeded())
    expected.start_epoch(found, epoch=0)
    assert same_state(objective.balance, copied_state(expected))
    assert (objective.balance.margin_multiplier != 0).all()
    told = objective.diagnostics
    assert told["largest_factor"] == pytest.approx(expected.factors.max().item())
    assert told["largest_boundary_weight"] == pytest.approx(4 * expected.boundary_weights.max().item())


def test_a_radius_of_frl_is_never_wider_than_the_box() -> None:
    objective = FRL(threat_model=ThreatModel(epsilon=0.9), held_out=batch(16))
    objective.balance.margin_multiplier.fill_(1.0)
    assert objective(classifier(), *batch(), generator=seeded()).isfinite().all()


def test_frl_refuses_bad_settings() -> None:
    x, y = batch(8)
    with pytest.raises(ValueError, match="held_out must be at least one example"):
        FRL(threat_model=threat(), held_out=(x[:0], y[:0]))
    with pytest.raises(TypeError, match="threat_model must be a ThreatModel"):
        FRL(threat_model=0.1, held_out=(x, y))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta must be a finite number >= 0"):
        FRL(threat_model=threat(), held_out=(x, y), beta=-1.0)
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        FRL(threat_model=threat(), held_out=(x, y), steps=0)
    with pytest.raises(ValueError, match=r"y must be in \[0, 4\)"):
        FRL(threat_model=threat(), held_out=(x, y))(classifier(), x, y + 1)

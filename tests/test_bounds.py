"""Bounds on the adversarial risk: hand values, known values on digits, the two witnesses, invariances, ties, errors.

The oracle values were found by other programs (linear programs over listed sets); the parts are tested in test_bounds_parts.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from metarobust.bounds import RiskBound, adversarial_risk_bound, risk_curve
from metarobust.threat_models import ThreatModel

PAIR = np.array([[0.0, 0.0], [1.0, 0.0]])
TRIANGLE = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
REACH = 1 / math.sqrt(3)  # radius of the circle through the triangle


def bound_of(x: Any, y: Any, norm: str, epsilon: float, **options: Any) -> RiskBound:
    if options.get("weights") is not None:
        options["weights"] = torch.as_tensor(np.asarray(options["weights"]))
    threat_model = ThreatModel(norm=norm, epsilon=epsilon, upper=1e6)
    return adversarial_risk_bound(torch.as_tensor(x), torch.as_tensor(y), threat_model, **options)


def digits(per_class: int | None = None) -> tuple[Tensor, Tensor]:
    """The 8 x 8 digits in [0, 1], float64; of each class the first ``per_class``."""
    found = load_digits()
    x, y = torch.from_numpy(found.data / 16), torch.from_numpy(found.target).long()
    if per_class is None:
        return x, y
    first = torch.cat([(y == k).nonzero().squeeze(1)[:per_class] for k in range(10)])
    return x[first], y[first]


# Hand values

HAND = [
    # points, norm, epsilon, weights, risk at order 2, risk at order 3
    (PAIR, "l2", 0.499, None, 0, 0),
    (PAIR, "l2", 0.5, None, 0.5, 0.5),
    (PAIR, "l2", 0.7, None, 0.5, 0.5),
    (PAIR, "linf", 0.499, None, 0, 0),
    (PAIR, "linf", 0.5, None, 0.5, 0.5),
    (PAIR, "l2", 0.5, [0.7, 0.3], 0.3, 0.3),
    (PAIR, "linf", 0.5, [0.7, 0.3], 0.3, 0.3),
    (PAIR, "l2", 0.5, [1.0, 1.0], 0.5, 0.5),
    (PAIR, "l2", 0.5, [7.0, 3.0], 0.3, 0.3),
    (TRIANGLE, "l2", 0.49, None, 0, 0),
    (TRIANGLE, "l2", 0.5, None, 0.5, 0.5),
    (TRIANGLE, "l2", 0.55, None, 0.5, 0.5),
    (TRIANGLE, "l2", REACH - 1e-6, None, 0.5, 0.5),
    (TRIANGLE, "l2", REACH, None, 0.5, 2 / 3),
    (TRIANGLE, "l2", 0.6, None, 0.5, 2 / 3),
    (TRIANGLE, "linf", 0.5, None, 0.5, 2 / 3),
    (TRIANGLE, "l2", 0.6, [0.6, 0.2, 0.2], 0.4, 0.4),
    (TRIANGLE, "l2", 0.6, [0.4, 0.35, 0.25], 0.5, 0.6),
    (TRIANGLE, "l2", 0.55, [0.4, 0.35, 0.25], 0.5, 0.5),
    (np.array([[0.0], [0.0], [0.0], [9.0]]), "l2", 0.0, None, 0.375, 0.5),
    (np.array([[0.0], [0.0], [0.0], [9.0]]), "linf", 0.0, None, 0.375, 0.5),
]


@pytest.mark.parametrize(("x", "norm", "epsilon", "weights", "second", "third"), HAND)
def test_hand_values(x: np.ndarray, norm: str, epsilon: float, weights: list[float] | None, second: float, third: float) -> None:
    y = torch.tensor([0, 1, 2, 0])[: len(x)]
    assert bound_of(x, y, norm, epsilon, weights=weights, order=2).lower == pytest.approx(second, abs=1e-9)
    for order in (3, "auto", 7):
        bound = bound_of(x, y, norm, epsilon, weights=weights, order=order)
        assert bound.lower == pytest.approx(third, abs=1e-9)
        assert bound.upper == pytest.approx(third, abs=1e-8)
        assert bound.exact


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_class_and_no_conflict_have_no_risk(norm: str) -> None:
    x = np.random.default_rng(0).normal(size=(9, 3))
    for y, epsilon in ((np.zeros(9, dtype=np.int64), 5.0), (np.full(9, 4), 5.0), (np.arange(9), 1e-6)):
        bound = bound_of(x, y, norm, epsilon)
        assert (bound.lower, bound.upper, bound.exact, bound.pairs) == (0, 0, True, 0)
        assert bound.potentials.tolist() == [1] * 9


def test_a_lone_example() -> None:
    bound = bound_of([[0.25]], [3], "l2", 1.0)
    assert (bound.lower, bound.upper, bound.exact) == (0, 0, True)
    assert bound.classifier()(torch.tensor([[0.0]])).tolist() == [[0, 0, 0, 1]]
    assert bound.attack().positions.tolist() == [[0.25]]


def test_four_circles() -> None:
    """Four circles of 12 points each that pass near each other: every order adds a class to the crowd in the middle."""
    angle = 2 * np.pi * np.arange(12) / 12
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    x = np.concatenate([circle + offset for offset in itertools.product((-0.6, 0.6), repeat=2)])
    y = np.repeat(np.arange(4), 12)
    for order, risk in ((2, 1 / 2), (3, 2 / 3), (4, 3 / 4)):
        bound = bound_of(x, y, "l2", 1.0, order=order)
        assert bound.lower == pytest.approx(risk, abs=1e-7)
        assert bound.pairs == 512
    bound = bound_of(x, y, "l2", 1.0)
    assert bound.exact
    assert bound.lower == pytest.approx(3 / 4, abs=1e-7)


# Known values


def test_digits_at_order_2() -> None:
    x, y = digits()
    known = {
        "l2": {
            0.6: (0.001113, 2),
            0.7: (0.010573, 38),
            0.8: (0.053422, 322),
            0.9: (0.134669, 1730),
            1.0: (0.279354, 7658),
            1.2: (0.497774, 72324),
        },
        "linf": {
            0.25: (0.012243, 42),
            0.3: (0.030607, 158),
            0.35: (0.179188, 2604),
            0.4: (0.336672, 9648),
            0.45: (0.499722, 84638),
        },
    }
    certified = {("l2", 0.8), ("l2", 0.9), ("linf", 0.3), ("linf", 0.35), ("linf", 0.4)}
    for norm, values in known.items():
        for bound in risk_curve(x, y, norm=norm, epsilons=list(values), order=2, most_sets=20_000):
            risk, pairs = values[bound.epsilon]
            assert bound.lower == pytest.approx(risk, abs=1e-6)
            assert bound.pairs == pairs
            assert bound.exact or (norm, bound.epsilon) not in certified


def test_digits_with_1_453_110_conflicts() -> None:
    bound = bound_of(*digits(), "linf", 0.5, order=2, most_sets=100)
    assert bound.lower == pytest.approx(0.5, abs=1e-9)
    assert bound.pairs == 1_453_110


def test_digits_at_order_3() -> None:
    known = {1.0: (0.281859, 7658), 1.05: (0.356427, 14430), 1.1: (0.436169, 26125)}
    for bound in risk_curve(*digits(), norm="l2", epsilons=list(known), order=3):
        risk, pairs = known[bound.epsilon]
        assert bound.lower == pytest.approx(risk, abs=1e-6)
        assert bound.pairs == pairs
        assert bound.order == 3


@pytest.mark.parametrize(
    ("per_class", "norm", "epsilon", "order", "pairs", "risk"),
    [
        (50, "l2", 1.1, 2, 2070, 0.343),
        (100, "l2", 1.1, 2, 8421, 0.4145),
        (170, "l2", 1.1, 2, 23283, 0.4185294),
        (50, "l2", 1.1, 3, 2070, 0.344),
        (100, "l2", 1.1, 3, 8421, 0.4228571),
        (50, "linf", 0.42, 3, 2131, 0.408),
        (100, "linf", 0.42, 3, 9079, 0.4765),
    ],
)
def test_subsets_of_digits(per_class: int, norm: str, epsilon: float, order: int, pairs: int, risk: float) -> None:
    x, y = digits(per_class)
    bound = bound_of(x, y, norm, epsilon, order=order)
    assert bound.lower == pytest.approx(risk, abs=1e-6)
    assert bound.pairs == pairs


def test_six_gaussians() -> None:
    rng = np.random.default_rng(0)
    centres = [(-2, 2), (2, 2), (6, 2), (-2, -2), (2, -2), (6, -2)]
    x = torch.from_numpy(np.concatenate([rng.normal(centre, 1.0, size=(50, 2)) for centre in centres]))
    y = torch.arange(6).repeat_interleave(50)
    known = {0.4: (0.056667, 0.056667), 0.8: (0.18, 0.18), 1.2: (0.353333, 0.353333), 1.6: (0.478333, 0.5), 2.0: (0.5, 0.58)}
    for order in (2, 3):
        for bound in risk_curve(x, y, norm="l2", epsilons=list(known), order=order, most_sets=200_000):
            assert bound.lower == pytest.approx(known[bound.epsilon][order - 2], abs=1e-6)


# The witnesses


def crowd(seed: int, points: int = 30, classes: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the plane, some of them repeated with the same or another label, and real weights, one of them 0."""
    rng = np.random.default_rng(seed)
    x, y, weight = rng.random((points, 2)), rng.integers(0, classes, points), rng.exponential(size=points)
    x[-3:] = x[:3]
    y[-3] = y[0]
    weight[5] = 0
    return x, y, weight


def inside_balls(x: Tensor, norm: str, epsilon: float, rng: np.random.Generator) -> Tensor:
    """``[points, moves, 2]``: a grid, random moves, and moves to the boundary."""
    side = torch.linspace(-1, 1, 11, dtype=torch.float64)
    random = torch.from_numpy(rng.uniform(-1, 1, (100, 2)))
    moves = torch.cat([torch.cartesian_prod(side, side), random, random])
    length = moves.abs().amax(1, keepdim=True) if norm == "linf" else moves.norm(dim=1, keepdim=True)
    moves = torch.where((length > 1) | (torch.arange(len(moves)) >= len(moves) - 100)[:, None], moves / length, moves)
    return x[:, None] + epsilon * moves


@pytest.mark.parametrize("order", [2, "auto"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_attacked_classifier_keeps_its_guarantee(norm: str, order: int | str) -> None:
    for seed, epsilon in enumerate((0.05, 0.1, 0.2)):
        x, y, weight = crowd(seed)
        bound = bound_of(x, y, norm, epsilon, weights=weight, order=order)
        classifier, attack = bound.classifier(), bound.attack()
        everywhere = inside_balls(torch.from_numpy(x), norm, epsilon, np.random.default_rng(seed))
        probability = classifier(everywhere.flatten(0, 1))
        assert (probability >= 0).all()
        np.testing.assert_allclose(probability.sum(1), 1, atol=1e-12)
        right = probability.reshape(*everywhere.shape[:2], -1)[torch.arange(len(x)), :, torch.from_numpy(y)].amin(1)
        moved = classifier(attack.positions)[attack.position, attack.label]
        right.scatter_reduce_(0, attack.example, moved, "amin")
        assert (right >= bound.guarantees - 1e-9).all()
        share = torch.from_numpy(weight / weight.sum())
        assert 1 - float(share @ bound.guarantees) == pytest.approx(bound.upper, abs=1e-12)
        assert bound.exact or order == 2
        if bound.exact:  # what the attack finds is the worst there is
            assert 1 - float(share @ right) == pytest.approx(bound.lower, abs=2e-7)
        # In float32, as networks take it, moves are rounded across the boundary, and hardly more is lost.
        rounded = classifier(attack.positions.float()).double()[attack.position, attack.label]
        assert float((attack.mass * rounded).sum()) >= 1 - bound.upper - 1e-7


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_balls_that_nearly_meet_keep_their_promises(norm: str) -> None:
    """A point on the boundary of one ball, and outside another by less than the rounding that the classifier forgives."""
    for gap in (1e-7, 1e-6, 3e-6, 6e-6, 1e-5):
        x = np.array([[0.0, 0.0], [1.0 + gap, 0.0]])
        bound = bound_of(x, [0, 1], norm, 0.5)
        assert bound.upper == 0
        probability = bound.classifier()(torch.tensor([[0.5, 0.0], [0.5 + gap, 0.0]], dtype=torch.float64))
        np.testing.assert_allclose(probability, np.eye(2), atol=1e-9)


def test_classifier_at_epsilon_0_answers_8_bit_data_in_float32() -> None:
    """One image with three labels: whatever the potentials, what is promised is kept on the data themselves."""
    x = (torch.tensor([[100, 7], [100, 7], [100, 7], [3, 200]]).float() / 255).requires_grad_()
    y = torch.tensor([2, 1, 0, 0])
    bound = adversarial_risk_bound(x, y, ThreatModel(norm="linf", epsilon=0.0))
    assert bound.lower == bound.upper == pytest.approx(0.5)
    probability = bound.classifier()(x)
    assert (probability[torch.arange(4), y] >= bound.guarantees - 1e-12).all()
    assert float(1 - probability[torch.arange(4), y].mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_moves_stay_inside_the_balls_and_add_up(norm: str) -> None:
    for seed, epsilon in enumerate((0.04, 0.1, 0.2)):
        x, y, weight = crowd(seed)
        bound = bound_of(x[:, :, None], y, norm, epsilon, weights=weight)
        attack = bound.attack()
        assert attack.positions.shape[1:] == (2, 1)
        move = attack.positions[attack.position, :, 0] - torch.from_numpy(x)[attack.example]
        length = move.norm(dim=1) if norm == "l2" else move.abs().amax(1)
        assert float(length.max()) <= epsilon * (1 + 2e-9)
        assert float(length.max()) > 0.5 * epsilon
        total = torch.zeros(len(x), dtype=torch.float64).index_add_(0, attack.example, attack.probability)
        np.testing.assert_allclose(total, weight > 0, atol=1e-12)
        share = torch.from_numpy(weight / weight.sum())
        np.testing.assert_allclose(attack.mass, attack.probability * share[attack.example])
        assert (attack.label == torch.from_numpy(y)[attack.example]).all()


@pytest.mark.parametrize(("norm", "place"), [("l2", [0.5, 0.0]), ("linf", [0.5, 0.05])])
def test_a_crowd_meets_at_the_centre_of_its_ball(norm: str, place: list[float]) -> None:
    """Three points at an obtuse angle: not at their mean, which one of them cannot reach."""
    bound = bound_of([[0.0, 0.0], [1.0, 0.0], [0.5, 0.1]], [0, 1, 2], norm, 0.5)
    assert bound.lower == pytest.approx(2 / 3)
    attack = bound.attack()
    met = int(attack.position.bincount(attack.mass).argmax())
    np.testing.assert_allclose(attack.positions[met], place, atol=1e-12)
    assert attack.label[attack.position == met].tolist() == [0, 1, 2]


@pytest.mark.parametrize("order", [2, 3, "auto"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_classifier_beats_the_attack(norm: str, order: int | str) -> None:
    x, y, weight = crowd(7, points=60, classes=5)
    bound = bound_of(x, y, norm, 0.1, weights=weight, order=order)
    attack = bound.attack()
    assert bound.lower > 0.3
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(5, 2, generator=generator, dtype=torch.float64) * 10 ** (seed % 3)
        network: Callable[[Tensor], Tensor] = lambda moved, table=table: (moved @ table.T).softmax(1)  # noqa: E731
        assert attack.risk(network) >= bound.lower - 1e-9
    nearest = bound_of(x, y, norm, 1e-9, weights=weight).classifier()  # right on nearly all unmoved points
    assert attack.risk(nearest) >= bound.lower - 1e-9
    assert attack.risk(bound.classifier()) == pytest.approx(bound.lower, abs=bound.upper - bound.lower + 1e-9)
    if order == "auto":
        assert bound.exact
        assert attack.risk(bound.classifier()) == pytest.approx(bound.upper, abs=1e-7)


def test_classifier_takes_images_and_names_a_wrong_shape() -> None:
    x = torch.rand(6, 1, 2, 2)
    classifier = adversarial_risk_bound(x, torch.arange(6) % 2, ThreatModel(norm="linf", epsilon=0.05)).classifier()
    assert classifier(x).shape == (6, 2)
    assert classifier(x[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="^x must be of shape \\[batch, 1, 2, 2\\], got \\[6, 4\\]"):
        classifier(x.flatten(1))


# Invariances

problems = st.tuples(st.integers(0, 10**6), st.sampled_from(["l2", "linf"]), st.sampled_from([2, 3, "auto"]))


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    points, classes = int(rng.integers(2, 26)), int(rng.integers(2, 6))
    weight = rng.exponential(size=points) if seed % 2 else rng.integers(1, 4, points).astype(float)
    return (
        rng.normal(size=(points, int(rng.integers(1, 4)))),
        rng.integers(0, classes, points),
        weight,
        float(rng.uniform(0.1, 1)),
    )


def close(bound: RiskBound, other: RiskBound) -> None:
    assert bound.lower == pytest.approx(other.lower, abs=1e-9)
    assert bound.exact == other.exact
    if bound.exact:
        assert bound.upper == pytest.approx(other.upper, abs=3e-7)


@given(problems)
@settings(max_examples=20, deadline=None)
def test_invariances(case: tuple[int, str, int | str]) -> None:
    seed, norm, order = case
    x, y, weight, epsilon = problem(seed)
    rng = np.random.default_rng(seed)
    bound = bound_of(x, y, norm, epsilon, weights=weight, order=order)
    assert 0 <= bound.lower <= bound.upper <= 1
    assert bound.upper <= 1 - np.bincount(y, weight).max() / weight.sum() + 1e-12
    assert bound.lower <= 1 - 1 / (bound.order if bound.order > 2 or order == 2 else 5) + 1e-12

    relabelled = rng.permutation(7)[y]
    close(bound_of(x, relabelled, norm, epsilon, weights=weight, order=order), bound)
    shuffle = rng.permutation(len(x))
    permuted = bound_of(x[shuffle], y[shuffle], norm, epsilon, weights=weight[shuffle], order=order)
    close(permuted, bound)
    scale = 10 ** rng.uniform(-3, 3)
    close(bound_of(scale * x, y, norm, scale * epsilon, weights=weight, order=order), bound)
    close(bound_of(x + rng.normal(size=x.shape[1]), y, norm, epsilon, weights=weight, order=order), bound)
    close(bound_of(x, y, norm, epsilon, weights=weight * 1e-3, order=order), bound)

    halved = np.append(weight, weight[0] / 2)
    halved[0] /= 2
    twice, labels = np.concatenate([x, x[:1]]), np.append(y, y[0])
    split = bound_of(twice, labels, norm, epsilon, weights=halved, order=order)
    close(split, bound)
    assert (split.points, split.examples) == (bound.points, bound.examples + 1)
    assert split.potentials[0] == split.potentials[-1]
    ignored = bound_of(twice, np.append(y, 6), norm, epsilon, weights=np.append(weight, 0), order=order)
    close(ignored, bound)
    assert (ignored.potentials[-1], ignored.guarantees[-1]) == (0, 0)


@given(problems)
@settings(max_examples=20, deadline=None)
def test_monotone(case: tuple[int, str, int | str]) -> None:
    seed, norm, order = case
    x, y, weight, _ = problem(seed)
    options = {"norm": norm, "epsilons": [0.8, 0.2, 0.5, 0.0], "weights": torch.from_numpy(weight)}
    data = torch.from_numpy(x), torch.from_numpy(y)
    curves = {of: risk_curve(*data, **options, order=of) for of in (2, 3, 4, "auto")}
    for bounds in curves.values():
        assert [bound.epsilon for bound in bounds] == options["epsilons"]
        assert bounds[3].lower <= bounds[1].lower + 1e-9 <= bounds[2].lower + 2e-9 <= bounds[0].lower + 3e-9
    for at in range(4):
        lowers = [curves[of][at].lower for of in (2, 3, 4, "auto")]
        assert lowers == pytest.approx(sorted(lowers), abs=1e-9)
        assert all(curves[of][at].upper >= curves["auto"][at].lower - 1e-9 for of in curves)
    alone = bound_of(x, y, norm, 0.5, weights=weight, order=order)
    close(alone, curves[order][2])
    assert (alone.pairs, alone.sets) == (curves[order][2].pairs, curves[order][2].sets)


# Ties


@pytest.mark.parametrize("scaled", ["divided", "multiplied", "divided, then float64", "float64"])
def test_8_bit_ties_in_linf_are_exact_at_every_level(scaled: str) -> None:
    every = torch.arange(256).to(torch.float64 if scaled == "float64" else torch.float32)[:, None]
    every = every * (1 / 255) if scaled == "multiplied" else every / 255
    every = every.double() if scaled == "divided, then float64" else every
    for apart in (1, 2, 3, 127, 128, 254, 255, *range(11, 250, 16)):
        x = every[[(255 - apart) // 2, (255 - apart) // 2 + apart]]
        y = torch.tensor([0, 1])
        epsilons = [apart / 2 / 255, (apart - 1e-4) / 2 / 255, (apart + 1e-4) / 2 / 255]
        tie, below, above = risk_curve(x, y, norm="linf", epsilons=epsilons)
        assert (tie.lower, tie.ties, below.lower, below.ties, above.lower, above.ties) == (0.5, 1, 0, 0, 0.5, 0)
        tie, below, above = risk_curve(x, y, norm="linf", epsilons=epsilons, closed=False)
        assert (tie.lower, tie.ties, below.lower, below.ties, above.lower, above.ties) == (0, 1, 0, 0, 0.5, 0)


def test_8_bit_ties_in_l2_compare_integers() -> None:
    """The largest squared distance that matters, 784 * 255^2 and one unit less, must not be confused in float32."""
    x = torch.ones(3, 784)
    x[0] = 0
    x[2, 0] = 254 / 255
    y = torch.tensor([0, 1, 1])
    far, near = 784 * 255**2, 783 * 255**2 + 254**2
    for square, pairs in ((far, 2), (far - 1, 1), (near, 1), (near - 1, 0)):
        bound = adversarial_risk_bound(x, y, ThreatModel(norm="l2", epsilon=math.sqrt(square) / 255 / 2))
        assert bound.pairs == pairs
        assert bound.ties == (square in (far, near))
        bound = adversarial_risk_bound(x, y, ThreatModel(norm="l2", epsilon=math.sqrt(square) / 255 / 2), closed=False)
        assert bound.pairs == pairs - (square in (far, near))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_open_balls_leave_out_ties_of_pairs_and_triples(norm: str) -> None:
    open_pair = bound_of(PAIR, [0, 1], norm, 0.5, closed=False)
    assert (open_pair.lower, open_pair.upper, open_pair.pairs, open_pair.ties) == (0, 0, 0, 1)
    closed_pair = bound_of(PAIR, [0, 1], norm, 0.5)
    assert (closed_pair.lower, closed_pair.pairs, closed_pair.ties) == (0.5, 1, 1)
    if norm == "l2":
        assert bound_of(TRIANGLE, [0, 1, 2], norm, REACH).lower == pytest.approx(2 / 3)
        assert bound_of(TRIANGLE, [0, 1, 2], norm, REACH, closed=False).lower == pytest.approx(1 / 2)
    right_angle = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    radius = 2.5 if norm == "l2" else 2.0
    assert bound_of(right_angle, [0, 1, 2], norm, radius).lower == pytest.approx(2 / 3)
    assert bound_of(right_angle, [0, 1, 2], norm, radius, closed=False).lower == pytest.approx(1 / 3)


def test_open_balls_of_radius_0_are_their_centres() -> None:
    x = torch.tensor([[0.2], [0.2], [0.3]])
    for closed in (True, False):
        bound = adversarial_risk_bound(x, torch.tensor([0, 1, 0]), ThreatModel(norm="l2", epsilon=0.0), closed=closed)
        assert bound.lower == bound.upper == pytest.approx(1 / 3)


@given(st.integers(0, 10**6), st.sampled_from(["l2", "linf"]), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_images_of_few_levels_have_many_ties(seed: int, norm: str, half: int) -> None:
    """Against the comparison of integers; open balls never see more than closed ones, and ties are the difference."""
    rng = np.random.default_rng(seed)
    levels, y = rng.integers(0, 8, (20, 3)), rng.integers(0, 3, 20)
    apart = np.abs(levels[:, None] - levels)
    reached = apart.max(-1) - 2 * half if norm == "linf" else (apart**2).sum(-1) - (2 * half) ** 2
    first = np.unique(np.column_stack([levels, y]), axis=0, return_index=True)[1]
    reached = reached[np.ix_(first, first)][np.triu(y[first][:, None] != y[first])]
    x = torch.from_numpy(levels).float() / 255
    shut = bound_of(x, y, norm, half / 255)
    ajar = bound_of(x, y, norm, half / 255, closed=False)
    assert (shut.pairs, ajar.pairs) == ((reached <= 0).sum(), (reached < 0).sum())
    assert shut.ties == ajar.ties == shut.pairs - ajar.pairs
    assert ajar.lower <= shut.lower + 1e-9


def test_duplicates_count_by_weight() -> None:
    """Eight copies of one point, of two labels: the Bayes error, and one point per label."""
    x, y = torch.zeros(8, 3, 2), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    bound = adversarial_risk_bound(x, y, ThreatModel(norm="l2", epsilon=0.1))
    assert bound.lower == bound.upper == pytest.approx(3 / 8)
    assert (bound.points, bound.examples, bound.pairs) == (2, 8, 1)
    weights = torch.tensor([1.0, 0, 0, 0, 0, 3, 3, 3])
    assert adversarial_risk_bound(x, y, ThreatModel(norm="l2", epsilon=0.1), weights=weights).lower == pytest.approx(0.1)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_values_whose_squares_leave_float32(scale: float) -> None:
    x, y = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    bound = risk_curve(x.double(), y, norm="l2", epsilons=[1.0])[0]
    close(risk_curve(x * scale, y, norm="l2", epsilons=[scale])[0], bound)


@pytest.mark.parametrize("answer", ["medium", None])
def test_reduced_matrix_products_only_make_the_filter_wider(answer: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to answer once a user has set the precision of one backend; products are then taken to be reduced."""
    x, y = torch.randn(60, 20, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    expected = risk_curve(x, y, norm="l2", epsilons=[2.0])[0]

    def precision() -> str:
        if answer is None:
            raise RuntimeError("mix of the legacy and new APIs")
        return answer

    monkeypatch.setattr(torch, "get_float32_matmul_precision", precision)
    bound = risk_curve(x, y, norm="l2", epsilons=[2.0])[0]
    assert (bound.lower, bound.pairs) == (expected.lower, expected.pairs)


# Results and errors


def test_result_names_its_numbers() -> None:
    bound = bound_of(TRIANGLE, [0, 1, 2], "l2", 0.6)
    numbers = bound.as_dict()
    assert numbers["lower"] == bound.lower
    assert numbers["sets"] == {"3": 1}
    assert (numbers["points"], numbers["pairs"], numbers["order"], numbers["exact"]) == (3, 3, 3, True)
    assert set(bound.seconds) == {"pairs", "solution", "witnesses"}
    assert bound.potentials.dtype == bound.guarantees.dtype == torch.float64
    assert float(bound.potentials.sum()) == pytest.approx(1)


def test_data_are_left_alone() -> None:
    x, y, weights = torch.rand(20, 3, requires_grad=True), torch.arange(20) % 3, torch.rand(20)
    copies = x.detach().clone(), y.clone(), weights.clone()
    state = torch.random.get_rng_state()
    bound = adversarial_risk_bound(x, y, ThreatModel(norm="linf", epsilon=0.2), weights=weights)
    bound.classifier()(x)
    bound.attack()
    assert all(torch.equal(now, before) for now, before in zip((x.detach(), y, weights), copies, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


GOOD = {"x": torch.rand(4, 2), "y": torch.tensor([0, 1, 0, 1]), "threat_model": ThreatModel(norm="l2", epsilon=0.1)}
BAD = [
    (
        {"x": torch.tensor([[0.0], [math.nan], [1], [1]])},
        ValueError,
        "x must be finite, got NaN or infinite values; find them with",
    ),
    ({"x": torch.tensor([[0.0], [math.inf], [1], [1]])}, ValueError, "x must be finite"),
    (
        {"x": torch.zeros(4, 2, dtype=torch.uint8)},
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images",
    ),
    ({"x": [[0.0]] * 4}, TypeError, "x must be a floating-point tensor, got list"),
    ({"x": torch.zeros(0, 2)}, ValueError, "x must be at least one example"),
    ({"x": torch.zeros(4, 0)}, ValueError, "x must be of at least one coordinate"),
    ({"x": torch.tensor(0.5)}, ValueError, "x must be at least one example"),
    ({"x": torch.full((4, 1), 1e200, dtype=torch.float64)}, ValueError, "x must be of a size that can be squared, .*; rescale x"),
    ({"y": torch.tensor([0, 1, 0])}, ValueError, "y must be of shape \\[4\\], one label per example, got \\[3\\]"),
    ({"y": torch.tensor([[0], [1], [0], [1]])}, ValueError, "y must be of shape \\[4\\]"),
    (
        {"y": torch.tensor([0.0, 1, 0, 1])},
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float32; write y.long",
    ),
    ({"y": torch.tensor([0, -1, 0, 1])}, ValueError, "y must be labels of at least 0, got -1"),
    ({"weights": torch.ones(3)}, ValueError, "weights must be of shape \\[4\\]"),
    ({"weights": torch.zeros(4)}, ValueError, "weights must be positive for one example at least"),
    ({"weights": torch.tensor([1.0, 1, 1, -1])}, ValueError, "weights must be finite and at least 0"),
    ({"weights": torch.tensor([1.0, 1, 1, math.nan])}, ValueError, "weights must be finite and at least 0"),
    ({"weights": [1.0, 1, 1, 1]}, TypeError, "weights must be a tensor \\[examples\\], got list; write torch.tensor"),
    ({"threat_model": ThreatModel(norm="l1", epsilon=0.1)}, ValueError, "norm must be 'l2' or 'linf', got 'l1'"),
    ({"threat_model": 0.1}, TypeError, "threat_model must be a ThreatModel, got 0.1"),
    ({"order": 1}, ValueError, "order must be an integer >= 2, got 1"),
    ({"order": 2.0}, TypeError, "order must be an integer >= 2, got 2.0"),
    ({"order": "third"}, TypeError, "order must be .*got 'third'"),
    ({"method": "magic"}, ValueError, "method must be one of 'exact', 'sinkhorn', got 'magic'"),
    ({"most_sets": 0}, ValueError, "most_sets must be an integer >= 1, got 0"),
]


@pytest.mark.parametrize(("changes", "kind", "sentence"), BAD, ids=[sentence[:40] for _, _, sentence in BAD])
def test_bad_arguments_are_named(changes: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match="^" + sentence):
        adversarial_risk_bound(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("epsilons", "sentence"),
    [
        ([], "epsilons must be at least one radius"),
        ([-0.1], "epsilon must be"),
        ([0.1, math.nan], "epsilon must be"),
        ([math.inf], "epsilon"),
    ],
)
def test_bad_radii_are_named(epsilons: list[float], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence):
        risk_curve(GOOD["x"], GOOD["y"], norm="l2", epsilons=epsilons)


def test_a_tiny_search_leaves_a_valid_open_bracket() -> None:
    x, y = digits(50)
    whole = bound_of(x, y, "l2", 1.1)
    assert whole.exact
    for most_sets in (1, 100, 2000):
        bound = bound_of(x, y, "l2", 1.1, most_sets=most_sets)
        assert 0.343 - 1e-9 <= bound.lower <= whole.lower + 1e-9
        assert bound.upper >= whole.upper - 1e-7
    assert not bound_of(x, y, "l2", 1.1, most_sets=1).exact


def test_a_climb_that_is_cut_short_is_never_worse_than_order_2() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(300, 3, generator=generator, dtype=torch.float64), torch.arange(300) % 5
    for most_sets in (100, 10_000):  # at 10,000 the potentials of the climb alone would guarantee less than those of order 2
        cut, pairs = (bound_of(x, y, "l2", 0.12, order=order, most_sets=most_sets) for order in ("auto", 2))
        assert pairs.lower - 1e-12 <= cut.lower <= cut.upper <= pairs.upper + 1e-12


def test_the_risk_of_an_attack_wants_probabilities() -> None:
    x, y = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    attack = adversarial_risk_bound(x, y, ThreatModel(norm="l2", epsilon=0.4)).attack()
    assert repr(attack) == f"OptimalAttack({len(attack.example)} moves to {len(attack.positions)} positions)"
    network = torch.nn.Linear(3, 2)
    right = attack.risk(lambda points: network(points.float()).softmax(1))
    assert 0 <= right <= 1
    for wrong in (
        network,  # float32 parameters, float64 inputs
        lambda points: network(points.float()),  # logits
        lambda points: network(points.float()).argmax(1),
        lambda points: torch.ones(len(points), 1),  # a class is missing
        lambda points: points.numpy(),
    ):
        with pytest.raises(ValueError, match=r"classifier must be a function .*model\(x.float\(\)\).softmax\(1\)"):
            attack.risk(wrong)

"""Adversaries and anti-adversaries in one batch, each inside its own ball; projections with a radius per example."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weighting_setting import (
    EPSILON,
    Watched,
    batch,
    classifier,
    copied_state,
    every_norm,
    rand,
    randn,
    same_state,
    seeded,
    threat,
)

from metarobust.attacks import PGD, count_calls
from metarobust.losses import cross_entropy, kl_divergence
from metarobust.meta_weighters import (
    signed_pgd,
)
from metarobust.objectives import TRADES
from metarobust.threat_models import NORMS, ThreatModel

# Signed attack --------------------------------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sign_plus_raises_the_loss_and_minus_lowers_it(norm: str, seed: int) -> None:
    model, (x, y) = classifier(seed=seed), batch(12, seed=seed)
    signs = torch.tensor([1, -1, 0]).repeat(4)
    moved = signed_pgd(model, x, y, signs, threat_model=threat(norm), generator=seeded(seed))
    before, after = cross_entropy(model(x), y), cross_entropy(model(moved), y)
    assert (after[1::3] < before[1::3] - 1e-3).all()
    assert torch.equal(moved[2::3], x[2::3])
    start = threat(norm).project(x + 1e-3 * torch.randn(x.shape, generator=seeded(seed)).double(), x)
    assert (kl_divergence(model(x), model(moved))[::3] > 20 * kl_divergence(model(x), model(start))[::3]).all()
    climbing = signed_pgd(
        model, x, y, signs, threat_model=threat(norm), climbed=lambda _, z, y: cross_entropy(z, y), generator=seeded(seed)
    )
    assert (cross_entropy(model(climbing), y)[::3] > before[::3] + 1e-3).all()
    assert torch.equal(climbing[1::3], moved[1::3])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), norm=st.sampled_from(NORMS), lower=st.floats(-2, 0.5), width=st.floats(0.25, 3), size=st.integers(0, 5))
def test_points_stay_in_their_own_ball_and_in_the_box(data: Any, norm: str, lower: float, width: float, size: int) -> None:
    signs = torch.tensor(data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=size, max_size=size)))
    radii = torch.tensor(data.draw(st.lists(st.floats(0, 2 * width), min_size=size, max_size=size)), dtype=torch.float64)
    places = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size)), dtype=torch.float64)
    x = (lower + width * places[:, None] * rand(size, 6)).clamp(lower, lower + width)
    y, model = torch.arange(size) % 4, classifier()
    threat_model = ThreatModel(norm=norm, epsilon=0.1, lower=lower, upper=lower + width)
    moved = signed_pgd(model, x, y, signs, threat_model=threat_model, epsilon=radii, steps=3, generator=seeded())
    assert moved.shape == x.shape
    assert not moved.requires_grad
    assert (moved >= lower).all()
    assert (moved <= lower + width).all()
    assert (threat_model.distance(moved, x) <= radii + 1e-9).all()
    still = (signs == 0) | (radii == 0)
    assert torch.equal(moved[still], x[still])
    assert ((moved != x).flatten(1).any(1) | still | (radii < 1e-12)).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adversaries_only_are_those_of_trades_to_the_last_bit(norm: str, training: bool, dtype: torch.dtype) -> None:
    model, (x, y) = classifier(normalised=True, dtype=dtype).train(training), batch(dtype=dtype)
    x[0] = 0.02  # the box stops it
    for step_size in (None, 0.04):
        trades = TRADES(threat_model=threat(norm), steps=5, step_size=step_size)
        arguments: Any = {"threat_model": threat(norm), "steps": 5, "step_size": step_size}
        expected = trades.moved(model, x, y, generator=seeded(3))
        ones = torch.ones(len(x))
        assert torch.equal(signed_pgd(model, x, y, ones, generator=seeded(3), **arguments), expected)
        natural = model(x).detach() if not training else None
        same = signed_pgd(model, x, y, ones.bool(), natural_logits=natural, generator=seeded(3), **arguments)
        assert torch.equal(same, expected)
        radii = torch.full((len(x),), EPSILON[norm])
        close = signed_pgd(model, x, y, ones, epsilon=radii, generator=seeded(3), **arguments)
        torch.testing.assert_close(close, expected, rtol=0, atol=1e-6)


@every_norm
def test_anti_adversaries_only_are_those_of_pgd(norm: str) -> None:
    model, (x, y) = classifier(), batch()
    attack = PGD(threat_model=threat(norm), steps=4, random_start=False, direction="anti_adversary")
    moved = signed_pgd(model, x, y, -torch.ones_like(y), threat_model=threat(norm), steps=4, start_std=0.0)
    assert torch.equal(moved, attack(model, x, y))


def test_the_model_runs_on_the_rows_that_move_alone() -> None:
    (x, y), watched = batch(8), Watched(classifier())
    signs, radii = torch.tensor([1, 0, -1, 0, 1, -1, 0, 1]), torch.full((8,), 0.1, dtype=torch.float64)
    radii[4] = 0
    arguments: Any = {"threat_model": threat(), "epsilon": radii, "steps": 3, "generator": seeded()}
    with count_calls() as counter:
        signed_pgd(watched, x, y, signs, natural_logits=watched.inner(x), **arguments)
    assert [len(v) for v in watched.inputs] == [4, 4, 4]
    assert (counter.calls, counter.examples) == (1, 8)
    rows = [0, 2, 5, 7]
    assert all((v - x[rows]).abs().max() <= 0.1 + 1e-12 for v in watched.inputs)
    watched.inputs.clear()
    signed_pgd(watched, x, y, signs, **arguments)
    assert [len(v) for v in watched.inputs] == [8, 4, 4, 4]
    watched.inputs.clear()
    assert torch.equal(signed_pgd(watched, x, y, 0 * signs, **arguments), x)
    assert watched.inputs == []


SLOPES = torch.tensor([1.0, -2.0, 0.5, -0.1], dtype=torch.float64)


def linear(x: Tensor) -> Tensor:
    z = x.flatten(1) @ SLOPES.to(x)
    return torch.stack([z, torch.zeros_like(z)], 1)


def raise_first(_: Tensor, moved: Tensor, y: Tensor) -> Tensor:
    return moved[:, 0]


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("start_std", [0.0, 1e-3])
def test_every_example_reaches_its_own_corner(steps: int, start_std: float) -> None:
    x, y = 0.4 + 0.2 * rand(4, 1, 2, 2), torch.tensor([0, 0, 0, 0])
    signs, radii = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([0.02, 0.3, 0.25, 5.0], dtype=torch.float64)
    moved = signed_pgd(
        linear, x, y, signs, threat_model=threat(), epsilon=radii, steps=steps, start_std=start_std, climbed=raise_first,
        generator=seeded(),
    )  # fmt: skip
    # Class 0 gains along (+, -, +, -); the anti-adversary of label 0 goes there too.
    direction = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    assert torch.equal(moved, (x + radii.reshape(4, 1, 1, 1) * direction).clamp(0, 1))
    for norm, power in (("l2", 2.0), ("l1", 1.0)):
        moved = signed_pgd(
            linear, x, y, signs, threat_model=threat(norm), epsilon=radii.clamp(max=0.3), steps=steps, start_std=0.0,
            climbed=raise_first,
        )  # fmt: skip
        best = SLOPES / SLOPES.norm() if power == 2 else torch.tensor([0.0, -1.0, 0.0, 0.0], dtype=torch.float64)
        expected = x + radii.clamp(max=0.3).reshape(4, 1, 1, 1) * best.reshape(1, 1, 2, 2)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


def test_steps_are_in_proportion_to_the_radii() -> None:
    x, y = 0.4 + 0.2 * rand(3, 4), torch.tensor([0, 0, 0])
    radii = torch.tensor([0.02, 0.1, 0.3], dtype=torch.float64)
    moved = signed_pgd(
        linear, x, y, torch.ones(3), threat_model=threat(), epsilon=radii, steps=3, step_size=0.02, start_std=0.0,
        climbed=raise_first,
    )  # fmt: skip
    torch.testing.assert_close((moved - x).abs().amax(1), 3 * 0.2 * radii, rtol=1e-9, atol=0)
    fixed = signed_pgd(
        linear, x, y, torch.ones(3), threat_model=threat(), steps=3, step_size=0.02, start_std=0.0, climbed=raise_first
    )
    torch.testing.assert_close((fixed - x).abs().amax(1), torch.full((3,), 0.06, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_an_attack_leaves_the_model_as_it_was(training: bool) -> None:
    model, (x, y) = classifier(normalised=True), batch()
    model.train(training)
    model[0].training = not training
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, modes = copied_state(model), [m.training for m in model.modules()]
    kept = x.clone()
    signs = torch.tensor([1, -1, 1, 0, 1, -1, -1, 1, 1])
    found = []
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            found.append(signed_pgd(model, x, y, signs, threat_model=threat(), generator=seeded()).clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert same_state(model, state)
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    assert torch.equal(x, kept)
    assert x.grad is None


@every_norm
def test_a_permuted_batch_is_moved_alike(norm: str) -> None:
    model, (x, y), order = classifier(), batch(), torch.randperm(9, generator=seeded(2))
    signs, radii = torch.tensor([1, -1, 0] * 3), EPSILON[norm] * (0.5 + rand(9))
    arguments: Any = {"threat_model": threat(norm), "start_std": 0.0, "climbed": lambda _, z, y: cross_entropy(z, y)}
    moved = signed_pgd(model, x, y, signs, epsilon=radii, **arguments)
    permuted = signed_pgd(model, x[order], y[order], signs[order], epsilon=radii[order], **arguments)
    torch.testing.assert_close(permuted, moved[order], rtol=0, atol=1e-12)


def test_where_an_example_goes_does_not_depend_on_where_the_others_go() -> None:
    model, (x, y) = classifier(), batch()
    moved = [  # two steps in l2, so that the start is still to be seen in the result
        signed_pgd(
            model, x, y, torch.tensor([other] * 7 + [1, -1]), threat_model=threat("l2"), steps=2, step_size=0.02, start_std=0.01,
            generator=seeded(5),
        )[7:]
        for other in (1, 0, -1)
    ]  # fmt: skip
    for one in moved[1:]:
        torch.testing.assert_close(one, moved[0], rtol=0, atol=1e-12)


def test_bad_calls_of_the_attack_end_in_one_sentence() -> None:
    model, (x, y) = classifier(), batch(3)
    ones = torch.ones(3)

    def attack(signs: Any = ones, model: Any = model, x: Any = x, y: Any = y, **changes: Any) -> Tensor:
        return signed_pgd(model, x, y, signs, **{"threat_model": threat(), **changes})

    nan = float("nan")
    for signs in (torch.tensor([1, 2, 0]), torch.tensor([0.5, 1, 1]), torch.ones(2), [1, 1, 1], torch.tensor([1, nan, 0])):
        with pytest.raises(ValueError, match=r"^signs must be a tensor \[3\] of \+1"):
            attack(signs)
    for radii in (-ones, ones / 0, ones * float("nan"), torch.ones(2), 0.1, [0.1] * 3):
        with pytest.raises(ValueError, match=r"^epsilon must be a tensor \[3\] of finite radii"):
            attack(epsilon=radii)
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        attack(steps=0)
    with pytest.raises(ValueError, match="step_size must be a finite number > 0"):
        attack(step_size=0.0)
    with pytest.raises(ValueError, match="start_std must be a finite number >= 0"):
        attack(start_std=-1.0)
    with pytest.raises(ValueError, match="epsilon of the threat model .* must be a finite number > 0"):
        attack(threat_model=ThreatModel(epsilon=0.0), step_size=0.1)
    with pytest.raises(TypeError, match="threat_model must be a ThreatModel"):
        attack(threat_model="linf")
    with pytest.raises(ValueError, match=r"x must be in the box \[0, 1\]"):
        attack(x=x + 1)
    with pytest.raises(ValueError, match=r"y must be in \[0, 4\)"):
        attack(y=y + 3)
    with pytest.raises(ValueError, match=r"model must be a callable .* for 3 inputs"):
        attack(natural_logits=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="must depend differentiably on x"):
        attack(model=lambda v: torch.zeros(len(v), 4))


# Radii ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data(), norm=st.sampled_from(NORMS), size=st.integers(0, 5), seed=st.integers(0, 99), spread=st.floats(0.01, 5))
def test_projection_with_radii_is_one_projection_per_example(data: Any, norm: str, size: int, seed: int, spread: float) -> None:
    radii = data.draw(st.lists(st.floats(0, 1.5), min_size=size, max_size=size))
    x = 1.5 * rand(size, 2, 3, seed=seed) - 0.5
    v = x + spread * randn(size, 2, 3, seed=seed + 1)
    threat_model = ThreatModel(norm=norm, epsilon=0.1, lower=-0.5, upper=1.0)
    given_radii = torch.tensor(radii, dtype=torch.float64)
    found = threat_model.project(v, x, radius=given_radii)
    lowest, highest = threat_model.bounds(x, radius=given_radii)
    assert found.shape == x.shape
    for i, radius in enumerate(radii):
        alone = ThreatModel(norm=norm, epsilon=radius, lower=-0.5, upper=1.0)
        torch.testing.assert_close(found[i : i + 1], alone.project(v[i : i + 1], x[i : i + 1]), rtol=0, atol=1e-12)
        for bounds, expected in zip((lowest, highest), alone.bounds(x[i : i + 1]), strict=True):
            assert torch.equal(bounds[i : i + 1], expected)


@every_norm
@pytest.mark.parametrize("spread", [0.1, 0.6])
def test_projection_with_radii_has_the_derivative_of_central_differences(norm: str, spread: float) -> None:
    x, radii = rand(4, 5), EPSILON[norm] * torch.tensor([0.3, 1.0, 2.0, 3.0], dtype=torch.float64)
    v, cotangent = x + spread * randn(4, 5, seed=1), randn(4, 5, seed=2)
    threat_model = threat(norm)

    def value(v: Tensor, x: Tensor) -> Tensor:
        return (cotangent * threat_model.project(v, x, radius=radii)).sum()

    leaves = v.clone().requires_grad_(), x.clone().requires_grad_()
    gradients = torch.autograd.grad(value(*leaves), leaves)
    h = 1e-6
    for which, gradient in enumerate(gradients):
        for index in range(20):
            shift = torch.zeros(20, dtype=torch.float64).index_fill_(0, torch.tensor(index), h).reshape(4, 5)
            ahead, behind = ([v, x], [v, x])
            ahead[which], behind[which] = ahead[which] + shift, behind[which] - shift
            difference = (value(*ahead) - value(*behind)) / (2 * h)
            assert gradient.flatten()[index].item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-8)


@every_norm
def test_radii_are_constants_and_leave_the_dtype(norm: str) -> None:
    x = rand(3, 5).float()
    v = (x + 0.5).requires_grad_()
    radii = torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64, requires_grad=True)
    found = threat(norm).project(v, x, radius=radii)
    assert found.dtype == torch.float32
    assert torch.autograd.grad(found.sum(), [radii, v], allow_unused=True)[0] is None
    assert torch.equal(found[2], x[2])

"""Fixed class weightings: each against its formula, every objective inside, limits, and what a call leaves as it was."""

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from training_setting import network as small_network
from training_setting import sgd, train

from metarobust.attacks import FGSM, PGD, count_calls
from metarobust.divergences import KL
from metarobust.dro import worst_case_expectation
from metarobust.losses import cross_entropy
from metarobust.objectives import (
    ARMOR,
    MART,
    TRADES,
    UDR,
    AdversarialTraining,
    BETATraining,
    ClassWeighted,
    LogitAdjusted,
    SmoothedBETATraining,
)
from metarobust.threat_models import ThreatModel
from metarobust.transport_costs import SoftHinge
from metarobust.types import RobustLoss

LINF = ThreatModel(norm="linf", epsilon=0.1)
ATTACK = PGD(threat_model=LINF, steps=3)
PLAIN = AdversarialTraining(attack=ATTACK)
COST = SoftHinge(threat_model=LINF, weight=20.0)
PER_EXAMPLE: dict[str, Any] = {
    "adversarial_training": PLAIN,
    "dlr": AdversarialTraining(attack=FGSM(threat_model=LINF, loss="dlr"), loss="dlr"),
    "trades": TRADES(threat_model=LINF, steps=3),
    "trades_of_an_attack": TRADES(attack=ATTACK),
    "mart": MART(attack=ATTACK),
    "udr": UDR(threat_model=LINF, steps=3),
    "beta_training": BETATraining(threat_model=LINF, steps=3),
    "beta_training_unrolled": BETATraining(threat_model=LINF, steps=3, hypergradient="unrolled"),
    "beta_training_implicit": BETATraining(
        threat_model=ThreatModel(norm="l2", epsilon=0.3), steps=3, hypergradient="implicit", damping=1.0
    ),
    "smoothed_beta_training": SmoothedBETATraining(threat_model=LINF, mu=1.0, steps=3),
}
ARMORS: dict[str, Any] = {
    "armor": ARMOR(robust_loss=PLAIN, divergence=KL(), radius=0.1, natural_weight=0.3),
    "armor_of_beta": ARMOR(robust_loss=PER_EXAMPLE["beta_training"], divergence=KL(), radius=0.1),
    "armor_of_udr": ARMOR(robust_loss=PER_EXAMPLE["udr"], divergence=KL(), radius=0.1),
    "armor_with_a_cost": ARMOR(robust_loss=PLAIN, divergence=KL(), radius=0.1, transport_cost=COST, steps=4),
    "armor_of_one_class": ARMOR(robust_loss=PER_EXAMPLE["mart"], divergence=KL(), radius=0.1, robust_classes=(1,)),
}
every_objective = pytest.mark.parametrize("robust_loss", PER_EXAMPLE.values(), ids=PER_EXAMPLE)
with_armor = pytest.mark.parametrize("robust_loss", (PER_EXAMPLE | ARMORS).values(), ids=PER_EXAMPLE | ARMORS)

COUNTS = (600, 250, 100, 50)
WEIGHTS = (0.25, 1.0, 3.0, 2.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(size: int = 7, classes: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.rand(size, 6, generator=seeded(1), dtype=torch.float64) * 0.4 + 0.3
    return x.to(dtype), torch.arange(size) % classes


def network(*, normalised: bool = False, classes: int = 4) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(8)] if normalised else []
        return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, classes)).double()


def offsets(temperature: float = 1.0) -> Tensor:
    return temperature * (torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)).log()


def with_moved_bias(model: Any, temperature: float = 1.0) -> Any:
    """The adjusted model as an ordinary network: the offsets stand in its last bias."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[-1].bias += offsets(temperature)
    return moved


def mean(found: Any) -> Tensor:
    return found.mean() if isinstance(found, Tensor) else found.loss


def gradients(found: Any, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(mean(found), list(model.parameters())))


def assert_close(these: Any, those: Any, tolerance: float = 1e-9) -> None:
    for one, other in zip(these, those, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def central_differences(function: Any, parameters: list[Tensor], step: float = 1e-6) -> list[Tensor]:
    found = []
    for parameter in parameters:
        gradient, entries = torch.zeros_like(parameter).view(-1), parameter.data.view(-1)
        for i in range(len(entries)):
            kept, values = entries[i].item(), []
            for value in (kept + step, kept - step):
                entries[i] = value
                values.append(function().item())
            entries[i] = kept
            gradient[i] = (values[0] - values[1]) / (2 * step)
        found.append(gradient.view_as(parameter))
    return found


# Class weights --------------------------------------------------------------------------------------------------------


def test_class_weighted_adversarial_training_is_its_formula() -> None:
    model, (x, y) = network(), batch()
    x_adv = ATTACK(model, x, y, generator=seeded())
    expected = [WEIGHTS[c] * -model(x_adv)[i].log_softmax(0)[c] for i, c in enumerate(y.tolist())]
    losses = ClassWeighted(robust_loss=PLAIN, class_weights=WEIGHTS)(model, x, y, generator=seeded())
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=0)


@every_objective
def test_weights_multiply_the_losses_and_weights_1_leave_their_bits(robust_loss: RobustLoss) -> None:
    model, (x, y) = network(normalised=True), batch()
    found, alone = [], []
    for objective, into in ((robust_loss, alone), (ClassWeighted(robust_loss=robust_loss, class_weights=(1.0,) * 4), found)):
        own = copy.deepcopy(model)
        losses = objective(own, x, y, generator=seeded())
        into += [losses.detach(), *gradients(losses, own), *own.buffers()]
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    losses = ClassWeighted(robust_loss=robust_loss, class_weights=list(WEIGHTS))(model, x, y, generator=seeded())
    assert torch.equal(losses, alone[0] * torch.tensor(WEIGHTS, dtype=torch.float64)[y])
    assert isinstance(ClassWeighted(robust_loss=robust_loss, class_weights=WEIGHTS), RobustLoss)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_balanced_weights_give_every_class_the_same_share(counts: list[int]) -> None:
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    weights = ClassWeighted.balanced(robust_loss=PLAIN, class_counts=y.bincount().tolist()).class_weights
    assert sum(weights[c] for c in y.tolist()) == pytest.approx(len(y))
    for weight, count in zip(weights, counts, strict=True):
        assert weight * count == pytest.approx(len(y) / len(counts))
    assert weights == pytest.approx(compute_class_weight("balanced", classes=np.arange(len(counts)), y=y.numpy()))


def test_the_balanced_mean_is_the_mean_of_the_class_means() -> None:
    model, (x, y) = network(), batch(size=11)
    objective = ClassWeighted.balanced(robust_loss=PLAIN, class_counts=y.bincount().tolist())
    losses = PLAIN(model, x, y, generator=seeded())
    expected = torch.stack([losses[y == c].mean() for c in range(4)]).mean()
    torch.testing.assert_close(objective(model, x, y, generator=seeded()).mean(), expected, rtol=1e-12, atol=0)


def test_class_weights_inside_armor() -> None:
    model, (x, y) = network(), batch()
    weighted = ClassWeighted(robust_loss=PLAIN, class_weights=WEIGHTS)
    for radius in (0.0, 0.2):
        found = ARMOR(robust_loss=weighted, divergence=KL(), radius=radius)(model, x, y, generator=seeded())
        losses = weighted(model, x, y, generator=seeded())
        expected = worst_case_expectation(losses, divergence=KL(), radius=radius).value
        torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
        assert_close(gradients(found, model), gradients(expected, model))
    with pytest.raises(TypeError, match="got ClassWeighted; leave transport_cost out"):
        ARMOR(robust_loss=weighted, divergence=KL(), radius=0.1, transport_cost=COST)
    message = "robust_loss must be one that returns a loss per example, [7], got ARMORLoss; for ARMOR write ARMOR(robust_loss="
    with pytest.raises(TypeError, match=re.escape(message)):
        ClassWeighted(robust_loss=ARMORS["armor"], class_weights=WEIGHTS)(model, x, y)


# Adjusted logits: values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logit_adjusted_adversarial_training_is_the_published_loss_at_the_attacked_point(temperature: float) -> None:
    model, (x, y) = network(), batch()
    objective = LogitAdjusted(robust_loss=PLAIN, class_counts=COUNTS, temperature=temperature)
    x_adv = ATTACK(lambda v: model(v) + offsets(temperature), x, y, generator=seeded())
    ratios = torch.tensor([[(there / here) ** temperature for there in COUNTS] for here in COUNTS], dtype=torch.float64)
    f = model(x_adv)
    expected = (ratios[y] * (f - f.gather(1, y[:, None])).exp()).sum(1).log()
    torch.testing.assert_close(objective(model, x, y, generator=seeded()), expected, rtol=1e-12, atol=0)


@with_armor
@pytest.mark.parametrize("training", [True, False])
def test_adjusted_logits_are_those_of_the_model_with_another_bias(robust_loss: Any, training: bool) -> None:
    """In value, gradients, and BatchNorm statistics after the call, in both modes."""
    (x, y), model = batch(), network(normalised=True).train(training)
    moved = with_moved_bias(model, 1.5)
    objective = LogitAdjusted(robust_loss=robust_loss, class_counts=COUNTS, temperature=1.5)
    found, expected = objective(model, x, y, generator=seeded()), robust_loss(moved, x, y, generator=seeded())
    torch.testing.assert_close(mean(found), mean(expected), rtol=1e-9, atol=1e-9)
    assert_close(gradients(found, model), gradients(expected, moved), 1e-7)
    assert_close(model.buffers(), moved.buffers())
    assert all(m.training == training for m in model.modules())
    fresh = network(normalised=True)
    assert training != torch.equal(model[1].running_mean, fresh[1].running_mean)
    assert (mean(found) - mean(robust_loss(fresh.train(training), x, y, generator=seeded()))).abs() > 1e-3


@with_armor
def test_temperature_0_leaves_the_bits_and_equal_counts_change_rounding_only(robust_loss: Any) -> None:
    results = {}
    for name, objective in {
        "alone": robust_loss,
        "cold": LogitAdjusted(robust_loss=robust_loss, class_counts=COUNTS, temperature=0.0),
        "equal": LogitAdjusted(robust_loss=robust_loss, class_counts=(5, 5, 5, 5), temperature=3.0),
    }.items():
        model, (x, y) = network(normalised=True), batch()
        found = objective(model, x, y, generator=seeded())
        results[name] = [mean(found).detach(), *gradients(found, model), *model.buffers()]
    assert all(torch.equal(one, other) for one, other in zip(results["cold"], results["alone"], strict=True))
    assert_close(results["equal"], results["alone"], 1e-7)


def test_unadjusted_logits_learn_the_balanced_posterior() -> None:
    """A model whose logits ignore x: the mean loss is least where they are equal, without the adjustment at the frequencies."""
    y, x = torch.arange(4).repeat_interleave(torch.tensor([12, 5, 2, 1])), torch.zeros(20, 6).double()
    nothing = AdversarialTraining(attack=lambda model, x, y, generator=None: x)
    adjusted = LogitAdjusted(robust_loss=nothing, class_counts=y.bincount().tolist())
    frequencies = (y.bincount().double() / 20).log()
    for robust_loss, best in ((adjusted, torch.zeros(4).double()), (nothing, frequencies)):
        logits = best.clone().requires_grad_()
        losses = robust_loss(lambda v, logits=logits: logits.expand(len(v), 4), x, y)
        (gradient,) = torch.autograd.grad(losses.mean(), logits)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_adjusted_logits_inside_armor_leave_the_natural_loss_as_it_is() -> None:
    model, (x, y) = network(), batch()
    inside = LogitAdjusted(robust_loss=PLAIN, class_counts=COUNTS)
    found = ARMOR(robust_loss=inside, divergence=KL(), radius=0.1, natural_weight=0.3)(model, x, y, generator=seeded())
    robust = ARMOR(robust_loss=PLAIN, divergence=KL(), radius=0.1)(with_moved_bias(model), x, y, generator=seeded())
    expected = 0.3 * cross_entropy(model(x), y).mean() + 0.7 * robust.loss
    torch.testing.assert_close(found.loss, expected, rtol=1e-9, atol=0)
    with pytest.raises(TypeError, match="got LogitAdjusted; leave transport_cost out"):
        ARMOR(robust_loss=inside, divergence=KL(), radius=0.1, transport_cost=COST)


def test_class_weights_and_adjusted_logits_together() -> None:
    model, (x, y) = network(), batch()
    adjusted = LogitAdjusted(robust_loss=PLAIN, class_counts=COUNTS)
    expected = PLAIN(with_moved_bias(model), x, y, generator=seeded()) * torch.tensor(WEIGHTS)[y]
    weighted = ClassWeighted(robust_loss=PLAIN, class_weights=WEIGHTS)
    for both in (
        ClassWeighted(robust_loss=adjusted, class_weights=WEIGHTS),
        LogitAdjusted(robust_loss=weighted, class_counts=COUNTS),
    ):
        torch.testing.assert_close(both(model, x, y, generator=seeded()), expected, rtol=1e-9, atol=0)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda inner: ClassWeighted(robust_loss=inner, class_weights=WEIGHTS),
        lambda inner: LogitAdjusted(robust_loss=inner, class_counts=COUNTS, temperature=1.5),
    ],
    ids=["class_weighted", "logit_adjusted"],
)
@pytest.mark.parametrize("kind", [AdversarialTraining, TRADES, MART])
def test_gradients_are_central_differences_with_the_attacked_point_held(build: Any, kind: Any) -> None:
    model, (x, y) = network(), batch()
    x_adv = ATTACK(model, x, y, generator=seeded())
    objective = build(kind(attack=lambda model, x, y, generator=None: x_adv))
    shares = torch.linspace(0.5, 2.0, len(x), dtype=torch.float64)
    found = torch.autograd.grad(shares @ objective(model, x, y), list(model.parameters()))
    with torch.no_grad():
        expected = central_differences(lambda: shares @ objective(model, x, y), list(model.parameters()))
    for gradient, difference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-8)


# What a call leaves as it was -----------------------------------------------------------------------------------------


class Spy:
    """An attack that notes what it was given, and what the inner model's buffers and modes are before and after."""

    def __init__(self, model: nn.Module | None) -> None:
        self.model, self.given, self.states = model, [], []

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        self.note()
        self.given.append((isinstance(model, nn.Module), model(x).detach()))
        if self.model is not None:
            self.model.load_state_dict(self.states[0][0])  # after this pass, which no attack has taken back
        x_adv = ATTACK(model, x, y, generator=generator)
        if isinstance(model, nn.Module):
            self.given[-1] += (model.training, [m.training for m in model.modules()])
        self.note()
        return x_adv

    def note(self) -> None:
        if self.model is not None:
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.states.append((state, [m.training for m in self.model.modules()]))


@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen_statistics"])
def test_the_attack_sees_a_module_with_adjusted_logits_and_leaves_buffers_and_mode(mode: str) -> None:
    model, (x, y) = network(normalised=True).train(mode != "evaluation"), batch()
    if mode == "frozen_statistics":
        model[1].eval()
    modes, plain = [m.training for m in model.modules()], copy.deepcopy(model)(x)
    spy = Spy(model)
    LogitAdjusted(robust_loss=AdversarialTraining(attack=spy), class_counts=COUNTS)(model, x, y, generator=seeded())
    ((is_module, seen, training, inside),) = spy.given
    assert is_module
    assert training == modes[0]
    assert inside == [training, *modes]
    torch.testing.assert_close(seen, plain + offsets(), rtol=1e-12, atol=0)
    (before, modes_before), (after, modes_after) = spy.states
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert modes == modes_before == modes_after == [m.training for m in model.modules()]
    assert int(model[1].num_batches_tracked) == (1 if mode == "training" else 0)


def test_a_model_that_is_no_module_stays_none() -> None:
    model, (x, y) = network(), batch()
    spy = Spy(None)
    objective = LogitAdjusted(robust_loss=AdversarialTraining(attack=spy), class_counts=COUNTS)
    losses = objective(lambda v: model(v), x, y, generator=seeded())
    assert not spy.given[0][0]
    assert torch.equal(losses, objective(model, x, y, generator=seeded()))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ClassWeighted(robust_loss=PLAIN, class_weights=WEIGHTS),
        lambda: LogitAdjusted(robust_loss=PLAIN, class_counts=COUNTS),
    ],
    ids=["class_weighted", "logit_adjusted"],
)
def test_calls_leave_no_trace_and_obey_the_protocol(build: Any) -> None:
    model, (x, y) = network(), batch()
    objective, before = build(), torch.get_rng_state()
    with count_calls() as counter:
        losses = objective(model, x, y, generator=seeded())
    assert (counter.calls, counter.examples) == (1, 7)
    assert isinstance(objective, RobustLoss)
    assert (losses.shape, losses.dtype, losses.requires_grad) == ((7,), torch.float64, True)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert list(model._modules) == ["0", "1", "2"]
    assert objective(model, x[:0], y[:0], generator=seeded()).shape == (0,)
    assert copy.deepcopy(objective) == objective
    for silence in (torch.no_grad, torch.inference_mode):
        with silence():
            assert torch.equal(objective(model, x.clone(), y.clone(), generator=seeded()), losses)


def test_half_precision_logits_are_adjusted_in_float32() -> None:
    """log(1 / 1001) has 2 decimal digits in bfloat16; the logits of the model are 0, so the loss is the offset."""
    nothing = AdversarialTraining(attack=lambda model, x, y, generator=None: x)
    objective = LogitAdjusted(robust_loss=nothing, class_counts=(1000, 1))
    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    for pixels in (x, x.float()):
        losses = objective(lambda v: 0 * v.bfloat16(), pixels, torch.tensor([1]))
        assert losses.dtype == torch.float32
        assert losses.item() == pytest.approx(math.log(1001), rel=1e-6)
    half = ClassWeighted(robust_loss=nothing, class_weights=(1.0, 2.0))(lambda v: 0 * v, x, torch.tensor([1]))
    assert half.dtype == torch.bfloat16


# In training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "other"),
    [
        (lambda w: ClassWeighted(robust_loss=PLAIN, class_weights=(1.0, 2.0, w)), "3.0"),
        (lambda w: ClassWeighted(robust_loss=AdversarialTraining(attack=FGSM(threat_model=LINF)), class_weights=(1, 2, w)), "3"),
        (lambda w: LogitAdjusted(robust_loss=PLAIN, class_counts=(20, 5, int(w))), "3"),
        (lambda w: LogitAdjusted(robust_loss=PLAIN, class_counts=(20, 5, 1), temperature=w), "3.0"),
        (lambda w: LogitAdjusted(robust_loss=ARMORS["armor"], class_counts=(20, 5, 1), temperature=w), "3.0"),
        (lambda w: ARMOR(robust_loss=LogitAdjusted(robust_loss=PLAIN, class_counts=(9, 5, int(w))), divergence=KL(), radius=0.1),
         "3"),
    ],
)  # fmt: skip
def test_fit_trains_on_it_and_its_checkpoint_knows_every_setting(build: Any, other: str, tmp_path: Any) -> None:
    model = small_network(full=True)
    before = copy.deepcopy(model.state_dict())
    result = train(model, build(2.0), epochs=2, checkpoint=tmp_path / "run.safetensors")
    assert len(result.history) == 2
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(before["1.running_mean"], model.state_dict()["1.running_mean"])
    again = small_network(full=True)
    train(again, build(2.0), epochs=2, checkpoint=tmp_path / "run.safetensors")
    assert all(torch.equal(one, two) for one, two in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="of this same") as caught:
        train(small_network(full=True), build(3.0), epochs=2, checkpoint=tmp_path / "run.safetensors")
    assert other in str(caught.value)


def test_reprs_hold_all_settings() -> None:
    robust_loss = AdversarialTraining(attack=FGSM(threat_model=LINF))
    weighted = ClassWeighted(robust_loss=robust_loss, class_weights=[1, 2.5])
    assert repr(weighted) == f"ClassWeighted(robust_loss={robust_loss!r}, class_weights=(1, 2.5))"
    adjusted = LogitAdjusted(robust_loss=robust_loss, class_counts=[3, 4])
    assert repr(adjusted) == f"LogitAdjusted(robust_loss={robust_loss!r}, class_counts=(3, 4), temperature=1.0)"


@pytest.mark.parametrize("balance", [None, "weights", "logits"])
def test_a_rare_class_gains_by_either(balance: str | None) -> None:
    """Two overlapping classes, 90 to 10: alone the loss gives the rare one up, balanced it does not."""
    y = (torch.arange(200) % 10 == 0).long()
    x = (0.45 + 0.1 * y[:, None] + 0.15 * torch.randn(200, 5, generator=seeded(3))).clamp(0, 1)
    plain = AdversarialTraining(attack=FGSM(threat_model=ThreatModel(norm="linf", epsilon=0.02)))
    of_the_data = {"robust_loss": plain, "class_counts": y.bincount().tolist()}
    objective = {None: plain, "weights": ClassWeighted.balanced(**of_the_data), "logits": LogitAdjusted(**of_the_data)}[balance]
    model = nn.Linear(5, 2)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    train(model, objective, (x, y), epochs=30, batch_size=100, optimizer=sgd(model, 1.0))
    recall = (model(x).argmax(1) == y)[y == 1].double().mean().item()
    assert recall < 0.2 if balance is None else recall > 0.6


# Settings -------------------------------------------------------------------------------------------------------------


def weighted(robust_loss: Any = PLAIN, class_weights: Any = WEIGHTS) -> Any:
    return ClassWeighted(robust_loss=robust_loss, class_weights=class_weights)


def adjusted(robust_loss: Any = PLAIN, class_counts: Any = COUNTS, **more: Any) -> Any:
    return LogitAdjusted(robust_loss=robust_loss, class_counts=class_counts, **more)


def balanced(class_counts: Any) -> Any:
    return ClassWeighted.balanced(robust_loss=PLAIN, class_counts=class_counts)


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: weighted(MART), TypeError, "write MART(...)"),
        (lambda: weighted(class_weights=()), ValueError,
         "class_weights must be a tuple with a number for each class, got none; write (1.0, 2.0)"),
        (lambda: weighted(class_weights=torch.ones(2)), TypeError,
         "class_weights must be a tuple with a number for each class, got torch.float32; write (1.0, 2.0)"),
        (lambda: weighted(class_weights=(1.0, 0.0)), ValueError,
         "class_weights[1] must be a finite number > 0, got 0.0"),
        (lambda: weighted(class_weights=(-1.0, 2.0)), ValueError,
         "class_weights[0] must be a finite number > 0, got -1.0"),
        (lambda: weighted(class_weights=(1.0, math.nan)), ValueError,
         "class_weights[1] must be a finite number > 0, got nan"),
        (lambda: weighted(class_weights=("1", 2.0)), TypeError,
         "class_weights[0] must be a finite number > 0, got '1'"),
        (lambda: balanced((3, 0)), ValueError,
         "class_counts[1] must be an integer >= 1, got 0"),
        (lambda: balanced(torch.tensor([0, 1, 1])), TypeError,
         "class_counts must be a tuple with a number for each class, got torch.int64; write y.bincount().tolist()"),
        (lambda: adjusted("trades"), TypeError, "robust_loss must be a robust loss, got"),
        (lambda: adjusted(class_counts=(3, 2, 0)), ValueError,
         "class_counts[2] must be an integer >= 1, got 0"),
        (lambda: adjusted(class_counts=(0.9, 0.1)), TypeError,
         "class_counts[0] must be an integer >= 1, got 0.9"),
        (lambda: adjusted(temperature=-1.0), ValueError,
         "temperature must be a finite number >= 0, got -1.0"),
    ],
)  # fmt: skip
def test_bad_settings_end_in_one_sentence(build: Any, error: Any, sentence: str) -> None:
    with pytest.raises(error, match=re.escape(sentence) + "$" if sentence.startswith("class") else re.escape(sentence)):
        build()


def test_bad_calls_end_in_one_sentence() -> None:
    model, (x, y) = network(), batch()
    short = weighted(class_weights=WEIGHTS[:3])
    with pytest.raises(ValueError, match=r"^class_weights must be one for every label, got 3 for labels 0 to 3$"):
        short(model, x, y)
    with pytest.raises(ValueError, match=r"^class_weights must be one for every label, got 3 for labels -1 to 2$"):
        weighted(lambda model, x, y, generator=None: x[:, 0], WEIGHTS[:3])(model, x, y - 1)
    sentence = "class_counts must be one for each of the 4 classes that the model has logits for, got {}"
    for counts in (COUNTS[:3], (*COUNTS, 1), (1,)):
        with pytest.raises(ValueError, match="^" + sentence.format(len(counts)) + "$"):
            adjusted(class_counts=counts)(model, x, y)
    with pytest.raises(TypeError, match=r"model must be a callable from inputs .*, got None"):
        adjusted()(None, x, y)
    with pytest.raises(ValueError, match=r"model must be a callable .*, got tuple for 7 inputs; wrap it"):
        adjusted()(lambda v: (v, v), x, y)
    for objective in (weighted(), adjusted()):
        with pytest.raises(ValueError, match=r"y must be in \[0, 4\)"):
            objective(model, x, y + 4)
        with pytest.raises(ValueError, match=r"x must be in the box \[0, 1\]"):
            objective(model, x + 1, y)
    mean_loss = weighted(lambda model, x, y, generator=None: F.cross_entropy(model(x), y))
    with pytest.raises(TypeError, match=r"robust_loss must be one that returns a loss per example, \[7\], got shape \[\]"):
        mean_loss(model, x, y)

"""Attacks: every contract of an attack as a test over the rows of one table. A new attack is one row of `TABLE`."""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torchopt
from torch import nn

from metarobust import losses
from metarobust.attacks import (
    APGD,
    BETA,
    FGSM,
    PGD,
    Alternating,
    RandomRoundingFGSM,
    Square,
    TransportAscent,
    Unrolled,
    WorstCase,
    count_calls,
)
from metarobust.losses import cross_entropy, margin
from metarobust.objectives import AdversarialTraining
from metarobust.threat_models import ThreatModel
from metarobust.transport_costs import HardBall, SoftHinge
from metarobust.types import Attack


def halved_cross_entropy(logits, y):
    return cross_entropy(logits, y) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One attack, made by calling ``attack`` with a threat model, and the properties that the tests may ask of it."""

    name: str
    attack: Callable[..., Attack]
    norm: str = "linf"
    epsilon: float = 0.1
    deterministic: bool = True
    raises_loss: bool = True
    needs_gradient: bool = True
    nested: bool = False  # calls other attacks, which count themselves too
    stops: bool = False  # leaves examples alone that are misclassified
    least_classes: int = 2
    keeps_graph: bool = False  # the result carries its graph unless gradients are off
    loss: Callable = cross_entropy

    def threat_model(self, **changes):
        return ThreatModel(**{"norm": self.norm, "epsilon": self.epsilon, **changes})

    def build(self, **changes):
        return self.attack(threat_model=self.threat_model(**changes))


def fgsm_then_beta(threat_model):
    return WorstCase([FGSM(threat_model=threat_model), BETA(threat_model=threat_model, steps=5)])


def ball_ascent(threat_model, **settings):
    return TransportAscent(transport_cost=HardBall(threat_model=threat_model), steps=5, **settings)


def hinge_ascent(threat_model):
    """At an infinite scale the soft edge of the ball is hard."""
    hinge = SoftHinge(threat_model=threat_model, weight=1.0)
    return TransportAscent(transport_cost=hinge, scale=float("inf"), steps=5, step_size=0.05)


alternating = partial(Alternating, steps=5, queries=20, rounds=2, closest=1.0)
unrolled = partial(Unrolled, update_rule=torchopt.sgd(1.0), steps=5)
STARTS_FIXED = {"random_start": False, "steps": 5}
AGAINST = {"direction": "anti_adversary"}
RANDOM = {"deterministic": False}
HELPS = {"raises_loss": False}

TABLE = [
    Row(name="fgsm_linf", attack=FGSM),
    Row(name="fgsm_l2", attack=FGSM, norm="l2", epsilon=0.5),
    Row(name="fgsm_l1", attack=FGSM, norm="l1", epsilon=1.0),
    Row(name="fgsm_margin", attack=partial(FGSM, loss="margin"), loss=margin),
    Row(name="fgsm_anti_adversary", attack=partial(FGSM, **AGAINST), **HELPS),
    Row(name="pgd_linf", attack=partial(PGD, steps=5), **RANDOM),
    Row(name="pgd_l2", attack=partial(PGD, steps=5), norm="l2", epsilon=0.5, **RANDOM),
    Row(name="pgd_l1", attack=partial(PGD, steps=5), norm="l1", epsilon=1.0, **RANDOM),
    Row(name="pgd_linf_from_x", attack=partial(PGD, **STARTS_FIXED)),
    Row(name="pgd_l2_from_x", attack=partial(PGD, **STARTS_FIXED), norm="l2", epsilon=0.5),
    Row(name="pgd_l1_from_x", attack=partial(PGD, **STARTS_FIXED), norm="l1", epsilon=1.0),
    Row(name="pgd_step_size", attack=partial(PGD, **STARTS_FIXED, step_size=0.03)),
    Row(name="pgd_restarts", attack=partial(PGD, steps=5, restarts=3), **RANDOM),
    Row(name="pgd_restarts_l1", attack=partial(PGD, steps=5, restarts=3), norm="l1", epsilon=1.0, **RANDOM),
    Row(name="pgd_margin", attack=partial(PGD, steps=5, loss="margin"), loss=margin, **RANDOM),
    Row(name="pgd_own_loss", attack=partial(PGD, **STARTS_FIXED, loss=halved_cross_entropy), loss=halved_cross_entropy),
    Row(name="pgd_anti_adversary", attack=partial(PGD, steps=5, **AGAINST), **RANDOM, **HELPS),
    Row(name="pgd_anti_adversary_l2", attack=partial(PGD, **STARTS_FIXED, **AGAINST), norm="l2", epsilon=0.5, **HELPS),
    Row(
        name="pgd_anti_adversary_restarts_l1",
        attack=partial(PGD, steps=5, restarts=3, **AGAINST),
        norm="l1",
        epsilon=1.0,
        **RANDOM,
        **HELPS,
    ),
    Row(name="apgd_linf", attack=partial(APGD, steps=10), **RANDOM),
    Row(name="apgd_l2", attack=partial(APGD, steps=10), norm="l2", epsilon=0.5, **RANDOM),
    Row(name="apgd_l1", attack=partial(APGD, steps=10), norm="l1", epsilon=1.0, **RANDOM),
    Row(name="apgd_from_x", attack=partial(APGD, steps=10, random_start=False)),
    Row(name="apgd_dlr", attack=partial(APGD, steps=10, loss="dlr"), loss=margin, least_classes=3, **RANDOM),
    Row(name="apgd_margin_targets", attack=partial(APGD, steps=10, loss="margin", targets=2), loss=margin, **RANDOM),
    Row(name="apgd_survivors", attack=partial(APGD, steps=10, survivors_only=True), stops=True, **RANDOM),
    Row(name="beta_linf", attack=partial(BETA, steps=10), loss=margin, **RANDOM),
    Row(name="beta_l2", attack=partial(BETA, steps=10), norm="l2", epsilon=0.5, loss=margin, **RANDOM),
    Row(name="beta_l1", attack=partial(BETA, steps=10), norm="l1", epsilon=1.0, loss=margin, **RANDOM),
    Row(name="beta_from_x", attack=partial(BETA, steps=10, random_start=False), loss=margin),
    Row(name="beta_sign_l2", attack=partial(BETA, steps=10, step_rule="sign"), norm="l2", epsilon=0.5, loss=margin, **RANDOM),
    Row(name="beta_sign_linf", attack=partial(BETA, steps=10, step_rule="sign"), loss=margin, **RANDOM),
    Row(name="beta_apgd_linf", attack=partial(BETA, steps=10, step_rule="apgd", restarts=2), loss=margin, **RANDOM),
    Row(name="beta_apgd_l1", attack=partial(BETA, steps=10, step_rule="apgd"), norm="l1", epsilon=1.0, loss=margin, **RANDOM),
    Row(name="beta_top_logits", attack=partial(BETA, steps=10, targets="top_logits", target_count=1), loss=margin, **RANDOM),
    Row(name="beta_nearest", attack=partial(BETA, steps=10, targets="nearest", target_count=1), loss=margin, **RANDOM),
    Row(name="beta_halving", attack=partial(BETA, steps=10, targets="halving", restarts=2), loss=margin, **RANDOM),
    Row(name="beta_averaged", attack=partial(BETA, steps=10, eot_samples=3), loss=margin, **RANDOM),
    Row(name="beta_survivors", attack=partial(BETA, steps=10, survivors_only=True), stops=True, loss=margin, **RANDOM),
    Row(name="square_linf", attack=partial(Square, queries=50), loss=margin, needs_gradient=False, stops=True, **RANDOM),
    Row(
        name="square_l2",
        attack=partial(Square, queries=50),
        norm="l2",
        epsilon=0.5,
        loss=margin,
        needs_gradient=False,
        stops=True,
        **RANDOM,
    ),
    Row(name="alternating", attack=alternating, loss=margin, nested=True, stops=True, **RANDOM),
    Row(name="alternating_l1", attack=alternating, norm="l1", epsilon=0.1, loss=margin, nested=True, stops=True, **RANDOM),
    Row(name="unrolled_linf", attack=unrolled, keeps_graph=True),
    Row(name="unrolled_l2", attack=unrolled, norm="l2", epsilon=0.5, keeps_graph=True),
    Row(name="unrolled_l1", attack=partial(unrolled, random_start=True), norm="l1", epsilon=1.0, keeps_graph=True, **RANDOM),
    Row(name="transport_ball_linf", attack=ball_ascent),
    Row(name="transport_ball_l2", attack=partial(ball_ascent, loss="margin"), norm="l2", epsilon=0.5, loss=margin),
    Row(name="transport_ball_l1", attack=partial(ball_ascent, random_start=True), norm="l1", epsilon=1.0, **RANDOM),
    Row(name="transport_hinge", attack=hinge_ascent),
    Row(name="worst_case", attack=fgsm_then_beta, loss=margin, nested=True, stops=True, **RANDOM),
]

CLASSES, SHAPE, BATCH = 3, (1, 4, 4), 6
every_attack = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
deterministic_attacks = pytest.mark.parametrize("row", [r for r in TABLE if r.deterministic], ids=lambda row: row.name)
gradient_attacks = pytest.mark.parametrize("row", [r for r in TABLE if r.needs_gradient], ids=lambda row: row.name)
devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))],
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(size=BATCH, dtype=torch.float64):
    """Inputs in the box, the first two rows at its corners, and labels."""
    x = torch.rand(size, *SHAPE, generator=seeded(1), dtype=torch.float64).to(dtype)
    x[:1], x[1:2] = 0, 1
    return x, torch.arange(size) % CLASSES


def labels_that_stand(row, model, x, y):
    """The labels, or the model's own predictions for an attack that leaves misclassified examples alone."""
    return model(x).argmax(1) if row.stops else y


def graph_off(row):
    return torch.no_grad() if row.keeps_graph else nullcontext()


def network(*layers, dtype=torch.float64):
    """A small classifier with parameters from a fixed seed; ``layers`` come after the first linear one."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *layers, nn.Tanh(), nn.Linear(8, CLASSES)).to(dtype)
    generator = seeded(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def linear(classes):
    """Logits (0, w x, and far below them constants): the losses are monotone in w x, so their extremes over a ball are known."""
    w = torch.randn(16, generator=seeded(4), dtype=torch.float64)

    def model(x):
        score = x.flatten(1) @ w
        return torch.stack([torch.zeros_like(score), score, *[score.detach() * 0 - 20] * (classes - 2)], 1)

    return model, w


def two_class_linear():
    return linear(2)


# The contract of every row -------------------------------------------------------------------------------------------


@every_attack
def test_an_attack_is_a_frozen_value_that_fits_the_protocol(row):
    attack = row.build()
    assert isinstance(attack, Attack)
    assert attack == row.build()
    assert repr(row.threat_model()) in repr(attack)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.threat_model = None


@every_attack
@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_lies_in_ball_and_box_with_shape_dtype_and_device_kept(row, dtype, device):
    x, y = (tensor.to(device) for tensor in batch(dtype=dtype))
    x_adv = row.build()(network(dtype=dtype).to(device), x, y, generator=seeded())
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert x_adv.device == x.device
    assert row.threat_model().contains(x_adv, x, tolerance=1e-6).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, x)


@every_attack
def test_a_box_other_than_the_unit_interval_is_respected(row):
    x, y = batch()
    x_adv = row.build(lower=-1.0, upper=3.0)(network(), 4 * x - 1, y, generator=seeded())
    assert row.threat_model(lower=-1.0, upper=3.0).contains(x_adv, 4 * x - 1, tolerance=1e-9).all()
    assert x_adv.min() < 0
    assert x_adv.max() > 1


@every_attack
def test_the_result_is_detached_and_shares_no_memory_with_the_input(row):
    x, y = batch()
    for epsilon in (row.epsilon, 0):
        with graph_off(row):
            x_adv = row.build(epsilon=epsilon)(network(), x.requires_grad_(), y, generator=seeded())
        assert not x_adv.requires_grad
        assert x_adv.grad_fn is None
        assert x_adv.data_ptr() != x.data_ptr()


@every_attack
def test_inputs_gradients_mode_and_buffers_stay_untouched(row):
    """The model is in training mode with batch statistics, frozen parts and gradients that wait for an optimizer."""
    model = network(nn.BatchNorm1d(8, dtype=torch.float64), nn.Sequential(nn.Identity(), nn.Dropout(0.0)))
    model[3].eval()
    model[1].bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0) if parameter.requires_grad else None
    x, y = batch()
    x.requires_grad_()
    y = labels_that_stand(row, copy.deepcopy(model), x, y)
    x_before, y_before = x.detach().clone(), y.clone()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [parameter.grad for parameter in model.parameters()]

    row.build()(model, x, y, generator=seeded())

    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert x.grad is None
    assert x.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or (gradient == 7.0).all()


@every_attack
def test_buffers_come_back_even_when_the_model_fails(row):
    class Fails(nn.BatchNorm1d):
        def forward(self, x):
            super().forward(x)
            raise ArithmeticError("broken model")

    model = network(Fails(8, dtype=torch.float64))
    x, y = batch()
    with pytest.raises(ArithmeticError, match="broken model"):
        row.build()(model, x, y, generator=seeded())
    assert model[2].num_batches_tracked == 0
    assert (model[2].running_mean == 0).all()


@every_attack
def test_global_randomness_stays_untouched(row):
    attack, model, (x, y) = row.build(), network(), batch()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    attack(model, x, y, generator=seeded())
    if row.deterministic:
        attack(model, x, y)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


@every_attack
def test_the_same_generator_gives_the_same_bits_and_another_gives_others(row):
    attack, model, (x, y) = row.build(), network(), batch()
    y = labels_that_stand(row, model, x, y)
    first = attack(model, x, y, generator=seeded(5))
    assert torch.equal(attack(model, x, y, generator=seeded(5)), first)
    middle = slice(2, None)  # rows at the corners of the box may be pinned to it
    assert torch.equal(attack(model, x, y, generator=seeded(6))[middle], first[middle]) == row.deterministic


@every_attack
def test_radius_zero_returns_the_input(row):
    x, y = batch()
    assert torch.equal(row.build(epsilon=0)(network(), x, y, generator=seeded()), x)


@every_attack
@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_none_and_of_one(row, size):
    x, y = batch(size)
    x_adv = row.build()(network(), x, y, generator=seeded())
    assert x_adv.shape == x.shape
    assert row.threat_model().contains(x_adv, x, tolerance=1e-6).all()


@deterministic_attacks
def test_permuting_the_batch_permutes_the_result(row):
    attack, model, (x, y) = row.build(), network(), batch()
    order = torch.randperm(BATCH, generator=seeded(7))
    torch.testing.assert_close(attack(model, x[order], y[order]), attack(model, x, y)[order], rtol=0, atol=1e-12)


@every_attack
def test_the_loss_moves_the_right_way_on_a_linear_model(row):
    model, _ = linear(row.least_classes)
    x, _ = batch()
    y = labels_that_stand(row, model, x, torch.arange(BATCH) % 2)
    x_adv = row.build()(model, x, y, generator=seeded())
    rise = row.loss(model(x_adv), y) - row.loss(model(x), y)
    gained = rise if row.raises_loss else -rise
    assert (gained >= -1e-12).all()
    assert (gained[2:] > 1e-4).all()


@every_attack
def test_a_functional_call_closure_gives_the_result_of_its_module(row):
    """The parameters are results of a computation, as in an unrolled training step."""
    attack, model, (x, y) = row.build(), network(), batch()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    parameters = {name: parameter * scale for name, parameter in model.named_parameters()}

    def closure(rows):
        return torch.func.functional_call(model, parameters, (rows,))

    with graph_off(row):
        x_adv = attack(closure, x, y, generator=seeded())
    assert torch.equal(x_adv, attack(model, x, y, generator=seeded()))
    assert not x_adv.requires_grad
    assert scale.grad is None


@every_attack
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_the_grad_mode_around_an_attack_does_not_matter(row, context):
    attack, model, (x, y) = row.build(), network(), batch()
    with context():
        x_adv = attack(model, x, y, generator=seeded())
        assert torch.is_grad_enabled() == (context is nullcontext)
    assert torch.equal(x_adv, attack(model, x, y, generator=seeded()))


@every_attack
def test_inputs_made_in_inference_mode_can_be_attacked(row):
    """An evaluation loop moves and scales its batches where it calls the attack."""
    attack, model, (x, y) = row.build(), network(), batch()
    with torch.inference_mode():
        x_adv = attack(model, x * 1.0, y + 0, generator=seeded())
    assert torch.equal(x_adv, attack(model, x, y, generator=seeded()))


@every_attack
def test_memory_layout_of_the_input_does_not_matter(row):
    attack, model, (x, y) = row.build(), network(), batch()
    want = attack(model, x, y, generator=seeded())
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attack(model, transposed, y, generator=seeded()), want)
    expanded, same = x[2:3].expand_as(x), x[2:3].repeat(BATCH, 1, 1, 1)
    result = attack(model, expanded, y, generator=seeded())
    assert torch.equal(result, attack(model, same, y, generator=seeded()))


@every_attack
def test_a_model_whose_input_gradient_is_a_broadcast_view(row):
    """The gradient of a sum is one number seen at many places; it cannot be written to."""

    def model(x):
        total = x.flatten(1).sum(1)
        return torch.stack([total, -total, 2 * total], 1)

    x, _ = batch()
    x_adv = row.build()(model, x, torch.zeros(BATCH, dtype=torch.int64), generator=seeded())
    assert row.threat_model().contains(x_adv, x, tolerance=1e-9).all()


# What a bad call is told ---------------------------------------------------------------------------------------------

BAD_CALLS = {
    "nan": (lambda x, y: (x.index_fill(0, torch.tensor([3]), torch.nan), y), ValueError, "x must be finite, got NaN"),
    "infinite": (lambda x, y: (x / 0, y), ValueError, "x must be finite, got NaN or infinite values"),
    "eight_bit": (
        lambda x, y: (x * 255, y),
        ValueError,
        "x must be in the box [0, 1], got values in [0, 255]; 8-bit images belong in [0, 1]: write x / 255",
    ),
    "normalised": (
        lambda x, y: (4 * x - 2, y),
        ValueError,
        "x must be in the box [0, 1], got values in [-2, 2]; put normalisation inside the model "
        "(metarobust.models.Normalize) and pass x in input units",
    ),
    "integers": (
        lambda x, y: ((x * 255).byte(), y),
        TypeError,
        "x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.float() / 255",
    ),
    "array": (
        lambda x, y: (x.numpy(), y),
        TypeError,
        "x must be a floating-point tensor, got ndarray; write torch.from_numpy(x)",
    ),
    "list": (lambda x, y: (x.tolist(), y), TypeError, "x must be a floating-point tensor, got list; write torch.tensor(x)"),
    "array_of_labels": (lambda x, y: (x, y.numpy()), TypeError, "got ndarray; write torch.from_numpy(y).long()"),
    "float_labels": (
        lambda x, y: (x, y.float()),
        TypeError,
        "y must be class indices of dtype torch.int64, got torch.float32; write y.long()",
    ),
    "labels_too_large": (
        lambda x, y: (x, y + 1),
        ValueError,
        "y must be in [0, 3), the classes that the model has logits for, got labels from 1 to 3",
    ),
    "negative_labels": (lambda x, y: (x, y - 1), ValueError, "y must be in [0, 3), the classes that the model has"),
    "one_hot": (
        lambda x, y: (x, nn.functional.one_hot(y)),
        ValueError,
        "y must be of shape [6], one label per example, got [6, 3]",
    ),
    "too_few_labels": (lambda x, y: (x, y[:4]), ValueError, "y must be of shape [6], one label per example, got [4]"),
}  # fmt: skip


@every_attack
@pytest.mark.parametrize(("spoil", "error", "text"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_batches_are_refused_in_one_sentence(row, spoil, error, text):
    with pytest.raises(error) as caught:
        row.build()(network(), *spoil(*batch()), generator=seeded())
    assert text in str(caught.value)


LOGITS = "model must be a callable from inputs [batch, ...] to logits [batch, classes], got "
BAD_MODELS = {
    "nothing": (None, TypeError, LOGITS + "None; pass an nn.Module or a function"),
    "path": ("net.pt", TypeError, LOGITS + "'net.pt'; build the network and load its weights into it"),
    "tuple": (lambda x: (network()(x), x), ValueError, LOGITS + "tuple for "),
    "one_number_each": (lambda x: network()(x)[:, 0], ValueError, LOGITS + "an output of shape ["),
}  # fmt: skip


@every_attack
@pytest.mark.parametrize(("model", "error", "text"), BAD_MODELS.values(), ids=BAD_MODELS)
@pytest.mark.parametrize("repeats", [1, 40])
def test_things_that_are_no_model_are_refused_in_one_sentence(row, model, error, text, repeats):
    x, y = (part.repeat(repeats, *(1,) * (part.dim() - 1)) for part in batch())
    with pytest.raises(error) as caught:
        row.build()(model, x, y, generator=seeded())
    assert text in str(caught.value)


class Cut(nn.Module):
    """Cuts the graph at its input by ``how``."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(x)


NOT_DIFFERENTIABLE = {
    "constant": lambda x: x.new_zeros(len(x), CLASSES),
    "detached_input": lambda x: network()(x.detach()),
    "detached_logits": lambda x: network()(x).detach(),
    "no_grad": torch.no_grad()(lambda x: network()(x)),
    "quantised": nn.Sequential(Cut(lambda x: (x * 255).long().to(x.dtype) / 255), network()),
}


@gradient_attacks
@pytest.mark.parametrize("model", NOT_DIFFERENTIABLE.values(), ids=NOT_DIFFERENTIABLE)
def test_logits_that_do_not_depend_on_the_input_are_refused_in_one_sentence(row, model):
    with pytest.raises(ValueError, match=r"^the model's logits must depend differentiably on x, got logits without"):
        row.build()(model, *batch(), generator=seeded())


@pytest.mark.parametrize(
    ("attack", "arguments", "error", "text"),
    [
        (FGSM, {"loss": "hinge"}, ValueError, "loss must be one of 'cross_entropy', 'margin', 'dlr', got 'hinge'"),
        (PGD, {"loss": "hinge"}, ValueError, "loss must be one of 'cross_entropy', 'margin', 'dlr', got 'hinge'"),
        (FGSM, {"direction": "up"}, ValueError, "direction must be one of 'adversary', 'anti_adversary', got 'up'"),
        (PGD, {"direction": "up"}, ValueError, "direction must be one of 'adversary', 'anti_adversary', got 'up'"),
        (PGD, {"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
        (PGD, {"steps": 2.5}, TypeError, "steps must be an integer >= 1, got 2.5"),
        (PGD, {"restarts": 0}, ValueError, "restarts must be an integer >= 1, got 0"),
        (PGD, {"step_size": 0}, ValueError, "step_size must be a finite number > 0, got 0"),
        (PGD, {"step_size": float("nan")}, ValueError, "step_size must be a finite number > 0, got nan"),
        (
            PGD,
            {"restarts": 3, "random_start": False},
            ValueError,
            "restarts must be 1 without a random start (every restart would be the same), got 3; "
            "write random_start=True",
        ),
        (FGSM, {"threat_model": 0.3}, TypeError, "threat_model must be a ThreatModel, got 0.3"),
        (PGD, {"threat_model": "linf"}, TypeError, "threat_model must be a ThreatModel, got 'linf'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_sentence(attack, arguments, error, text):
    with pytest.raises(error) as caught:
        attack(**{"threat_model": ThreatModel(), **arguments})
    assert text in str(caught.value)


# Beyond the contract: PGD and FGSM -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", float("inf"))])
@pytest.mark.parametrize("direction", ["adversary", "anti_adversary"])
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_reaches_the_optimum_on_a_linear_model(norm, dual, direction, loss, random_start):
    """Where the box does not bind, the logit difference moves by epsilon times the dual norm of w."""
    model, w = two_class_linear()
    threat_model = ThreatModel(norm=norm, epsilon=0.3, lower=-10, upper=10)
    attack = PGD(threat_model=threat_model, steps=20, step_size=0.3, loss=loss, direction=direction, random_start=random_start)
    x, y = torch.randn(8, 16, generator=seeded(5), dtype=torch.float64), torch.arange(8) % 2
    moved = margin(model(attack(model, x, y, generator=seeded())), y) - margin(model(x), y)
    optimum = 0.3 * torch.linalg.vector_norm(w, ord=dual) * (1 if direction == "adversary" else -1)
    torch.testing.assert_close(moved, optimum.expand(8), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", float("inf"))])
def test_one_step_of_fgsm_reaches_the_optimum_on_a_linear_model(norm, dual):
    model, w = two_class_linear()
    threat_model = ThreatModel(norm=norm, epsilon=0.3, lower=-10, upper=10)
    x, y = torch.randn(8, 16, generator=seeded(5), dtype=torch.float64), torch.arange(8) % 2
    moved = margin(model(FGSM(threat_model=threat_model)(model, x, y)), y) - margin(model(x), y)
    torch.testing.assert_close(moved, (0.3 * torch.linalg.vector_norm(w, ord=dual)).expand(8))


def test_pgd_reaches_the_best_corner_where_the_box_binds():
    model, w = two_class_linear()
    x, _ = batch()
    y = torch.zeros(BATCH, dtype=torch.int64)
    x_adv = PGD(threat_model=ThreatModel(epsilon=0.3))(model, x, y, generator=seeded())
    torch.testing.assert_close(x_adv, (x + 0.3 * w.sign().reshape(SHAPE)).clamp(0, 1))


def test_default_step_size_is_two_and_a_half_radii_over_the_number_of_steps():
    model, (x, y) = network(), batch()
    attack = PGD(threat_model=ThreatModel(epsilon=0.1), steps=4, random_start=False)
    explicit = dataclasses.replace(attack, step_size=2.5 * 0.1 / 4)
    assert torch.equal(attack(model, x, y), explicit(model, x, y))


def test_one_full_step_from_x_is_fgsm():
    model, (x, y) = network(), batch()
    for norm in ("linf", "l2", "l1"):
        threat_model = ThreatModel(norm=norm, epsilon=0.2)
        pgd = PGD(threat_model=threat_model, steps=1, step_size=0.2, random_start=False)
        assert torch.equal(pgd(model, x, y), FGSM(threat_model=threat_model)(model, x, y))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("direction", ["adversary", "anti_adversary"])
def test_restarts_keep_the_best_single_run_of_each_example(norm, direction):
    """The single runs draw the same starts: one call on the batch repeated three times, with the same generator."""
    model, (x, y) = network(), batch()
    single = PGD(threat_model=ThreatModel(norm=norm, epsilon=0.4), steps=2, step_size=0.05, direction=direction)
    runs = single(model, x.repeat(3, 1, 1, 1), y.repeat(3), generator=seeded(8))
    losses = cross_entropy(model(runs), y.repeat(3)).reshape(3, BATCH)
    best = losses.amax(0) if direction == "adversary" else losses.amin(0)
    several = dataclasses.replace(single, restarts=3)(model, x, y, generator=seeded(8))
    torch.testing.assert_close(cross_entropy(model(several), y), best)
    assert len(losses.argmax(0).unique()) > 1, "every example has the same best run: the test shows nothing"


def test_forward_passes_are_the_steps_and_one_more_for_restarts():
    rows = []
    model = network()

    def counted(x):
        rows.append(len(x))
        return model(x)

    PGD(threat_model=ThreatModel(), steps=4)(counted, *batch(), generator=seeded())
    assert rows == [BATCH] * 4
    rows.clear()
    PGD(threat_model=ThreatModel(), steps=4, restarts=3)(counted, *batch(), generator=seeded())
    assert rows == [3 * BATCH] * 5


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [FGSM, partial(PGD, steps=20)])
def test_vanishing_gradients_still_reach_the_optimum(norm, attack):
    """Of a scaled-down model the gradients are near 1e-25 in single precision, and the best move is the same."""
    threat_model = ThreatModel(norm=norm, epsilon=0.3, lower=-10, upper=10)
    w = torch.randn(16, generator=seeded(4))
    x, y = torch.randn(8, 16, generator=seeded(5)), torch.zeros(8, dtype=torch.int64)

    def moved(scale):
        x_adv = attack(threat_model=threat_model)(
            lambda rows: torch.stack([rows.new_zeros(len(rows)), rows @ (scale * w)], 1), x, y, generator=seeded()
        )
        return (x_adv - x) @ w

    torch.testing.assert_close(moved(1e-25), moved(1e-3), rtol=1e-3, atol=0)


# Counting calls ------------------------------------------------------------------------------------------------------


def test_calls_and_rows_are_counted_while_counting_lasts():
    model, (x, y) = network(), batch()
    fgsm, pgd = FGSM(threat_model=ThreatModel()), PGD(threat_model=ThreatModel(), steps=2, restarts=3)
    fgsm(model, x, y)
    with count_calls() as outer:
        fgsm(model, x, y)
        with count_calls() as inner:
            pgd(model, x, y, generator=seeded())
        fgsm(model, x, y)
    fgsm(model, x, y)
    assert (inner.calls, inner.examples) == (1, 3 * BATCH)
    assert (outer.calls, outer.examples) == (3, 5 * BATCH)


def test_counting_stops_when_the_block_fails():
    model, (x, y) = network(), batch()
    with pytest.raises(ArithmeticError), count_calls() as counter:
        raise ArithmeticError
    FGSM(threat_model=ThreatModel())(model, x, y)
    assert counter.calls == 0


@every_attack
@pytest.mark.parametrize("epsilon", [0, None])
def test_every_attack_is_counted_even_when_it_has_nothing_to_do(row, epsilon):
    with count_calls() as counter:
        row.build(epsilon=row.epsilon if epsilon is None else epsilon)(network(), *batch(2), generator=seeded())
        row.build()(network(), *batch(0), generator=seeded())
    assert counter.calls >= 2 if row.nested else counter.calls == 2
    assert counter.examples >= 2


def test_a_restart_that_fools_the_model_beats_one_with_a_larger_loss() -> None:
    """Loss and prediction disagree here by construction: the loss rewards the first pixel, the prediction needs the second."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros(len(x)), x[:, 1] - 0.5], 1) + 0 * x[:, :1]

    def first_pixel(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -logits[:, 1]  # highest where the prediction stays right

    threat_model = ThreatModel(norm="linf", epsilon=0.1)
    x, y = torch.full((50, 2), 0.5), torch.zeros(50, dtype=torch.int64)
    attack = PGD(threat_model=threat_model, steps=1, step_size=1e-9, restarts=8, loss=first_pixel)
    moved = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    assert (model(moved).argmax(1) != y).float().mean() > 0.9


@pytest.mark.parametrize(
    "make",
    [
        lambda loss: FGSM(threat_model=ThreatModel(epsilon=0.1), loss=loss),
        lambda loss: PGD(threat_model=ThreatModel(epsilon=0.1), steps=2, restarts=2, loss=loss),
        lambda loss: APGD(threat_model=ThreatModel(epsilon=0.1), steps=2, loss=loss),
        lambda loss: Square(threat_model=ThreatModel(epsilon=0.1), queries=3, loss=loss),
        lambda loss: TransportAscent(transport_cost=HardBall(threat_model=ThreatModel(epsilon=0.1)), steps=2, loss=loss),
        lambda loss: Unrolled(threat_model=ThreatModel(epsilon=0.1), update_rule=torchopt.sgd(lr=0.1), steps=2, loss=loss),
        lambda loss: RandomRoundingFGSM(steps=2, loss=loss),
        lambda loss: AdversarialTraining(attack=FGSM(threat_model=ThreatModel(epsilon=0.1), loss=loss), loss=loss),
    ],
    ids=["FGSM", "PGD", "APGD", "Square", "TransportAscent", "Unrolled", "RandomRoundingFGSM", "AdversarialTraining"],
)
def test_the_signature_of_a_loss_is_looked_at_when_it_is_given_and_not_in_every_step(make, monkeypatch):
    looks, original = [], losses.takes

    def watched(*arguments):
        looks.append(arguments)
        original(*arguments)

    monkeypatch.setattr(losses, "takes", watched)
    made = make(lambda logits, y: cross_entropy(logits, y) / 2)
    assert looks
    looks.clear()
    x = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]).reshape(2, 1, 2, 2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    for _ in range(2):
        made(model, x, torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0))
    assert looks == []

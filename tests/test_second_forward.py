"""The second forward pass of tangents is the first one again: at epsilon zero every layer must read what it read before."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from test_adversarial_estimate import batch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from metarobust.meta_optimizers import InterpretableOptimizer, factor_gradients, load, record_factors
from metarobust.meta_optimizers import _adversarial_tangent as tangent
from metarobust.models import Normalize, cnn, mlp
from metarobust.threat_models import ThreatModel

SOURCE = "gradient+adversarial_tangent"
BALL = ThreatModel(norm="linf", epsilon=0.1)


class Centred(nn.Module):
    """Takes away a running mean, which it moves in place in each pass."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 10)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x.flatten(1))
        centred = a - self.mean
        with torch.no_grad():
            self.mean.lerp_(a.mean(0), 0.5)
        return self.last(centred.tanh())


class Rattling(nn.Module):
    """Random numbers in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x.flatten(1))
        return self.last(a + 0.5 * torch.randn_like(a))


def dropping() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10)).eval()
    for layer in (model[2], model[3]):
        layer.train()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "spectral normalisation": lambda: nn.Sequential(
        nn.Flatten(), spectral_norm(nn.Linear(64, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 10))
    ),
    "weight normalisation": lambda: nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 8)), nn.Tanh(), nn.Linear(8, 10)),
    "a running mean, in training": lambda: Centred().train(),
    "a running mean, in evaluation": lambda: Centred().eval(),
    "random numbers in evaluation": lambda: Rattling().eval(),
    "parts in training": dropping,
}


def assert_same(seen: list[tangent.Tangents]) -> None:
    (found,) = seen
    assert found.inputs
    for call, moved in found.inputs.items():
        torch.testing.assert_close(moved, call.inputs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_without_a_move_each_layer_reads_the_same(name: str, seen: list[tangent.Tangents]) -> None:
    torch.manual_seed(0)
    model, (x, y) = MODELS[name]().double(), batch()
    twin = MODELS[name]().double()
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    twin(x)
    torch.manual_seed(1)
    with record_factors(
        model, threat_model=ThreatModel(epsilon=0.0), gradient_source=SOURCE, generator=torch.Generator()
    ) as recorder:
        loss = F.cross_entropy(model(x), y)
        recorder.backward(loss)
    assert_same(seen)
    if not name.startswith(("spectral", "weight")):  # whose weight is computed once more where the layer is recorded
        for (buffer, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=buffer)


def test_a_mode_that_changes_before_the_backward_pass(seen: list[tangent.Tangents]) -> None:
    torch.manual_seed(0)
    model, (x, y) = dropping().train().double(), batch()
    with record_factors(model, threat_model=ThreatModel(epsilon=0.0), gradient_source=SOURCE) as recorder:
        loss = F.cross_entropy(model(x), y)
        model.eval()
        recorder.backward(loss)
    assert_same(seen)
    assert not any(module.training for module in model.modules())


def test_tensors_of_functional_call_are_those_of_both_passes(seen: list[tangent.Tangents]) -> None:
    """Running statistics too, and one tensor under two names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8)).double()
    x, y = batch(classes=8)
    shared = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    named = dict(model.named_parameters()) | {"4.weight": shared, "5.weight": shared}
    named |= {"2.running_mean": torch.randn(8, dtype=torch.float64), "2.running_var": 1 + torch.rand(8, dtype=torch.float64)}
    model.eval()
    closure = lambda: F.cross_entropy(functional_call(model, named, (x,)), y)  # noqa: E731
    weights = (cast("Tensor", named["2.weight"]), shared)
    found = factor_gradients(model, closure, threat_model=ThreatModel(epsilon=0.0), gradient_source=SOURCE, parameters=weights)
    assert_same(seen)
    for change in found.second_gradients:
        assert change.abs().max() < 1e-9
    torch.manual_seed(0)
    apart = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8)).double()
    apart[4].weight = apart[5].weight = nn.Parameter(shared.detach().clone())
    apart.load_state_dict({k: v.detach() for k, v in named.items()}, strict=False)
    seen.clear()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    options = {"threat_model": BALL, "gradient_source": SOURCE}
    swapped = factor_gradients(model, closure, parameters=weights, generator=generators[0], **options)
    own = (apart[2].weight, apart[5].weight)
    apart.eval()
    alone = factor_gradients(
        apart, lambda: F.cross_entropy(apart(x), y), parameters=own, generator=generators[1], **options
    )  # fmt: skip
    for a, b in zip(swapped.second_gradients, alone.second_gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 1e-4


def test_the_step_follows_the_coarsest_rounding(monkeypatch: pytest.MonkeyPatch, seen: list[tangent.Tangents]) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert tangent.step_of(torch.float64, cuda) == tangent.step_of(torch.float64, cpu) < 1e-6
    assert tangent.step_of(torch.float32, cpu) == pytest.approx(0.0086, rel=0.01)
    assert tangent.step_of(torch.bfloat16, cpu) == 1.0
    for precision, least in (("high", 0.7), ("medium", 1.0)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert tangent.step_of(torch.float32, cpu) > least - 0.01
        assert tangent.step_of(torch.float64, cpu) < 1e-6
    monkeypatch.undo()
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is not None:
        for precision, step in (("tf32", 0.78), ("ieee", 0.0086)):
            monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=precision))
            assert tangent.step_of(torch.float32, cuda) == pytest.approx(step, rel=0.01)


class Inside(nn.Module):
    """Autocast in the model itself, where the caller does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.last(self.first(x.flatten(1)).relu())


def test_autocast_inside_the_model(seen: list[tangent.Tangents]) -> None:
    torch.manual_seed(0)
    model, (x, y) = Inside(), batch()
    factor_gradients(model, lambda: F.cross_entropy(model(x.float()).float(), y), threat_model=BALL, gradient_source=SOURCE)
    assert seen[0].step == 1.0


@pytest.mark.parametrize("source", ["gradient+adversarial_estimate", SOURCE])
def test_float16_autocast_stays_finite_where_ratios_are_large(source: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp([64, 32, 10]), batch(64)
    with torch.no_grad():
        cast("nn.Linear", model[1]).weight.mul_(30.0)
        y = model(x.float()).argmax(1)
    with torch.autocast("cpu", dtype=torch.float16):
        found = factor_gradients(
            model, lambda: F.cross_entropy(model(x.float()), y), threat_model=BALL, gradient_source=source
        )  # fmt: skip
    assert all(t.isfinite().all() for t in (*found.gradients, *found.second_gradients))


def test_nothing_is_kept_after_the_block() -> None:
    model, (x, y) = cnn([3, 4]).double(), batch()
    kept: list[weakref.ref[Tensor]] = []
    hook = model.register_forward_hook(lambda _, args, output: kept.extend([weakref.ref(args[0]), weakref.ref(output)]))
    with record_factors(model, threat_model=BALL, gradient_source=SOURCE) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    hook.remove()
    gc.collect()
    assert len(kept) == 4
    assert all(reference() is None for reference in kept)
    assert recorder.gradient_source == SOURCE


def test_an_epsilon_as_large_as_the_box() -> None:
    model, (x, y) = mlp([64, 5, 10]).double(), batch()
    found = factor_gradients(
        model, lambda: F.cross_entropy(model(x), y), threat_model=ThreatModel(epsilon=0.9), gradient_source=SOURCE
    )
    assert all(t.isfinite().all() for t in found.second_gradients)


def test_gradients_by_what_the_input_was_made_of() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp([64, 5, 10]).double(), batch()
    shade = torch.zeros((), dtype=torch.float64, requires_grad=True)
    closure = lambda: F.cross_entropy(model((x + shade).clamp(0, 1)), y)  # noqa: E731
    found = factor_gradients(model, closure, threat_model=ThreatModel(epsilon=0.0), gradient_source=SOURCE, parameters=[shade])
    (expected,) = torch.autograd.grad(closure(), shade)
    torch.testing.assert_close(found.gradients[0], expected)


class Writing(nn.Module):
    """Normalises its input where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp([64, 5, 10])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.5))


def test_a_model_may_write_into_its_input(seen: list[tangent.Tangents]) -> None:
    model, (x, y) = Writing().double(), batch()
    before = x.clone()
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    factor_gradients(model, closure, threat_model=ThreatModel(epsilon=0.0), gradient_source=SOURCE)
    assert_same(seen)
    assert torch.equal(x, before)


class Backbone(nn.Module):
    """A part without gradients in front."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(64, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = self.frozen(x.flatten(1)).relu()
        return self.head(a)


class Folded(nn.Module):
    """Tokens on the axis of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.reshape(-1, 8)).reshape(len(x), 32))


def test_errors_say_what_to_write() -> None:
    x, y = batch()
    model, options = mlp([64, 5, 10]).double(), {"threat_model": BALL, "gradient_source": SOURCE}

    def halved() -> Tensor:
        logits = model(x)
        logits /= 2
        return F.cross_entropy(logits, y)

    with pytest.raises(ValueError, match="write logits = logits / 2"):
        factor_gradients(model, halved, **options)
    for outside in (
        lambda: F.cross_entropy(model(x), y) + model[1](x.flatten(1)).square().mean(),
        lambda: model[1](x.flatten(1)).square().mean() + F.cross_entropy(model(x), y),
    ):
        with pytest.raises(ValueError, match="call the model itself inside the block"):
            factor_gradients(model, outside, **options)
    backbone = Backbone().double()
    with pytest.raises(ValueError, match="run frozen layers with gradients enabled"):
        factor_gradients(backbone, lambda: F.cross_entropy(backbone(x), y), **options)
    folded = Folded().double()
    with pytest.raises(ValueError, match=r"\[batch, tokens, features\]"):
        factor_gradients(folded, lambda: F.cross_entropy(folded(x), y), **options)
    single = mlp([64, 5, 1]).double()
    for source in ("gradient+adversarial_estimate", SOURCE):
        with pytest.raises(ValueError, match="two classes or more"):
            factor_gradients(
                single, lambda: F.binary_cross_entropy_with_logits(single(x)[:, 0], (y > 4).double()), gradient_source=source
            )


def test_the_fall_of_the_learning_rate_has_a_gradient_from_its_start() -> None:
    rule = InterpretableOptimizer(gradient_source="gradient").double()
    weight, gradient = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def end() -> Tensor:
        chain = rule.as_gradient_transformation(total_steps=4)
        params, state = (weight,), chain.init((weight,))
        for _ in range(4):
            moves, state = chain.update((gradient * params[0],), state, params=params, inplace=False)
            params = tuple(p + move for p, move in zip(params, moves, strict=True))
        return params[0].square().sum()

    (found,) = torch.autograd.grad(end(), rule.fall)
    before = end().item()
    with torch.no_grad():
        rule.fall += 1e-6
    assert found.item() == pytest.approx((end().item() - before) / 1e-6, rel=1e-3)
    assert abs(found.item()) > 1e-4


class ChannelsLast(nn.LayerNorm):
    """Normalises over another axis than its base class, as some published networks do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("source", ["gradient+adversarial_estimate", SOURCE])
def test_a_normalisation_of_its_own_kind_has_no_second_stream(source: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), ChannelsLast(3), nn.Flatten(), nn.Linear(108, 10)).double()
    x, y = batch()
    found = factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=BALL, gradient_source=source)
    sizes = [h.abs().max().item() for h in found.second_gradients]
    assert sizes[2] == sizes[3] == 0
    assert min(sizes[0], sizes[4]) > 0
    assert all(g.abs().max() > 0 for g in found.gradients)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "mobilenet_v3_small"])
def test_networks_of_torchvision_go_in_as_they_are(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = nn.Sequential(Normalize(mean=[0.5] * 3, std=[0.25] * 3), getattr(models, name)(num_classes=4)).train()
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    optimizer = load("robust-small-v1").torch_optimizer(model.parameters(), total_steps=5, threat_model=BALL)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.record_factors(model) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))

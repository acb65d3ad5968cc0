"""The combined gradient g + c h from one weight gradient per layer: the two streams added, in every use a weight can have."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metarobust import meta_optimizers
from metarobust.meta_optimizers import FactorGradients, FactorRecorder, InterpretableOptimizer, LSTMOptimizer
from metarobust.models import Normalize, cnn, mlp, residual_network, stack
from metarobust.threat_models import ThreatModel

SOURCES = ("gradient+perturbed_factors", "gradient+adversarial_estimate", "gradient+adversarial_tangent")
BALL = ThreatModel(norm="linf", epsilon=0.1)


def record_factors(*args: Any, **options: Any) -> AbstractContextManager[FactorRecorder]:
    """The same noise in each block."""
    torch.manual_seed(5)
    return meta_optimizers.record_factors(*args, **options)


def factor_gradients(*args: Any, **options: Any) -> FactorGradients:
    """The same noise in each block."""
    torch.manual_seed(5)
    return meta_optimizers.factor_gradients(*args, **options)


class Masked(nn.Linear):
    """A layer with a use of its weight that only autograd knows."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * (self.weight.detach().abs() > 0.05), self.bias)


class Tied(nn.Module):
    """One weight in a layer, in the same layer again, and in a product beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x.flatten(1)).relu()
        return self.last(self.inner(self.inner(a).tanh()) + F.linear(a, self.inner.weight.T))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: mlp([64, 5, 7, 10]),
    "convolutions": lambda: cnn([3, 4]),
    "residual, group normalisation": lambda: residual_network([4, 8, 8]),
    "normalised input": lambda: nn.Sequential(Normalize(mean=[0.4], std=[0.3]), cnn([3, 4])),
    "a weight used three times": Tied,
    "a layer of its own kind": lambda: nn.Sequential(nn.Flatten(), Masked(64, 8), nn.ReLU(), Masked(8, 10)),
    "no biases": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 10, bias=False)),
}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(7, 1, 8, 8, generator=generator, dtype=torch.float64), torch.randint(10, (7,), generator=generator)


def coefficients_of(model: nn.Module) -> dict[Tensor, float]:
    """Positive, negative and zero; one parameter is left out."""
    return {p: (1.5, -0.7, 0.0, 0.4)[i % 4] for i, p in enumerate(model.parameters()) if i != 4}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_sum_of_the_streams(name: str, source: str, norm: str) -> None:
    torch.manual_seed(0)
    model, (x, y), ball = MODELS[name]().double(), batch(), ThreatModel(norm=norm, epsilon=0.3)
    given = coefficients_of(model)
    _, g, h = factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=ball, gradient_source=source)
    weights = list(model.parameters())
    for _ in range(2):  # gradients accumulate
        with record_factors(model, threat_model=ball, gradient_source=source, coefficients=given) as recorder:
            recorder.backward(F.cross_entropy(model(x), y))
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True)), "the model's own parameters are back"
    for p, clean, change in zip(weights, g, h, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 2 * (clean + given.get(p, 0.0) * change), rtol=1e-6, atol=1e-10)
        second = p.second_grad  # type: ignore[attr-defined]
        if p in given:
            assert second is None
        else:
            torch.testing.assert_close(second, 2 * change, rtol=1e-6, atol=1e-10)
    assert any((given.get(p, 0.0) * change).abs().max() > 1e-5 for p, change in zip(weights, h, strict=True))


@pytest.mark.parametrize("source", SOURCES)
def test_the_optimizer_asks_for_it_and_takes_the_same_steps(source: str) -> None:
    """With c that moves in time, at two learning rates of two groups, and a model that stays as it was."""
    x, y = batch()
    rule = InterpretableOptimizer(gradient_source=source).double()
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    ends = []
    for combined in (True, False):
        torch.manual_seed(0)
        model = cnn([3, 4]).double()
        body, head = [*model.parameters()][:4], [*model.parameters()][4:]
        optimizer = rule.torch_optimizer([{"params": body}, {"params": head, "lr": 0.5}], total_steps=4)
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(5)
            block = (optimizer if combined else rule).record_factors(model, threat_model=BALL)
            with block as recorder:
                recorder.backward(F.cross_entropy(model(x), y))
            seconds = [getattr(p, "second_grad", None) for p in model.parameters()]
            assert all((second is None) is combined for second in seconds)
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_frozen_weights_and_looks_without_gradients() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp([64, 5, 10]).double(), batch()
    first, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    first.weight.requires_grad_(False)
    with record_factors(model, threat_model=BALL, gradient_source=SOURCES[1], coefficients={last.weight: 1.0}) as recorder:
        loss = F.cross_entropy(model(x), y)
        with torch.no_grad():
            model(x)
        recorder.backward(loss)
    assert first.weight.grad is None
    _, g, h = factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=BALL, gradient_source=SOURCES[1])
    assert last.weight.grad is not None
    torch.testing.assert_close(last.weight.grad, g[1] + h[1])


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failing_forward_pass_gives_the_weight_back(failure: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp([64, 5, 10])
    weights = list(model.parameters())

    def fail(*args: Tensor) -> Tensor:
        raise failure

    monkeypatch.setattr(F, "linear", fail)
    with pytest.raises(failure), record_factors(model, threat_model=BALL, coefficients=coefficients_of(model)):
        model(torch.rand(2, 1, 8, 8))
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("source", SOURCES)
def test_copies_side_by_side(source: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = stack([cnn([3, 4]) for _ in range(3)]).double(), batch()
    x, y = x[:6], y[:6]
    given = coefficients_of(model)
    _, g, h = factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=BALL, gradient_source=source)
    with record_factors(model, threat_model=BALL, gradient_source=source, coefficients=given) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    for p, clean, change in zip(model.parameters(), g, h, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, clean + given.get(p, 0.0) * change, rtol=1e-6, atol=1e-10)


def test_hooks_and_patched_layers_mean_what_they_mean_to_autograd() -> None:
    """With c = 0 everywhere the combined gradient is the plain one, whatever a user hangs on layers and weights."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Flatten(), *(nn.Linear(64 if i == 0 else 8, 8) for i in range(5))).double(), batch()
    penalties: list[Tensor] = []
    doubled, penalised, clipped, patched, _ = list(model)[1:]
    assert isinstance(patched, nn.Linear)
    doubled.register_forward_hook(lambda layer, args, out: cast("Tensor", out) * 2)
    assert isinstance(penalised, nn.Linear)
    penalised.register_forward_hook(lambda layer, args, out: penalties.append(penalised.weight.square().sum()))
    cast("Tensor", clipped.weight).register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    patched.forward = lambda a: F.linear(a, patched.weight / patched.weight.norm(), patched.bias)  # type: ignore[method-assign]

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y % 8) + penalties[-1]

    expected = torch.autograd.grad(loss(), list(model.parameters()))
    given: dict[Tensor, float] = dict.fromkeys(model.parameters(), 0.0)
    with record_factors(model, threat_model=BALL, coefficients=given) as recorder:
        recorder.backward(loss())
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("combined", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_checkpointed_layers_are_watched_once(source: str, combined: bool) -> None:
    torch.manual_seed(0)
    plain, (x, y) = cnn([3, 4]).double(), batch()
    layers = cast("nn.Sequential", plain)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layers

        def forward(self, x: Tensor) -> Tensor:
            return cast("Tensor", checkpoint(self.inner, x, use_reentrant=False))

    found = []
    for model in (plain, Checkpointed()):
        model.zero_grad()
        given: dict[Tensor, float] = dict.fromkeys(model.parameters(), 1.5)
        with record_factors(
            model, threat_model=BALL, gradient_source=source, coefficients=given if combined else None
        ) as recorder:
            recorder.backward(F.cross_entropy(model(x), y))
        found.append([(p.grad, getattr(p, "second_grad", None)) for p in model.parameters()])
    for (g, h), (again, h_again) in zip(*found, strict=True):
        torch.testing.assert_close(g, again)
        assert (h is None) is combined
        if h is not None:
            torch.testing.assert_close(h, h_again)


def test_what_was_not_recorded_anew_is_refused() -> None:
    """Stale marks of a combined gradient never pass for a fresh one; another optimizer's part gets its own streams."""
    torch.manual_seed(0)
    model, (x, y) = mlp([64, 5, 10]), batch()
    x = x.float()
    rule = InterpretableOptimizer()
    optimizer = rule.torch_optimizer(model.parameters(), total_steps=5)
    with optimizer.record_factors(model, threat_model=BALL) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"optimizer\.record_factors"):
        optimizer.step()
    body, head = list(model.parameters())[:2], list(model.parameters())[2:]
    mine = rule.torch_optimizer(body, total_steps=5)
    for other in (InterpretableOptimizer(), LSTMOptimizer()):
        theirs = other.torch_optimizer(head, total_steps=5)
        model.zero_grad()
        with mine.record_factors(model, threat_model=BALL) as recorder:
            recorder.backward(F.cross_entropy(model(x), y))
        assert all(p.second_grad is not None for p in head)  # type: ignore[attr-defined]
        mine.step()
        theirs.step()
    with optimizer.record_factors(model, threat_model=BALL) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match=r"optimizer\.record_factors"):  # that rule reads two streams apart
        LSTMOptimizer().torch_optimizer(model.parameters(), total_steps=5).step()


def test_streams_apart_and_combined_accumulate() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp([64, 5, 10]).double(), batch()
    _, g, h = factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=BALL)
    given: dict[Tensor, float] = dict.fromkeys(model.parameters(), 0.5)
    for coefficients in (None, given, None):
        with record_factors(model, threat_model=BALL, coefficients=coefficients) as recorder:
            recorder.backward(F.cross_entropy(model(x), y))
    for p, clean, change in zip(model.parameters(), g, h, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 3 * clean + 0.5 * change)
        torch.testing.assert_close(p.second_grad, 2 * change)  # type: ignore[attr-defined]


def test_errors_say_what_to_write() -> None:
    model, (x, y) = mlp([64, 5, 10]), batch()
    for wrong in ([1.0], {"weight": 1.0}):
        with pytest.raises(TypeError, match="coefficients must be a mapping from parameters to numbers"):
            record_factors(model, coefficients=wrong).__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coefficients must be a finite number"):
        record_factors(model, coefficients={next(model.parameters()): float("nan")}).__enter__()
    with record_factors(model, threat_model=BALL, coefficients={}) as recorder:
        loss = F.cross_entropy(model(x.float()), y)
        with pytest.raises(ValueError, match=r"coefficients must be None for both streams.*recorder\.backward\(loss\)"):
            recorder.gradients(loss)
        recorder.backward(loss)
    with record_factors(model, threat_model=BALL, coefficients=coefficients_of(model)) as recorder:
        recorder.backward(F.cross_entropy(model(x.float()), y))
        with pytest.raises(RuntimeError, match=r"a plain backward pass.*write recorder\.backward\(loss\)"):
            F.cross_entropy(model(x.float()), y).backward()

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x.flatten(1))
            out = self.last(a)
            a.mul_(2)
            return out

    changing = InPlace()
    with record_factors(changing, threat_model=BALL, coefficients=coefficients_of(changing)) as recorder:
        loss = F.cross_entropy(changing(x.float()), y)
        with pytest.raises((ValueError, RuntimeError), match="in place|inplace"):
            recorder.backward(loss)

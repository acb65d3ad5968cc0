"""The combined gradient g + c h from one weight gradient per layer: the two streams added, in every use a weight can have."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust.meta_optimizers import InterpretableOptimizer, LSTMOptimizer, factor_gradients, record_factors
from metarobust.models import Normalize, cnn, mlp, residual_network
from metarobust.threat_models import ThreatModel

SOURCES = ("gradient+perturbed_factors", "gradient+adversarial_estimate")
BALL = ThreatModel(norm="linf", epsilon=0.1)


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
    _, g, h = factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=ball, source=source)
    weights = list(model.parameters())
    for _ in range(2):  # gradients accumulate
        with record_factors(model, threat_model=ball, source=source, coefficients=given) as recorder:
            recorder.backward(F.cross_entropy(model(x), y))
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True)), "the model's own parameters are back"
    for p, clean, change in zip(weights, g, h, strict=True):
        expected = 2 * (clean + given.get(p, 0.0) * change)
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-10)
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
            block = (optimizer if combined else rule).record_factors(model, threat_model=BALL)
            with block as recorder:
                recorder.backward(F.cross_entropy(model(x), y))
            seconds = [getattr(p, "perturbed_factor_grad", None) for p in model.parameters()]
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
    with record_factors(model, threat_model=BALL, source=SOURCES[1], coefficients={last.weight: 1.0}) as recorder:
        loss = F.cross_entropy(model(x), y)
        with torch.no_grad():
            model(x)
        recorder.backward(loss)
    assert first.weight.grad is None
    _, g, h = factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=BALL, source=SOURCES[1])
    assert last.weight.grad is not None
    torch.testing.assert_close(last.weight.grad, g[1] + h[1])


def test_a_failing_forward_pass_gives_the_weight_back() -> None:
    model = mlp([64, 5, 10])
    weights = list(model.parameters())
    with record_factors(model, threat_model=BALL, coefficients=coefficients_of(model)), pytest.raises(RuntimeError):
        model(torch.rand(2, 1, 7, 7))
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_errors_say_what_to_write() -> None:
    model, (x, y) = mlp([64, 5, 10]), batch()
    with record_factors(model, threat_model=BALL, coefficients={}) as recorder:
        loss = F.cross_entropy(model(x.float()), y)
        with pytest.raises(ValueError, match=r"coefficients must be None for both streams.*recorder\.backward\(loss\)"):
            recorder.gradients(loss)
        recorder.backward(loss)
    optimizer = InterpretableOptimizer().torch_optimizer(model.parameters(), total_steps=3)
    refused = pytest.raises(ValueError, match=r"a block that calls recorder\.backward\(loss\).*does not reach the weights")
    with refused, optimizer.record_factors(model, threat_model=BALL):
        F.cross_entropy(model(x.float()), y).backward()
    optimizer = LSTMOptimizer().torch_optimizer(model.parameters(), total_steps=3)
    with pytest.raises(ValueError, match=r"optimizer\.record_factors"):
        optimizer.step()

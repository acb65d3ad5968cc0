"""The estimated adversarial gradient: exact where theory says so, and written out where it does not."""

import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust._tensors import per_example
from metarobust.meta_optimizers import FactorGradients, factor_gradients, record_factors
from metarobust.meta_optimizers import _adversarial_estimate as estimate
from metarobust.models import Normalize, cnn, mlp, residual_network, stack
from metarobust.threat_models import ThreatModel

SOURCE = "gradient+adversarial_estimate"
BALL = ThreatModel(norm="linf", epsilon=0.1)


def batch(size: int = 7, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (size,), generator=generator)


def streams(model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel = BALL, reduction: str = "mean") -> FactorGradients:
    return factor_gradients(
        model, lambda: F.cross_entropy(model(x), y, reduction=reduction), threat_model=threat_model, gradient_source=SOURCE
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_exact_for_two_classes_and_a_linear_model(monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    """There the worst move is linear, and g + h is the gradient at the adversarial example, of the bias too."""
    monkeypatch.setattr(estimate, "REACH", 1.0)
    torch.manual_seed(0)
    model = mlp([64, 2]).double()
    x, y = batch(classes=2)
    ball = ThreatModel(norm=norm, epsilon=0.1)
    _, g, h = streams(model, x, y, ball)
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(moving), y), moving)
    step = gradient.sign() if norm == "linf" else gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    adversarial = (x + 0.1 * step).clamp(0, 1)
    expected = torch.autograd.grad(F.cross_entropy(model(adversarial), y), list(model.parameters()))
    for clean, change, there in zip(g, h, expected, strict=True):
        torch.testing.assert_close(clean + change, there, rtol=1e-5, atol=1e-8)
        assert change.abs().max() > 0.02 * there.abs().max(), "the change is no rounding matter"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_perceptron_written_out(norm: str) -> None:
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    x, y = batch()
    w1, b1, w2, b2 = model.parameters()
    with torch.no_grad():
        w2 *= 8.0
    y = torch.where(torch.arange(len(y)) < 5, model(x).argmax(1), y)
    ball = ThreatModel(norm=norm, epsilon=0.1 if norm == "linf" else 0.5)
    _, _, h = streams(model, x, y, ball)
    a1 = x.flatten(1).requires_grad_()
    z1 = a1 @ w1.T + b1
    a2 = z1.relu()
    z2 = a2 @ w2.T + b2
    d1, d2, da1, da2 = torch.autograd.grad(F.cross_entropy(z2, y), (z1, z2, a1, a2))
    with torch.no_grad():
        step = da1.sign() if norm == "linf" else da1 / da1.norm(dim=1, keepdim=True).clamp(min=1e-30)
        e1 = (a1 + ball.epsilon * step).clamp(0, 1) - a1
        rise = (e1 * da1).sum(1)
        along = da2.sign() if norm == "linf" else da2
        e2 = rise[:, None] * along / (along * da2).sum(1, keepdim=True).clamp(min=1e-30)
        torch.testing.assert_close((e2 * da2).sum(1), rise)  # what a balanced move is
        p = z2.softmax(1).gather(1, y[:, None]).squeeze(1)
        whole = rise * len(x) / (1 - p)
        lead = z2.gather(1, y[:, None]).squeeze(1) - z2.scatter(1, y[:, None], -torch.inf).amax(1)
        drop = torch.minimum(whole, (lead + estimate.LOST).clamp(min=0))
        assert 0 < (drop < whole).sum() < len(x), "some examples are moved all the way, some until they are lost"
        reach = (drop / whole.clamp(min=1e-30))[:, None]
        moved = torch.sigmoid(p.logit() - drop)
        r = ((1 - moved) / (1 - p))[:, None]
        for found, d, a, e in ((h[0], d1, a1, estimate.REACH * e1), (h[2], d2, a2, e2)):
            torch.testing.assert_close(found, d.T @ (r * (a + reach * e) - a), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(h[1], ((r - 1) * d1).sum(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(h[3], ((r - 1) * d2).sum(0), rtol=1e-5, atol=1e-7)


class Tokens(nn.Module):
    """Tokens of 8 pixels, one attention layer of Linear projections and LayerNorm, mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)
        self.query, self.key, self.value = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.out = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(1).unflatten(1, (8, 8)))
        seen = self.norm(tokens)
        mixed = F.scaled_dot_product_attention(self.query(seen), self.key(seen), self.value(seen))
        return self.out((tokens + mixed).mean(1))


class Lines(nn.Sequential):
    """One-dimensional convolutions with batch normalisation."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(2), nn.Conv1d(1, 4, 5, stride=3), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 4, 3, groups=2, dilation=2),
            nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: mlp([64, 5, 7, 10]),
    "convolutions": lambda: cnn([3, 4]),
    "residual, group normalisation": lambda: residual_network([4, 8, 8]),
    "attention, layer normalisation": Tokens,
    "one-dimensional, batch normalisation": lambda: Lines().eval(),
    "normalised input": lambda: nn.Sequential(Normalize(mean=[0.4], std=[0.3]), cnn([3, 4])),
}


@pytest.mark.parametrize("name", MODELS)
def test_without_moves_it_is_the_gradient_of_the_reweighted_loss(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With the moves left out, h is exactly the gradient of sum_i (r_i - 1) L_i, for every parameter of every layer kind."""
    monkeypatch.setattr(
        estimate, "changed_input", lambda inputs, move, change, mix: inputs * per_example(change.ratio - 1, inputs)
    )
    monkeypatch.setattr(estimate, "changed_factor", lambda inputs, *_: inputs * per_example(seen[0].ratio - 1, inputs))
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = batch()
    seen: list[estimate.Change] = []
    original = estimate.predicted_change

    def watch(*args: Tensor) -> estimate.Change:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(estimate, "predicted_change", watch)
    _, _, h = streams(model, x, y, ThreatModel(epsilon=0.5))
    (ratio,) = (change.ratio for change in seen)
    assert ratio.max() > 1.02
    loss = ((ratio.detach() - 1) * F.cross_entropy(model(x), y, reduction="none")).mean()
    for found, expected in zip(h, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("build", [lambda: mlp([64, 5, 10]), lambda: cnn([3, 4]), lambda: residual_network([4, 8])])
def test_stack_equals_one_by_one(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    models = [build().double() for _ in range(3)]
    stacked = stack(models)
    x, y = batch(12)
    found = factor_gradients(
        stacked,
        lambda: F.cross_entropy(stacked(x), y, reduction="none").reshape(3, 4).mean(1).sum(),
        threat_model=BALL,
        gradient_source=SOURCE,
    )
    for i, model in enumerate(models):
        one = streams(model, x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])
        for together, alone in zip(found.second_gradients, one.second_gradients, strict=True):
            torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-8)


def test_the_scale_of_the_loss_cancels_but_for_its_size() -> None:
    torch.manual_seed(0)
    model = cnn([3, 4]).double()
    x, y = batch()
    mean, total = streams(model, x, y), streams(model, x, y, reduction="sum")
    for m, s in zip(mean.second_gradients, total.second_gradients, strict=True):
        torch.testing.assert_close(len(x) * m, s, rtol=1e-5, atol=1e-8)


def test_no_epsilon_no_change_and_certain_examples_stay_finite() -> None:
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    x, y = batch()
    _, _, h = streams(model, x, y, ThreatModel(epsilon=0.0))
    assert all(change.abs().max() < 1e-12 for change in h)
    model = mlp([64, 5, 10])
    with torch.no_grad():
        cast("nn.Linear", model[3]).weight.mul_(1e4)  # margins of hundreds: probabilities and gradients underflow
        y = model(x.float()).argmax(1)
    _, g, h = streams(model, x.float(), y)
    assert all(t.isfinite().all() for t in (*g, *h))


def test_second_derivatives_are_exact() -> None:
    """Directional derivative of <h, v> along a parameter direction equals central differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Softplus(), nn.Linear(6, 10)).double()
    x, y = batch()
    inside = ThreatModel(epsilon=0.1, lower=-5.0, upper=5.0)
    probes = [torch.randn_like(p) for p in model.parameters()]
    direction = [torch.randn_like(p) for p in model.parameters()]

    def value(moved: nn.Module, *, create_graph: bool = False) -> Tensor:
        closure = lambda: F.cross_entropy(moved(x), y)  # noqa: E731
        found = factor_gradients(moved, closure, threat_model=inside, gradient_source=SOURCE, create_graph=create_graph)
        return sum(((h * v).sum() for h, v in zip(found.second_gradients, probes, strict=True)), torch.zeros(()))

    def at(size: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, v in zip(moved.parameters(), direction, strict=True):
                p.add_(v, alpha=size)
        return value(moved).item()

    gradients = torch.autograd.grad(value(model, create_graph=True), list(model.parameters()), allow_unused=True)
    slope = sum(float((g * v).sum()) for g, v in zip(gradients, direction, strict=True) if g is not None)
    assert slope == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, rel=1e-5)


def test_bfloat16_autocast_and_half_parameters() -> None:
    torch.manual_seed(0)
    model = cnn([3, 4])
    x, y = batch()
    x = x.float()
    exact = streams(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = streams(model, x, y)
    for a, b in zip(exact.second_gradients, rough.second_gradients, strict=True):
        assert b.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98
    lower = copy.deepcopy(model).bfloat16()
    _, _, h = streams(lower, x.bfloat16(), y)
    for a, b in zip(exact.second_gradients, h, strict=True):
        assert b.dtype == torch.bfloat16
        assert F.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.95


def test_a_branch_without_gradient_gives_no_second_stream_in_half_precision() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp([64, 5, 6, 10]), batch()
    first, _, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        last.weight[:, 3:] = 0
        first.bias[:] = 1
    with torch.autocast("cpu", dtype=torch.float16):
        _, g, h = streams(model, x.float(), y)
        with torch.no_grad():
            last.weight.zero_()
        _, dead, nothing = streams(model, x.float(), y)
    assert all(t.isfinite().all() for t in (*g, *h, *dead, *nothing))
    assert h[2][:3].abs().max() > 0


def test_a_compiled_model_runs_eagerly_while_it_is_watched() -> None:
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    compiled = cast("nn.Module", torch.compile(model, backend="eager"))
    x, y = batch()
    expected = streams(model, x, y).second_gradients
    found = streams(compiled, x, y).second_gradients
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_say_what_to_write() -> None:
    x, y = batch()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh()).double()
    with pytest.raises(ValueError, match=r"one that returns logits \[batch, classes\]"):
        factor_gradients(model, lambda: model(x).square().mean(), threat_model=BALL, gradient_source=SOURCE)

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 4), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.reshape(-1, 8)).reshape(len(x), 32))

    folded = Folded().double()
    with pytest.raises(ValueError, match=r"\[batch, tokens, features\]"):
        streams(folded, x, y)
    with pytest.raises(ValueError, match="source must be one of"):
        factor_gradients(folded, lambda: folded(x).mean(), gradient_source="adversarial")


def test_one_call_per_block_and_frozen_layers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    x, y = batch()
    whole = streams(model, x, y).second_gradients
    with pytest.raises(ValueError, match="called once inside the recording block"):
        factor_gradients(model, lambda: F.cross_entropy(model(x) + model(x), y), threat_model=BALL, gradient_source=SOURCE)
    with record_factors(model, threat_model=BALL, gradient_source=SOURCE) as recorder:
        loss = F.cross_entropy(model(x), y)
        with torch.no_grad():
            model(x[:2])  # no part of the loss
        found = recorder.gradients(loss).second_gradients
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b)
    asked: list[Tensor] = []
    monkeypatch.setattr(estimate, "changed_factor", lambda inputs, *_: asked.append(inputs) or inputs)
    head = list(model.parameters())[2:]
    only = factor_gradients(
        model, lambda: F.cross_entropy(model(x), y), threat_model=BALL, gradient_source=SOURCE, parameters=head[1:]
    )
    assert not asked, "no work for a weight that nobody asked for"
    torch.testing.assert_close(only.second_gradients[0], whole[3])

"""The adversarial gradient estimated by tangents: exact where theory says so, against forward-mode derivatives elsewhere."""

import copy
import random
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_adversarial_estimate import MODELS, batch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metarobust.meta_optimizers import FactorGradients, InterpretableOptimizer, LSTMOptimizer, factor_gradients, record_factors
from metarobust.meta_optimizers import _adversarial_tangent as tangent
from metarobust.meta_optimizers._layer_calls import LAYERS
from metarobust.models import cnn, mlp, residual_network, stack
from metarobust.threat_models import ThreatModel

SOURCE = "gradient+adversarial_tangent"
BALL = ThreatModel(norm="linf", epsilon=0.1)


def streams(model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel = BALL, seed: int = 3) -> FactorGradients:
    generator = torch.Generator().manual_seed(seed)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    return factor_gradients(model, closure, threat_model=threat_model, gradient_source=SOURCE, generator=generator)


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tangent, "NOISE", 0.0)


def step_from(x: Tensor, gradient: Tensor, ball: ThreatModel) -> Tensor:
    """The worst move, REACH times epsilon long, cut by the box."""
    length = gradient.flatten(1).norm(dim=1).clamp(min=1e-30).reshape(-1, 1, 1, 1)
    direction = gradient.sign() if ball.norm == "linf" else gradient / length
    return (x + tangent.REACH * ball.epsilon * direction).clamp(0, 1) - x


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 10])
def test_exact_for_a_linear_model(monkeypatch: pytest.MonkeyPatch, norm: str, classes: int) -> None:
    """With two classes g + h is the gradient at the adversarial example; with more, the size of each example's gradient is."""
    monkeypatch.setattr(tangent, "LOST", torch.inf)
    torch.manual_seed(0)
    model = mlp([64, classes]).double()
    (x, y), ball = batch(classes=classes), ThreatModel(norm=norm, epsilon=0.1)
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(moving), y), moving)
    adversarial = x + step_from(x, gradient, ball)
    _, g, h = streams(model, x, y, ball)
    expected = torch.autograd.grad(F.cross_entropy(model(adversarial), y), list(model.parameters()))
    if classes == 2:
        for clean, change, there in zip(g, h, expected, strict=True):
            torch.testing.assert_close(clean + change, there, rtol=1e-5, atol=1e-8)
            assert change.abs().max() > 0.02 * there.abs().max(), "the change is no rounding matter"
        return
    slopes = [F.one_hot(y, classes) - model(at).softmax(1) for at in (x, adversarial)]
    ratio = slopes[1].gather(1, y[:, None]) / slopes[0].gather(1, y[:, None])
    d = -slopes[0] / len(x)
    torch.testing.assert_close(h[0], (ratio * d).T @ adversarial.flatten(1) - d.T @ x.flatten(1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_perceptron_written_out(norm: str) -> None:
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    x, y = batch()
    w1, b1, w2, b2 = model.parameters()
    with torch.no_grad():
        w2 *= 8.0
        y = torch.where(torch.arange(len(y)) < 5, model(x).argmax(1), y)
    ball = ThreatModel(norm=norm, epsilon=0.1 if norm == "linf" else 0.6)
    wider = ThreatModel(norm=norm, epsilon=tangent.NOISE * ball.epsilon)
    _, g, h = streams(model, x, y, ball)
    noisy = wider.sample(x, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert not torch.equal(noisy, x)
    a1 = noisy.flatten(1)
    z1 = a1 @ w1.T + b1
    a2 = z1.relu()
    z2 = a2 @ w2.T + b2
    loss = F.cross_entropy(z2, y)
    d1, d2, dx, *clean = torch.autograd.grad(loss, (z1, z2, noisy, w1, b1, w2, b2))
    for found, expected in zip(g, clean, strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        e1 = step_from(noisy, dx, ball).flatten(1)
        e2 = (e1 @ w1.T) * (z1 > 0)
        along = e2 @ w2.T
        shares = torch.linspace(0, 1, 200_001, dtype=torch.float64)
        reach = []
        for z, v, label in zip(z2, along, y, strict=True):
            lead = (z + shares[:, None] * v).scatter(1, label.expand(len(shares), 1), -torch.inf).amax(1) - z[label]
            lost = (lead - shares * v[label] > tangent.LOST).nonzero()
            reach.append(shares[max(int(lost[0]) - 1, 0)] if len(lost) else shares[-1])
        s = torch.stack(reach)[:, None]
        assert 0 < (s < 1).sum() < len(x), "some examples are moved all the way, some until they are lost"
        missing = lambda z: 1 - z.softmax(1).gather(1, y[:, None])  # noqa: E731
        r = missing(z2 + s * along) / missing(z2)
        for found, d, a, e in ((h[0], d1, a1, e1), (h[2], d2, a2, e2)):
            torch.testing.assert_close(found, d.T @ (r * (a + s * e) - a), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(h[1], ((r - 1) * d1).sum(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(h[3], ((r - 1) * d2).sum(0), rtol=1e-4, atol=1e-6)


def inputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What each layer with a weight reads, in order of the calls."""
    found: list[Tensor] = []
    kinds = (*LAYERS, *tangent.estimate.NORMALISATIONS)
    hooks = [m.register_forward_pre_hook(lambda _, args: found.append(args[0])) for m in model.modules() if isinstance(m, kinds)]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("name", MODELS)
def test_moves_are_directional_derivatives(name: str, seen: list[tangent.Tangents]) -> None:
    """Of every layer's input along the worst move, by forward-mode differentiation; and h is made of these."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = batch()
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(moving), y), moving)
    _, _, h = streams(model, x, y)
    (found,) = seen
    move = step_from(x, gradient, BALL)
    with sdpa_kernel(SDPBackend.MATH):
        values, derivatives = torch.autograd.functional.jvp(lambda v: tuple(inputs_of(model, v)), x, move)
    assert len(values) == len(found.inputs) > 1
    ratio, reach = found.change
    for (call, moved), a, along in zip(found.inputs.items(), values, derivatives, strict=True):
        torch.testing.assert_close((moved - call.inputs) / found.step, along, rtol=1e-4, atol=1e-6)
        factor = found.factor(call, a, tangent.Mix(0.0, 1.0))
        r, s = (v.reshape(-1, *[1] * (a.dim() - 1)) for v in (ratio, reach))
        torch.testing.assert_close(factor, r * (a + s * along) - a, rtol=1e-4, atol=1e-6)
    assert all(change.abs().max() > 0 for change in h)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("name", MODELS)
def test_without_moves_it_is_the_gradient_of_the_reweighted_loss(
    monkeypatch: pytest.MonkeyPatch, name: str, seen: list[tangent.Tangents]
) -> None:
    """For every parameter of every layer kind, gains of normalisations included."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = batch()
    monkeypatch.setattr(tangent, "LOST", torch.inf)
    original = tangent.tangent_change
    monkeypatch.setattr(tangent, "tangent_change", lambda *args: original(*args)._replace(reach=torch.zeros(len(x))))
    _, _, h = streams(model, x, y, ThreatModel(epsilon=0.5))
    ratio = seen[0].change.ratio.detach()
    assert ratio.max() > 1.02
    loss = ((ratio - 1) * F.cross_entropy(model(x), y, reduction="none")).mean()
    for found, expected in zip(h, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@given(st.integers(2, 6), st.integers(0, 10_000), st.floats(0.1, 30.0))
def test_an_example_is_moved_until_it_is_lost(classes: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, along = (size * torch.randn(5, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(classes, (5,), generator=generator)
    slopes = z.softmax(1) - F.one_hot(y, classes)
    ratio, reach = tangent.tangent_change(z, z + 0.5 * along, slopes, 0.5)
    assert ((reach >= 0) & (reach <= 1)).all()
    lead = lambda v: v.scatter(1, y[:, None], -torch.inf).amax(1) - v.gather(1, y[:, None]).squeeze(1)  # noqa: E731
    start, end = lead(z), lead(z + reach[:, None] * along)
    partly = (reach > 0) & (reach < 1) & (start < tangent.LOST)
    torch.testing.assert_close(end[partly], torch.full_like(end[partly], tangent.LOST), rtol=1e-6, atol=1e-6)
    assert (end <= start.clamp(min=tangent.LOST) + 1e-9).all()
    assert (start[reach == 0] >= tangent.LOST - 1e-9).all(), "only what is lost already stays"
    probability = lambda v: v.softmax(1).scatter(1, y[:, None], 0).sum(1)  # noqa: E731
    expected = probability(z + reach[:, None] * along) / probability(z)
    inside = (expected < 8000) & (probability(z) > 1e-9)
    torch.testing.assert_close(ratio[inside], expected[inside], rtol=1e-4, atol=1e-9)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("build", [lambda: mlp([64, 5, 10]), lambda: cnn([3, 4]), lambda: residual_network([4, 8])])
def test_stack_equals_one_by_one(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    models = [build().double() for _ in range(3)]
    stacked = stack(models)
    x, y = batch(12)
    closure = lambda: F.cross_entropy(stacked(x), y, reduction="none").reshape(3, 4).mean(1).sum()  # noqa: E731
    found = factor_gradients(stacked, closure, threat_model=BALL, gradient_source=SOURCE)
    for i, model in enumerate(models):
        one = streams(model, x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])
        for together, alone in zip(found.second_gradients, one.second_gradients, strict=True):
            torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-8)


def test_parameters_that_functional_call_puts_in_are_used_again() -> None:
    torch.manual_seed(0)
    model, other = residual_network([4, 8]).double(), residual_network([4, 8]).double()
    x, y = batch()
    named = dict(other.named_parameters())
    closure = lambda: F.cross_entropy(functional_call(model, named, (x,)), y)  # noqa: E731
    generator = torch.Generator().manual_seed(3)
    found = factor_gradients(
        model, closure, threat_model=BALL, gradient_source=SOURCE, parameters=tuple(named.values()), generator=generator
    )
    expected = streams(other, x, y)
    for a, b in zip((*found.gradients, *found.second_gradients), (*expected.gradients, *expected[2]), strict=True):
        torch.testing.assert_close(a, b)


class Noisy(nn.Module):
    """Dropout and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.usefixtures("no_noise")
def test_random_numbers_and_running_statistics_are_those_of_one_pass(seen: list[tangent.Tangents]) -> None:
    torch.manual_seed(0)
    model, plain = Noisy().double(), Noisy().double()
    plain.load_state_dict(model.state_dict())
    x, y = batch()
    torch.manual_seed(7)
    plain(x)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    with record_factors(model, threat_model=BALL, gradient_source=SOURCE, generator=torch.Generator()) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    assert torch.equal(torch.get_rng_state(), after)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert cast("Tensor", dict(model.named_buffers())["layers.2.num_batches_tracked"]) == 1
    last = next(call for call in seen[0].inputs if call.weight.shape == (10, 32))
    assert torch.equal(last.inputs == 0, seen[0].inputs[last] == 0), "the same units are dropped"
    assert (last.inputs == 0).double().mean() > 0.4


def test_second_derivatives_are_exact() -> None:
    """Directional derivative of <h, v> along a parameter direction equals central differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Softplus(), nn.Linear(6, 10)).double()
    x, y = batch()
    inside = ThreatModel(epsilon=0.1, lower=-5.0, upper=5.0)
    probes = [torch.randn_like(p) for p in model.parameters()]
    direction = [torch.randn_like(p) for p in model.parameters()]

    def value(moved: nn.Module, *, create_graph: bool = False) -> Tensor:
        found = factor_gradients(
            moved, lambda: F.cross_entropy(moved(x), y), threat_model=inside, gradient_source=SOURCE, create_graph=create_graph,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        return sum(((h * v).sum() for h, v in zip(found.second_gradients, probes, strict=True)), torch.zeros(()))

    def at(size: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, v in zip(moved.parameters(), direction, strict=True):
                p.add_(v, alpha=size)
        return value(moved).item()

    gradients = torch.autograd.grad(value(model, create_graph=True), list(model.parameters()), allow_unused=True)
    slope = sum(float((g * v).sum()) for g, v in zip(gradients, direction, strict=True) if g is not None)
    assert slope == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-4)


def test_noise_comes_from_the_generator_and_leaves_the_users_tensor_alone() -> None:
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    x, y = batch()
    before = x.clone()
    _, g, h = streams(model, x, y)
    _, same_g, same_h = streams(model, x, y)
    _, other_g, _ = streams(model, x, y, seed=4)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(torch.equal(a, b) for a, b in zip((*g, *h), (*same_g, *same_h), strict=True))
    assert not torch.equal(g[0], other_g[0])
    read: list[Tensor] = []
    hook = model[1].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    streams(model, x, y)
    hook.remove()
    noisy, again = (t.reshape(x.shape) for t in read)
    wide = tangent.NOISE * BALL.epsilon
    assert ((noisy - x).abs() <= wide + 1e-12).all()
    assert (noisy - x).abs().max() > 0.8 * wide
    assert ((noisy >= 0) & (noisy <= 1)).all()
    step = tangent.step_of(torch.float64, x.device)
    assert (again - noisy).abs().max() <= 1.01 * step * tangent.REACH * BALL.epsilon, "no adversarial example is formed"
    assert step < 1e-6


@pytest.mark.parametrize("rule", [InterpretableOptimizer, LSTMOptimizer])
def test_a_learned_rule_trains_with_it_and_counts_its_passes(rule: Any) -> None:
    torch.manual_seed(0)
    made = rule(gradient_source=SOURCE)
    assert made.passes_per_step == pytest.approx(4 / 3 if rule is InterpretableOptimizer else 5 / 3)
    made.shift_factor_coefficients(first=1.0, others=1.0)
    ends = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = cnn([3, 4])
        x, y = batch(16)
        optimizer = made.torch_optimizer(model.parameters(), total_steps=3)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.record_factors(model, threat_model=BALL, generator=generator) as recorder:
                recorder.backward(F.cross_entropy(model(x.float()), y))
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert ends[0].isfinite().all()


def test_half_precision_takes_the_whole_move(seen: list[tangent.Tangents]) -> None:
    torch.manual_seed(0)
    model = cnn([3, 4])
    x, y = batch()
    x = x.float()
    exact = streams(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = streams(model, x, y)
    assert [found.step for found in seen] == [pytest.approx(0.0086, rel=0.01), 1.0]
    for a, b in zip(exact.second_gradients, rough.second_gradients, strict=True):
        assert b.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.95
    lower = copy.deepcopy(model).bfloat16()
    _, g, h = streams(lower, x.bfloat16(), y)
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in (*g, *h))


def test_a_compiled_model_runs_eagerly_while_it_is_watched() -> None:
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    compiled = cast("nn.Module", torch.compile(model, backend="eager"))
    x, y = batch()
    for a, b in zip(streams(compiled, x, y)[2], streams(model, x, y)[2], strict=True):
        torch.testing.assert_close(a, b)


class Fickle(nn.Module):
    """Leaves a layer out when it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.maybe, self.last = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        a = self.first(x.flatten(1))
        return self.last(self.maybe(a) if self.calls % 2 else a)


class Spoiling(nn.Module):
    """Writes into what a layer has read, in evaluation of the second pass alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x.flatten(1)).sigmoid()
        z = self.last(a)
        if not torch.is_grad_enabled():
            a += random.random()
        return z


def test_errors_say_what_to_write() -> None:
    x, y = batch()
    model = mlp([64, 5, 10]).double()
    with pytest.raises(ValueError, match=r"write model\(x\)"):
        factor_gradients(model, lambda: F.cross_entropy(model(input=x), y), threat_model=BALL, gradient_source=SOURCE)
    with pytest.raises(ValueError, match=r"in the box \[0, 1\], got values in"):
        factor_gradients(model, lambda: F.cross_entropy(model(3 * x), y), threat_model=BALL, gradient_source=SOURCE)
    with pytest.raises(TypeError, match="floating-point"):
        factor_gradients(model, lambda: F.cross_entropy(model((255 * x).long()), y), threat_model=BALL, gradient_source=SOURCE)
    fickle = Fickle().double()
    with pytest.raises(ValueError, match="calls the same layers in the same order"):
        streams(fickle, x, y)
    with pytest.raises(ValueError, match="out of place"):
        streams(Spoiling().double(), x, y)
    with pytest.raises(ValueError, match="call the model itself inside the block"):
        factor_gradients(model, lambda: F.cross_entropy(model[3](model[1](x.flatten(1)).relu()), y), gradient_source=SOURCE)


def test_after_an_error_in_the_second_pass_everything_is_as_before() -> None:
    torch.manual_seed(0)
    model = Noisy().double()
    x, y = batch()
    calls = [0]

    def fail(module: nn.Module, args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("on purpose")

    hook = model.layers[5].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        streams(model, x, y)
    hook.remove()
    assert cast("Tensor", dict(model.named_buffers())["layers.2.num_batches_tracked"]) == 1
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    model.eval()
    assert all(t.isfinite().all() for t in streams(model, x, y)[2])

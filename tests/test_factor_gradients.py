"""Factor gradients: exact against short references, on every layer kind, in every calling style."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarobust.meta_optimizers import factor_gradients, record_factors
from metarobust.models import Normalize, cnn, mlp, residual_network, stack
from metarobust.threat_models import ThreatModel

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)


def batch(size: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 1, 8, 8, generator=generator, dtype=dtype), torch.randint(10, (size,), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_layer_perceptron_equals_the_formula_written_out(norm: str) -> None:
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    x, y = batch()
    threat_model = ThreatModel(norm=norm, epsilon=0.1)
    loss, g, h = factor_gradients(model, lambda: loss_of(model, x, y), threat_model=threat_model)

    w1, b1, w2, b2 = model.parameters()
    a1 = x.flatten(1).requires_grad_()
    z1 = a1 @ w1.T + b1
    a2 = z1.relu()
    z2 = a2 @ w2.T + b2
    d1, d2, da1, da2 = torch.autograd.grad(F.cross_entropy(z2, y), (z1, z2, a1, a2))
    if norm == "linf":
        e1 = (a1 + 0.1 * da1.sign()).clamp(0, 1) - a1
        e2 = a2.abs().mean() * da2.sign()
    else:
        e1 = (a1 + 0.1 * da1 / da1.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(0, 1) - a1
        e2 = a2.norm(dim=1).mean() * da2 / da2.norm(dim=1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(loss, F.cross_entropy(z2, y))
    z2 = (a1 @ w1.T + b1).relu() @ w2.T + b2
    for found, expected in zip(g, torch.autograd.grad(F.cross_entropy(z2, y), (w1, b1, w2, b2)), strict=False):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(h[0], d1.T @ e1)
    torch.testing.assert_close(h[2], d2.T @ e2)
    assert not h[1].any()
    assert not h[3].any()


def test_first_layer_is_the_derivative_of_the_dual_norm_penalty() -> None:
    """Away from the box, h_1 = d/dW_1 of epsilon * ||dL/dx||_1 at fixed output gradient (section 4.7 of the derivation)."""
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    x, y = batch()
    inside = ThreatModel(norm="linf", epsilon=0.1, lower=-5.0, upper=5.0)
    h = factor_gradients(model, lambda: loss_of(model, x, y), threat_model=inside).second_gradients[0]
    weight = next(model.parameters())
    z1 = (x.flatten(1) @ weight.T + list(model.parameters())[1]).detach().requires_grad_()
    (d1,) = torch.autograd.grad(F.cross_entropy(model[3](z1.relu()), y), z1)
    penalty = 0.1 * (d1 @ weight).abs().sum()
    (expected,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(h, expected)


LAYERS = {
    "conv2d": lambda: nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2)),
    "dilated": lambda: nn.Sequential(nn.Conv2d(1, 3, 3, dilation=2, bias=False), nn.Tanh(), nn.Conv2d(3, 2, 2)),
    "same": lambda: nn.Sequential(
        nn.Conv2d(1, 3, (5, 3), dilation=(1, 2), padding="same"), nn.Tanh(), nn.Conv2d(3, 2, 3, padding="valid")
    ),
    "reflect": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"),
    ),
    "conv1d": lambda: nn.Sequential(nn.Flatten(1, 2), nn.Conv1d(8, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 3, stride=2)),
    "linear over positions": lambda: nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_kind_against_a_rerun_of_the_layer(kind: str) -> None:
    """The reference forms the perturbed input and lets autograd find the weight gradient at the recorded output gradient."""
    torch.manual_seed(0)
    model = LAYERS[kind]().double()
    x, _ = batch(5)
    _, g, h = factor_gradients(model, lambda: model(x).square().mean(), threat_model=THREAT_MODEL)
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    named = dict(zip([id(p) for p in model.parameters()], h, strict=True))
    inputs, outputs, value = [], [], x.clone().requires_grad_()
    for module in model:
        if module in layers:
            inputs.append(value)
            value = module(value)
            outputs.append(value)
        else:
            value = module(value)
    found = torch.autograd.grad(value.square().mean(), [*inputs, *outputs, *model.parameters()])
    for gradient, expected in zip(g, found[2 * len(layers) :], strict=True):
        torch.testing.assert_close(gradient, expected)
    for i, layer in enumerate(layers):
        a, da, d = inputs[i].detach(), found[i], found[len(layers) + i]
        e = (a + 0.1 * da.sign()).clamp(0, 1) - a if i == 0 else a.abs().mean() * da.sign()
        (expected,) = torch.autograd.grad(layer(e), layer.weight, d)
        torch.testing.assert_close(named[id(layer.weight)], expected)


def test_normalize_in_front_perturbs_in_input_units() -> None:
    torch.manual_seed(0)
    plain = mlp([64, 5, 10]).double()
    scaled = copy.deepcopy(plain)
    with torch.no_grad():  # absorb the normalisation into the first layer: same function, same worst case
        scaled[1].weight.copy_(plain[1].weight / 0.3)
        scaled[1].bias.copy_(plain[1].bias - (plain[1].weight * 0.4 / 0.3).sum(1))
    model = nn.Sequential(Normalize(mean=[0.4], std=[0.3]), plain).double()
    x, y = batch()
    threat = ThreatModel(epsilon=0.2)
    h = factor_gradients(model, lambda: loss_of(model, x, y), threat_model=threat).second_gradients
    expected = factor_gradients(scaled, lambda: loss_of(scaled, x, y), threat_model=threat).second_gradients
    torch.testing.assert_close(h[0], expected[0] / 0.3, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(h[2], expected[2], rtol=1e-5, atol=1e-8)


def test_in_place_activation_changes_nothing() -> None:
    torch.manual_seed(0)
    model = cnn([3, 4]).double()
    in_place = copy.deepcopy(model)
    in_place[1], in_place[3] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    x, y = batch()
    for found, expected in zip(
        factor_gradients(in_place, lambda: loss_of(in_place, x, y)),
        factor_gradients(model, lambda: loss_of(model, x, y)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_branches_see_the_whole_gradient_of_the_tensor_they_share() -> None:
    """The first convolution of a residual block and its shortcut read one tensor; its worst case is that of both paths."""
    torch.manual_seed(0)
    model = residual_network([4, 8]).double()
    x, y = torch.rand(3, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
    _, g, h = factor_gradients(model, lambda: loss_of(model, x, y), threat_model=THREAT_MODEL)
    named = dict(zip((name for name, _ in model.named_parameters()), h, strict=True))
    block = model.blocks[0]
    shared = model.norm(model.convolution(x)).relu().detach().requires_grad_()
    d = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: d.__setitem__(name, out))
        for name, layer in (("convolution_1", block.convolution_1), ("shortcut", block.shortcut))
    ]
    loss = F.cross_entropy(model.linear(block(shared).mean((2, 3))), y)
    for hook in hooks:
        hook.remove()
    whole, *outputs = torch.autograd.grad(loss, [shared, *d.values()])
    e = shared.detach().abs().mean() * whole.sign()
    for (name, _), output in zip(d.items(), outputs, strict=True):
        layer = getattr(block, name)
        (expected,) = torch.autograd.grad(layer(e), layer.weight, output)
        torch.testing.assert_close(named[f"blocks.0.{name}.weight"], expected)
    assert not named["norm.weight"].any(), "gains get no term"
    assert all(gradient.isfinite().all() for gradient in g)


def test_a_shared_layer_sums_its_calls() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.rand(6, 4, dtype=torch.float64)
    _, g, h = factor_gradients(model, lambda: model(x).square().sum(), threat_model=THREAT_MODEL)
    a1 = x.clone().requires_grad_()
    z1 = layer(a1)
    a2 = z1.tanh()
    z2 = layer(a2)
    d1, d2, da1, da2 = torch.autograd.grad(z2.square().sum(), (z1, z2, a1, a2))
    e1, e2 = (x + 0.1 * da1.sign()).clamp(0, 1) - x, a2.abs().mean() * da2.sign()
    torch.testing.assert_close(h[0], d1.T @ e1 + d2.T @ e2)
    torch.testing.assert_close(g[0], d1.T @ x + d2.T @ a2)


def test_stack_equals_one_by_one() -> None:
    torch.manual_seed(0)
    models = [cnn([3, 4]).double() for _ in range(3)]
    stacked = stack(models)
    x, y = batch(12)
    per_copy = F.cross_entropy(stacked(x), y, reduction="none").reshape(3, 4).mean(1)
    assert per_copy.shape == (3,)
    found = factor_gradients(
        stacked,
        lambda: F.cross_entropy(stacked(x), y, reduction="none").reshape(3, 4).mean(1).sum(),
        threat_model=THREAT_MODEL,
    )
    for i, model in enumerate(models):
        rows, targets = x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]
        one = factor_gradients(model, lambda m=model, r=rows, t=targets: loss_of(m, r, t), threat_model=THREAT_MODEL)
        for together, alone in zip(found.gradients, one.gradients, strict=True):
            torch.testing.assert_close(together[i], alone)
        for together, alone in zip(found.second_gradients, one.second_gradients, strict=True):
            torch.testing.assert_close(together[i], alone)


def test_functional_call_and_create_graph_give_exact_second_derivatives() -> None:
    """Directional derivative of <h, r> + <g, r> along a parameter direction equals central differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Softplus(), nn.Linear(6, 10)).double()
    x, y = batch()
    names = [name for name, _ in model.named_parameters()]
    start = tuple(p.detach().clone() for p in model.parameters())
    probe = tuple(torch.randn_like(p) for p in start)
    direction = tuple(torch.randn_like(p) for p in start)

    def value(parameters: tuple[Tensor, ...], *, create_graph: bool) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        _, g, h = factor_gradients(
            model,
            lambda: loss_of(lambda v: functional_call(model, named, (v,)), x, y),
            threat_model=THREAT_MODEL,
            parameters=parameters,
            create_graph=create_graph,
        )
        return sum(((a + 3 * b) * r).sum() for a, b, r in zip(g, h, probe, strict=True))  # type: ignore[return-value]

    leaves = tuple(p.clone().requires_grad_() for p in start)
    slopes = torch.autograd.grad(value(leaves, create_graph=True), leaves)
    found = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
    step = 1e-6
    ends = [
        value(
            tuple((p + sign * step * d).requires_grad_() for p, d in zip(start, direction, strict=True)),
            create_graph=False,
        )
        for sign in (1, -1)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]).detach() / (2 * step), rtol=1e-6, atol=1e-8)


def test_recorder_fills_both_streams_accumulates_and_leaves_no_hooks() -> None:
    torch.manual_seed(0)
    model = mlp([64, 5, 10]).double()
    x, y = batch()
    _, g, h = factor_gradients(model, lambda: loss_of(model, x, y), threat_model=THREAT_MODEL)
    for _ in range(2):
        with record_factors(model, threat_model=THREAT_MODEL) as recorder:
            recorder.backward(loss_of(model, x, y))
    for p, gradient, perturbed in zip(model.parameters(), g, h, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)
        torch.testing.assert_close(p.second_grad, 2 * perturbed)  # type: ignore[attr-defined]
    model.zero_grad()
    with record_factors(model, threat_model=THREAT_MODEL) as recorder:
        recorder.backward(loss_of(model, x, y))
    for p, perturbed in zip(model.parameters(), h, strict=True):
        torch.testing.assert_close(p.second_grad, perturbed)  # type: ignore[attr-defined]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_frozen_layers_and_batch_of_one() -> None:
    model = mlp([64, 5, 10]).double()
    model[1].requires_grad_(False)
    x, y = batch(1)
    _, g, h = factor_gradients(model, lambda: loss_of(model, x, y))
    assert [tuple(t.shape) for t in g] == [tuple(t.shape) for t in h] == [(10, 5), (10,)]


def test_errors_say_what_to_write() -> None:
    model = mlp([64, 5, 10]).double()
    x, y = batch()
    with pytest.raises(ValueError, match=r"loss must be a scalar.*write loss.mean\(\)"):
        factor_gradients(model, lambda: F.cross_entropy(model(x), y, reduction="none"))
    with pytest.raises(ValueError, match="call the model inside the block"):
        factor_gradients(model, lambda: next(model.parameters()).sum())
    with pytest.raises(ValueError, match="'linf' or 'l2' for factor gradients"):
        factor_gradients(model, lambda: loss_of(model, x, y), threat_model=ThreatModel(norm="l1"))


def test_first_layer_outside_the_box_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp([64, 5, 10]).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x - 0.5) / 0.25)

    model, (x, y) = Scaled(), batch()
    with pytest.raises(ValueError, match="metarobust.models.Normalize"):
        factor_gradients(model, lambda: loss_of(model, x, y), threat_model=THREAT_MODEL)


def test_normalize_counts_only_for_layers_that_read_it() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Normalize(mean=[0.4], std=[0.3]).double()
            self.a, self.b = mlp([64, 10]).double(), mlp([64, 10]).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.norm(x)) + self.b(x)

    torch.manual_seed(0)
    model, (x, y) = Two(), batch()
    found = factor_gradients(model, lambda: loss_of(model, x, y), threat_model=THREAT_MODEL).second_gradients[2]
    rows = x.flatten(1).requires_grad_()
    logits = model.a(model.norm(x)) + rows @ model.b[1].weight.T + model.b[1].bias
    d, da = torch.autograd.grad(F.cross_entropy(logits, y), (logits, rows))
    torch.testing.assert_close(found, d.T @ ((rows + 0.1 * da.sign()).clamp(0, 1) - rows))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_second_stream_starts_afresh_after_any_zero_grad(set_to_none: bool) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp([64, 5, 10]).double(), batch()
    expected = factor_gradients(model, lambda: loss_of(model, x, y), threat_model=THREAT_MODEL).second_gradients
    for _ in range(3):
        model.zero_grad(set_to_none=set_to_none)
        with record_factors(model, threat_model=THREAT_MODEL) as recorder:
            recorder.backward(loss_of(model, x, y))
    for p, h in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.second_grad, h)  # type: ignore[attr-defined]


def test_autocast_forward() -> None:
    torch.manual_seed(0)
    model, (x, y) = cnn([3, 4]), batch(dtype=torch.float32)
    exact = factor_gradients(model, lambda: loss_of(model, x, y), threat_model=THREAT_MODEL)
    with record_factors(model, threat_model=THREAT_MODEL) as recorder:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, x, y)
        found = recorder.gradients(loss)
    assert all(h.dtype == torch.float32 for h in found.second_gradients)
    difference = (found.second_gradients[0] - exact.second_gradients[0]).norm()
    assert difference < 0.3 * exact.second_gradients[0].norm()

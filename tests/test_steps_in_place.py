"""Steps that a deployed rule takes in place, beside the differentiable ones that define it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metarobust.meta_optimizers import InterpretableOptimizer, LSTMOptimizer, _lstm_in_place
from metarobust.meta_optimizers._kinds import MetaOptimizer
from metarobust.meta_optimizers._layout import layout_of
from metarobust.types import Streams

SHAPES = ((4, 3), (4,), (5, 4), (2, 5))
SOURCES = ("gradient", "gradient+perturbed_factors")
KINDS: dict[str, Callable[..., MetaOptimizer]] = {
    "interpretable": InterpretableOptimizer,
    "lstm": LSTMOptimizer,
    "lstm of two layers": lambda **settings: LSTMOptimizer(layers=2, hidden_size=3, **settings),
}


def made(kind: str, source: str) -> MetaOptimizer:
    """A rule in float64 whose stored coefficients are random."""
    rule = KINDS[kind](gradient_source=source).double()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return rule


def start() -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES)


def streams(params: tuple[Tensor, ...], step: int) -> Streams:
    """Gradients of very different sizes; some are zero in every step, one is beyond what a square holds in float32."""
    g = [torch.sin(params[0].mean() + step + (i + 1) * p) * 10.0 ** (2 - 3 * i) for i, p in enumerate(params)]
    g[0][0], g[2][1, 1] = 0.0, 1e20
    return Streams(tuple(g), tuple(torch.cos(3 * p + step) for p in params))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [7, 8192])
def test_they_equal_the_transformation(monkeypatch: pytest.MonkeyPatch, kind: str, source: str, chunk: int) -> None:
    monkeypatch.setattr(_lstm_in_place, "CHUNK", chunk)
    rule = made(kind, source)
    transformation = rule.as_gradient_transformation(total_steps=6)
    params, state = start(), transformation.init(start())
    mine = [p.clone() for p in params]
    assert rule.steps_in_place(mine)
    layout = layout_of(tuple(p.shape for p in params), False)
    own = rule.initial_state(layout.pack(params))
    for step in range(6):
        found = streams(params, step)
        moves, state = transformation.update(found if rule.two_streams else found.gradients, state, params=params)
        params = tuple(p + 0.5 * move.detach() for p, move in zip(params, moves, strict=True))
        kept = [g.clone() for g in found.gradients]
        seconds = found.second_gradients if rule.two_streams else None
        own = rule.step_in_place(mine, found.gradients, seconds, own, layout, total_steps=6, lr=0.5)
        assert all(torch.equal(a, b) for a, b in zip(kept, found.gradients, strict=True)), "gradients are the user's"
        for a, b in zip(mine, params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for (name, a), b in zip(own.to_dict().items(), state.to_dict().values(), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b.detach(), msg=lambda told, name=name: f"{name}: {told}")
    assert int(own.step) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_comes_back_to_a_model_of_half_precision(kind: str) -> None:
    rule = made(kind, "gradient").float()
    model = nn.Linear(4, 3).to(torch.bfloat16)
    first = rule.torch_optimizer(model.parameters(), total_steps=6)
    second = rule.torch_optimizer(model.parameters(), total_steps=6)
    for optimizer in (first, second):
        optimizer.zero_grad()
        model(torch.rand(5, 4, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        second.load_state_dict(optimizer.state_dict())
    second.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_scattered_in_memory_takes_the_same_steps(kind: str) -> None:
    rule = made(kind, "gradient")
    together, apart = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    apart.weight = nn.Parameter(together.weight.detach().T.contiguous().T)
    apart.bias.data.copy_(together.bias.data)
    assert not apart.weight.is_contiguous()
    x = torch.rand(5, 4, dtype=torch.float64)
    for model in (together, apart):
        optimizer = rule.torch_optimizer(model.parameters(), total_steps=6)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(together.weight, apart.weight)
    torch.testing.assert_close(together.bias, apart.bias)
    assert together.weight.grad is not None
    assert together.weight.grad.abs().max() > 0

"""Takes steps with the GPU kernels of the LSTM rule under Triton's interpreter, beside the steps of the differentiable rule.

Started by tests as ``TRITON_INTERPRET=1 python lstm_kernels_interpreted.py``; prints the largest differences as JSON.
"""

import json
import warnings

import numpy as np
import torch
from torch import Tensor

from metarobust.meta_optimizers import LSTMOptimizer
from metarobust.meta_optimizers._layout import layout_of
from metarobust.meta_optimizers._lstm_fused import lstm_step_fused
from metarobust.types import Streams

SHAPES = ((20, 15), (4,), (5, 4), (2, 5))
"""The first takes three programs of 128 coordinates, the last of them not full."""
STEPS = 3


def made(source: str, units: int, layers: int) -> tuple[LSTMOptimizer, LSTMOptimizer]:
    """The same rule with random coefficients, in float32 and in float64."""
    rule = LSTMOptimizer(gradient_source=source, hidden_size=units, layers=layers, initial_learning_rate=0.2)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=draw))
    exact = LSTMOptimizer(gradient_source=source, hidden_size=units, layers=layers, initial_learning_rate=0.2).double()
    exact.load_state_dict(rule.state_dict())
    return rule, exact


def streams(draw: torch.Generator) -> Streams:
    """Gradients of very different sizes; a row of zeros, one beyond what a square holds in float32."""
    g = [torch.randn(shape, generator=draw) * 10.0 ** (2 - 3 * i) for i, shape in enumerate(SHAPES)]
    g[0][0], g[2][1, 1] = 0.0, 1e20
    return Streams(tuple(g), tuple(torch.randn(shape, generator=draw) for shape in SHAPES))


def largest(a: Tensor, b: Tensor) -> float:
    """Difference, relative above one."""
    return ((a - b).abs() / b.abs().clamp(min=1)).max().item()


def differences(source: str, units: int, layers: int) -> dict[str, float]:
    draw = torch.Generator().manual_seed(3)
    rule, exact = made(source, units, layers)
    own = [torch.randn(shape, generator=draw) for shape in SHAPES]
    began = [p.clone() for p in own]
    params = tuple(p.double() for p in own)
    layout = layout_of(tuple(p.shape for p in own), False)
    state = rule.initial_state(layout.pack(own))
    transformation = exact.as_gradient_transformation(total_steps=STEPS - 1)
    expected = transformation.init(params)
    for step in range(STEPS):
        found = streams(draw)
        second = list(found.second_gradients)
        if step == 1:  # what is combined already has no second stream
            second[1] = torch.zeros_like(second[1])
        doubled = Streams(tuple(g.double() for g in found.gradients), tuple(h.double() for h in second))
        updates = doubled if rule.two_streams else doubled.gradients
        moves, expected = transformation.update(updates, expected, params=params)
        params = tuple(p + 0.5 * move.detach() for p, move in zip(params, moves, strict=True))
        told = [None if step == 1 and i == 1 else h for i, h in enumerate(second)] if rule.two_streams else None
        state = lstm_step_fused(rule, own, found.gradients, told, state, layout, total_steps=STEPS - 1, lr=0.5)
    assert int(state.step) == STEPS
    found_states = {name: value for name, value in state.to_dict().items() if value is not None and name != "step"}
    ends = expected.to_dict()
    return {
        "moved": max((a - b).abs().max().item() for a, b in zip(own, began, strict=True)),
        "parameters": max(largest(a.double(), b) for a, b in zip(own, params, strict=True)),
        **{name: largest(value.double(), ends[name]) for name, value in found_states.items()},
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # numpy's of an exponential that overflows in a sigmoid, which is right
    np.seterr(all="ignore")
    cases = [(source, 8, 1) for source in ("gradient", "gradient+adversarial_tangent")] + [("gradient+adversarial_tangent", 3, 2)]
    print(
        json.dumps(
            {f"{source}, {units} units, {layers} layers": differences(source, units, layers) for source, units, layers in cases}
        )
    )

"""A step of the LSTM rule on a CPU, without a graph: in place, and a few thousand coordinates at a time.

The passes over memory that the differentiable step makes, some sixty over every coordinate, then stay in the cache. What is
the same for all coordinates of a tensor, its role, fan-in, statistics and the time, goes into the bias of the gates.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from metarobust.meta_optimizers._features import FAST, SECOND, SLOW, TINY, dynamic_count, time_basis
from metarobust.meta_optimizers._layout import ROLES, Layout
from metarobust.meta_optimizers._update_rule import COEFFICIENT_SPEED, LARGEST

if TYPE_CHECKING:
    from metarobust.meta_optimizers._lstm import LSTMOptimizer, LSTMState

CHUNK = 16384
"""Coordinates at a time: few enough for the buffers to stay in a cache, enough for the calls not to count."""
BY_COORDINATE = (0, 1, 2, 3, 4, 5, 6, 7, 10, 11)
"""Of the rows of ``dynamic_rows``, those that differ within a tensor; the last two with two streams only."""
BY_TENSOR = (8, 9, 12)


class Coefficients(NamedTuple):
    """What one step takes from the time and from a tensor's role, ``[roles]`` each, and the bias ``[gates]``."""

    bias: Tensor
    log_rate: Tensor
    factor: Tensor | None


class Tensors(NamedTuple):
    """Flat views of one parameter tensor, its streams, and the rows of the state that belong to it."""

    parameter: Tensor
    g: Tensor
    h: Tensor | None
    moments: list[Tensor]
    hidden: Tensor
    cell: Tensor


@torch.no_grad()
def lstm_step_in_place(
    rule: "LSTMOptimizer",
    parameters: Sequence[Tensor],
    g: Sequence[Tensor],
    h: Sequence[Tensor | None] | None,
    state: "LSTMState",
    layout: Layout,
    *,
    total_steps: int,
    lr: float,
) -> "LSTMState":
    """`LSTMOptimizer.step` times ``lr``, written into ``parameters`` and into the tensors of ``state``."""
    step = int(state.step) + 1
    basis = time_basis(step, total_steps, rule.bias)
    assert rule.time_weight is not None
    assert rule.log_learning_rate is not None
    common = Coefficients(
        rule.bias[0] + rule.time_weight @ basis,
        rule.log_learning_rate @ basis + math.log(rule.initial_learning_rate),
        None if rule.factor_coefficient is None else COEFFICIENT_SPEED * (rule.factor_coefficient @ basis),
    )
    rows = [m.view(-1).split(layout.sizes) for m in state.moments if m is not None]
    begin = 0
    for number, (p, role) in enumerate(zip(parameters, layout.roles, strict=True)):
        span = slice(begin, begin + p.numel())
        tensors = Tensors(
            p.view(-1),
            g[number].reshape(-1),
            None if h is None else _flat_or_zero(h[number], p),
            [row[number] for row in rows],
            state.hidden[:, :, span],
            state.cell[:, :, span],
        )
        _step_tensor(rule, tensors, role, common, step, lr)
        begin = span.stop
    return state._replace(step=state.step + 1)


def _step_tensor(
    rule: "LSTMOptimizer", tensors: Tensors, role: tuple[int, int], common: Coefficients, step: int, lr: float
) -> None:
    place, fan_in = role
    size = math.sqrt(fan_in)
    weights = _weights(rule, tensors, place, fan_in, common.bias)
    log_rate = common.log_rate[place].item()
    factor = None if common.factor is None else common.factor[place].item()
    first, slow, second = 1 - FAST**step, 1 - SLOW**step, 1 - SECOND**step
    for part in _chunks(tensors):
        p, g, h = part.parameter, part.g.clamp(-LARGEST, LARGEST), None if part.h is None else part.h.clamp(-LARGEST, LARGEST)
        m_g, m_slow, v_g, *others = part.moments
        m_g.lerp_(g, 1 - FAST)
        m_slow.lerp_(g, 1 - SLOW)
        v_g.mul_(SECOND).addcmul_(g, g, value=1 - SECOND)
        inputs = p.new_empty(weights[0].shape[1], len(p))
        torch.abs(g, out=inputs[0]).clamp_(min=math.exp(-10)).log_().div_(10)
        torch.mul(g, math.exp(10), out=inputs[1]).clamp_(-1, 1)
        scale = torch.div(v_g, second).add_(TINY).sqrt_()
        torch.div(g, scale, out=inputs[2])
        torch.div(m_g, scale, out=inputs[3]).div_(first)
        torch.div(m_slow, scale, out=inputs[4]).div_(slow)
        inputs[2:5].clamp_(-5, 5)
        torch.clamp(scale, min=1e-10, out=inputs[5]).log_().div_(10)
        torch.mul(p, size, out=inputs[6])
        torch.mul(inputs[6], 3, out=inputs[7]).tanh_()
        if h is not None:
            m_h, v_gh, v_h = others
            m_h.lerp_(h, 1 - FAST)
            v_gh.mul_(SECOND).addcmul_(g, h, value=1 - SECOND)
            v_h.mul_(SECOND).addcmul_(h, h, value=1 - SECOND)
            scale = torch.div(v_h, second, out=scale).add_(TINY).sqrt_()
            torch.div(h, scale, out=inputs[8])
            torch.div(m_h, scale, out=inputs[9]).div_(first)
            inputs[8:10].clamp_(-5, 5)
        outputs = rule.readout @ _cells(weights, inputs, part)
        rate = outputs[0].add_(log_rate).exp_()
        if h is None:
            direction, square = m_g / first, v_g / second
        else:
            m_h, v_gh, v_h = others
            coefficient = outputs[2].add_(cast("float", factor))
            direction = torch.addcmul(m_g, coefficient, m_h).div_(first)
            square = torch.mul(v_h, coefficient).add_(v_gh, alpha=2).mul_(coefficient).add_(v_g).div_(second)
        direction.div_(square.clamp_(min=0).add_(TINY).sqrt_().add_(1e-8))
        p.add_(outputs[1], alpha=lr * rule.output_scale).addcmul_(rate, direction, value=-lr)


def _chunks(tensors: Tensors) -> Iterator[Tensors]:
    for begin in range(0, len(tensors.parameter), CHUNK):
        span = slice(begin, begin + CHUNK)
        yield Tensors(
            tensors.parameter[span],
            tensors.g[span],
            None if tensors.h is None else tensors.h[span],
            [row[span] for row in tensors.moments],
            tensors.hidden[:, :, span],
            tensors.cell[:, :, span],
        )


def _weights(rule: "LSTMOptimizer", tensors: Tensors, role: int, fan_in: int, bias: Tensor) -> list[Tensor]:
    """Of each cell, one matrix for inputs, hidden units and a row of ones."""
    g_size = _mean_square(tensors.g) + 1e-20
    told = [math.log(_mean_square(tensors.parameter) * fan_in + 1e-10) / 4, math.log(g_size) / 20]
    if tensors.h is not None:
        told.append(max(-5.0, min(5.0, math.log((_mean_square(tensors.h) + 1e-20) / g_size) / 4)))
    dynamic = dynamic_count("full", two_streams=tensors.h is not None)
    columns = rule.input_weight[:, dynamic : dynamic + len(ROLES) + 1]
    bias = bias + columns[:, role] + columns[:, -1] * (math.log(fan_in) / 5)
    for column, value in zip(BY_TENSOR, told, strict=False):  # the third with two streams only
        bias = bias + rule.input_weight[:, column] * value
    kept = rule.input_weight[:, list(BY_COORDINATE if tensors.h is not None else BY_COORDINATE[:8])]
    weights = [torch.cat([kept, rule.recurrent_weight[0], bias[:, None]], dim=1)]
    for layer in range(1, rule.layers):
        between = cast("Tensor", rule.between_weight)[layer - 1]
        weights.append(torch.cat([between, rule.recurrent_weight[layer], rule.bias[layer][:, None]], dim=1))
    return weights


def _flat_or_zero(second: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p).view(-1) if second is None else second.reshape(-1)


def _mean_square(values: Tensor) -> float:
    norm = torch.linalg.vector_norm(values).item()
    if not norm < LARGEST:  # as the step reads them; only here is a copy worth making
        norm = torch.linalg.vector_norm(values.clamp(-LARGEST, LARGEST)).item()
    return norm**2 / max(1, len(values))


def _cells(weights: list[Tensor], inputs: Tensor, part: Tensors) -> Tensor:
    """All cells once, hidden and cell states written where they are; the hidden units of the last."""
    units = part.hidden.shape[1]
    below = inputs
    for layer, weight in enumerate(weights):
        if layer:
            inputs = torch.cat([below, part.hidden[layer], torch.ones_like(below[:1])])
        else:
            inputs[-1 - units : -1] = part.hidden[0]
            inputs[-1] = 1
        hidden, cell = part.hidden[layer], part.cell[layer]
        gates = weight @ inputs
        openings, candidate = gates.split([3 * units, units])
        enter, keep, leave = openings.sigmoid_().split(units)
        cell.mul_(keep).addcmul_(enter, candidate.tanh_())
        below = torch.tanh(cell, out=candidate).mul_(leave)
        hidden.copy_(below)
    return below

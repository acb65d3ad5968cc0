"""A step of the LSTM rule on a GPU, without a graph: three kernels for all tensors; the state is read and written once.

As on a CPU, what is the same for all coordinates of a tensor goes into the bias of its gates.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from metarobust.meta_optimizers import _lstm_kernels as kernels
from metarobust.meta_optimizers._features import FAST, SECOND, SLOW, dynamic_count, legendre
from metarobust.meta_optimizers._layout import Layout, layout_of

if TYPE_CHECKING:
    from metarobust.meta_optimizers._lstm import LSTMOptimizer, LSTMState

MOST_UNITS = 32
"""More hidden units than this do not fit the registers of a program."""

_TRIED: dict[tuple[torch.device, int, int, bool], bool] = {}


class Plan(NamedTuple):
    """Where the blocks of a layout lie, on the device.

    Attributes:
        owner: ``[blocks]``, tensor of each block.
        begin: ``[blocks]``, its first coordinate within the tensor.
        sizes, rows, roles, fan_in: ``[tensors]``; ``rows`` is the first coordinate of a tensor among all.
        first_block: ``[tensors + 1]``.
    """

    owner: Tensor
    begin: Tensor
    sizes: Tensor
    rows: Tensor
    roles: Tensor
    fan_in: Tensor
    first_block: Tensor


def block_of(units: int) -> int:
    """Coordinates of one program, which never cross a tensor's end: the gates of all fit its registers."""
    return 1024 // triton.next_power_of_2(units)


def runs(rule: "LSTMOptimizer") -> bool:
    """Whether the kernels of this ``rule`` can be compiled for the device that it is on; a warning says why not, once."""
    key = (rule.bias.device, rule.hidden_size, rule.layers, rule.two_streams)
    if key not in _TRIED:
        try:
            _try(rule)
            _TRIED[key] = True
        except Exception as error:  # a compiler that is missing, a device too old, a driver: all leave the other step
            _TRIED[key] = False
            warnings.warn(
                f"the fused step of the LSTM rule cannot run on {key[0]} ({type(error).__name__}: {str(error)[:200]}); "
                "a step of many kernels takes its place, several times slower",
                stacklevel=2,
            )
    return _TRIED[key]


def _try(rule: "LSTMOptimizer") -> None:
    p = torch.zeros(2, 2, dtype=torch.float32, device=rule.bias.device)
    layout = layout_of((p.shape,), False)
    second = [p] if rule.two_streams else None
    lstm_step_fused(rule, [p.clone()], [p], second, rule.initial_state(p.view(1, 4)), layout, total_steps=1, lr=1.0)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=64)
def plan_of(layout: Layout, device: torch.device, block: int) -> Plan:
    """The plan for these tensors; cached, because every step asks for it."""
    sizes = torch.tensor(layout.sizes)
    counts = (sizes + block - 1) // block
    ends = counts.cumsum(0)
    first_block = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    begin = (torch.arange(len(owner)) - first_block[owner]) * block
    roles = torch.tensor([role for role, _ in layout.roles])
    fan_in = torch.tensor([float(fan_in) for _, fan_in in layout.roles], dtype=torch.float32)
    found = Plan(owner, begin, sizes, sizes.cumsum(0) - sizes, roles, fan_in, first_block)
    return Plan(*(value.to(device) for value in found))


@torch.no_grad()
def lstm_step_fused(
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
    """`LSTMOptimizer.step` times ``lr``, written into ``parameters`` and into the tensors of ``state``.

    Args:
        rule, parameters, g, h, state, layout, total_steps, lr: as in `LSTMOptimizer.step_in_place`; float32, on one device.
    """
    step, device, tensors = int(state.step) + 1, parameters[0].device, len(parameters)
    two, units = rule.two_streams, rule.hidden_size
    block = block_of(units)
    plan = plan_of(layout, device, block)
    blocks = len(plan.owner)
    if blocks == 0:
        return state._replace(step=state.step + 1)
    g = [value.float().contiguous() for value in g]
    second = [None if value is None else value.float().contiguous() for value in h or ()]
    addresses = [0 if value is None else value.data_ptr() for value in (*parameters, *g, *second)]
    told = torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)
    squares = torch.empty(3 if two else 2, blocks, dtype=torch.float32, device=device)
    table = torch.empty(tensors, kernels.BEFORE_GATES + 4 * units, dtype=torch.float32, device=device)
    inputs, dynamic = rule.input_weight.shape[1], dynamic_count("full", two_streams=two)
    _, first_degree, second_degree = legendre(step, total_steps)
    nothing = squares  # stands where the kernels read nothing
    moments = [nothing if value is None else value for value in state.moments]
    squares_kernel: Any = kernels.squares_kernel
    tensors_kernel: Any = kernels.tensors_kernel
    step_kernel: Any = kernels.step_kernel
    with _on(device):
        squares_kernel[(blocks,)](told, plan.owner, plan.begin, plan.sizes, squares, tensors, blocks, TWO=two, BLOCK=block)
        tensors_kernel[(tensors,)](
            squares, plan.first_block, plan.sizes, plan.roles, plan.fan_in, table,
            rule.bias, rule.time_weight, rule.input_weight, rule.log_learning_rate, rule.factor_coefficient if two else nothing,
            blocks, first_degree, second_degree, math.log(rule.initial_learning_rate),
            GATES=4 * units, GATES_UP=triton.next_power_of_2(4 * units), INPUTS=inputs, DYNAMIC=dynamic, TWO=two, CHUNK=1024,
        )  # fmt: skip
        step_kernel[(blocks,)](
            told, plan.owner, plan.begin, plan.sizes, plan.rows, table, *moments, state.hidden, state.cell,
            rule.input_weight, rule.recurrent_weight, nothing if rule.between_weight is None else rule.between_weight,
            rule.bias, rule.readout,
            tensors, layout.coordinates, 1 - FAST**step, 1 - SLOW**step, 1 - SECOND**step, float(lr), rule.output_scale,
            UNITS=units, UNITS_UP=triton.next_power_of_2(units), LAYERS=rule.layers, INPUTS=inputs, TWO=two, BLOCK=block,
        )  # fmt: skip
    return state._replace(step=state.step + 1)

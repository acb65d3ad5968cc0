"""How many rows go through the model at once: as many as a memory budget allows, and half of that when it was too much."""

from collections.abc import Callable

import torch
from torch import Tensor

from metarobust._checks import called, is_out_of_memory
from metarobust.types import Model

CPU_BUDGET = 32 * 2**20
"""Bytes. On a CPU, activations that stay in the last-level cache make a pass up to 1.6 times faster than a large batch."""

STATE = 3
"""Input-sized tensors that a search keeps per row beside the activations: the point, its gradient, what the rule remembers."""


def rows_within(budget: int | None, model: Model, x: Tensor) -> int:
    """Rows whose saved activations and state fit into ``budget`` bytes, at least 1.

    Activations are measured on forward passes of two and of four rows; the state is the row itself, its gradient and what a step
    rule remembers, `STATE` tensors of the row's size.

    The default is the size of a large cache on a CPU, and half of the free memory on a GPU.
    """
    if budget is None:
        budget = torch.cuda.mem_get_info(x.device)[0] // 2 if x.is_cuda else CPU_BUDGET
    rows = x[torch.arange(4, device=x.device) % len(x)]  # two at least: BatchNorm in training mode refuses a single one
    saved = (_saved_bytes(model, rows) - _saved_bytes(model, rows[:2])) // 2  # what does not grow with the rows cancels
    return max(1, budget // (saved + STATE * x[:1].numel() * x.element_size()))


def _saved_bytes(model: Model, x: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> None:
        # In the graph nothing is kept: a saved output that came back there would hold its own graph, for ever. Here it stays,
        # without its graph, until all are counted: the address of one that is gone is given to the next.
        kept[tensor.data_ptr()] = tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        called(model, x.detach().requires_grad_())
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def halving_on_out_of_memory(work: Callable[[slice], None], length: int, at_once: int) -> None:
    """Do ``work`` on consecutive parts of ``length`` items; a part that runs out of memory is tried again in halves.

    Raises:
        torch.OutOfMemoryError: a single item does not fit.
    """
    begin = 0
    while begin < length:
        end = min(begin + at_once, length)
        try:
            work(slice(begin, end))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or end - begin == 1:
                raise
            at_once = (end - begin) // 2
        else:
            begin = end
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

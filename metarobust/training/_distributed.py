"""The processes that train one model together, and what they tell each other."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn


def initialise_from_environment() -> torch.device:
    """Join the processes that ``torchrun`` started, and return the device of this one; the model goes there before ``fit``.

    With GPUs the backend is NCCL and each process gets the GPU of its local rank; otherwise it is gloo. Where ``torchrun`` did
    not start the program, nothing is joined, and the first GPU, or the CPU, is returned: one script serves both. At its end,
    call ``torch.distributed.destroy_process_group()`` if ``torch.distributed.is_initialized()``.

    Example:
        >>> initialise_from_environment().type in ("cpu", "cuda")
        True
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("nccl" if gpu else "gloo")
    return device


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this is."""

    count: int = 1
    rank: int = 0

    @classmethod
    def current(cls) -> "Processes":
        """Those of ``torch.distributed`` where it is initialised; otherwise this one alone."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_world_size(), distributed.get_rank())
        return cls()

    def share(self, rows: Tensor) -> Tensor:
        """The part of a joint batch ``[n]`` that this process takes; parts differ in length by at most one."""
        return rows.tensor_split(self.count)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes, the same bits on each of them; in place."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of the ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def align_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of rank 0 (BatchNorm statistics are local, and so differ)."""
        if self.count > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)

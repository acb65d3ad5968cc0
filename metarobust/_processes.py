"""The processes that share one training; without `torch.distributed` there is one, and everything passes through."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed, nn


def processes() -> int:
    """How many processes share the training, 1 without `torch.distributed`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0 on."""
    return distributed.get_rank() if processes() > 1 else 0


def summed(values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Each tensor summed over the processes, detached, with the same bits on each of them."""
    found = tuple(value.detach() for value in values)
    if processes() > 1:
        found = tuple(value.clone() for value in found)
        for value in found:
            distributed.all_reduce(value)
    return found


def like_rank_0(values: Iterable[Tensor]) -> None:
    """Overwrite tensors, in place, with those of rank 0."""
    if processes() > 1:
        for value in values:
            distributed.broadcast(value.data, src=0)


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this is."""

    count: int = 1
    rank: int = 0

    @classmethod
    def current(cls) -> "Processes":
        """Those of ``torch.distributed`` where it is initialised; otherwise this one alone."""
        return cls(processes(), rank())

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

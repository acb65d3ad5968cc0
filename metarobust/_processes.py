"""The processes that share one training; without `torch.distributed` there is one, and everything passes through."""

from collections.abc import Iterable

from torch import Tensor, distributed


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

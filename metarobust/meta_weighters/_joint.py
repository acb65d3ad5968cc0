"""Sums over the processes that train together; without `torch.distributed` everything passes through."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed

from metarobust.dro import processes


def summed(values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Each tensor summed over the processes, detached, with the same bits on each of them."""
    found = tuple(value.detach() for value in values)
    if processes() > 1:
        found = tuple(value.clone() for value in found)
        for value in found:
            distributed.all_reduce(value)
    return found


def joint_size(size: int, device: torch.device) -> int:
    """The examples of all processes together."""
    if processes() == 1:
        return size
    return int(summed([torch.tensor(size, device=device)])[0])


def joint_mean(values: Tensor) -> tuple[Tensor, int]:
    """The mean over the rows ``[n, ...]`` of all processes, and how many these are."""
    size = joint_size(len(values), values.device)
    return summed([values.sum(0)])[0] / max(1, size), size


def like_rank_0(values: Iterable[Tensor]) -> None:
    """Overwrite tensors, in place, with those of rank 0."""
    if processes() > 1:
        for value in values:
            distributed.broadcast(value.data, src=0)

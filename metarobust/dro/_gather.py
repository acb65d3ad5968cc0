"""Losses of all processes side by side, so that each of them solves the dual of the joint batch."""

import torch
from torch import Tensor, distributed

from metarobust._checks import kind, message
from metarobust._processes import processes


def gather_examples(values: Tensor) -> Tensor:
    """The rows of every process, in the order of their ranks: ``values [n, ...]`` here, ``[n of all, ...]`` on all alike.

    The rows of this process keep their graph; those of the others are constants. So the gradient that reaches this process is
    its own share of the joint gradient, and the shares of all add up to it. (`DistributedDataParallel` averages: multiply by
    the number of processes.) Numbers of rows may differ, and be 0. Every process must call this equally often. Without
    `torch.distributed`, or with one process, the values pass through.

    Raises:
        TypeError: no tensor.

    Example:
        >>> gather_examples(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    if not isinstance(values, Tensor):
        raise TypeError(message("values", "a tensor [n, ...]", kind(values)))
    world = processes()
    if world == 1:
        return values
    counts = torch.zeros(world, dtype=torch.int64, device=values.device)
    counts[distributed.get_rank()] = len(values)
    distributed.all_reduce(counts)
    rows = counts.tolist()
    sent = values.detach().new_zeros(max(rows), *values.shape[1:])
    sent[: len(values)] = values.detach()
    received = [torch.empty_like(sent) for _ in rows]
    distributed.all_gather(received, sent)
    parts = [part[:count] for part, count in zip(received, rows, strict=True)]
    parts[distributed.get_rank()] = values
    return torch.cat(parts)

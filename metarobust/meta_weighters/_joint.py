"""Means over the examples of all processes that train together."""

import torch
from torch import Tensor

from metarobust._processes import processes, summed


def joint_size(size: int, device: torch.device) -> int:
    """The examples of all processes together."""
    if processes() == 1:
        return size
    return int(summed([torch.tensor(size, device=device)])[0])


def joint_mean(values: Tensor) -> tuple[Tensor, int]:
    """The mean over the rows ``[n, ...]`` of all processes, and how many these are."""
    size = joint_size(len(values), values.device)
    return summed([values.sum(0)])[0] / max(1, size), size

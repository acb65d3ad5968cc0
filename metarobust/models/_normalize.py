"""Normalisation as a layer, so that inputs stay in pixel space and attacks in input units."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarobust._checks import require


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel; put it first in the model and pass unnormalised inputs.

    Args:
        mean: one value per channel, in input units.
        std: one positive value per channel, in input units.

    Example:
        >>> Normalize(mean=[0.5], std=[0.25])(torch.full((1, 1, 1, 2), 1.0))
        tensor([[[[2., 2.]]]])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        require(len(mean) == len(std) > 0, "std", f"as long as mean (={len(mean)})", len(std))
        require(all(s > 0 for s in std), "std", "positive", list(std))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def _channels(self, values: Tensor, x: Tensor) -> Tensor:
        return values.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self._channels(self.mean, x)) / self._channels(self.std, x)

"""Normalisation as a layer, so that inputs stay in pixel space and attacks in input units."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from metarobust._checks import floating, message, require


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel; put it first in the model and pass unnormalised inputs.

    Args:
        mean: one value per channel, or one for all channels, in input units.
        std: the same, positive.

    Raises:
        ValueError: lists of other lengths, a std of 0 or less; on a call, another number of channels.
        TypeError: neither a number nor a list of numbers.

    Example:
        >>> Normalize(mean=[0.5], std=[0.25])(torch.full((1, 1, 1, 2), 1.0))
        tensor([[[[2., 2.]]]])
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        mean, std = _values("mean", mean), _values("std", std)
        require(len(mean) == len(std) > 0, "std", f"as long as mean (={len(mean)})", len(std))
        require(all(s > 0 for s in std), "std", "positive", list(std))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def _channels(self, values: Tensor, x: Tensor) -> Tensor:
        return values.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():  # whose mean and std would be cut down to integers
            floating("x", x)
        # Broadcasting would turn one channel into three without a word.
        channels = len(self.mean)
        if channels > 1 and (x.dim() < 2 or x.shape[1] != channels):
            remedy = "give one mean and one std per channel of x"
            raise ValueError(message("x", f"of {channels} channels, as mean and std are", list(x.shape), remedy))
        return (x - self._channels(self.mean, x)) / self._channels(self.std, x)


def _values(name: str, given: float | Sequence[float]) -> list[float]:
    try:
        return [float(value) for value in (given if isinstance(given, Iterable) else [given])]
    except (TypeError, ValueError) as error:
        raise TypeError(message(name, "a number, or one per channel", repr(given), f"write {name}=[0.5]")) from error

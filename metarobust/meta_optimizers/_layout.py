"""How a list of parameter tensors becomes one flat row of coordinates, and what each tensor is for."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ROLES = (
    "first dense", "inner dense", "last dense",
    "first convolution", "inner convolution", "last convolution",
    "bias", "normalisation",
)  # fmt: skip
"""What a parameter tensor may be for; learned coefficients belong to a role."""

BIAS, NORMALISATION = ROLES.index("bias"), ROLES.index("normalisation")


class TensorRole(NamedTuple):
    """What a parameter tensor is for: ``role`` indexes :data:`ROLES`; ``fan_in`` is the number of inputs of one output."""

    role: int
    fan_in: int


def tensor_roles(shapes: Sequence[torch.Size]) -> list[TensorRole]:
    """Roles from shapes and positions alone, because TorchOpt hands over a flat tuple of tensors without names.

    Tensors of two axes are dense weights, of three and more convolutions. Vectors are biases or belong to normalisation layers,
    which come with a gain and a shift: of the vectors between two weights, an odd one out whose length fits is a bias. PyTorch
    lists a bias after its weight, TorchOpt's ``MetaOptimizer`` (which sorts by name) before it; the first tensor tells which.

    Example:
        >>> [ROLES[t.role] for t in tensor_roles([torch.Size([8, 4]), torch.Size([8]), torch.Size([2, 8])])]
        ['first dense', 'bias', 'last dense']
    """
    weights = [i for i, shape in enumerate(shapes) if len(shape) >= 2]
    roles = [TensorRole(NORMALISATION, 1)] * len(shapes)
    for order, i in enumerate(weights):
        place = 0 if order == 0 else 2 if order == len(weights) - 1 else 1
        roles[i] = TensorRole(place + (0 if len(shapes[i]) == 2 else 3), shapes[i][1:].numel())
    bias_first = len(weights) > 0 and weights[0] % 2 == 1 and _length(shapes[weights[0] - 1]) == shapes[weights[0]][0]
    for order, i in enumerate(weights):
        if bias_first:
            begin, end = (weights[order - 1] + 1 if order else 0), i
        else:
            begin, end = i + 1, (weights[order + 1] if order + 1 < len(weights) else len(shapes))
        bias = end - 1 if bias_first else begin
        if (end - begin) % 2 == 1 and _length(shapes[bias]) == shapes[i][0]:
            roles[bias] = TensorRole(BIAS, shapes[i][1:].numel())
    return roles


def _length(shape: torch.Size) -> int:
    return shape[0] if len(shape) == 1 else 0


class Layout:
    """Packs tensors ``[copies, *shape]`` (or plain ``[*shape]``) into rows ``[copies, coordinates]`` and back.

    Args:
        shapes: shapes of the tensors, with the leading axis when ``stacked``.
        stacked: whether the first axis of every tensor counts independent copies.
    """

    def __init__(self, shapes: Sequence[torch.Size], *, stacked: bool) -> None:
        self.shapes = tuple(shapes)
        self.copies = shapes[0][0] if stacked else 1
        inner = [shape[1:] if stacked else shape for shape in shapes]
        self.sizes = [shape.numel() for shape in inner]
        self.roles = tensor_roles(inner)
        self.coordinates = sum(self.sizes)

    @cached_property
    def tensor_of_coordinate(self) -> Tensor:
        """Eight bytes per parameter, kept: made for steps with a graph only, which alone spread values over coordinates."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """``[copies, coordinates]``."""
        return torch.cat([t.reshape(self.copies, -1) for t in tensors], dim=1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The inverse of :meth:`pack`."""
        return tuple(p.reshape(s) for p, s in zip(rows.split(self.sizes, dim=1), self.shapes, strict=True))

    def tensor_means(self, rows: Tensor) -> Tensor:
        """Mean over each tensor, ``[copies, coordinates] -> [copies, tensors]``."""
        return torch.stack([part.mean(1) for part in rows.split(self.sizes, dim=1)], dim=1)

    def spread(self, values: Tensor) -> Tensor:
        """One value per tensor back to one per coordinate, ``[..., tensors] -> [..., coordinates]``."""
        return values.index_select(-1, self.tensor_of_coordinate.to(values.device))


@lru_cache(maxsize=64)
def layout_of(shapes: tuple[torch.Size, ...], stacked: bool) -> Layout:
    """The layout for these shapes; cached, because every step asks for it."""
    return Layout(shapes, stacked=stacked)

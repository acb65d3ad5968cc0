"""How far each example may be moved, as a factor of epsilon."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from metarobust._checks import finite, integer, require
from metarobust.meta_weighters._joint import joint_mean


@runtime_checkable
class PerturbationBound(Protocol):
    """Factors of epsilon per example, from what is known of a batch."""

    def __call__(self, characteristics: Tensor, y: Tensor) -> Tensor:
        """Factors ``[batch]`` for ``characteristics [batch, 6]`` and labels ``y [batch]``."""
        ...


class GradientBound(nn.Module):
    r"""Epsilon times :math:`(g_i / \bar g)^\kappa`, cut off below and above: our own rule, per example.

    :math:`g_i = \|p - e_y\|_2` is the length of the gradient of the cross-entropy in the logits, :math:`\bar g` its moving
    average over the training. (Zhou et al., 2023, have a gradient-based bound too; its rule is neither in their abstract nor in
    their published code.) With a positive power, examples that the model is unsure of are moved further.

    Args:
        power: :math:`\kappa`; 0 gives the fixed bound.
        lowest, highest: of the factor.
        memory: examples over which the average reaches back.

    Example:
        >>> bound = GradientBound(power=1.0)
        >>> bound.observe(torch.tensor([[0.0, 0.0, 0.4, 0.0, 0.0, 0.0], [0.0, 0.0, 0.6, 0.0, 0.0, 0.0]]))
        >>> bound(torch.tensor([[0.0, 0.0, 0.75, 0.0, 0.0, 0.0]]), torch.tensor([1]))
        tensor([1.5000])
    """

    average: Tensor
    seen: Tensor

    def __init__(self, *, power: float = 0.5, lowest: float = 0.5, highest: float = 2.0, memory: int = 10_000) -> None:
        super().__init__()
        finite("power", power)
        finite("lowest", lowest, least=0.0)
        finite("highest", highest)
        require(lowest <= 1 <= highest, "lowest and highest", "such that 1 lies between them", (lowest, highest))
        integer("memory", memory, least=1)
        self.power, self.lowest, self.highest, self.memory = power, lowest, highest, memory
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def observe(self, characteristics: Tensor) -> None:
        """Take ``characteristics [batch, 6]``, of all processes together, into the average."""
        mean, size = joint_mean(characteristics[:, 2].to(self.average.dtype))
        if size == 0:
            return
        self.seen.copy_((self.seen + size).clamp(max=float(max(self.memory, size))))
        self.average.lerp_(mean, size / self.seen)

    def forward(self, characteristics: Tensor, y: Tensor) -> Tensor:
        """The factor of each example, ``[batch]``."""
        del y
        relative = characteristics[:, 2] / self.average.to(characteristics).clamp(min=torch.finfo(characteristics.dtype).tiny)
        return relative.pow(self.power).clamp(self.lowest, self.highest)

    def extra_repr(self) -> str:
        return f"power={self.power:g}, lowest={self.lowest:g}, highest={self.highest:g}, memory={self.memory}"

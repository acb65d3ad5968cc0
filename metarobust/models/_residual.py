"""A small residual network with group normalisation."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from metarobust._checks import integer, require, sequence


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions, the first with a stride of 2, beside a 1x1 convolution; ReLU after their sum."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.convolution_1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm_1 = nn.GroupNorm(groups, outputs)
        self.convolution_2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(groups, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, kernel_size=1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm_2(self.convolution_2(F.relu(self.norm_1(self.convolution_1(x)))))
        return F.relu(branch + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """See `residual_network`."""

    def __init__(self, channels: Sequence[int], groups: int, image_channels: int, classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(image_channels, channels[0], kernel_size=3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels[0])
        self.blocks = nn.Sequential(*(ResidualBlock(inputs, outputs, groups) for inputs, outputs in pairwise(channels)))
        self.linear = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.norm(self.convolution(x))))
        return self.linear(features.mean((2, 3)))


def residual_network(
    channels: Sequence[int] = (16, 32, 64), *, groups: int = 4, image_channels: int = 1, classes: int = 10
) -> nn.Module:
    """A residual network with group normalisation, for images of any size: a 3x3 convolution, blocks, mean over pixels, linear.

    Every block halves the image and has two 3x3 convolutions beside a 1x1 convolution (He et al., 2016; group normalisation of Wu
    and He, 2018, keeps the examples of a batch apart, so that copies can be stacked and attacked row by row).

    Args:
        channels: of the first convolution and of each block, multiples of ``groups``.
        groups: of the normalisations.
        image_channels: channels of the input.
        classes: number of logits.

    Example:
        >>> import torch
        >>> residual_network([8, 16])(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    sequence("channels", channels, "[16, 32, 64]")
    require(len(channels) >= 1, "channels", "at least the width of the first convolution", list(channels))
    integer("groups", groups, least=1)
    for width in channels:
        integer("each of channels", width, least=1)
        require(width % groups == 0, "channels", f"multiples of groups (={groups})", list(channels))
    integer("image_channels", image_channels, least=1)
    integer("classes", classes, least=1)
    return ResidualNetwork(channels, groups, image_channels, classes)

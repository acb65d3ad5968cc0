"""Small classifiers without normalisation: multi-layer perceptrons and two-layer convolutional networks."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from metarobust._checks import integer, require, sequence


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """A multi-layer perceptron with ReLU between its layers; images are flattened.

    Args:
        sizes: widths from input to logits, for example ``[64, 128, 10]``.

    Example:
        >>> mlp([64, 128, 10])(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    sequence("sizes", sizes, "[64, 128, 10]")
    require(len(sizes) >= 2, "sizes", "at least an input and an output width", list(sizes))
    for size in sizes:
        integer("each of sizes", size, least=1)
    layers: list[nn.Module] = [nn.Flatten()]
    for position, (inputs, outputs) in enumerate(pairwise(sizes)):
        if position:
            layers.append(nn.ReLU())
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


def cnn(channels: Sequence[int], *, image_size: int = 8, image_channels: int = 1, classes: int = 10) -> nn.Sequential:
    """3x3 convolutions (padding 1) with ReLU, the first of stride 1 and each later one of stride 2, then one linear layer.

    Args:
        channels: output channels of the convolutions, for example ``[8, 16]``.
        image_size: height and width of the input, pixels.
        image_channels: channels of the input.
        classes: number of logits.

    Example:
        >>> cnn([8, 16])(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    sequence("channels", channels, "[8, 16]")
    require(len(channels) >= 1, "channels", "at least one convolution", list(channels))
    for width in channels:
        integer("each of channels", width, least=1)
    for name, value in (("image_size", image_size), ("image_channels", image_channels), ("classes", classes)):
        integer(name, value, least=1)
    layers: list[nn.Module] = []
    size, inputs = image_size, image_channels
    for position, outputs in enumerate(channels):
        stride = 1 if position == 0 else 2
        layers += [nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1), nn.ReLU()]
        size, inputs = (size + stride - 1) // stride, outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * size * size, classes))

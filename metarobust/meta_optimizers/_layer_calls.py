"""One call of one layer, and the weight gradient that any pair of factors would give it."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from metarobust._checks import images, require
from metarobust._tensors import norms
from metarobust.models import Normalize
from metarobust.models._stacked import StackedConv2d, StackedLinear, convolution_weight_gradient
from metarobust.threat_models import ThreatModel

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, StackedLinear, StackedConv2d)


@dataclass(eq=False)
class LayerCall:
    """One call of one layer: where its gradients will appear, and the factor to perturb."""

    layer: nn.Module
    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    input_edge: GradientEdge
    output_edge: GradientEdge
    first: bool
    normalize: Normalize | None
    normalized_shape: torch.Size
    hidden: frozenset[str] = frozenset()
    """Of weight and bias, those whose place a stand-in took in this call, so that autograd gives no clean gradient for them."""
    version: int = 0
    """Of the input, when the layer read it."""
    place: int = 0
    """Among all layer calls of the forward pass, from 1."""
    statistics: tuple[Tensor, Tensor] | None = None
    """Running mean and variance that a BatchNorm used in this call; None for those of the batch, and for other layers."""


class Mix(NamedTuple):
    """How much of a layer's clean input, and of its change, a weight gradient is taken with; (0, 1): the second stream."""

    clean: float
    change: float

    def of(self, inputs: Tensor, change: Tensor) -> Tensor:
        """The factor."""
        if self.clean == 0.0:
            return change if self.change == 1.0 else self.change * change
        return torch.add(inputs.detach(), change.to(inputs.dtype), alpha=self.change)


class Factors(NamedTuple):
    """A layer call with the loss gradients at its input and at its output."""

    call: LayerCall
    input_gradient: Tensor
    output_gradient: Tensor


def activation_scale(inputs: Tensor, norm: str, copies: int) -> Tensor:
    """Mean size of a layer's input, ``[copies]``: mean absolute entry (l_inf) or mean length per example (l2)."""
    if norm == "linf":
        return norms(inputs.reshape(copies, -1), "l1") / max(1, inputs.numel() // copies)
    return norms(inputs, "l2").reshape(copies, -1).mean(1)


def weight_gradient(call: LayerCall, inputs: Tensor, output_gradients: Tensor) -> Tensor:
    """The gradient of the layer's weight, had its input been ``inputs`` and the gradient at its output ``output_gradients``."""
    layer = call.layer
    # Under autocast the factors have a lower precision than the weight and may differ from each other.
    inputs, output_gradients = inputs.to(call.weight.dtype), output_gradients.to(call.weight.dtype)
    if isinstance(layer, (StackedLinear, StackedConv2d)):
        return layer.weight_gradient(inputs, output_gradients)
    if isinstance(layer, nn.Linear):
        return output_gradients.flatten(0, -2).mT @ inputs.flatten(0, -2)
    convolution = cast("nn.Conv2d", layer)
    if convolution.padding_mode == "zeros":
        return convolution_weight_gradient(inputs, output_gradients, call.weight, layer)
    padded = F.pad(inputs, convolution._reversed_padding_repeated_twice, mode=convolution.padding_mode)
    settings = _Unpadded(convolution.stride, convolution.dilation, convolution.groups, (0,) * (call.weight.dim() - 2))
    return convolution_weight_gradient(padded, output_gradients, call.weight, cast("nn.Module", settings))


def worst_case_of_input(call: LayerCall, gradient: Tensor, threat_model: ThreatModel) -> Tensor:
    """First-order worst move of what a first layer reads, through a `Normalize` in front of it."""
    inputs = call.inputs
    if call.normalize is None:
        return _worst_move(inputs, gradient, threat_model)
    normalize, shape = call.normalize, call.normalized_shape
    require(
        inputs.numel() == shape.numel(),
        "model",
        "such that its first layer reads the whole output of Normalize, reshaped at most",
        f"an input of shape {list(inputs.shape)} after Normalize gave {list(shape)}",
    )
    std, mean = (normalize._channels(v, inputs.reshape(shape)) for v in (normalize.std, normalize.mean))
    pixels = inputs.reshape(shape) * std + mean
    return (_worst_move(pixels, gradient.reshape(shape) / std, threat_model) / std).reshape(inputs.shape)


def _worst_move(x: Tensor, gradient: Tensor, threat_model: ThreatModel) -> Tensor:
    """First-order worst case in the input: an epsilon step of steepest ascent, stopped by the box."""
    x = x.detach()
    # A first layer that reads anything but pixels would silently get a meaningless perturbation.
    images(x, lower=threat_model.lower, upper=threat_model.upper, tolerance=1e-4)
    moved = torch.add(x, threat_model.ascent_direction(gradient), alpha=threat_model.epsilon)
    return moved.clamp_(threat_model.lower, threat_model.upper).sub_(x)


class _Unpadded(NamedTuple):
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]

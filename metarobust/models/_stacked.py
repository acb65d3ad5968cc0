"""Many copies of one architecture, each with its own parameters, evaluated as a single module."""

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from metarobust._checks import message, require


class StackedLinear(nn.Module):
    """``copies`` linear layers side by side: ``[copies * batch, inputs] -> [copies * batch, outputs]``."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.copies = len(layers)
        self.weight = _stacked([layer.weight for layer in layers])
        self.bias = _stacked([layer.bias for layer in layers]) if layers[0].bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        check_rows(x, self.copies)
        rows = x.reshape(self.copies, x.shape[:-1].numel() // self.copies, x.shape[-1])
        weight = self.weight.mT
        out = torch.bmm(rows, weight) if self.bias is None else torch.baddbmm(self.bias[:, None], rows, weight)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def weight_gradient(self, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """The weight gradient that the factors ``inputs`` and ``output_gradients`` give, shaped like the weight."""
        a = inputs.reshape(self.copies, -1, inputs.shape[-1])
        d = output_gradients.reshape(self.copies, -1, output_gradients.shape[-1])
        return torch.bmm(d.mT, a)


class StackedConv2d(nn.Module):
    """``copies`` convolutions side by side, run as one grouped convolution over ``[copies * batch, channels, h, w]``."""

    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        first = layers[0]
        require(first.padding_mode == "zeros", "padding_mode", "'zeros' in a stacked convolution", first.padding_mode)
        self.copies = len(layers)
        self.weight = _stacked([layer.weight for layer in layers])
        self.bias = _stacked([layer.bias for layer in layers]) if first.bias is not None else None
        self.stride, self.padding, self.dilation = first.stride, first.padding, first.dilation
        self.groups = first.groups * self.copies

    def _side_by_side(self, x: Tensor) -> Tensor:
        check_rows(x, self.copies)
        return rearrange(x, "(copies batch) c h w -> batch (copies c) h w", copies=self.copies)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        weight = self.weight.flatten(0, 1)
        out = F.conv2d(self._side_by_side(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return rearrange(out, "batch (copies c) h w -> (copies batch) c h w", copies=self.copies)

    def weight_gradient(self, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """The weight gradient that the factors ``inputs`` and ``output_gradients`` give, shaped like the weight."""
        gradient = convolution_weight_gradient(
            self._side_by_side(inputs), self._side_by_side(output_gradients), self.weight.flatten(0, 1), self
        )
        return gradient.reshape(self.weight.shape)


class StackedAffine(nn.Module):
    """``copies`` normalisation layers (LayerNorm or GroupNorm) that differ in gain and shift only."""

    def __init__(self, layers: Sequence[nn.LayerNorm | nn.GroupNorm]) -> None:
        super().__init__()
        self.copies = len(layers)
        plain = copy.deepcopy(layers[0])
        plain.register_parameter("weight", None)
        plain.register_parameter("bias", None)
        self.plain = plain
        self.weight = _stacked([layer.weight for layer in layers])
        self.bias = _stacked([layer.bias for layer in layers]) if layers[0].bias is not None else None
        self.trailing = 0 if isinstance(plain, nn.LayerNorm) else -1

    def forward(self, x: Tensor) -> Tensor:
        rows = self.plain(x).unflatten(0, (self.copies, -1))
        # GroupNorm scales channels (axis 2 of [copies, batch, channels, ...]), LayerNorm the last axes.
        axes = (1,) * (rows.dim() - 3) if self.trailing else ()
        out = rows * self.weight[:, None].reshape(self.copies, 1, *self._middle(rows), *self.weight.shape[1:], *axes)
        if self.bias is not None:
            out = out + self.bias[:, None].reshape(self.copies, 1, *self._middle(rows), *self.bias.shape[1:], *axes)
        return out.flatten(0, 1)

    def _middle(self, rows: Tensor) -> tuple[int, ...]:
        return () if self.trailing else (1,) * (rows.dim() - 2 - (self.weight.dim() - 1))


def check_rows(x: Tensor, copies: int) -> None:
    """Check that the rows can be shared out among the copies."""
    got = f"{len(x)} rows"
    require(
        len(x) % copies == 0, "x", f"as many rows for each of the {copies} stacked copies", got, f"write x.repeat({copies}, ...)"
    )


def convolution_weight_gradient(inputs: Tensor, output_gradients: Tensor, weight: Tensor, layer: nn.Module) -> Tensor:
    """Weight gradient of a convolution from its two factors alone, without running the convolution again."""
    spatial = weight.dim() - 2
    stride, dilation = cast("tuple[int, ...]", layer.stride), cast("tuple[int, ...]", layer.dilation)
    padding = layer.padding
    if padding == "valid":
        padding = (0,) * spatial
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        inputs, padding = F.pad(inputs, pads), (0,) * spatial
    _, gradient, _ = torch.ops.aten.convolution_backward(
        output_gradients, inputs, weight, None, stride, cast("tuple[int, ...]", padding), dilation,
        False, (0,) * spatial, cast("int", layer.groups), (False, True, False),
    )  # fmt: skip
    return gradient


def stack(modules: Sequence[nn.Module]) -> nn.Module:
    """One module that runs ``len(modules)`` copies of an architecture side by side, each on its own rows.

    Rows of copy ``e`` are ``x[e * batch : (e + 1) * batch]``; every parameter gains a leading axis of length ``copies``. The
    result equals calling the modules one by one, in one call of every layer: attacks and losses that treat rows separately
    work on it unchanged. Layers with parameters may be Linear, Conv2d, LayerNorm and GroupNorm.

    Args:
        modules: modules of identical structure; their parameters are copied.

    Raises:
        TypeError: a layer with parameters is of another kind.
        ValueError: no module is given, or a layer keeps batch statistics (BatchNorm mixes the copies' rows).

    Example:
        >>> from metarobust.models import mlp
        >>> models = [mlp([4, 3, 2]) for _ in range(5)]
        >>> x = torch.rand(5 * 7, 4)
        >>> one_by_one = torch.cat([m(rows) for m, rows in zip(models, x.chunk(5))])
        >>> torch.allclose(stack(models)(x), one_by_one, atol=1e-6)
        True
    """
    if isinstance(modules, nn.Module):
        raise TypeError(message("modules", "a list of modules", type(modules).__name__, "write stack([model, other_model])"))
    require(len(modules) > 0, "modules", "at least one module", "none")
    names = [name for name, _ in modules[0].named_parameters(remove_duplicate=False)]
    distinct = len(names) == len(list(modules[0].parameters()))
    require(distinct, "modules", "free of shared parameters", "a parameter used in two places", "train these one by one")
    shapes = [[tuple(p.shape) for p in m.parameters()] for m in modules]
    same = all(repr(m) == repr(modules[0]) and s == shapes[0] for m, s in zip(modules, shapes, strict=True))
    require(same, "modules", "of identical structure", "modules that differ in a layer or a shape")
    return _stack(list(modules))


def _stacked(parameters: Sequence[Tensor | None]) -> nn.Parameter:
    present = [p for p in parameters if p is not None]
    return nn.Parameter(torch.stack([p.detach() for p in present]), requires_grad=present[0].requires_grad)


def _stack(modules: list[nn.Module]) -> nn.Module:
    first = modules[0]
    if isinstance(first, nn.Linear):
        return StackedLinear(cast("list[nn.Linear]", modules))
    if isinstance(first, nn.Conv2d):
        return StackedConv2d(cast("list[nn.Conv2d]", modules))
    if isinstance(first, (nn.LayerNorm, nn.GroupNorm)) and first.weight is not None:
        return StackedAffine(cast("list[nn.LayerNorm | nn.GroupNorm]", modules))
    if isinstance(first, nn.modules.batchnorm._BatchNorm) or getattr(first, "track_running_stats", False):
        kind = type(first).__name__
        raise ValueError(message("modules", "free of batch statistics", kind, "use nn.GroupNorm, which keeps rows apart"))
    if next(first.parameters(recurse=False), None) is not None:
        supported = "Linear, Conv2d, LayerNorm or GroupNorm wherever a layer has parameters"
        raise TypeError(message("modules", supported, type(first).__name__, "train these one by one instead"))
    for name, buffer in first.named_buffers(recurse=False):
        same = all(torch.equal(buffer, m.get_buffer(name)) for m in modules)
        require(same, "modules", "equal in their buffers", f"different values of {name!r} in {type(first).__name__}")
    stacked = copy.copy(first)
    # A shallow copy shares the dictionaries that hold buffers and hooks with the original: give the copy its own.
    stacked.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in first.__dict__.items()}
    stacked._buffers = {k: None if v is None else v.clone() for k, v in first._buffers.items()}
    stacked._modules = {}
    for name, child in first.named_children():
        stacked._modules[name] = _stack([m.get_submodule(name) for m in modules])
        if next(child.children(), None) is None:  # a module with children got its mode from its own shallow copy
            stacked.get_submodule(name).train(child.training)
    return stacked

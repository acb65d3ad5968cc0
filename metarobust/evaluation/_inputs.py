"""What an evaluation takes in: data as two tensors, the model behind a door that speaks the dtype of the pixels."""

from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from metarobust import _checks
from metarobust._checks import message, require
from metarobust._tensors import digest
from metarobust.data import LabelledImages
from metarobust.types import Model


def as_tensors(data: Any) -> tuple[Tensor, Tensor]:
    """``(x, y)`` of any of the forms that :func:`evaluate` takes; a loader is read once, to its end."""
    if isinstance(data, LabelledImages):
        return data.images, data.labels
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return cast("tuple[Tensor, Tensor]", tuple(data))
    expected = "a pair (x, y) of tensors or a DataLoader"
    remedy = "for arrays write torch.from_numpy; for a data set write DataLoader(dataset, batch_size=1000)"
    if isinstance(data, (tuple, list)) and len(data) == 2 and not all(isinstance(part, (tuple, list)) for part in data):
        raise TypeError(message("data", expected, "a pair of " + " and ".join(type(part).__name__ for part in data), remedy))
    if isinstance(data, (Tensor, str)) or not isinstance(data, Iterable):
        raise TypeError(message("data", expected, type(data).__name__, remedy))
    batches = []
    for batch in data:
        parts = list(batch[:2]) if isinstance(batch, (tuple, list)) else [batch]
        if len(parts) < 2 or any(not isinstance(part, Tensor) or part.dim() == 0 for part in parts):
            got = "batches of something else: " + " and ".join(type(part).__name__ for part in parts)
            raise TypeError(message("data", expected, got, remedy))
        batches.append(parts)
    require(len(batches) > 0, "data", "at least one batch", "none")
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def data_digest(x: Tensor, y: Tensor) -> str:
    """One name for examples and labels, in their order: pixels as float32, labels as int64; neither shape nor device counts.

    Example:
        >>> x, y = torch.tensor([[0.25, 0.5]]), torch.tensor([1])
        >>> data_digest(x, y) == data_digest(x.double().reshape(1, 1, 1, 2), y.int()), data_digest(x, y) == data_digest(x, 1 - y)
        (True, False)
    """
    return digest(x.float(), y.long())


def as_pixels(x: Tensor) -> Tensor:
    """The inputs in the precision that attacks work in: float32, or float64 where the data is.

    A ball of radius 1/255 has hardly a dozen bfloat16 numbers in it, so half precision stays behind the model's door.
    """
    x = x.clone() if x.is_inference() else x.detach()
    return x if x.dtype == torch.float64 else x.float()


class Door(nn.Module):
    """A model behind two casts: inputs into the model's dtype (``None`` leaves them), logits back into that of the inputs.

    A module, so that whoever looks for the layers or the parameters of a module finds them.
    """

    def __init__(self, model: Model, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x if self.dtype is None else x.to(self.dtype)).to(x.dtype)


def placement(model: Model, x: Tensor) -> tuple[torch.device, torch.dtype | None]:
    """Device and dtype of the model's first floating-point tensor; those of ``x`` and None when it has none."""
    if isinstance(model, nn.Module):
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return x.device, None


@torch.no_grad()
def behind_door(model: Model, x: Tensor) -> tuple[Model, torch.device, torch.dtype]:
    """The model as attacks may call it on pixels like ``x``, its device, and the dtype that it computes in.

    The model itself, when it takes and gives the dtype of ``x``.
    """
    device, dtype = placement(model, x)
    if dtype is not None and dtype != x.dtype:
        return Door(model, dtype), device, dtype
    given = checked_logits(_checks.called(model, x[:1].to(device)), 1).dtype
    return (model, device, x.dtype) if given == x.dtype else (Door(model, None), device, given)


def checked_logits(logits: Any, examples: int) -> Tensor:
    """The model's output, if it is one row of finite logits per example; raises a sentence otherwise."""
    logits = _checks.logits(logits, examples=examples)
    require(bool(logits.isfinite().all()), "model", "such that its logits are finite", "NaN or infinite logits")
    return logits

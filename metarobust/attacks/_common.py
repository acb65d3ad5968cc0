"""What every attack does before and around its work: check the batch, leave the model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from metarobust._checks import images, labels
from metarobust.threat_models import ThreatModel
from metarobust.types import Model


def checked(threat_model: ThreatModel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The batch, detached; raises a sentence unless x is finite and in the box and y holds one int64 label per example.

    Tensors made in inference mode are copied, because autograd refuses to follow them.
    """
    images(x, lower=threat_model.lower, upper=threat_model.upper)
    labels(y, examples=len(x))
    x, y = (t.clone() if t.is_inference() else t for t in (x, y))
    return x.detach(), y


@contextmanager
def buffers_kept(model: Model) -> Iterator[None]:
    """Give a module in training mode its buffers back at the end: an attack must not move BatchNorm statistics."""
    kept = []
    if isinstance(model, nn.Module):
        kept = [(b, b.clone()) for m in model.modules() if m.training for b in m.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)

"""What every attack does before and around its work: check the batch, leave the model as it was, take input gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from metarobust import _checks
from metarobust._checks import finite, images, kind, labels, message, require, tensor_of
from metarobust.threat_models import ThreatModel
from metarobust.types import Model


def checked(threat_model: ThreatModel, model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The batch, detached; raises a sentence unless x is finite and in the box and y holds one int64 label per example.

    A model that cannot be called is refused too.

    Tensors made in inference mode are copied, because autograd refuses to follow them.
    """
    _checks.model(model)
    images(x, lower=threat_model.lower, upper=threat_model.upper)
    labels(y, examples=len(x), device=x.device)
    _checks.model(model, x)
    x, y = (t.clone() if t.is_inference() else t for t in (x, y))
    return x.detach(), y


def checked_logits(logits: Tensor, y: Tensor) -> Tensor:
    """The logits of a first pass; raises a sentence unless they are ``[batch, classes]``, with a class for every label.

    A single class leaves nothing to attack.
    """
    logits = _checks.logits(logits, examples=len(y))
    remedy = "for one logit z of a binary model return torch.cat([0 * z, z], 1)"
    require(logits.shape[1] >= 2, "model", "a classifier with at least 2 logits per example", logits.shape[1], remedy)
    labels(y, examples=len(y), classes=logits.shape[1])
    return logits


def checked_start(threat_model: ThreatModel, start: Tensor, x: Tensor) -> Tensor:
    """Points to begin at, detached; raises a sentence unless they are shaped like ``x`` and inside its ball and box."""
    if not isinstance(start, Tensor):
        raise TypeError(message("start", "a tensor of the shape of x", kind(start), tensor_of("start", start)))
    require(start.shape == x.shape, "start", f"of the shape of x, {list(x.shape)}", list(start.shape))
    rounding = 2 * torch.finfo(x.dtype).eps * max(abs(threat_model.lower), abs(threat_model.upper))
    outside = int((~threat_model.contains(start, x, tolerance=max(1e-5, rounding))).sum())
    require(
        outside == 0, "start", f"inside {threat_model!r}", f"{outside} examples outside", "write threat_model.project(start, x)"
    )
    return start.detach().to(x)


_looking: ContextVar[bool] = ContextVar("looking", default=False)


def looking() -> bool:
    """Whether a model is called to be looked at, as attacks do, and not for what a loss is made of."""
    return _looking.get()


@contextmanager
def buffers_kept(model: Model) -> Iterator[None]:
    """Give a module in training mode its buffers back at the end: an attack must not move BatchNorm statistics."""
    kept = []
    if isinstance(model, nn.Module):
        kept = [(b, b.clone()) for m in model.modules() if m.training for b in m.buffers(recurse=False)]
    token = _looking.set(True)
    try:
        yield
    finally:
        # Through .data, which autograd does not watch: a pass that the caller differentiates may have saved these buffers.
        for buffer, value in kept:
            buffer.data.copy_(value)
        _looking.reset(token)


def check_step_size(step_size: float | None, threat_model: ThreatModel) -> None:
    """Check the length of a step in input units, if it is given: above 0, and not wider than the box for l_inf."""
    if step_size is None:
        return
    finite("step_size", step_size, above=0.0)
    width = threat_model.upper - threat_model.lower
    require(
        threat_model.norm != "linf" or step_size <= width,
        "step_size",
        f"at most {width:g} (= upper - lower) in input units for l_inf",
        step_size,
        f"for 8-bit images in [0, 1] write {step_size:g} / 255",
    )


def input_gradient(losses: Tensor, x: Tensor, *, retain_graph: bool = False) -> Tensor:
    """Gradient of the summed losses: rows do not see each other, so the sum gives each row its own gradient.

    Raises:
        ValueError: there is not one loss per row, or the losses do not depend on ``x`` through the graph.
    """
    losses = _checks.losses(losses, examples=len(x))
    gradient = None
    if losses.requires_grad:
        gradient = torch.autograd.grad(losses.sum(), x, allow_unused=True, retain_graph=retain_graph)[0]
    if gradient is None:
        raise ValueError(
            "the model's logits must depend differentiably on x, got logits without a gradient; "
            "remove torch.no_grad(), .detach(), .round() or .argmax() from the model's forward pass"
        )
    return gradient

"""Where a parameter's gradient comes from: what the recorder leaves beside it for the optimizer to check."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metarobust._checks import finite, message
from metarobust.threat_models import ThreatModel


def by_identity(coefficients: Mapping[Tensor, float]) -> dict[int, float]:
    """Coefficients by the id of their parameter."""
    if not isinstance(coefficients, Mapping) or not all(isinstance(p, Tensor) for p in coefficients):
        got = type(coefficients).__name__
        raise TypeError(message("coefficients", "a mapping from parameters to numbers", got, "write {p: c for p in params}"))
    for c in coefficients.values():
        finite("coefficients", c)
    return {id(p): float(c) for p, c in coefficients.items()}


def refuse(gradient: Tensor) -> None:
    """The hook of a weight's stand-in: only a backward pass that is not the recorder's comes here."""
    raise RuntimeError(
        message(
            "recorder.backward(loss)",
            "what computes gradients in this block, of one loss made of everything",
            "a plain backward pass, which would not reach the weights",
            "write recorder.backward(loss)",
        )
    )


class Origin(NamedTuple):
    """What a parameter's gradient was when the recorder filled it, with what, and whether the streams are in it combined."""

    gradient: Tensor
    version: int
    threat_model: ThreatModel
    gradient_source: str
    combined: bool


def summed_parts(p: Tensor, *parts: Tensor | None) -> Tensor:
    """The sum of what is there, zeros like the parameter if nothing is."""
    present = [part for part in parts if part is not None]
    return torch.zeros_like(p) if not present else present[0] if len(present) == 1 else present[0] + present[1]


def belongs_to_gradient(p: Tensor, *, unchanged: bool = False) -> bool:
    """Whether the second stream of ``p`` was filled together with its present ``.grad`` (and, if asked, none changed since)."""
    origin: Origin | None = getattr(p, "second_grad_origin", None)
    if origin is None or p.grad is None or (getattr(p, "second_grad", None) is None and not origin.combined):
        return False
    return origin.gradient is p.grad and (not unchanged or origin.version == p.grad._version)

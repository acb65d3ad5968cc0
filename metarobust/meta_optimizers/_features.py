"""What the LSTM sees of a coordinate: gradients on a log scale, Adam's statistics, the parameter, its tensor, the time."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from metarobust.meta_optimizers._layout import ROLES, Layout

PREPROCESSINGS = ("full", "log_sign", "multiply")
FAST, SLOW, SECOND = 0.9, 0.99, 0.999
"""Decay of the two first moments and of the second moments; 0.9 and 0.999 are Adam's (Kingma & Ba, 2015)."""

TINY = 1e-30  # keeps the derivative of the square root finite where a gradient has always been exactly zero


class Moments(NamedTuple):
    """Running means of the streams and of their products, ``[copies, coordinates]``; the h entries are None with one stream."""

    g: Tensor
    g_slow: Tensor
    g_squared: Tensor
    h: Tensor | None
    g_times_h: Tensor | None
    h_squared: Tensor | None


def initial_moments(rows: Tensor, *, two_streams: bool) -> Moments:
    """All zero, shaped like ``rows``."""
    first, second = ([torch.zeros_like(rows) for _ in range(3)] for _ in range(2))
    return Moments(*first, *(second if two_streams else (None,) * 3))


def update_moments(moments: Moments, g: Tensor, h: Tensor | None) -> Moments:
    """One step of every running mean; a new value, nothing in place."""
    new = (torch.lerp(moments.g, g, 1 - FAST), torch.lerp(moments.g_slow, g, 1 - SLOW))
    squared = torch.lerp(moments.g_squared, g * g, 1 - SECOND)
    if h is None or moments.h is None or moments.g_times_h is None or moments.h_squared is None:
        return Moments(*new, squared, None, None, None)
    return Moments(
        *new,
        squared,
        torch.lerp(moments.h, h, 1 - FAST),
        torch.lerp(moments.g_times_h, g * h, 1 - SECOND),
        torch.lerp(moments.h_squared, h * h, 1 - SECOND),
    )


def adam_direction(moments: Moments, coefficient: Tensor | None, step: int) -> Tensor:
    """Adam's bias-corrected direction on ``g + coefficient * h``; exact for a coefficient that is constant in time.

    The second moment of a combined stream follows from the three kept apart: v(c) = v_g + 2 c v_gh + c^2 v_h.
    """
    first, second = moments.g, moments.g_squared
    if coefficient is not None and moments.h is not None:
        assert moments.g_times_h is not None
        assert moments.h_squared is not None
        first = first + coefficient * moments.h
        second = second + coefficient * (2 * moments.g_times_h + coefficient * moments.h_squared)
    return (first / (1 - FAST**step)) / (root(second / (1 - SECOND**step)) + 1e-8)


def root(second_moment: Tensor) -> Tensor:
    """Square root whose derivative stays finite at zero."""
    return (second_moment.clamp(min=0) + TINY).sqrt()


def log_sign(g: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """``max(log|g| / k, -1)`` and ``clamp(g e^k, -1, 1)`` (Andrychowicz et al., 2016, appendix A)."""
    return (g.abs().clamp(min=math.exp(-k)).log() / k).clamp(min=-1), (g * math.exp(k)).clamp(-1, 1)


def dynamic_rows(
    preprocessing: str, g: Tensor, h: Tensor | None, moments: Moments, parameters: Tensor, layout: Layout, step: int
) -> list[Tensor]:
    """Features that change from step to step, each ``[copies, coordinates]``."""
    if preprocessing == "multiply":
        return [20 * g, (g * math.exp(20)).clamp(-1, 1)]
    if preprocessing == "log_sign":
        return list(log_sign(g, 20))
    bias = 1 - SECOND**step
    scale = root(moments.g_squared / bias)
    size = parameters * _parameter_scale(layout, g.dtype, g.device)
    g_size = layout.tensor_means(g * g)
    rows = [
        *log_sign(g, 10),
        (g / scale).clamp(-5, 5),
        (moments.g / ((1 - FAST**step) * scale)).clamp(-5, 5),
        (moments.g_slow / ((1 - SLOW**step) * scale)).clamp(-5, 5),
        scale.clamp(min=1e-10).log() / 10,
        size,
        (3 * size).tanh(),
        layout.spread((layout.tensor_means(size * size) + 1e-10).log() / 4),
        layout.spread((g_size + 1e-20).log() / 20),
    ]
    if h is not None and moments.h is not None and moments.h_squared is not None:
        h_scale = root(moments.h_squared / bias)
        rows += [
            (h / h_scale).clamp(-5, 5),
            (moments.h / ((1 - FAST**step) * h_scale)).clamp(-5, 5),
            layout.spread((((layout.tensor_means(h * h) + 1e-20) / (g_size + 1e-20)).log() / 4).clamp(-5, 5)),
        ]
    return rows


def dynamic_count(preprocessing: str, *, two_streams: bool) -> int:
    """How many rows :func:`dynamic_rows` gives."""
    return (13 if two_streams else 10) if preprocessing == "full" else 2


STATIC_COUNT = len(ROLES) + 1


@lru_cache(maxsize=64)
def static_rows(layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Role one-hots and the log of fan-in, ``[STATIC_COUNT, coordinates]``; the same for every copy."""
    table = torch.zeros(STATIC_COUNT, len(layout.roles), dtype=dtype, device=device)
    for tensor, (role, fan_in) in enumerate(layout.roles):
        table[role, tensor] = 1
        table[-1, tensor] = math.log(fan_in) / 5
    return layout.spread(table)


@lru_cache(maxsize=64)
def _parameter_scale(layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Square root of fan-in per coordinate: a freshly initialised weight times this is of order one."""
    return layout.spread(torch.tensor([math.sqrt(fan_in) for _, fan_in in layout.roles], dtype=dtype, device=device))


def legendre(step: int, total_steps: int) -> tuple[float, float, float]:
    """Legendre polynomials of degree 0, 1, 2 in relative time, clipped at the planned number of steps."""
    p = 2 * min(1.0, (step - 1) / max(1, total_steps - 1)) - 1
    return 1.0, p, (3 * p * p - 1) / 2


def time_basis(step: int, total_steps: int, like: Tensor) -> Tensor:
    """`legendre` as a tensor ``[3]``."""
    return torch.tensor(legendre(step, total_steps), dtype=like.dtype, device=like.device)

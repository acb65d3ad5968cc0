"""What the learned update rules share: the streams they read, and the coefficients of the second one."""

from typing import Any

import torch
from torch import Tensor

from metarobust._checks import require
from metarobust.meta_optimizers._layout import ROLES

GRADIENT_SOURCES = ("gradient", "gradient+perturbed_factors")

COEFFICIENT_SPEED = 8.0
"""Factor coefficients are stored divided by this: Adam moves every stored number alike, and these have further to go."""

LARGEST = 1e15
"""Gradients are clamped to this size, so that their squares stay finite in float32."""


def checked_streams(rule: Any, g: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The streams, cut off at `LARGEST`, if they are those that the rule was made for."""
    require(
        (h is not None) == rule.two_streams,
        "updates",
        f"of gradient source {rule.gradient_source!r}, which this meta-optimizer was made for",
        "one stream" if h is None else "two streams",
        "compute both with metarobust.meta_optimizers.factor_gradients" if h is None else "pass the gradients alone",
    )
    return g.clamp(-LARGEST, LARGEST), None if h is None else h.clamp(-LARGEST, LARGEST)


@torch.no_grad()
def shift_coefficients(rule: Any, *, first: float, others: float) -> None:
    """Add constants to the stored coefficients ``[roles, time]`` of h: one for first layers, one for the other weights."""
    require(
        rule.factor_coefficient is not None,
        "gradient_source",
        "'gradient+perturbed_factors' for a rule with factor coefficients",
        repr(rule.gradient_source),
    )
    for role, name in enumerate(ROLES):
        if name not in ("bias", "normalisation"):
            rule.factor_coefficient[role, 0] += (first if name.startswith("first") else others) / COEFFICIENT_SPEED

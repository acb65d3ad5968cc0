"""What the learned update rules share: the streams they read, the coefficients of the second one, the forms they take."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torchopt.base import GradientTransformation

from metarobust._checks import integer, require
from metarobust.meta_optimizers._factor_gradients import record_factors
from metarobust.meta_optimizers._factor_recorder import FactorRecorder
from metarobust.meta_optimizers._layout import ROLES, Layout
from metarobust.threat_models import ThreatModel

COEFFICIENT_SPEED = 8.0
"""Factor coefficients are stored divided by this: Adam moves every stored number alike, and these have further to go."""

if TYPE_CHECKING:
    from metarobust.meta_optimizers._torch_optimizer import LearnedOptimizer

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


class UpdateRule(nn.Module):
    """What every learned update rule can become, and how its coefficients of the second stream are shifted."""

    gradient_source: str
    factor_coefficient: nn.Parameter | None

    @property
    def two_streams(self) -> bool:
        """Whether the rule reads a second gradient stream."""
        return self.gradient_source != "gradient"

    @property
    def passes_per_step(self) -> float:
        """Forward-backward passes of a step.

        One, a third more for a rule that reads two streams apart, and a third more for the forward pass of tangents.
        """
        apart = self.two_streams and not self.adds_streams
        return (3 + apart + (self.gradient_source == "gradient+adversarial_tangent")) / 3

    @property
    def adds_streams(self) -> bool:
        """Whether it reads two streams as one sum g + c h, which `record_factors` makes for one pass per step in place of 4/3."""
        return False

    def record_factors(
        self,
        model: nn.Module,
        *,
        threat_model: ThreatModel | None = None,
        coefficients: Mapping[Tensor, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> AbstractContextManager[FactorRecorder]:
        """:func:`record_factors` with this rule's gradient source.

        Args:
            model, threat_model, coefficients, generator: see :func:`record_factors`.

        Raises:
            ValueError: the rule reads one stream, for which nothing is recorded.
        """
        require(
            self.two_streams,
            "gradient_source",
            "one with a second stream, which is what is recorded",
            repr(self.gradient_source),
            "write loss.backward(), which is all that this rule needs",
        )
        return record_factors(
            model, threat_model=threat_model, gradient_source=self.gradient_source, coefficients=coefficients, generator=generator
        )

    def combining_coefficients(self, layout: Layout, *, step: int, total_steps: int) -> list[float] | None:
        """c of each tensor in a step (from 1), for a rule that reads its streams as g + c h alone; None for others.

        Args:
            layout: of the tensors.
            step: from 1.
            total_steps: the number of steps planned, T.
        """
        return None

    def as_gradient_transformation(self, *, total_steps: int, stacked: bool = False) -> GradientTransformation:
        """This rule as a TorchOpt ``GradientTransformation``, for its wrappers, chains, clipping and schedules.

        ``update`` takes a tree of gradients, or :class:`metarobust.types.Streams` when the rule reads two, and needs
        ``params``. It never writes in place and keeps the graph to this module's parameters and to its inputs.

        Args:
            total_steps: the number of steps planned, T; relative time is clipped at 1.
            stacked: whether the first axis of every tensor counts independent copies (see ``metarobust.models.stack``).
        """
        integer("total_steps", total_steps, least=1)
        from metarobust.meta_optimizers._transformation import transformation

        return transformation(cast("Any", self), total_steps=total_steps, stacked=stacked)

    def torch_optimizer(
        self, params: Iterable[Any], *, total_steps: int, lr: float = 1.0, threat_model: ThreatModel | None = None
    ) -> "LearnedOptimizer":
        """A ``torch.optim.Optimizer`` that follows this rule, frozen; see :class:`LearnedOptimizer`.

        Args:
            params, total_steps, lr, threat_model: see :class:`LearnedOptimizer`.
        """
        from metarobust.meta_optimizers._torch_optimizer import LearnedOptimizer

        return LearnedOptimizer(params, cast("Any", self), total_steps=total_steps, lr=lr, threat_model=threat_model)

    @torch.no_grad()
    def shift_factor_coefficients(self, *, first: float, others: float) -> None:
        """Add constants to the coefficient of h: ``first`` for first weights, ``others`` for the other weights.

        Biases and normalisations have an h in the estimated adversarial gradients only, and share ``others`` there.
        """
        require(
            self.factor_coefficient is not None,
            "gradient_source",
            "one with a second stream, whose coefficients this shifts",
            repr(self.gradient_source),
        )
        assert self.factor_coefficient is not None
        for role, name in enumerate(ROLES):
            if name not in ("bias", "normalisation") or self.gradient_source != "gradient+perturbed_factors":
                self.factor_coefficient[role, 0] += (first if name.startswith("first") else others) / COEFFICIENT_SPEED

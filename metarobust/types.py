"""The vocabulary of the library: what a model, an attack, a robust loss and a task are. Nothing else lives here."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Attack", "Batch", "Model", "Parameters", "RobustLoss", "Streams", "Task"]

Model: TypeAlias = Callable[[Tensor], Tensor]
"""Any callable from inputs ``[batch, ...]`` to logits ``[batch, classes]``: an ``nn.Module``, a closure, a compiled model."""

Parameters: TypeAlias = dict[str, Tensor]
"""Named parameters; the order of the names is the order of ``module.named_parameters()``."""


class Batch(NamedTuple):
    """Labelled inputs: ``x [batch, ...]`` in input units, ``y [batch]`` int64."""

    x: Tensor
    y: Tensor


class Streams(NamedTuple):
    """What an update rule with two gradient streams reads: one entry per parameter in each, in the order of the parameters.

    ``gradients`` is the ordinary gradient; ``second_gradients`` is the second stream, whichever kind the source names: the
    weight gradient with its input factor at its first-order worst case, or what an adversarial move would add to the gradient,
    estimated or from a tangent (see ``metarobust.meta_optimizers.factor_gradients``).
    """

    gradients: tuple[Tensor, ...]
    second_gradients: tuple[Tensor, ...]


@runtime_checkable
class Attack(Protocol):
    """Moves examples inside a threat model: the result is detached and lies inside ball and box."""

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Move a batch.

        Args:
            model: the classifier under attack; called in the mode it is in, and left as it is.
            x: examples ``[batch, ...]`` in input units, inside the box.
            y: labels, int64 ``[batch]``.
            generator: a CPU generator that all noise comes from; without one, torch's global generator.

        Returns:
            The moved examples, shaped like x, on its device and in its dtype.
        """
        ...


@runtime_checkable
class RobustLoss(Protocol):
    """A loss per example, shape ``[batch]``, differentiable in the model's parameters."""

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Charge a batch.

        Args:
            model: the classifier in training; the loss is differentiable in its parameters.
            x: clean examples ``[batch, ...]`` in input units, inside the box.
            y: labels, int64 ``[batch]``.
            generator: a CPU generator that the noise of attacks comes from; without one, torch's global generator.

        Returns:
            One loss per example, ``[batch]``.
        """
        ...


class Task(Protocol):
    """``optimizees`` independent training problems of one architecture, advanced side by side.

    Every parameter tensor has a leading axis of length ``optimizees``; every loss has shape ``[optimizees]``. The methods are
    pure functions of their arguments (all randomness comes from ``generator``), so that meta-training can resume bit by bit.

    Three members are read where a task has them: ``project(parameters) -> parameters`` after every step, where the optimizee is
    constrained; ``gradient_source``, what its streams hold, which must be what the rule reads; and
    ``threat_model``, which is recorded with what was learned.
    """

    optimizees: int

    def initial_parameters(self, *, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Where training starts.

        Args:
            generator: that fresh parameters are drawn from, on the CPU.
        """
        ...

    def streams(
        self, parameters: tuple[Tensor, ...], *, generator: torch.Generator, create_graph: bool = False
    ) -> tuple[Tensor, Streams]:
        """Training losses ``[optimizees]`` of one step, and the streams that the update rule reads.

        Args:
            parameters: one tensor ``[optimizees, ...]`` per parameter.
            generator: that the minibatch and all noise are drawn from, on the CPU.
            create_graph: keep the graph from the parameters to both streams, for a second-order meta-gradient.
        """
        ...

    def meta_loss(self, parameters: tuple[Tensor, ...], *, generator: torch.Generator) -> Tensor:
        """What meta-training minimises at these parameters, ``[optimizees]``, differentiable in them.

        Args:
            parameters: one tensor ``[optimizees, ...]`` per parameter.
            generator: that the judging examples and all noise are drawn from, on the CPU.
        """
        ...

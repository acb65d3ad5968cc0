"""Update rules as TorchOpt gradient transformations over one or two streams."""

from typing import Any, cast

import torch
import torchopt
from torch import Tensor
from torchopt import pytree
from torchopt.base import EmptyState, GradientTransformation

from metarobust._checks import finite, message
from metarobust.meta_optimizers._kinds import MetaOptimizer
from metarobust.meta_optimizers._layout import ROLES, layout_of, tensor_roles
from metarobust.types import Streams


def _leaves(tree: Any) -> tuple[list[Tensor], Any]:
    leaves, structure = pytree.tree_flatten(tree)
    return cast("list[Tensor]", leaves), structure


def transformation(optimizer: MetaOptimizer, *, total_steps: int, stacked: bool) -> GradientTransformation:
    """See :meth:`LSTMOptimizer.as_gradient_transformation`."""

    def layout_for(params: Any) -> tuple[list[Tensor], Any, Any]:
        leaves, structure = _leaves(params)
        return leaves, structure, layout_of(tuple(p.shape for p in leaves), stacked)

    def init(params: Any) -> Any:
        leaves, _, layout = layout_for(params)
        return optimizer.initial_state(layout.pack(leaves))

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        del inplace  # a graph is kept, so nothing may be overwritten
        if params is None:
            raise ValueError(message("params", "the current parameters", "None", "write update(..., params=params)"))
        leaves, structure, layout = layout_for(params)
        two = isinstance(updates, Streams)
        g = _filled(updates.gradients if two else updates, leaves)
        h = layout.pack(_filled(updates.second_gradients, leaves)) if two else None
        rows, new_state = optimizer.step(layout.pack(g), h, state, layout.pack(leaves), layout, total_steps=total_steps)
        return pytree.tree_unflatten(structure, list(layout.unpack(rows))), new_state

    return GradientTransformation(cast("Any", init), cast("Any", update))


def reading_streams(optimizer: MetaOptimizer, *, total_steps: int) -> GradientTransformation:
    """The rule on the :class:`metarobust.types.Streams` of stacked copies, whether it reads both streams or the first."""
    rule = transformation(optimizer, total_steps=total_steps, stacked=True)
    return rule if optimizer.two_streams else torchopt.chain(gradients_only(), rule)


def _filled(gradients: Any, params: list[Tensor]) -> list[Tensor]:
    """Leaves of a gradient tree, with zeros where a parameter took no part in the loss."""
    leaves = cast("list[Any]", pytree.tree_leaves(gradients, none_is_leaf=True))
    return [torch.zeros_like(p) if g is None else g for g, p in zip(leaves, params, strict=True)]


def gradients_only() -> GradientTransformation:
    """Drop the second stream: ``torchopt.chain(gradients_only(), torchopt.adam(3e-4))`` reads the same streams as the LSTM."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        return (updates.gradients if isinstance(updates, Streams) else updates), state

    return GradientTransformation(cast("Any", lambda params: EmptyState()), cast("Any", update))


def combine_factors(*, first: float, others: float, biases: float | None = None, stacked: bool = False) -> GradientTransformation:
    """The hand-set factor rule: one stream ``g + first * h`` for the first weight tensor, ``g + others * h`` for the others.

    Chain it with an optimizer: ``torchopt.chain(combine_factors(first=1.5, others=0.15), torchopt.adam(3e-3))``.

    Args:
        first: coefficient of the first layer, in multiples of the threat model's epsilon.
        others: coefficient of every later layer, relative to its activation scale.
        biases: coefficient of biases and normalisations; default: ``others``.
        stacked: whether the first axis of every tensor counts independent copies.
    """

    for name, value in (("first", first), ("others", others), ("biases", others if biases is None else biases)):
        finite(name, value)

    def update(updates: Streams, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        if not isinstance(updates, Streams):
            remedy = "compute them with metarobust.meta_optimizers.factor_gradients"
            raise TypeError(message("updates", "Streams", type(updates).__name__, remedy))
        roles = tensor_roles([g.shape[1:] if stacked else g.shape for g in updates.gradients])
        small = {"bias", "normalisation"} if biases is not None else set()
        coefficients = [
            cast("float", biases) if name in small else first if name.startswith("first") else others
            for name in (ROLES[role.role] for role in roles)
        ]
        streams = zip(updates.gradients, updates.second_gradients, coefficients, strict=True)
        return tuple(torch.add(g, h, alpha=c) for g, h, c in streams), state

    return GradientTransformation(cast("Any", lambda params: EmptyState()), cast("Any", update))

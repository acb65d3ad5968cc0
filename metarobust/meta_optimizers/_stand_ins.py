"""Tensors that take the place of a layer's weight and bias while it runs, so that autograd gives no gradient for these."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from metarobust.meta_optimizers._gradient_origin import refuse
from metarobust.meta_optimizers._layer_calls import LAYERS


class StandIns:
    """For the parameters with a coefficient: their one gradient is made from the factors of their layers' calls.

    Other uses of them keep theirs. A layer that may use its weight in its own way is left alone, as is a weight with hooks.
    """

    def __init__(self, coefficients: Mapping[int, float] | None) -> None:
        self._coefficients = coefficients
        self._hidden: dict[nn.Module, dict[str, Tensor]] = {}

    def take(self, layer: nn.Module) -> None:
        """Run the layer's next call with stand-ins for weight and bias."""
        if self._coefficients is None or type(layer) not in LAYERS or "forward" in vars(layer):
            return
        # The bias too: convolutions compute both gradients where one is asked for.
        named = ((name, layer._parameters.get(name)) for name in ("weight", "bias"))
        found = {name: p for name, p in named if p is not None and id(p) in self._coefficients}
        found = {name: p for name, p in found.items() if p.requires_grad and not p._backward_hooks}
        if "weight" in found:
            self._hidden[layer] = cast("dict[str, Tensor]", found)
            for name, p in found.items():
                stand_in = p.detach().requires_grad_()  # so that the same things are kept for the backward pass
                stand_in.register_hook(refuse)
                layer._parameters[name] = cast("Any", stand_in)

    def give_back(self, layer: nn.Module) -> frozenset[str]:
        """Put weight and bias of a layer back; the names of those that were hidden."""
        hidden = self._hidden.pop(layer, {})
        for name, p in hidden.items():
            layer._parameters[name] = cast("Any", p)
        return frozenset(hidden)

    def give_back_all(self) -> None:
        """Put back what is still hidden."""
        for layer in list(self._hidden):
            self.give_back(layer)

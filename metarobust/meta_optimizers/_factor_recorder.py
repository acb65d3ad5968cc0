"""What watches a model's layers during one forward pass, and makes both gradient streams of what it saw."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from metarobust._checks import message, require
from metarobust._processes import processes, summed
from metarobust.attacks._common import looking
from metarobust.meta_optimizers import _adversarial_estimate as estimate
from metarobust.meta_optimizers._adversarial_tangent import SecondForward
from metarobust.meta_optimizers._gradient_origin import Origin, belongs_to_gradient, by_identity, summed_parts
from metarobust.meta_optimizers._layer_calls import LAYERS, Factors, LayerCall, Mix
from metarobust.meta_optimizers._second_stream import BalancedMoves, Moves, estimated_terms, scaled_terms
from metarobust.meta_optimizers._stand_ins import StandIns
from metarobust.models import Normalize
from metarobust.threat_models import ThreatModel


class FactorGradients(NamedTuple):
    """What `factor_gradients` returns.

    Attributes:
        loss: the value of the closure, detached.
        gradients: one tensor per parameter.
        second_gradients: the second stream, likewise.
    """

    loss: Tensor
    gradients: tuple[Tensor, ...]
    second_gradients: tuple[Tensor, ...]


class FactorRecorder:
    """Watches the layer calls of one forward pass; ``backward`` then fills ``.grad`` and the second stream.

    Made by :func:`record_factors`.

    Args:
        model, threat_model, gradient_source, coefficients, generator: see :func:`record_factors`.
    """

    def __init__(
        self,
        model: nn.Module,
        threat_model: ThreatModel,
        gradient_source: str,
        coefficients: Mapping[Tensor, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.threat_model, self.gradient_source = model, threat_model, gradient_source
        self.coefficients = None if coefficients is None else by_identity(coefficients)
        self._calls: list[LayerCall] = []
        self._place, self._places = 0, dict[nn.Module, int]()
        tangents = gradient_source == "gradient+adversarial_tangent"
        self._second = SecondForward(threat_model, generator) if tangents else None
        self._stand_ins = StandIns(self.coefficients)
        self._logits: Tensor | None = None
        self._logits_version, self._inside = 0, False
        self._recording = True
        self.averages = isinstance(model, DistributedDataParallel)
        """Whether both streams are averaged over the processes."""
        self._normalized: tuple[Normalize, Tensor] | None = None

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._second is None or not self._recording or looking():
            return None
        self._place, self._inside = 0, True
        return self._second.before_model(model, args, kwargs)

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if looking():
            return None
        if self._second is not None and self._second.running:
            self._second.before_layer(layer, args)
            return None
        if self._second is not None and self._recording and torch.is_grad_enabled():
            remedy = "call the model itself inside the block, not its parts, and other models outside of it"
            require(self._inside, "loss", "computed from the model's output", "a layer called by itself", remedy)
        self._place += self._recording
        self._places[layer] = self._place  # a layer may hold another
        if not args:
            remedy = "write layer(x) instead of layer(input=x) in the model's forward"
            raise ValueError(message("layer inputs", "positional", f"keywords alone in {type(layer).__name__}", remedy))
        (inputs, *rest) = args
        if not torch.is_grad_enabled():
            return None
        self._stand_ins.take(layer)
        if inputs.requires_grad:
            return None
        # An input that depends on no parameter: make it a leaf, so that the backward pass reaches it.
        return (inputs.detach().requires_grad_(), *rest)

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> None:
        hidden, inputs = self._stand_ins.give_back(layer), args[0] if args else None
        if not self._recording or looking():  # a checkpointed part of the model, run again on the way back
            return
        if output is None or inputs is None or not output.requires_grad or not inputs.requires_grad:  # None: the layer failed
            return
        first = isinstance(layer, LAYERS) and (inputs.is_leaf or not self._calls)
        normalize, shape = None, inputs.shape
        if first and self._normalized is not None:
            module, normalized = self._normalized
            # Only a layer that reads the normalised values themselves (a view of them) is perturbed through the layer.
            if inputs.untyped_storage().data_ptr() == normalized.untyped_storage().data_ptr():
                normalize, shape = module, normalized.shape
        self._calls.append(
            LayerCall(
                layer,
                cast("Tensor", layer.weight),  # what the layer held in this call, as `functional_call` put it there
                cast("Tensor | None", layer.bias),
                inputs,
                # Edges, not tensors: an in-place activation after the layer would redirect the tensor's gradient.
                get_gradient_edge(inputs),
                get_gradient_edge(output),
                first,
                normalize,
                shape,
                hidden,
                inputs._version,
                self._places[layer],
                estimate.statistics_of(layer),
            )
        )

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._recording or looking():
            return
        self._inside = False
        if isinstance(output, Tensor) and not output.requires_grad:
            return  # a look at the predictions, not what the loss is made of
        remedy = "open a block for each call, whose streams add up; for training.fit take an objective that calls it once"
        require(self._logits is None, "model", "called once inside the recording block", "a second call", remedy)
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        good = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1
        require(
            good,
            "model",
            f"one that returns logits [batch, classes], of two classes or more, for {self.gradient_source!r}",
            shape,
        )
        self._logits, self._logits_version = output, output._version

    def _after_normalize(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not looking():
            self._normalized = (cast("Normalize", layer), output)

    def gradients(
        self, loss: Tensor, parameters: Sequence[Tensor] | None = None, *, create_graph: bool = False
    ) -> FactorGradients:
        """Differentiate ``loss`` once and return both streams, in the order of ``parameters``.

        Args:
            loss: scalar computed inside the recording block.
            parameters: the tensors to differentiate by; default: those of the model that require a gradient.
            create_graph: keep the graph of both streams, to differentiate through them.
        """
        none, remedy = self.coefficients is None, "call recorder.backward(loss)"
        require(none, "coefficients", "None for both streams", "a combined gradient", remedy)
        targets = tuple(p for p in self.model.parameters() if p.requires_grad) if parameters is None else tuple(parameters)
        found, added = self._differentiate(loss, targets, create_graph=create_graph)
        gradients = tuple(torch.zeros_like(p) if g is None else g for p, g in zip(targets, found, strict=True))
        seconds = tuple(added[id(p)] if id(p) in added else torch.zeros_like(p) for p in targets)
        return FactorGradients(loss.detach(), gradients, seconds)

    def _differentiate(
        self, loss: Tensor, targets: Sequence[Tensor], *, create_graph: bool = False
    ) -> tuple[tuple[Tensor | None, ...], dict[int, Tensor]]:
        """Autograd's gradients by the targets, and by the id of a target what its layers' factors give."""
        require(loss.dim() == 0, "loss", "a scalar", f"shape {list(loss.shape)}", "write loss.mean()")
        require(
            bool(self._calls),
            "loss",
            "computed inside the recording block by a model with Linear or Conv layers",
            "no recorded layer call",
            "call the model inside the block, under enabled gradients",
        )
        edges = [call.output_edge for call in self._calls]
        if self._second is None:  # tangents need no gradients at the inputs of layers
            edges += [call.input_edge for call in self._calls]
        ends = [] if self._logits is None else [get_gradient_edge(self._logits)]
        if self._second is not None and self._second.input_edge is not None:
            ends.append(self._second.input_edge)
        sources = cast("Any", [*targets, *edges, *ends])
        self._recording = False
        try:
            found = torch.autograd.grad(loss, sources, create_graph=create_graph, allow_unused=True)
            return found[: len(targets)], self._second_stream(targets, found[len(targets) :], create_graph=create_graph)
        finally:
            self._recording = True

    def _second_stream(
        self, targets: Sequence[Tensor], found: Sequence[Tensor | None], *, create_graph: bool
    ) -> dict[int, Tensor]:
        """What the factors give, from autograd's gradients at each layer's input and output, and at logits and input."""
        count = len(self._calls)
        outputs, inputs, ends = found[:count], found[count : 2 * count], found[2 * count :]
        if self._second is not None:
            inputs, ends = outputs, found[count:]  # what stands for gradients at inputs is not read
        triples = zip(self._calls, inputs, outputs, strict=True)
        factors = [Factors(call, a, d) for call, a, d in triples if a is not None and d is not None]
        whole = all(call.inputs._version == call.version for call, *_ in factors)
        remedy = "write the operation behind a layer out of place"
        require(whole, "model", "such that a layer's input stays as the layer read it", "one changed in place", remedy)
        if not factors:  # no layer on the way to the loss
            return {}
        wanted = {id(p) for p in targets}
        added: dict[int, Tensor] = {}
        with torch.set_grad_enabled(create_graph), torch.autocast(self._calls[0].inputs.device.type, enabled=False):
            if self.gradient_source == "gradient+perturbed_factors":
                terms = scaled_terms(factors, wanted, self.threat_model, self._mix)
            else:
                slopes, remedy = ends[0] if ends else None, "call the model itself inside the block, not its parts"
                require(slopes is not None, "loss", "computed from the model's output", "one that does not depend on it", remedy)
                assert slopes is not None
                assert self._logits is not None
                moves: Moves
                if self._second is None:
                    moves = BalancedMoves(factors, self._logits, slopes, self.threat_model)
                else:
                    same, remedy = self._logits._version == self._logits_version, "write logits = logits / 2, not logits /= 2"
                    require(same, "model's output", "left as the model returned it", "one changed in place", remedy)
                    moves = self._second.tangents([f.call for f in factors], self._logits, slopes, ends[1])
                terms = estimated_terms(factors, wanted, self._mix, moves)
            for p, h in terms:
                before = added.get(id(p))
                added[id(p)] = h if before is None else before + h  # a shared weight sums its calls
        return added

    def backward(self, loss: Tensor) -> None:
        """Like ``loss.backward()``: accumulate ``.grad``, and the second stream in ``.second_grad``.

        Parameters with a coefficient get the combined gradient in ``.grad``, and no second stream.
        """
        targets = [p for p in self.model.parameters() if p.requires_grad]
        given = self.coefficients or {}
        found, added = self._differentiate(loss, targets)
        gradients = [
            summed_parts(p, g, added.get(id(p)) if id(p) in given else None) for p, g in zip(targets, found, strict=True)
        ]
        apart = [p for p in targets if id(p) not in given]
        seconds = [summed_parts(p, added.get(id(p))) for p in apart]
        if self.averages:
            gradients, seconds = ([s / processes() for s in summed(stream)] for stream in (gradients, seconds))
        own = {id(p): h for p, h in zip(apart, seconds, strict=True)}
        for p, g in zip(targets, gradients, strict=True):
            h = own.get(id(p))
            # The second stream accumulates only onto the very gradient it was filled with: after any kind of zero_grad, or a
            # plain backward in between, it starts afresh.
            before = cast("Any", p).second_grad if belongs_to_gradient(p, unchanged=True) else None
            h = h if before is None else before if h is None else before + h
            p.grad = g if p.grad is None else p.grad + g
            cast("Any", p).second_grad = h
            cast("Any", p).second_grad_origin = Origin(
                p.grad, p.grad._version, self.threat_model, self.gradient_source, id(p) in given
            )

    def release(self) -> None:
        """Let go of what was recorded, once the block is over."""
        self._calls.clear()
        self._logits, self._normalized = None, None
        self._stand_ins.give_back_all()  # an interrupt runs no hooks
        if self._second is not None:
            self._second.release()

    def _mix(self, p: Tensor, hidden: bool) -> Mix:
        """How much of the clean factor and of its change this parameter's term is made of."""
        if self.coefficients is None or id(p) not in self.coefficients:
            return Mix(0.0, 1.0)
        return Mix(1.0 if hidden else 0.0, self.coefficients[id(p)])

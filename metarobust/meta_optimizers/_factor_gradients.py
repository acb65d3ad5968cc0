r"""The perturbed-factor gradient: adversarial information from one clean forward-backward pass.

A layer's weight gradient is a product of two factors that the clean backward pass already holds: the layer's input
:math:`a` and the loss gradient at its output :math:`d`, :math:`g = \sum_i d_i \otimes a_i`. This module replaces the input
factor by its first-order worst case and keeps :math:`d`:

.. math:: h = \sum_i d_i \otimes e_i

For the first layer :math:`e` is the worst move inside the threat model's ball and box, in input units; for l_inf, away from the
box, :math:`h` is exactly the derivative of :math:`\epsilon \|dL/dx\|_1` with respect to that layer's weight at fixed
:math:`d`. For deeper layers :math:`e = \overline{|a|}\,\mathrm{sign}(dL/da)`, so that a coefficient of h is relative to the
activation scale. No perturbed input is formed or forwarded and no attack is called; the cost is one extra weight gradient per
layer. The closest relatives are YOPO (Zhang et al., 2019, arXiv 1905.00877) and input-gradient regularisation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from metarobust._checks import choice, message, require
from metarobust._processes import processes, summed
from metarobust.meta_optimizers import _adversarial_estimate as estimate
from metarobust.meta_optimizers._gradient_origin import Origin, belongs_to_gradient, by_identity, refuse, summed_parts
from metarobust.meta_optimizers._layer_calls import LAYERS, Factors, LayerCall, Mix
from metarobust.meta_optimizers._second_stream import estimated_terms, scaled_terms
from metarobust.models import Normalize
from metarobust.threat_models import ThreatModel

GRADIENT_SOURCES = ("gradient", "gradient+perturbed_factors", "gradient+adversarial_estimate")
"""What an update rule reads: one stream, or one of the two second streams beside it."""


class FactorGradients(NamedTuple):
    """``loss`` and, one entry per parameter, the gradient and the second stream."""

    loss: Tensor
    gradients: tuple[Tensor, ...]
    perturbed_factor_gradients: tuple[Tensor, ...]


class FactorRecorder:
    """Watches the layer calls of one forward pass; ``backward`` then fills ``.grad`` and the second stream.

    Made by :func:`record_factors`.
    """

    def __init__(
        self, model: nn.Module, threat_model: ThreatModel, source: str, coefficients: Mapping[Tensor, float] | None = None
    ) -> None:
        self.model, self.threat_model, self.source = model, threat_model, source
        self.coefficients = None if coefficients is None else by_identity(coefficients)
        self._calls: list[LayerCall] = []
        self._hidden: dict[nn.Module, dict[str, Tensor]] = {}
        self._logits: Tensor | None = None
        self._recording = True
        self._normalized: tuple[Normalize, Tensor] | None = None

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:
            remedy = "write layer(x) instead of layer(input=x) in the model's forward"
            raise ValueError(message("layer inputs", "positional", f"keywords alone in {type(layer).__name__}", remedy))
        (inputs, *rest) = args
        if not torch.is_grad_enabled():
            return None
        self._hide_weight(layer)
        if inputs.requires_grad:
            return None
        # An input that depends on no parameter: make it a leaf, so that the backward pass reaches it.
        return (inputs.detach().requires_grad_(), *rest)

    def _hide_weight(self, layer: nn.Module) -> None:
        """Run this call with stand-ins for weight and bias: their one gradient is made from the call's factors, not by autograd.

        Other uses of them keep theirs. A layer that may use its weight in its own way is left alone, as is a weight with hooks.
        """
        if self.coefficients is None or type(layer) not in LAYERS or "forward" in vars(layer):
            return
        # The bias too: convolutions compute both gradients where one is asked for.
        named = ((name, layer._parameters.get(name)) for name in ("weight", "bias"))
        found = {name: p for name, p in named if p is not None and id(p) in self.coefficients}
        found = {name: p for name, p in found.items() if p.requires_grad and not p._backward_hooks}
        if "weight" in found:
            self._hidden[layer] = cast("dict[str, Tensor]", found)
            for name, p in found.items():
                stand_in = p.detach().requires_grad_()  # so that the same things are kept for the backward pass
                stand_in.register_hook(refuse)
                layer._parameters[name] = cast("Any", stand_in)

    def _give_back(self, layer: nn.Module) -> frozenset[str]:
        """Put weight and bias of a layer back; the names of those that were hidden."""
        hidden = self._hidden.pop(layer, {})
        for name, p in hidden.items():
            layer._parameters[name] = cast("Any", p)
        return frozenset(hidden)

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> None:
        hidden, inputs = self._give_back(layer), args[0] if args else None
        if not self._recording:  # a checkpointed part of the model, run again on the way back
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
                cast("Tensor", layer.weight),
                inputs,
                # Edges, not tensors: an in-place activation after the layer would redirect the tensor's gradient.
                get_gradient_edge(inputs),
                get_gradient_edge(output),
                first,
                normalize,
                shape,
                hidden,
                inputs._version,
            )
        )

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._recording:
            return
        if isinstance(output, Tensor) and not output.requires_grad:
            return  # a look at the predictions, not what the loss is made of
        remedy = "open a block for each call; their streams add up"
        require(self._logits is None, "model", "called once inside the recording block", "a second call", remedy)
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        good = isinstance(output, Tensor) and output.dim() == 2
        require(good, "model", f"one that returns logits [batch, classes] for source {self.source!r}", shape)
        self._logits = output

    def _after_normalize(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
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
        return FactorGradients(loss, gradients, tuple(added[id(p)] if id(p) in added else torch.zeros_like(p) for p in targets))

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
        calls = tuple(self._calls)
        edges = [edge for call in calls for edge in (call.input_edge, call.output_edge)]
        logits = [] if self._logits is None else [get_gradient_edge(self._logits)]
        sources = cast("Any", [*targets, *logits, *edges])
        self._recording = False
        try:
            found = torch.autograd.grad(loss, sources, create_graph=create_graph, allow_unused=True)
        finally:
            self._recording = True
        begin = len(targets) + len(logits)
        pairs = zip(calls, found[begin::2], found[begin + 1 :: 2], strict=True)
        factors = [Factors(call, a, d) for call, a, d in pairs if a is not None and d is not None]
        whole = all(call.inputs._version == call.version for call, *_ in factors)
        remedy = "write the operation behind a layer out of place"
        require(whole, "model", "such that a layer's input stays as the layer read it", "one changed in place", remedy)
        wanted = {id(p) for p in targets}
        perturbed: dict[int, Tensor] = {}
        with torch.set_grad_enabled(create_graph), torch.autocast(loss.device.type, enabled=False):
            if self._logits is None:
                terms = scaled_terms(factors, wanted, self.threat_model, self._mix)
            else:
                slopes = found[begin - 1]
                require(slopes is not None, "loss", "computed from the model's output", "one that does not depend on it")
                terms = estimated_terms(
                    factors, wanted, self.threat_model, self._mix, logits=self._logits, logit_gradients=slopes
                )
            for p, h in terms:
                before = perturbed.get(id(p))
                perturbed[id(p)] = h if before is None else before + h  # a shared weight sums its calls
        return found[: len(targets)], perturbed

    def backward(self, loss: Tensor) -> None:
        """Like ``loss.backward()``: accumulate ``.grad``, and the second stream in ``.perturbed_factor_grad``.

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
        if isinstance(self.model, DistributedDataParallel):
            gradients, seconds = ([s / processes() for s in summed(stream)] for stream in (gradients, seconds))
        own = {id(p): h for p, h in zip(apart, seconds, strict=True)}
        for p, g in zip(targets, gradients, strict=True):
            h = own.get(id(p))
            # The second stream accumulates only onto the very gradient it was filled with: after any kind of zero_grad, or a
            # plain backward in between, it starts afresh.
            before = cast("Any", p).perturbed_factor_grad if belongs_to_gradient(p, unchanged=True) else None
            h = h if before is None else before if h is None else before + h
            p.grad = g if p.grad is None else p.grad + g
            cast("Any", p).perturbed_factor_grad = h
            cast("Any", p).perturbed_factor_origin = Origin(
                p.grad, p.grad._version, self.threat_model, self.source, id(p) in given
            )

    def _mix(self, p: Tensor, hidden: bool) -> Mix:
        """How much of the clean factor and of its change this parameter's term is made of."""
        if self.coefficients is None or id(p) not in self.coefficients:
            return Mix(0.0, 1.0)
        return Mix(1.0 if hidden else 0.0, self.coefficients[id(p)])


@contextmanager
def record_factors(
    model: nn.Module,
    *,
    threat_model: ThreatModel | None = None,
    source: str = "gradient+perturbed_factors",
    coefficients: Mapping[Tensor, float] | None = None,
) -> Iterator[FactorRecorder]:
    """Watch a forward pass in a plain training loop; ``recorder.backward(loss)`` fills both gradient streams.

    Args:
        model: any ``nn.Module`` whose weights sit in Linear or Conv layers (others are passed through).
        threat_model: norm, epsilon and box of the first layer's perturbation, norm of the others'. A learned optimizer needs
            the one it was trained with. Default: l_inf, 8/255.
        source: the second stream. ``"gradient+perturbed_factors"``: the weight gradient with its input factor replaced by that
            factor's scaled worst move. ``"gradient+adversarial_estimate"``: the estimated change of the gradient at the
            adversarial examples, for cross-entropy on the model's output ``[batch, classes]``; biases and normalisations have
            one too (docs/transfer.md).
        coefficients: c by parameter, for a rule that follows g + c h: ``backward`` then fills ``.grad`` with that sum, at one
            weight gradient per layer, that of the combined factor, where both streams take two. What changes ``.grad``
            afterwards, such as clipping, acts on the sum. Parameters that are left out get both streams.

    Under ``DistributedDataParallel`` (pass the wrapped model) both streams are averaged over the processes; a model from
    ``torch.compile`` runs eagerly while it is watched. ``nn.MultiheadAttention`` calls no layer for its projections, whose second
    stream stays zero; attention made of Linear layers is seen.

    A ``GradScaler`` scales back ``.grad`` alone: use it with coefficients, or bfloat16, which needs none.

    Raises:
        ValueError: on ``backward``, the first layer reads values outside the box (put ``Normalize`` first in the model).
        RuntimeError: with coefficients, a plain ``loss.backward()`` of what was computed in the block.

    Example:
        >>> import torch.nn.functional as F
        >>> from metarobust.models import mlp
        >>> model, x, y = mlp([4, 3, 2]), torch.rand(8, 4), torch.randint(2, (8,))
        >>> with record_factors(model, threat_model=ThreatModel(epsilon=0.1)) as recorder:
        ...     recorder.backward(F.cross_entropy(model(x), y))
        >>> model[1].weight.grad.shape == model[1].weight.perturbed_factor_grad.shape
        True
    """
    threat_model = ThreatModel() if threat_model is None else threat_model
    require(
        threat_model.norm in ("linf", "l2"),
        "threat_model.norm",
        "'linf' or 'l2' for factor gradients",
        threat_model.norm,
    )
    choice("source", source, GRADIENT_SOURCES[1:])
    recorder = FactorRecorder(model, threat_model, source, coefficients)
    estimating = source == "gradient+adversarial_estimate"
    hooks = []
    around = ExitStack()
    if isinstance(model, DistributedDataParallel):
        around.enter_context(model.no_sync())  # both streams are averaged by `backward`
    if hasattr(model, "_orig_mod"):  # what torch.compile returns: a compiled graph would not call the hooks
        around.enter_context(torch.compiler.set_stance("force_eager"))
    for module in model.modules():
        if isinstance(module, LAYERS) or (estimating and isinstance(module, estimate.NORMALISATIONS)):
            hooks.append(module.register_forward_pre_hook(recorder._before))
            # First, so that what hooks of the user do with the output or the weight is theirs.
            hooks.append(module.register_forward_hook(recorder._after, prepend=True, always_call=True))
        elif isinstance(module, Normalize):
            hooks.append(module.register_forward_hook(recorder._after_normalize))
    if estimating:
        hooks.append(model.register_forward_hook(recorder._after_model))
    try:
        with around:
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        for layer in list(recorder._hidden):  # an interrupt runs no hooks
            recorder._give_back(layer)
        recorder._calls.clear()


def factor_gradients(
    model: nn.Module,
    loss_closure: Callable[[], Tensor],
    *,
    threat_model: ThreatModel | None = None,
    source: str = "gradient+perturbed_factors",
    parameters: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> FactorGradients:
    r"""Gradient and perturbed-factor gradient of a loss, from one clean forward-backward pass.

    Args:
        model: any ``nn.Module``; its Linear and Conv layers are watched through hooks for the duration of the call.
        loss_closure: calls the model (directly or through ``torch.func.functional_call``) and returns a scalar loss.
        threat_model: see :func:`record_factors`.
        source: see :func:`record_factors`.
        parameters: tensors to differentiate by, when not the model's own (``functional_call``).
        create_graph: keep the graph of both streams.

    Returns:
        ``FactorGradients(loss, gradients, perturbed_factor_gradients)``, entries in the order of the parameters. The second
        stream carries no coefficient: use it as ``g + c * h``, with ``c`` around 1.5 for the first layer (whose h is in input
        units times epsilon) and around 0.15 for the others; with the adversarial estimate, around 1 for all.

    Example:
        >>> import torch.nn.functional as F
        >>> from metarobust.models import mlp
        >>> model, x, y = mlp([4, 3, 2]), torch.rand(8, 4), torch.randint(2, (8,))
        >>> loss, g, h = factor_gradients(model, lambda: F.cross_entropy(model(x), y))
        >>> [tuple(t.shape) for t in h]
        [(3, 4), (3,), (2, 3), (2,)]
    """
    with record_factors(model, threat_model=threat_model, source=source) as recorder:
        return recorder.gradients(loss_closure(), parameters, create_graph=create_graph)

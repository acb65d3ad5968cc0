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

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel

from metarobust._checks import choice, images, message, require
from metarobust._processes import processes, summed
from metarobust._tensors import per_example
from metarobust.meta_optimizers import _adversarial_estimate as estimate
from metarobust.meta_optimizers._layer_calls import LAYERS, Factors, LayerCall, activation_scale, weight_gradient
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

    def __init__(self, model: nn.Module, threat_model: ThreatModel, source: str) -> None:
        self.model, self.threat_model, self.source = model, threat_model, source
        self._calls: list[LayerCall] = []
        self._logits: Tensor | None = None
        self._normalized: tuple[Normalize, Tensor] | None = None

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:
            remedy = "write layer(x) instead of layer(input=x) in the model's forward"
            raise ValueError(message("layer inputs", "positional", f"keywords alone in {type(layer).__name__}", remedy))
        (inputs, *rest) = args
        if not torch.is_grad_enabled() or inputs.requires_grad:
            return None
        # An input that depends on no parameter: make it a leaf, so that the backward pass reaches it.
        return (inputs.detach().requires_grad_(), *rest)

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs = args[0]
        if not output.requires_grad or not inputs.requires_grad:
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
            )
        )

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
        targets = tuple(p for p in self.model.parameters() if p.requires_grad) if parameters is None else tuple(parameters)
        require(loss.dim() == 0, "loss", "a scalar", f"shape {list(loss.shape)}", "write loss.mean()")
        require(
            bool(self._calls),
            "loss",
            "computed inside the recording block by a model with Linear or Conv layers",
            "no recorded layer call",
            "call the model inside the block, under enabled gradients",
        )
        edges = [edge for call in self._calls for edge in (call.input_edge, call.output_edge)]
        logits = [] if self._logits is None else [get_gradient_edge(self._logits)]
        found = torch.autograd.grad(loss, cast("Any", [*targets, *logits, *edges]), create_graph=create_graph, allow_unused=True)
        gradients = tuple(torch.zeros_like(p) if g is None else g for p, g in zip(targets, found[: len(targets)], strict=True))
        begin = len(targets) + len(logits)
        pairs = zip(self._calls, found[begin::2], found[begin + 1 :: 2], strict=True)
        factors = [Factors(call, a, d) for call, a, d in pairs if a is not None and d is not None]
        wanted = {id(p) for p in targets}
        perturbed: dict[int, Tensor] = {}
        with torch.set_grad_enabled(create_graph), torch.autocast(loss.device.type, enabled=False):
            if self._logits is None:
                terms = self._scaled_terms(factors, wanted)
            else:
                terms = self._estimated_terms(factors, found[begin - 1], wanted)
            for p, h in terms:
                before = perturbed.get(id(p))
                perturbed[id(p)] = h if before is None else before + h  # a shared weight sums its calls
        return FactorGradients(loss, gradients, tuple(perturbed.get(id(p), torch.zeros_like(p)) for p in targets))

    def backward(self, loss: Tensor) -> None:
        """Like ``loss.backward()``: accumulate ``.grad``, and the second stream in ``.perturbed_factor_grad``."""
        targets = [p for p in self.model.parameters() if p.requires_grad]
        _, gradients, seconds = self.gradients(loss, targets)
        if isinstance(self.model, DistributedDataParallel):
            gradients, seconds = ([s / processes() for s in summed(stream)] for stream in (gradients, seconds))
        for p, g, h in zip(targets, gradients, seconds, strict=True):
            # The second stream accumulates only onto the very gradient it was filled with: after any kind of zero_grad, or a
            # plain backward in between, it starts afresh.
            if belongs_to_gradient(p, unchanged=True):
                h = cast("Any", p).perturbed_factor_grad + h
            p.grad = g if p.grad is None else p.grad + g
            cast("Any", p).perturbed_factor_grad = h
            cast("Any", p).perturbed_factor_origin = (p.grad, p.grad._version, self.threat_model, self.source)

    def _scaled_terms(self, factors: list[Factors], wanted: set[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Every wanted weight with its gradient under the scaled worst move of its inputs."""
        for call, input_gradient, output_gradient in factors:
            if id(call.weight) not in wanted:
                continue
            if call.first:
                yield call.weight, weight_gradient(call, self._worst_case_of_input(call, input_gradient), output_gradient)
                continue
            direction = self.threat_model.ascent_direction(input_gradient)
            # The activation scale is one number per copy: it is cheaper on the weight gradient than on the activations.
            scale = activation_scale(call.inputs, self.threat_model.norm, getattr(call.layer, "copies", 1))
            h = weight_gradient(call, direction, output_gradient)
            yield call.weight, h * (per_example(scale, h) if len(scale) > 1 else scale)

    def _estimated_terms(
        self, factors: list[Factors], logit_gradients: Tensor | None, wanted: set[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every wanted parameter of a recorded layer with the estimated change of its gradient."""
        assert self._logits is not None
        require(logit_gradients is not None, "loss", "computed from the model's output", "one that does not depend on it")
        moves = {f.call: self._worst_case_of_input(f.call, f.input_gradient) for f in factors if f.call.first}
        gradients = [f.input_gradient for f in factors if f.call.first]
        rise = estimate.first_order_rise(list(moves.values()), gradients)
        change = estimate.predicted_change(self._logits, cast("Tensor", logit_gradients), rise)
        for call, input_gradient, output_gradient in factors:
            bias = cast("Tensor | None", call.layer.bias)
            if bias is not None and id(bias) in wanted:
                yield bias, estimate.summed_like(bias.shape, call.layer, output_gradient, change.ratio - 1).to(bias.dtype)
            if id(call.weight) not in wanted:  # frozen, or a normalisation without a gain
                continue
            if call.first:
                changed = estimate.changed_input(call.inputs, moves[call], change)
                yield call.weight, weight_gradient(call, changed, output_gradient)
            elif isinstance(call.layer, LAYERS):
                changed = estimate.changed_factor(call.inputs, input_gradient, rise, change, self.threat_model.norm)
                yield call.weight, weight_gradient(call, changed, output_gradient)
            else:
                gain = output_gradient * estimate.normalized(call.layer, call.inputs)
                h = estimate.summed_like(call.weight.shape, call.layer, gain, change.ratio - 1)
                yield call.weight, h.to(call.weight.dtype)

    def _worst_case_of_input(self, call: LayerCall, gradient: Tensor) -> Tensor:
        inputs = call.inputs
        if call.normalize is None:
            return self._worst_move(inputs, gradient)
        normalize, shape = call.normalize, call.normalized_shape
        require(
            inputs.numel() == shape.numel(),
            "model",
            "such that its first layer reads the whole output of Normalize, reshaped at most",
            f"an input of shape {list(inputs.shape)} after Normalize gave {list(shape)}",
        )
        std, mean = (normalize._channels(v, inputs.reshape(shape)) for v in (normalize.std, normalize.mean))
        pixels = inputs.reshape(shape) * std + mean
        return (self._worst_move(pixels, gradient.reshape(shape) / std) / std).reshape(inputs.shape)

    def _worst_move(self, x: Tensor, gradient: Tensor) -> Tensor:
        """First-order worst case in the input: an epsilon step of steepest ascent, stopped by the box."""
        threat_model, x = self.threat_model, x.detach()
        # A first layer that reads anything but pixels would silently get a meaningless perturbation.
        images(x, lower=threat_model.lower, upper=threat_model.upper, tolerance=1e-4)
        moved = torch.add(x, threat_model.ascent_direction(gradient), alpha=threat_model.epsilon)
        return moved.clamp_(threat_model.lower, threat_model.upper).sub_(x)


def belongs_to_gradient(p: Tensor, *, unchanged: bool = False) -> bool:
    """Whether the second stream of ``p`` was filled together with its present ``.grad`` (and, if asked, none changed since)."""
    origin = getattr(p, "perturbed_factor_origin", None)
    if origin is None or p.grad is None or getattr(p, "perturbed_factor_grad", None) is None:
        return False
    return origin[0] is p.grad and (not unchanged or origin[1] == p.grad._version)


@contextmanager
def record_factors(
    model: nn.Module, *, threat_model: ThreatModel | None = None, source: str = "gradient+perturbed_factors"
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

    Under ``DistributedDataParallel`` (pass the wrapped model) both streams are averaged over the processes; a model from
    ``torch.compile`` runs eagerly while it is watched. ``nn.MultiheadAttention`` calls no layer for its projections, whose second
    stream stays zero; attention made of Linear layers is seen.

    Raises:
        ValueError: on ``backward``, the first layer reads values outside the box (put ``Normalize`` first in the model).

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
    recorder = FactorRecorder(model, threat_model, source)
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
            hooks.append(module.register_forward_hook(recorder._after))
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

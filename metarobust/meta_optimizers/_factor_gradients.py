r"""The second gradient stream: adversarial information from one forward-backward pass, or from a third more.

A layer's weight gradient is a product of two factors that the clean backward pass already holds: the layer's input
:math:`a` and the loss gradient at its output :math:`d`, :math:`g = \sum_i d_i \otimes a_i`. The perturbed-factor gradient
replaces the input factor by its first-order worst case and keeps :math:`d`:

.. math:: h = \sum_i d_i \otimes e_i

For the first layer :math:`e` is the worst move inside the threat model's ball and box, in input units; for l_inf, away from the
box, :math:`h` is exactly the derivative of :math:`\epsilon \|dL/dx\|_1` with respect to that layer's weight at fixed
:math:`d`. For deeper layers :math:`e = \overline{|a|}\,\mathrm{sign}(dL/da)`, so that a coefficient of h is relative to the
activation scale. No perturbed input is formed or forwarded and no attack is called; the cost is one extra weight gradient per
layer. The closest relatives are YOPO (Zhang et al., 2019, arXiv 1905.00877) and input-gradient regularisation. The other two
sources estimate how the gradient changes at adversarial examples: :mod:`._adversarial_estimate` from the same pass,
:mod:`._adversarial_tangent` with another forward pass next to it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metarobust._checks import choice, message, require
from metarobust.meta_optimizers import _adversarial_estimate as estimate
from metarobust.meta_optimizers._factor_recorder import FactorGradients, FactorRecorder
from metarobust.meta_optimizers._layer_calls import LAYERS
from metarobust.models import Normalize
from metarobust.threat_models import ThreatModel

GRADIENT_SOURCES = ("gradient", "gradient+perturbed_factors", "gradient+adversarial_estimate", "gradient+adversarial_tangent")
"""What an update rule reads: one stream, or one of the three second streams beside it."""


@contextmanager
def record_factors(
    model: nn.Module,
    *,
    threat_model: ThreatModel | None = None,
    gradient_source: str = "gradient+perturbed_factors",
    coefficients: Mapping[Tensor, float] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[FactorRecorder]:
    """Watch a forward pass in a plain training loop; ``recorder.backward(loss)`` fills both gradient streams.

    Args:
        model: any ``nn.Module`` whose weights sit in Linear or Conv layers (others are passed through).
        threat_model: norm, epsilon and box of the first layer's perturbation, norm of the others'. A learned optimizer needs
            the one it was trained with. Default: l_inf, 8/255.
        gradient_source: the second stream. ``"gradient+perturbed_factors"``: the weight gradient with its input factor
            replaced by that factor's scaled worst move. ``"gradient+adversarial_estimate"``: the estimated change of the
            gradient at the adversarial examples, for cross-entropy on the model's output ``[batch, classes]`` (logits that are
            adjusted behind the model are not its output: adjust them in the model); biases and
            normalisations have one too (docs/transfer.md). ``"gradient+adversarial_tangent"``: a better one, from the tangent
            of all activations along the worst move of the input, by another forward pass a small step along it (a third of a
            pass; a hundredth of the move in float32, nearly all of it in half precision and on GPUs that round float32). Both
            streams are taken at inputs with uniform noise from a ball of twice the radius, which the model's first argument is
            given in the block.
        coefficients: c by parameter, for a rule that follows g + c h: ``backward`` then fills ``.grad`` with that sum, at one
            weight gradient per layer, that of the combined factor, where both streams take two. What changes ``.grad``
            afterwards, such as clipping, acts on the sum. Parameters that are left out get both streams.
        generator: of the noise; default: torch's own.

    Under ``DistributedDataParallel`` (pass the wrapped model) both streams are averaged over the processes; a model from
    ``torch.compile`` runs eagerly while it is watched. ``nn.MultiheadAttention`` calls no layer for its projections, whose second
    stream stays zero; attention made of Linear layers is seen. What a weight is computed from (``weight_norm``) has none either.
    Tangents call the model twice, with the same random numbers if these are torch's. What this library's attacks do in the block
    is not watched.

    A ``GradScaler`` scales back ``.grad`` alone: use it with coefficients, or bfloat16, which needs none.

    Raises:
        ValueError: on ``backward``, the first layer reads values outside the box (put ``Normalize`` first in the model); with
            tangents, the model does when it is called.
        RuntimeError: with coefficients, a plain ``loss.backward()`` of what was computed in the block.

    Example:
        >>> import torch.nn.functional as F
        >>> from metarobust.models import mlp
        >>> model, x, y = mlp([4, 3, 2]), torch.rand(8, 4), torch.randint(2, (8,))
        >>> with record_factors(model, threat_model=ThreatModel(epsilon=0.1)) as recorder:
        ...     recorder.backward(F.cross_entropy(model(x), y))
        >>> model[1].weight.grad.shape == model[1].weight.second_grad.shape
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message("model", "an nn.Module, whose layers are watched", type(model).__name__))
    threat_model = ThreatModel() if threat_model is None else threat_model
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel or None", repr(threat_model)))
    require(
        threat_model.norm in ("linf", "l2"),
        "threat_model.norm",
        "'linf' or 'l2' for factor gradients",
        threat_model.norm,
    )
    choice("gradient_source", gradient_source, GRADIENT_SOURCES[1:])
    recorder = FactorRecorder(model, threat_model, gradient_source, coefficients, generator)
    estimating = gradient_source != "gradient+perturbed_factors"
    hooks = []
    around = ExitStack()
    if isinstance(model, DistributedDataParallel):
        around.enter_context(model.no_sync())  # both streams are averaged by `backward`
    if hasattr(model, "_orig_mod"):  # what torch.compile returns: a compiled graph would not call the hooks
        around.enter_context(torch.compiler.set_stance("force_eager"))
    for module in model.modules():
        if isinstance(module, LAYERS) or (estimating and estimate.is_normalisation(module)):
            hooks.append(module.register_forward_pre_hook(recorder._before))
            # First, so that what hooks of the user do with the output or the weight is theirs.
            hooks.append(module.register_forward_hook(recorder._after, prepend=True, always_call=True))
        elif isinstance(module, Normalize):
            hooks.append(module.register_forward_hook(recorder._after_normalize))
    if estimating:
        hooks.append(model.register_forward_pre_hook(recorder._before_model, prepend=True, with_kwargs=True))
        hooks.append(model.register_forward_hook(recorder._after_model))
    try:
        with around:
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        recorder.release()


def factor_gradients(
    model: nn.Module,
    loss_closure: Callable[[], Tensor],
    *,
    threat_model: ThreatModel | None = None,
    gradient_source: str = "gradient+perturbed_factors",
    parameters: Sequence[Tensor] | None = None,
    create_graph: bool = False,
    generator: torch.Generator | None = None,
) -> FactorGradients:
    r"""Gradient and second stream of a loss, by default the perturbed-factor gradient.

    Args:
        model: any ``nn.Module``; its Linear and Conv layers are watched through hooks for the duration of the call.
        loss_closure: calls the model (directly or through ``torch.func.functional_call``) and returns a scalar loss.
        threat_model: see :func:`record_factors`.
        gradient_source: see :func:`record_factors`.
        parameters: tensors to differentiate by, when not the model's own (``functional_call``).
        create_graph: keep the graph of both streams.
        generator: see :func:`record_factors`.

    Returns:
        ``FactorGradients(loss, gradients, second_gradients)``, entries in the order of the parameters. The second
        stream carries no coefficient: use it as ``g + c * h``, with ``c`` around 1.5 for the first layer (whose h is in input
        units times epsilon) and around 0.15 for the others; with the adversarial estimate and tangents, around 1 for weights, and
        with tangents 0 for biases and normalisations.

    Example:
        >>> import torch.nn.functional as F
        >>> from metarobust.models import mlp
        >>> model, x, y = mlp([4, 3, 2]), torch.rand(8, 4), torch.randint(2, (8,))
        >>> loss, g, h = factor_gradients(model, lambda: F.cross_entropy(model(x), y))
        >>> [tuple(t.shape) for t in h]
        [(3, 4), (3,), (2, 3), (2,)]
    """
    if not callable(loss_closure):
        remedy = "write lambda: F.cross_entropy(model(x), y)"
        raise TypeError(message("loss_closure", "a function that computes the loss", type(loss_closure).__name__, remedy))
    with record_factors(model, threat_model=threat_model, gradient_source=gradient_source, generator=generator) as recorder:
        return recorder.gradients(loss_closure(), parameters, create_graph=create_graph)

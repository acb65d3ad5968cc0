r"""How a worst move of the input spreads through a network, from another forward pass beside the clean one.

The tangent of the activations along the worst move e of the input is a difference quotient over a small step :math:`\tau`,
:math:`\dot a_l = (a_l(x + \tau e) - a_l(x)) / \tau`: a forward pass, a third of a pass, at an input that is a hundredth of the
move away (in single precision; in half precision, and where float32 is rounded, as cuDNN does by default, the step is nearly the
whole move). It gives each layer's move, of which :mod:`._adversarial_estimate` knows one number, and the change of all logits,

.. math:: z' = z + s \dot z, \qquad r = (1 - p_y(z')) / (1 - p_y(z)),

where the share s of the move that is made ends where the best wrong class would lead the label by `LOST` logits. The network is
taken as linear along the move, with the activation patterns and normalisations of x; an adversarial example would tell what it
does beyond them, and none is formed.

A network can learn to be flat at its training examples and nowhere else ("catastrophic overfitting" of FGSM training; Wong et
al., 2020). So x is a clean example plus uniform noise from a ball of twice the radius, and the move starts there and may leave
the threat model's ball (de Jorge et al., 2022, who do so for FGSM training): docs/transfer.md has the trials.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from metarobust._checks import images, require
from metarobust._tensors import per_example
from metarobust.meta_optimizers import _adversarial_estimate as estimate
from metarobust.meta_optimizers._layer_calls import LayerCall, Mix
from metarobust.threat_models import ThreatModel

NOISE = 2.0
"""Radius of the noise of the first pass, in multiples of epsilon."""
REACH = 1.25
"""Length of the move, in multiples of epsilon."""
LOST = 0.5
"""A move ends where the best wrong class leads the label by this much, in logits."""
LARGEST_RISE = 9.0
"""Of the logarithm of the label's missing probability, which keeps r finite in half precision."""
BALANCE = 25.0
"""The step of a tangent, in roots of the rounding error: 0.01 of the move in single precision."""
ROUNDED_FACTORS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
"""Rounding error of products of float32, by torch.get_float32_matmul_precision(); "high" is also what cuDNN convolutions have."""

_TINY = 1e-30


class Tangents(NamedTuple):
    """What each layer reads in the second pass, and what becomes of each example."""

    inputs: dict[LayerCall, Tensor]
    step: float
    change: estimate.Change

    def factor(self, call: LayerCall, input_gradient: Tensor, mix: Mix) -> Tensor:
        """``r (a + s e) - a`` of a layer's input a, mixed with a as ``mix`` says."""
        # In the precision of the weight: r times an activation may be too large for that of autocast.
        return self._combined(self.inputs[call], call.inputs.to(call.weight.dtype), mix)

    def gain(self, call: LayerCall, mix: Mix) -> Tensor:
        """The same of what the gain of a normalisation multiplies."""
        moved, there = (estimate.normalized(call, a) for a in (self.inputs[call], call.inputs))
        return self._combined(moved, there.to(call.weight.dtype), mix)

    def _combined(self, moved: Tensor, there: Tensor, mix: Mix) -> Tensor:
        # In two passes over memory. The step is so long that the terms with 1 / step cancel to well above their rounding.
        ratio, reach = self.change
        along = mix.change / self.step * ratio * reach
        kept = mix.clean + mix.change * (ratio - 1) - along
        along, kept = (per_example(values.to(there.dtype), there) for values in (along, kept))
        changed = moved.to(there.dtype) * along
        if changed.requires_grad or kept.requires_grad:
            return torch.addcmul(changed, there, kept)
        return changed.addcmul_(there.detach(), kept)


class SecondForward:
    """The model's call of a recording block, and the same call again with its input moved.

    The second time has the parameters, buffers, modes, autocast and random numbers (of torch's own generators) that the first one
    had, and leaves buffers and generators as it found them. Hooks of the user run again.
    """

    def __init__(self, threat_model: ThreatModel, generator: torch.Generator | None) -> None:
        self.threat_model, self.generator = threat_model, generator
        self.running = False
        self._call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._parameters: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._modes: list[tuple[nn.Module, bool]] = []
        self._random: list[tuple[torch.device, Tensor]] = []
        self._autocast: tuple[bool, torch.dtype] = (False, torch.float32)
        self._seen: list[tuple[nn.Module, Tensor, int]] = []

    def before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add noise to the model's input and keep what the call is made of; a forward pre-hook."""
        if self.running or not torch.is_grad_enabled():
            return None
        remedy = "write model(x), with x its only or first argument"
        require(bool(args), "model", "called with its input as the first positional argument", "keywords alone", remedy)
        x, *rest = args
        ball = self.threat_model
        # What reads anything but pixels would silently get a meaningless perturbation.
        images(x, lower=ball.lower, upper=ball.upper, tolerance=1e-4)
        radius = NOISE * ball.epsilon if ball.norm == "l2" else min(NOISE * ball.epsilon, ball.upper - ball.lower)
        clean = x.detach()
        noisy = replace(ball, epsilon=radius).sample(clean, generator=self.generator)
        # On the graph of x where it has one; a leaf otherwise, so that the backward pass reaches it.
        noisy = x + (noisy - clean) if x.requires_grad else noisy.requires_grad_()
        model = model.module if isinstance(model, DistributedDataParallel) else model
        self._call = (model, (noisy, *rest), kwargs)
        # Those of this call, which `functional_call` may have put there; buffers as they are before the call changes them.
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        copies: dict[int, Tensor] = {}
        named = model.named_buffers(remove_duplicate=False)
        self._buffers = {name: copies.setdefault(id(buffer), buffer.clone()) for name, buffer in named}
        self._modes = [(module, module.training) for module in model.modules()]
        self._autocast = (torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type))
        self._random = list(_random_states(x.device))
        return (noisy.clone(), *rest), kwargs  # a model may write into its input

    def before_layer(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """See what a layer reads in the second pass; a forward pre-hook."""
        self._seen.append((layer, args[0], args[0]._version))

    @property
    def input_edge(self) -> GradientEdge | None:
        """Where the loss gradient at the model's input appears."""
        return None if self._call is None else get_gradient_edge(self._call[1][0])

    def tangents(
        self, calls: Sequence[LayerCall], logits: Tensor, logit_gradients: Tensor, input_gradient: Tensor | None
    ) -> Tangents:
        """Run the model again, next to where it was, along the worst move of its input.

        Args:
            calls: recorded layer calls.
            logits: of the first pass, ``[batch, classes]``.
            logit_gradients: loss gradient there.
            input_gradient: loss gradient at the model's input.
        """
        assert self._call is not None
        require(
            input_gradient is not None, "model", "one through which the loss has a gradient at its input", "none",
            'run frozen layers with gradients enabled, or take gradient_source="gradient+adversarial_estimate"',
        )  # fmt: skip
        assert input_gradient is not None
        (model, (x, *rest), kwargs), ball = self._call, self.threat_model
        x = x.detach()
        step = max(step_of(dtype, x.device) for dtype in {logits.dtype, *(call.inputs.dtype for call in calls)})
        move = torch.add(x, ball.ascent_direction(input_gradient), alpha=REACH * ball.epsilon).clamp(ball.lower, ball.upper) - x
        moved = self._run(model, (torch.add(x, move, alpha=step), *rest), kwargs)
        found = {call: self._seen[call.place - 1] for call in calls if call.place <= len(self._seen)}
        self._seen = []
        same = len(found) == len(calls) and all(
            layer is call.layer and a.shape == call.inputs.shape for call, (layer, a, _) in found.items()
        )
        require(same, "model", "one that calls the same layers in the same order each time", "other calls at the second time")
        whole = all(a._version == version for _, a, version in found.values())
        remedy = "write the operation behind a layer out of place"
        require(whole, "model", "such that a layer's input stays as the layer read it", "one changed in place", remedy)
        change = tangent_change(logits, moved, logit_gradients, step)
        return Tangents({call: a for call, (_, a, _) in found.items()}, step, change)

    def _run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        present = list(_random_states(args[0].device))
        modes = [(module, module.training) for module, _ in self._modes]
        enabled, dtype = self._autocast
        named = model.named_parameters(remove_duplicate=False)
        swapped = bool(self._buffers) or any(self._parameters.get(name) is not p for name, p in named)
        self.running, self._seen = True, []
        try:
            _set_modes(self._modes)
            _set_random_states(self._random)
            with torch.autocast(args[0].device.type, dtype=dtype, enabled=enabled):
                if not swapped:
                    return cast("Tensor", model(*args, **kwargs))
                everything = self._parameters | self._buffers
                return cast("Tensor", functional_call(model, everything, args, kwargs, tie_weights=False))
        finally:
            self.running = False
            _set_modes(modes)
            _set_random_states(present)

    def release(self) -> None:
        """Let go of everything that a recording kept."""
        self._call, self._seen, self._parameters, self._buffers, self._modes = None, [], {}, {}, []


def tangent_change(logits: Tensor, moved: Tensor, logit_gradients: Tensor, step: float) -> estimate.Change:
    """How far each example is moved, and what that does to its prediction, where all logits change linearly."""
    logits, moved = estimate.exact(logits), estimate.exact(moved)
    along = (moved - logits) / step
    label = estimate.label_of(estimate.exact(logit_gradients))
    lead = logits.gather(1, label) - logits
    fall = along - along.gather(1, label)
    # Where each wrong class would come to lead by LOST; the label's own entry never does.
    ends = torch.where(fall > 0, (lead + LOST).clamp(min=0) / fall.clamp(min=_TINY), torch.inf)
    reach = ends.scatter(1, label, torch.inf).amin(1).clamp(max=1)
    rise = _log_missing(logits + reach[:, None] * along, label) - _log_missing(logits, label)
    return estimate.Change(rise.clamp(max=LARGEST_RISE).exp(), reach)


def step_of(dtype: torch.dtype, device: torch.device) -> float:
    """The step of a tangent, as a share of the move: short enough for the curvature, long enough for rounding."""
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32:  # whose factors some processors round
        eps = max(eps, ROUNDED_FACTORS[torch.get_float32_matmul_precision()])
        if device.type == "cuda":
            conv = getattr(torch.backends.cudnn, "conv", None)  # in older versions of torch there is one switch for all
            rounded = torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"
            eps = max(eps, ROUNDED_FACTORS["high"] if rounded else 0.0)
    return min(1.0, BALANCE * eps**0.5)


def _log_missing(logits: Tensor, label: Tensor) -> Tensor:
    """Logarithm of the probability of all classes but the label, ``[batch]``."""
    return logits.scatter(1, label, -torch.inf).logsumexp(1) - logits.logsumexp(1)


def _random_states(device: torch.device) -> Iterable[tuple[torch.device, Tensor]]:
    yield torch.device("cpu"), torch.get_rng_state()
    if device.type == "cuda":
        yield device, torch.cuda.get_rng_state(device)


def _set_random_states(states: Iterable[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training

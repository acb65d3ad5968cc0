"""What every parameter's second stream is summed from: one term per layer call, of any source."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from metarobust._checks import require
from metarobust._tensors import per_example
from metarobust.meta_optimizers import _adversarial_estimate as estimate
from metarobust.meta_optimizers._layer_calls import (
    LAYERS,
    Factors,
    LayerCall,
    Mix,
    activation_scale,
    weight_gradient,
    worst_case_of_input,
)
from metarobust.threat_models import ThreatModel

MixOf = Callable[[Tensor, bool], Mix]
"""How a parameter's term is mixed; true where autograd gives no clean gradient for it."""
Terms = Iterator[tuple[Tensor, Tensor]]


class Moves(Protocol):
    """How the inputs of layers change under attack, and the gradient with them: one estimate of it."""

    @property
    def change(self) -> estimate.Change:
        """What becomes of each example."""
        ...

    def factor(self, call: LayerCall, input_gradient: Tensor, mix: Mix) -> Tensor:
        """The input of a layer, as it enters the weight gradient."""
        ...

    def gain(self, call: LayerCall, mix: Mix) -> Tensor:
        """What the gain of a normalisation multiplies, as it enters its gradient."""
        ...


class BalancedMoves:
    """Those that the clean pass alone suggests."""

    def __init__(self, factors: list[Factors], logits: Tensor, logit_gradients: Tensor, threat_model: ThreatModel) -> None:
        firsts = [f for f in factors if f.call.first]
        self._moves = {f.call: worst_case_of_input(f.call, f.input_gradient, threat_model) for f in firsts}
        self._rise = estimate.first_order_rise(list(self._moves.values()), [f.input_gradient for f in firsts])
        self._norm = threat_model.norm
        self.change = estimate.predicted_change(logits, logit_gradients, self._rise)

    def factor(self, call: LayerCall, input_gradient: Tensor, mix: Mix) -> Tensor:
        """See :class:`Moves`."""
        # In the precision of the weight: r times an activation may be too large for that of autocast.
        inputs = call.inputs.to(call.weight.dtype)
        if call.first:
            return estimate.changed_input(inputs, self._moves[call], self.change, mix)
        return estimate.changed_factor(inputs, input_gradient, self._rise, self.change, self._norm, mix)

    def gain(self, call: LayerCall, mix: Mix) -> Tensor:
        """See :class:`Moves`: it stays as it is and counts as much more as the example does."""
        clean = estimate.normalized(call, call.inputs)
        return clean * per_example((mix.change * (self.change.ratio - 1)).to(clean.dtype), clean)


def scaled_terms(factors: list[Factors], wanted: set[int], threat_model: ThreatModel, mix_of: MixOf) -> Terms:
    """Every wanted weight with its gradient under the scaled worst move of its inputs."""
    for call, input_gradient, output_gradient in factors:
        bias = call.bias
        if bias is not None and "bias" in call.hidden:
            ones = output_gradient.new_ones(len(output_gradient))
            yield bias, estimate.summed_like(bias.shape, call.layer, output_gradient, ones).to(bias.dtype)
        if id(call.weight) not in wanted:
            continue
        mix = mix_of(call.weight, "weight" in call.hidden)
        if call.first:
            move = worst_case_of_input(call, input_gradient, threat_model)
            yield call.weight, weight_gradient(call, mix.of(call.inputs, move), output_gradient)
            continue
        direction = threat_model.ascent_direction(input_gradient)
        scale = activation_scale(call.inputs, threat_model.norm, getattr(call.layer, "copies", 1))
        if mix.clean:
            scales = scale if len(scale) == 1 else scale.repeat_interleave(len(direction) // len(scale))
            move = direction * (per_example(scales, direction) if len(scale) > 1 else scale)
            yield call.weight, weight_gradient(call, mix.of(call.inputs, move), output_gradient)
            continue
        # The activation scale is one number per copy: it is cheaper on the weight gradient than on the activations.
        scale = mix.change * scale
        h = weight_gradient(call, direction, output_gradient)
        yield call.weight, h * (per_example(scale, h) if len(scale) > 1 else scale)


def estimated_terms(factors: list[Factors], wanted: set[int], mix_of: MixOf, moves: Moves) -> Terms:
    """Every wanted parameter of a recorded layer with the estimated change of its gradient."""
    more = moves.change.ratio - 1
    for call, input_gradient, output_gradient in factors:
        rows = len(call.inputs)
        remedy = "keep other axes apart, as in [batch, tokens, features]"
        got = f"a layer with {rows} rows for {len(more)} examples"
        require(rows == len(more), "model", "such that every layer keeps one row per example", got, remedy)
        bias = call.bias
        if bias is not None and id(bias) in wanted:
            mix = mix_of(bias, "bias" in call.hidden)
            weights = mix.clean + mix.change * more
            yield bias, estimate.summed_like(bias.shape, call.layer, output_gradient, weights).to(bias.dtype)
        if id(call.weight) not in wanted:  # frozen, or a normalisation without a gain
            continue
        mix = mix_of(call.weight, "weight" in call.hidden)
        if isinstance(call.layer, LAYERS):
            yield call.weight, weight_gradient(call, moves.factor(call, input_gradient, mix), output_gradient)
        else:
            gain = output_gradient * moves.gain(call, mix)
            h = estimate.summed_like(call.weight.shape, call.layer, gain, torch.ones_like(more))
            yield call.weight, h.to(call.weight.dtype)

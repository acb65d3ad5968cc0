r"""What an adversarial example would change in each layer's factors, estimated from the clean pass alone.

A worst move of the input raises the loss of example i, to first order, by :math:`\rho_i = \langle \nabla_x L_i, e_{1,i} \rangle`.
By the chain rule the move that it causes at the input of any later layer has that same product with the gradient there. Of all
moves with this property the shortest in the threat model's norm is

.. math:: e_{l,i} = \rho_i \, s_i / \langle s_i, \nabla_{a_l} L_i \rangle, \qquad
          s_i = \mathrm{sign}(\nabla_{a_l} L_i) \text{ for } l_\infty, \quad \nabla_{a_l} L_i \text{ for } l_2 ,

which follows epsilon by itself and needs no scale of activations. The prediction changes too: :math:`\rho_i` lowers the margin
of the label against all other classes by :math:`\delta_i = \rho_i / |\partial L_i / \partial z_{i,y}|`, so that the label's
missing probability q, the size of the gradient at the logits, grows by

.. math:: r_i = q_i' / q_i = \sigma(\delta_i - m_i) / \sigma(-m_i),
          \qquad m_i = z_{i,y} - \log \textstyle\sum_{k \ne y} e^{z_{i,k}} .

This is exact for two classes and cross-entropy. Once an example is lost, moving it further teaches little and costs clean
accuracy (the observation behind friendly adversarial training, Zhang et al., 2020): the move is shortened, by one factor in
all layers, so that the best wrong class comes to lead the label by no more than `LOST`. What stays out: changed activation
patterns and normalisations below the logits.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust._checks import require
from metarobust._tensors import per_example
from metarobust.meta_optimizers._layer_calls import LayerCall, Mix
from metarobust.models._stacked import StackedAffine, StackedConv2d

REACH = 1.25
"""Factor on the first layer's move, as on the step of FGSM training (Wong et al., 2020); docs/transfer.md has the trials."""
LOST = 1.0
"""A move ends where the best wrong class leads the label by this much, in logits."""
LARGEST_DROP = 9.0
"""Margins are taken to fall by at most this, which keeps r finite in half precision."""
NORMALISATIONS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm, StackedAffine)

CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, StackedConv2d, nn.GroupNorm, nn.modules.batchnorm._BatchNorm,
)  # fmt: skip

_TINY = 1e-30


def exact(x: Tensor) -> Tensor:
    """At least float32: sums of many small products lose too much in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def first_order_rise(moves: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Rise of each example's loss, ``[batch]``, in the units of the loss gradient, from all first layers together."""
    rises = [(exact(move) * exact(gradient)).flatten(1).sum(1) for move, gradient in zip(moves, gradients, strict=True)]
    for rise in rises[1:]:
        require(len(rise) == len(rises[0]), "model", "such that its first layers read one row per example", "different numbers")
    return torch.stack(rises).sum(0)


def label_of(logit_gradients: Tensor) -> Tensor:
    """The label of each example, ``[batch, 1]``: the class with the most negative gradient, whatever the example's weight is."""
    return logit_gradients.argmin(1, keepdim=True)


class Change(NamedTuple):
    """What becomes of each example, both ``[batch]``.

    Attributes:
        ratio: r, how much larger the gradient at the logits is after the move.
        reach: the share of the move that is made, in [0, 1].
    """

    ratio: Tensor
    reach: Tensor


def predicted_change(logits: Tensor, logit_gradients: Tensor, rise: Tensor) -> Change:
    """How far each example is moved, and what that does to its prediction."""
    logits, logit_gradients = exact(logits), exact(logit_gradients)
    require(
        len(rise) == len(logits),
        "model",
        "such that its first layer keeps one row per example",
        f"{len(rise)} rows for {len(logits)} examples",
        "keep other axes apart, as in [batch, tokens, features]",
    )
    label = label_of(logit_gradients)
    lowest = logit_gradients.gather(1, label)
    others = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter_(1, label, True), -torch.inf)
    margin = logits.gather(1, label).squeeze(1) - others.logsumexp(1)
    lead = logits.gather(1, label).squeeze(1) - others.amax(1)
    whole = rise / -lowest.squeeze(1).clamp(max=-_TINY)
    drop = torch.minimum(whole, (lead + LOST).clamp(0, LARGEST_DROP)).clamp(min=0)
    ratio = (F.logsigmoid(drop - margin) - F.logsigmoid(-margin)).exp()
    return Change(ratio, drop / whole.clamp(min=_TINY))


def changed_input(inputs: Tensor, move: Tensor, change: Change, mix: Mix) -> Tensor:
    """``r (a + e) - a`` of a first layer: the factor whose product with d is the second stream; mixed with a as ``mix`` says."""
    size = (mix.change * REACH * change.ratio * change.reach).to(inputs.dtype)
    return _plus_kept(size, move.to(inputs.dtype), inputs, change.ratio, mix, signs=False)


def changed_factor(inputs: Tensor, gradient: Tensor, rise: Tensor, change: Change, norm: str, mix: Mix) -> Tensor:
    """The same of a later layer, for its balanced move."""
    rows = exact(gradient).flatten(1)
    slope = torch.linalg.vector_norm(rows, ord=1, dim=1) if norm == "linf" else rows.square().sum(1)
    size = mix.change * change.ratio * change.reach * rise / slope.clamp(min=_TINY)
    largest = torch.finfo(inputs.dtype).max  # in half precision a gradient may be lost altogether
    size = torch.where(slope > 0, size.clamp(-largest, largest), 0.0)
    return _plus_kept(size.to(inputs.dtype), gradient, inputs, change.ratio, mix, signs=norm == "linf")


def _plus_kept(size: Tensor, along: Tensor, inputs: Tensor, ratio: Tensor, mix: Mix, *, signs: bool) -> Tensor:
    """``size * along`` plus the part of the inputs that stays, with one size and ratio per example; ``signs``: along its signs.

    In two passes over memory. A gradient of exactly zero counts as positive there, which no product with d can see: it is a sum
    of terms with d, and but for a coincidence they are all zero.
    """
    size = per_example(size, inputs)
    # copysign takes the sign of its second argument alone, whatever the first one's is.
    moved = torch.copysign(size, along) if signs and mix.change >= 0 else size * (along.sign() if signs else along)
    kept = per_example((mix.clean + mix.change * (ratio - 1)).to(inputs.dtype), inputs)
    return torch.addcmul(moved, inputs, kept) if moved.requires_grad else moved.addcmul_(inputs.detach(), kept)


def summed_like(shape: torch.Size, layer: nn.Module, values: Tensor, weights: Tensor) -> Tensor:
    """``values``, shaped like a layer's output and weighted by example, summed over all that one gain or bias applies to."""
    copies = getattr(layer, "copies", 1)
    weights = weights.to(values.dtype).unflatten(0, (copies, -1))
    rows = values.unflatten(0, (copies, -1))
    if isinstance(layer, CHANNELS_FIRST) or (isinstance(layer, StackedAffine) and layer.trailing):
        by_channel = rows.flatten(3).sum(3) if rows.dim() > 3 else rows
        return torch.einsum("cbk,cb->ck", by_channel, weights).reshape(shape)
    own = shape.numel() // copies
    return torch.einsum("cbmk,cb->ck", rows.reshape(*rows.shape[:2], -1, own), weights).reshape(shape)


def is_normalisation(module: nn.Module) -> bool:
    """Whether the gain of a module is known to multiply what `normalized` gives: not if its class computes in its own way."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in NORMALISATIONS)


def statistics_of(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What a BatchNorm normalises by just now, if not by the statistics of the batch."""
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer.training or layer.running_mean is None:
        return None
    return layer.running_mean, cast("Tensor", layer.running_var)


def normalized(call: LayerCall, inputs: Tensor) -> Tensor:
    """What the gain of a normalisation multiplies at these inputs, recomputed; running statistics stay as they are."""
    layer = call.layer
    if isinstance(layer, StackedAffine):
        return layer.plain(inputs)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(inputs, layer.num_groups, eps=layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    mean, variance = call.statistics or (None, None)
    return F.batch_norm(inputs, mean, variance, training=call.statistics is None, eps=layer.eps)

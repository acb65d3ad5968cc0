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

This is exact for two classes and cross-entropy. What stays out: changed activation patterns and normalisations below the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust._checks import require
from metarobust._tensors import per_example
from metarobust.models._stacked import StackedAffine, StackedConv2d

REACH = 1.25
"""Factor on the first layer's move, as on the step of FGSM training (Wong et al., 2020); docs/transfer.md has the trials."""
LARGEST_DROP = 9.0
"""Margins are taken to fall by at most this: beyond it an example's prediction is lost anyway."""
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


def prediction_ratio(logits: Tensor, logit_gradients: Tensor, rise: Tensor) -> Tensor:
    """r of each example: how much larger its gradient at the logits is after the move, ``[batch]``.

    The label is the class with the most negative gradient, which makes a weighting of the examples cancel.
    """
    logits, logit_gradients = exact(logits), exact(logit_gradients)
    require(
        len(rise) == len(logits),
        "model",
        "such that its first layer keeps one row per example",
        f"{len(rise)} rows for {len(logits)} examples",
        "keep other axes apart, as in [batch, tokens, features]",
    )
    lowest, label = logit_gradients.min(1, keepdim=True)
    others = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter_(1, label, True), -torch.inf)
    margin = logits.gather(1, label).squeeze(1) - others.logsumexp(1)
    drop = (rise / -lowest.squeeze(1).clamp(max=-_TINY)).clamp(0, LARGEST_DROP)
    return (F.logsigmoid(drop - margin) - F.logsigmoid(-margin)).exp()


def moved_factor(inputs: Tensor, move: Tensor, size: Tensor, ratio: Tensor) -> Tensor:
    r"""``r (a + s e) - a`` with one size s and one ratio r per example: the factor whose product with d is the second stream."""
    move = move.to(inputs.dtype)
    kept = (ratio - 1).to(inputs.dtype)
    return torch.addcmul(inputs * per_example(kept, inputs), move, per_example((ratio * size).to(inputs.dtype), inputs))


def balanced_size(direction: Tensor, gradient: Tensor, rise: Tensor) -> Tensor:
    """Size of the move in this direction that explains the rise, ``[batch]``."""
    require(
        len(gradient) == len(rise),
        "model",
        "such that every layer keeps one row per example",
        f"a layer with {len(gradient)} rows for {len(rise)} examples",
        "keep other axes apart, as in [batch, tokens, features]",
    )
    return rise / (exact(direction) * exact(gradient)).flatten(1).sum(1).clamp(min=_TINY)


def summed_like(shape: torch.Size, layer: nn.Module, values: Tensor) -> Tensor:
    """``values``, shaped like a layer's output, summed over all that one entry of its gain or bias is applied to."""
    copies = getattr(layer, "copies", None)
    rows = values[None] if copies is None else values.unflatten(0, (copies, -1))
    if isinstance(layer, CHANNELS_FIRST) or (isinstance(layer, StackedAffine) and layer.trailing):
        return rows.flatten(3).sum((1, 3)).reshape(shape) if rows.dim() > 3 else rows.sum(1).reshape(shape)
    own = len(shape) - (copies is not None)
    return rows.flatten(1, -own - 1).sum(1).reshape(shape)


def normalized(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The input of a normalisation's gain, recomputed; running statistics stay as they are."""
    if isinstance(layer, StackedAffine):
        return layer.plain(inputs)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(inputs, layer.num_groups, eps=layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    if layer.training or layer.running_mean is None:
        return F.batch_norm(inputs, None, None, training=True, eps=layer.eps)
    return F.batch_norm(inputs, layer.running_mean, layer.running_var, training=False, eps=layer.eps)

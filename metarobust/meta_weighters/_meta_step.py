"""One step of the meta-level: the network moves so that training with its weights helps the meta-data."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarobust._checks import finite, message
from metarobust._processes import summed
from metarobust.meta_weighters._hypergradient import BranchLosses, MetaLoss
from metarobust.meta_weighters._hypergradient import hypergradient as differentiate
from metarobust.meta_weighters._network import Weighting, WeightingNetwork, check_network
from metarobust.meta_weighters._virtual_update import VirtualUpdate
from metarobust.types import Parameters


class MetaStep(NamedTuple):
    """What `meta_weighted_step` returns, detached.

    Attributes:
        weighting: that the virtual step was taken with, of the network before its own step.
        weights_gradient: derivative of the meta-loss in these weights, ``[batch, branches]``.
        bound_gradient: in the bound multipliers ``[batch]``, or None.
        meta_loss: after the virtual steps.
        parameters: of the model after the virtual steps.
        norm: Euclidean norm of the gradient in the network's parameters, before it was clipped.
    """

    weighting: Weighting
    weights_gradient: Tensor
    bound_gradient: Tensor | None
    meta_loss: float
    parameters: Parameters
    norm: float


@torch.enable_grad()
def meta_weighted_step(
    network: WeightingNetwork,
    network_optimizer: torch.optim.Optimizer,
    characteristics: Tensor,
    branch_losses: BranchLosses,
    meta_loss: MetaLoss,
    parameters: Parameters,
    *,
    update: VirtualUpdate,
    hypergradient: str = "double_backward",
    steps: int = 1,
    hard: bool = False,
    bound: Tensor | None = None,
    clip_norm: float | None = None,
) -> MetaStep:
    r"""Virtual step with the network's weights, meta-gradient, one step of the network's optimizer.

    Equations 9 and 10 of Zhou et al. (2023, arXiv 2304.12550); the actual step (11) is the caller's, with
    ``network(characteristics)`` of the network that this call has moved. Nothing but the network and its optimizer changes.
    Under `torch.distributed` all processes take the same step, that of the joint batch, if their networks are the same.

    Args:
        network: its weights at ``characteristics`` enter the virtual step.
        network_optimizer: over the network's parameters.
        characteristics: ``[batch, inputs]``, constants.
        branch_losses: see `hypergradient`.
        meta_loss: see `hypergradient`.
        parameters: of the model, by name.
        update: from `virtual_update`.
        hypergradient: ``"double_backward"``, ``"jvp"`` or ``"finite_difference"``.
        steps: virtual steps.
        hard: take the virtual step with the largest weight of each example set to 1 and the others to 0, as an actual step that
            is routed hard does; the gradient passes as if they had been the network's (straight through).
        bound: the multipliers that ``branch_losses`` reads, as a leaf, for a network with a bound output.
        clip_norm: largest Euclidean norm of the network's gradient.

    Raises:
        ValueError: see `hypergradient`; a bound for a network without this output, or none for one with it.
        FloatingPointError: the gradient in the network's parameters is not finite; network and optimizer are unchanged.

    Example:
        >>> from metarobust.meta_weighters import virtual_update
        >>> network = WeightingNetwork(branches=("adversary",), inputs=1)
        >>> optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        >>> x, parameters = torch.tensor([1.0, -1.0]), {"w": torch.tensor(0.5)}
        >>> update = virtual_update(torch.optim.SGD([parameters["w"]], lr=0.1), (parameters["w"],))
        >>> step = meta_weighted_step(
        ...     network, optimizer, x[:, None], lambda p: (p["w"] * x)[:, None], lambda p: p["w"] ** 2, parameters, update=update
        ... )
        >>> step.weights_gradient.sign().squeeze(1)  # the first example moves w down, which helps
        tensor([-1.,  1.])
    """
    if clip_norm is not None:
        finite("clip_norm", clip_norm, above=0.0)
    check_network(network)
    weighting = network(characteristics)
    if (bound is None) != (weighting.bound is None):
        expected = "given for a network with bound_range, and for no other"
        raise ValueError(message("bound", expected, "None" if bound is None else "a tensor"))
    used = routed(weighting.weights) if hard else weighting.weights.detach()
    found = differentiate(
        branch_losses, meta_loss, parameters, used, update=update, bound=bound, method=hypergradient, steps=steps
    )
    pairs = [(weighting.weights, found.weights_gradient.to(weighting.weights))]
    if weighting.bound is not None and found.bound_gradient is not None:
        pairs.append((weighting.bound, found.bound_gradient.to(weighting.bound)))
    weights_of = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad([out for out, _ in pairs], weights_of, [slope for _, slope in pairs], materialize_grads=True)
    gradients = summed(gradients)
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not norm < float("inf"):
        raise FloatingPointError(
            message(
                "the meta-gradient", "finite", f"norm {norm}", "lower the learning rate of the virtual step, or set clip_norm"
            )
        )
    for p, gradient in zip(weights_of, gradients, strict=True):
        p.grad = gradient
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(weights_of, clip_norm, torch.tensor(norm, device=gradients[0].device))
    network_optimizer.step()
    network_optimizer.zero_grad()
    before = Weighting(used, None if weighting.bound is None else weighting.bound.detach())
    return MetaStep(before, found.weights_gradient, found.bound_gradient, float(found.meta_loss), found.parameters, norm)


def routed(weights: Tensor) -> Tensor:
    """The largest weight of each row as 1, the others as 0, ``[batch, branches]``; one branch alone counts from 0.5 on."""
    if weights.shape[1] == 1:
        return (weights.detach() >= 0.5).to(weights)
    return torch.zeros_like(weights).scatter_(1, weights.detach().argmax(1, keepdim=True), 1.0)

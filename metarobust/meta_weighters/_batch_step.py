"""The meta-step of a training batch: branches, meta-data and optimizer put together for `meta_weighted_step`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metarobust._tensors import per_example
from metarobust.meta_weighters._branches import (
    Branches,
    Points,
    as_function,
    evaluation_mode,
    repeated_noise,
    rows_independent,
)
from metarobust.meta_weighters._meta_step import MetaStep, meta_weighted_step
from metarobust.meta_weighters._network import WeightingNetwork
from metarobust.meta_weighters._virtual_update import virtual_update
from metarobust.types import Batch, Parameters


def meta_step_on_batch(
    network: WeightingNetwork,
    network_optimizer: torch.optim.Optimizer,
    branches: Branches,
    model: nn.Module,
    batch: Batch,
    known: Tensor,
    points: Points,
    *,
    meta_batch: Batch,
    meta_loss: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    method: str,
    steps: int,
    hard: bool,
    clip_norm: float | None,
    generator: torch.Generator | None,
) -> MetaStep:
    """Virtual step from the model's parameters, meta-gradient, a step of the network; the model stays as it is.

    ``known`` is what the network reads ``[batch, inputs]``. With bound multipliers the direction of each move is a constant and
    its length follows the multiplier. The meta-loss meets the model in evaluation mode, as deployment does.
    """
    x, y = batch
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    seed, joint = int(torch.randint(2**62, (), generator=generator)), rows_independent(model)
    factors, directions = None, {}
    if network.bound_range is not None:
        with torch.no_grad():
            start = network(known).bound
        factors = start.detach().requires_grad_()
        for name, moved in (("adversary", points.adversary), ("anti_adversary", points.anti_adversary)):
            if moved is not None:
                directions[name] = (moved - x) / per_example(start, x)

    def branch_losses(parameters: Parameters) -> Tensor:
        moved = points
        if factors is not None:
            moved = Points(**{name: x + per_example(factors, x) * step for name, step in directions.items()})
        with repeated_noise(seed):
            return branches.losses(as_function(model, parameters), x, y, moved, joint=joint, seed=seed)

    def loss_there(parameters: Parameters) -> Tensor:
        with evaluation_mode(model):
            found = meta_loss(as_function(model, parameters), meta_batch.x, meta_batch.y, generator=generator)
        return found.mean() if isinstance(found, Tensor) else found.loss

    return meta_weighted_step(
        network,
        network_optimizer,
        known,
        branch_losses,
        loss_there,
        {name: p.detach() for name, p in named.items()},
        update=virtual_update(optimizer, list(named.values())),
        hypergradient=method,
        steps=steps,
        hard=hard,
        bound=factors,
        clip_norm=clip_norm,
    )

"""The state of an optimizer as plain tensors under plain names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from metarobust._checks import finite, message


def optimizer_state(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``prefix``, the position of the parameter, the name of the entry: to the tensors of an optimizer with one group."""
    return {
        f"{prefix}{number}.{name}": value
        for number, p in enumerate(optimizer.param_groups[0]["params"])
        for name, value in optimizer.state.get(p, {}).items()
    }


def restore_optimizer(prefix: str, optimizer: torch.optim.Optimizer, found: Mapping[str, Tensor]) -> None:
    """Put the optimizer into the state that `optimizer_state` gave; other names are passed over."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.state.clear()
    for name, value in found.items():
        if name.startswith(prefix):
            number, _, entry = name.removeprefix(prefix).partition(".")
            optimizer.state[parameters[int(number)]][entry] = value.clone()


def check_optimizer(optimizer: object, clip_norm: float | None) -> None:
    """Check the optimizer of a model whose next step is to be foreseen, and what clips the gradient of the network."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        remedy = "write the one that trains the model, as torch.optim.SGD(model.parameters(), lr=0.1)"
        raise TypeError(message("optimizer", "a torch.optim.Optimizer", repr(optimizer), remedy))
    if clip_norm is not None:
        finite("clip_norm", clip_norm, above=0.0)

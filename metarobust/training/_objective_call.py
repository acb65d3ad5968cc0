"""One call of the objective as a module, which is what ``DistributedDataParallel`` can wrap."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metarobust._checks import message, require


def stateful_part(objective: Any) -> Any:
    """The part of an objective that has a state: itself, or a robust loss inside it; None if there is none.

    A state is what ``state_dict`` gives and ``load_state_dict`` takes back, a dictionary of tensors.
    """
    seen: list[Any] = []
    while objective is not None and not any(objective is earlier for earlier in seen):
        if callable(getattr(objective, "state_dict", None)) and callable(getattr(objective, "load_state_dict", None)):
            return objective
        seen.append(objective)
        objective = getattr(objective, "robust_loss", None)
    return None


class ObjectiveCall(nn.Module):
    """``objective(model, x, y)`` as a scalar whose mean over the processes is the loss of the joint batch.

    The wrapper goes around this call and not around the model. So attacks, and objectives that call the model several times,
    see the model itself, while the all-reduce of the gradients still overlaps the backward pass.

    ``losses`` (``[batch]``, None where the objective gives a scalar) and ``diagnostics`` hold what else the last call gave.
    They are no outputs: the wrapper would take a tensor in the graph for one that the loss depends on.
    """

    def __init__(self, model: nn.Module, objective: Callable[..., Any], processes: int) -> None:
        super().__init__()
        self.model, self.processes = model, processes
        # In a tuple, so that an objective that is a module does not become a part of this one.
        self._call = (objective, stateful_part(objective))
        self.losses: Tensor | None = None
        self.diagnostics: dict[str, float | None] = {}

    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator, joint: int) -> Tensor:
        """The scalar for this process's rows ``x [batch, ...]`` of a joint batch of ``joint`` rows."""
        self.losses, self.diagnostics = None, {}  # what the last step gave is freed first
        found = self._call[0](self.model, x, y, generator=generator)
        if isinstance(found, Tensor) and found.shape == y.shape:
            losses = found if found.dtype == torch.float64 else found.float()
            self.losses, loss = losses.detach(), losses.sum() * (self.processes / joint)
            told = None
        else:
            loss = getattr(found, "loss", None)
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                expected = f"a function that returns one loss per example, [{len(y)}], or an object with a scalar .loss"
                got = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                remedy = (
                    "leave out the mean over the batch, or return the whole result of ARMOR"
                    if isinstance(found, Tensor) and found.dim() == 0
                    else ""
                )
                raise TypeError(message("objective", expected, got, remedy))
            told = getattr(found, "diagnostics", None)
        told = {**(getattr(self._call[1], "diagnostics", None) or {}), **(told or {})}
        self.diagnostics = {name: None if value is None else float(value) for name, value in told.items()}
        remedy = "remove torch.no_grad() or .detach() from the objective"
        require(loss.requires_grad, "objective", "differentiable in the model's parameters", "a loss without a graph", remedy)
        return loss

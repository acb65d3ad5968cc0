"""Losses per example, shape ``[batch]``: what attacks ascend and robust objectives average."""

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from metarobust._checks import choice

__all__ = ["LOSSES", "Loss", "cross_entropy", "loss_function", "margin"]

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Negative log-probability of the label: ``logits [batch, classes], y [batch] -> [batch]``.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
        tensor([1.3863])
    """
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus the label's logit: positive exactly when the example is misclassified (Robey et al., 2024, eq. 6).

    ``logits [batch, classes], y [batch] -> [batch]``. Ties count as misclassified only when positive, so a constant classifier
    has margin 0.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-1.])
    """
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - own.squeeze(1)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin}


def loss_function(loss: str | Loss) -> Loss:
    """The loss behind a name, or the callable itself."""
    if callable(loss):
        return loss
    choice("loss", loss, LOSSES)
    return LOSSES[loss]

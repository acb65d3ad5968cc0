"""Losses per example, shape ``[batch]``: what attacks ascend and robust objectives average.

A targeted loss reads a wrong class ``target [batch]`` beside the label and grows as that class overtakes the label.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from metarobust import _checks
from metarobust._checks import choice, finite, floating, message, require, takes

__all__ = [
    "LOSSES",
    "TARGETED_LOSSES",
    "Loss",
    "TargetedLoss",
    "boosted_cross_entropy",
    "cross_entropy",
    "dlr",
    "kl_divergence",
    "loss_function",
    "margin",
    "targeted_cross_entropy",
    "targeted_dlr",
    "targeted_loss_function",
    "targeted_margin",
]

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From ``logits [batch, classes]`` and ``y [batch]`` to losses ``[batch]``."""

TargetedLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From ``logits [batch, classes]``, ``y [batch]`` and wrong classes ``target [batch]`` to losses ``[batch]``."""

P = ParamSpec("P")

IGNORED = -(2**62)
"""No label: torch would charge its default of -100 with a loss of 0, without a word."""


def _checked(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The loss behind checks of types and shapes, which wait for no device.

    Labels beyond the classes are told once the arithmetic has failed on them, as it does on a CPU.
    """

    @wraps(loss)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        logits, *indices = args
        _check_logits("logits", logits)
        assert isinstance(logits, Tensor)
        for name, index in zip(("y", "target"), indices, strict=False):
            if (
                not isinstance(index, Tensor)
                or index.dtype != torch.int64
                or index.shape != logits.shape[:1]
                or index.device != logits.device
            ):
                _refuse(name, index, logits)
        try:
            return loss(*args, **kwargs)
        except (IndexError, RuntimeError) as error:
            for name, index in zip(("y", "target"), indices, strict=False):
                assert isinstance(index, Tensor)
                low, high = (int(v) for v in torch.aminmax(index))
                if low < 0 or high >= logits.shape[1]:
                    expected = f"in [0, {logits.shape[1]}), the classes of the logits"
                    remedy = "check the label encoding or the model's last layer"
                    raise ValueError(message(name, expected, f"labels from {low} to {high}", remedy)) from error
            raise

    return checked


def _check_logits(name: str, logits: object) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        floating(name, logits)
    assert isinstance(logits, Tensor)
    require(logits.dim() == 2, name, "of shape [batch, classes]", list(logits.shape))


def _refuse(name: str, index: object, logits: Tensor) -> None:
    """The sentence for labels or targets that do not fit the logits."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        remedy = f"write {name}.long()" if isinstance(index, Tensor) else f"write torch.tensor({name})"
        raise TypeError(message(name, "class indices of dtype torch.int64", _checks.kind(index), remedy))
    require(index.shape == logits.shape[:1], name, f"of shape [{len(logits)}], one per row of logits", list(index.shape))
    remedy = f"write {name}.to(logits.device)"
    require(index.device == logits.device, name, f"on the device of the logits, {logits.device}", index.device, remedy)


@_checked
def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Negative log-probability of the label: ``logits [batch, classes], y [batch] -> [batch]``.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
        tensor([1.3863])
    """
    return F.cross_entropy(logits, y, reduction="none", ignore_index=IGNORED)


@_checked
def boosted_cross_entropy(logits: Tensor, y: Tensor, *, offset: float = 1e-4) -> Tensor:
    r"""Cross-entropy plus a penalty of the best wrong class, :math:`-\log p_y - \log(1 + offset - \max_{k \ne y} p_k)`.

    From MART (Wang et al., 2020): ``offset`` 0 is the paper's formula, 1e-4 that of its code, which bounds the penalty by 9.21
    and lets its gradient fade for examples that are wrong beyond doubt. (The code adds 1e-12 besides, nothing in float32.)
    ``logits [batch, classes], y [batch] -> [batch]``, at least two classes. Computed from log-probabilities: finite, with a
    finite gradient, for any finite logits.

    Raises:
        ValueError: fewer than two classes, or a negative or non-finite offset.

    Example:
        >>> boosted_cross_entropy(torch.zeros(1, 4), torch.tensor([2]))  # log 4 - log(3 / 4 + 1e-4)
        tensor([1.6738])
    """
    require(logits.shape[-1] >= 2, "logits", "of at least 2 classes for the boosted cross-entropy", logits.shape[-1])
    finite("offset", offset, least=0.0)
    log_p = logits.log_softmax(1)
    rival = log_p.detach().scatter(1, y[:, None], float("-inf")).argmax(1, keepdim=True)
    # 1 - p_k as the sum of the other probabilities: no digits are lost where p_k is nearly 1.
    log_rest = log_p.scatter(1, rival, float("-inf")).logsumexp(1)
    if offset > 0:
        log_rest = torch.logaddexp(log_rest, log_rest.new_tensor(math.log(offset)))
    return -log_p.gather(1, y[:, None]).squeeze(1) - log_rest


def kl_divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of two predictions, :math:`\sum_k p_k (\log p_k - \log q_k)`, in nats.

    p is the softmax of ``logits [batch, classes]``, q of ``other_logits``, shaped alike; the result is ``[batch]``, at least 0 up
    to rounding, and differentiable in both. Computed from log-probabilities: finite for any finite logits.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]]))
        tensor([0.4338])
    """
    _check_logits("logits", logits)
    _check_logits("other_logits", other_logits)
    require(
        logits.shape == other_logits.shape, "other_logits", f"shaped like logits, {list(logits.shape)}", list(other_logits.shape)
    )
    log_p, log_q = logits.log_softmax(1), other_logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@_checked
def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus the label's logit: positive exactly when the example is misclassified (Robey et al., 2024).

    ``logits [batch, classes], y [batch] -> [batch]``. Ties count as misclassified only when positive, so a constant classifier
    has margin 0.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-1.])
    """
    require(logits.shape[-1] >= 2, "logits", "of at least 2 classes for the margin", logits.shape[-1])
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - own.squeeze(1)


@_checked
def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""Difference of logits ratio, :math:`-(z_y - \max_{j \ne y} z_j) / (z_{(1)} - z_{(3)})`, at least three classes.

    Invariant to shifting and scaling the logits; :math:`z_{(k)}` is the k-th largest (Croce and Hein, 2020,
    arXiv 2003.01690, eq. 6). ``logits [batch, classes], y [batch] -> [batch]``; positive exactly when misclassified.

    Raises:
        ValueError: fewer than three classes.

    Example:
        >>> dlr(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-0.5000])
    """
    require(logits.shape[-1] >= 3, "logits", "of at least 3 classes for the DLR loss", logits.shape[-1], "use loss='margin'")
    highest = logits.topk(3, dim=1).values
    return margin(logits, y) / (highest[:, 0] - highest[:, 2] + 1e-12)


@_checked
def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The target's logit minus the label's: the margin of one wrong class (Robey et al., 2024, arXiv 2306.11035).

    ``logits [batch, classes], y [batch], target [batch] -> [batch]``. Its maximum over the wrong classes is `margin`.

    Example:
        >>> targeted_margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), torch.tensor([1]))
        tensor([-2.])
    """
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


@_checked
def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    r"""Targeted DLR, :math:`-(z_y - z_t) / (z_{(1)} - (z_{(3)} + z_{(4)}) / 2)`, at least four classes.

    Croce and Hein (2020), arXiv 2003.01690, eq. 7. ``logits [batch, classes], y [batch], target [batch] -> [batch]``.

    Raises:
        ValueError: fewer than four classes.

    Example:
        >>> targeted_dlr(torch.tensor([[3.0, 1.0, 2.0, 1.0]]), torch.tensor([0]), torch.tensor([2]))
        tensor([-0.5000])
    """
    remedy = "use loss='margin'"
    require(logits.shape[-1] >= 4, "logits", "of at least 4 classes for the targeted DLR loss", logits.shape[-1], remedy)
    highest = logits.topk(4, dim=1).values
    return targeted_margin(logits, y, target) / (highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2 + 1e-12)


@_checked
def targeted_cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Log-probability of the target: ``logits [batch, classes], y [batch], target [batch] -> [batch]``; the label is not read.

    Example:
        >>> targeted_cross_entropy(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([2]))
        tensor([-1.3863])
    """
    return -cross_entropy(logits, target)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}
"""The losses that attacks and objectives know by name."""

TARGETED_LOSSES: dict[str, TargetedLoss] = {
    "cross_entropy": targeted_cross_entropy,
    "margin": targeted_margin,
    "dlr": targeted_dlr,
}
"""The targeted losses that attacks know by name."""


def loss_function(loss: str | Loss) -> Loss:
    """The loss behind a name of `LOSSES`, or the callable ``loss`` itself.

    Raises:
        ValueError: an unknown name.
        TypeError: a function that does not take logits and labels.
    """
    if callable(loss):
        takes("loss", loss, "logits, y")
        return loss
    choice("loss", loss, LOSSES)
    return LOSSES[loss]


def known_loss(loss: str | Loss) -> Loss:
    """`loss_function` of a loss that it has let through: for every step, since a look at a signature takes time."""
    return loss if callable(loss) else LOSSES[loss]


def targeted_loss_function(loss: str | TargetedLoss) -> TargetedLoss:
    """The targeted loss behind a name of `TARGETED_LOSSES`, or the callable ``loss (logits, y, target) -> [batch]`` itself.

    Raises:
        ValueError: an unknown name.
        TypeError: a function that does not take logits, labels and targets.
    """
    if callable(loss):
        takes("loss", loss, "logits, y, target")
        return loss
    choice("loss", loss, TARGETED_LOSSES)
    return TARGETED_LOSSES[loss]

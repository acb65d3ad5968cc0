"""What a weighter knows of an example: six numbers from logits that are there already, and what its class went through."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metarobust import _checks
from metarobust._checks import message, require
from metarobust._processes import summed
from metarobust.losses import cross_entropy

CHARACTERISTICS = ("loss", "class_loss", "gradient_norm", "margin", "negative_entropy", "class_share")
"""The names of the six columns of `training_characteristics`, in their order."""


class ClassStatistics(nn.Module):
    r"""The share of each class, and a moving average of its loss.

    The average forgets: an example counts :math:`e^{-t/n}`, t examples later, with n the size of the data, so that it reaches
    back about one epoch. (The paper takes the mean of the epoch before. In its published code that mean never leaves the function
    that computes it, so the column stays at its initial value.) A class without examples so far has the loss of a uniform guess.

    Args:
        counts: examples of each class in the training data, one integer >= 0 per class; at least two classes.

    Raises:
        ValueError: fewer than two classes, a negative count, or no example at all.

    Example:
        >>> statistics = ClassStatistics([30, 10])
        >>> statistics.update(torch.tensor([0.5, 1.5, 4.0]), torch.tensor([0, 0, 1]))
        >>> statistics.class_loss.tolist(), statistics.share.tolist()
        ([1.0, 4.0], [0.75, 0.25])
    """

    share: Tensor
    loss_sum: Tensor
    weight_sum: Tensor

    def __init__(self, counts: Sequence[int] | Tensor) -> None:
        super().__init__()
        if isinstance(counts, str):
            raise TypeError(message("counts", "a list of integers", repr(counts), "write labels.bincount(minlength=classes)"))
        counts = torch.as_tensor(counts)
        expected = "at least two integers >= 0, examples per class, not all 0"
        valid = counts.dim() == 1 and len(counts) >= 2 and not counts.is_floating_point() and bool((counts >= 0).all())
        require(valid and bool(counts.any()), "counts", expected, counts.tolist(), "write labels.bincount(minlength=classes)")
        self.examples = int(counts.sum())
        self.register_buffer("share", counts.double() / self.examples)
        self.register_buffer("loss_sum", torch.zeros(len(counts), dtype=torch.float64))
        self.register_buffer("weight_sum", torch.zeros(len(counts), dtype=torch.float64))

    @property
    def class_loss(self) -> Tensor:
        """The average loss of each class, float64 ``[classes]``."""
        guess = torch.full_like(self.loss_sum, math.log(len(self.share)))
        return torch.where(self.weight_sum > 0, self.loss_sum / self.weight_sum.clamp(min=1e-300), guess)

    @torch.no_grad()
    def update(self, losses: Tensor, y: Tensor) -> None:
        """Take in ``losses [batch]`` of examples with the labels ``y [batch]``, of all processes together."""
        _checks.losses(losses, examples=len(y), name="losses")
        if y.device.type == "cpu":  # elsewhere a look at the labels waits for the device
            _checks.labels(y, examples=len(y), classes=len(self.share))
        counts = torch.zeros_like(self.weight_sum).index_add_(0, y, torch.ones_like(losses, dtype=self.weight_sum.dtype))
        totals = torch.zeros_like(self.loss_sum).index_add_(0, y, losses.to(self.loss_sum.dtype))
        counts, totals = summed([counts, totals])
        kept = math.exp(-float(counts.sum()) / self.examples)
        self.loss_sum.mul_(kept).add_(totals)
        self.weight_sum.mul_(kept).add_(counts)

    def extra_repr(self) -> str:
        return f"classes={len(self.share)}, examples={self.examples}"


@torch.no_grad()
def training_characteristics(logits: Tensor, y: Tensor, statistics: ClassStatistics) -> Tensor:
    r"""Six characteristics of each example, from its natural logits: no pass through the model, no one-hot matrix.

    With p the softmax of the logits, the columns are (Zhou et al., 2023, arXiv 2304.12550, in the order of the published code):
    the cross-entropy :math:`-\log p_y`; the average loss of the class of y, of the steps before; the length
    :math:`\|p - e_y\|_2` of the gradient of the cross-entropy in the logits; the margin :math:`p_y - \max_{j \ne y} p_j`; the
    negative entropy :math:`\sum_j p_j \log p_j`; the share of the class in the training data.

    The statistics are read and not changed; `ClassStatistics.update` takes the losses in.

    Args:
        logits: ``[batch, classes]``.
        y: labels, int64 ``[batch]``; of noisy data the observed ones.
        statistics: of the classes.

    Returns:
        ``[batch, 6]``, detached, in the dtype of the logits, float32 at least; `CHARACTERISTICS` names the columns.

    Raises:
        ValueError: logits and statistics disagree on the number of classes, or a label is outside of it.

    Example:
        >>> found = training_characteristics(torch.zeros(1, 4), torch.tensor([2]), ClassStatistics([5, 5, 2, 8]))
        >>> [round(v, 4) for v in found[0].tolist()]
        [1.3863, 1.3863, 0.866, 0.0, -1.3863, 0.1]
    """
    if not isinstance(statistics, ClassStatistics):
        raise TypeError(message("statistics", "a ClassStatistics", repr(statistics), "write ClassStatistics(labels.bincount())"))
    classes = len(statistics.share)
    require(
        logits.dim() == 2 and logits.shape[1] == classes,
        "logits",
        f"[batch, {classes}], for the {classes} classes of the statistics",
        f"shape {list(logits.shape)}",
        "write ClassStatistics(labels.bincount(minlength=classes))",
    )
    _checks.labels(y, examples=len(logits), classes=classes)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = logits.log_softmax(1)
    p, own = log_p.exp(), y[:, None]
    p_y = p.gather(1, own).squeeze(1)
    rest = p.scatter(1, own, 0)  # p without its label: no digits are lost where p_y is nearly 1
    columns = (
        cross_entropy(logits, y),
        statistics.class_loss[y],
        (rest.square().sum(1) + rest.sum(1).square()).sqrt(),
        p_y - rest.amax(1),
        torch.special.xlogy(p, p).sum(1),
        statistics.share[y],
    )
    return torch.stack([column.to(logits.dtype) for column in columns], 1)

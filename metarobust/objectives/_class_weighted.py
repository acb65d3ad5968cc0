"""A robust loss weighted by class: the fixed form of a learned weighting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarobust import _checks
from metarobust._checks import finite, integer, message, require
from metarobust.objectives._common import check_robust_loss
from metarobust.types import Model, RobustLoss


@dataclass(frozen=True, kw_only=True)
class ClassWeighted:
    r"""A robust loss, each example weighted by its class: :math:`w_{y_i}\, \ell_i`.

    A weight is a positive constant for the attack, so it does not change which point is the worst in a ball: the robust loss
    attacks as it does alone, and where the envelope theorem holds for it, it holds here. `balanced` gives every class the same
    share of the mean. With weights 1 this is the robust loss, to the bit.

    Inside `ARMOR` (``ARMOR(robust_loss=ClassWeighted(...), ...)``) the dual reweights the weighted losses. Only without a
    transport cost, which asks for a loss that charges a given point; and a `UDR` in here keeps its own multiplier.

    Args:
        robust_loss: a loss per example, such as `AdversarialTraining`, `TRADES` or `LogitAdjusted`. Not `ARMOR`, whose loss is
            one number: that goes around.
        class_weights: one finite weight > 0 for each class, in the order of the logits.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the attack's noise.

    Raises:
        TypeError: a robust loss that cannot be called, weights that are no tuple of numbers; on a call, a robust loss that
            returns no loss per example.
        ValueError: a weight that is not positive; on a call, a label without a weight.

    Example:
        >>> from metarobust.attacks import FGSM
        >>> from metarobust.objectives import AdversarialTraining
        >>> from metarobust.threat_models import ThreatModel
        >>> robust_loss = AdversarialTraining(attack=FGSM(threat_model=ThreatModel(norm="linf", epsilon=0.1)))
        >>> objective = ClassWeighted(robust_loss=robust_loss, class_weights=(0.5, 0.5, 2.0))
        >>> model, x, y = torch.nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> objective(model, x, y) / robust_loss(model, x, y)
        tensor([0.5000, 0.5000, 2.0000, 0.5000], grad_fn=<DivBackward0>)
    """

    robust_loss: RobustLoss
    class_weights: Sequence[float]

    def __post_init__(self) -> None:
        check_robust_loss(self.robust_loss)
        weights = per_class_numbers("class_weights", self.class_weights, "write (1.0, 2.0)")
        object.__setattr__(self, "class_weights", weights)
        for label, weight in enumerate(weights):
            finite(f"class_weights[{label}]", weight, above=0.0)

    @classmethod
    def balanced(cls, *, robust_loss: RobustLoss, class_counts: Sequence[int]) -> "ClassWeighted":
        r"""With the weights :math:`n / (C n_c)` for C classes of :math:`n_c` examples each, n in all.

        Every class has the share 1/C of the weights, and the mean weight over the data is 1 (``class_weight="balanced"`` in
        scikit-learn). Rare classes have large weights, 50 for 100 of 10000 examples of two classes, and small batches noisy
        gradients.

        Args:
            robust_loss: as for the class.
            class_counts: examples of each class in the training data, at least 1 each: ``y.bincount().tolist()``.

        Raises:
            TypeError: counts that are no integers.
            ValueError: a class without examples.

        Example:
            >>> from metarobust.attacks import FGSM
            >>> from metarobust.objectives import AdversarialTraining
            >>> from metarobust.threat_models import ThreatModel
            >>> robust_loss = AdversarialTraining(attack=FGSM(threat_model=ThreatModel(norm="linf", epsilon=0.1)))
            >>> ClassWeighted.balanced(robust_loss=robust_loss, class_counts=[90, 10]).class_weights
            (0.5555555555555556, 5.0)
        """
        counts = checked_counts(class_counts)
        weights = tuple(sum(counts) / (len(counts) * count) for count in counts)
        return cls(robust_loss=robust_loss, class_weights=weights)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one loss per example, ``[batch]``."""
        losses = self.robust_loss(model, x, y, generator=generator)
        got = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        if not isinstance(losses, Tensor) or losses.shape != (len(x),):
            remedy = "for ARMOR write ARMOR(robust_loss=ClassWeighted(...), ...)"
            raise TypeError(message("robust_loss", f"one that returns a loss per example, [{len(x)}]", got, remedy))
        _checks.labels(y, examples=len(x))
        classes = len(self.class_weights)
        if len(y):
            low, high = (int(v) for v in torch.aminmax(y))
            require(low >= 0 and high < classes, "class_weights", "one for every label", f"{classes} for labels {low} to {high}")
        return losses * torch.tensor(self.class_weights, dtype=losses.dtype, device=losses.device)[y]


def per_class_numbers(name: str, values: Any, remedy: str) -> tuple[Any, ...]:
    """The values as a tuple, if they are a tuple or a list with an entry for at least one class."""
    expected = "a tuple with a number for each class"
    if not isinstance(values, (tuple, list)):
        raise TypeError(message(name, expected, _checks.kind(values), remedy))
    require(len(values) > 0, name, expected, "none", remedy)
    return tuple(values)


def checked_counts(class_counts: Any) -> tuple[int, ...]:
    """The counts as a tuple, if every class has at least one example."""
    counts = per_class_numbers("class_counts", class_counts, "write y.bincount().tolist()")
    for label, count in enumerate(counts):
        integer(f"class_counts[{label}]", count, least=1)
    return counts

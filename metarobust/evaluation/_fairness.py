"""How evenly a model serves its classes: accuracies over the classes, and natural, boundary and robust errors."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarobust._checks import message, require


class ClassSummary(NamedTuple):
    """Accuracy over the classes that have examples.

    Attributes:
        class_mean: over the classes, whatever their size.
        worst: the smallest accuracy of a class.
        worst_class: the first class with it; -1 where no class has examples.
        spread: population standard deviation over the classes.
    """

    class_mean: float
    worst: float
    worst_class: int
    spread: float


class ErrorSummary(NamedTuple):
    """One kind of error, as fractions.

    Attributes:
        average: over all examples, so that a class counts by its size.
        worst: the largest error of a class that has examples.
        worst_class: the first class with that error; -1 where no class has examples.
        spread: population standard deviation over the classes that have examples.
        per_class: the error of each class, NaN for a class without examples.
    """

    average: float
    worst: float
    worst_class: int
    spread: float
    per_class: tuple[float, ...]

    @property
    def class_mean(self) -> float:
        """Mean over the classes that have examples, whatever their size: what ``spread`` is measured from."""
        return _moments([error for error in self.per_class if not math.isnan(error)])[0]


class ClassErrors(NamedTuple):
    """Natural, boundary and robust error; example by example the first two exclude each other and make up the third.

    As in FRL (Xu et al., 2021, arXiv 2010.06121). The worst classes of the three may differ, and worst errors do not add up.

    Attributes:
        natural: the clean prediction is wrong.
        boundary: the clean prediction is right, and an attack broke it.
        robust: either of them: one minus the worst-case accuracy.
    """

    natural: ErrorSummary
    boundary: ErrorSummary
    robust: ErrorSummary

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {kind: summary._asdict() for kind, summary in self._asdict().items()}


def class_errors(labels: Tensor, clean_predictions: Tensor, broken_by: Tensor, *, classes: int) -> ClassErrors:
    """Count the errors of each class; all tensors are int64 ``[n]``, ``broken_by`` as in `RobustnessReport`.

    Raises:
        ValueError: the tensors contradict each other: other lengths, labels outside the classes, or an example whose natural
            and boundary errors do not add up to its robust error.

    Example:
        >>> y, predictions, broken_by = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0]), torch.tensor([-1, 0, -1, -2])
        >>> errors = class_errors(y, predictions, broken_by, classes=2)
        >>> errors.natural.per_class, errors.boundary.per_class, errors.robust.per_class
        ((0.0, 0.5), (0.5, 0.0), (0.5, 0.5))
        >>> errors.natural.worst, errors.natural.worst_class, errors.natural.average
        (0.5, 1, 0.25)
    """
    lengths = [len(labels), len(clean_predictions), len(broken_by)]
    expected = "one label, one clean prediction and one entry of broken_by for each example"
    require(len(set(lengths)) == 1, "report", expected, " and ".join(map(str, lengths)))
    if len(labels):
        low, high = (int(v) for v in torch.aminmax(labels))
        require(low >= 0 and high < classes, "labels", f"in [0, {classes}), the classes of the report", f"{low} to {high}")
    natural, boundary, robust = labels != clean_predictions, broken_by >= 0, broken_by != -1
    # Row by row, so that errors which cancel in a sum are found too.
    contradicting = (natural.long() + boundary.long() != robust.long()).nonzero().squeeze(1)
    if len(contradicting):
        row = int(contradicting[0])
        clean = "wrong" if natural[row] else "right"
        got = f"a {clean} clean prediction and {int(broken_by[row])} in row {row}, the first of {len(contradicting)} such rows"
        expected = "-2 where the clean prediction is wrong, otherwise -1 or the position of an attack"
        raise ValueError(message("broken_by", expected, got, "take all tensors from one evaluation"))
    return ClassErrors(*(_summary(wrong, labels, classes) for wrong in (natural, boundary, robust)))


def class_summary(per_class: tuple[float, ...]) -> ClassSummary:
    """Mean, worst and spread over the classes with examples; the spread is the population standard deviation.

    Example:
        >>> class_summary((0.5, float("nan"), 1.0))
        ClassSummary(class_mean=0.75, worst=0.5, worst_class=0, spread=0.25)
    """
    known = {label: accuracy for label, accuracy in enumerate(per_class) if not math.isnan(accuracy)}
    average, spread = _moments(list(known.values()))
    worst_class = min(known, key=lambda label: known[label], default=-1)
    return ClassSummary(average, known.get(worst_class, math.nan), worst_class, spread)


def _summary(wrong: Tensor, labels: Tensor, classes: int) -> ErrorSummary:
    """Summary of the rows that are ``wrong``. A quotient of counts is rounded once, so equal errors are equal numbers."""
    errors, counts = (torch.bincount(rows, minlength=classes).tolist() for rows in (labels[wrong], labels))
    per_class = tuple(error / count if count else math.nan for error, count in zip(errors, counts, strict=True))
    known = {label: error for label, error in enumerate(per_class) if not math.isnan(error)}
    worst_class = max(known, key=lambda label: known[label], default=-1)
    average = sum(errors) / sum(counts) if known else math.nan
    return ErrorSummary(average, known.get(worst_class, math.nan), worst_class, _moments(list(known.values()))[1], per_class)


def _moments(values: list[float]) -> tuple[float, float]:
    """Mean and population standard deviation; NaN of nothing."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))

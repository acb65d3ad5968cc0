"""Class imbalance: data sets whose class sizes fall geometrically from head to tail."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metarobust._checks import finite, integer, require
from metarobust.data._labelled_images import LabelledImages, check_dataset
from metarobust.data._splits import check_cpu_generator


def long_tail(
    dataset: LabelledImages,
    *,
    factor: float,
    generator: torch.Generator,
    head: int | None = None,
    order: Sequence[int] | None = None,
) -> LabelledImages:
    """Thin a data set out to class sizes that fall geometrically (Cui et al., 2019, arXiv 1901.05555).

    The class at rank r of C, counted from the head, keeps ``max(1, floor(head / factor ** (r / (C - 1))))`` examples.
    The head class keeps `head`, the tail class `factor` times fewer. With a factor of 1 all classes are equal.

    Which examples of a class stay is random. The kept rows come in the order they have in `dataset`. From one generator
    state the class order is always the same, and the rows that a larger factor or a smaller head keeps are among those
    of a smaller factor or a larger head.

    Args:
        dataset: the rows to draw from, at least two classes, at least one example of each.
        factor: imbalance factor, the size of the head class over that of the tail class, at least 1.
        generator: CPU generator of the kept rows and, without `order`, of the class order.
        head: examples of the head class, at least 1. Default: the size of the smallest class, which any order can serve.
        order: all classes, from head to tail. Default: a random permutation.

    Returns:
        The kept rows, on the device of the data set, with its `num_classes`.

    Raises:
        TypeError: `factor` is not a number, or `head` is not an integer.
        ValueError: `factor` or `head` is too small, a class has no examples or fewer than it is to keep, there are fewer
            than two classes, `order` does not name each class once, or the generator is not on the CPU.

    Example:
        >>> data = LabelledImages(torch.rand(60, 1, 8, 8), torch.arange(60) % 3, num_classes=3)
        >>> tail = long_tail(data, factor=4, order=(2, 0, 1), generator=torch.Generator().manual_seed(0))
        >>> tail.labels.bincount().tolist()
        [10, 5, 20]
    """
    check_dataset(dataset)
    check_cpu_generator(generator)
    finite("factor", factor, least=1)
    classes, labels = dataset.num_classes, dataset.labels.cpu()
    require(classes >= 2, "dataset", "of at least two classes", classes)
    available: list[int] = labels.bincount(minlength=classes).tolist()
    smallest = min(available)
    require(
        smallest > 0,
        "dataset",
        "one with examples of every class",
        f"none of class {available.index(smallest)}",
        "number the classes that occur 0, 1, 2, ... without gaps",
    )
    if head is None:
        head = smallest
    integer("head", head, least=1)
    # Rows before the class order: a given order then keeps the rows that the same drawn order would keep.
    shuffled = torch.randperm(len(labels), generator=generator)
    if order is None:
        order = torch.randperm(classes, generator=generator).tolist()
    order = list(order)
    remedy = "name every class once, from head to tail"
    require(sorted(order) == list(range(classes)), "order", f"a permutation of 0, ..., {classes - 1}", order, remedy)
    kept = _kept_per_class(order, head, factor)
    for label in order:
        require(
            kept[label] <= available[label],
            "head",
            "small enough for the examples of every class",
            f"{head}, of which class {label} is to keep {kept[label]} but has {available[label]}",
            "write a smaller head, or an order with that class nearer to the tail",
        )
    return dataset.select(first_of_each_class(labels, kept, shuffled))


def first_of_each_class(labels: Tensor, counts: Sequence[int], shuffled: Tensor) -> Tensor:
    """The first ``counts[c]`` rows of every class c in the order `shuffled`, as row numbers in ascending order (int64)."""
    chosen = [shuffled[labels[shuffled] == label][:count] for label, count in enumerate(counts)]
    return torch.cat(chosen).sort().values


def _kept_per_class(order: Sequence[int], head: int, factor: float) -> list[int]:
    kept = [0] * len(order)
    for rank, label in enumerate(order):
        share = head / factor ** (rank / (len(order) - 1))
        # A power that is rounded up must not cost an example: 512 / 32 ** (4 / 5) is 32, not 31.
        kept[label] = max(1, math.floor(share * (1 + 1e-12)))
    return kept

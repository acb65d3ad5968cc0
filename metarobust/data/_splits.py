"""Disjoint, class-stratified parts of a data set."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from metarobust._checks import generator as checks_generator
from metarobust._checks import integer, require, sequence
from metarobust.data._labelled_images import LabelledImages, check_dataset


def split(dataset: LabelledImages, sizes: Sequence[int], *, generator: torch.Generator) -> tuple[LabelledImages, ...]:
    """Cut a data set into disjoint parts in which every class keeps its share.

    One stratified random order is drawn and cut into consecutive slices. Every slice of it, and so every part and the
    first m rows of a part, holds each class in proportion to the whole data set (with ten classes of similar size: to
    within two examples). The order depends on labels and generator only: other sizes cut the same order elsewhere.

    Args:
        dataset: the rows to divide.
        sizes: number of rows of each part, each at least 0; what the sizes leave over is in no part.
        generator: CPU generator of the order.

    Returns:
        One `LabelledImages` per size, on the device of the data set.

    Raises:
        ValueError: a size is negative, the sizes ask for more rows than there are, or the generator is not on the CPU.

    Example:
        >>> data = LabelledImages(torch.rand(30, 1, 8, 8), torch.arange(30) % 3, num_classes=3)
        >>> train, test = split(data, (18, 12), generator=torch.Generator().manual_seed(0))
        >>> train.labels.bincount().tolist(), test.labels.bincount().tolist()
        ([6, 6, 6], [4, 4, 4])
    """
    check_dataset(dataset)
    sequence("sizes", sizes, "(700, 300)")
    for size in sizes:
        integer("each of sizes", size, least=0)
    sizes = list(sizes)
    require(
        sum(sizes) <= len(dataset),
        "sizes",
        f"of a sum of at most {len(dataset)}, the length of the data set",
        f"{sizes} with the sum {sum(sizes)}",
        "write smaller sizes",
    )
    order = _stratified_order(dataset.labels.cpu(), generator)
    edges = accumulate(sizes, initial=0)
    return tuple(dataset.select(order[start:stop]) for start, stop in pairwise(edges))


def check_cpu_generator(generator: torch.Generator) -> None:
    """Refuse a generator of another device, whose numbers would differ from those of the CPU for the same seed."""
    checks_generator("generator", generator, needed=True)


def _stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation of the rows (int64 [n]) of which every slice holds the classes in proportion."""
    check_cpu_generator(generator)
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique(sorted=True):
        rows = (labels == label).nonzero().flatten()
        # A class of m rows, shuffled, sits at equal distances 1 / m on the unit interval, from a random start.
        rows = rows[torch.randperm(len(rows), generator=generator)]
        start = torch.rand((), dtype=torch.float64, generator=generator)
        position[rows] = (torch.arange(len(rows), dtype=torch.float64) + start) / len(rows)
    return position.argsort(stable=True)

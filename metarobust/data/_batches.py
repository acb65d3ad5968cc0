"""Random minibatches."""

import torch

from metarobust._checks import integer
from metarobust.data._labelled_images import LabelledImages, check_dataset
from metarobust.data._splits import check_cpu_generator


def minibatch(dataset: LabelledImages, size: int, *, generator: torch.Generator) -> LabelledImages:
    """Draw `size` distinct rows, uniformly and in random order.

    Args:
        dataset: the rows to draw from, on any device.
        size: number of rows, at least 1; a size of ``len(dataset)`` or more gives every row once.
        generator: CPU generator; the same state draws the same rows on every device.

    Returns:
        ``min(size, len(dataset))`` rows, on the device of the data set.

    Raises:
        TypeError: `size` is not an integer.
        ValueError: `size` is below 1, or the generator is not on the CPU.

    Example:
        >>> data = LabelledImages(torch.rand(6, 1, 8, 8), torch.arange(6), num_classes=6)
        >>> batch = minibatch(data, 4, generator=torch.Generator().manual_seed(0))
        >>> len(batch), len(batch.labels.unique())
        (4, 4)
    """
    integer("size", size, least=1)
    check_dataset(dataset)
    check_cpu_generator(generator)
    return dataset.select(torch.randperm(len(dataset), generator=generator)[:size])

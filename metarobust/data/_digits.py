"""The handwritten digits that scikit-learn carries with it: 1,797 images of 8 x 8 pixels, no download."""

from typing import NamedTuple

import torch

from metarobust._checks import integer
from metarobust._randomness import torch_seed
from metarobust.data._labelled_images import LabelledImages
from metarobust.data._splits import split

POOL_SIZES = (700, 400, 697)


class Pools(NamedTuple):
    """Three disjoint parts of one data set, each with one purpose.

    Attributes:
        meta_train: where low-data tasks for meta-training come from.
        target: where the final, unseen training set comes from, and the validation rows on which choices are made.
        test: touched once, for the number that is reported.
    """

    meta_train: LabelledImages
    target: LabelledImages
    test: LabelledImages


def load_digits() -> LabelledImages:
    """The 1,797 digits of scikit-learn, in their original order.

    Returns:
        Images float32 [1797, 1, 8, 8] in [0, 1] (the 17 grey levels 0, 1/16, ..., 1, exact in float32), labels int64,
        10 classes.

    Example:
        >>> digits = load_digits()
        >>> digits.images.shape, digits.num_classes
        (torch.Size([1797, 1, 8, 8]), 10)
    """
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return LabelledImages(images, torch.as_tensor(labels, dtype=torch.int64), num_classes=10)


def digits_pools(seed: int = 0) -> Pools:
    """The digits in three disjoint, class-stratified pools: 700 (meta-train), 400 (target) and 697 (test) examples.

    Args:
        seed: chooses the split; the same seed gives the same rows in the same order.

    Returns:
        The three pools, which together hold every digit once. Each class keeps its share to within two examples.

    Example:
        >>> pools = digits_pools(seed=0)
        >>> [len(pool) for pool in pools]
        [700, 400, 697]
    """
    integer("seed", seed, least=0)
    return Pools(*split(load_digits(), POOL_SIZES, generator=torch.Generator().manual_seed(torch_seed(seed))))

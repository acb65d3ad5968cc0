"""Meta sets: small, clean and balanced parts on which weights or update rules are judged while they are learned."""

import torch

from metarobust._checks import integer, require
from metarobust.data._labelled_images import LabelledImages, check_dataset
from metarobust.data._long_tail import first_of_each_class
from metarobust.data._splits import check_cpu_generator, split


def split_meta(dataset: LabelledImages, per_class: int, *, generator: torch.Generator) -> tuple[LabelledImages, LabelledImages]:
    """Take a class-balanced meta set out of a data set.

    Call it before `long_tail` and `with_label_noise`: the meta set is then balanced and clean, the rest is thinned out
    and mislabelled, as in Meta-Weight-Net (Shu et al., 2019, arXiv 1902.07379) and CAAT (Zhou et al., 2023, arXiv
    2304.12550). Drawn from data that are noisy already, it would be balanced in the observed labels only.

    Args:
        dataset: clean data.
        per_class: examples of each class in the meta set, at least 1. A class may give all that it has.
        generator: CPU generator of the choice and of the order of the meta set.

    Returns:
        Two disjoint parts that make up the data set, both on its device. First the rest, in the order of the data set.
        Then the meta set, ``per_class * num_classes`` rows in a random order of which every slice, and so every
        minibatch cut from it, holds each class equally often to within one example.

    Raises:
        TypeError: `per_class` is not an integer.
        ValueError: `per_class` is below 1 or more than the rarest class has, or the generator is not on the CPU.

    Example:
        >>> from metarobust.data import load_digits, long_tail, noise_matrix, with_label_noise
        >>> generator = torch.Generator().manual_seed(0)
        >>> rest, meta = split_meta(load_digits(), 10, generator=generator)
        >>> tail = long_tail(rest, factor=10, order=range(10), generator=generator)
        >>> train = with_label_noise(tail, noise_matrix("flip2", 0.2, 10, generator=generator), generator=generator)
        >>> meta.labels.bincount().tolist()
        [10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
        >>> train.true_labels.bincount().tolist(), int(train.flipped.sum())
        ([164, 126, 98, 76, 58, 45, 35, 27, 21, 16], 134)
    """
    check_dataset(dataset)
    check_cpu_generator(generator)
    integer("per_class", per_class, least=1)
    labels = dataset.labels.cpu()
    available = labels.bincount(minlength=dataset.num_classes)
    rarest = int(available.argmin())
    require(
        per_class <= int(available[rarest]),
        "per_class",
        f"at most {int(available[rarest])} here, the number of examples of class {rarest}",
        per_class,
        "write a smaller number, or pass a data set with more examples of that class",
    )
    shuffled = torch.randperm(len(labels), generator=generator)
    chosen = first_of_each_class(labels, [per_class] * dataset.num_classes, shuffled)
    in_rest = torch.ones(len(labels), dtype=torch.bool)
    in_rest[chosen] = False
    # Classes of equal size come in rounds in a stratified order, one example of each class per round.
    (meta,) = split(dataset.select(chosen), (len(chosen),), generator=generator)
    return dataset.select(in_rest.nonzero().flatten()), meta

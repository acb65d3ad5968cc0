"""Label noise: matrices of class confusion, and data sets whose labels are drawn from them."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarobust._checks import choice, finite, integer, message, require, tensor_of
from metarobust._checks import kind as kind_of
from metarobust.data._labelled_images import LabelledImages, check_dataset
from metarobust.data._splits import check_cpu_generator

_KINDS = ("uniform", "flip1", "flip2", "pair")
_ROW_SUM_TOLERANCE = 1e-9


class NoisyLabels(NamedTuple):
    """A data set with noisy labels, beside the truth that no training may see.

    Attributes:
        data: the images with the labels that are observed.
        true_labels: int64 [n], the labels before the noise.
        flipped: bool [n], where the observed label is not the true one.
    """

    data: LabelledImages
    true_labels: Tensor
    flipped: Tensor


def noise_matrix(kind: str, rate: float, num_classes: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Probabilities of the observed class for each true class.

    With C classes and the rate rho, a true class c is observed as

    - ``"uniform"``: c with probability 1 - rho, otherwise any class, c among them: ``(1 - rho) I + rho / C``. The share
      of wrong labels is rho (1 - 1/C), less than rho.
    - ``"flip1"``: one other class, drawn once per true class, with probability rho.
    - ``"flip2"``: either of two distinct other classes, drawn once per true class, with probability rho / 2 each.
    - ``"pair"``: the next class ``(c + 1) % C`` with probability rho (Han et al., 2018, arXiv 1804.06872).

    The first three are those of the Meta-Weight-Net code (Shu et al., 2019, arXiv 1902.07379). "Pair flip" usually means
    ``"pair"``; the instructions of the CAAT code (Zhou et al., 2023, arXiv 2304.12550) mean ``"flip2"`` by it.

    Args:
        kind: one of the four names.
        rate: rho, in [0, 1]. At 0 every matrix is the identity.
        num_classes: C, at least 2, and at least 3 for ``"flip2"``.
        generator: CPU generator of the other classes, for ``"flip1"`` and ``"flip2"``; the rest ignores it.

    Returns:
        float64 [C, C] on the CPU, row = true class, column = observed class; rows sum to 1 up to rounding.

    Raises:
        TypeError: `rate` is not a number, or `num_classes` is not an integer.
        ValueError: an unknown name, a number outside its range, or no CPU generator where one is needed.

    Example:
        >>> noise_matrix("pair", 0.25, 3)
        tensor([[0.7500, 0.2500, 0.0000],
                [0.0000, 0.7500, 0.2500],
                [0.2500, 0.0000, 0.7500]], dtype=torch.float64)
    """
    choice("kind", kind, _KINDS)
    finite("rate", rate, least=0)
    require(rate <= 1, "rate", "a probability in [0, 1]", rate, "for a percentage write rate / 100")
    integer("num_classes", num_classes, least=2)
    identity = torch.eye(num_classes, dtype=torch.float64)
    if kind == "uniform":
        return (1 - rate) * identity + rate / num_classes
    if kind == "pair":
        return (1 - rate) * identity + rate * identity.roll(1, dims=1)
    others = 1 if kind == "flip1" else 2
    require(num_classes > others, "num_classes", "at least 3 for 'flip2'", num_classes, "write 'flip1'")
    if generator is None:
        expected, remedy = f"given for {kind!r}, whose classes are random", "write torch.Generator().manual_seed(seed)"
        raise ValueError(message("generator", expected, None, remedy))
    check_cpu_generator(generator)
    matrix = (1 - rate) * identity
    for true_class in range(num_classes):
        steps = 1 + torch.randperm(num_classes - 1, generator=generator)[:others]
        matrix[true_class, (true_class + steps) % num_classes] = rate / others
    return matrix


def with_label_noise(dataset: LabelledImages, matrix: Tensor, *, generator: torch.Generator) -> NoisyLabels:
    """Draw an observed label for each example from the row of its true class.

    Each example takes one uniform number from the generator, in float64, and the inverse of its row's cumulative sum.

    Args:
        dataset: images with true labels.
        matrix: probabilities, floating point [C, C] for the C classes of the data set, row = true class, column =
            observed class (see `noise_matrix`); each entry in [0, 1], each row with the sum 1 to within 1e-9.
        generator: CPU generator of the draws.

    Returns:
        Observed labels, true labels and the mask of their difference, on the device of the data set, in its order. The
        images are shared, not copied.

    Raises:
        TypeError: `matrix` is not a floating-point tensor.
        ValueError: the matrix has another shape or is not made of probabilities, or the generator is not on the CPU.

    Example:
        >>> data = LabelledImages(torch.rand(500, 1, 8, 8), torch.arange(500) % 10, num_classes=10)
        >>> noisy = with_label_noise(data, noise_matrix("pair", 0.2, 10), generator=torch.Generator().manual_seed(0))
        >>> int(noisy.flipped.sum()), ((noisy.data.labels - noisy.true_labels) % 10).bincount().tolist()
        (85, [415, 85])
    """
    check_dataset(dataset)
    check_cpu_generator(generator)
    _check_matrix(matrix, dataset.num_classes)
    cumulative = matrix.detach().to("cpu", torch.float64).cumsum(dim=1)
    # The last sum is 1 only up to rounding: as it is, a draw beyond it would have no class.
    cumulative = cumulative / cumulative[:, -1:]
    true_labels = dataset.labels.cpu()
    draws = torch.rand(len(true_labels), dtype=torch.float64, generator=generator)
    observed = torch.empty_like(true_labels)
    for label in true_labels.unique().tolist():
        rows = true_labels == label
        # On the right of equal sums: a class without probability has no interval, so it is never drawn.
        observed[rows] = torch.searchsorted(cumulative[label], draws[rows], right=True)
    observed = observed.to(dataset.labels.device)
    data = LabelledImages(dataset.images, observed, dataset.num_classes)
    return NoisyLabels(data, dataset.labels, observed != dataset.labels)


def _check_matrix(matrix: Tensor, classes: int) -> None:
    expected = f"a floating-point tensor [{classes}, {classes}], row = true class"
    if not isinstance(matrix, Tensor):
        raise TypeError(message("matrix", expected, kind_of(matrix), tensor_of("matrix", matrix)))
    if not matrix.is_floating_point():
        raise TypeError(message("matrix", expected, kind_of(matrix), "write matrix.double()"))
    remedy = "pass num_classes=dataset.num_classes to noise_matrix"
    require(matrix.shape == (classes, classes), "matrix", expected, list(matrix.shape), remedy)
    low, high = (value.item() for value in torch.aminmax(matrix.detach()))
    require(low >= 0 and high <= 1, "matrix", "of probabilities in [0, 1]", f"values from {low:g} to {high:g}")
    sums = matrix.detach().double().sum(dim=1)
    worst = int((sums - 1).abs().argmax())
    require(
        abs(float(sums[worst]) - 1) <= _ROW_SUM_TOLERANCE,
        "matrix",
        "one whose rows sum to 1 (to within 1e-9)",
        f"the sum {float(sums[worst]):.10g} in row {worst}",
        "write matrix.double() / matrix.double().sum(1, keepdim=True)",
    )

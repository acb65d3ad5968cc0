"""The one container of the package: images in [0, 1] with an integer label each."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metarobust._checks import has_values, integer, kind, message, require, tensor_of


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages:
    """Images with one class label each, checked once when they are put together.

    Args:
        images: floating point (float32 from every loader), [n, channels, height, width], finite, in [0, 1].
        labels: int64 [n], in [0, num_classes), on the device of the images.
        num_classes: number of classes, at least 1; may exceed the number of classes that occur.

    Raises:
        TypeError: `images` is not floating point, or `labels` is not int64, or `num_classes` is not an int.
        ValueError: a shape, a device or a value is outside what is listed above.

    Example:
        >>> data = LabelledImages(torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 1, 0]), num_classes=3)
        >>> len(data), data.select(torch.tensor([1, 3])).labels.tolist()
        (5, [1, 1])
        >>> data
        LabelledImages(images=float32 [5, 1, 8, 8] on cpu, num_classes=3)
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        _check_images(self.images)
        _check_labels(self.labels, self.images, self.num_classes)

    def __len__(self) -> int:
        return self.images.shape[0]

    def __repr__(self) -> str:
        # A repr is a log entry: shapes say more than a wall of pixels.
        shape = list(self.images.shape)
        return (
            f"{type(self).__name__}(images={dtype_name(self.images)} {shape} on {self.images.device}, "
            f"num_classes={self.num_classes})"
        )

    def to(self, device: torch.device | str) -> "LabelledImages":
        """The same rows on another device.

        Args:
            device: where images and labels go, such as ``"cuda"``.

        Returns:
            A new container; tensors that already live there are shared, not copied.
        """
        return self._of_valid_rows(self.images.to(device), self.labels.to(device))

    def select(self, indices: Tensor) -> "LabelledImages":
        """The rows at `indices`, in that order; an index may repeat.

        Args:
            indices: int64 [m], in [0, n), on any device.

        Returns:
            A new container with copies of the m rows, on the device of the images.

        Raises:
            TypeError: `indices` is not int64 with one axis.
            ValueError: an index beyond the rows, on a CPU.
        """
        if not isinstance(indices, Tensor):
            got, remedy = kind(indices), tensor_of("indices", indices)
            raise TypeError(message("indices", "integers (torch.int64) of shape [m]", got, remedy))
        if indices.dtype != torch.int64 or indices.ndim != 1:
            got = f"dtype {dtype_name(indices)} and shape {list(indices.shape)}"
            remedy = "for a mask write mask.nonzero().flatten()"
            raise TypeError(message("indices", "integers (torch.int64) of shape [m]", got, remedy))
        indices = indices.to(self.images.device)
        try:
            return self._of_valid_rows(self.images[indices], self.labels[indices])
        except IndexError as error:  # a GPU does not tell; looking first would make it wait at every minibatch
            low, high = (int(bound) for bound in indices.aminmax())
            got = f"indices from {low} to {high}"
            raise ValueError(message("indices", f"in [0, {len(self)}), the rows of the data set", got)) from error

    def _of_valid_rows(self, images: Tensor, labels: Tensor) -> "LabelledImages":
        # Rows of checked data need no second check, which on a GPU would cost a synchronisation per minibatch.
        rows = object.__new__(LabelledImages)
        for field, value in (("images", images), ("labels", labels), ("num_classes", self.num_classes)):
            object.__setattr__(rows, field, value)
        return rows


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(message("images", "a tensor, floating point in [0, 1]", kind(images), tensor_of("images", images)))
    if not images.is_floating_point():
        remedy = "for 8-bit images write images.float() / 255"
        raise TypeError(message("images", "floating point in [0, 1]", f"dtype {dtype_name(images)}", remedy))
    require(
        images.ndim == 4,
        "images",
        "of shape [n, channels, height, width]",
        list(images.shape),
        "for [n, height, width] write images.unsqueeze(1)",
    )
    has_values("images", images)
    if images.numel() == 0:
        return
    lowest, highest = (bound.item() for bound in images.aminmax())
    # aminmax passes a NaN on, and a NaN fails both comparisons: one pass over the pixels finds every bad value.
    require(
        lowest >= 0 and highest <= 1,
        "images",
        "finite and in [0, 1]",
        f"values from {lowest:.6g} to {highest:.6g}",
        "write images / 255 for 8-bit values, and put any normalisation inside the model",
    )


def _check_labels(labels: Tensor, images: Tensor, num_classes: int) -> None:
    integer("num_classes", num_classes, least=1)
    expected = f"integers (torch.int64) in [0, {num_classes})"
    if not isinstance(labels, Tensor):
        raise TypeError(message("labels", expected, kind(labels), tensor_of("labels", labels) + ".long()"))
    if labels.dtype != torch.int64:
        raise TypeError(message("labels", expected, f"dtype {dtype_name(labels)}", "write labels.long()"))
    require(
        labels.shape == images.shape[:1],
        "labels",
        f"of shape [{len(images)}], one label per image",
        list(labels.shape),
        "for one-hot rows write labels.argmax(dim=1)",
    )
    require(
        labels.device == images.device,
        "labels",
        f"on the device of the images, {images.device}",
        labels.device,
        "write labels.to(images.device)",
    )
    if labels.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in labels.aminmax())
    require(
        lowest >= 0 and highest < num_classes,
        "labels",
        expected,
        f"values from {lowest} to {highest}",
        "number the classes from 0 and write num_classes=int(labels.max()) + 1",
    )


def check_dataset(value: object) -> None:
    """Check that ``value`` is a `LabelledImages`."""
    if not isinstance(value, LabelledImages):
        remedy = "write LabelledImages(images, labels, num_classes)"
        raise TypeError(message("dataset", "a LabelledImages", type(value).__name__, remedy))


def dtype_name(tensor: Tensor) -> str:
    """The dtype as a reader writes it: ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")

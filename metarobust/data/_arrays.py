"""Images and labels from NumPy archives."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarobust._checks import message, require
from metarobust._files import require_room
from metarobust.data._labelled_images import LabelledImages


def load_npz(path: str | Path, *, num_classes: int | None = None) -> LabelledImages:
    """Read an .npz archive that holds the arrays `images` and `labels`; no code in the file is executed.

    Args:
        path: the file. `images` is uint8 in [0, 255] or floating point in [0, 1], of shape [n, height, width] or
            [n, height, width, channels] with 1, 3 or 4 channels; `labels` is an integer array [n].
        num_classes: number of classes. Default: the largest label plus one, which is too small for a file that lacks
            the last class.

    Returns:
        Images float32 [n, channels, height, width] in [0, 1] (uint8 values divided by 255), labels int64 [n].

    Raises:
        FileNotFoundError: there is no such file.
        KeyError: `images` or `labels` is missing; the text lists the arrays that were found.
        TypeError: an array has the wrong kind of numbers.
        ValueError: not an .npz archive, or a shape or value is outside what is listed above.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "two.npz"
        >>> np.savez(path, images=np.full((2, 8, 8), 255, dtype=np.uint8), labels=np.array([0, 1]))
        >>> load_npz(path)
        LabelledImages(images=float32 [2, 1, 8, 8] on cpu, num_classes=2)
    """
    arrays = _read(Path(path))
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        expected = "uint8 in [0, 255] or floating point in [0, 1]"
        remedy = "for 8-bit values write images.astype(numpy.uint8)"
        raise TypeError(message("images", expected, f"dtype {images.dtype} in {path}", remedy))
    if labels.dtype.kind not in "iu":
        remedy = "write labels.astype(numpy.int64)"
        raise TypeError(message("labels", "integers", f"dtype {labels.dtype} in {path}", remedy))
    if num_classes is None:
        num_classes = int(labels.max(initial=0)) + 1
    if images.dtype == np.uint8:
        in_unit_range = bytes_to_images(images)
    else:
        # A float64 beyond the range of float32 becomes infinite, and is then refused with a sentence.
        with np.errstate(over="ignore"):
            in_unit_range = _channels_first(images.astype(np.float32))
    return LabelledImages(in_unit_range, torch.from_numpy(labels.astype(np.int64)), num_classes)


def bytes_to_images(pixels: NDArray[np.uint8]) -> Tensor:
    """Turn 8-bit pixels [n, height, width(, channels)] into float32 [n, channels, height, width] in [0, 1]."""
    return _channels_first(pixels).to(torch.float32).div_(255)


def _channels_first(pixels: NDArray) -> Tensor:
    if pixels.ndim == 3:
        pixels = pixels[..., np.newaxis]
    require(
        pixels.ndim == 4 and pixels.shape[-1] in (1, 3, 4),
        "images",
        "of shape [n, height, width] or [n, height, width, channels] with 1, 3 or 4 channels",
        list(pixels.shape),
        "for [n, channels, height, width] write images.transpose(0, 2, 3, 1)",
    )
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def _read(path: Path) -> dict[str, NDArray]:
    remedy = "write it with numpy.savez(path, images=images, labels=labels)"
    if not path.is_file():
        got = f"the folder {path}" if path.is_dir() else f"{path}, which does not exist"
        raise FileNotFoundError(message("path", "an .npz file", got, remedy))
    require(zipfile.is_zipfile(path), "path", "an .npz archive", f"{path}, which is of another kind", remedy)
    with _readable(path), zipfile.ZipFile(path) as archive:
        sizes = {member.filename.removesuffix(".npy"): member.file_size for member in archive.infolist()}
    if not {"images", "labels"} <= sizes.keys():
        found = f"{shorten(str(sorted(sizes)), 200)} in {path}"
        raise KeyError(message("the arrays", "named 'images' and 'labels'", found, remedy))
    require_room(f"images and labels in {path}", sizes["images"] + sizes["labels"])
    with _readable(path), np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in ("images", "labels")}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """One sentence for whatever a damaged archive makes of zipfile, zlib, tokenize or NumPy."""
    try:
        yield
    except Exception as error:
        if "allow_pickle" in str(error):  # NumPy refuses an array of Python objects, which only pickle could read
            expected, remedy = "plain numeric arrays", "convert them with numpy.stack or .astype before saving"
            raise ValueError(message("images and labels", expected, f"objects in {path}", remedy)) from error
        reason = shorten(str(error), 100) or type(error).__name__
        raise ValueError(message("path", "a whole .npz archive", f"{path}, which cannot be read ({reason})")) from error

"""Data sets by name, through torchvision; `digits` needs neither torchvision nor a download."""

import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch

from metarobust._checks import choice, message
from metarobust.data._arrays import bytes_to_images
from metarobust.data._digits import POOL_SIZES, load_digits
from metarobust.data._labelled_images import LabelledImages
from metarobust.data._splits import split

_CLASS_NAMES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def load(name: str, *, train: bool, root: str | Path | None = None, download: bool = False) -> LabelledImages:
    """Load a data set by name.

    Args:
        name: ``"mnist"``, ``"fashion-mnist"``, ``"cifar10"``, ``"cifar100"``, or ``"digits"`` (see `load_digits`; it
            ignores `root` and `download`; its test part is the test pool of ``digits_pools(0)``, its training part the
            1,100 other examples).
        train: the training part, or else the test part.
        root: a torchvision root. Default: the environment variable METAROBUST_DATA, else ``~/.cache/metarobust``.
            Archives that lie there packed are unpacked in a temporary folder, so a root may be read-only.
        download: fetch what is missing into `root` and unpack it there, with torchvision's checksums.

    Returns:
        Images float32 [n, channels, height, width] in [0, 1], labels int64 [n], on the CPU, in their original order.

    Raises:
        ValueError: the name is not one of the above.
        FileNotFoundError: the data is not under `root`, or damaged, and `download` is False.
        ConnectionError: the data cannot be fetched; what has arrived stays, and the next call fetches the rest.

    Example:
        >>> load("digits", train=False)
        LabelledImages(images=float32 [697, 1, 8, 8] on cpu, num_classes=10)
    """
    if not isinstance(train, bool):
        raise TypeError(message("train", "True or False", repr(train)))
    if name == "digits":
        train_and_test = (sum(POOL_SIZES[:2]), POOL_SIZES[2])
        training, test = split(load_digits(), train_and_test, generator=torch.Generator().manual_seed(0))
        return training if train else test
    choice("name", name, ("digits", *_CLASS_NAMES))
    root = Path(root or os.environ.get("METAROBUST_DATA") or "~/.cache/metarobust").expanduser()
    from torchvision import datasets

    kind = getattr(datasets, _CLASS_NAMES[name])
    if download:
        return _fetched(kind, root, name, train=train)
    try:
        return _read(kind, root, train=train)
    except OSError:
        raise
    except Exception as error:  # torchvision's words for files that are absent, cut off or damaged
        if not _archives_intact(kind, root):
            got = f"{root}, which has no intact copy of it"
            remedy = "write download=True to fetch it, or set root= or METAROBUST_DATA to a folder that has it"
            raise FileNotFoundError(message("root", f"a torchvision root that holds {name}", got, remedy)) from error
    with _unpacked(kind, root) as folder:
        return _read(kind, folder, train=train)


def _fetched(kind: Any, root: Path, name: str, *, train: bool) -> LabelledImages:
    """Read the data, after torchvision has fetched what is missing; files whose unpacking was cut off are unpacked again."""
    for path in _cut_off(kind, root):
        path.unlink()
    try:
        return _read(kind, root, train=train, download=True)
    except Exception as error:
        reason = shorten(str(error), 200)
        remedy = "repeat the command to go on: what has arrived whole is kept"
        raise ConnectionError(message(name, f"fetched into {root}", reason, remedy)) from error


def _cut_off(kind: Any, root: Path) -> list[Path]:
    """Unpacked files that are shorter or longer than they say; torchvision takes any file that is there for a whole one."""
    found = []
    for packed in _archives(kind) if hasattr(kind, "resources") else ():  # of CIFAR torchvision checks the sums itself
        path = (root / packed).with_suffix("")
        if not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(256)
        count = head[3] if len(head) > 3 else 0  # of axes; their lengths follow
        axes = [int.from_bytes(head[i : i + 4]) for i in range(4, 4 + 4 * count, 4)]
        if count == 0 or path.stat().st_size != 4 + 4 * count + math.prod(axes):
            found.append(path)
    return found


def _read(kind: Any, root: Path, *, train: bool, download: bool = False) -> LabelledImages:
    with warnings.catch_warnings():
        # The pickles of CIFAR are older than NumPy's present idea of dtype(align=...); a reader cannot fix that.
        old = np.exceptions.VisibleDeprecationWarning
        warnings.filterwarnings("ignore", message=".*align should be passed", category=old)
        dataset = kind(str(root), train=train, download=download)
    images = bytes_to_images(np.asarray(dataset.data))
    return LabelledImages(images, torch.as_tensor(dataset.targets, dtype=torch.int64), num_classes=len(dataset.classes))


def _archives(kind: Any) -> dict[str, str]:
    """Paths of the packed files below a root, with their MD5 sums, as torchvision lists them."""
    if hasattr(kind, "resources"):
        return {f"{kind.__name__}/raw/{filename}": checksum for filename, checksum in kind.resources}
    return {kind.filename: kind.tgz_md5}


def _archives_intact(kind: Any, root: Path) -> bool:
    from torchvision.datasets.utils import check_integrity

    return all(check_integrity(str(root / path), checksum) for path, checksum in _archives(kind).items())


@contextmanager
def _unpacked(kind: Any, root: Path) -> Iterator[Path]:
    """A temporary root in which torchvision finds the intact archives of `root`, and unpacks them without a network."""
    with tempfile.TemporaryDirectory() as folder:
        for path in _archives(kind):
            link = Path(folder, path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((root / path).resolve())
        kind(folder, download=True)
        yield Path(folder)

"""Self-describing files for meta-optimizers: safetensors with a JSON header; loading never executes code."""

import os
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from metarobust import __version__
from metarobust._checks import require
from metarobust._tensor_files import read_tensors, write_tensors
from metarobust.meta_optimizers._kinds import KINDS, MetaOptimizer, check_meta_optimizer

FORMAT = "metarobust meta-optimizer 1"
TRAINED = ("robust-small-v1",)
"""Names of the meta-optimizers that come with this package."""


def save(meta_optimizer: MetaOptimizer, path: str | os.PathLike[str]) -> Path:
    """Write a meta-optimizer to a safetensors file: its tensors, and a header with kind, settings, record and versions.

    The file is written beside its place and renamed, so a crash leaves the old one. See :func:`load`.

    Args:
        meta_optimizer: an `LSTMOptimizer` or an `InterpretableOptimizer`.
        path: of the file, in an existing folder.
    """
    check_meta_optimizer(meta_optimizer)
    header = {
        "format": FORMAT,
        "kind": type(meta_optimizer).__name__,
        "settings": meta_optimizer.settings,
        "record": meta_optimizer.record,
        "metarobust": __version__,
    }
    return write_tensors(path, {name: p.detach() for name, p in meta_optimizer.state_dict().items()}, header)


def load(path: str | os.PathLike[str]) -> MetaOptimizer:
    """Read a meta-optimizer that :func:`save` wrote, or one that comes with this package, on the CPU and frozen.

    Args:
        path: a file, or a name from :data:`TRAINED`: ``"robust-small-v1"``, learned on small networks and a part of the digits by
            ``examples/robust_small_v1.py``; docs/transfer.md says where it works.

    Raises:
        FileNotFoundError: there is no such file, nor such a name.
        ValueError: the file is damaged, is no meta-optimizer, or does not fit this version.

    Example:
        >>> import tempfile
        >>> from metarobust.meta_optimizers import LSTMOptimizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(LSTMOptimizer(hidden_size=4), f"{folder}/optimizer.safetensors")
        ...     load(path).settings["hidden_size"]
        4
        >>> load("robust-small-v1").gradient_source
        'gradient+adversarial_tangent'
    """
    if path in TRAINED:
        path = Path(__file__).parent / "trained" / f"{path}.safetensors"
    elif not Path(path).exists():
        names = ", ".join(TRAINED)
        raise FileNotFoundError(f"no meta-optimizer at {path}; write the path of a file, or a name of a trained one: {names}")
    tensors, header = read_tensors(path, expected=FORMAT)
    kind = KINDS.get(str(header.get("kind")))
    if kind is None:
        expected = " or an ".join(KINDS)
        raise ValueError(f"{path} must hold an {expected}, got kind {header.get('kind')!r}; it needs another version")
    try:
        _require_shapes(kind, header["settings"], tensors)
        meta_optimizer = kind(**header["settings"])
        meta_optimizer.load_state_dict(tensors)
        meta_optimizer.record = dict(header.get("record", {}))
    except (TypeError, LookupError, RuntimeError, ValueError, AttributeError) as error:
        reason = shorten((str(error).splitlines() or [""])[-1].strip().rstrip("."), 200)
        raise ValueError(
            f"{path} must fit metarobust {__version__}, got a file of version {header.get('metarobust')!r} that does not "
            f"({reason}); load it with that version"
        ) from error
    return meta_optimizer.requires_grad_(False)


def _require_shapes(kind: type[MetaOptimizer], settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Before memory is taken for what the settings claim: the file must hold tensors of these shapes."""
    with torch.device("meta"):
        claimed = {name: value.shape for name, value in kind(**settings).state_dict().items()}
    for name in [name for name in claimed if name in tensors]:  # in an order that is the same in every process
        require(tensors[name].shape == claimed[name], name, f"of shape {list(claimed[name])}", list(tensors[name].shape))

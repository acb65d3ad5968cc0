"""Self-describing files for meta-optimizers: safetensors with a JSON header; loading never executes code."""

import os
from pathlib import Path

from metarobust import __version__
from metarobust._tensor_files import read_tensors, write_tensors
from metarobust.meta_optimizers._kinds import KINDS, MetaOptimizer

FORMAT = "metarobust meta-optimizer 1"


def save(meta_optimizer: MetaOptimizer, path: str | os.PathLike[str]) -> Path:
    """Write a meta-optimizer to a safetensors file: its tensors, and a header with kind, settings, record and versions.

    The file is written beside its place and renamed, so a crash leaves the old one. See :func:`load`.
    """
    header = {
        "format": FORMAT,
        "kind": type(meta_optimizer).__name__,
        "settings": meta_optimizer.settings,
        "record": meta_optimizer.record,
        "metarobust": __version__,
    }
    return write_tensors(path, {name: p.detach() for name, p in meta_optimizer.state_dict().items()}, header)


def load(path: str | os.PathLike[str]) -> MetaOptimizer:
    """Read a meta-optimizer that :func:`save` wrote, on the CPU, frozen (no parameter requires a gradient).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no meta-optimizer, or does not fit this version.

    Example:
        >>> import tempfile
        >>> from metarobust.meta_optimizers import LSTMOptimizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(LSTMOptimizer(hidden_size=4), f"{folder}/optimizer.safetensors")
        ...     load(path).settings["hidden_size"]
        4
    """
    tensors, header = read_tensors(path, expected=FORMAT)
    kind = KINDS.get(str(header.get("kind")))
    if kind is None:
        expected = " or an ".join(KINDS)
        raise ValueError(f"{path} must hold an {expected}, got kind {header.get('kind')!r}; it needs another version")
    try:
        meta_optimizer = kind(**header["settings"])
        meta_optimizer.load_state_dict(tensors)
    except (TypeError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} must fit metarobust {__version__}, got a file of version {header.get('metarobust')!r} that does not "
            f"({reason}); load it with that version"
        ) from error
    meta_optimizer.record = dict(header.get("record", {}))
    return meta_optimizer.requires_grad_(False)

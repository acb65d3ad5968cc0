"""Files that are either whole or absent: written beside their place, then moved into it. And files that are read with care."""

import fcntl
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from metarobust._checks import message, require


def check_writable(path: Path, suggestion: str) -> None:
    """Raise a sentence, before any work, if no checkpoint can stand at ``path``; ``suggestion`` is a file name."""
    if not path.parent.is_dir():
        remedy = f"make the folder {path.parent} first"
        raise FileNotFoundError(message("checkpoint", "a file in an existing folder", path, remedy))
    require(not path.is_dir(), "checkpoint", "a file", f"the folder {path}", f"write {path / suggestion}")


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call ``write`` with a temporary path in the same folder, flush it to disk, then rename it to ``path``.

    A crash, a power loss, a full disk or an exception in ``write`` leaves whatever stood at ``path`` before. The temporary name
    keeps the suffix, because some writers (matplotlib) choose the format by it. What a killed process left of an earlier attempt
    is removed.

    Raises:
        FileNotFoundError: the folder is missing.
        OSError: the file cannot be written; one sentence, with the error number of the system's.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder at {path.parent} to write {path.name} to; make it first")
    _remove_abandoned(path)
    try:
        _replace(path, write)
    except OSError as error:
        if error.strerror is None:
            raise
        remedy = "make room or pass another path; what was there before is unchanged"
        failure = type(error)(f"{path} must be in a folder that can be written to, got {error.strerror!r}; {remedy}")
        failure.errno = error.errno
        raise failure from error
    return path


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.partial-", suffix=path.suffix, dir=path.parent)
    temporary = Path(name)
    try:
        with suppress(OSError):  # a file system without locks: then nothing is ever taken for abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        write(temporary)
        temporary.chmod(0o644)
        _flush(temporary)
        temporary.replace(path)
        with suppress(OSError):  # some file systems cannot flush a folder; the file itself is on disk
            _flush(path.parent)  # without this a power loss may undo the renaming
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Delete temporary files for ``path`` that nobody is writing: a process holds a lock on its own for as long as it lives."""
    pattern = re.compile(re.escape(f".{path.stem}.partial-") + r"[a-z0-9_]{8}" + re.escape(path.suffix))
    for found in [entry.path for entry in os.scandir(path.parent) if pattern.fullmatch(entry.name)]:
        with suppress(OSError):  # locked, gone, or on a file system without locks
            descriptor = os.open(found, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(found)
            finally:
                os.close(descriptor)


def json_text(content: Any, *, indent: int = 2) -> str:
    """``content`` as a JSON file holds it; numbers that JSON lacks, NaN and the infinities, become null.

    Example:
        >>> json_text({"loss": float("nan")}, indent=0)
        '{\\n"loss": null\\n}\\n'
    """
    return json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is not JSON, or too large or too deeply nested to be a file of this library.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"no file at {path}")
    require_room(str(path), path.stat().st_size)
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path} must be nested less deeply to be read") from error


def require_room(name: str, size: int) -> None:
    """Refuse what is larger than the memory of this machine, before it is read.

    Raises:
        ValueError: it is larger.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(
            f"{name} must be no larger than this machine's memory, {memory / 2**30:.1f} GiB, got {size / 2**30:.1f} GiB; "
            "it may be damaged"
        )

"""Files that are either whole or absent: written beside their place, then moved into it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call ``write`` with a temporary path in the same folder, flush it to disk, then rename it to ``path``.

    A crash, a full disk or an exception in ``write`` leaves whatever stood at ``path`` before. The temporary name keeps the
    suffix, because some writers (matplotlib) choose the format by it.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder at {path.parent} to write {path.name} to; make it first")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path

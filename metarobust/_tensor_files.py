"""Tensors with a JSON header in one safetensors file: written whole or not at all, read without executing code."""

import hashlib
import json
import os
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metarobust._checks import message
from metarobust._files import require_room, write_atomically
from metarobust._tensors import as_bytes

WEIGHTS = "metarobust weights 1"
"""Format of a state dict; other programs read it as any safetensors file."""


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Tensors and a JSON header, with a checksum over both, into one safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    plain = json.loads(json.dumps(header))  # keys that are numbers become text here as in the file
    text = json.dumps(plain | {"checksum": _checksum(contiguous, plain)}, sort_keys=True)

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary, metadata={"metarobust_header": text})
        except SafetensorError as error:  # tells of a full disk in words of its own
            code = re.search(r"\b(?:code:|os error) (\d+)", str(error))
            raise OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error)) from error

    return write_atomically(path, write)


def read_tensors(
    path: str | os.PathLike[str], *, expected: str | None, name: str = "", remedy: str = "save it again"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file whose header names the ``expected`` format; None takes any safetensors file.

    A checksum that does not fit is refused; files of versions that wrote none are read.

    Args:
        name: what the file is, for the sentences: ``"checkpoint"``.
        remedy: what to do about a file that is refused, for the sentences.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another kind.
    """
    path = Path(path)
    told = f"{name} {path}".strip()
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; pass the path that was given when saving")
    require_room(told, path.stat().st_size)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("metarobust_header", "{}"))
            # Copies: in the file tensors lie at odd addresses, where matrix products round otherwise than in memory of their own.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        got = f"one that cannot be read, damaged or of another kind ({_one_line(error)})"
        raise ValueError(message(told, "a safetensors file", got, remedy)) from error
    found = header.get("format") if isinstance(header, dict) else None
    if expected is not None and found != expected:
        came = "a safetensors file of another program" if found is None else f"a {shorten(repr(found), 100)} file"
        raise ValueError(message(told, f"a {expected!r} file", came, remedy))
    header = header if isinstance(header, dict) else {}
    checksum = header.pop("checksum", None)
    if checksum is not None and checksum != _checksum(tensors, header):
        raise ValueError(message(told, "whole", "content that does not fit its checksum", remedy))
    return tensors, header


def _checksum(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, and over the header."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(as_bytes(tensor))
    return found.hexdigest()


def _one_line(error: Exception) -> str:
    return shorten(str(error), 200)

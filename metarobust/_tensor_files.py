"""Tensors with a JSON header in one safetensors file: written whole or not at all, read without executing code."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metarobust._files import write_atomically


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Tensors and a JSON header into one safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"metarobust_header": json.dumps(header, sort_keys=True)}
    return write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def read_tensors(path: str | os.PathLike[str], *, expected: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file whose header names the ``expected`` format."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; pass the path that was given when saving")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("metarobust_header", "{}"))
            # Copies: in the file tensors lie at odd addresses, where matrix products round otherwise than in memory of their own.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} must be a safetensors file, got one that cannot be read ({error}); it is damaged or of another kind, "
            "save it again"
        ) from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != expected:
        came = "a safetensors file of another program" if found is None else f"a {found!r} file"
        raise ValueError(f"{path} must be a {expected!r} file, got {came}; pass a file that this library saved for this purpose")
    return tensors, header

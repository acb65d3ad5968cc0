"""The finished radii of a sweep as one file, so that a sweep that was killed goes on after the last of them."""

from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import message, require
from metarobust._files import check_writable
from metarobust._tensor_files import read_tensors, write_tensors
from metarobust.bounds._plan import Plan
from metarobust.bounds._proof import Proof

FORMAT = "metarobust risk curve 1"
REMEDY = "write another path, or delete the file to start again"
LONGEST = 100
"""Characters of a setting that a refusal quotes."""


def write_proofs(path: Path, settings: dict[str, Any], proofs: list[Proof]) -> None:
    """Write what is proved so far, atomically; the rounding of every number stays."""
    tensors: dict[str, Tensor] = {}
    for i, proof in enumerate(proofs):
        arrays = {"potential": proof.potential, "guarantee": proof.guarantee}
        for j, (sets, mass) in enumerate(zip(proof.plan.sets, proof.plan.mass, strict=True)):
            arrays |= {f"sets.{j}": sets, f"mass.{j}": mass}
        tensors |= {f"{i}.{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    told = [
        {"lower": p.lower, "upper": p.upper, "order": p.order, "sets": p.sets, "seconds": p.seconds, "warnings": p.warnings}
        for p in proofs
    ]
    write_tensors(path, tensors, {"format": FORMAT, "settings": settings, "proofs": told})


def read_proofs(path: Path, settings: dict[str, Any], points: int) -> list[Proof]:
    """What a sweep with the same settings has proved so far; nothing where there is no file.

    Raises:
        FileNotFoundError: not even the folder is there.
        ValueError: the file is damaged, or belongs to another sweep.
    """
    check_writable(path, "bounds.safetensors")
    if not path.exists():
        return []
    tensors, header = read_tensors(path, expected=FORMAT, name="checkpoint", remedy=REMEDY)
    found = header.get("settings")
    theirs = found if isinstance(found, dict) else {}
    differing = [name for name in settings if theirs.get(name) != settings[name]]
    shown = ", ".join(_difference(name, theirs.get(name), settings[name]) for name in differing)
    require(not differing, f"checkpoint {path}", "of this same sweep", shown, REMEDY)
    try:
        return [_proof(told, i, tensors, points) for i, told in enumerate(header["proofs"][: len(settings["epsilons"])])]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        got = f"parts that do not fit ({shorten(str(error), LONGEST)})"
        raise ValueError(message(f"checkpoint {path}", "whole", got, REMEDY)) from error


def _proof(told: dict[str, Any], i: int, tensors: dict[str, Tensor], points: int) -> Proof:
    def array(name: str) -> np.ndarray:
        return tensors[f"{i}.{name}"].clone().numpy()  # a copy: the file's memory is gone with the file

    groups = range(sum(name.startswith(f"{i}.sets.") for name in tensors))
    plan = Plan([array(f"sets.{j}") for j in groups], [array(f"mass.{j}") for j in groups])
    for sets, mass in zip(plan.sets, plan.mass, strict=True):
        inside = sets.ndim == 2 and len(sets) == len(mass) and (sets.size == 0 or 0 <= sets.min() <= sets.max() < points)
        require(inside, "sets", f"rows of {points} points", list(sets.shape))
    proof = Proof(
        lower=float(told["lower"]),
        upper=float(told["upper"]),
        order=int(told["order"]),
        sets={int(size): int(count) for size, count in told["sets"].items()},
        potential=array("potential"),
        guarantee=array("guarantee"),
        plan=plan,
        seconds={name: float(told["seconds"][name]) for name in ("solution", "witnesses")},
        warnings=[str(text) for text in told["warnings"]],
    )
    for values in (proof.potential, proof.guarantee):
        require(values.shape == (points,), "potentials", f"one for each of {points} points", list(values.shape))
    return proof


def _difference(name: str, theirs: Any, mine: Any) -> str:
    if name in ("data", "weights"):
        return f"other {name}"
    return f"{name} {shorten(str(theirs), LONGEST)} there and {shorten(str(mine), LONGEST)} here"

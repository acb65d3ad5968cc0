"""Checkpoints of a meta-training run: its whole state as tensors and numbers, so that a resumed run ends bit-identical."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torchopt import pytree

from metarobust._checks import message, require
from metarobust._processes import Processes, processes
from metarobust._tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from metarobust.meta_optimizers._meta_training import MetaTrainingRun

FORMAT = "metarobust meta-training run 3"
REMEDY = "use another path, or delete the file to start again"
LONGEST = 200
"""Characters of a setting or of a reason that a refusal quotes."""


def save_run(path: Path, run: "MetaTrainingRun") -> None:
    """Write the run's state, atomically."""
    tensors: dict[str, Tensor] = {
        "generator": run.generator.get_state(),
        "losses": torch.tensor(run.losses, dtype=torch.float64),
    }
    tensors |= {f"meta_optimizer.{name}": value for name, value in run.meta_optimizer.state_dict().items()}
    for i, p in enumerate(run.parameters):
        tensors |= {f"adam.{i}.{name}": value for name, value in run.adam.state.get(p, {}).items()}
    for i, slot in enumerate(run.slots):
        tensors[f"slot.{i}.generator"] = slot.generator.get_state()
        for j, leaf in enumerate(_leaves((slot.parameters, slot.state, slot.mirror, slot.noise))):
            tensors[f"slot.{i}.{j}"] = leaf.clone()
    header = {
        "format": FORMAT,
        "settings": _settings(run),
        "threat_models": run.threat_models,
        "slots": [
            {
                "task_seed": s.task_seed,
                "age": s.age,
                "horizon": s.horizon,
                "total_steps": s.total_steps,
                "mirrored": s.mirror is not None,
            }
            for s in run.slots
        ],
    }
    write_tensors(path, tensors, header)


def load_run(path: Path, run: "MetaTrainingRun") -> None:
    """Put a fresh run into the state that ``path`` holds.

    Raises:
        ValueError: the file is damaged, or belongs to a run with other settings.
    """
    tensors, header = read_tensors(path, expected=FORMAT, name="checkpoint", remedy=REMEDY)
    require_same_settings(path, _settings(run), header.get("settings"))
    with only_sentences(path):
        _restore(run, tensors, header)


def _restore(run: "MetaTrainingRun", tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    run.generator.set_state(tensors["generator"])
    run.losses[:] = tensors["losses"].tolist()
    run.meta_optimizer.load_state_dict({name: tensors[f"meta_optimizer.{name}"] for name in run.meta_optimizer.state_dict()})
    for i, p in enumerate(run.parameters):
        prefix = f"adam.{i}."
        found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if found:
            run.adam.state[p] = cast("Any", found)
    require(len(header["slots"]) == len(run.slots), "slots", f"{len(run.slots)}", len(header["slots"]))
    for i, saved in enumerate(header["slots"]):
        slot = run.slot_from_seed(saved["task_seed"], saved["horizon"], saved["total_steps"])
        slot.age = saved["age"]
        slot.generator.set_state(tensors[f"slot.{i}.generator"])
        mirror, noise = ((slot.parameters, slot.state), tuple(run.parameters)) if saved["mirrored"] else (None, None)
        leaves, structure = pytree.tree_flatten(cast("Any", (slot.parameters, slot.state, mirror, noise)))
        if f"slot.{i}.{len(leaves)}" in tensors or f"slot.{i}.{len(leaves) - 1}" not in tensors:
            raise ValueError("tensors of other tasks")
        restored = [tensors[f"slot.{i}.{j}"] for j in range(len(leaves))]
        found = cast("Any", pytree.tree_unflatten(structure, restored))
        slot.parameters, slot.state, slot.mirror, slot.noise = found
        run.slots[i] = slot
    run.threat_models = header["threat_models"]


def require_same_settings(path: Path, mine: dict[str, Any], theirs: Any) -> None:
    """Refuse the checkpoint of a run with other settings, telling which."""
    theirs = theirs if isinstance(theirs, dict) else {}
    differing = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    shown = ", ".join(shorten(f"{k}={theirs.get(k)!r} there and {mine.get(k)!r} here", LONGEST) for k in differing)
    remedy = "use the same settings or another path"
    require(not differing, f"checkpoint {path}", "of a run with the same settings", shown, remedy)


def require_same_progress(checkpoint: str | PathLike[str] | None, done: int) -> None:
    """Refuse to go on where the processes stand at different places: each has a file of its own, and one may be missing."""
    counts = Processes.current().gather(done)
    remedy = "bring back the files that are missing or behind, or delete all of them to start again"
    told = ", ".join(f"{count} on rank {rank}" for rank, count in enumerate(counts))
    require(len(set(counts)) == 1, f"checkpoint {checkpoint}", "as far on in every process", told, remedy)


@contextmanager
def only_sentences(path: Path) -> Iterator[None]:
    """Whatever fails while a checkpoint is put into place becomes one sentence."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        got = f"parts that do not fit ({shorten(str(error), LONGEST)})"
        raise ValueError(message(f"checkpoint {path}", "whole", got, REMEDY)) from error


def _leaves(tree: Any) -> list[Tensor]:
    return cast("list[Tensor]", pytree.tree_leaves(tree))


def _settings(run: "MetaTrainingRun") -> dict[str, Any]:
    return (
        asdict(run.settings)
        | {"processes": processes()}
        | {f"meta_optimizer.{k}": v for k, v in run.meta_optimizer.settings.items()}
    )

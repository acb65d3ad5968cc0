"""The files of one training, and what those that are there already mean for the command that is about to run."""

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarobust import __version__
from metarobust._files import json_text, read_json, write_atomically
from metarobust.command_line._train_axes import WITHOUT_STEPS

if TYPE_CHECKING:
    from metarobust.command_line._train import Train

FORMAT = "metarobust train 1"
PLACES = ("out", "root", "download", "device")
"""Flags that say where the work is done: they may differ when a command is repeated."""


@dataclass(frozen=True)
class ResultFiles:
    """NAME.safetensors, which ``--out`` names, and the files beside it."""

    best: Path

    @property
    def last(self) -> Path:
        """The last parameters."""
        return self.best.with_stem(self.best.stem + "-last")

    @property
    def record(self) -> Path:
        """Settings, history and versions; of a run that is not finished, the settings."""
        return self.best.with_suffix(".json")

    @property
    def figure(self) -> Path:
        """Loss and validation accuracies."""
        return self.best.with_suffix(".png")

    @property
    def network(self) -> Path:
        """The function that builds the network, if that is one of this package."""
        return self.best.with_suffix(".py")

    def checkpoint(self, stage: int, warm_up: int) -> Path:
        """The state of a stage; the warm-up epochs are stages from 0, the training proper follows them."""
        return self.best.with_suffix(".checkpoint" if stage == warm_up else f".warm-up-{stage + 1}.checkpoint")

    def checkpoints(self, warm_up: int) -> list[Path]:
        """Those that exist, in the order of the stages."""
        paths = (self.checkpoint(stage, warm_up) for stage in range(warm_up + 1))
        return [path for path in paths if path.exists()]

    def stage_to_begin(self, flags: "Train", source: str | None) -> int:
        """0, or the stage in which an interrupted run of the same command stands.

        Raises:
            ValueError: what is there belongs to a finished training, to another command, or to somebody else.
        """
        record, mine = self.read_record(), settings_of(flags)
        theirs: dict[str, Any] = {} if record is None else record["settings"]
        warm_up = theirs.get("warm_up", flags.warm_up)
        kept = self.checkpoints(warm_up)
        differing = [name for name in mine if name not in theirs or theirs[name] != mine[name]]
        if record is not None and record["finished"]:
            if not differing:
                for path in kept:  # all but this was done when the run was killed
                    path.unlink()
                raise ValueError(
                    f"this training is finished and its files are there; to train again pass another --out, and to judge "
                    f"{self.best}: {record.get('evaluate')}"
                )
            remedy = f"pass another --out, or delete {self.best}, {self.record} and the files beside them"
            self._refuse(f"those of a finished training with {_told(differing, theirs, mine)}", remedy)
        if record is not None and kept and differing:
            remedy = f"repeat its command to go on, pass another --out, or delete {kept[-1]} to start again"
            self._refuse(f"those of an interrupted training with {_told(differing, theirs, mine)}", remedy)
        results = [] if record is not None and kept else [self.best, self.last, self.figure]
        results += [self.record, *kept] if record is None else []
        strangers = [path for path in results if path.exists()]
        if source is not None and self.network.exists() and self.network.read_text() != source:
            strangers.append(self.network)
        if strangers:
            self._refuse(" and ".join(map(str, strangers)), "pass another --out, or move what is there")
        return max((stage for stage in range(warm_up + 1) if self.checkpoint(stage, warm_up).exists()), default=0)

    def _refuse(self, got: str, remedy: str) -> None:
        raise ValueError(f"--out must be a name whose files are not there yet, got {self.best} and {got}; {remedy}")

    def read_record(self) -> dict[str, Any] | None:
        """The record, if there is one that this command wrote."""
        try:
            found = read_json(self.record)
        except (OSError, ValueError):
            return None
        return found if is_record(found, FORMAT) and isinstance(found["settings"].get("warm_up"), int) else None

    def write_record(self, flags: "Train", *, finished: bool, **more: Any) -> None:
        """Settings, versions, and whatever else is known."""
        import torch

        versions = {"metarobust": __version__, "torch": torch.__version__, "python": platform.python_version()}
        content = {"format": FORMAT, "finished": finished, "settings": settings_of(flags), **more, "versions": versions}
        write_atomically(self.record, lambda path: path.write_text(json_text(content)))


def settings_of(flags: "Train") -> dict[str, Any]:
    """Every flag that the result depends on, with the number of steps that the attack takes."""
    steps = None if flags.transport in WITHOUT_STEPS else flags.attack_steps
    return {name: value for name, value in asdict(flags).items() if name not in PLACES} | {"steps": steps}


def is_record(content: Any, expected: str) -> bool:
    """Whether a JSON file holds the record of a command, with what tells whether it is this one and how far it is."""
    whole = isinstance(content, dict) and content.get("format") == expected and isinstance(content.get("settings"), dict)
    return whole and isinstance(content.get("finished"), bool)


def _told(names: list[str], theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """Settings that differ, in words."""

    def word(value: Any) -> str:
        return "left out" if value is None else str(value)

    return ", ".join(f"--{name.replace('_', '-')} {word(theirs.get(name))} there and {word(mine[name])} here" for name in names)

"""Every measurement that the page of evidence rests on: the command, what it writes, how long it takes, what it needs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import write

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One command of the repository.

    Attributes:
        command: arguments of Python; ``{out}`` is the folder, ``{data}`` METAROBUST_DATA, ``{models}`` the folder of classifiers.
        writes: pattern of the files that tell it has been run, in the folder.
        minutes: of one core, about.
        printed: the command writes no file of its own; keep what it prints, in the file that ``writes`` names.
    """

    command: str
    writes: str
    minutes: int
    printed: bool = False

    @property
    def shown(self) -> str:
        """The command as a reader types it."""
        told = re.sub(r" --out \S+", "", self.command).replace("{data}", "ROOT").replace("{models}", "FOLDER")
        before = "METAROBUST_DATA=ROOT " if self.needs_data and "{data}" not in self.command else ""
        return f"{before}uv run {'--group peers ' if 'attacks_vs_peers' in told else ''}python {told}"

    @property
    def needs_data(self) -> bool:
        """Whether it reads images that do not come with the package."""
        return any(word in self.command for word in ("{data}", "transfer", "fairness", "attacks_vs_peers"))


def _timed(name: str, minutes: int, flags: str = "", writes: str = "") -> Measurement:
    return Measurement(command=f"-m benchmarks.{name}{flags} --out {{out}}", writes=writes or f"{name}.json", minutes=minutes)


def _peers(part: str, minutes: int) -> Measurement:
    # The fourth network was trained without attacks and falls to every one of them, which takes hours and compares nothing.
    flags = f" --models {{models}} --parts {part} --names mnist-trades mnist-provable cifar10-resnet2b"
    return _timed("attacks_vs_peers", minutes, flags, f"attacks_vs_peers_{part}_*.json")


CATALOGUE: dict[str, Measurement] = {
    "transfer": _timed("transfer", 600, " --targets digits mnist fashion-mnist cifar10", "transfer.jsonl"),
    "combinations": _timed("combinations", 20, " --seeds 3"),
    "objectives": Measurement(
        command="-m benchmarks.objectives --cifar10 {data}/cifar10-exact-subset --out {out}/objectives",
        writes="objectives/cpu-*.json",
        minutes=900,
    ),
    "fairness": Measurement(
        command="-m benchmarks.fairness --data digits fashion-mnist --out {out}/fairness", writes="fairness*", minutes=600
    ),
    "binary features": Measurement(
        command="examples/birrell2023_armor.py", writes="birrell2023_armor.json", minutes=6, printed=True
    ),
    "bounds": _timed("bounds", 4, " --data {data}"),
    "attacks, standing": _peers("autoattack", 40),
    "attacks, equal passes": _peers("quality", 40),
    "attacks, cost": _peers("speed", 30),
    "meta-step": _timed("meta_step", 4),
    "factor gradients": _timed("factor_cost", 4, " --rounds 7"),
    "factor gradients, memory kept": _timed("factor_cost", 4, " --rounds 7 --keep-memory", "factor_cost_keep_memory.json"),
    "optimizer step": _timed("optimizer_step", 1),
    "optimizer step, GPU": _timed("optimizer_step", 1, " --device cuda", "optimizer_step_cuda.json"),
    "dual": _timed("dro", 2, " --rounds 7 --threads 1"),
    "training step": _timed("training_step", 5, " --rounds 7 --threads 1"),
    "learned weights": _timed("meta_weighting", 8, " --threads 1"),
    "hypergradient": _timed("hypergradient", 2, " --threads 1"),
    "hypergradient, l_inf": _timed("hypergradient", 2, " --threads 1 --part linf", "hypergradient_linf.json"),
    "hypergradient, l2": _timed("hypergradient", 5, " --threads 1 --part l2", "hypergradient_l2.json"),
}


class Measured:
    """What lies in a folder of measurements."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def files(self, name: str) -> list[Path]:
        """Files of one measurement, none if it has not been run."""
        return sorted(self.folder.glob(CATALOGUE[name].writes))

    def contents(self, name: str) -> list[dict[str, Any]]:
        """JSON contents of its files, and of the lines of its .jsonl files."""
        found: list[dict[str, Any]] = []
        for path in self.files(name):
            if path.is_dir():
                found += [json.loads(each.read_text()) for each in sorted(path.glob("*.json"))]
            elif path.suffix == ".jsonl":
                found += [json.loads(line) for line in path.read_text().splitlines()]
            else:
                found.append(json.loads(path.read_text()))
        return found

    @cached_property
    def fairness(self) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
        """Runs under long tails and label noise, by data set, scenario and method."""
        found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for content in self.contents("fairness"):
            run = content["run"]
            found.setdefault((run["data"], run["scenario"], run["method"]), []).append(content)
        return found

    def conditions(self, name: str) -> str:
        """Hardware and versions that its files tell, with a ``remark`` that was added by hand, such as on a shared machine."""
        environments = [content["environment"] for content in self.contents(name) if "environment" in content]
        if not environments:
            return "hardware not recorded in the file"
        told = []
        for e in environments:
            place = e["gpu"] or f"{e['cpu'].replace('(R)', '')}, {e['threads']} thread{'s' if e['threads'] > 1 else ''}"
            line = f"{place}, Python {e['python']}, torch {e['torch']}, torchopt {e['torchopt']}{e.get('remark', '')}"
            if line not in told:
                told.append(line)
        return "; ".join(told)


def measure(name: str, out: Path, models: str | None) -> str | None:
    """Run one measurement; None, or why it was left out."""
    measurement, data = CATALOGUE[name], os.environ.get("METAROBUST_DATA")
    if measurement.needs_data and not data:
        return "it needs images that do not come along; set METAROBUST_DATA to a torchvision root"
    if "--device cuda" in measurement.command and not torch.cuda.is_available():
        return "it needs a CUDA device"
    if "{models}" in measurement.command and not models:
        return "it needs trained classifiers; name their folder with --models (benchmarks/_classifiers.py lists the files)"
    out.mkdir(parents=True, exist_ok=True)
    places = {"out": str(out.resolve()), "data": data or "", "models": str(Path(models or "").resolve())}
    command = [sys.executable, *(word.format(**places) for word in measurement.command.split())]
    if not measurement.printed:
        code = subprocess.run(command, cwd=ROOT).returncode
    else:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        code = done.returncode
        print(done.stdout, end="")
        if code == 0:
            write(Path(measurement.writes).stem, {"printed": done.stdout}, str(out))
    return f"it ended with exit code {code}" if code else None

"""The state of a training run as one file, so that a run that was killed ends with the parameters of one that was not."""

import hashlib
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import shorten
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from metarobust import __version__
from metarobust._checks import message, require
from metarobust._tensor_files import read_tensors, write_tensors
from metarobust._tensors import digest
from metarobust.evaluation._resume import without_addresses
from metarobust.meta_optimizers import LearnedOptimizer
from metarobust.training._result import EpochRecord
from metarobust.training._run import Plan, TrainingRun, cpu_state

FORMAT = "metarobust training run 1"
REMEDY = "write another path, or delete the file to start again"
NAMELESS = ("data", "validation", "model", "schedule")
"""Settings that are kept as digests, which tell a reader nothing."""
LONGEST = 100
"""Characters of a setting that a refusal quotes."""


def fingerprint(plan: Plan, factors: tuple[float, ...]) -> dict[str, Any]:
    """Everything that determines the result, besides the initial parameters, as plain data."""

    def told(x: Tensor, y: Tensor) -> str:
        return f"{list(x.shape)} {x.dtype} {digest(x)} {digest(y)}"

    shapes = [f"{name} {list(value.shape)} {value.dtype}" for name, value in plan.model.state_dict().items()]
    settings: dict[str, Any] = {
        "model": _short_digest(without_addresses(repr(plan.model)) + str(shapes)),
        "objective": _told_function(plan.objective),
        "data": told(plan.x, plan.y),
        "validation": None if plan.validation is None else told(*plan.validation),
        "validation_attack": without_addresses(repr(plan.validation_attack)),
        "optimizer": type(plan.optimizer).__name__,
        "schedule": _short_digest(str(factors)),
        "augment": _told_function(plan.augment),
        "processes": plan.processes.count,
        "metarobust": __version__,
    }
    if isinstance(plan.optimizer, LearnedOptimizer):
        rule = plan.optimizer.meta_optimizer
        values = " ".join(f"{name} {digest(value)}" for name, value in rule.state_dict().items())
        settings["optimizer.rule"] = _short_digest(f"{rule.settings} {values}")
        settings["optimizer.threat_model"] = repr(plan.optimizer.threat_model)
    settings |= {name: getattr(plan, name) for name in ("epochs", "batch_size", "clip_norm", "amp", "seed")}
    for i, group in enumerate(plan.optimizer.param_groups):
        place = "optimizer" if i == 0 else f"optimizer.{i}"
        settings[f"{place}.params"] = len(group["params"])
        settings |= {f"{place}.{name}": repr(value) for name, value in sorted(group.items()) if name != "params"}
    return settings


class Checkpoint:
    """One safetensors file with a JSON header; loading it never executes code.

    Args:
        path: the file; its folder must exist.
        settings: the :func:`fingerprint`.
        seconds: least time between two files within an epoch; it grows to ten times what writing takes.
        writes: whether this process writes it.
    """

    def __init__(self, path: Path, settings: dict[str, Any], seconds: float, *, writes: bool) -> None:
        self.path, self.settings, self.writes = path, settings, writes
        # The first step is always written: what cannot be written fails now and not after the first hour.
        self._seconds, self._wait, self._written = seconds, 0.0, -float("inf")

    def save(self, run: TrainingRun) -> None:
        """Write the state, atomically."""
        if not self.writes:
            return
        begin = time.perf_counter()
        tensors = {f"model.{name}": value for name, value in cpu_state(run.plan.model).items()}
        tensors |= {f"best.{name}": value for name, value in (run.best or {}).items()}
        numbers: dict[str, Any] = {}
        at_home: list[str] = []
        for i, p in enumerate(run.parameters):
            for name, value in run.plan.optimizer.state.get(p, {}).items():
                key = f"{i}.{name}"
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}"] = value
                    if value.device == p.device:  # Adam counts its steps on the CPU, wherever the parameter lives
                        at_home.append(key)
                elif value is None or isinstance(value, (bool, int, float)):
                    numbers[key] = value
                else:
                    expected, got = "one whose state holds tensors and numbers only", f"a {type(value).__name__} under {name!r}"
                    raise TypeError(message("optimizer", expected, got, "train without checkpoint, or with another optimizer"))
        if run.stateful is not None:
            for name, value in run.stateful.state_dict().items():
                if not isinstance(value, Tensor):
                    expected, got = "one whose state_dict holds tensors only", f"a {type(value).__name__} under {name!r}"
                    raise TypeError(message("objective", expected, got, "train without checkpoint"))
                tensors[f"objective.{name}"] = value
        header = {
            "format": FORMAT,
            "settings": self.settings,
            "optimizer": {"numbers": numbers, "at_home": at_home},
            "scaler": run.scaler.state_dict(),
            "history": [asdict(record) for record in run.history],
            "best_epoch": run.best_epoch,
            "step": run.step,
            "loss_sum": run.loss_sum,
            "diagnostics": run.diagnostics,
            "seconds": run.elapsed(),
        }
        write_tensors(self.path, tensors, header)
        self._written = time.perf_counter()
        self._wait = max(self._seconds, 10 * (self._written - begin))

    def save_sometimes(self, run: TrainingRun) -> None:
        """Write the state if the last time is long enough ago."""
        if time.perf_counter() - self._written >= self._wait:
            self.save(run)

    def load(self, run: TrainingRun) -> None:
        """Put a fresh run into the state that the file holds, if there is a file.

        Raises:
            ValueError: the file is damaged, or belongs to a run with other settings.
        """
        if not self.path.exists():
            return
        tensors, header = read_tensors(self.path, expected=FORMAT, name="checkpoint", remedy=REMEDY)
        found = header.get("settings")
        theirs = found if isinstance(found, dict) else {}
        differing = sorted(k for k in self.settings.keys() | theirs.keys() if theirs.get(k) != self.settings.get(k))
        shown = ", ".join(difference(name, theirs.get(name), self.settings.get(name)) for name in differing)
        require(not differing, f"checkpoint {self.path}", "of this same training run", shown, REMEDY)
        try:
            self._restore(run, tensors, header)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = shorten(str(error), LONGEST)
            raise ValueError(message(f"checkpoint {self.path}", "whole", f"parts that do not fit ({reason})", REMEDY)) from error

    def _restore(self, run: TrainingRun, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        plan = run.plan
        names = plan.model.state_dict().keys()
        state: dict[torch.nn.Parameter, dict[str, Any]] = {p: {} for p in run.parameters}
        at_home = set(header["optimizer"]["at_home"])
        for key, value in header["optimizer"]["numbers"].items():
            i, _, name = key.partition(".")
            state[run.parameters[int(i)]][name] = value
        for key, value in tensors.items():
            kind, _, key = key.partition(".")
            if kind == "optimizer":
                i, _, name = key.partition(".")
                p = run.parameters[int(i)]
                # A copy: what safetensors returns may lie at an address that other sums are taken from than before.
                state[p][name] = value.clone().to(p.device if key in at_home else value.device)
        history = [EpochRecord(**record) for record in header["history"]]
        counted = (header["step"], header["best_epoch"] or 0, [record.epoch for record in history])
        within = 0 <= counted[0] <= plan.steps and 0 <= counted[1] <= len(history) <= plan.epochs
        require(within and counted[2] == list(range(1, len(history) + 1)), "its progress", "within the run", counted)
        numbers = all(isinstance(header[name], (int, float)) for name in ("loss_sum", "seconds"))
        require(numbers and isinstance(header["diagnostics"], dict), "its sums", "numbers", "something else")
        best = None if header["best_epoch"] is None else {name: tensors[f"best.{name}"].clone() for name in names}
        plan.model.load_state_dict({name: tensors[f"model.{name}"] for name in names})
        if run.stateful is not None:
            ours = run.stateful.state_dict()
            told = {k.removeprefix("objective."): v.clone() for k, v in tensors.items() if k.startswith("objective.")}
            places = {name: value.device for name, value in ours.items()}
            run.stateful.load_state_dict({name: value.to(places.get(name, value.device)) for name, value in told.items()})
        # Not load_state_dict of the optimizer: it casts the state to the dtype of the parameters.
        plan.optimizer.state.clear()
        plan.optimizer.state.update({p: entries for p, entries in state.items() if entries})
        run.scaler.load_state_dict(header["scaler"])
        run.history, run.best, run.best_epoch = history, best, header["best_epoch"]
        run.step, run.loss_sum, run.diagnostics = header["step"], header["loss_sum"], header["diagnostics"]
        run.seconds, run.begin = header["seconds"], time.perf_counter()


def difference(name: str, theirs: Any, mine: Any) -> str:
    """Two values of one setting in words."""
    if name in NAMELESS:
        return f"another {name}" if name != "data" else "other data"
    there, here = str(theirs), str(mine)
    if max(len(there), len(here)) > LONGEST:  # then only the parts that the other does not have
        parts = there.split(", "), here.split(", ")
        there, here = (", ".join(p for p in own if p not in other) for own, other in (parts, parts[::-1]))
    return f"{name} {shorten(there, LONGEST) or 'less'} there and {shorten(here, LONGEST) or 'less'} here"


def _told_function(function: Any) -> str:
    """The repr of a configuration; for a plain function also a digest of its code, constants and closure."""
    told = without_addresses(repr(function))
    return told if getattr(function, "__code__", None) is None else f"{told} {_short_digest(_told_part(function))}"


def _told_part(part: Any, around: tuple[Any, ...] = ()) -> str:
    """A part of a function in words that are the same in every process: no addresses, places in files, or order of a set."""
    if any(part is outer for outer in around):  # a function that calls itself
        return "itself"
    told = partial(_told_part, around=(*around, part))
    code = getattr(part, "__code__", None)
    if code is not None:
        closure = [cell.cell_contents for cell in part.__closure__ or ()]
        return told((code, part.__defaults__, part.__kwdefaults__, closure))
    if isinstance(part, CodeType):
        return part.co_code.hex() + told((part.co_names, part.co_consts))
    if isinstance(part, (tuple, list)):
        return f"{type(part).__name__}({', '.join(map(told, part))})"
    if isinstance(part, (set, frozenset)):
        return f"{type(part).__name__}({', '.join(sorted(map(told, part)))})"
    return without_addresses(repr(part))


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

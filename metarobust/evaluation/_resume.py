"""The course of an evaluation as a value on disk, so that an interrupted run ends as an uninterrupted one does."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from metarobust import __version__
from metarobust._checks import require
from metarobust._tensor_files import read_tensors, write_tensors
from metarobust._tensors import digest
from metarobust.evaluation._state import BROKEN, EvaluationState
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack

FORMAT = "metarobust evaluation 1"
REMEDY = "write another path, or delete the file to start again"
LONGEST = 100
"""Characters of an attack that a refusal quotes."""


def without_addresses(text: str) -> str:
    """A repr without the addresses of functions and objects, which change from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def fingerprint(
    x: Tensor, y: Tensor, *, threat_model: ThreatModel, attacks: Mapping[str, Attack], **settings: Any
) -> dict[str, Any]:
    """Everything but the model that determines the result, as plain data."""
    return {
        "data": f"{list(x.shape)} {x.dtype} {digest(x)} {digest(y)}",
        "threat_model": repr(threat_model),
        "attacks": [f"{name}: {without_addresses(repr(attack))}" for name, attack in attacks.items()],
        "metarobust": __version__,
        **settings,
    }


class Checkpoint:
    """One file that holds the state of one evaluation: safetensors with a JSON header; loading never executes code.

    Args:
        path: the file; its folder must exist.
        settings: the :func:`fingerprint`.
        logits: of the model on the first clean examples. A model is the same if it gives these up to rounding, which depends
            on threads and devices; a hash would refuse a run that goes on with another number of threads.
        rounding: how far they may lie apart, as a fraction of the largest.
    """

    def __init__(self, path: Path, settings: dict[str, Any], logits: Tensor, rounding: float) -> None:
        self.path, self.settings, self.logits, self.rounding = path, settings, logits, rounding
        self._wait, self._written = 0.0, -float("inf")

    def load(self, state: EvaluationState) -> Tensor:
        """Put the file's content into a fresh state, if there is a file; returns the rows whose example was read.

        Raises:
            ValueError: the file is damaged, or belongs to an evaluation of something else.
        """
        if not self.path.exists():
            return torch.empty(0, dtype=torch.int64)
        tensors, header = read_tensors(self.path, expected=FORMAT, name="checkpoint", remedy=REMEDY)
        self._require_same(header.get("settings"), tensors.get("logits"))
        fits = _fits(tensors, state) and _are_seconds(header.get("seconds"))
        require(fits, f"checkpoint {self.path}", "whole", "parts that do not fit together", REMEDY)
        rows = tensors["rows"]
        state.outcomes = tensors["outcomes"]
        state.adversarial[rows] = tensors["adversarial"]
        state.predictions[rows] = tensors["predictions"]
        state.seconds = dict(header["seconds"])
        return rows

    def save(self, state: EvaluationState) -> None:
        """Write the state, atomically."""
        begin = time.perf_counter()
        rows = (state.outcomes == BROKEN).any(0).nonzero().squeeze(1)
        tensors = {
            "outcomes": state.outcomes,
            "rows": rows,
            "adversarial": state.adversarial[rows],
            "predictions": state.predictions[rows],
            "logits": self.logits,
        }
        write_tensors(self.path, tensors, {"format": FORMAT, "settings": self.settings, "seconds": state.seconds})
        self._written = time.perf_counter()
        self._wait = max(2.0, 10 * (self._written - begin))

    def save_sometimes(self, state: EvaluationState) -> None:
        """Write the state if the last time is two seconds ago, or ten times as long as writing takes."""
        if time.perf_counter() - self._written >= self._wait:
            self.save(state)

    def _require_same(self, theirs: Any, logits: Tensor | None) -> None:
        theirs = theirs if isinstance(theirs, dict) else {}
        differing = [name for name in self.settings if theirs.get(name) != self.settings[name]]
        told = [name for name in differing if not (name == "attacks" and self._same_attacks(theirs))]
        shown = [_difference(name, theirs.get(name), self.settings[name]) for name in told]
        if not differing and (logits is None or not self._same_model(logits)):
            shown = ["other logits on the clean data, from another model or one with random output"]
        remedy = REMEDY
        if differing == ["data"]:
            remedy += "; a DataLoader that shuffles gives other data each time: write shuffle=False"
        require(not shown, f"checkpoint {self.path}", "of this same evaluation", ", ".join(shown), remedy)

    def _same_attacks(self, theirs: dict[str, Any]) -> bool:
        """Whether attacks of the same names stand beside another threat model, which says it all."""
        mine, others = self.settings["attacks"], theirs.get("attacks")
        return theirs.get("threat_model") != self.settings["threat_model"] and _names(others) == _names(mine)

    def _same_model(self, logits: Tensor) -> bool:
        if logits.shape != self.logits.shape:
            return False
        return bool((logits - self.logits).abs().amax() <= self.rounding * self.logits.abs().amax())


def _difference(name: str, theirs: Any, mine: Any) -> str:
    if name == "data":
        return "other data"
    if name == "attacks" and _names(theirs) != _names(mine):
        return f"{name} {', '.join(_names(theirs)) or 'none'} there and {', '.join(_names(mine))} here"
    if name == "attacks":  # the first that differs, and of a long one only the arguments that do
        theirs, mine = next(pair for pair in zip(theirs, mine, strict=True) if pair[0] != pair[1])
        if max(len(theirs), len(mine)) > LONGEST:
            name, parts = f"{name} {theirs.partition(': ')[0]}:", (theirs.split(", "), mine.split(", "))
            theirs, mine = (", ".join(p.rstrip(")") for p in own if p not in other) for own, other in (parts, parts[::-1]))
            theirs, mine = (shorten(text, LONGEST) or "less" for text in (theirs, mine))
    return f"{name} {theirs} there and {mine} here"


def _names(attacks: Any) -> list[str]:
    return [str(entry).partition(": ")[0] for entry in attacks] if isinstance(attacks, list) else []


def _fits(tensors: dict[str, Tensor], state: EvaluationState) -> bool:
    if not {"outcomes", "rows", "adversarial", "predictions"} <= tensors.keys():
        return False
    rows, outcomes = tensors["rows"], tensors["outcomes"]
    return (
        outcomes.dtype == torch.uint8
        and outcomes.shape == state.outcomes.shape
        and bool((outcomes <= BROKEN).all())
        and torch.equal(rows, (outcomes == BROKEN).any(0).nonzero().squeeze(1))
        and tensors["adversarial"].shape == (len(rows), *state.adversarial.shape[1:])
        and tensors["adversarial"].dtype == state.adversarial.dtype
        and tensors["predictions"].shape == rows.shape
        and tensors["predictions"].dtype == torch.int64
    )


def _are_seconds(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, (int, float)) for each in value.values())

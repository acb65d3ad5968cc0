"""Learning a few numbers of an update rule by whole training runs, without any derivative."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarobust import __version__
from metarobust._checks import choice, finite, integer, message, pair, require
from metarobust._files import check_writable
from metarobust._processes import like_rank_0, processes, rank, summed
from metarobust._progress import progress_bar
from metarobust._randomness import torch_seed
from metarobust._tensor_files import read_tensors, write_tensors
from metarobust._tensors import digest
from metarobust.meta_optimizers._calibration import train_optimizees
from metarobust.meta_optimizers._interpretable import InterpretableOptimizer
from metarobust.meta_optimizers._kinds import check_source
from metarobust.meta_optimizers._resume import REMEDY, only_sentences, require_same_progress, require_same_settings
from metarobust.meta_optimizers._tasks import ClassificationTask
from metarobust.meta_optimizers._training_record import widened
from metarobust.meta_optimizers._transformation import reading_streams

SampleTasks = Callable[[torch.Generator], Sequence[ClassificationTask]]
FORMAT = "metarobust meta-search 1"
KEPT = 0.3
"""Share of the old mean and spread that a generation keeps."""
LEAST_SPREAD = 0.03
"""Each generation adds this share of the first spread, so that the search never stands still."""


@dataclass(frozen=True, kw_only=True)
class MetaSearchSettings:
    """What determines a search, besides the tasks and the directions; stored in its record and its checkpoint.

    Args:
        generations, population, elite, total_steps, clean_weight, final_draws, seed: as in `meta_search`.
    """

    generations: int
    population: int
    elite: int
    total_steps: tuple[int, int]
    clean_weight: float
    final_draws: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("generations", "population", "elite"):
            integer(name, getattr(self, name), least=1)
        require(self.elite < self.population, "elite", f"below population (={self.population})", self.elite)
        pair("total_steps", self.total_steps, "(150, 450)")
        for steps in self.total_steps:
            integer("total_steps", steps, least=1)
        low, high = self.total_steps
        require(high >= low, "total_steps", "a pair (least, most)", self.total_steps)
        finite("clean_weight", self.clean_weight, least=0.0)
        integer("final_draws", self.final_draws, least=0)
        integer("seed", self.seed, least=0)


class Generation(NamedTuple):
    """What one generation of `meta_search` found.

    Attributes:
        best: score of the best setting.
        mean: score of the present mean of the search.
        median: the middle score of the generation.
        knobs: the mean after it, by name.
    """

    best: float
    mean: float
    median: float
    knobs: dict[str, float]


def meta_search(
    meta_optimizer: InterpretableOptimizer,
    sample_tasks: SampleTasks,
    *,
    knobs: Mapping[str, float] | None = None,
    generations: int = 10,
    population: int = 16,
    elite: int = 5,
    total_steps: tuple[int, int] = (150, 450),
    clean_weight: float = 0.5,
    final_draws: int = 3,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    silent: bool = False,
    on_generation: Callable[[int, Generation], object] | None = None,
) -> list[Generation]:
    """Move a meta-optimizer along a few named directions to where whole training runs end best (cross-entropy method).

    Truncated back-propagation judges a rule by what it does within a window; this judges by where a run ends. Each generation
    draws tasks and, from a normal distribution per knob, ``population - 1`` settings beside the present mean; trains every task
    with every setting, all under the same randomness; and moves mean and spread towards those of the ``elite`` settings whose
    score (robust accuracy plus ``clean_weight`` times clean accuracy, on judging examples, mean over tasks) is highest
    (Rubinstein, 1999). The optimizer ends at the mean, which no single lucky score decides, if that is better than its start on
    tasks that the search has not seen; else it stays where it was. Both scores are in its record.

    Several processes. Where ``torch.distributed`` is initialised, each process calls this with the same arguments; they share
    the settings of a generation and end with the same numbers. Rank 0 writes the checkpoint.

    Args:
        meta_optimizer: moved in place, from where it is.
        sample_tasks: gives the tasks of a generation, a pure function of the generator it is handed
            (``TaskDistribution.one_of_each``).
        knobs: names of ``InterpretableOptimizer.knobs()`` and the spread to begin with; default: all, with their own.
        generations: rounds of the search.
        population: settings per round.
        elite: settings that the next round is drawn around.
        total_steps: least and most optimizee steps of a task, drawn log-uniformly.
        clean_weight: what a point of clean accuracy counts beside a point of robust accuracy.
        final_draws: how often tasks are drawn to compare the end with the start; 0 to take the end unseen.
        seed: of all randomness here.
        checkpoint: file that mean and spread go to after each generation, atomically; when it exists, the search goes on from
            it and ends with the same numbers as without a stop.
        silent: no progress bar; there is none either when standard error is no terminal.
        on_generation: called with (generation, what it found) after each generation.

    Raises:
        ValueError: an unknown knob, a setting out of range, or the checkpoint belongs to a search with other settings.
    """
    settings = MetaSearchSettings(
        generations=generations,
        population=population,
        elite=elite,
        total_steps=total_steps,
        clean_weight=clean_weight,
        final_draws=final_draws,
        seed=seed,
    )
    if not isinstance(meta_optimizer, InterpretableOptimizer):
        raise TypeError(message("meta_optimizer", "an InterpretableOptimizer", type(meta_optimizer).__name__))
    if checkpoint is not None:
        check_writable(Path(checkpoint), "meta_search.safetensors")
    available = meta_optimizer.knobs()
    spreads = {name: spread for name, (spread, _) in available.items()} if knobs is None else dict(knobs)
    for name, spread in spreads.items():
        choice("knobs", name, tuple(available))
        finite(name, spread, above=0.0)
    start = {name: p.detach().clone() for name, p in meta_optimizer.named_parameters()}
    first = torch.tensor(list(spreads.values()), dtype=torch.float64)
    mean, spread, history = torch.zeros_like(first), first.clone(), list[Generation]()
    threat_models: dict[str, Any] | None = None
    path = None if checkpoint is None else Path(checkpoint)
    identity = asdict(settings) | {"knobs": spreads, "order": list(spreads), "optimizer": meta_optimizer.settings}
    identity["start"] = digest(*start.values())
    if path is not None and path.exists():
        mean, spread, history, threat_models = _resumed(path, identity)
    require_same_progress(checkpoint, len(history))

    def move(by: Tensor) -> None:
        with torch.no_grad():
            for name, p in meta_optimizer.named_parameters():
                p.copy_(start[name])
        meta_optimizer.turn(dict(zip(spreads, by.tolist(), strict=True)))

    try:
        with progress_bar("meta-search", generations, silent=silent or rank() > 0) as advance:
            advance(len(history))
            while len(history) < generations:
                draw = torch.Generator().manual_seed(torch_seed(1_000_003 * seed + len(history)))
                tasks = [(task, _steps(total_steps, draw)) for task in _drawn(sample_tasks(draw))]
                for task, _ in tasks:
                    check_source(meta_optimizer, task, "sample_tasks")
                    threat_models = widened(threat_models, task.threat_model)
                moves = mean + spread * torch.randn(population, len(first), generator=draw, dtype=torch.float64)
                moves[-1] = mean
                scores = torch.zeros(population, dtype=torch.float64)
                for i in range(rank(), population, processes()):
                    move(moves[i])
                    scores[i] = _score(meta_optimizer, tasks, settings)
                (scores,) = summed([scores])
                chosen = moves[scores.argsort(descending=True, stable=True)[:elite]]
                mean = KEPT * mean + (1 - KEPT) * chosen.mean(0)
                spread = KEPT * spread + (1 - KEPT) * (chosen.std(0, correction=0) + LEAST_SPREAD * first)
                like_rank_0([mean, spread])
                told = (scores.max().item(), scores[-1].item(), scores.median().item())
                history.append(Generation(*told, dict(zip(spreads, mean.tolist(), strict=True))))
                advance(1, f"score {scores[-1]:.3f}")
                if on_generation is not None:
                    on_generation(len(history), history[-1])
                if path is not None and rank() == 0:
                    _write(path, identity, mean, spread, history, threat_models)
        ends = {"start": torch.zeros_like(mean), "end": mean}
        final = _compared(meta_optimizer, sample_tasks, settings, {name: partial(move, by) for name, by in ends.items()})
        kept = "start" if final and final["start"] >= final["end"] else "end"
        move(ends[kept])
    except BaseException:
        move(torch.zeros_like(mean))  # an interrupt leaves the rule as it was; the checkpoint has the progress
        raise
    if kept == "start":  # the same rule, trained for what it was trained for
        threat_models = meta_optimizer.record.get("threat_models", threat_models)
    meta_optimizer.record = (meta_optimizer.record if kept == "start" else {}) | {
        "meta_search": identity,
        "knobs": dict(zip(spreads, ends[kept].tolist(), strict=True)),
        "final_scores": final,
        "kept": kept,
        "scores": [generation.mean for generation in history],
        "threat_models": threat_models,
        "metarobust": __version__,
        "torch": torch.__version__,
    }
    return history


def _compared(
    rule: InterpretableOptimizer,
    sample_tasks: SampleTasks,
    settings: MetaSearchSettings,
    ways: Mapping[str, Callable[[], None]],
) -> dict[str, float]:
    """Mean score of each way to set the rule, on tasks of their own."""
    rows = [(way, number) for number in range(settings.final_draws) for way in ways]
    scores = torch.zeros(len(rows), dtype=torch.float64)
    for i in range(rank(), len(rows), processes()):
        way, number = rows[i]
        draw = torch.Generator().manual_seed(torch_seed(1_000_003 * settings.seed + settings.generations + number))
        tasks = [(task, _steps(settings.total_steps, draw)) for task in _drawn(sample_tasks(draw))]
        ways[way]()
        scores[i] = _score(rule, tasks, settings)
    (scores,) = summed([scores])
    found = {way: [s for (name, _), s in zip(rows, scores.tolist(), strict=True) if name == way] for way in ways}
    return {way: sum(values) / len(values) for way, values in found.items() if values}


def _drawn(tasks: Any) -> Sequence[ClassificationTask]:
    expected, remedy = "a function that returns a list of tasks", "write tasks.one_of_each of a TaskDistribution"
    if not isinstance(tasks, (list, tuple)):
        raise TypeError(message("sample_tasks", expected, type(tasks).__name__, remedy))
    require(len(tasks) > 0, "sample_tasks", expected, "an empty list", remedy)
    return tasks


def _steps(total_steps: tuple[int, int], draw: torch.Generator) -> int:
    low, high = total_steps
    return round(low * math.exp(float(torch.rand((), generator=draw)) * math.log(high / low)))


def _score(rule: InterpretableOptimizer, tasks: Sequence[tuple[ClassificationTask, int]], settings: MetaSearchSettings) -> float:
    """Mean over tasks of robust plus weighted clean accuracy at the end of a run."""
    found = []
    for number, (task, steps) in enumerate(tasks):
        generator = torch.Generator().manual_seed(torch_seed(1_000_003 * settings.seed + number))
        final = train_optimizees(task, reading_streams(rule, total_steps=steps), total_steps=steps, generator=generator)[steps]
        robust = task.meta_accuracy(final, generator=generator).mean().item()
        found.append(robust + settings.clean_weight * task.clean_accuracy(final).mean().item())
    return sum(found) / len(found)


def _write(
    path: Path, identity: dict[str, Any], mean: Tensor, spread: Tensor, history: list[Generation], threat_models: Any
) -> None:
    header = {"format": FORMAT, "identity": identity, "threat_models": threat_models}
    write_tensors(path, {"mean": mean, "spread": spread}, header | {"history": [list(g) for g in history]})


def _resumed(path: Path, identity: dict[str, Any]) -> tuple[Tensor, Tensor, list[Generation], Any]:
    tensors, header = read_tensors(path, expected=FORMAT, name="checkpoint", remedy=REMEDY)
    require_same_settings(path, identity | {"total_steps": list(identity["total_steps"])}, header.get("identity"))
    with only_sentences(path):
        history = [Generation(best, mean, median, knobs) for best, mean, median, knobs in header["history"]]
        found = tensors["mean"], tensors["spread"]
        for tensor in found:
            require(tensor.shape == (len(identity["knobs"]),), "mean and spread", "one number per knob", list(tensor.shape))
        return *found, history, header["threat_models"]

"""Meta-training: truncated back-propagation through the training of many small models."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from metarobust import __version__
from metarobust._checks import choice, finite, integer, message, require
from metarobust._files import check_writable
from metarobust._processes import like_rank_0, processes, rank, summed
from metarobust._progress import progress_bar
from metarobust._randomness import torch_seed
from metarobust.meta_optimizers._estimators import ESTIMATORS, Slot, backpropagated, persistent_evolution
from metarobust.meta_optimizers._kinds import MetaOptimizer, check_meta_optimizer, check_source
from metarobust.meta_optimizers._resume import load_run, require_same_progress, save_run
from metarobust.meta_optimizers._training_record import widened
from metarobust.meta_optimizers._transformation import reading_streams
from metarobust.types import Task

SampleTask = Callable[[torch.Generator], Task]
DRAWN = "write a TaskDistribution, or lambda generator: ClassificationTask(...)"


@dataclass(frozen=True, kw_only=True)
class MetaTrainingSettings:
    """What determines a meta-training run, besides the tasks; stored in its record and its checkpoint.

    Args:
        iterations, total_steps, unroll, slots, learning_rate, clip_norm, loss_cap, late_weight, meta_loss_every, seed: as in
            `meta_train`.
        estimator, noise, shortest_steps, curriculum, tasks_per_step, recompute_every: likewise.
    """

    iterations: int
    total_steps: int
    unroll: int
    slots: int
    learning_rate: float
    clip_norm: float
    loss_cap: float
    late_weight: float
    meta_loss_every: int
    seed: int
    estimator: str = "second_order"
    noise: float = 0.02
    shortest_steps: int | None = None
    curriculum: float = 0.0
    tasks_per_step: int = 1
    recompute_every: int | None = None

    @classmethod
    def serban2020(cls, *, iterations: int) -> Self:
        """The paper's code, ``iterations`` updates: T = 480, K = 20, all steps' losses alike, first order, Adam at 0.01.

        Pass it on as ``meta_train(LSTMOptimizer.serban2020(), sample_task, **asdict(settings))``, with tasks whose
        ``training_attack`` and ``meta_attack`` are the same. Not reproduced: examples crafted on the weights at the start of
        each unroll, one batch for both losses, the extra clean loss at the end of an unroll, and the constant meta learning
        rate (ours decays to zero).
        """
        return cls(
            iterations=iterations, total_steps=480, unroll=20, slots=1, learning_rate=1e-2, clip_norm=1e6, loss_cap=1e6,
            late_weight=0.0, meta_loss_every=1, estimator="first_order", seed=0,
        )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("iterations", "total_steps", "unroll", "slots", "meta_loss_every", "tasks_per_step"):
            integer(name, getattr(self, name), least=1)
        integer("seed", self.seed, least=0)
        for name in ("learning_rate", "clip_norm", "loss_cap"):
            finite(name, getattr(self, name), above=0.0)
        finite("late_weight", self.late_weight, least=0.0)
        choice("estimator", self.estimator, ESTIMATORS)
        require(self.tasks_per_step <= self.slots, "tasks_per_step", f"at most slots (={self.slots})", self.tasks_per_step)
        finite("noise", self.noise, above=0.0)
        finite("curriculum", self.curriculum, least=0.0)
        require(self.curriculum <= 1, "curriculum", "a share of the iterations in [0, 1]", self.curriculum)
        if self.recompute_every is not None:
            integer("recompute_every", self.recompute_every, least=1)
            require(
                self.estimator != "pes",
                "recompute_every",
                "None with estimator='pes', which keeps no graph",
                self.recompute_every,
            )
        if self.shortest_steps is not None:
            integer("shortest_steps", self.shortest_steps, least=1)
            require(self.shortest_steps <= self.total_steps, "shortest_steps", "at most total_steps", self.shortest_steps)

    def horizon(self, progress: float, draw: torch.Generator) -> int:
        """T of a task that begins at ``progress`` in [0, 1] of the iterations, from ``draw`` unless all tasks have one T."""
        shortest, longest = self.shortest_steps or self.total_steps, self.total_steps
        if shortest == longest:
            return longest
        grown = 1.0 if self.curriculum == 0 else min(1.0, progress / self.curriculum)
        span = grown * math.log(longest / shortest)
        return round(shortest * math.exp(span * float(torch.rand((), generator=draw))))


class MetaTraining(NamedTuple):
    """The outcome of `meta_train`.

    Attributes:
        meta_optimizer: the trained module, the same object.
        losses: the meta-loss of each iteration.
        settings: that gave it.
    """

    meta_optimizer: MetaOptimizer
    losses: list[float]
    settings: MetaTrainingSettings


def meta_train(
    meta_optimizer: MetaOptimizer,
    sample_task: SampleTask,
    *,
    iterations: int = 300,
    total_steps: int = 200,
    unroll: int = 20,
    slots: int = 4,
    learning_rate: float = 5e-3,
    clip_norm: float = 1.0,
    loss_cap: float = 10.0,
    late_weight: float = 1.0,
    meta_loss_every: int = 5,
    estimator: str = "second_order",
    noise: float = 0.02,
    shortest_steps: int | None = None,
    curriculum: float = 0.0,
    tasks_per_step: int = 1,
    recompute_every: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    silent: bool = False,
    on_iteration: Callable[[int, float], object] | None = None,
) -> MetaTraining:
    """Train a meta-optimizer through the training runs that it drives (truncated back-propagation through time).

    Each iteration advances one task by ``unroll`` steps, evaluates the task's meta-loss on the way, back-propagates to the
    meta-parameters, takes an Adam step on them (cosine decay to zero), and cuts the graph. ``slots`` tasks of staggered ages
    take turns; a task that has reached ``total_steps`` is replaced by a fresh one.

    Several processes. Where ``torch.distributed`` is initialised, each process calls this with the same arguments; they share the
    ``tasks_per_step`` tasks of a meta-update, average their gradients, and end with the same parameters, those of one process up
    to rounding. Each writes a checkpoint of its own: rank 0 to ``checkpoint``, rank r to the same name with ``.rank`` and r.

    Args:
        meta_optimizer: trained in place.
        sample_task: gives a :class:`metarobust.types.Task`, a pure function of the generator it is handed.
        iterations: meta-updates.
        total_steps: optimizee steps per task, T, rounded up to whole unrolls; deploy with a similar number.
        unroll: optimizee steps between two cuts of the graph, K.
        slots: tasks in progress at the same time.
        learning_rate: of the meta-level Adam.
        clip_norm: largest Euclidean norm of a meta-gradient.
        loss_cap: a meta-loss above this counts as this and gives no gradient.
        late_weight: within an unroll, a meta-loss at age t has weight ``0.3 + late_weight * t / T`` over the unroll's sum.
        meta_loss_every: optimizee steps between two evaluations of the meta-loss; the last step of an unroll always counts.
        estimator: ``"second_order"`` back-propagates through the optimizee's gradients too (exact within an unroll);
            ``"first_order"`` treats them as constants, as the paper's code does: a quarter faster, and markedly worse with two
            streams; ``"pes"``, persistent evolution strategies, needs no graph and sees the whole run, at a higher variance: take
            more iterations.
        noise: of ``"pes"``: standard deviation of the moves of the meta-parameters.
        shortest_steps: each task's T is drawn log-uniformly between this and ``total_steps``; None for ``total_steps`` always.
        curriculum: share of the iterations during which the longest T grows (geometrically) from the shortest.
        tasks_per_step: tasks that are advanced for one meta-update, whose gradients are averaged.
        recompute_every: steps whose graph is in memory at a time (activation checkpointing over steps): an unroll is taken once
            without a graph, and again in parts of this many steps on the way back. The same gradient, for the memory of a part
            and of what each part begins with. Tasks must draw from their generator alone. None keeps the graph of the unroll.
        seed: of all randomness here; tasks get their generators from it.
        checkpoint: file that the run's whole state goes to, atomically; when it exists, the run resumes from it and ends with
            bit-identical parameters.
        checkpoint_every: iterations between two checkpoints.
        silent: no progress bar; there is none either when standard error is no terminal.
        on_iteration: called with (iteration, meta-loss) after each iteration.

    Raises:
        FloatingPointError: the meta-loss or its gradient is not finite.
        ValueError: a setting is out of range, or the checkpoint belongs to a run with other settings.
    """
    settings = MetaTrainingSettings(
        iterations=iterations,
        total_steps=total_steps,
        unroll=unroll,
        slots=slots,
        learning_rate=learning_rate,
        clip_norm=clip_norm,
        loss_cap=loss_cap,
        late_weight=late_weight,
        meta_loss_every=meta_loss_every,
        estimator=estimator,
        noise=noise,
        shortest_steps=shortest_steps,
        curriculum=curriculum,
        tasks_per_step=tasks_per_step,
        recompute_every=recompute_every,
        seed=seed,
    )
    integer("checkpoint_every", checkpoint_every, least=1)
    check_meta_optimizer(meta_optimizer)
    if not callable(sample_task):
        raise TypeError(message("sample_task", "a function that returns a task", type(sample_task).__name__, DRAWN))
    if checkpoint is not None:
        check_writable(Path(checkpoint), "meta_training.safetensors")
    meta_optimizer.requires_grad_(True)  # `load` gives a frozen one
    run = MetaTrainingRun(meta_optimizer, sample_task, settings)
    path = None if checkpoint is None else Path(f"{checkpoint}.rank{rank()}" if rank() else checkpoint)
    if path is not None and path.exists():
        load_run(path, run)
    require_same_progress(checkpoint, len(run.losses))
    with progress_bar("meta-training", iterations, silent=silent or rank() > 0) as advance:
        advance(len(run.losses))
        while len(run.losses) < iterations:
            loss = run.advance()
            advance(1, f"meta-loss {loss:.3f}")
            if on_iteration is not None:
                on_iteration(len(run.losses), loss)
            if path is not None and (len(run.losses) % checkpoint_every == 0 or len(run.losses) == iterations):
                save_run(path, run)
    meta_optimizer.record = {"meta_training": asdict(settings), "final_meta_loss": _recent(run.losses)} | {
        "threat_models": run.threat_models,
        "metarobust": __version__,
        "torch": torch.__version__,
    }
    return MetaTraining(meta_optimizer, run.losses, settings)


class MetaTrainingRun:
    """The state of a run between two iterations; ``advance`` is one iteration."""

    def __init__(self, meta_optimizer: MetaOptimizer, sample_task: SampleTask, settings: MetaTrainingSettings) -> None:
        self.meta_optimizer, self.sample_task, self.settings = meta_optimizer, sample_task, settings
        self.parameters = [p for p in meta_optimizer.parameters() if p.requires_grad]
        like_rank_0(self.parameters)
        self.adam = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        self.rules: dict[int, GradientTransformation] = {}
        self.generator = torch.Generator().manual_seed(torch_seed(settings.seed))
        self.losses: list[float] = []
        self.threat_models: dict[str, Any] | None = None
        # Slot i ends its first task after (i + 1) / slots of the horizon, so that ages stay staggered.
        self.slots = [self.fresh_slot(share=(i + 1) / settings.slots) for i in range(settings.slots)]

    def rule_for(self, total_steps: int) -> GradientTransformation:
        """The rule that plans this number of steps."""
        if total_steps not in self.rules:
            self.rules[total_steps] = reading_streams(self.meta_optimizer, total_steps=total_steps)
        return self.rules[total_steps]

    def fresh_slot(self, share: float = 1.0) -> Slot:
        """A new task at age 0, which ends after this share of its steps."""
        total = self.settings.horizon(len(self.losses) / self.settings.iterations, self.generator)
        seed = int(torch.randint(2**62, (), generator=self.generator))
        return self.slot_from_seed(seed, math.ceil(total * share), total)

    def slot_from_seed(self, task_seed: int, horizon: int, total_steps: int) -> Slot:
        """The task that this seed gives, at age 0."""
        generator = torch.Generator().manual_seed(task_seed)
        task = self.sample_task(generator)
        if not hasattr(task, "initial_parameters"):
            raise TypeError(message("sample_task", "a function that returns a task", type(task).__name__, DRAWN))
        check_source(self.meta_optimizer, task, "sample_task")
        self.threat_models = widened(self.threat_models, getattr(task, "threat_model", None))
        parameters = task.initial_parameters(generator=generator)
        state = self.rule_for(total_steps).init(cast("Any", parameters))
        return Slot(task_seed, task, generator, parameters, state, 0, horizon, total_steps)

    def advance(self) -> float:
        """One truncation of ``tasks_per_step`` tasks and one meta-update; returns the mean of their weighted meta-losses.

        All processes keep the books of all tasks, and draw the same numbers; each advances its share of the tasks.
        """
        settings, iteration = self.settings, len(self.losses)
        first = iteration * settings.tasks_per_step
        places = [(first + number) % settings.slots for number in range(settings.tasks_per_step)]
        total, found = torch.zeros((), dtype=torch.float64), [torch.zeros_like(p) for p in self.parameters]
        for place in places:
            fresh = self.draw_noise() if settings.estimator == "pes" else []
            slot = self.slots[place]
            if place % processes() != rank():
                slot.age += settings.unroll
                continue
            rule = self.rule_for(slot.total_steps)
            if settings.estimator == "pes":
                loss, gradients = persistent_evolution(slot, rule, settings, self.parameters, fresh)
            else:
                loss, gradients = backpropagated(slot, rule, settings, self.parameters)
            total += loss / len(places)
            found = [a + b / len(places) for a, b in zip(found, gradients, strict=True)]
        (total, *found) = summed([total.to(found[0].device), *found])
        self.losses.append(self.step(total.item(), found, age=self.slots[places[-1]].age))
        for place in places:
            if self.slots[place].age >= self.slots[place].horizon:
                self.slots[place] = self.fresh_slot()
        return self.losses[-1]

    def draw_noise(self) -> list[Tensor]:
        """One move of the meta-parameters."""
        draws = [torch.randn(p.shape, generator=self.generator, dtype=p.dtype) for p in self.parameters]
        return [self.settings.noise * draw.to(p.device) for draw, p in zip(draws, self.parameters, strict=True)]

    def step(self, loss: float, gradients: list[Tensor], *, age: int) -> float:
        """One Adam step on the meta-parameters, if all numbers are finite; returns the loss."""
        settings, iteration = self.settings, len(self.losses)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise FloatingPointError(
                f"meta-training must keep its loss and gradient finite, got meta-loss {loss:.4g} and gradient norm "
                f"{norm.item():.4g} in iteration {iteration + 1} (task age {age}); start a new run with a lower "
                "learning_rate or unroll, or with another seed"
            )
        factor = min(1.0, settings.clip_norm / max(norm.item(), 1e-12))
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g * factor
        for group in self.adam.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * iteration / settings.iterations))
        self.adam.step()
        self.adam.zero_grad()
        return loss


def _recent(losses: list[float], count: int = 20) -> float:
    tail = losses[-count:]
    return sum(tail) / max(1, len(tail))

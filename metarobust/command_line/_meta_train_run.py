"""What ``metarobust meta-train`` does once its flags are read: data, tasks, rule, meta-training, files."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from metarobust import __version__
from metarobust._files import json_text, read_json, write_atomically
from metarobust._processes import Processes
from metarobust._randomness import generator_for
from metarobust._tensors import seeded
from metarobust.attacks import PGD
from metarobust.command_line._meta_train_display import shown
from metarobust.command_line._notes import say
from metarobust.command_line._points import read_points
from metarobust.command_line._train_files import _told, is_record
from metarobust.command_line._train_network import WIDTHS, chosen_network
from metarobust.command_line._train_processes import agreed
from metarobust.data import LabelledImages, LowDataTasks, digits_pools
from metarobust.divergences import KL
from metarobust.meta_optimizers import InterpretableOptimizer, LSTMOptimizer, TaskDistribution, meta_search, meta_train, save
from metarobust.meta_optimizers._distribution import pgd_5
from metarobust.objectives import ARMOR, TRADES, AdversarialTraining, BETATraining
from metarobust.threat_models import ThreatModel

if TYPE_CHECKING:
    from metarobust.command_line._meta_train import MetaTrain

FORMAT = "metarobust meta-train 1"
PLACES = ("out", "checkpoint", "root", "download")
"""Flags that say where the work is done: they may differ when a command is repeated."""
DEFAULT = ("mlp:48", "cnn:4,8", "residual:8,16")
STEPS = 5
"""Of the attack in every robust meta-loss."""
RADIUS = 0.1
"""ARMOR's budget, in units of KL."""
SLOTS = 4
"""Tasks in progress at the same time, at least."""
POPULATION = 16
"""Settings of a generation."""
CLEAN_WEIGHT = 0.5
"""Of clean accuracy in the score of a setting, beside robust accuracy."""
ELITE = 0.3
"""Share of the settings of a generation that the next one is drawn around."""
CHECKPOINT_EVERY = 10

OBJECTIVES: dict[str, Callable[[ThreatModel], Any]] = {
    "trades": lambda ball: TRADES(threat_model=ball, steps=STEPS),
    "beta": lambda ball: BETATraining(threat_model=ball, steps=STEPS),
    "armor": lambda ball: ARMOR(
        robust_loss=AdversarialTraining(attack=PGD(threat_model=ball, steps=STEPS)), divergence=KL(), radius=RADIUS
    ),
}
"""Meta-losses that are objectives; the others are an attack before the cross-entropy, or none."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a meta-training needs, checked; the same on every process."""

    flags: "MetaTrain"
    rule: InterpretableOptimizer | LSTMOptimizer
    tasks: TaskDistribution
    resumed: bool
    processes: int

    @property
    def told_of_tasks(self) -> dict[str, Any]:
        """What the tasks were drawn from, for the file of the rule and for the record."""
        found = {"data": list(self.tasks.datasets), "architectures": list(self.tasks.architectures)}
        ranges = {name: list(getattr(self.tasks, name)) for name in ("examples", "epsilon")}
        return found | ranges | {"norm": self.tasks.norm, "meta_loss": self.flags.meta_loss, "copies": self.tasks.copies}


def run_meta_training(flags: "MetaTrain") -> None:
    """Meta-train in one process, or in each of those that torchrun started; rank 0 alone prints and writes."""
    with joined() as processes:
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of its machine: the others find what it has downloaded
        read = agreed(processes, lambda: read_pools(flags) if first else None)
        pools = agreed(processes, lambda: read_pools(flags) if read is None else read)
        job = agreed(processes, lambda: prepared(flags, pools, processes.count))
        leads = processes.rank == 0
        if leads:
            announce(job)
        try:
            history = learned(job, leads=leads)
        except Exception as error:
            if not leads:  # rank 0 may not have met this failure
                say(f"process {processes.rank}: {error}")
            raise
        job.rule.record["tasks"] = job.told_of_tasks
        agreed(processes, lambda: finish(job, history) if leads else None)
        for path in (flags.kept, Path(f"{flags.kept}.rank{processes.rank}")):
            path.unlink(missing_ok=True)


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started; on CPUs, since the networks of a meta-training are small."""
    if "WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    distributed.init_process_group("gloo")
    try:
        yield Processes.current()
    finally:
        distributed.destroy_process_group()


def read_pools(flags: "MetaTrain") -> dict[str, LabelledImages]:
    """The training part of each data set, all with images of one shape and the same number of classes."""
    names = [name.strip() for name in flags.data.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--data must name at least one data set, got {flags.data!r}; write --data digits")
    pools: dict[str, LabelledImages] = {}
    for name in names:
        if name == "digits":
            pools[name] = digits_pools(0).meta_train
            continue
        pools[name] = read_points(name, part="train", root=flags.root, download=flags.download)
    shapes = {name: [*pool.images.shape[1:], pool.num_classes] for name, pool in pools.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        told = " and ".join(f"{shape[:3]} with {shape[3]} in {name}" for name, shape in shapes.items())
        raise ValueError(f"--data must name sets with images and classes alike, since one network serves all, got {told}")
    return pools


def prepared(flags: "MetaTrain", pools: dict[str, LabelledImages], processes: int) -> Job:
    """Rule and tasks; refuses what the data cannot serve, and files that belong to something else."""
    if flags.meta_loss == "armor" and processes > 1:
        reason = "whose worst case is over the tasks of all processes, while each of them has its own"
        raise ValueError(f"--meta-loss must be another than armor, {reason}, for {processes} processes; leave out torchrun")
    for name, pool in pools.items():
        try:
            LowDataTasks(dataset=pool, examples=flags.examples_range)
        except ValueError as error:
            raise ValueError(f"--examples for {name}: {error}") from error
        if flags.examples_range[1] >= len(pool):
            got = f"{flags.examples} of {len(pool)} in {name}"
            raise ValueError(f"--examples must leave some to judge a task on, got {got}; pass a smaller number")
    any_pool = next(iter(pools.values()))
    tasks = TaskDistribution(
        architectures=architectures(flags.names, any_pool),
        datasets={Path(name).name: pool for name, pool in pools.items()},
        examples=flags.examples_range,
        epsilon=flags.epsilon_range,
        norm=flags.norm,
        gradient_source=flags.gradient_source,
        meta_objective=OBJECTIVES.get(flags.meta_loss),
        copies=flags.copies or (1 if flags.meta_loss == "beta" else 4),
        batch_size=flags.batch_size,
        attack=None if flags.meta_loss == "clean" else pgd_5,
    )
    return Job(flags=flags, rule=starting_rule(flags), tasks=tasks, resumed=goes_on(flags), processes=processes)


def architectures(names: list[str] | None, data: LabelledImages) -> dict[str, Callable[[], nn.Module]]:
    """Name with widths, and builder, of each network."""
    if names is None:
        square = data.images.shape[2] == data.images.shape[3]
        names = [name for name in DEFAULT if square or not name.startswith("cnn")]
    for name in names:
        if name.partition(":")[0] not in WIDTHS:
            remedy = 'with semicolons between, as in "mlp:48;cnn:4,8"'
            raise ValueError(f"--architectures must name mlp, cnn or residual, perhaps with widths, {remedy}, got {name!r}")
    found = [chosen_network(name, data, flag="--architectures") for name in names]
    return {network.name: network.build for network in found}


def starting_rule(flags: "MetaTrain") -> InterpretableOptimizer | LSTMOptimizer:
    """A fresh LSTM, or Adam by hand: with a falling rate, some decay and, of two streams, a second one at its usual strength."""
    if flags.rule == "lstm":
        with seeded(generator_for(flags.seed, "meta-optimizer", 0)):
            return LSTMOptimizer(gradient_source=flags.gradient_source)
    rule = InterpretableOptimizer(gradient_source=flags.gradient_source)
    rule.turn({"learning rate, slope": -1.0, "weight decay": math.log(10), "l1, first": math.log(20)})
    if rule.two_streams:
        first, others = (1.5, 0.15) if flags.gradient_source == "gradient+perturbed_factors" else (1.0, 1.0)
        # Biases are left to the gradient: docs/transfer.md.
        rule.turn({"factor, first": first, "factor, inner": others, "factor, last": others})
    return rule


def goes_on(flags: "MetaTrain") -> bool:
    """Whether an interrupted run of the same command is there.

    Raises:
        ValueError: what is there is finished, or belongs to another command, or to somebody else.
    """
    record, mine = read_record(flags.record), settings_of(flags)
    unfinished = record is not None and not record["finished"]
    if record is not None and record["finished"] and record["settings"] == json.loads(json.dumps(mine)) and flags.out.exists():
        flags.kept.unlink(missing_ok=True)  # all but this was done when the run was killed
        raise ValueError(
            f"this meta-training is finished and its files are there; to repeat it pass another --out than {flags.out}"
        )
    ours = [flags.record, *([flags.out] if flags.kept.exists() else [])] if unfinished else []  # the rule is written last but one
    strangers = [path for path in (flags.out, flags.record) if path.exists() and path not in ours]
    if strangers:
        got = " and ".join(map(str, strangers))
        raise ValueError(f"--out must be a name whose files are not there yet, got {got}; pass another --out, or move it away")
    if not flags.kept.exists():
        return False
    remedy = f"repeat its command to go on, pass another --out, or delete {flags.kept} to start again"
    if record is None:
        raise ValueError(f"--checkpoint must be this command's, got {flags.kept} without a record at {flags.record}; {remedy}")
    theirs = record["settings"] | {"processes": record["processes"]}
    differing = [name for name in mine if theirs.get(name) != mine[name]]
    if differing:
        raise ValueError(f"--checkpoint must be this command's, got one with {_told(differing, theirs, mine)}; {remedy}")
    return True


def announce(job: Job) -> None:
    """Before the first meta-update: what is learned from what; from here on the record tells whose checkpoint this is."""
    flags, tasks = job.flags, job.tasks
    low, high = tasks.epsilon
    radii = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    ball = f"{flags.norm.replace('l', 'l_', 1)}, epsilon {radii}"
    print(f"{flags.rule} rule on {flags.gradient_source}; {flags.estimator}, meta-loss {flags.meta_loss}, {ball}")
    print(f"networks {', '.join(tasks.architectures)}; data {', '.join(tasks.datasets)}", end="")
    print(f"; {job.processes} processes" if job.processes > 1 else "", flush=True)
    if flags.searches:
        population, score = flags.population or POPULATION, f"robust accuracy + {CLEAN_WEIGHT:g} clean accuracy"
        print(f"each generation tries {population} settings of the rule; score: {score} of the networks it trains", flush=True)
    else:
        print("meta-loss: of the networks that the rule trains, at most a batch of each; lower is better", flush=True)
    if job.resumed:
        print(f"going on from {flags.kept}", flush=True)
    write_record(job, finished=False)


def learned(job: Job, *, leads: bool) -> list[Any]:
    """Move the rule; returns meta-losses or generations from the first one on."""
    flags, rule, (shortest, longest) = job.flags, job.rule, job.flags.steps_range
    try:
        with shown(flags, leads=leads) as on_round:
            if flags.searches:
                assert isinstance(rule, InterpretableOptimizer)
                population = flags.population or POPULATION
                return meta_search(
                    rule,
                    job.tasks.one_of_each,
                    generations=flags.rounds,
                    population=population,
                    elite=max(1, round(ELITE * population)),
                    total_steps=(shortest, longest),
                    clean_weight=CLEAN_WEIGHT,
                    seed=flags.seed,
                    checkpoint=flags.kept,
                    silent=True,
                    on_generation=on_round,
                )
            together = flags.tasks_per_step or job.processes
            return meta_train(
                rule,
                job.tasks,
                iterations=flags.rounds,
                total_steps=longest,
                shortest_steps=shortest,
                unroll=min(flags.unroll or 20, longest),
                slots=together * math.ceil(SLOTS / together),
                tasks_per_step=together,
                learning_rate=flags.learning_rate or 5e-3,
                estimator=flags.estimator.replace("-", "_"),
                recompute_every=flags.recompute_every,
                seed=flags.seed,
                checkpoint=flags.kept,
                checkpoint_every=CHECKPOINT_EVERY,
                silent=True,
                on_iteration=on_round,
            ).losses
    finally:
        if leads and not flags.kept.exists():  # nothing was kept
            flags.record.unlink(missing_ok=True)


def finish(job: Job, history: list[Any]) -> None:
    """Print the coefficients, write the rule, then the record, which says that all is there."""
    rule, flags = job.rule, job.flags
    if isinstance(rule, InterpretableOptimizer):
        print(rule.table())
    save(rule, flags.out)
    rounds = [found._asdict() for found in history] if flags.searches else history
    write_record(job, finished=True, history=rounds)
    print(f"wrote {flags.out} and {flags.record}")
    print(f"judge it on another data set: metarobust transfer --optimizer {flags.out} --data DATA --epsilon EPSILON")


def settings_of(flags: "MetaTrain") -> dict[str, Any]:
    """Every flag that the result depends on."""
    return {name: value for name, value in asdict(flags).items() if name not in PLACES}


def read_record(path: Path) -> dict[str, Any] | None:
    """The record, if there is one that this command wrote."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if is_record(found, FORMAT) and "processes" in found else None


def write_record(job: Job, *, finished: bool, **more: Any) -> None:
    """Settings, tasks, versions, and whatever else is known."""
    content = {"format": FORMAT, "finished": finished, "settings": settings_of(job.flags), "processes": job.processes}
    content |= {"tasks": job.told_of_tasks, **more}
    content["versions"] = {"metarobust": __version__, "torch": torch.__version__, "python": platform.python_version()}
    write_atomically(job.flags.record, lambda path: path.write_text(json_text(content)))

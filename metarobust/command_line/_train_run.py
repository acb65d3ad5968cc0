"""What ``metarobust train`` does once its flags are read: data, network, warm-up, training."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from metarobust._randomness import generator_for
from metarobust._tensors import seeded
from metarobust.attacks import PGD
from metarobust.command_line._evaluate_run import _probe
from metarobust.command_line._notes import say
from metarobust.command_line._train_data import Parts, divided, read_training_data
from metarobust.command_line._train_files import ResultFiles
from metarobust.command_line._train_network import Network, check_network, chosen_network
from metarobust.command_line._train_objectives import (
    build_objective,
    build_optimizer,
    build_schedule,
    optimizer_settings,
    read_update,
)
from metarobust.command_line._train_processes import agreed, joined_processes
from metarobust.command_line._train_report import announce, print_result, reporter, write, write_network
from metarobust.command_line._train_weighting import Known, hand_over, what_was_learned
from metarobust.data import LabelledImages
from metarobust.meta_optimizers import LearnedOptimizer
from metarobust.threat_models import ThreatModel
from metarobust.training import TrainingResult, fit

if TYPE_CHECKING:
    from metarobust.command_line._train import Train

VALIDATION_STEPS = 20
"""Of the PGD that chooses the best epoch."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a training needs, checked; the same on every process but for the device.

    Attributes:
        balls: one for each warm-up epoch, and the one of the training proper; the objectives are in the same order.
    """

    flags: "Train"
    balls: list[ThreatModel]
    objectives: list[Callable[..., Any]]
    parts: Parts
    network: Network
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device

    @property
    def files(self) -> ResultFiles:
        """What it leaves."""
        return ResultFiles(self.flags.out)

    @property
    def attack(self) -> PGD:
        """What the best epoch is chosen by."""
        return PGD(threat_model=self.balls[-1], steps=VALIDATION_STEPS)


def run_training(flags: "Train", epsilon: float) -> None:
    """Train in one process, or in each of those that torchrun started; rank 0 alone prints and writes."""
    shares = [(stage + 1) / (flags.warm_up + 1) for stage in range(flags.warm_up + 1)]
    balls = [ThreatModel(norm=flags.norm, epsilon=share * epsilon) for share in shares]
    for ball in balls:  # settings are checked before data is read
        build_objective(flags, ball)
    optimizer_settings(flags)
    read_update(flags)
    build_schedule(flags)
    check_network(flags.model)
    with joined_processes(flags.device) as (device, processes):
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of its machine: the others find what it has downloaded
        read = agreed(processes, lambda: read_training_data(flags) if first else None)
        data = agreed(processes, lambda: read_training_data(flags) if read is None else read)

        def prepared() -> Job:
            parts = divided(flags, data)
            network = chosen_network(flags.model, data)
            model = initial_model(network, flags.seed, data, device)
            optimizer = build_optimizer(flags, model, balls[-1], len(parts.train))
            known = Known(parts=parts, optimizer=optimizer, device=device)
            objectives = [build_objective(flags, ball, known) for ball in balls]
            return Job(
                flags=flags, balls=balls, objectives=objectives, parts=parts,
                network=network, model=model, optimizer=optimizer, device=device,
            )  # fmt: skip

        job = agreed(processes, prepared)
        begin = agreed(processes, lambda: job.files.stage_to_begin(flags, job.network.source))
        leads = processes.rank == 0
        if leads:
            announce(job, begin, processes.count)
        try:
            _train(job, begin, leads=leads)
        except Exception as error:
            if not leads:  # rank 0 may not have met this failure
                say(f"process {processes.rank}: {error}")
            raise


def _train(job: Job, begin: int, *, leads: bool) -> None:
    """Train, print and write, the last two on one process only."""
    flags, files = job.flags, job.files
    if leads:
        files.write_record(flags, finished=False)
        write_network(job)
    try:
        result = _in_stages(job, begin, leads=leads)
    finally:
        if leads and not files.checkpoints(flags.warm_up):  # not one step was done
            for path in (files.record, *([] if job.network.source is None else [files.network])):
                path.unlink(missing_ok=True)
    if leads:
        learned = what_was_learned(job.objectives[-1], job.model, job.parts, job.device)
        write(job, result, learned)
        print_result(job, result, learned)
        for path in files.checkpoints(flags.warm_up):
            path.unlink()


def _in_stages(job: Job, begin: int, *, leads: bool) -> TrainingResult:
    """Each warm-up epoch in a ball of its own, then the training proper; whatever learns goes through all of them.

    The checkpoint of a finished stage stays until the next one is finished too: a repeated command begins with the latest.
    """
    flags, files = job.flags, job.files
    common: dict[str, Any] = {"batch_size": flags.batch_size, "clip_norm": flags.clip_norm, "amp": flags.amp or False}
    common["optimizer"] = job.optimizer
    for stage in range(begin, flags.warm_up + 1):
        proper: dict[str, Any] = {"epochs": 1, "seed": _seed_of_warm_up(flags.seed, stage)}
        if stage == flags.warm_up:
            proper = {"epochs": flags.epochs, "seed": flags.seed, "schedule": build_schedule(flags)}
            proper |= {"validation": job.parts.held_out, "validation_attack": job.attack}
        if isinstance(job.optimizer, LearnedOptimizer):
            job.optimizer.threat_model = job.balls[stage]
        if stage > begin:
            hand_over(job.objectives[stage - 1], job.objectives[stage])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the meta-optimizer was trained with")  # said at the beginning
            result = fit(
                job.model,
                job.objectives[stage],
                job.parts.train,
                checkpoint=files.checkpoint(stage, flags.warm_up),
                on_epoch=reporter(job, stage) if leads else None,
                **common,
                **proper,
            )
        if leads and stage > 0:
            files.checkpoint(stage - 1, flags.warm_up).unlink(missing_ok=True)
    return result  # pyright: ignore[reportPossiblyUnboundVariable]


def initial_model(network: Network, seed: int, data: LabelledImages, device: torch.device) -> nn.Module:
    """The network with parameters from the seed, once it has shown that it takes the images; ``fit`` chooses its mode."""
    with seeded(generator_for(seed, "initial parameters", 0)):
        model = network.build().to(device)
    _probe(model.eval(), data.images[:1].to(device))
    return model


def _seed_of_warm_up(seed: int, stage: int) -> int:
    """Another one for each stage, which would otherwise all draw the noise of the first epoch."""
    return int(torch.randint(2**62, (), generator=generator_for(seed, "warm-up", stage)))

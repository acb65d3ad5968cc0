"""``fit``: a robust objective minimised over a data set, with validation, checkpoints, and several processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metarobust._checks import finite, integer, message, require
from metarobust._files import check_writable
from metarobust._processes import Processes
from metarobust._progress import progress_bar
from metarobust.data import LabelledImages
from metarobust.meta_weighters._branches import evaluation_mode
from metarobust.training._arguments import (
    check_data,
    check_model,
    check_objective,
    check_optimizer,
    check_precision,
    check_schedule,
    check_second_stream,
    check_takes_generator,
)
from metarobust.training._checkpoint import Checkpoint, difference, fingerprint
from metarobust.training._objective_call import stateful_part
from metarobust.training._result import EpochRecord, TrainingResult
from metarobust.training._run import Plan, TrainingRun
from metarobust.training._schedules import Schedule
from metarobust.types import Attack

Data = tuple[Tensor, Tensor] | LabelledImages


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    model: nn.Module,
    objective: Callable[..., Any],
    data: Data,
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int = 128,
    validation: Data | None = None,
    validation_attack: Attack | None = None,
    schedule: Schedule | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    clip_norm: float | None = None,
    amp: str | bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    silent: bool = False,
    on_epoch: Callable[[EpochRecord], object] | None = None,
) -> TrainingResult:
    r"""Train a model in place on a robust objective; a run that was killed goes on from its checkpoint with the same bits.

    Each step minimises the mean :math:`\frac1n \sum_i \ell_i` of the objective over a batch. Every epoch passes once over the
    data in a new random order, cut into ``ceil(examples / batch_size)`` batches whose sizes differ by at most one: none is
    small, and no example is left out.

    Randomness. The order depends on seed and epoch, the noise of attacks and ``augment`` on seed, step and process. Dropout
    draws from torch's global generators, which are seeded from the same noise before each step and given back as they were
    after it. So the result depends on no global state, and a resumed run draws what an uninterrupted one draws. On a GPU equal
    bits also need ``torch.use_deterministic_algorithms(True)``; on a CPU the same number of threads.

    Several processes. Where ``torch.distributed`` is initialised (:func:`initialise_from_environment`), each process calls
    ``fit`` with the same arguments and its own device, takes its part of every joint batch, and ends with the same parameters:
    those of one process on the joint batch, up to rounding, as far as objective and model treat examples one by one. Random
    starts are drawn per process, so they are others than one process draws; BatchNorm normalises by the statistics of the
    process's own part, and the running statistics are those of rank 0. Rank 0 alone writes files and shows progress; all read
    the same checkpoint. The objective's call is wrapped in ``DistributedDataParallel``, not the model.

    Args:
        model: trained in training mode; it ends with the last parameters, in evaluation mode. The best are in the result.
        objective: a robust loss, ``objective(model, x, y, generator=...) -> [batch]``, or a function whose result has a scalar
            ``loss`` and perhaps ``diagnostics``, a dictionary of numbers, or of None where there was nothing to measure. Over
            several processes the mean of these scalars is minimised as it is, and the names of the diagnostics must be the same
            on all. An objective that learns, as ``meta_weighters.CAAT``, or whose ``robust_loss`` does, has ``state_dict`` and
            ``load_state_dict``, which the checkpoint keeps; if it has them, ``start_epoch(model, epoch=, epochs=, generator=)``
            is called before each epoch, ``diagnostics`` are read after each step, and ``optimizer`` must be the one given here.
        data: a pair ``(x, y)``, x in input units in the model's dtype, y int64, on any device; or a ``LabelledImages``.
        optimizer: over all parameters of the model that require a gradient, ``step()`` without a closure. Learned optimizers
            of ``metarobust.meta_optimizers`` are ones too. One that reads a second stream is made with a ``threat_model``; the
            stream then belongs to the objective's loss, which must be a cross-entropy of one call of the model:
            `AdversarialTraining` (with any attack, or one that moves nothing), alone or in `ARMOR` or `ClassWeighted`.
        epochs: passes over the data, at least 1.
        batch_size: largest number of examples of a step, over all processes together; more than there are means all of them.
        validation: data that no step sees, for the accuracies of each epoch and the choice of the best one. It must not be
            the test data.
        validation_attack: an attack for robust accuracy on ``validation``; both are given or neither. An example counts as
            robust if it is classified correctly before and after. It meets the model in full precision, in evaluation
            mode, with the same noise in each epoch.
        schedule: factor of the initial learning rates, a pure function of the progress in [0, 1), applied before each step
            (:func:`piecewise`, :func:`cosine`). The rates are set in any case, so a scheduler of torch has no effect.
        augment: ``augment(x, generator)`` gives another batch of the same shape, before the objective. It may draw from the
            generator or from torch's global ones. Attacks then surround the augmented point.
        clip_norm: largest Euclidean norm of the gradient of a step, over all parameters.
        amp: ``"bfloat16"`` or ``"float16"`` runs objective and attack under ``torch.autocast``. float16 needs a GPU; its losses
            are scaled, and a step whose gradient overflows is skipped. The gradients of attacks are not scaled: under float16
            those of confident examples vanish, under bfloat16 they do not.
        seed: of all randomness.
        checkpoint: a file that keeps the whole state: after the first step, then every ``checkpoint_seconds``, and after each
            epoch. If it is there already, the run goes on from it, with the parameters it holds; it must belong to the same
            run (data, model, settings, by name for functions). Its folder must exist. Loading it executes no code. What was
            done since the last file is done again.
        checkpoint_seconds: least time between two files within an epoch; it grows to ten times what writing takes.
        silent: no progress bar; there is none either when standard error is no terminal.
        on_epoch: called with the record of each epoch, once its checkpoint is written, on every process; the model is in
            evaluation mode.

    Returns:
        Last and best state dicts and the history. The best epoch is the one of the highest robust validation accuracy, the
        earliest of several; without validation there is none.

    Raises:
        FloatingPointError: loss or gradient are not finite; the sentence names epoch, step and examples. Parameters and buffers
            are as they were before that step, and so is the checkpoint.
        ValueError: an argument is out of range, or the checkpoint is damaged or of another run.
        TypeError: an argument is of the wrong type, or the objective returns something else.
        FileNotFoundError: the folder of ``checkpoint`` is missing.

    Example:
        >>> from metarobust.attacks import PGD
        >>> from metarobust.models import mlp
        >>> from metarobust.objectives import AdversarialTraining
        >>> from metarobust.threat_models import ThreatModel
        >>> from metarobust.training import piecewise
        >>> x = torch.rand(60, 4)
        >>> data, held_out = (x[:40], (x[:40, 0] > 0.5).long()), (x[40:], (x[40:, 0] > 0.5).long())
        >>> attack = PGD(threat_model=ThreatModel(norm="linf", epsilon=0.05), steps=3)
        >>> model = mlp([4, 8, 2])
        >>> result = fit(
        ...     model,
        ...     AdversarialTraining(attack=attack),
        ...     data,
        ...     optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        ...     epochs=3,
        ...     batch_size=16,
        ...     validation=held_out,
        ...     validation_attack=attack,
        ...     schedule=piecewise({0.5: 0.1}),
        ... )
        >>> [record.epoch for record in result.history], result.best is not None
        ([1, 2, 3], True)
    """
    device = check_model(model)
    with evaluation_mode(model):
        check_objective(objective)
        x, y = check_data("data", data, model)
        checked_validation = None if validation is None else check_data("validation", validation, model)
    check_optimizer(optimizer, model)
    check_second_stream(optimizer, objective, clip_norm, amp)
    theirs = getattr(stateful_part(objective), "optimizer", optimizer)
    expected = "the one that the objective was given, whose next step it reads"
    require(theirs is optimizer, "optimizer", expected, "another", "pass the same object to both")
    integer("epochs", epochs, least=1)
    integer("batch_size", batch_size, least=1)
    integer("seed", seed, least=0)
    finite("checkpoint_seconds", checkpoint_seconds, least=0.0)
    if validation is not None and validation_attack is None:
        raise ValueError(message("validation_attack", "an attack where validation is given", None, "write PGD(threat_model=...)"))
    if validation is None and validation_attack is not None:
        raise ValueError(
            message("validation", "data where validation_attack is given", None, "hold examples out of the training")
        )
    for name, function in (("validation_attack", validation_attack), ("augment", augment), ("on_epoch", on_epoch)):
        if function is not None and (isinstance(function, type) or not callable(function)):
            attack = name == "validation_attack"
            remedy = "write PGD(threat_model=...)" if attack else ""
            raise TypeError(message(name, "an attack" if attack else "a function", repr(function), remedy))
    if validation_attack is not None:
        check_takes_generator("validation_attack", validation_attack)
    if clip_norm is not None:
        finite("clip_norm", clip_norm, above=0.0)
    plan = Plan(
        model=model,
        objective=objective,
        x=x,
        y=y,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        validation=checked_validation,
        validation_attack=validation_attack,
        schedule=schedule,
        augment=augment,
        clip_norm=clip_norm,
        amp=check_precision(amp, device),
        seed=seed,
        device=device,
        processes=Processes.current(),
    )
    each, remedy = len(x) // plan.steps, "use fewer processes, or a larger batch_size"
    expected = "such that every process gets an example of each batch"
    require(each >= plan.processes.count, "batch_size", expected, f"{each} for {plan.processes.count} processes", remedy)
    factors = check_schedule(schedule, epochs * plan.steps)
    run, file = TrainingRun(plan), None
    if checkpoint is not None or plan.processes.count > 1:
        settings = fingerprint(plan, factors)
        if checkpoint is not None:
            check_writable(Path(checkpoint), "training.safetensors")
            file = Checkpoint(Path(checkpoint), settings, checkpoint_seconds, writes=plan.processes.rank == 0)
            file.load(run)
        _require_agreement(plan.processes, settings | {"finished epochs": len(run.history), "finished steps": run.step})
    run.join()
    try:
        _train(run, file, silent=silent or plan.processes.rank > 0, on_epoch=on_epoch)
    finally:
        for group, initial in zip(optimizer.param_groups, run.learning_rates, strict=True):
            group["lr"] = initial
    optimizer.zero_grad()
    model.eval()
    return run.result()


def _train(run: TrainingRun, file: Checkpoint | None, *, silent: bool, on_epoch: Callable[[EpochRecord], object] | None) -> None:
    """Epoch after epoch from where the run stands."""
    plan = run.plan
    robust = ""
    with progress_bar("training", plan.epochs * plan.steps, silent=silent) as advance:
        advance(len(run.history) * plan.steps + run.step)
        while len(run.history) < plan.epochs:
            run.start_epoch()
            plan.model.train()
            for rows in run.batches()[run.step :]:
                loss = run.advance(rows)
                advance(1, f"loss {loss:.3f}{robust}")
                if file is not None:
                    file.save_sometimes(run)
            record = run.finish_epoch()
            if record.robust_accuracy is not None:
                robust = f", robust {record.robust_accuracy:.3f}"
            if file is not None:
                file.save(run)
            if on_epoch is not None:
                on_epoch(record)


def _require_agreement(processes: Processes, mine: dict[str, Any]) -> None:
    """Refuse processes that would train apart: other arguments, or a checkpoint that not all of them can read."""
    first, *others = processes.gather(mine)
    for rank, theirs in enumerate(others, start=1):
        differing = [difference(name, theirs.get(name), first[name]) for name in first if theirs.get(name) != first[name]]
        remedy = "call fit with the same arguments, and a checkpoint on a file system that all of them see"
        got = f"on rank {rank}, against rank 0, {', '.join(differing)}"
        require(not differing, "every process", "in the same run", got, remedy)

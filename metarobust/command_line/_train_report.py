"""What ``metarobust train`` tells and leaves: lines while it runs, a table at the end, and the files."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarobust._files import write_atomically
from metarobust._tensor_files import WEIGHTS, write_tensors
from metarobust.command_line._notes import say
from metarobust.command_line._train_axes import MOVED
from metarobust.command_line._train_checks import META_SET
from metarobust.command_line._train_weighting import told_of
from metarobust.meta_optimizers import LearnedOptimizer
from metarobust.meta_optimizers._training_record import covers
from metarobust.training import EpochRecord, TrainingResult

if TYPE_CHECKING:
    from metarobust.command_line._train import Train
    from metarobust.command_line._train_run import Job


def evaluation(job: "Job") -> str:
    """The command that judges the best parameters on test data."""
    flags, own = job.flags, job.network.source is None
    place = job.network.name if own else f"{job.files.network}:build"
    data = "TEST.npz" if flags.data.endswith(".npz") else flags.data
    words = ["--model", place, "--weights", str(job.files.best), "--data", data, "--norm", flags.norm]
    words += ["--epsilon", flags.epsilon] + ([] if flags.root is None else ["--root", str(flags.root)])
    return shlex.join(["metarobust", "evaluate", *words])


def announce(job: "Job", begin: int, processes: int) -> None:
    """Before the first step: what is trained on what, and whether an interrupted run goes on."""
    flags, kept = job.flags, job.files.checkpoint(begin, job.flags.warm_up)
    ball = f"{flags.norm.replace('l', 'l_', 1)}, epsilon {job.balls[-1].epsilon:.4g}"
    print("\n".join([f"{flags.objective}, {ball}, {flags.data}: {job.parts.sizes()}", *job.parts.scenario(flags)]))
    parameters = sum(p.numel() for p in job.model.parameters())
    where = f"{processes} processes" if processes > 1 else str(job.device)
    print(f"model {job.network.name}, {parameters:,} parameters, on {where}", flush=True)
    if flags.transport is not None or flags.divergence is not None or flags.learned_update:
        print("; ".join(f"{axis}: {choice}" for axis, choice in axes_of(flags).items()), flush=True)
    trained = job.optimizer.meta_optimizer.record.get("threat_models") if isinstance(job.optimizer, LearnedOptimizer) else None
    if trained is not None and not covers(trained, job.balls[-1]):
        low, high = trained["epsilon"]
        range_of = f"{trained['norm']} and epsilon {low:.3g} to {high:.3g}"
        say(f"{flags.update} was trained with {range_of}; what it does beyond is not known")
    if kept.exists():
        print(f"going on from {kept}", flush=True)


def axes_of(flags: "Train") -> dict[str, str]:
    """What moves the examples, what weighs them, what moves the parameters."""
    transport = flags.transport or "pgd" if flags.base_loss in MOVED else f"that of {flags.base_loss}"
    weighting = flags.divergence or "kl" if flags.objective.startswith("armor-") else "mean"
    if weighting != "mean":
        weighting += f" of order {flags.order:g}" if flags.order is not None else ""
        weighting += f", radius {flags.radius:g}"
    learned = flags.loss if flags.loss in META_SET else ""
    classes = "" if flags.class_weights == "none" else f"{flags.class_weights} classes"
    told = " on top of ".join(filter(None, (weighting if weighting != "mean" else "", classes, learned))) or "mean"
    return {"transport": transport, "weighting": told, "update": flags.update}


def reporter(job: "Job", stage: int) -> Callable[[EpochRecord], None]:
    """A line per epoch, where no progress bar shows as much."""
    flags, ball = job.flags, job.balls[stage]

    def report(record: EpochRecord) -> None:
        if sys.stderr.isatty():
            return
        if stage < flags.warm_up:
            title, validated = f"warm-up {stage + 1} of {flags.warm_up}, epsilon {ball.epsilon:.4g}", ""
        else:
            title = f"epoch {record.epoch} of {flags.epochs}"
            validated = f", clean {record.clean_accuracy:.3f}, robust {record.robust_accuracy:.3f}"
        print(f"{title}: loss {record.loss:.4f}{validated}, {record.seconds:.1f} s", flush=True)

    return report


def write_network(job: "Job") -> None:
    """The file that builds a network of this package."""
    source = job.network.source
    if source is not None:
        write_atomically(job.files.network, lambda path: path.write_text(source))


def write(job: "Job", result: TrainingResult, learned: dict[str, Any] | None) -> None:
    """Parameters and figure, and then the record, which says that all of them are there."""
    files = job.files
    assert result.best is not None
    for path, state in ((files.best, result.best), (files.last, result.last)):
        write_tensors(path, state, {"format": WEIGHTS})
    ball = job.balls[-1]
    norm = f"{ball.norm.replace('l', 'l_', 1)}, epsilon {ball.epsilon:.4g}"
    result.plot(files.figure, title=f"{Path(job.flags.data).name}, {job.network.name}; {norm}")
    files.write_record(
        job.flags,
        finished=True,
        model=job.network.name,
        objective=repr(job.objectives[-1]),
        data=job.parts.record(),
        weighting=learned,
        validation={"train": len(job.parts.train), "held_out": len(job.parts.held_out), "attack": repr(job.attack)},
        best_epoch=result.best_epoch,
        history=[asdict(record) for record in result.history],
        evaluate=evaluation(job),
    )


def print_result(job: "Job", result: TrainingResult, learned: dict[str, Any] | None) -> None:
    """The table, what the weights came to, the files, and how to go on."""
    from rich.console import Console
    from rich.table import Table

    files, ball, held_out = job.files, job.balls[-1], job.parts.held_out
    assert result.best_epoch is not None
    norm = ball.norm.replace("l", "l_", 1)
    title = f"accuracy on {len(held_out):,} held-out examples, PGD-{job.attack.steps}, {norm}, epsilon {ball.epsilon:.4g}"
    table = Table(title=title, title_justify="left")
    for column in ("parameters", "epoch", "clean", "robust", "file"):
        table.add_column(column, justify="right" if column in ("epoch", "clean", "robust") else "left", overflow="fold")
    for name, record, path in (
        ("best", result.history[result.best_epoch - 1], files.best),
        ("last", result.history[-1], files.last),
    ):
        accuracies = f"{record.clean_accuracy:.3f}", f"{record.robust_accuracy:.3f}"
        table.add_row(name, str(record.epoch), *accuracies, path.name)
    Console(highlight=False).print(table)
    if learned is not None:
        print("\n".join(told_of(learned)))
    best = result.history[result.best_epoch - 1]
    constant = float(held_out.labels.bincount().max()) / len(held_out)
    if best.robust_accuracy is not None and best.robust_accuracy <= constant:
        say(f"always predicting one class would be as robust ({constant:.3f}); pass a larger --warm-up, or more --epochs")
    names = [files.best, files.last, files.record, files.figure, *([] if job.network.source is None else [files.network])]
    print("wrote " + ", ".join(map(str, names[:-1])) + f" and {names[-1]}")
    if job.flags.data.endswith(".npz"):
        print(f"test data is for the end; put yours, which is not {job.flags.data}, in the place of TEST.npz:")
    else:
        print("test data was not touched; judge the best parameters on it:")
    print(f"  {evaluation(job)}")

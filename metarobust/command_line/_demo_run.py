"""The demo's course: three meta-trainings and fourteen target runs on all cores, then the report."""

import multiprocessing
import os
import queue
import signal
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from metarobust._files import write_atomically
from metarobust.command_line import _demo_experiment as experiment
from metarobust.command_line._demo_report import build_report, draw, print_report, write_report

_updates: Any = None
"""In a worker process: the queue that carries (variant, iterations done, meta-loss) to the parent."""


def run_demo(out: Path, *, quick: bool, seed: int) -> dict[str, Any]:
    """Run everything, print the table, and write the three files to ``out``; returns the report."""
    if find_spec("learn2learn") is None:
        from metarobust.data import import_learn2learn

        import_learn2learn()  # raises the sentence that says how to install it
    settings = experiment.demo_settings(quick=quick, seed=seed)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = {variant: Path(folder) / f"{variant}.safetensors" for variant in experiment.LEARNED}
        losses, results = _run_jobs(settings, files)
        learned = files["lstm"].read_bytes()
    calls = sum(r["attack_calls"] for r in results if r["method"] in experiment.LEARNED)
    if calls != 0:
        raise RuntimeError(f"a learned optimizer must train the targets without attacks, counted {calls} attack calls")
    if not all(r["attack_calls"] for r in results if r["method"] == "pgd_adversarial_training"):
        raise RuntimeError("adversarial training made no attack call: the counter that checks the claim is broken")
    report = build_report(settings, results, losses, quick=quick, seconds=time.perf_counter() - begin, versions=_versions())
    write_atomically(out / "meta_optimizer.safetensors", lambda path: path.write_bytes(learned))
    draw(results, settings, out / "robust_accuracy.png", quick=quick)
    write_report(report, out / "report.json")
    print_report(report, out)
    return report


def _run_jobs(settings: experiment.DemoSettings, files: dict[str, Path]) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Meta-train the three variants, and train every target with every method as soon as its rule is there."""
    context = multiprocessing.get_context("spawn")
    updates = context.Queue()
    losses: dict[str, list[float]] = {}
    results: list[dict[str, Any]] = []
    executor = ProcessPoolExecutor(
        max_workers=min(6, os.cpu_count() or 1), mp_context=context, initializer=_start_worker, initargs=(updates,)
    )
    show = _Display(settings.iterations)
    pending: dict[Future[Any], tuple[str, str]] = {}
    try:
        with show:
            for variant in experiment.LEARNED:
                future = executor.submit(_meta_train, settings, variant, files[variant])
                pending[future] = ("meta-training", variant)
            for method in experiment.METHODS:
                if method not in experiment.LEARNED:
                    _submit_targets(executor, pending, settings, method, None)
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                show.drain(updates)
                for future in done:
                    kind, name = pending.pop(future)
                    if kind == "meta-training":
                        losses[name] = future.result()
                        _submit_targets(executor, pending, settings, name, files[name])
                    else:
                        results.append(future.result())
                        show.target_done(name)
    except BaseException:
        for process in list(getattr(executor, "_processes", {}).values()):
            process.terminate()
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()
    return losses, results


def _submit_targets(
    executor: ProcessPoolExecutor,
    pending: dict[Future[Any], tuple[str, str]],
    settings: experiment.DemoSettings,
    method: str,
    path: Path | None,
) -> None:
    for target in experiment.TARGETS:
        future = executor.submit(experiment.run_method, settings, target, method, path)
        pending[future] = ("target", f"{method} on {target}")


def _start_worker(updates: Any) -> None:
    """One thread per process (the tensors are small), and Ctrl-C is the parent's business."""
    global _updates
    _updates = updates
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _meta_train(settings: experiment.DemoSettings, variant: str, path: Path) -> list[float]:
    def report(iteration: int, loss: float) -> None:
        if iteration % 5 == 0 or iteration == settings.iterations:
            _updates.put((variant, iteration, loss))

    return experiment.meta_train_variant(settings, variant, path, report)


class _Display:
    """A bar for each meta-training and one for the targets; nothing when standard error is no terminal."""

    def __init__(self, iterations: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self.progress = Progress(
            *columns,
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.bars = {
            variant: self.progress.add_task(f"meta-train {variant}", total=iterations, text="") for variant in experiment.LEARNED
        }
        total = len(experiment.METHODS) * len(experiment.TARGETS)
        self.targets = self.progress.add_task("train and attack targets", total=total, text="")

    def __enter__(self) -> "_Display":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def drain(self, updates: Any) -> None:
        """Show what the workers have sent."""
        while True:
            try:
                variant, iteration, loss = updates.get_nowait()
            except queue.Empty:
                return
            self.progress.update(self.bars[variant], completed=iteration, text=f"meta-loss {loss:.2f}")

    def target_done(self, name: str) -> None:
        """Move the bar of the targets on."""
        self.progress.update(self.targets, advance=1, text=name)


def _versions() -> dict[str, str]:
    import platform

    found = {"python": platform.python_version()}
    for package in ("metarobust", "torch", "torchopt", "learn2learn", "scikit-learn", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found

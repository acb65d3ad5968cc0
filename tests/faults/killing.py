"""Commands in child processes that are killed, until one of them ends by itself; what is left is compared to the bit.

``python killing.py FOLDER KILLS WRITES SEED JOB...`` kills each job KILLS times at a uniformly random moment of the time that it
takes alone, then WRITES times inside a write, and prints one line of JSON per job. Children are forked from a process that has
imported everything, so that a kill costs no start of Python.
"""

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import torch

from metarobust import _files
from metarobust._tensor_files import read_tensors
from metarobust._tensors import digest
from metarobust.command_line import main as metarobust
from metarobust.evaluation._resume import Checkpoint

NETS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
"""
JOBS = {
    "meta-training": "meta-train --data digits --architectures mlp:8 --rule lstm --gradient-source gradient "
    "--estimator second-order --meta-loss clean --iterations 30 --total-steps 12 --unroll 4 --copies 1 --examples 60 "
    "--out rule.safetensors",
    "training": "train --data digits --epsilon 0.1 --model mlp:16 --objective trades --steps 2 --examples 200 "
    "--warm-up 1 --epochs 5 --device cpu --out net.safetensors",
    "evaluation": "evaluate --model nets.py:build --data digits --examples 32 --epsilon 0.05 --protocol quick --batch-size 8 "
    "--device cpu --checkpoint run.safetensors --json report.json --plot report.png",
    "bounds": "bound --data points.npz --norm l2 --epsilons 0.3,0.4,0.5,0.6,0.7,0.8,0.9,1 --order 3 --device cpu --out out",
}
STAGES = ("before", "half", "whole", "renamed")
"""Moments of a write: nothing there, half a temporary file, a whole one, the file in its place and the run not told."""


def prepare(folder: Path) -> None:
    """What the jobs read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "nets.py").write_text(NETS)
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 70)
    images = np.clip(draw.normal(0.3 + 0.2 * labels[:, None], 0.25, (70, 9)), 0, 1).astype(np.float32)
    np.savez(folder / "points.npz", images=images.reshape(70, 3, 3), labels=labels)


def child(folder: Path, words: list[str], log: Path, before: Callable[[], None]) -> None:
    """Run the command and leave with its exit code; never returns."""
    code = 1
    try:
        os.chdir(folder)
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        # The clock lets an evaluation of a second write twice; here it writes after every batch.
        Checkpoint.save_sometimes = Checkpoint.save
        before()
        metarobust(words)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            log.with_suffix(".modules").write_text("\n".join(sys.modules))
        os._exit(code)


def start(folder: Path, words: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    pid = os.fork()
    if pid == 0:
        child(folder, words, log, before)
    return pid


def ended(pid: int, log: Path) -> bool:
    """Whether the child ended by itself, and well."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"died of signal {os.WTERMSIG(status)}"
        return False
    said = log.read_text()
    done = os.WEXITSTATUS(status) == 0 or "is finished and its files are there" in said
    if not done:
        raise RuntimeError(f"a child failed by itself: {said}")
    return True


def dying_in_write(number: int, stage: str) -> None:
    """Kill this process inside its write of this number."""
    real, count = _files._replace, [0]

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def replace(path: Path, write: Callable[[Path], object]) -> None:
        count[0] += 1
        if count[0] != number:
            return real(path, write)

        def dying(temporary: Path) -> None:
            write(temporary)
            if stage == "half":
                os.truncate(temporary, temporary.stat().st_size // 2)
            if stage in ("half", "whole"):
                kill()

        if stage == "before":
            kill()
        real(path, dying)
        return kill()

    _files._replace = replace


def content(path: Path) -> Any:
    """What a whole file holds, without the times in it; raises for any other."""
    if path.suffix in (".safetensors", ".checkpoint"):
        tensors, header = read_tensors(path, expected=None)
        bits = {name: (str(t.dtype), list(t.shape), digest(t)) for name, t in tensors.items()}
        return bits, timeless(header)
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".png":
        return matplotlib.image.imread(path).tolist() if path.name != "report.png" else matplotlib.image.imread(path).shape
    if path.suffix == ".py":
        compile(path.read_text(), str(path), "exec")
        return path.read_text()
    if path.suffix == ".md":
        text = path.read_text()
        assert text.endswith("\n")
        return [line.rsplit("|", 2)[0] for line in text.splitlines()]  # the last column is seconds
    return path.read_bytes()


def timeless(value: Any) -> Any:
    """Without wall times."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "wall_seconds")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(folder: Path) -> tuple[dict[str, Any], int]:
    """Every file and what it holds, and how many temporary files lie beside them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    whole = [path for path in files if not (path.name.startswith(".") and ".partial-" in path.name)]
    return {str(path.relative_to(folder)): content(path) for path in whole}, len(files) - len(whole)


def killed(job: str, root: Path, kills: int, writes: int, seed: int) -> dict[str, Any]:
    """Kill, look, start again; returns what happened."""
    words, folder, log = JOBS[job].split(), root / job, root / f"{job}.log"
    draw = random.Random(f"{job} {seed}")
    for _ in range(2):  # the second time with all modules imported: that is how long a child takes
        prepare(folder)
        begin = time.perf_counter()
        assert ended(start(folder, words, log), log)
        duration = time.perf_counter() - begin
        for name in log.with_suffix(".modules").read_text().split():
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
    expected, left = contents(folder)
    assert left == 0
    prepare(folder)
    told = {"job": job, "seconds": round(duration, 2), "kills": 0, "in_writes": 0, "completed": 0, "partial": 0, "resumed": 0}

    def verify() -> None:
        found, left = contents(folder)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, value in expected.items():
            assert found[name] == value, f"{name} is another one"
        assert left == 0, "temporary files stay"
        told["completed"] += 1
        prepare(folder)

    while told["kills"] < kills or told["in_writes"] < writes:
        by_clock = told["kills"] < kills
        stage, number = draw.choice(STAGES), draw.randint(1, 4)
        kept = [*folder.rglob("*.checkpoint"), *folder.glob("run.safetensors")]
        pid = start(folder, words, log, (lambda: None) if by_clock else lambda n=number, s=stage: dying_in_write(n, s))
        if by_clock:
            time.sleep(duration * draw.random())
            os.kill(pid, signal.SIGKILL)  # a child that has ended waits to be asked for, so its number is nobody else's
        if ended(pid, log):
            verify()
            continue
        told["kills" if by_clock else "in_writes"] += 1
        told["resumed"] += len(kept) > 0
        told["partial"] += contents(folder)[1] > 0
    assert ended(start(folder, words, log), log)
    verify()
    return told


def main(root: Path, kills: int, writes: int, seed: int, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    # Python 3.12 and later warn of threads where a process forks; these are idle ones of a linear algebra library.
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # imports slow parts of torch
    for job in jobs:
        print(json.dumps(killed(job, root, kills, writes, seed)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *map(int, sys.argv[2:5]), sys.argv[5:] or list(JOBS))

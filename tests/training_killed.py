"""A training run in child processes that are killed at random moments, until one of them ends by itself.

``python training_killed.py FOLDER SEED`` leaves the final state in FOLDER/result and prints how many children were killed.
"""

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from metarobust.attacks import PGD
from metarobust.objectives import TRADES
from metarobust.threat_models import ThreatModel
from metarobust.training import TrainingResult, cosine, fit

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)


def network(seed: int = 0) -> nn.Module:
    """Dropout and BatchNorm, so that noise and buffers must resume too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def examples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, (3 * x[:, 0]).long().clamp(max=2)


def train(checkpoint: Path | None, *, initial_seed: int = 0, on_step=lambda: None) -> TrainingResult:
    """10 epochs of 5 steps; the same result whatever the initial parameters, if the checkpoint is one of this run."""
    model, trades = network(initial_seed), TRADES(threat_model=THREAT_MODEL, steps=2)

    def objective(model, x, y, *, generator):
        on_step()
        return trades(model, x, y, generator=generator)

    return fit(
        model,
        objective,
        examples(60, 1),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.02),
        epochs=10,
        batch_size=12,
        validation=examples(40, 2),
        validation_attack=PGD(threat_model=THREAT_MODEL, steps=2),
        schedule=cosine,
        checkpoint=checkpoint,
        checkpoint_seconds=0.0,
        silent=True,
    )


def child(folder: Path, progress: int) -> None:
    """Train, and write one byte into the pipe ``progress`` at each step."""
    checkpoint = folder / "run.safetensors"
    initial_seed = os.getpid() if checkpoint.exists() else 0
    result = train(checkpoint, initial_seed=initial_seed, on_step=lambda: os.write(progress, b"."))
    result.save(folder / "result")


def main(folder: Path, seed: int) -> int:
    """Kill one child after the other, a random number of steps and of milliseconds after its start."""
    torch.set_num_threads(1)
    # Python 3.12 and later warn of threads where a process forks; these are idle ones of a linear algebra library.
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
    # The first optimizer imports slow parts of torch: here once, and not in every child.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()
    moments, killed = random.Random(seed), 0
    while not (folder / "result" / "history.json").exists():
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(folder, writing)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            ended = any(pipe.read(1) == b"" for _ in range(moments.randint(1, 15)))
            if not ended:
                time.sleep(0.02 * moments.random() ** 2)
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError("a child failed by itself")
    return killed


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2])))

"""Two processes that meta-train over gloo; ``python meta_training_processes.py FOLDER`` writes what each of them found."""

from pathlib import Path
from typing import Any

import torch
import two_processes
from torch import distributed

from metarobust.attacks import PGD
from metarobust.data import LabelledImages, load_digits
from metarobust.meta_optimizers import ClassificationTask, InterpretableOptimizer, MetaTraining, meta_train
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel

ESTIMATORS = ("second_order", "pes")
THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)


def task(generator: torch.Generator) -> ClassificationTask:
    """Two copies of a small network in float64, on subsets of sixty digits."""
    digits = load_digits()
    pool = LabelledImages(digits.images[:60].double(), digits.labels[:60], 10)
    subsets = torch.stack([torch.randperm(60, generator=generator)[:20] for _ in range(2)])
    attack = PGD(threat_model=THREAT_MODEL, steps=1)
    return ClassificationTask(
        build=lambda: mlp([64, 4, 10]).double(), dataset=pool, subsets=subsets, threat_model=THREAT_MODEL,
        meta_attack=attack, meta_batch_size=16,
    )  # fmt: skip


def run(estimator: str, checkpoint: Path | None = None, *, stop: int | None = None, seed: int = 0) -> MetaTraining | None:
    """Seven meta-updates of a rule that starts from ``seed``, or None if they were stopped on the way."""

    def report(iteration: int, loss: float) -> None:
        if iteration == stop:
            raise InterruptedError

    torch.manual_seed(seed)
    rule = InterpretableOptimizer().double()
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.05 * torch.randn_like(p))
    try:
        return meta_train(
            rule, task, iterations=7, total_steps=12, shortest_steps=6, unroll=3, slots=3, tasks_per_step=2, estimator=estimator,
            learning_rate=0.02, checkpoint=checkpoint, checkpoint_every=2, silent=True, on_iteration=report,
        )  # fmt: skip
    except InterruptedError:
        return None


def half_lost(path: Path, rank: int) -> str:
    """The file of rank 1 is gone: what both are told, which is no result that looks whole."""
    assert run("pes", path, stop=5) is None
    Path(f"{path}.rank1").unlink(missing_ok=True) if rank else None
    distributed.barrier()
    try:
        run("pes", path)
    except ValueError as error:
        return str(error)
    return "went on"


def outcome(trained: MetaTraining) -> dict[str, Any]:
    """The trained numbers, and the losses on the way."""
    return {"losses": trained.losses, "rule": {name: p.detach() for name, p in trained.meta_optimizer.named_parameters()}}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for estimator in ESTIMATORS:
        straight = run(estimator, seed=rank)  # rank 1 starts elsewhere, and must end as rank 0 does
        path = folder / f"{estimator}.safetensors"
        assert run(estimator, path, stop=5) is None
        resumed = run(estimator, path)
        assert straight is not None
        assert resumed is not None
        found[estimator] = {"straight": outcome(straight), "resumed": outcome(resumed)}
    found["half lost"] = half_lost(folder / "lost.safetensors", rank)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    two_processes.run(main)

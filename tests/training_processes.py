"""Two processes that train together over gloo; ``python training_processes.py FOLDER`` writes what each of them found.

``build`` gives the same runs to the tests, which repeat them in one process.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import two_processes
from torch import Tensor, distributed, nn

from metarobust.attacks import FGSM, PGD
from metarobust.divergences import KL
from metarobust.objectives import ARMOR, TRADES, AdversarialTraining
from metarobust.threat_models import ThreatModel
from metarobust.training import TrainingResult, cosine, fit
from metarobust.training import _checkpoint as checkpoint_module
from metarobust.training._checkpoint import Checkpoint
from metarobust.transport_costs import NormPower

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)
STEADY = FGSM(threat_model=THREAT_MODEL)
"""An attack without noise."""
NOISY = PGD(threat_model=THREAT_MODEL, steps=2)


class Died(Exception):
    """The end of a process, in a way that the same process can survive."""


class Loss(NamedTuple):
    loss: Tensor
    diagnostics: dict[str, float | None]


def examples(count: int = 23, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, (3 * x[:, 0]).long().clamp(max=2)


def network(rank: int = 0, *, normalised: bool = False) -> nn.Module:
    """Another one on each process, until the processes join."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10 + rank)
        middle = [nn.BatchNorm1d(8), nn.Dropout(0.3)] if normalised else []
        return nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()


def gathered(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Loss:
    """A mean that already counts every process's rows: what the average over the processes is taken of."""
    count, total = float(len(x)), torch.tensor(float(len(x)))
    processes = 1
    if distributed.is_initialized():
        distributed.all_reduce(total)
        processes = distributed.get_world_size()
    loss = AdversarialTraining(attack=STEADY)(model, x, y).sum() * (processes / total.item())
    return Loss(loss, {"rows": count, "odd": count if len(x) % 2 else None, "never": None})


priced = ARMOR(
    robust_loss=AdversarialTraining(attack=STEADY),
    divergence=KL(),
    radius=0.2,
    transport_cost=NormPower(weight=5.0),
    step_size=0.1,
)
"""The scale of its ascent, too, is that of the joint batch; of class 2 some parts hold no example."""

RUNS: dict[str, dict[str, Any]] = {
    "adversarial training": {"objective": AdversarialTraining(attack=STEADY)},
    "clipped": {"objective": AdversarialTraining(attack=STEADY), "clip_norm": 0.05},
    "several passes": {"objective": TRADES(attack=STEADY)},
    "scalar": {"objective": gathered},
    "armor": {"objective": ARMOR(robust_loss=AdversarialTraining(attack=STEADY), divergence=KL(), radius=0.1)},
    "armor with a cost": {"objective": priced},
    "armor of one class": {"objective": replace(priced, robust_classes=(2,), natural_weight=0.25)},
}
"""Runs that one process repeats: no noise, no batch statistics."""


def build(objective: Any, *, rank: int = 0, normalised: bool = False, **changes: Any) -> TrainingResult:
    """3 epochs of batches of 8, 8 and 7 examples, with Adam, a schedule and validation."""
    model = network(rank, normalised=normalised)
    arguments: dict[str, Any] = {
        "optimizer": torch.optim.Adam(model.parameters(), lr=0.02),
        "epochs": 3,
        "batch_size": 8,
        "schedule": cosine,
        "validation": examples(17, 2),
        "validation_attack": STEADY,
        "silent": True,
    }
    return fit(model, objective, examples(), **(arguments | changes))


def told(result: TrainingResult) -> dict[str, Any]:
    history = [vars(record) | {"seconds": None} for record in result.history]
    return {"last": result.last, "best": result.best, "best_epoch": result.best_epoch, "history": history}


def dies_at(step: int, objective: Any) -> Any:
    """The objective, which fails in one of its calls."""
    calls: list[int] = []

    class Mortal:
        def __repr__(self) -> str:
            return repr(objective)

        def __call__(self, *batch: Any, **more: Any) -> Any:
            calls.append(0)
            if len(calls) == step:
                raise Died
            return objective(*batch, **more)

    return Mortal()


def sentence(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def resumed(folder: Path, rank: int) -> dict[str, Any]:
    """A run with noise, dropout and BatchNorm: straight, and in five parts."""
    written: list[str] = []
    real = checkpoint_module.write_tensors
    checkpoint_module.write_tensors = lambda path, *rest: (written.append(str(path)), real(path, *rest))[1]
    Checkpoint.save_sometimes = Checkpoint.save
    objective = AdversarialTraining(attack=NOISY)
    arguments: dict[str, Any] = {"normalised": True, "validation_attack": NOISY}
    straight = build(objective, rank=rank, **arguments)
    found = None
    for part in range(5):
        try:
            found = build(
                dies_at(3, objective) if part < 4 else objective, rank=rank + part, checkpoint=folder / "run", **arguments
            )
        except Died:
            distributed.barrier()
    assert found is not None
    return {"straight": told(straight), "resumed": told(found), "files": len(written)}


def streams(rank: int) -> list[int]:
    """The seeds of the noise of this process."""
    seeds: list[int] = []

    def objective(model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        seeds.append(generator.initial_seed())
        return F.cross_entropy(model(x), y, reduction="none")

    build(objective, rank=rank)
    return seeds


def learned(rank: int, count: int) -> Tensor:
    """Gradients of ARMOR in its radius and its price, averaged over ``count`` processes that share a batch."""
    (x, y), model = examples(), network()
    radius, kappa = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.1, 0.05))
    objective = replace(RUNS["armor"]["objective"], radius=radius, kappa=kappa)
    loss = objective(model, x.tensor_split(count)[rank], y.tensor_split(count)[rank]).loss
    gradients = torch.stack(torch.autograd.grad(loss, [radius, kappa]))
    if count > 1:
        distributed.all_reduce(gradients)
    return gradients / count


def refusals(folder: Path, rank: int) -> dict[str, str]:
    """What each process is told when something is wrong on one of them."""
    x, _ = examples()

    def spoilt(model: Any, rows: Tensor, y: Tensor, *, generator: Any) -> Tensor:
        losses = F.cross_entropy(model(rows), y, reduction="none")
        return losses.where(~(rows[:, None] == x[[4, 9]]).all(2).any(1), float("nan"))

    def forgetful(model: Any, rows: Tensor, y: Tensor, *, generator: Any) -> Tensor:
        return F.cross_entropy(F.linear(rows, model[0].weight), y, reduction="none")

    steady = AdversarialTraining(attack=STEADY)
    build(steady, checkpoint=folder / "shared")
    return {
        "nan": sentence(lambda: build(spoilt)),
        "unused": sentence(lambda: build(forgetful)),
        "too small": sentence(lambda: build(steady, batch_size=1)),
        "other seed": sentence(lambda: build(steady, seed=rank)),
        "other file": sentence(lambda: build(steady, checkpoint=folder / ("elsewhere" if rank else "shared"))),
    }


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {name: told(build(rank=rank, **run)) for name, run in RUNS.items()}
    found |= {
        "resume": resumed(folder, rank),
        "streams": streams(rank),
        "learned": learned(rank, 2),
        "refusals": refusals(folder, rank),
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    two_processes.run(main)

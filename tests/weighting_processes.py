"""Two processes that learn one weighting over gloo; ``python weighting_processes.py FOLDER`` writes what each of them found."""

from pathlib import Path
from typing import Any

import torch
import two_processes
from torch import Tensor, distributed, nn
from torch.func import functional_call

from metarobust.losses import cross_entropy
from metarobust.meta_weighters import (
    CAAT,
    ClassStatistics,
    GradientBound,
    ReMargin,
    WeightingNetwork,
    meta_weighted_step,
    virtual_update,
)
from metarobust.threat_models import ThreatModel
from metarobust.training import fit

METHODS = ("jvp", "double_backward", "finite_difference")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(seed: int, count: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 5, generator=generator(seed), dtype=torch.float64)
    return x, (3 * x[:, 0]).long().clamp(max=2)


def meta_step(method: str, rank: int, count: int) -> dict[str, Any]:
    """A meta-step of ``count`` processes that share 7 examples and 6 meta-examples."""
    model, weigher = network(0), WeightingNetwork(inputs=5, generator=generator(1)).double()
    optimizer, own = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), torch.optim.Adam(weigher.parameters(), lr=0.1)
    (x, y), (meta_x, meta_y) = (tuple(t.tensor_split(count)[rank] for t in batch(*made)) for made in ((2, 7), (3, 6)))
    weigher.observe(x)

    def branches(parameters: dict[str, Tensor]) -> Tensor:
        return torch.stack([cross_entropy(functional_call(model, parameters, (x + shift,)), y) for shift in (0.1, -0.3)], 1)

    step = meta_weighted_step(
        weigher,
        own,
        x,
        branches,
        lambda parameters: cross_entropy(functional_call(model, parameters, (meta_x,)), meta_y).mean(),
        dict(model.named_parameters()),
        update=virtual_update(optimizer, list(model.parameters())),
        hypergradient=method,
    )
    return {
        "weights": step.weights_gradient,
        "meta_loss": step.meta_loss,
        "norm": step.norm,
        "virtual": step.parameters,
        "network": {name: value.detach() for name, value in weigher.state_dict().items()},
    }


def statistics(rank: int, count: int) -> list[Tensor]:
    """Class losses and averages after two joint batches, of which one leaves a process without examples."""
    classes, bound = ClassStatistics([4, 3, 3]), GradientBound(power=1.0)
    for seed, rows in ((4, 9), (5, 1)):
        x, y = (t.tensor_split(count)[rank] for t in batch(seed, rows))
        classes.update(x[:, 0], y)
        bound.observe(torch.cat([x, x[:, :1]], 1))
    return [classes.class_loss, classes.weight_sum, bound.average, bound.seen]


def trained(rank: int) -> dict[str, Tensor]:
    """The state of a CAAT that both processes trained, each from another network at first."""
    model = network(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weigher = WeightingNetwork(generator=generator(10 + rank)).double()
    objective = CAAT(
        threat_model=ThreatModel(epsilon=0.05),
        meta_data=batch(6, 9),
        optimizer=optimizer,
        class_counts=batch(7, 24)[1].bincount(minlength=3),
        network=weigher,
        bound=ReMargin(classes=3, tolerance=0.0),
        meta_every=1,
        learning_rate=0.05,
        steps=2,
    )
    fit(model, objective, batch(7, 24), optimizer=optimizer, epochs=3, batch_size=8, silent=True)
    return {**objective.state_dict(), **{f"model.{name}": value for name, value in model.state_dict().items()}}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {
        "meta": {method: meta_step(method, rank, 2) for method in METHODS},
        "statistics": statistics(rank, 2),
        "trained": trained(rank),
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    two_processes.run(main)

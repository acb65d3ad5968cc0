"""Two processes that take the streams of one batch over gloo; ``python factor_processes.py FOLDER`` writes what each found."""

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import two_processes
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from metarobust.meta_optimizers import InterpretableOptimizer
from metarobust.models import cnn
from metarobust.threat_models import ThreatModel

SOURCES = ("gradient+perturbed_factors", "gradient+adversarial_estimate", "gradient+adversarial_tangent")
THREAT_MODEL = ThreatModel(epsilon=0.1)


def outcome(source: str, rows: slice, *, parallel: bool) -> list[Tensor]:
    """Both streams of these rows, twice accumulated, the combined gradient, and the parameters after a learned step, in a row."""
    torch.manual_seed(0)
    x, y = torch.rand(8, 1, 8, 8, dtype=torch.float64), torch.randint(10, (8,))
    model = cnn([3, 4]).double()
    watched = DistributedDataParallel(model) if parallel else model
    rule = InterpretableOptimizer(gradient_source=source).double()
    rule.shift_factor_coefficients(first=1.5, others=0.5)
    optimizer = rule.torch_optimizer(model.parameters(), total_steps=10)
    for _ in range(2):  # gradients accumulate, and the second forward pass finds a reducer at rest
        with rule.record_factors(watched, threat_model=THREAT_MODEL) as recorder:
            recorder.backward(F.cross_entropy(watched(x[rows]), y[rows]))
    found = [t for p in model.parameters() for t in (cast("Tensor", p.grad), cast("Any", p).second_grad)]
    found = [t.clone() for t in found]
    optimizer.zero_grad()
    with optimizer.record_factors(watched, threat_model=THREAT_MODEL) as recorder:
        recorder.backward(F.cross_entropy(watched(x[rows]), y[rows]))
    found += [cast("Tensor", p.grad).clone() for p in model.parameters()]
    optimizer.step()
    return found + [p.detach() for p in model.parameters()]


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for source in SOURCES:
        torch.save(outcome(source, slice(4 * rank, 4 * rank + 4), parallel=True), folder / f"{source}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    two_processes.run(main)

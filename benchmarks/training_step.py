"""Training steps of the robust objectives against the forward-backward passes that they cannot do without, in one run.

    uv run python -m benchmarks.training_step [--rounds 7] [--threads 1] [--out results]

A step: the objective on 128 random images of 28 x 28 pixels (l_inf 0.3), its backward pass, an SGD step on a small CNN. The
passes: as many forward-backward passes to the input as the attack takes, on as many rows at once as it uses; the forward passes
of its bookkeeping (one over the last points; for BETA one over the clean batch); and the same forward and backward passes to
the parameters with SGD. Bar: BETA training at most 1.1 times its passes.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._common import interleaved, ratio, write
from metarobust.attacks import PGD
from metarobust.attacks._memory import rows_within
from metarobust.divergences import KL
from metarobust.models import cnn
from metarobust.objectives import ARMOR, MART, TRADES, UDR, AdversarialTraining, BETATraining, SmoothedBETATraining
from metarobust.threat_models import ThreatModel

BATCH, CLASSES, STEPS = 128, 10, 10
THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.3)


def passes(model: nn.Module, x: torch.Tensor, *, rows: int, steps: int, looks: tuple[int, ...], outer: tuple[int, ...]) -> None:
    """``steps`` passes to the input over ``rows`` copies of the batch, forward passes over ``looks``, a step over ``outer``."""
    labels = torch.zeros(len(x), dtype=torch.int64)
    wide = x.repeat_interleave(rows, 0)
    at_once = len(x) if rows == 1 else rows * max(1, rows_within(None, model, x) // rows)
    for part in wide.split(at_once):
        for _ in range(steps):
            leaf = part.clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(leaf), labels[:1].expand(len(leaf)), reduction="sum"), leaf)
    with torch.no_grad():
        for copies in looks:
            for part in (wide if copies > 1 else x).split(at_once):
                model(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer.zero_grad()
    total = torch.stack([model(x if copies == 1 else wide).logsumexp(1).mean() for copies in outer]).sum()
    total.backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: torch's own choice")
    parser.add_argument("--only", nargs="*", help="a part of the objectives, by the names in the table")
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = cnn([16, 32], image_size=28)
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(CLASSES, (BATCH,))
    pgd = PGD(threat_model=THREAT_MODEL, steps=STEPS)
    plain = AdversarialTraining(attack=pgd)
    wrong = CLASSES - 1
    one, clean_too = {"rows": 1, "steps": STEPS, "looks": (), "outer": (1,)}, {"rows": 1, "steps": STEPS, "outer": (1, 1)}
    beta = {"rows": wrong, "steps": STEPS, "looks": (wrong, 1)}
    cases: dict[str, tuple[Any, dict[str, Any], float | None]] = {
        "adversarial training": (plain, one, None),
        "TRADES": (TRADES(threat_model=THREAT_MODEL, steps=STEPS), clean_too | {"looks": (1,)}, None),
        "MART": (MART(attack=pgd), clean_too | {"looks": ()}, None),
        "UDR": (UDR(threat_model=THREAT_MODEL, steps=STEPS), one | {"looks": (1, 1)}, None),
        "ARMOR, KL": (ARMOR(robust_loss=plain, divergence=KL(), radius=0.1), one, None),
        "ARMOR of UDR, KL": (
            ARMOR(robust_loss=UDR(threat_model=THREAT_MODEL, steps=STEPS), divergence=KL(), radius=0.1),
            clean_too | {"looks": (1, 1)},
            None,
        ),
        "BETA training": (BETATraining(threat_model=THREAT_MODEL, steps=STEPS), beta | {"outer": (1,)}, 1.1),
        "smoothed BETA": (SmoothedBETATraining(threat_model=THREAT_MODEL, mu=5.0, steps=STEPS), beta | {"outer": (wrong,)}, None),
    }
    content: dict[str, Any] = {}
    print(f"batch {BATCH}, {STEPS} steps, {torch.get_num_threads()} thread(s); step over its passes, median [lowest, highest]")
    for name, (objective, counts, bar) in cases.items():
        if arguments.only and name not in arguments.only:
            continue
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step(objective: Any = objective, optimizer: torch.optim.Optimizer = optimizer) -> None:
            found = objective(model, x, y)
            optimizer.zero_grad()
            (found.mean() if isinstance(found, torch.Tensor) else found.loss).backward()
            optimizer.step()

        run: Callable[[], None] = lambda counts=counts: passes(model, x, **counts)  # noqa: E731
        seconds = interleaved({"step": step, "passes": run}, rounds=arguments.rounds)
        found = ratio(seconds["step"], seconds["passes"])
        print(
            f"{name:22} {found['median']:.3f} [{found['lowest']:.3f}, {found['highest']:.3f}]"
            f"   {1e3 * statistics.median(seconds['step']):.0f} ms{'' if bar is None else f'   bar {bar}'}",
            flush=True,
        )
        content[name] = {"ratio": found, "bar": bar, "seconds": seconds}
    write("training_step", content, arguments.out)


if __name__ == "__main__":
    main()

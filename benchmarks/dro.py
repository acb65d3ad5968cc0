"""Cost of the worst-case expectation against the training step that it belongs to, as a ratio within one run.

    uv run python -m benchmarks.dro [--rounds 15] [--threads 1] [--out results]

The step: PGD-10 on a small CNN for 28 x 28 images at batch 128 (random images, l_inf 0.3), then forward, backward and SGD.
The dual: solving for 128 losses and back-propagating the value into them, with a hard ball, and with a natural and an adversarial
candidate of some cost. Every call gets other losses. Bars: at most 2 % of the step for KL, at most 5 % for Alpha and Renyi.
Also printed: the share of the solver, without tensors and autograd, in the dual, and how often it evaluates its inner problem.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._common import interleaved, ratio, write
from metarobust.attacks import PGD
from metarobust.divergences import KL, Alpha, Divergence, Renyi
from metarobust.dro import _worst_case, worst_case_expectation
from metarobust.dro._dual import Problem
from metarobust.models import cnn
from metarobust.threat_models import ThreatModel

BATCH, VARIANTS, REPEATS = 128, 20, 20
# Orders, radii and kappa of the published settings (armor, section 7): weak and strong reweighting.
CASES: list[tuple[Divergence, float, float]] = [
    (KL(), 0.02, 0.1),
    (KL(), 0.2, 0.0),
    (Alpha(order=2), 0.5, 0.0),
    (Alpha(order=6), 0.5, 0.0),
    (Renyi(order=1.25), 0.1, 0.0),
    (Renyi(order=2.95), 0.4, 0.09),
]


def training_step() -> Callable[[], object]:
    """PGD-10, then one step of SGD."""
    torch.manual_seed(0)
    model = cnn([16, 32], image_size=28)
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    attack = PGD(threat_model=ThreatModel(norm="linf", epsilon=0.3), steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        moved = attack(model, x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(moved), y).backward()
        optimizer.step()

    return step


def problems(costly: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Losses ``[128]``, or losses and costs of a natural and an adversarial candidate ``[128, 2]``; one for each call."""
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Tensor, Tensor | None]] = []
    for _ in range(VARIANTS):
        losses = -torch.rand(BATCH, 2, generator=generator).log()
        if costly:
            costs = torch.stack([torch.zeros(BATCH), 0.2 * torch.rand(BATCH, generator=generator)], 1)
            found.append((losses.cumsum(1), costs))
        else:
            found.append((losses[:, 0].contiguous(), None))
    return found


def dual(divergence: Divergence, radius: float, kappa: float, costly: bool) -> Callable[[], object]:
    """Solve and back-propagate, each time for other losses."""
    supply = cycle(problems(costly))

    def run() -> None:
        losses, costs = next(supply)
        losses = losses.clone().requires_grad_()
        worst_case_expectation(losses, divergence=divergence, radius=radius, kappa=kappa, costs=costs).value.backward()

    return run


def where_the_time_goes(run: Callable[[], object]) -> dict[str, float]:
    """Median share of the solver in a call, and mean number of inner problems, over one round of losses."""
    solve, at = _worst_case.solve, Problem.at
    inside, evaluations = [0.0], [0]

    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return solve(*arguments, **options)
        finally:
            inside[0] = time.perf_counter() - begin

    def counted(*arguments: Any, **options: Any) -> Any:
        evaluations[0] += 1
        return at(*arguments, **options)

    shares = []
    _worst_case.solve, Problem.at = timed, counted
    try:
        for _ in range(VARIANTS):
            begin = time.perf_counter()
            run()
            shares.append(inside[0] / (time.perf_counter() - begin))
    finally:
        _worst_case.solve, Problem.at = solve, at
    return {"solver_share": statistics.median(shares), "inner_problems": evaluations[0] / VARIANTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: torch's own choice")
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    step = training_step()
    content: dict[str, Any] = {}
    print(
        f"PGD-10 training step at batch {BATCH}, {torch.get_num_threads()} thread(s); dual in % of it, median [lowest, highest]"
    )
    for divergence, radius, kappa in CASES:
        for costly in (False, True):
            run = dual(divergence, radius, kappa, costly)

            def several(run: Callable[[], object] = run) -> None:
                for _ in range(REPEATS):
                    run()

            seconds = interleaved({"step": step, "dual": several}, rounds=arguments.rounds)
            seconds["dual"] = [s / REPEATS for s in seconds["dual"]]
            found = {name: 100 * value for name, value in ratio(seconds["dual"], seconds["step"]).items()}
            bar = 2 if isinstance(divergence, KL) else 5
            parts = where_the_time_goes(run)
            name = f"{divergence!r}, radius {radius:g}, kappa {kappa:g}, {'two candidates' if costly else 'hard ball'}"
            print(
                f"{name:64} {found['median']:5.2f} % [{found['lowest']:.2f}, {found['highest']:.2f}]  bar {bar} %  "
                f"{1e3 * statistics.median(seconds['dual']):.2f} of {1e3 * statistics.median(seconds['step']):.0f} ms; "
                f"solver {100 * parts['solver_share']:.0f} %, {parts['inner_problems']:.1f} inner problems"
            )
            content[name] = {"percent": found, "bar_percent": bar, "seconds": seconds, **parts}
    write("dro", content, arguments.out)


if __name__ == "__main__":
    main()

"""Bounds at scale, and the flow against a linear program: ``uv run python -m benchmarks.bounds``.

Each part runs in a process of its own, so that its peak memory is its own:

1. ``sweep``: all of MNIST's training images, l2, order 2, several radii from one enumeration.
2. ``order3``: 10,000 of them at l2 3.25, order 3.
3. ``linf``: 20,000 of them at l_inf 0.3, 0.45 and 0.47, order 2 (below 0.45 no two classes conflict).
4. ``flow``: the order-2 problem of the embedded digits (72,324 pairs) by maximum flow and, in interleaved rounds, as a sparse
   linear program by HiGHS: same value, ratio of times.
5. ``auto``: the 60,000 images at l2 3, larger sets until the search gives up.
6. ``orders``: the digits at l2 0.9, 1.0 and 1.1: sets of two, sets of three, all sets, and Sinkhorn iterations.
7. ``gpu``: the sweep's enumeration on a CUDA device, if there is one.

All but the fourth and the sixth need MNIST (``--data`` or METAROBUST_DATA). ``results/bounds.json`` holds everything.
"""

import multiprocessing
import resource
import time
from typing import Any

import numpy as np
import torch
import tyro
from scipy.optimize import linprog
from scipy.sparse import csr_array

from benchmarks._common import interleaved, ratio, write
from metarobust.bounds import RiskBound, adversarial_risk_bound, risk_curve
from metarobust.bounds._flow import pair_bound
from metarobust.bounds._pairs import pairs_within
from metarobust.bounds._points import as_points
from metarobust.data import load, load_digits
from metarobust.threat_models import ThreatModel


def rows(bounds: list[RiskBound]) -> list[dict[str, Any]]:
    for b in bounds:
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in b.seconds.items())
        print(
            f"  epsilon {b.epsilon:<5g} order {b.order}: {b.lower:.6f} <= R* <= {b.upper:.6f}{' exact' if b.exact else ''}, "
            f"{b.pairs:,} pairs, larger sets {b.sets}, {b.ties} ties; {stages}",
            flush=True,
        )
    return [b.as_dict() for b in bounds]


def timed(name: str, data: str | None, device: str, threads: int) -> dict[str, Any]:
    """One of the MNIST parts, with its seconds and the peak memory of this process."""
    torch.set_num_threads(threads)
    images = load("mnist", root=data, train=True)
    many = {"sweep": 60_000, "order3": 10_000, "linf": 20_000, "auto": 60_000, "gpu": 60_000}[name]
    x, y = images.images[:many].to(device), images.labels[:many]
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    begin = time.perf_counter()
    if name == "order3":
        bounds = [adversarial_risk_bound(x, y, ThreatModel(norm="l2", epsilon=3.25), order=3)]
    elif name == "auto":
        bounds = [adversarial_risk_bound(x, y, ThreatModel(norm="l2", epsilon=3.0))]
    elif name == "linf":
        bounds = risk_curve(x, y, norm="linf", epsilons=[0.3, 0.45, 0.47], order=2)
    else:
        bounds = risk_curve(x, y, norm="l2", epsilons=[2, 2.5, 3, 3.25], order=2)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {many:,} points, {seconds:.1f} s, peak {peak:.2f} GB ({loaded:.2f} GB before), {device}", flush=True)
    return {"seconds": seconds, "peak_gb": peak, "before_gb": loaded, "device": device, "bounds": rows(bounds)}


def flow_against_program(rounds: int, threads: int) -> dict[str, Any]:
    """The same order-2 problem by both solvers; pairs are found beforehand for both."""
    torch.set_num_threads(threads)
    digits = load_digits()
    points = as_points(digits.images, digits.labels, None)
    pairs = pairs_within(points, "l2", 2.4)
    count, n = len(pairs.first), len(points.y)
    rows_, columns = np.repeat(np.arange(count), 2), np.stack([pairs.first, pairs.second], 1).ravel()
    matrix = csr_array((np.ones(2 * count), (rows_, columns)), shape=(count, n))
    value: dict[str, float] = {}

    def flow() -> None:
        value["flow"] = float(pair_bound(pairs.first, pairs.second, points.weight, points.copies).mass.sum())

    def program() -> None:
        found = linprog(-points.weight, A_ub=matrix, b_ub=np.ones(count), bounds=(0, 1), method="highs")
        value["program"] = 1 + float(found.fun)

    seconds = interleaved({"program": program, "flow": flow}, rounds=rounds)
    found = ratio(seconds["program"], seconds["flow"])
    print(
        f"flow: digits, l2 1.2, {count:,} pairs: HiGHS takes {found['median']:.1f} times as long as the flow "
        f"({found['lowest']:.1f} to {found['highest']:.1f}); values {value['program']:.9f} and {value['flow']:.9f}",
        flush=True,
    )
    return found | {"pairs": count, "seconds": seconds, "values": value}


def orders(threads: int) -> dict[str, Any]:
    """What small sets miss: lower ends by order and by Sinkhorn iterations, beside the value for sets of any size."""
    torch.set_num_threads(threads)
    digits, found = load_digits(), {}
    for epsilon in (0.9, 1.0, 1.1):
        ball = ThreatModel(norm="l2", epsilon=epsilon)
        pairs, triples, whole = (adversarial_risk_bound(digits.images, digits.labels, ball, order=o) for o in (2, 3, "auto"))
        few = adversarial_risk_bound(digits.images, digits.labels, ball, order=3, method="sinkhorn")
        found[f"{epsilon:g}"] = {
            "order 2": pairs.lower, "order 3": triples.lower, "all": whole.lower, "exact": whole.exact, "sinkhorn": few.lower
        }  # fmt: skip
        print(
            f"orders: digits, l2 {epsilon:g}: pairs {pairs.lower:.6f}, triples {triples.lower:.6f}, all {whole.lower:.6f}"
            f"{' exact' if whole.exact else ''}; Sinkhorn on triples {few.lower:.6f}",
            flush=True,
        )
    return found


def main(
    data: str | None = None,
    parts: tuple[str, ...] = ("sweep", "order3", "linf", "flow", "auto", "orders", "gpu"),
    rounds: int = 5,
    threads: int = 2,
    out: str = "results",
) -> None:
    """Measure the bounds.

    Args:
        data: data root with MNIST; default: METAROBUST_DATA.
        parts: any of sweep, order3, linf, flow, auto, gpu.
        rounds: of the flow part.
        threads: of torch.
        out: folder of the JSON file.
    """
    results: dict[str, Any] = {}
    for name in parts:
        if name == "gpu" and not torch.cuda.is_available():
            print("gpu: no CUDA device, left out")
            continue
        alone: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "flow": (flow_against_program, (rounds, threads)),
            "orders": (orders, (threads,)),
        }
        job, work = alone.get(name, (timed, (name, data, "cuda" if name == "gpu" else "cpu", threads)))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[name] = pool.apply(job, work)
    write("bounds", results, out)


if __name__ == "__main__":
    tyro.cli(main)

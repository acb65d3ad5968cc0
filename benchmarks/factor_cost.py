"""What the second gradient stream costs: both streams of a batch, or their sum, over one forward-backward pass, in one run.

    uv run python -m benchmarks.factor_cost [--threads 1] [--rounds 9] [--keep-memory] [--out results]

The limit is a pass by parameters and input, which every use of the stream needs; a step of FGSM training (one pass by the input,
one by the parameters) is what the stream stands in for. "Combined" is g + c h for given c, from one weight gradient per layer:
what an optimizer that adds the streams asks for. Tangents take another forward pass. --keep-memory starts Python again with an
allocator (that of glibc) that gives nothing back to the system, so that no step pays for fresh pages. Bar: at most 1.4 on a CNN
and on a residual network.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._common import interleaved, ratio, write
from benchmarks.meta_step import show
from metarobust.meta_optimizers import factor_gradients, record_factors
from metarobust.models import cnn, residual_network
from metarobust.threat_models import ThreatModel

BALL = ThreatModel(norm="linf", epsilon=0.1)
BATCH = 128
KEEPING = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
"""What glibc reads when a process starts."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "CNN 16-32, 28x28": partial(cnn, [16, 32], image_size=28),
    "CNN 32-64, 28x28": partial(cnn, [32, 64], image_size=28),
    "residual network 16-32-64, 28x28": partial(residual_network, (16, 32, 64)),
    "residual network 32-64-128, 28x28": partial(residual_network, (32, 64, 128)),
}


def ways(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    parameters, leaf = list(model.parameters()), x.clone().requires_grad_()

    def limit() -> Any:
        return torch.autograd.grad(F.cross_entropy(model(leaf), y), [leaf, *parameters])

    def fgsm() -> Any:
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        moved = torch.add(x, gradient.sign(), alpha=BALL.epsilon).clamp_(0, 1)
        return torch.autograd.grad(F.cross_entropy(model(moved), y), parameters)

    def streams(source: str) -> Any:
        return factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=BALL, gradient_source=source)

    given: dict[Tensor, float] = dict.fromkeys(parameters, 1.25)

    def combined(source: str) -> None:
        model.zero_grad()
        with record_factors(model, threat_model=BALL, gradient_source=source, coefficients=given) as recorder:
            recorder.backward(F.cross_entropy(model(x), y))

    scaled, estimate, tangent = (
        f"gradient+{kind}" for kind in ("perturbed_factors", "adversarial_estimate", "adversarial_tangent")
    )
    return {
        "limit": limit,
        "scaled": partial(streams, scaled),
        "scaled, combined": partial(combined, scaled),
        "estimate": partial(streams, estimate),
        "estimate, combined": partial(combined, estimate),
        "tangents": partial(streams, tangent),
        "tangents, combined": partial(combined, tangent),
        "fgsm": fgsm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default="results", help="folder for factor_cost.json")
    parser.add_argument("--keep-memory", action="store_true", help="with " + " ".join(f"{k}={v}" for k, v in KEEPING.items()))
    arguments = parser.parse_args()
    if arguments.keep_memory and not KEEPING.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.factor_cost", *sys.argv[1:]], os.environ | KEEPING)
    torch.set_num_threads(arguments.threads)
    print(f"batch {BATCH}, {arguments.threads} threads, over one pass by parameters and input: median (lowest to highest)")
    heads = "scaled factors | combined | adversarial estimate | combined | adversarial tangents | combined | FGSM training"
    print(f"| model | {heads} |\n" + "|---" * 8 + "|")
    content: dict[str, Any] = {"threads": arguments.threads, "batch": BATCH, "keep_memory": arguments.keep_memory}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model, x, y = build(), torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
        seconds = interleaved(ways(model, x, y), rounds=arguments.rounds, repeats=3)
        found = {way: ratio(taken, seconds["limit"]) for way, taken in seconds.items() if way != "limit"}
        content[name] = found | {"seconds": seconds}
        print(f"| {name} | " + " | ".join(show(one) for one in found.values()) + " |", flush=True)
    write("factor_cost_keep_memory" if arguments.keep_memory else "factor_cost", content, arguments.out)


if __name__ == "__main__":
    main()

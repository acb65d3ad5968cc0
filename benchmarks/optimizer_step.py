"""What a step of a learned optimizer costs beside one of Adam (``foreach``), on a model of a million parameters.

    uv run python -m benchmarks.optimizer_step [--rounds 9] [--threads 1] [--device cuda] [--out results]

An MLP of 989,510 parameters in 8 tensors, gradients (and second streams) computed once; the step alone, without zero_grad,
forward and backward pass. State: numbers kept per parameter. On a GPU: the fused step of the LSTM, and beside it the step of many
kernels that it replaces.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._common import interleaved, ratio, write
from metarobust.meta_optimizers import InterpretableOptimizer, LSTMOptimizer, record_factors
from metarobust.models import mlp

RULES: dict[str, Callable[[], LSTMOptimizer | InterpretableOptimizer]] = {
    "interpretable, two streams": InterpretableOptimizer,
    "interpretable, gradient only": lambda: InterpretableOptimizer(gradient_source="gradient"),
    "LSTM, two streams": LSTMOptimizer,
}


class ManyKernels(LSTMOptimizer):
    """The LSTM without its fused step."""

    def steps_in_place(self, parameters: Sequence[Tensor]) -> bool:
        return False


UNFUSED = "LSTM, two streams, many kernels"


def prepared(device: str) -> nn.Module:
    """A model with both streams of gradients."""
    model = mlp([784, 800, 400, 100, 10]).to(device)
    x, y = torch.rand(32, 784, device=device), torch.randint(10, (32,), device=device)
    with record_factors(model) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    return model


def numbers_per_parameter(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() for value in tensors) / sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", default="results", help="folder for optimizer_step.json, or optimizer_step_cuda.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    on_gpu = arguments.device == "cuda"
    rules = {name: make().to(arguments.device) for name, make in RULES.items()} | (
        {UNFUSED: ManyKernels().cuda()} if on_gpu else {}
    )
    models = {name: prepared(arguments.device) for name in ("Adam", *rules)}
    optimizers: dict[str, torch.optim.Optimizer] = {"Adam": torch.optim.Adam(models["Adam"].parameters(), foreach=True)}
    optimizers |= {name: rule.torch_optimizer(models[name].parameters(), total_steps=1000) for name, rule in rules.items()}
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    # A step on a GPU is shorter than its clock is fine: many between two readings.
    seconds = interleaved(steps, rounds=arguments.rounds, repeats=50 if on_gpu else 1)
    found = {}
    for name in rules:
        found[name] = ratio(seconds[name], seconds["Adam"]) | {"state": numbers_per_parameter(optimizers[name], models[name])}
        told = found[name]
        print(f"{name}: {told['median']:.2f} times Adam ({told['lowest']:.2f} to {told['highest']:.2f}), ", end="")
        print(f"{told['state']:.0f} numbers per parameter beside Adam's 2", flush=True)
    write("optimizer_step_cuda" if on_gpu else "optimizer_step", {"settings": vars(arguments), "ratios": found}, arguments.out)


if __name__ == "__main__":
    main()

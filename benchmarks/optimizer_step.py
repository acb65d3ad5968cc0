"""What a step of a learned optimizer costs beside one of Adam (``foreach``), on a model of a million parameters.

    uv run python -m benchmarks.optimizer_step [--rounds 9] [--threads 1] [--out results]

An MLP of 989,510 parameters in 8 tensors, gradients (and second streams) computed once; the step alone, without zero_grad,
forward and backward pass. State: numbers kept per parameter.
"""

import argparse
from collections.abc import Callable

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


def prepared() -> nn.Module:
    """A model with both streams of gradients."""
    model = mlp([784, 800, 400, 100, 10])
    x, y = torch.rand(32, 784), torch.randint(10, (32,))
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
    parser.add_argument("--out", default="results", help="folder for optimizer_step.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    models = {name: prepared() for name in ("Adam", *RULES)}
    optimizers: dict[str, torch.optim.Optimizer] = {"Adam": torch.optim.Adam(models["Adam"].parameters(), foreach=True)}
    optimizers |= {name: make().torch_optimizer(models[name].parameters(), total_steps=1000) for name, make in RULES.items()}
    seconds = interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, rounds=arguments.rounds)
    found = {}
    for name in RULES:
        found[name] = ratio(seconds[name], seconds["Adam"]) | {"state": numbers_per_parameter(optimizers[name], models[name])}
        told = found[name]
        print(f"{name}: {told['median']:.2f} times Adam ({told['lowest']:.2f} to {told['highest']:.2f}), ", end="")
        print(f"{told['state']:.0f} numbers per parameter beside Adam's 2", flush=True)
    write("optimizer_step", {"settings": vars(arguments), "ratios": found}, arguments.out)


if __name__ == "__main__":
    main()

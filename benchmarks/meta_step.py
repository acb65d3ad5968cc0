"""Speed of one meta-step, of PGD and of factor gradients, each as a ratio within one run.

    uv run python -m benchmarks.meta_step [--rounds 9] [--out results]

1. One meta-step (20 optimizee steps, 4 optimizees of 1,210 parameters, exact second-order meta-gradient) against the same
   computation written on `torchopt.MetaOptimizer`, one optimizee and one tensor at a time. Both must give the same
   meta-gradient. Bar: at least 2 times faster.
2. PGD against its limit: as many forward-backward passes (gradient by the input) of the same model and batch. Bar: at most 1.10.
3. `factor_gradients` against one forward-backward pass by the parameters, and by parameters and input. Bar: at most 1.5.
"""

import argparse
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torchopt import pytree
from torchopt.base import GradientTransformation

from benchmarks._common import interleaved, ratio, write
from metarobust.attacks import PGD
from metarobust.meta_optimizers import LSTMOptimizer, factor_gradients
from metarobust.meta_optimizers._layout import Layout, tensor_roles
from metarobust.models import cnn, mlp, stack
from metarobust.threat_models import ThreatModel

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)
STEPS, COPIES, BATCH, EVERY = 20, 4, 64, 5
ATTACK = PGD(threat_model=THREAT_MODEL, steps=5, random_start=False)


def per_tensor_rule(optimizer: LSTMOptimizer, shapes: list[torch.Size], total_steps: int) -> GradientTransformation:
    """The natural way: the LSTM is called on one tensor after the other."""
    layouts = []
    for shape, role in zip(shapes, tensor_roles(shapes), strict=True):
        layout = Layout([shape], stacked=False)
        layout.roles = [role]
        layouts.append(layout)

    def init(params: Any) -> Any:
        leaves = cast("list[Tensor]", pytree.tree_leaves(params))
        return tuple(optimizer.initial_state(p.reshape(1, -1)) for p in leaves)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        moved, states = [], []
        for g, s, p, layout in zip(updates, state, params, layouts, strict=True):
            move, new = optimizer.step(g.reshape(1, -1), None, s, p.reshape(1, -1), layout, total_steps=total_steps)
            moved.append(move.reshape(p.shape))
            states.append(new)
        return tuple(moved), tuple(states)

    return GradientTransformation(init, update)


def meta_step(rounds: int) -> dict[str, Any]:
    """Our meta-step against the loop on ``torchopt.MetaOptimizer``."""
    torch.manual_seed(0)
    optimizer = LSTMOptimizer(gradient_source="gradient")
    models = [mlp([64, 16, 10]) for _ in range(COPIES)]
    starts = [[p.detach().clone() for p in m.parameters()] for m in models]
    x, y = torch.rand(STEPS, COPIES, BATCH, 1, 8, 8), torch.randint(10, (STEPS, COPIES, BATCH))
    fresh_x, fresh_y = torch.rand(COPIES, BATCH, 1, 8, 8), torch.randint(10, (COPIES, BATCH))
    parameters = list(optimizer.parameters())
    template = stack(models)
    names = [name for name, _ in template.named_parameters()]
    rule = optimizer.as_gradient_transformation(total_steps=200, stacked=True)

    def ours() -> tuple[Tensor, ...]:
        params = tuple(torch.stack(group).requires_grad_() for group in zip(*starts, strict=True))
        state, total = rule.init(cast("Any", params)), torch.zeros(())

        def losses(current: tuple[Tensor, ...], inputs: Tensor, targets: Tensor) -> Tensor:
            logits = torch.func.functional_call(template, dict(zip(names, current, strict=True)), (inputs.flatten(0, 1),))
            return F.cross_entropy(logits, targets.flatten(), reduction="none").reshape(COPIES, BATCH).mean(1)

        for step in range(STEPS):
            gradients = torch.autograd.grad(losses(params, x[step], y[step]).sum(), params, create_graph=True)
            updates, state = rule.update(cast("Any", gradients), state, params=cast("Any", params), inplace=False)
            params = cast("Any", torchopt.apply_updates(cast("Any", params), updates, inplace=False))
            if (step + 1) % EVERY == 0:
                frozen = dict(zip(names, (p.detach() for p in params), strict=True))
                flat_x, flat_y = fresh_x.flatten(0, 1), fresh_y.flatten()
                moved = ATTACK(lambda v, f=frozen: torch.func.functional_call(template, f, (v,)), flat_x, flat_y)
                total = total + losses(params, moved.reshape(fresh_x.shape), fresh_y).mean()
        return torch.autograd.grad(total, parameters, allow_unused=True)

    # TorchOpt hands over a module's parameters sorted by name: the bias before its weight.
    ordered = sorted(models[0].named_parameters(), key=lambda entry: (entry[0].split(".")[0], entry[0]))
    shapes = [p.shape for _, p in ordered]

    def loop() -> tuple[Tensor, ...]:
        total = torch.zeros(())
        for copy in range(COPIES):
            model = mlp([64, 16, 10])
            with torch.no_grad():
                for p, s in zip(model.parameters(), starts[copy], strict=True):
                    p.copy_(s)
            meta = torchopt.MetaOptimizer(model, per_tensor_rule(optimizer, shapes, 200))
            for step in range(STEPS):
                meta.step(F.cross_entropy(model(x[step, copy]), y[step, copy]))
                if (step + 1) % EVERY == 0:
                    moved = ATTACK(model, fresh_x[copy], fresh_y[copy])
                    total = total + F.cross_entropy(model(moved), fresh_y[copy]) / COPIES
        return torch.autograd.grad(total, parameters, allow_unused=True)

    worst = 0.0
    for a, b in zip(ours(), loop(), strict=True):
        if a is not None and b is not None:
            worst = max(worst, ((a - b).norm() / b.norm().clamp(min=1e-12)).item())
    if worst > 1e-2:
        raise RuntimeError(f"both ways must give the same meta-gradient, got a relative difference of {worst:.2g}")
    seconds = interleaved({"ours": ours, "loop": loop}, rounds=rounds)
    found = ratio(seconds["loop"], seconds["ours"])
    print(f"meta-step: {found['median']:.2f} times faster than the loop on torchopt.MetaOptimizer {show(found)}; bar >= 2")
    print(f"  meta-gradients differ by {worst:.1e} (relative, worst tensor, float32)")
    return {"speed_up": found, "bar": ">= 2", "seconds": seconds, "meta_gradient_difference": worst}


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp 784-256-256-10, batch 128": (lambda: mlp([784, 256, 256, 10]), (128, 1, 28, 28)),
    "cnn 16-32, 28x28, batch 128": (lambda: cnn([16, 32], image_size=28), (128, 1, 28, 28)),
    "cnn 8-16-32-32, 28x28, batch 128": (lambda: cnn([8, 16, 32, 32], image_size=28), (128, 1, 28, 28)),
    "mlp 64-128-10, 8x8, batch 64": (lambda: mlp([64, 128, 10]), (64, 1, 8, 8)),
    "cnn 8-16, 8x8, batch 64": (lambda: cnn([8, 16]), (64, 1, 8, 8)),
}


def passes(rounds: int) -> dict[str, Any]:
    """PGD and factor gradients against the passes that they cannot do without."""
    results: dict[str, Any] = {}
    for name, (build, shape) in CASES.items():
        torch.manual_seed(0)
        model, x, y = build(), torch.rand(shape), torch.randint(10, shape[:1])
        parameters = list(model.parameters())
        leaf = x.clone().requires_grad_()
        steps = 20
        attack = PGD(threat_model=THREAT_MODEL, steps=steps)

        def input_passes(m: nn.Module = model, v: Tensor = leaf, t: Tensor = y, n: int = steps) -> None:
            for _ in range(n):
                torch.autograd.grad(F.cross_entropy(m(v), t, reduction="sum"), v)

        def by_parameters(m: nn.Module = model, v: Tensor = x, t: Tensor = y, p: list[Any] = parameters) -> Any:
            return torch.autograd.grad(F.cross_entropy(m(v), t), p)

        def by_both(m: nn.Module = model, v: Tensor = leaf, t: Tensor = y, p: list[Any] = parameters) -> Any:
            return torch.autograd.grad(F.cross_entropy(m(v), t), [v, *p])

        def factors(m: nn.Module = model, v: Tensor = x, t: Tensor = y) -> Any:
            return factor_gradients(m, lambda: F.cross_entropy(m(v), t), threat_model=THREAT_MODEL)

        generator = torch.Generator().manual_seed(0)
        whole = interleaved(
            {"pgd": lambda m=model, v=x, t=y, a=attack, g=generator: a(m, v, t, generator=g), "limit": input_passes},
            rounds=rounds,
        )
        single = interleaved({"factors": factors, "parameters": by_parameters, "both": by_both}, rounds=rounds, repeats=20)
        found = {
            "pgd_over_limit": ratio(whole["pgd"], whole["limit"]),
            "factors_over_parameter_pass": ratio(single["factors"], single["parameters"]),
            "factors_over_full_pass": ratio(single["factors"], single["both"]),
        }
        results[name] = found | {"seconds": whole | single}
        print(name)
        print(f"  PGD-{steps} over {steps} passes by the input: {show(found['pgd_over_limit'])}; bar <= 1.10")
        print(f"  factor_gradients over one pass by the parameters: {show(found['factors_over_parameter_pass'])}")
        print(f"  factor_gradients over one pass by parameters and input: {show(found['factors_over_full_pass'])}; bar <= 1.5")
    return results


def show(found: dict[str, float]) -> str:
    """Median and range of a ratio."""
    return f"{found['median']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"


def main() -> None:
    """Run both parts, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; the median is reported with the range")
    parser.add_argument("--out", default="results", help="folder for meta_step.json")
    arguments = parser.parse_args()
    content = {"meta_step": meta_step(arguments.rounds), "passes": passes(arguments.rounds)}
    write("meta_step", content, arguments.out)


if __name__ == "__main__":
    main()

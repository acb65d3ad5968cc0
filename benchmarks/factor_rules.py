"""What the perturbed-factor gradient leaves out: which factor of a weight gradient carries robustness.

    uv run python -m benchmarks.factor_rules [--data digits] [--seeds 6] [--out results]
    METAROBUST_DATA=... uv run python -m benchmarks.factor_rules --data fashion-mnist --seeds 2

A layer's weight gradient is the product of its input a and the gradient d at its output. Training on the adversarial example x'
takes both from x', a' and d'. The rows mix them: a' with d, a with d', both; "the hand-set rule" and the "balanced" moves
estimate a' from the pass at x alone. A balanced move is sized for each example so that every layer sees the same first-order
rise of the loss as the input does under its worst move, 1.5 epsilon here: along the sign of the gradient, along the gradient,
or along the sign in proportion to |a|. "The estimate" is the library's: balanced moves along the sign, and predictions that
change with them (metarobust/meta_optimizers/_adversarial_estimate.py). "Tangents" are the library's too: a' to first order, at
inputs with noise, biases and normalisations left to the clean gradient (_adversarial_tangent.py). The inputs of normalisations
are not moved in rows other than these, except in the one that says so. Digits: a CNN 8-16, 100 training images, 200 steps.
Fashion-MNIST: a residual network 8-16-32 with group
normalisation, 2,000 training images, 400 steps, the learning rate falling to zero. Adam at 0.003 for all rows, l_inf 0.1;
judged on 400 (300) images that are neither training nor test images by PGD-30 on cross-entropy and on the margin, worst of
both. Passes of a step: a forward pass, a backward pass in the inputs, and one in the weights count a third each.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._common import write
from benchmarks._judging import clean_and_robust
from metarobust.attacks import PGD
from metarobust.data import LabelledImages, load, load_digits, split
from metarobust.meta_optimizers import _adversarial_estimate as estimate
from metarobust.meta_optimizers import _adversarial_tangent as tangent
from metarobust.meta_optimizers import record_factors
from metarobust.models import cnn, residual_network
from metarobust.threat_models import ThreatModel

BALL = ThreatModel(norm="linf", epsilon=0.1)
SIZES = {"digits": (100, 400), "fashion-mnist": (2000, 300)}
STEPS = {"digits": 200, "fashion-mnist": 400}
WEIGHTED = (nn.Conv2d, nn.Linear, nn.GroupNorm)


class Pass(NamedTuple):
    """One forward-backward pass: input, its gradient, and the gradient at the output, of each layer; the input's gradient."""

    inputs: dict[nn.Module, Tensor]
    input_gradients: dict[nn.Module, Tensor]
    output_gradients: dict[nn.Module, Tensor]
    gradient: Tensor


def run_pass(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen[layer] = (args[0], out)

    hooks = [layer.register_forward_hook(watch) for layer in model.modules() if isinstance(layer, WEIGHTED)]
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    for hook in hooks:
        hook.remove()
    layers = list(seen)
    wanted = [x, *(seen[layer][0] for layer in layers), *(seen[layer][1] for layer in layers)]
    gradient, *found = torch.autograd.grad(loss, wanted)
    count = len(layers)
    return Pass(
        {layer: seen[layer][0].detach() for layer in layers},
        dict(zip(layers, found[:count], strict=True)),
        dict(zip(layers, found[count:], strict=True)),
        gradient,
    )


def fill(inputs: dict[nn.Module, Tensor], output_gradients: dict[nn.Module, Tensor]) -> None:
    """Give every layer the parameter gradients of these factors."""
    for layer, a in inputs.items():
        parameters = list(layer.parameters())
        with torch.enable_grad():
            out = layer(a)
        for p, gradient in zip(parameters, torch.autograd.grad(out, parameters, output_gradients[layer]), strict=True):
            p.grad = gradient


def worst_move(x: Tensor, gradient: Tensor, size: float) -> Tensor:
    return (x + size * BALL.epsilon * gradient.sign()).clamp(0, 1) - x


Rule = Callable[[nn.Module, Tensor, Tensor, torch.Generator], None]


def mixed(moved_inputs: bool, moved_gradients: bool) -> Rule:
    def fill_gradients(model: nn.Module, x: Tensor, y: Tensor, draw: torch.Generator) -> None:
        here = run_pass(model, x, y)
        there = run_pass(model, x + worst_move(x, here.gradient, 1.0), y) if moved_inputs or moved_gradients else here
        fill((there if moved_inputs else here).inputs, (there if moved_gradients else here).output_gradients)

    return fill_gradients


def estimated(direction: str, size: float = 1.5, inner: float = 0.15, *, gains: bool = False) -> Rule:
    """Inputs moved by an estimate from the pass at x alone; ``gains``: those of normalisations too."""

    def fill_gradients(model: nn.Module, x: Tensor, y: Tensor, draw: torch.Generator) -> None:
        here = run_pass(model, x, y)
        first = worst_move(x, here.gradient, size)
        rise = (here.gradient * first).flatten(1).sum(1)
        inputs: dict[nn.Module, Tensor] = {}
        for number, (layer, a) in enumerate(here.inputs.items()):
            gradient = here.input_gradients[layer]
            if number == 0:
                inputs[layer] = a + first.reshape(a.shape)
            elif isinstance(layer, nn.GroupNorm) and not gains:
                inputs[layer] = a
            elif direction == "hand":
                inputs[layer] = a + inner * a.abs().mean() * gradient.sign()
            else:
                along = {"sign": gradient.sign(), "gradient": gradient, "relative": a.abs() * gradient.sign()}[direction]
                slope = (along * gradient).flatten(1).sum(1).clamp(min=1e-12)
                inputs[layer] = a + along * (rise / slope).reshape(-1, *[1] * (a.dim() - 1))
        fill(inputs, here.output_gradients)

    return fill_gradients


def tangents(*, noise: bool = True, biases: bool = False) -> Rule:
    """g + h by the library's tangents; without the noise; with the h of biases and normalisations."""

    def fill_gradients(model: nn.Module, x: Tensor, y: Tensor, draw: torch.Generator) -> None:
        size = tangent.NOISE if noise else 0.0
        watched = record_factors(model, threat_model=BALL, gradient_source="gradient+adversarial_tangent", generator=draw)
        with patch.object(tangent, "NOISE", size), watched as recorder:
            _, g, h = recorder.gradients(F.cross_entropy(model(x), y))
        for p, clean, change in zip(model.parameters(), g, h, strict=True):
            p.grad = clean + change if biases or p.dim() > 1 else clean

    return fill_gradients


def library(*, ratio: bool = True, shortened: bool = True) -> Rule:
    """g + h of the library's estimate; without the ratio, the prediction stays as it is; or every move is made to its end."""

    def fill_gradients(model: nn.Module, x: Tensor, y: Tensor, draw: torch.Generator) -> None:
        def altered(*inputs: Tensor) -> estimate.Change:
            change = whole(*inputs)
            return change if ratio else change._replace(ratio=torch.ones_like(change.ratio))

        source, whole = "gradient+adversarial_estimate", estimate.predicted_change
        lost = estimate.LOST if shortened else math.inf
        changed = patch.multiple(estimate, predicted_change=altered, LOST=lost)
        with changed, record_factors(model, threat_model=BALL, gradient_source=source) as recorder:
            _, g, h = recorder.gradients(F.cross_entropy(model(x), y))
        for p, clean, change in zip(model.parameters(), g, h, strict=True):
            p.grad = clean + change

    return fill_gradients


def adversarial(steps: int, **settings: Any) -> Rule:
    attack = PGD(threat_model=BALL, steps=steps, **settings)

    def fill_gradients(model: nn.Module, x: Tensor, y: Tensor, draw: torch.Generator) -> None:
        F.cross_entropy(model(attack(model, x, y, generator=draw)), y).backward()

    return fill_gradients


RULES: dict[str, tuple[float, Rule]] = {
    "clean training": (1.0, mixed(False, False)),
    "a' d": (4 / 3, mixed(True, False)),
    "a d'": (5 / 3, mixed(False, True)),
    "a' d' (FGSM from x)": (5 / 3, mixed(True, True)),
    "hand-set rule, 1.5 and 0.15": (1.0, estimated("hand")),
    "balanced, sign": (1.0, estimated("sign")),
    "balanced, gradient": (1.0, estimated("gradient")),
    "balanced, relative": (1.0, estimated("relative")),
    "balanced, relative, normalisations too": (1.0, estimated("relative", gains=True)),
    "estimate, the prediction unchanged": (1.0, library(ratio=False)),
    "estimate, moves not shortened": (1.0, library(shortened=False)),
    "estimate": (1.0, library()),
    "tangents, no noise": (4 / 3, tangents(noise=False)),
    "tangents, biases and normalisations too": (4 / 3, tangents(biases=True)),
    "tangents": (4 / 3, tangents()),
    "FGSM training, random start": (5 / 3, adversarial(1, step_size=1.25 * BALL.epsilon)),
    "PGD-5 training": (13 / 3, adversarial(5)),
}
"""Passes per step, and the rule."""


def parts(data: str, seed: int) -> tuple[LabelledImages, LabelledImages]:
    pool = load_digits() if data == "digits" else load(data, train=True)
    training, judging = split(pool, SIZES[data], generator=torch.Generator().manual_seed(seed))
    return training, judging


def accuracies(data: str, rule: Rule, seed: int) -> tuple[float, float]:
    """Clean and robust accuracy after training with the rule."""
    training, judging = parts(data, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cnn([8, 16]) if data == "digits" else residual_network((8, 16, 32))
    draw, steps = torch.Generator().manual_seed(seed), STEPS[data]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        if data != "digits":
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(training), (64 if data == "digits" else 100,), generator=draw)
        optimizer.zero_grad()
        rule(model, training.images[rows], training.labels[rows], draw)
        optimizer.step()
    return clean_and_robust(model, judging, BALL, steps=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SIZES, default="digits")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--only", nargs="*", choices=RULES, default=list(RULES), help="a part of the rows")
    parser.add_argument("--out", default="results", help="folder for factor_rules_DATA.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| gradient | passes | clean | robust (lowest to highest) |\n|---|---|---|---|")
    found: dict[str, list[tuple[float, float]]] = {}
    for name in arguments.only:
        passes, rule = RULES[name]
        found[name] = [accuracies(arguments.data, rule, seed) for seed in range(arguments.seeds)]
        clean, robust = zip(*found[name], strict=True)
        spread = f"{statistics.mean(robust):.3f} ({min(robust):.3f} to {max(robust):.3f})"
        print(f"| {name} | {passes:.2f} | {statistics.mean(clean):.3f} | {spread} |", flush=True)
    content = {"data": arguments.data, "seeds": arguments.seeds, "clean, robust": found}
    write(f"factor_rules_{arguments.data}", content, arguments.out)


if __name__ == "__main__":
    main()

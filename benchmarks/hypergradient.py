"""How much of the training gradient does BETA training drop when it holds the attacked point constant?

    uv run python -m benchmarks.hypergradient [--seeds 3] [--threads 1] [--out results] [--part gradients | linf | l2]

Multi-layer perceptrons (64-64-64-10) on scikit-learn's digits, trained for 200 steps of PGD-5 adversarial training at the radius
they are measured at. On 64 held-out digits, in float64, the gradient of the mean loss with a hypergradient is compared with the
one that holds the same point constant: the size of their difference over the size of the latter.

- free: share of pixels that neither ball nor box holds at the point of BETA's ten steps of RMSprop (l_inf only);
- unrolled: exact for these ten steps;
- implicit: the implicit function theorem at the point of the same ten steps, converged or not;
- 100 steps: the same at the point of 100 steps of APGD;
- solved: the same at the maximum that Newton's method reaches from there (tanh only: for ReLU it has no second derivative);
- checked: the derivative of the whole bilevel loss along that term by central differences, the maximum solved for anew on both
  sides, less the derivative at the constant point, over what the term predicts; 1 where all is right.

Medians of the seeds, lowest and highest in brackets. At the end, the time of a training step (float32) over that without a
hypergradient. The parts linf (radius 0.2) and l2 (radius 1) take 250 steps of training with each hypergradient instead, and print
the accuracy on 400 held-out digits, clean and under BETA with 30 steps of APGD; mean of the seeds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import interleaved, ratio, write
from metarobust.attacks import BETA, PGD
from metarobust.data import LabelledImages, digits_pools
from metarobust.losses import cross_entropy, targeted_margin
from metarobust.objectives import AdversarialTraining, BETATraining
from metarobust.objectives._hypergradient import (
    conjugate_gradient,
    cross_entropy_at_optimum,
    free_directions,
    hessian_product,
    rival,
)
from metarobust.threat_models import Norm, ThreatModel
from metarobust.types import RobustLoss

CASES: list[tuple[Norm, float]] = [("linf", 0.1), ("linf", 0.2), ("linf", 0.3), ("l2", 0.5), ("l2", 1.0)]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def network(activation: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layer = ACTIVATIONS[activation]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), layer(), nn.Linear(64, 64), layer(), nn.Linear(64, 10))


def trained(model: nn.Sequential, objective: RobustLoss, data: LabelledImages, *, steps: int, size: int) -> nn.Sequential:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = data.select(torch.randint(len(data), (size,)))
        optimizer.zero_grad()
        objective(model, batch.images, batch.labels).mean().backward()
        optimizer.step()
    return model


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))


def both_gradients(objective: RobustLoss, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With the hypergradient, with the same point held constant, and that point."""
    seen: list[Tensor] = []

    def watched(rows: Tensor) -> Tensor:
        seen.append(rows.detach())
        return model(rows)

    full = gradient(objective(watched, x, y, generator=torch.Generator().manual_seed(0)).mean(), model)
    return full, gradient(cross_entropy(model(seen[-1]), y).mean(), model), seen[-1]


def maximised(model: nn.Module, threat_model: ThreatModel, x_adv: Tensor, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Projected Newton steps on the margin of the target: of several lengths, and of the gradient, the best for each example."""
    for _ in range(10):
        point = x_adv.detach().requires_grad_()
        best = targeted_margin(model(point), y, target)
        (slope,) = torch.autograd.grad(best.sum(), point, create_graph=True)
        steepest = slope.detach().flatten(1)
        tangent, multiplier = free_directions(threat_model, x_adv, x, slope.detach())

        def curvature(
            v: Tensor,
            slope: Tensor = slope,
            point: Tensor = point,
            tangent: Callable[[Tensor], Tensor] = tangent,
            multiplier: Tensor = multiplier,
        ) -> Tensor:
            return tangent(multiplier * v - hessian_product(slope, point, v))

        tolerance = 1e-12 * steepest.norm(dim=1, keepdim=True)
        newton, best = conjugate_gradient(curvature, tangent(steepest), tolerance, 64), best.detach()
        begin = x_adv
        for step in (newton, 0.3 * newton, 0.1 * newton, 0.03 * newton, tangent(steepest), 0.1 * tangent(steepest)):
            with torch.no_grad():
                moved = threat_model.project(begin + step.view_as(begin), x)
                reached = targeted_margin(model(moved), y, target)
            x_adv = torch.where((reached > best)[:, None, None, None], moved, x_adv)
            best = torch.maximum(reached, best)
    return x_adv


def checked(model: nn.Module, threat_model: ThreatModel, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Size of the term at the maximum over that of the gradient without it, and the check by central differences."""
    target = rival(model(x_adv), y)
    x_adv = maximised(model, threat_model, x_adv, x, y, target)
    partial = gradient(cross_entropy(model(x_adv), y).mean(), model)
    losses = cross_entropy_at_optimum(model, x_adv, x, y, threat_model, damping=0.0, iterations=64)
    term = gradient(losses.mean(), model) - partial
    direction = term / term.norm()
    start, values = nn.utils.parameters_to_vector(model.parameters()).detach().clone(), []
    for place in (1e-5, -1e-5):
        nn.utils.vector_to_parameters(start + place * direction, model.parameters())
        moved = maximised(model, threat_model, x_adv, x, y, target)
        values.append(cross_entropy(model(moved), y).mean().item())
    nn.utils.vector_to_parameters(start, model.parameters())
    by_differences = (values[0] - values[1]) / 2e-5
    return (term.norm() / partial.norm()).item(), (by_differences - float(partial @ direction)) / float(term @ direction)


def measured(model: nn.Module, threat_model: ThreatModel, x: Tensor, y: Tensor) -> dict[str, float]:
    long = BETA(threat_model=threat_model, steps=100, step_rule="apgd")
    objectives = {
        "unrolled": BETATraining(threat_model=threat_model, hypergradient="unrolled"),
        "implicit": BETATraining(threat_model=threat_model, hypergradient="implicit", iterations=64),
        "100 steps": BETATraining(attack=long, hypergradient="implicit", iterations=64),
    }
    found: dict[str, float] = {}
    for name, objective in objectives.items():
        full, partial, x_adv = both_gradients(objective, model, x, y)
        found[name] = ((full - partial).norm() / partial.norm()).item()
        if name == "implicit" and threat_model.norm == "linf":
            low, high = threat_model.bounds(x)
            found["free"] = ((x_adv > low) & (x_adv < high)).double().mean().item()
        if name == "100 steps" and isinstance(model[2], nn.Tanh):  # type: ignore[index]
            found["solved"], found["checked"] = checked(model, threat_model, x_adv, x, y)
    return found


def step_times(x: Tensor, y: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """A training step with each hypergradient over one without."""
    threat_model, steps = ThreatModel(norm="l2", epsilon=0.5), {}
    for name in ("none", "unrolled", "implicit"):
        model, objective = network("tanh", 0), BETATraining(threat_model=threat_model, hypergradient=name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step(objective: BETATraining = objective, model: nn.Module = model, optimizer: torch.optim.SGD = optimizer) -> None:
            optimizer.zero_grad()
            objective(model, x, y).mean().backward()
            optimizer.step()

        steps[name] = step
    seconds = interleaved(steps, rounds=rounds)
    return {name: ratio(seconds[name], seconds["none"]) for name in ("unrolled", "implicit")}


def training(norm: Norm, data: LabelledImages, held_out: LabelledImages, seeds: int) -> dict[str, Any]:
    """Accuracy in percent, clean and robust, after training with each hypergradient."""
    threat_model = ThreatModel(norm=norm, epsilon=0.2 if norm == "linf" else 1.0)
    judge, content = BETA(threat_model=threat_model, steps=30, step_rule="apgd"), {}
    for activation in ACTIVATIONS:
        for hypergradient in ("none", "unrolled", "implicit")[: 2 if norm == "linf" else 3]:  # in l_inf it needs 100 steps
            objective, rows = BETATraining(threat_model=threat_model, hypergradient=hypergradient), []
            for seed in range(seeds):
                model = trained(network(activation, seed), objective, data, steps=250, size=64)
                x, y = held_out.images, held_out.labels
                x_adv = judge(model, x, y, generator=torch.Generator().manual_seed(0))
                rows.append([100 * (model(points).argmax(1) == y).float().mean().item() for points in (x, x_adv)])
            name = f"{activation}, {norm} {threat_model.epsilon:g}, {hypergradient}"
            clean, robust = (f"{statistics.mean(c):.1f} [{min(c):.1f}, {max(c):.1f}]" for c in zip(*rows, strict=True))
            print(f"{name:26} clean {clean:>19}   robust {robust:>19}", flush=True)
            content[name] = rows
    return content


def gradients(data: LabelledImages, held_out: LabelledImages, seeds: int) -> dict[str, Any]:
    x, y = held_out.images[:64], held_out.labels[:64]
    columns = ("free", "unrolled", "implicit", "100 steps", "solved", "checked")
    print(f"{'network, ball':16}" + "".join(f"{column:>24}" for column in columns))
    content: dict[str, Any] = {}
    for activation in ACTIVATIONS:
        for norm, epsilon in CASES:
            threat_model, rows = ThreatModel(norm=norm, epsilon=epsilon), []
            objective = AdversarialTraining(attack=PGD(threat_model=threat_model, steps=5))
            for seed in range(seeds):
                model = trained(network(activation, seed), objective, data, steps=200, size=128).double()
                rows.append(measured(model, threat_model, x.double(), y))
            cells, name = [], f"{activation}, {norm} {epsilon:g}"
            for column in columns:
                values = [row[column] for row in rows if column in row]
                text = f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]" if values else "-"
                cells.append(f"{text:>24}")
            print(f"{name:16}" + "".join(cells), flush=True)
            content[name] = rows
    content["step_over_step_without"] = step_times(x, y, rounds=15)
    for name, found in content["step_over_step_without"].items():
        print(f"step, {name}: {found['median']:.2f} [{found['lowest']:.2f}, {found['highest']:.2f}] of one without")
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("gradients", "linf", "l2"), default="gradients")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: torch's own choice")
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    begin, (data, held_out, _) = time.perf_counter(), digits_pools(seed=0)
    if arguments.part == "gradients":
        name, content = "hypergradient", gradients(data, held_out, arguments.seeds)
    else:
        name, content = f"hypergradient_{arguments.part}", training(arguments.part, data, held_out, arguments.seeds)
    print(f"{time.perf_counter() - begin:.0f} s")
    write(name, content, arguments.out)


if __name__ == "__main__":
    main()

"""Series of `benchmarks.scale`: attacks, evaluation, the dual solver, training."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torchopt
from torch import Tensor, nn

from benchmarks._scale_measure import Prepared, Series
from metarobust.attacks import APGD, FGSM, PGD, Square, Unrolled
from metarobust.divergences import KL, Alpha, Divergence
from metarobust.dro import worst_case_expectation
from metarobust.evaluation import evaluate
from metarobust.losses import cross_entropy
from metarobust.meta_weighters import CAAT
from metarobust.meta_weighters._hypergradient import hypergradient
from metarobust.meta_weighters._virtual_update import virtual_update
from metarobust.models import mlp
from metarobust.objectives import AdversarialTraining
from metarobust.threat_models import ThreatModel
from metarobust.training import fit

BALL = ThreatModel(norm="linf", epsilon=0.01)
WIDTHS = (64, 256, 1024, 2816)
"""Of the two hidden layers of a perceptron: 55,050 to 10,171,402 parameters."""


def perceptron(width: int, *, pixels: int = 784) -> nn.Sequential:
    """Two hidden layers of equal width. The first class leads by so much that no attack in the ball ends early."""
    model = mlp([pixels, width, width, 10])
    with torch.no_grad():
        cast("nn.Linear", model[-1]).bias[0] += 2
    return model.eval()


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def batch(rows: int, *, pixels: int = 784) -> tuple[Tensor, Tensor]:
    return torch.rand(rows, pixels), torch.zeros(rows, dtype=torch.int64)


ATTACKS: dict[str, tuple[Callable[[int], Any], tuple[int, ...], int]] = {
    "PGD": (lambda steps: PGD(threat_model=BALL, steps=steps), (5, 10, 20, 40), 10),
    "APGD": (lambda steps: APGD(threat_model=BALL, steps=steps), (5, 10, 20, 40), 10),
    "Square": (lambda steps: Square(threat_model=BALL, queries=steps), (25, 50, 100, 200), 50),
}
"""Each with its steps or queries along that axis, and where these are fixed."""


def attacked(name: str, axis: str, size: int) -> Prepared:
    make, _, steps = ATTACKS[name]
    model = perceptron(size if axis == "parameters" else 256)
    x, y = batch(size if axis == "points" else 32)
    attack = make(size if axis == "steps" else steps)

    def run() -> None:
        moved = attack(model, x, y, generator=torch.Generator().manual_seed(0))
        if bool((moved == x).all()):
            raise RuntimeError(f"{name} did not move anything")

    return Prepared(run, parameters_of(model) if axis == "parameters" else size)


def unrolled(recompute: bool, size: int) -> Prepared:
    """The gradient of the loss after an unrolled attack in its step size."""
    model = perceptron(256)
    x, y = batch(64)
    length = torch.tensor(0.01, requires_grad=True)

    def run() -> None:
        attack = Unrolled(
            threat_model=BALL, update_rule=torchopt.sgd(cast("Any", length)), steps=size, activation_checkpointing=recompute
        )
        torch.autograd.grad(cross_entropy(model(attack(model, x, y)), y).mean(), length)

    return Prepared(run, size)


def evaluated(protocol: str, size: int) -> Prepared:
    model, (x, y) = perceptron(64), batch(size)

    def run() -> None:
        found = evaluate(model, (x, y), threat_model=BALL, protocol=protocol)
        if found.worst_case_accuracy < 1:
            raise RuntimeError("the model was meant to withstand every attack")

    return Prepared(run, size)


def dual(divergence: Divergence, size: int) -> Prepared:
    losses = -torch.rand(size).log()

    def run() -> None:
        leaf = losses.clone().requires_grad_()
        worst_case_expectation(leaf, divergence=divergence, radius=0.2).value.backward()

    return Prepared(run, size)


def weights_gradient(method: str, width: int) -> Prepared:
    """The meta-gradient in the weights of 64 examples, by one virtual step."""
    model = perceptron(width)
    (x, y), (meta_x, meta_y) = batch(64), batch(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    named: dict[str, Tensor] = {name: p for name, p in model.named_parameters()}

    def losses(parameters: Any) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)[:, None]

    def meta_loss(parameters: Any) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, parameters, (meta_x,)), meta_y).mean()

    def run() -> None:
        update = virtual_update(optimizer, list(named.values()))
        hypergradient(losses, meta_loss, named, torch.ones(64, 1), update=update, method=method)

    return Prepared(run, parameters_of(model))


def weighted(size: int) -> Prepared:
    """A call of CAAT with its meta-step, and the backward pass."""
    model = perceptron(256)
    x, y = batch(64)
    objective = CAAT(
        threat_model=BALL, meta_data=batch(size), optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        class_counts=[100] * 10, meta_every=1, meta_batch_size=size,
    )  # fmt: skip

    def run() -> None:
        objective(model, x, y, generator=torch.Generator().manual_seed(0)).mean().backward()

    return Prepared(run, size)


def fitted(width: int) -> Prepared:
    """One epoch of 16 steps of FGSM training, set-up included, per step."""
    model, (x, y) = perceptron(width), batch(16 * 128)
    objective = AdversarialTraining(attack=FGSM(threat_model=BALL))

    def run() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        fit(model, objective, (x, y), optimizer=optimizer, epochs=1, batch_size=128, silent=True)

    return Prepared(run, parameters_of(model), per=16)


def series() -> list[Series]:
    made = []
    for name, (_, steps, fixed) in ATTACKS.items():
        told = f"{fixed} {'queries' if name == 'Square' else 'steps'}"
        for axis, sizes, note in (
            ("points", (16, 64, 256, 1024), f"{told}, 269,322 parameters"),
            ("parameters", WIDTHS, f"{told}, 32 points"),
            ("steps", steps, "32 points, 269,322 parameters"),
        ):
            prepare = partial(attacked, name, axis)
            memory = 1.0 if axis == "points" else None
            made.append(Series(part=name, axis=axis, sizes=sizes, prepare=prepare, time=1, memory=memory, note=note))
    for recompute in (False, True):
        part = "Unrolled, checkpointed" if recompute else "Unrolled"
        made.append(
            Series(
                part=part,
                axis="steps",
                sizes=(5, 10, 20, 40, 80),
                prepare=partial(unrolled, recompute),
                time=1,
                memory=1,
                note="meta-gradient in the step size, 64 points",
            )
        )
    for protocol, sizes in (("quick", (500, 2000, 8000)), ("standard", (32, 64, 128))):
        prepare = partial(evaluated, protocol)
        note = "55,000 parameters, every point withstands"
        made.append(
            Series(part=f"evaluate, {protocol}", axis="points", sizes=sizes, prepare=prepare, time=1, memory=1, note=note)
        )
    for told, divergence in (("KL", KL()), ("Alpha 2", Alpha(order=2))):
        sizes = (128, 4096, 65536, 524288)
        prepare, note = partial(dual, divergence), "radius 0.2, with the backward pass"
        made.append(Series(part=f"dual, {told}", axis="batch", sizes=sizes, prepare=prepare, time=1, memory=1, note=note))
    for method in ("jvp", "double_backward"):
        prepare, note = partial(weights_gradient, method), "64 examples, 64 meta-examples"
        part = f"hypergradient, {method}"
        made.append(Series(part=part, axis="parameters", sizes=WIDTHS, prepare=prepare, time=1, memory=1, note=note))
    note = "64 examples, 269,322 parameters, a meta-step in every call"
    sizes = (64, 256, 1024)
    made.append(Series(part="CAAT", axis="meta-batch", sizes=sizes, prepare=weighted, time=1, memory=1, note=note))
    for count in (1, 2):
        part, note = f"fit, {count} process{'es' * (count > 1)}", "joint batch of 128, FGSM, one step"
        sizes = WIDTHS[:3]
        made.append(
            Series(part=part, axis="parameters", sizes=sizes, prepare=fitted, time=1, memory=1, note=note, processes=count)
        )
    return made

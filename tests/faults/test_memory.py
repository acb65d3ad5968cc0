"""Memory stays flat over many calls: no tensor outlives its call, and the process does not grow.

After a warm-up, what lives is counted before and after many calls: tensors that Python's garbage collector knows, their bytes,
and the resident memory of the process. The tolerances are 0 tensors, 0 bytes of tensors, and `RESIDENT` for the process. The
process needs some slack, because the allocator keeps freed pages and torch's own caches fill with use; over a thousand calls
it is 16 KiB per call, less than one kept graph of the smallest network here.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchopt
from bad_inputs import BALL, X, Y, generator, labelled, network
from torch import Tensor, nn

from metarobust.attacks import APGD, BETA, PGD, Square, Unrolled
from metarobust.divergences import KL, Alpha, Renyi
from metarobust.dro import worst_case_expectation
from metarobust.meta_optimizers import (
    ClassificationTask,
    InterpretableOptimizer,
    LSTMOptimizer,
    MetaTrainingSettings,
    factor_gradients,
)
from metarobust.meta_optimizers._meta_training import MetaTrainingRun
from metarobust.meta_weighters import CAAT
from metarobust.models import mlp

RESIDENT = 16 * 2**20
WARM_UP = 5
PAGE = 4096


class Footprint(NamedTuple):
    tensors: int
    bytes: int
    resident: int


def footprint() -> Footprint:
    """What lives now, once garbage is collected."""
    gc.collect()
    living = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    size = sum(t.numel() * t.element_size() for t in living)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    return Footprint(len(living), size, resident)


def growth(call: Callable[[], object], calls: int) -> Footprint:
    """By how much ``calls`` calls after a warm-up leave more alive than there was."""
    for _ in range(WARM_UP):
        call()
    before = footprint()
    for _ in range(calls):
        call()
    after = footprint()
    return Footprint(*(b - a for a, b in zip(before, after, strict=True)))


def attack(kind: Callable[..., object], **settings: object) -> Callable[[], object]:
    model, attack = network(), kind(threat_model=BALL, **settings)
    return lambda: attack(model, X, Y, generator=generator())  # type: ignore[operator]


def unrolled() -> Callable[[], object]:
    """An attack that is differentiated through, down to the learning rate of its rule and the parameters."""
    model, rule = network(), LSTMOptimizer(gradient_source="gradient", hidden_size=2, initial_learning_rate=0.02)
    parameters = [*rule.parameters(), *model.parameters()]

    def call() -> None:
        transformation = rule.as_gradient_transformation(total_steps=3, stacked=True)
        x_adv = Unrolled(threat_model=BALL, update_rule=transformation, steps=3)(model, X, Y)
        torch.autograd.grad(F.cross_entropy(model(x_adv), Y), parameters, allow_unused=True)

    return call


def unrolled_by_sgd() -> Callable[[], object]:
    model = network()

    def call() -> None:
        x_adv = Unrolled(threat_model=BALL, update_rule=torchopt.sgd(0.1), steps=3)(model, X, Y)
        F.cross_entropy(model(x_adv), Y).backward()
        model.zero_grad()

    return call


def dual() -> Callable[[], object]:
    """Value and weights differentiated in losses and radius, for each divergence in turn."""
    divergences = [KL(), Alpha(order=2.0), Renyi(order=0.5)]
    turn = iter(range(10**9))

    def call() -> None:
        losses = torch.rand(32, generator=generator(), requires_grad=True)
        radius = torch.tensor(0.1, requires_grad=True)
        worst = worst_case_expectation(losses, divergence=divergences[next(turn) % 3], radius=radius)
        (slope,) = torch.autograd.grad(worst.value, losses, create_graph=True)
        ((worst.weights * slope).sum() + slope.square().sum()).backward()

    return call


def factors() -> Callable[[], object]:
    model = network()
    return lambda: factor_gradients(model, lambda: F.cross_entropy(model(X), Y), threat_model=BALL)


def caat() -> Callable[[], object]:
    """Training steps with a meta-step in every second one."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objective = CAAT(threat_model=BALL, meta_data=(X, Y), optimizer=optimizer, class_counts=[2, 2, 2], steps=2, meta_every=2)

    def call() -> None:
        optimizer.zero_grad()
        objective(model, X, Y, generator=generator()).mean().backward()
        optimizer.step()

    return call


def truncations(rule: nn.Module, estimator: str) -> Callable[[], object]:
    """Meta-updates, each through a truncated unroll; tasks end and begin anew on the way."""

    def task(draw: torch.Generator) -> ClassificationTask:
        subsets = torch.stack([torch.randperm(30, generator=draw)[:12] for _ in range(2)])
        return ClassificationTask(
            build=lambda: mlp([64, 4, 3]), dataset=labelled(), subsets=subsets, threat_model=BALL, batch_size=4
        )

    settings = MetaTrainingSettings(
        iterations=1000,
        total_steps=6,
        unroll=2,
        slots=1,
        learning_rate=0.01,
        clip_norm=1.0,
        loss_cap=10.0,
        late_weight=0.0,
        meta_loss_every=1,
        seed=0,
        estimator=estimator,
    )
    return MetaTrainingRun(rule, task, settings).advance  # type: ignore[arg-type]


WORK: dict[str, tuple[Callable[[], Callable[[], object]], int, int]] = {
    "PGD": (lambda: attack(PGD, steps=3, restarts=2), 1000, 20),
    "APGD": (lambda: attack(APGD, steps=4), 1000, 10),
    "BETA": (lambda: attack(BETA, steps=3), 1000, 10),
    "Square": (lambda: attack(Square, queries=10), 1000, 10),
    "Unrolled, LSTM": (unrolled, 1000, 10),
    "Unrolled, SGD": (unrolled_by_sgd, 1000, 20),
    "dual": (dual, 1000, 30),
    "factor_gradients": (factors, 200, 10),
    "CAAT": (caat, 200, 10),
    "truncations, LSTM": (lambda: truncations(LSTMOptimizer(hidden_size=2), "second_order"), 100, 6),
    "truncations, interpretable": (lambda: truncations(InterpretableOptimizer(), "pes"), 100, 6),
}
"""Name: what is called, how often with ``-m slow``, how often by default."""


def check(name: str, calls: int) -> None:
    grown = growth(WORK[name][0](), calls)
    print(f"\n{name}: {calls} calls, {grown.tensors:+d} tensors, {grown.bytes:+d} bytes, {grown.resident / 2**20:+.2f} MiB")
    assert grown.tensors <= 0, f"{grown.tensors} tensors outlive {calls} calls"
    assert grown.bytes <= 0, f"{grown.bytes} bytes of tensors outlive {calls} calls"
    assert grown.resident <= RESIDENT, f"the process grows by {grown.resident / 2**20:.1f} MiB over {calls} calls"


@pytest.mark.parametrize("name", WORK)
def test_memory_is_flat(name: str) -> None:
    check(name, WORK[name][2])


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_memory_is_flat_over_many_calls(name: str) -> None:
    check(name, WORK[name][1])


def test_the_check_sees_a_tensor_that_is_kept() -> None:
    """One loss with its graph, as a running sum without ``.item()`` would keep it."""
    model, kept = network(), []
    grown = growth(lambda: kept.append(F.cross_entropy(model(X), Y)), 10)
    assert grown.tensors >= 10  # each with what its graph saved
    assert grown.bytes >= 40


def test_the_check_sees_memory_that_is_no_tensor() -> None:
    """Two mebibytes per call, which the garbage collector does not list."""
    kept: list[bytes] = []
    grown = growth(lambda: kept.append(b"\1" * 2**21), 20)
    assert grown.tensors == 0
    assert grown.resident > RESIDENT

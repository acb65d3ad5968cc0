"""Series of `benchmarks.scale`: gradient streams, steps of the learned optimizers, meta-gradients, meta-training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._scale_learning import BALL, WIDTHS, batch, parameters_of, perceptron
from benchmarks._scale_measure import Prepared, Series
from metarobust.attacks import PGD
from metarobust.data import load_digits
from metarobust.meta_optimizers import (
    ClassificationTask,
    InterpretableOptimizer,
    LSTMOptimizer,
    MetaTrainingSettings,
    factor_gradients,
    record_factors,
)
from metarobust.meta_optimizers._meta_training import MetaTrainingRun
from metarobust.models import mlp

SOURCE = "gradient+perturbed_factors"
RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, foreach=True),
    "interpretable": lambda parameters: InterpretableOptimizer(gradient_source=SOURCE).torch_optimizer(
        parameters, total_steps=1000
    ),
    "LSTM": lambda parameters: LSTMOptimizer(gradient_source=SOURCE).torch_optimizer(parameters, total_steps=1000),
}


def stepped(rule: str, width: int) -> Prepared:
    """A step of an update rule; the first call makes its state, so memory holds state and temporaries."""
    model, (x, y) = perceptron(width), batch(8)
    with record_factors(model, threat_model=BALL, gradient_source=SOURCE) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    optimizer = RULES[rule](model.parameters())
    count = parameters_of(model)

    def run() -> dict[str, float]:
        optimizer.step()
        kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return {"state_bytes_per_parameter": sum(value.numel() * value.element_size() for value in kept) / count}

    return Prepared(run, count)


def streams(source: str, axis: str, size: int) -> Prepared:
    model = perceptron(size if axis == "parameters" else 256)
    x, y = batch(size if axis == "batch" else 32)

    def run() -> None:
        factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=BALL, gradient_source=source)

    return Prepared(run, parameters_of(model) if axis == "parameters" else size)


def meta_run(
    *, copies: int = 4, unroll: int = 10, estimator: str = "second_order", tasks: int = 1, **more: Any
) -> MetaTrainingRun:
    """A run on perceptrons 64-16-10 (1,210 parameters a copy) on the digits, judged under PGD-5 every fifth step."""
    digits, settings = load_digits(), {"loss_cap": 10.0, "late_weight": 1.0, "meta_loss_every": 5, "clip_norm": 1.0}

    def sample(generator: torch.Generator) -> ClassificationTask:
        subsets = torch.stack([torch.randperm(len(digits), generator=generator)[:100] for _ in range(copies)])
        attack = PGD(threat_model=BALL, steps=5)
        return ClassificationTask(
            build=lambda: mlp([64, 16, 10]),
            dataset=digits,
            subsets=subsets,
            threat_model=BALL,
            gradient_source=SOURCE,
            meta_attack=attack,
        )

    return MetaTrainingRun(
        LSTMOptimizer(gradient_source=SOURCE),
        sample,
        MetaTrainingSettings(
            iterations=10**6, total_steps=10**6, unroll=unroll, slots=tasks, tasks_per_step=tasks, learning_rate=1e-6, seed=0,
            estimator=estimator, **settings, **more,
        ),
    )  # fmt: skip


def meta_gradient(way: str, size: int) -> Prepared:
    """One meta-update through ``size`` steps."""
    if way == "recomputed":
        run = meta_run(unroll=size, recompute_every=max(1, round(size**0.5)))
    else:
        run = meta_run(unroll=size, estimator="pes" if way == "PES" else "second_order")
    return Prepared(lambda: {"loss": run.advance()}, size)


def meta_trained(tasks: int, size: int) -> Prepared:
    """One meta-update through 10 steps of ``size`` copies in each of the tasks."""
    run = meta_run(copies=size, tasks=tasks)
    return Prepared(lambda: {"loss": run.advance()}, size)


def series() -> list[Series]:
    made = []
    for rule in RULES:
        prepare, note = partial(stepped, rule), "one step, without the gradient"
        made.append(Series(part=f"step, {rule}", axis="parameters", sizes=WIDTHS, prepare=prepare, time=1, memory=1, note=note))
    for source in (SOURCE, "gradient+adversarial_tangent"):
        part = f"factor_gradients, {source.rpartition('_')[2]}"
        for axis, sizes, note in (
            ("parameters", WIDTHS, "32 examples"),
            ("batch", (32, 256, 2048), "269,322 parameters"),
        ):
            prepare = partial(streams, source, axis)
            made.append(Series(part=part, axis=axis, sizes=sizes, prepare=prepare, time=1, memory=1, note=note))
    for way, memory in (("whole graph", 1), ("recomputed", 0.5), ("PES", 0)):
        prepare, note = partial(meta_gradient, way), "LSTM, 4 copies of 1,210 parameters"
        made.append(
            Series(
                part=f"meta-gradient, {way}",
                axis="unroll length",
                sizes=(5, 10, 20, 40),
                prepare=prepare,
                time=1,
                memory=memory or None,
                note=note,
            )
        )
    for tasks, count in ((1, 1), (2, 1), (2, 2)):
        part = f"meta-training, {tasks} task{'s' * (tasks > 1)}, {count} process{'es' * (count > 1)}"
        prepare, note = partial(meta_trained, tasks), "LSTM, unroll 10, 1,210 parameters a copy"
        made.append(
            Series(part=part, axis="optimizees", sizes=(1, 4, 16), prepare=prepare, time=1, memory=1, note=note, processes=count)
        )
    return made

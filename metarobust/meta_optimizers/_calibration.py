"""Setting the strength of the second stream by whole training runs, where truncated back-propagation sees only a window."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from metarobust._checks import finite, integer, message, require
from metarobust._randomness import torch_seed
from metarobust.meta_optimizers._estimators import advanced
from metarobust.meta_optimizers._kinds import MetaOptimizer, check_source
from metarobust.meta_optimizers._tasks import ClassificationTask
from metarobust.types import Task


class Calibration(NamedTuple):
    """What `calibrate` chose.

    Attributes:
        offsets: added to the coefficients of (first layer, other layers).
        scores: mean accuracy of every pair tried.
    """

    offsets: tuple[float, float]
    scores: dict[tuple[float, float], float]


def train_optimizees(
    task: Task, rule: GradientTransformation, *, total_steps: int, generator: torch.Generator, keep: Sequence[int] = ()
) -> dict[int, tuple[Tensor, ...]]:
    """Train a task's optimizees with a fixed rule; parameters after ``total_steps`` and at the steps to ``keep``.

    Args:
        task: whose optimizees start from fresh parameters.
        rule: a TorchOpt transformation that reads `metarobust.types.Streams` of stacked copies.
        total_steps: of the run.
        generator: of all randomness, on the CPU.
        keep: steps whose parameters are wanted besides; 0 is the start.
    """
    integer("total_steps", total_steps, least=1)
    if not isinstance(rule, GradientTransformation):
        remedy = "write torchopt.chain(gradients_only(), torchopt.adam(3e-3))"
        raise TypeError(message("rule", "a TorchOpt GradientTransformation that takes two streams", repr(rule), remedy))
    parameters = task.initial_parameters(generator=generator)
    state = rule.init(cast("Any", parameters))
    kept = {0: parameters}
    for step in range(1, total_steps + 1):
        _, streams = task.streams(parameters, generator=generator)
        with torch.no_grad():
            parameters, state = advanced(task, rule, streams, state, parameters)
        if step in keep or step == total_steps:
            kept[step] = parameters
    return kept if 0 in keep else {step: p for step, p in kept.items() if step}


def calibrate(
    meta_optimizer: MetaOptimizer,
    tasks: Sequence[ClassificationTask],
    *,
    total_steps: int,
    first: Sequence[float] = (0.0, 0.75, 1.5, 2.25, 3.0),
    others: Sequence[float] = (0.0, 0.15, 0.3),
    seed: int = 0,
) -> Calibration:
    r"""Choose constant offsets of the factor coefficients by whole training runs on validation tasks.

    Truncated back-propagation judges a coefficient by what it does within one window, and there a strong second stream costs
    more than it brings; over a whole run the balance is different. This tries every pair of offsets, for the first layer's
    coefficient and for the others', trains each task for ``total_steps`` and scores the accuracy on the task's own judging
    examples (attacked by the task's ``meta_attack``). Of the pairs that are not worse than the best one by more than two standard
    errors of the paired difference over optimizees, the smallest wins: differences within noise must not move anything (after
    the rule of Breiman et al., 1984, section 3.4.3; two errors, because the best of many pairs is flattered). It is added to the
    meta-optimizer in place and recorded.

    Args:
        meta_optimizer: reads two streams.
        tasks: tasks that neither meta-training nor deployment uses; all pairs see the same tasks and the same randomness.
        total_steps: optimizee steps of a run, as in deployment.
        first: offsets tried for the first layer's coefficient, in multiples of epsilon; 0 should be among them, and a choice at
            the far end asks for a wider range.
        others: offsets tried for the other layers' coefficient.
        seed: of the runs.

    Raises:
        ValueError: the meta-optimizer reads one stream, or there is no task.
    """
    require(meta_optimizer.two_streams, "meta_optimizer", "one that reads two streams", "one that reads the gradient alone")
    require(len(tasks) > 0, "tasks", "at least one task", "none")
    for task in tasks:
        check_source(meta_optimizer, task, "tasks")
    integer("total_steps", total_steps, least=1)
    for name, offsets in (("first", first), ("others", others)):
        require(len(offsets) > 0, name, "at least one offset", "none")
        for offset in offsets:
            finite(name, offset)
    assert meta_optimizer.factor_coefficient is not None
    start = meta_optimizer.factor_coefficient.detach().clone()
    found: dict[tuple[float, float], Tensor] = {}
    try:
        for pair in product(first, others):
            meta_optimizer.shift_factor_coefficients(first=pair[0], others=pair[1])
            rule = meta_optimizer.as_gradient_transformation(total_steps=total_steps, stacked=True)
            accuracies = []
            for number, task in enumerate(tasks):
                generator = torch.Generator().manual_seed(torch_seed(seed + number))
                final = train_optimizees(task, rule, total_steps=total_steps, generator=generator)[total_steps]
                accuracies.append(task.meta_accuracy(final, generator=generator))
            found[pair] = torch.cat(accuracies)
            meta_optimizer.factor_coefficient.data.copy_(start)
    finally:  # an interrupt leaves the coefficients as they were
        meta_optimizer.factor_coefficient.data.copy_(start)
    chosen = smallest_within_noise(found)
    scores = {pair: accuracy.mean().item() for pair, accuracy in found.items()}
    meta_optimizer.shift_factor_coefficients(first=chosen[0], others=chosen[1])
    meta_optimizer.record["calibration"] = {
        "first": chosen[0],
        "others": chosen[1],
        "scores": [{"first": pair[0], "others": pair[1], "score": score} for pair, score in scores.items()],
    }
    return Calibration(chosen, scores)


def smallest_within_noise(found: dict[tuple[float, float], Tensor]) -> tuple[float, float]:
    """The smallest pair whose mean lies within two standard errors (of the paired difference) of the best pair's mean."""
    best = max(found, key=lambda pair: found[pair].mean().item())

    def within(pair: tuple[float, float]) -> bool:
        difference = found[best] - found[pair]
        error = difference.std() / math.sqrt(len(difference)) if len(difference) > 1 else torch.zeros(())
        return bool(difference.mean() <= 2 * error)

    return min((pair for pair in found if within(pair)), key=lambda pair: (abs(pair[0]) + abs(pair[1]), pair))

"""The demo's experiment: meta-training tasks, targets, rules to compare, and how each is judged. Pure functions of seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torchopt
from torch import Tensor, nn
from torchopt.base import GradientTransformation

from metarobust._randomness import torch_seed
from metarobust.attacks import PGD, count_calls
from metarobust.data import LowDataTasks, Pools, digits_pools
from metarobust.evaluation import evaluate
from metarobust.meta_optimizers import (
    ClassificationTask,
    LSTMOptimizer,
    calibrate,
    combine_factors,
    gradients_only,
    load,
    meta_train,
    save,
    train_optimizees,
)
from metarobust.models import cnn, mlp
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)

META_ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "mlp 64-16-10": partial(mlp, [64, 16, 10]),
    "mlp 64-48-10": partial(mlp, [64, 48, 10]),
    "cnn 4-8": partial(cnn, [4, 8]),
}
TARGETS: dict[str, Callable[[], nn.Module]] = {"mlp": partial(mlp, [64, 128, 10]), "cnn": partial(cnn, [8, 16])}
TARGET_NAMES = {"mlp": "MLP 64-128-10", "cnn": "CNN 8-16"}

LEARNED = ("lstm", "lstm_one_stream", "control")
ABLATIONS = ("uncalibrated", "first_order")
METHODS = (*LEARNED, "factor_rule", "adam", "sgd_momentum", "pgd_adversarial_training")
LEARNING_RATES = {
    "adam": (3e-4, 1e-3, 3e-3, 1e-2),
    "sgd_momentum": (3e-3, 1e-2, 3e-2, 1e-1),
    "factor_rule": (3e-3,),
    "pgd_adversarial_training": (3e-3, 1e-2),
}
FACTOR_RULE = {"first": 1.5, "others": 0.15}


JUDGES: dict[str, Attack] = {
    "pgd-20": PGD(threat_model=THREAT_MODEL, steps=20),
    "margin-pgd-20": PGD(threat_model=THREAT_MODEL, steps=20, loss="margin"),
    "pgd-100x3": PGD(threat_model=THREAT_MODEL, steps=100, restarts=3),
    "margin-pgd-100x3": PGD(threat_model=THREAT_MODEL, steps=100, restarts=3, loss="margin"),
}
"""Attacks on the trained targets. `evaluate`'s protocols are stronger and dearer: 84 networks are judged here."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The numbers that the default and the quick demo differ in, and those they share."""

    iterations: int = 300
    seeds: int = 6
    judged_by: tuple[str, ...] = ("pgd-100x3", "margin-pgd-100x3")
    seed: int = 0
    total_steps: int = 200
    target_examples: int = 100
    calibration_first: tuple[float, ...] = (0.0, 0.75, 1.5, 2.25, 3.0)
    calibration_others: tuple[float, ...] = (0.0, 0.15, 0.3)
    curve_steps: tuple[int, ...] = (0, 10, 25, 50, 100, 200)


def demo_settings(*, quick: bool, seed: int) -> DemoSettings:
    """The default settings, or the quick ones."""
    if quick:
        return DemoSettings(
            iterations=24,
            total_steps=100,
            seeds=3,
            judged_by=("pgd-20", "margin-pgd-20"),
            seed=seed,
            calibration_first=(0.0, 1.0),
            calibration_others=(0.0,),
            curve_steps=(0, 25, 50, 100),
        )
    return DemoSettings(seed=seed)


@cache
def pools(seed: int) -> Pools:
    """The digits, split into disjoint meta-training, target and test pools."""
    return digits_pools(seed)


def bound_on_test(settings: DemoSettings) -> dict[str, Any]:
    """The best that any classifier can do on the test pool: its risk lies between lower and upper, on these points alone."""
    from metarobust.bounds import adversarial_risk_bound  # slow to import, and needed once

    test = pools(settings.seed).test
    bound = adversarial_risk_bound(test.images, test.labels, THREAT_MODEL)
    return {name: getattr(bound, name) for name in ("lower", "upper", "exact", "order", "examples")}


def sample_meta_task(settings: DemoSettings, attack: Attack | None, generator: torch.Generator) -> ClassificationTask:
    """Four copies of a random architecture, each on its own low-data task of 100 to 200 examples of the meta-training pool."""
    names = list(META_ARCHITECTURES)
    name = names[int(torch.randint(len(names), (), generator=generator))]
    examples = int(torch.randint(100, 201, (), generator=generator))
    return meta_task(settings, name, examples, attack, generator)


def meta_task(
    settings: DemoSettings, architecture: str, examples: int, attack: Attack | None, generator: torch.Generator, copies: int = 4
) -> ClassificationTask:
    """Copies of an architecture, each on its own ``examples`` of the meta-training pool."""
    pool = pools(settings.seed).meta_train
    tasks = LowDataTasks(dataset=pool, examples=examples)
    return ClassificationTask(
        build=META_ARCHITECTURES[architecture],
        dataset=pool,
        subsets=torch.stack([tasks.sample_indices(generator) for _ in range(copies)]),
        threat_model=THREAT_MODEL,
        meta_attack=attack,
    )


def meta_train_variant(
    settings: DemoSettings, variant: str, path: Path, on_iteration: Callable[[int, float], None]
) -> list[float]:
    """Meta-train one of the :data:`LEARNED` variants or :data:`ABLATIONS`, save it to ``path``, and return its meta-losses.

    The control is judged on clean examples throughout, in meta-training and in calibration.
    """
    torch.manual_seed(torch_seed(settings.seed))
    source = "gradient" if variant == "lstm_one_stream" else "gradient+perturbed_factors"
    attack = None if variant == "control" else PGD(threat_model=THREAT_MODEL, steps=5)
    trained = meta_train(
        LSTMOptimizer(gradient_source=source),
        partial(sample_meta_task, settings, attack),
        iterations=settings.iterations,
        total_steps=settings.total_steps,
        estimator="first_order" if variant == "first_order" else "second_order",
        seed=settings.seed,
        silent=True,
        on_iteration=on_iteration,
    )
    if trained.meta_optimizer.two_streams and variant != "uncalibrated":
        generator = torch.Generator().manual_seed(torch_seed(settings.seed + 1))
        judge = None if variant == "control" else PGD(threat_model=THREAT_MODEL, steps=10)
        calibrate(
            trained.meta_optimizer,
            [meta_task(settings, name, settings.target_examples, judge, generator, copies=6) for name in META_ARCHITECTURES],
            total_steps=settings.total_steps,
            first=settings.calibration_first,
            others=settings.calibration_others,
        )
    save(trained.meta_optimizer, path)
    return trained.losses


def target_task(settings: DemoSettings, target: str, attack: Attack | None = None) -> ClassificationTask:
    """One copy of the target architecture per seed, each on its own 100 examples of the target pool."""
    pool = pools(settings.seed).target
    tasks = LowDataTasks(dataset=pool, examples=settings.target_examples)
    seeds = [torch.Generator().manual_seed(torch_seed(1000 * (settings.seed + 1) + s)) for s in range(settings.seeds)]
    return ClassificationTask(
        build=TARGETS[target],
        dataset=pool,
        subsets=torch.stack([tasks.sample_indices(generator) for generator in seeds]),
        threat_model=THREAT_MODEL,
        training_attack=attack,
    )


def update_rule(settings: DemoSettings, method: str, learning_rate: float | None, path: Path | None) -> GradientTransformation:
    """The rule that moves the parameters under ``method``; the learned ones are loaded from their files."""
    if method in LEARNED + ABLATIONS:
        assert path is not None
        rule = load(path)
        learned = rule.as_gradient_transformation(total_steps=settings.total_steps, stacked=True)
        return learned if rule.two_streams else torchopt.chain(gradients_only(), learned)
    assert learning_rate is not None
    if method == "sgd_momentum":
        return torchopt.chain(gradients_only(), torchopt.sgd(learning_rate, momentum=0.9))
    streams = combine_factors(**FACTOR_RULE, stacked=True) if method == "factor_rule" else gradients_only()
    return torchopt.chain(streams, torchopt.adam(learning_rate))


def stacked_robust_accuracy(task: ClassificationTask, parameters: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
    """Accuracy of each copy on its own rows ``x [copies * n, ...]`` under PGD-20 on both losses, shape ``[copies]``."""
    model, generator = task.model(parameters), torch.Generator().manual_seed(0)
    right = torch.ones(len(x), dtype=torch.bool)
    for loss in ("cross_entropy", "margin"):
        x_adv = PGD(threat_model=THREAT_MODEL, steps=20, loss=loss)(model, x, y, generator=generator)
        with torch.no_grad():
            right &= model(x_adv).argmax(1) == y
    return right.reshape(task.optimizees, -1).float().mean(1)


def validation_accuracy(task: ClassificationTask, parameters: tuple[Tensor, ...]) -> float:
    """Mean robust accuracy on the part of the target pool that a copy was not trained on: what learning rates are chosen by."""
    rows = task.held_out.flatten()
    return stacked_robust_accuracy(task, parameters, task.dataset.images[rows], task.dataset.labels[rows]).mean().item()


def run_method(settings: DemoSettings, target: str, method: str, path: Path | None) -> dict[str, Any]:
    """Train the target with one method, its learning rate chosen on validation, and judge it on the test pool."""
    with count_calls() as during_training:
        attack = PGD(threat_model=THREAT_MODEL, steps=5) if method == "pgd_adversarial_training" else None
        task = target_task(settings, target, attack)
        runs = {}
        for rate in LEARNING_RATES.get(method, (None,)):
            runs[rate] = train_optimizees(
                task,
                update_rule(settings, method, rate, path),
                total_steps=settings.total_steps,
                generator=torch.Generator().manual_seed(torch_seed(settings.seed)),  # the same start for every method
                keep=settings.curve_steps,
            )
    chosen, scores = None, {}
    if len(runs) > 1:
        scores = {rate: validation_accuracy(task, kept[settings.total_steps]) for rate, kept in runs.items()}
    chosen = max(scores, key=lambda rate: scores[rate]) if scores else next(iter(runs))
    kept = runs[chosen]
    test = pools(settings.seed).test
    x, y = test.images.repeat(task.optimizees, 1, 1, 1), test.labels.repeat(task.optimizees)
    curve = {step: stacked_robust_accuracy(task, parameters, x, y).tolist() for step, parameters in kept.items()}
    reports = [
        evaluate(
            model,
            test,
            threat_model=THREAT_MODEL,
            attacks={name: JUDGES[name] for name in settings.judged_by},
            batch_size=len(test),
            seed=settings.seed,
            reliability_checks=False,
        )
        for model in copies(TARGETS[target], kept[settings.total_steps])
    ]
    return {
        "target": target,
        "method": method,
        "learning_rate": chosen,
        "validation": {str(rate): score for rate, score in scores.items()},
        "attack_calls": during_training.calls,
        "calibration": load(path).record.get("calibration") if path is not None else None,
        "clean": [report.clean_accuracy for report in reports],
        "robust": [report.worst_case_accuracy for report in reports],
        "attacks": reports[0].attacks,
        "curve": curve,
    }


def copies(build: Callable[[], nn.Module], parameters: Sequence[Tensor]) -> list[nn.Module]:
    """Stacked parameters as separate plain modules, in evaluation mode."""
    modules = []
    for copy in range(len(parameters[0])):
        module = build().eval().requires_grad_(False)
        with torch.no_grad():
            for own, stacked in zip(module.parameters(), parameters, strict=True):
                own.copy_(stacked[copy])
        modules.append(module)
    return modules

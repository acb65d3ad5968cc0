"""How ``metarobust transfer`` trains: one run with a learned meta-optimizer, and one per learning rate of a baseline."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust._randomness import generator_for
from metarobust._tensors import seeded
from metarobust.attacks import PGD, count_calls
from metarobust.data import LabelledImages, minibatch
from metarobust.meta_optimizers import InterpretableOptimizer, LSTMOptimizer
from metarobust.objectives import AdversarialTraining
from metarobust.threat_models import ThreatModel

CLEAN = ("adam", "adamw", "sgd")
"""Baselines that see clean examples alone."""
LEARNING_RATES = {"adam": (3e-4, 1e-3, 3e-3, 1e-2), "adamw": (1e-3, 3e-3, 1e-2), "sgd": (0.01, 0.03, 0.1),
                  "fgsm": (1e-3, 3e-3, 1e-2), "pgd": (1e-3, 3e-3, 1e-2)}  # fmt: skip
"""What a baseline chooses from; each falls to 0 in equal steps over the run."""
WEIGHT_DECAY = 0.1
"""Of adamw."""
MOMENTUM = 0.9
"""Of sgd."""
PASSES = {"adam": 1.0, "adamw": 1.0, "sgd": 1.0, "fgsm": 5 / 3, "pgd": 13 / 3}
"""Of one step: a third each for a forward pass and for the backward passes to inputs and to weights. The attack's steps take the
first two."""
VALIDATION_STEPS = 20
"""Of the PGD that learning rates are chosen by."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all methods share.

    Attributes:
        initial: never trained itself.
        validation: None where nothing has to be chosen.
        advance: called once per step, for a progress bar.
    """

    initial: nn.Module
    train: LabelledImages
    validation: LabelledImages | None
    threat_model: ThreatModel
    steps: int
    batch_size: int
    seed: int
    advance: Callable[[int], object] = lambda steps: None

    def descend(self, model: nn.Module, step: Callable[[Tensor, Tensor, torch.Generator], None]) -> int:
        """Take all steps on a model in training mode; returns how many attacks were called, counted and not assumed.

        Minibatches are the same for every method; dropout draws from the seed too (on the CPU).
        """
        order, noise = (generator_for(self.seed, f"transfer {what}", 0) for what in ("order", "noise"))
        model.train()
        with count_calls() as counter, seeded(generator_for(self.seed, "transfer dropout", 0)):
            for _ in range(self.steps):
                batch = minibatch(self.train, self.batch_size, generator=order)
                step(batch.images, batch.labels, noise)
                self.advance(1)
        model.eval()
        return counter.calls


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The model that a method ended with, in evaluation mode.

    Attributes:
        learning_rate: the chosen one; None for the meta-optimizer, which has its own.
        passes_per_step: 1 for a clean step, see `PASSES`.
        attack_calls: during the training, of the chosen run.
        candidates: robust accuracy on held-out examples by learning rate; None for a run that was not finite.
        notes: what the optimizer warned of.
    """

    name: str
    model: nn.Module
    learning_rate: float | None
    steps: int
    passes_per_step: float
    attack_calls: int
    candidates: dict[float, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def passes(self) -> float:
        """Of the chosen run."""
        return self.steps * self.passes_per_step


def train_with(rule: InterpretableOptimizer | LSTMOptimizer, name: str, setting: Setting) -> Trained:
    """Train by the learned rule, on clean examples.

    Raises:
        FloatingPointError: the weights did not stay finite.
    """
    model = copy.deepcopy(setting.initial)
    rule = rule.to(next(model.parameters()).device)
    optimizer: Any = rule.torch_optimizer(model.parameters(), total_steps=setting.steps)

    def step(x: Tensor, y: Tensor, noise: torch.Generator) -> None:
        optimizer.zero_grad()
        if rule.two_streams:
            with optimizer.record_factors(model, threat_model=setting.threat_model, generator=noise) as recorder:
                recorder.backward(F.cross_entropy(model(x), y))
        else:
            F.cross_entropy(model(x), y).backward()
        optimizer.step()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        calls = setting.descend(model, step)
    if not is_finite(model):
        raise FloatingPointError(
            f"--optimizer must keep the weights finite, got infinite or NaN ones by {name}; pass another one"
        )
    return Trained(
        name=name, model=model, learning_rate=None, steps=setting.steps, attack_calls=calls,
        passes_per_step=rule.passes_per_step, notes=tuple(dict.fromkeys(str(w.message) for w in warned)),
    )  # fmt: skip


def train_baseline(name: str, setting: Setting) -> Trained:
    """Train with every learning rate, keep the one whose model is most robust on the held-out examples, the first of equals.

    Raises:
        FloatingPointError: no run stayed finite.
    """
    assert setting.validation is not None
    scores: dict[float, float | None] = {}
    best: tuple[float, Trained] | None = None
    for rate in LEARNING_RATES[name]:
        model = copy.deepcopy(setting.initial)
        calls = descend_by(name, rate, model, setting)
        scores[rate] = robust_accuracy(model, setting) if is_finite(model) else None
        found = scores[rate]
        if found is not None and (best is None or found > best[0]):
            best = (found, Trained(
                name=name, model=model, learning_rate=rate, steps=setting.steps, attack_calls=calls,
                passes_per_step=PASSES[name], candidates=scores,
            ))  # fmt: skip
    if best is None:
        raise FloatingPointError(f"--baselines must keep the weights finite, got infinite or NaN ones by {name}; leave it out")
    return best[1]


def descend_by(name: str, rate: float, model: nn.Module, setting: Setting) -> int:
    """One run of a baseline; returns how many attacks were called."""
    parameters = list(model.parameters())
    if name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY)
    else:
        optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / setting.steps)
    objective = None if name in CLEAN else AdversarialTraining(attack=training_attack(name, setting.threat_model))

    def step(x: Tensor, y: Tensor, noise: torch.Generator) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) if objective is None else objective(model, x, y, generator=noise).mean()
        loss.backward()
        optimizer.step()
        schedule.step()

    return setting.descend(model, step)


def training_attack(name: str, threat_model: ThreatModel) -> PGD:
    """One step of 1.25 epsilon from a random start (fgsm; Wong et al., 2020), or five steps (pgd)."""
    if name == "fgsm":
        return PGD(threat_model=threat_model, steps=1, step_size=1.25 * threat_model.epsilon)
    return PGD(threat_model=threat_model, steps=5)


def robust_accuracy(model: nn.Module, setting: Setting) -> float:
    """Share of the held-out examples that stay right under PGD-20."""
    assert setting.validation is not None
    x, y = setting.validation.images, setting.validation.labels
    attack = PGD(threat_model=setting.threat_model, steps=VALIDATION_STEPS)
    x_adv = attack(model, x, y, generator=generator_for(setting.seed, "transfer validation", 0))
    with torch.no_grad():
        right = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    return float(right.double().mean())


def is_finite(model: nn.Module) -> bool:
    """Whether every weight is a number."""
    return all(bool(p.isfinite().all()) for p in model.parameters())


def share_of_gap(learned: float, clean: float, top: float) -> float | None:
    """How far a robust accuracy is on the way from the best clean baseline to PGD training; None where there is no way.

    Example:
        >>> round(share_of_gap(0.55, clean=0.4, top=0.6), 4)
        0.75
    """
    return (learned - clean) / (top - clean) if top > clean else None

"""From the flags of ``metarobust train`` to what is minimised, by what, and at which rates."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from metarobust._checks import finite
from metarobust.attacks import APGD, BETA, FGSM, PGD
from metarobust.command_line._train import parse_robust_classes, parse_schedule
from metarobust.command_line._train_axes import check_learned_update
from metarobust.command_line._train_weighting import Known, counts_of_all, weighed
from metarobust.divergences import KL, Alpha, Divergence, Renyi
from metarobust.meta_optimizers import InterpretableOptimizer, LSTMOptimizer, load
from metarobust.objectives import (
    ARMOR,
    MART,
    TRADES,
    UDR,
    AdversarialTraining,
    BETATraining,
    LogitAdjusted,
    SmoothedBETATraining,
)
from metarobust.threat_models import ThreatModel
from metarobust.training import Schedule, cosine, piecewise
from metarobust.types import Attack, Model, RobustLoss

if TYPE_CHECKING:
    from metarobust.command_line._train import Train

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    # Rate, momentum and decay of Rice et al. (2020), arXiv 2002.11569; for the others those of torch.
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "adam": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.0}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
}

OF_CAAT = 1.5
"""The default beta of the TRADES that CAAT weighs, as in CAAT itself."""


def build_objective(flags: "Train", threat_model: ThreatModel, known: Known | None = None) -> Callable[..., Any]:
    """The objective that the flags name, in this ball.

    Without ``known``, before the data are read, only the part that needs no data: that checks the settings of it.
    """
    loss: Any = _robust_loss(flags, threat_model)
    if known is not None:
        loss = weighed(flags, threat_model, loss, known)
    if flags.objective.startswith("armor-"):
        assert flags.radius is not None
        loss = ARMOR(
            robust_loss=loss,
            divergence=_divergence(flags),
            radius=flags.radius,
            kappa=flags.kappa or 0.0,
            natural_weight=flags.natural_weight or 0.0,
            robust_classes=parse_robust_classes(flags.robust_classes),
        )
    if known is not None and flags.class_weights == "logit-adjusted":
        return LogitAdjusted(robust_loss=loss, class_counts=counts_of_all(known.parts))
    return loss


def _robust_loss(flags: "Train", threat_model: ThreatModel) -> RobustLoss:
    """Of a learned weighting, what it weighs."""
    kind = flags.base_loss
    attack = _attack(flags, threat_model)
    beta: dict[str, Any] = {} if flags.beta is None else {"beta": flags.beta}
    if kind == "trades" and flags.loss == "caat":
        beta = {"beta": OF_CAAT} | beta
    if kind in ("trades", "frl"):
        return TRADES(threat_model=threat_model, steps=flags.attack_steps, **beta)
    if kind == "mart":
        return MART(attack=attack, **beta)
    if kind == "udr":
        return UDR(threat_model=threat_model, steps=flags.attack_steps)
    if kind == "beta":
        return BETATraining(threat_model=threat_model, steps=flags.attack_steps, hypergradient=flags.hypergradient or "none")
    if kind == "smoothed-beta":
        assert flags.mu is not None
        return SmoothedBETATraining(threat_model=threat_model, steps=flags.attack_steps, mu=flags.mu)
    return AdversarialTraining(attack=attack)


def _attack(flags: "Train", threat_model: ThreatModel) -> Attack:
    """What moves the examples of at and mart."""
    if flags.transport == "fgsm":
        return FGSM(threat_model=threat_model)
    if flags.transport == "apgd":
        return APGD(threat_model=threat_model, steps=flags.attack_steps)
    if flags.transport == "beta":
        return BETA(threat_model=threat_model, steps=flags.attack_steps)
    if flags.transport == "none":
        return unmoved
    return PGD(threat_model=threat_model, steps=flags.attack_steps)


def unmoved(model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The attack that leaves every example where it is."""
    return x.detach()


def _divergence(flags: "Train") -> Divergence:
    if flags.order is None:
        return KL()
    return Alpha(order=flags.order) if flags.divergence == "alpha" else Renyi(order=flags.order)


def optimizer_settings(flags: "Train") -> dict[str, float]:
    """Learning rate, weight decay and, for sgd, momentum: as given, or the defaults of the optimizer."""
    if flags.learned_update:
        chosen = {"lr": 1.0 if flags.learning_rate is None else flags.learning_rate}
        finite("--learning-rate", chosen["lr"], above=0.0)
        return chosen
    chosen = dict(OPTIMIZERS[flags.update][1])
    given = {"lr": flags.learning_rate, "momentum": flags.momentum, "weight_decay": flags.weight_decay}
    chosen |= {name: value for name, value in given.items() if value is not None}
    finite("--learning-rate", chosen["lr"], above=0.0)
    finite("--weight-decay", chosen["weight_decay"], least=0.0)
    finite("--momentum", chosen.get("momentum", 0.0), least=0.0)
    return chosen


def read_update(flags: "Train") -> InterpretableOptimizer | LSTMOptimizer | None:
    """The meta-optimizer of --update, if it names one that can follow the objective."""
    if not flags.learned_update:
        return None
    try:
        rule = load(flags.update)
    except (ValueError, OSError) as error:
        remedy = "; or write sgd, adam or adamw" if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"--update: {error}{remedy}") from error
    reads_logits = rule.gradient_source not in ("gradient", "gradient+perturbed_factors")
    check_learned_update(flags, two_streams=rule.two_streams, reads_logits=reads_logits)
    return rule


def build_optimizer(flags: "Train", model: nn.Module, threat_model: ThreatModel, examples: int) -> torch.optim.Optimizer:
    """Over all parameters of the model that are trained; a learned one is told its number of steps and the ball."""
    parameters, settings = [p for p in model.parameters() if p.requires_grad], cast("Any", optimizer_settings(flags))
    rule = read_update(flags)
    if rule is None:
        return OPTIMIZERS[flags.update][0](parameters, **settings)
    steps = (flags.warm_up + flags.epochs) * math.ceil(examples / flags.batch_size)
    return rule.to(parameters[0].device).torch_optimizer(parameters, total_steps=steps, threat_model=threat_model, **settings)


def build_schedule(flags: "Train") -> Schedule | None:
    """A factor of the learning rate for each progress; None where it stays."""
    found = parse_schedule(flags.rates)
    if isinstance(found, dict):
        try:
            return piecewise(found)
        except ValueError as error:
            raise ValueError(f"--schedule: {error}") from error
    return cosine if found == "cosine" else None

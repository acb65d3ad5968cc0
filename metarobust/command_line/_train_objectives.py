"""From the flags of ``metarobust train`` to what is minimised, by what, and at which rates."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from metarobust._checks import finite
from metarobust.attacks import PGD
from metarobust.command_line._train import parse_robust_classes, parse_schedule
from metarobust.command_line._train_weighting import Known, counts_of_all, weighed
from metarobust.divergences import KL, Alpha, Divergence, Renyi
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
from metarobust.types import RobustLoss

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
    attack = PGD(threat_model=threat_model, steps=flags.steps)
    beta: dict[str, Any] = {} if flags.beta is None else {"beta": flags.beta}
    if kind == "trades" and flags.loss == "caat":
        beta = {"beta": OF_CAAT} | beta
    if kind in ("trades", "frl"):
        return TRADES(threat_model=threat_model, steps=flags.steps, **beta)
    if kind == "mart":
        return MART(attack=attack, **beta)
    if kind == "udr":
        return UDR(threat_model=threat_model, steps=flags.steps)
    if kind == "beta":
        return BETATraining(threat_model=threat_model, steps=flags.steps, hypergradient=flags.hypergradient or "none")
    if kind == "smoothed-beta":
        assert flags.mu is not None
        return SmoothedBETATraining(threat_model=threat_model, steps=flags.steps, mu=flags.mu)
    return AdversarialTraining(attack=attack)


def _divergence(flags: "Train") -> Divergence:
    if flags.order is None:
        return KL()
    return Alpha(order=flags.order) if flags.divergence == "alpha" else Renyi(order=flags.order)


def optimizer_settings(flags: "Train") -> dict[str, float]:
    """Learning rate, weight decay and, for sgd, momentum: as given, or the defaults of the optimizer."""
    chosen = dict(OPTIMIZERS[flags.optimizer][1])
    given = {"lr": flags.learning_rate, "momentum": flags.momentum, "weight_decay": flags.weight_decay}
    chosen |= {name: value for name, value in given.items() if value is not None}
    finite("--learning-rate", chosen["lr"], above=0.0)
    finite("--weight-decay", chosen["weight_decay"], least=0.0)
    finite("--momentum", chosen.get("momentum", 0.0), least=0.0)
    return chosen


def build_optimizer(flags: "Train", model: nn.Module) -> torch.optim.Optimizer:
    """Over all parameters of the model that are trained."""
    kind, settings = OPTIMIZERS[flags.optimizer][0], cast("Any", optimizer_settings(flags))
    return kind([p for p in model.parameters() if p.requires_grad], **settings)


def build_schedule(flags: "Train") -> Schedule | None:
    """A factor of the learning rate for each progress; None where it stays."""
    found = parse_schedule(flags.schedule)
    if isinstance(found, dict):
        try:
            return piecewise(found)
        except ValueError as error:
            raise ValueError(f"--schedule: {error}") from error
    return cosine if found == "cosine" else None

"""Robust losses per example: what a training loop averages, or reweights, and differentiates in the model's parameters."""

from metarobust.objectives._adversarial_training import AdversarialTraining
from metarobust.objectives._armor import ARMOR, ARMORLoss
from metarobust.objectives._beta_training import BETATraining
from metarobust.objectives._class_weighted import ClassWeighted
from metarobust.objectives._common import BallLoss, PairLoss
from metarobust.objectives._logit_adjusted import LogitAdjusted
from metarobust.objectives._mart import MART
from metarobust.objectives._smoothed_beta import SmoothedBETATraining
from metarobust.objectives._trades import TRADES
from metarobust.objectives._udr import UDR

__all__ = [
    "ARMOR",
    "MART",
    "TRADES",
    "UDR",
    "ARMORLoss",
    "AdversarialTraining",
    "BETATraining",
    "BallLoss",
    "ClassWeighted",
    "LogitAdjusted",
    "PairLoss",
    "SmoothedBETATraining",
]

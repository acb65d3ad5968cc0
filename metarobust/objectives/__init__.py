"""Robust losses per example: what a training loop averages, or reweights, and differentiates in the model's parameters."""

from metarobust.objectives._adversarial_training import AdversarialTraining
from metarobust.objectives._mart import MART
from metarobust.objectives._trades import TRADES

__all__ = ["MART", "TRADES", "AdversarialTraining"]

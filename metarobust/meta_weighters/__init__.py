"""Learned weights of adversaries and anti-adversaries."""

from metarobust.meta_weighters._caat import CAAT, ROUTINGS
from metarobust.meta_weighters._characteristics import CHARACTERISTICS, ClassStatistics, training_characteristics
from metarobust.meta_weighters._class_balance import FRL, HeldOutErrors, ReMargin, held_out_errors
from metarobust.meta_weighters._hypergradient import HYPERGRADIENTS, Hypergradient, hypergradient
from metarobust.meta_weighters._meta_step import MetaStep, meta_weighted_step
from metarobust.meta_weighters._meta_weight_net import MetaWeightNet
from metarobust.meta_weighters._network import BRANCHES, Weighting, WeightingNetwork
from metarobust.meta_weighters._radii import GradientBound, PerturbationBound
from metarobust.meta_weighters._signed_pgd import signed_pgd
from metarobust.meta_weighters._virtual_update import VirtualUpdate, virtual_update

__all__ = [
    "BRANCHES",
    "CAAT",
    "CHARACTERISTICS",
    "FRL",
    "HYPERGRADIENTS",
    "ROUTINGS",
    "ClassStatistics",
    "GradientBound",
    "HeldOutErrors",
    "Hypergradient",
    "MetaStep",
    "MetaWeightNet",
    "PerturbationBound",
    "ReMargin",
    "VirtualUpdate",
    "Weighting",
    "WeightingNetwork",
    "held_out_errors",
    "hypergradient",
    "meta_weighted_step",
    "signed_pgd",
    "training_characteristics",
    "virtual_update",
]

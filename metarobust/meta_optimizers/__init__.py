"""Update: how the parameters move. Learned update rules, the streams they read, their training, transfer and storage."""

from metarobust.meta_optimizers._attack_task import AttackTask
from metarobust.meta_optimizers._calibration import Calibration, calibrate, train_optimizees
from metarobust.meta_optimizers._distribution import TaskDistribution
from metarobust.meta_optimizers._factor_gradients import (
    GRADIENT_SOURCES,
    FactorGradients,
    FactorRecorder,
    factor_gradients,
    record_factors,
)
from metarobust.meta_optimizers._interpretable import InterpretableOptimizer, InterpretableState
from metarobust.meta_optimizers._layout import ROLES
from metarobust.meta_optimizers._lstm import LSTMOptimizer, LSTMState
from metarobust.meta_optimizers._meta_training import MetaTraining, MetaTrainingSettings, meta_train
from metarobust.meta_optimizers._search import Generation, meta_search
from metarobust.meta_optimizers._storage import TRAINED, load, save
from metarobust.meta_optimizers._tasks import ClassificationTask
from metarobust.meta_optimizers._torch_optimizer import LearnedOptimizer
from metarobust.meta_optimizers._transformation import combine_factors, gradients_only

__all__ = [
    "GRADIENT_SOURCES",
    "ROLES",
    "TRAINED",
    "AttackTask",
    "Calibration",
    "ClassificationTask",
    "FactorGradients",
    "FactorRecorder",
    "Generation",
    "InterpretableOptimizer",
    "InterpretableState",
    "LSTMOptimizer",
    "LSTMState",
    "LearnedOptimizer",
    "MetaTraining",
    "MetaTrainingSettings",
    "TaskDistribution",
    "calibrate",
    "combine_factors",
    "factor_gradients",
    "gradients_only",
    "load",
    "meta_search",
    "meta_train",
    "record_factors",
    "save",
    "train_optimizees",
]

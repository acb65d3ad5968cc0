"""Training: one loop for every robust objective, on one process or several, that resumes bit by bit after a crash."""

from metarobust.training._distributed import initialise_from_environment
from metarobust.training._fit import fit
from metarobust.training._result import EpochRecord, TrainingResult
from metarobust.training._schedules import Schedule, cosine, piecewise

__all__ = ["EpochRecord", "Schedule", "TrainingResult", "cosine", "fit", "initialise_from_environment", "piecewise"]

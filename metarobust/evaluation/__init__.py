"""How robust a model is: attacks run to the per-example worst case, and a report that says how it was found."""

from metarobust.evaluation._distance import DistanceToBound
from metarobust.evaluation._evaluate import evaluate
from metarobust.evaluation._fairness import ClassErrors, ClassSummary, ErrorSummary
from metarobust.evaluation._protocols import protocol_attacks
from metarobust.evaluation._reliability import Doubt
from metarobust.evaluation._report import RobustnessReport

__all__ = [
    "ClassErrors",
    "ClassSummary",
    "DistanceToBound",
    "Doubt",
    "ErrorSummary",
    "RobustnessReport",
    "evaluate",
    "protocol_attacks",
]

"""Lower bounds on the adversarial risk that any classifier must suffer on given points, without any model."""

from metarobust.bounds._attack import OptimalAttack
from metarobust.bounds._bound import adversarial_risk_bound, risk_curve
from metarobust.bounds._classifier import RobustClassifier
from metarobust.bounds._figures import plot_curve
from metarobust.bounds._result import RiskBound
from metarobust.bounds._sinkhorn_risk import sinkhorn_risk

__all__ = [
    "OptimalAttack",
    "RiskBound",
    "RobustClassifier",
    "adversarial_risk_bound",
    "plot_curve",
    "risk_curve",
    "sinkhorn_risk",
]

"""How far a model's robust risk lies above the best that any classifier can do on the same points."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from metarobust.threat_models import ThreatModel


class DistanceToBound(NamedTuple):
    r"""A model's measured robust risk beside the optimal risk R* of all classifiers on the same points.

    ``risk`` counts what the attacks found, so the model's true adversarial risk r is at least that; and
    :math:`lower \le R^* \le upper`. Hence the true distance satisfies :math:`r - R^* \ge risk - upper` (`at_least`).
    `difference` is ``risk - lower``: if ``exact``, the same number, and so a lower bound of the true distance; if the bracket is
    open, it may be too large by up to ``upper - lower``. A negative `difference` is impossible for r itself: then the attacks
    missed at least that share of the examples.

    R* belongs to these points alone (the empirical distribution). Classifiers that know the points by heart, and may answer
    at random, count too. On few or distant points it is 0, although no practical classifier gets there.

    Attributes:
        risk: share of the points whose prediction is wrong or was broken, ``1 - worst_case_accuracy``.
        lower: risk that no classifier beats on these points.
        upper: risk that some classifier reaches on them.
        exact: whether both agree to 1e-7.
        order: sets of at most this many points are all accounted for in the bound.
    """

    risk: float
    lower: float
    upper: float
    exact: bool
    order: int

    @property
    def difference(self) -> float:
        """``risk - lower``."""
        return self.risk - self.lower

    @property
    def at_least(self) -> float:
        """What the true distance is at least, whatever the attacks missed: ``risk - upper``, or 0."""
        return max(self.risk - self.upper, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return self._asdict() | {"difference": self.difference, "at_least": self.at_least}

    def sentence(self) -> str:
        """The distance in words, as accuracies."""
        between = "" if self.exact else f"between {1 - self.upper:.3f} and "
        best = f"best possible robust accuracy on these points {between}{1 - self.lower:.3f} (sets of up to {self.order})"
        if self.difference < -1e-6:
            return f"{best}; the measured one is {-self.difference:.3f} above that, so the attacks missed examples"
        return f"{best}; the measured one is {abs(self.difference):.3f} below that"


def distance_to_bound(
    x: Tensor, y: Tensor, risk: float, settings: Mapping[str, Any], *, order: int | str = "auto"
) -> DistanceToBound:
    """The bound on the points of an evaluation, at its norm and epsilon, beside the risk that it measured."""
    # scipy's optimisers are slow to import, and most evaluations ask for no bound.
    from metarobust.bounds import adversarial_risk_bound

    threat_model = ThreatModel(**{name: settings[name] for name in ("norm", "epsilon", "lower", "upper")})
    bound = adversarial_risk_bound(x, y, threat_model, order=order)
    return DistanceToBound(risk, bound.lower, bound.upper, bound.exact, bound.order)

"""What a bound found: the bracket, its two witnesses, and how hard it was."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarobust.bounds._attack import OptimalAttack, optimal_attack
from metarobust.bounds._classifier import RobustClassifier
from metarobust.bounds._conflicts import ConflictGraph
from metarobust.bounds._plan import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class RiskBound:
    """``lower <= R* <= upper`` for the optimal adversarial risk R* on the given points, as fractions of the total weight.

    Attributes:
        lower: risk that no classifier beats on these points: what `attack` forces on each of them.
        upper: worst-case risk of `classifier` on these points.
        exact: whether both agree to 1e-7: then ``lower`` is the optimal risk itself.
        order: sets of at most this many points are all accounted for.
        potentials: float64 ``[examples]``, the dual optimum of that order: the probability of the right answer that it would
            guarantee around each example, were larger sets no obstacle; 0 for examples of weight 0.
        guarantees: float64 ``[examples]``, the probability of the right answer that `classifier` does guarantee.
        norm: ``"l2"`` or ``"linf"``.
        epsilon: radius in input units.
        closed: whether balls contain their boundary.
        method: ``"exact"`` or ``"sinkhorn"``.
        examples: examples given.
        points: distinct labelled points of positive weight among them.
        pairs: conflicting pairs of points.
        sets: for 3 and more points, how many sets of that size entered the problem as constraints.
        ties: pairs within rounding of ``2 * epsilon``, counted as conflicts only if ``closed``.
        seconds: wall time of each stage; looking for pairs serves all radii of one `risk_curve`.
    """

    lower: float
    upper: float
    exact: bool
    order: int
    potentials: Tensor = field(repr=False)
    guarantees: Tensor = field(repr=False)
    norm: str
    epsilon: float
    closed: bool
    method: str
    examples: int
    points: int
    pairs: int
    sets: dict[int, int]
    ties: int
    seconds: dict[str, float]
    _graph: ConflictGraph = field(repr=False)
    _guarantee: np.ndarray = field(repr=False)
    _plan: Plan = field(repr=False)
    _shape: tuple[int, ...] = field(repr=False)

    def classifier(self) -> RobustClassifier:
        """A classifier whose worst-case risk on these points is ``upper``: optimal when ``exact``."""
        return RobustClassifier(self._graph, self._guarantee, self._shape)

    def attack(self) -> OptimalAttack:
        """Moves within epsilon under which every classifier has at least the risk ``lower``."""
        return optimal_attack(self._graph, self._plan, self._shape)

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON; without the witnesses."""
        names = ("lower", "upper", "exact", "order", "norm", "epsilon", "closed", "method", "examples", "points", "pairs", "ties")
        sets = {str(size): count for size, count in self.sets.items()}
        return {name: getattr(self, name) for name in names} | {"sets": sets, "seconds": dict(self.seconds)}


def per_example(values: np.ndarray, origin: np.ndarray) -> Tensor:
    """Values of points, handed to the examples that they stand for; 0 for examples of weight 0."""
    return torch.from_numpy(np.where(origin >= 0, values[np.maximum(origin, 0)], 0.0))

"""From multipliers of a solver to an exact transport plan."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDING = 1e-12


class Plan(NamedTuple):
    """Sets of points that meet, with masses; the sets of each point carry exactly its weight.

    Attributes:
        sets: one array ``[sets, size]`` per size, smallest first; sets of one point stay where they are.
        mass: per size, ``[sets]``, positive.
    """

    sets: list[np.ndarray]
    mass: list[np.ndarray]

    @property
    def risk(self) -> float:
        """Mass that no classifier gets right: of a set of m points that meet, one at most is answered rightly."""
        return float(sum((sets.shape[1] - 1) * mass.sum() for sets, mass in zip(self.sets, self.mass, strict=True)))


def repaired(sets: Sequence[np.ndarray], mass: Sequence[np.ndarray], weight: np.ndarray) -> Plan:
    """Masses under which every point's sets carry exactly its weight, whatever the solver's rounding.

    A point that its sets cover too much leaves some of them (a subset of a feasible set is feasible), or, where the excess is
    rounding, its sets shrink; what is missing stays at the point itself.

    Args:
        sets: feasible sets, arrays ``[sets, size]`` of different points.
        mass: per array ``[sets]``; what is not positive is left out.
        weight: ``[points]``, positive.
    """
    groups: dict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    over = _covered([(some, masses.clip(0)) for some, masses in zip(sets, mass, strict=True)], weight) - weight
    over[over <= ROUNDING * weight] = 0
    for some, masses in zip(sets, mass, strict=True):
        crowded = (over[some] > 0).any(1) if len(some) else np.zeros(0, dtype=bool)
        kept = (masses > 0) & ~crowded
        groups[some.shape[1]].append((some[kept], masses[kept]))
        for members, amount in _thinned(some[crowded], masses[crowded], over):
            groups[len(members)].append((np.array([members]), np.array([amount])))
    joined = [tuple(np.concatenate(parts) for parts in zip(*group, strict=True)) for group in groups.values()]
    # What still covers too much does so by rounding: its sets give up their share of it.
    fitting = np.minimum(1, weight / np.maximum(_covered(joined, weight), weight))
    joined = [(some, masses * fitting[some].min(1)) for some, masses in joined]
    left = weight - _covered(joined, weight)
    alone = np.flatnonzero(left > 0)
    joined.append((alone[:, None], left[alone]))
    plan: list[tuple[np.ndarray, np.ndarray]] = []
    for size in sorted({some.shape[1] for some, masses in joined if len(masses)}):
        of_size = [(some, masses) for some, masses in joined if some.shape[1] == size]
        plan.append((np.concatenate([some for some, _ in of_size]), np.concatenate([masses for _, masses in of_size])))
    return Plan([some for some, _ in plan], [masses for _, masses in plan])


def _thinned(sets: np.ndarray, mass: np.ndarray, over: np.ndarray) -> list[tuple[list[int], float]]:
    """The sets, without the points that are covered too much in as much of their mass; ``over`` falls as they leave."""
    found = []
    for members, amount in zip(sets.tolist(), mass.tolist(), strict=True):
        while amount > 0 and (leaving := [i for i in members if over[i] > 0]):
            part = min(amount, *(over[i] for i in leaving))
            amount -= part
            over[leaving] -= part
            if rest := [i for i in members if i not in leaving]:
                found.append((rest, part))
        if amount > 0:
            found.append((members, amount))
    return found


def _covered(groups: Sequence[tuple[np.ndarray, ...]], weight: np.ndarray) -> np.ndarray:
    """Mass of the sets of each point."""
    covered = np.zeros(len(weight))
    for some, masses in groups:
        covered += np.bincount(some.ravel(), np.repeat(masses, some.shape[1]), len(weight))
    return covered

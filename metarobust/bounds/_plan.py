"""From multipliers of a solver to an exact transport plan."""

from collections.abc import Sequence

import numpy as np


def repaired(
    sets: Sequence[np.ndarray], mass: Sequence[np.ndarray], weight: np.ndarray
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Masses under which every point's sets carry exactly its weight: a transport plan, whatever the solver's rounding.

    A point that its sets cover too much leaves some of them (a subset of a feasible set is feasible); what is missing stays at
    the point itself.
    """
    plan: dict[tuple[int, ...], float] = {}
    for some, masses in zip(sets, mass, strict=True):
        positive = masses > 0
        for members, amount in zip(some[positive].tolist(), masses[positive].tolist(), strict=True):
            key = tuple(sorted(members))
            plan[key] = plan.get(key, 0.0) + amount
    covered = _covered(plan, len(weight))
    over = {int(i): float(covered[i] - weight[i]) for i in np.flatnonzero(covered > weight)}
    for members, amount in list(plan.items()) if over else []:
        while amount > 0 and (leaving := [i for i in members if over.get(i, 0) > 0]):
            part = min(amount, min(over[i] for i in leaving))
            rest = tuple(i for i in members if i not in leaving)
            for i in leaving:
                over[i] -= part
            plan[members] -= part
            amount -= part
            if rest:
                plan[rest] = plan.get(rest, 0.0) + part
    left = weight - _covered(plan, len(weight))
    for i in np.flatnonzero(left > 0).tolist():
        plan[(i,)] = plan.get((i,), 0.0) + float(left[i])
    kept = {members: amount for members, amount in plan.items() if amount > 0}
    return list(kept), np.array(list(kept.values()))


def _covered(plan: dict[tuple[int, ...], float], points: int) -> np.ndarray:
    lengths = [len(members) for members in plan]
    members = np.fromiter((i for key in plan for i in key), dtype=np.int64, count=sum(lengths))
    return np.bincount(members, np.repeat(list(plan.values()), lengths), points) if lengths else np.zeros(points)

"""The adversary's side of the optimum: who moves where, with which probability."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarobust.bounds._conflicts import ConflictGraph
from metarobust.bounds._enclosing import enclosing_balls
from metarobust.bounds._plan import Plan


class OptimalAttack(NamedTuple):
    """Random moves of the examples: example ``example[m]`` goes to ``positions[position[m]]``, ``probability[m]`` of the time.

    Examples of different classes that meet at one position cannot all be classified rightly there: that is the bound.

    Attributes:
        positions: ``[positions, ...]`` in input units, float64: centres of smallest enclosing balls (l2), midranges (l_inf).
        example: int64 ``[moves]``.
        position: int64 ``[moves]``.
        probability: float64 ``[moves]``; those of one example sum to 1. Examples of weight 0 do not move and are not listed.
        mass: float64 ``[moves]``, the probability times the example's share of the total weight.
        label: int64 ``[moves]``.
    """

    positions: Tensor
    example: Tensor
    position: Tensor
    probability: Tensor
    mass: Tensor
    label: Tensor

    def risk(self, classifier: Callable[[Tensor], Tensor]) -> float:
        """Expected error under these moves of a classifier that returns probabilities ``[batch, classes]``.

        At least ``lower`` of the bound, for whatever classifier. For a network pass ``lambda x: model(x.float()).softmax(1)``, or
        one-hot predictions.
        """
        with torch.no_grad():
            probability = classifier(self.positions)
        right = probability.double().cpu()[self.position, self.label]
        return float((self.mass * (1 - right)).sum())


def optimal_attack(graph: ConflictGraph, plan: Plan, shape: tuple[int, ...]) -> OptimalAttack:
    """The moves of a transport plan over sets of points."""
    points = graph.points
    x = points.x.double().cpu() * points.unit
    middles = []
    for sets in plan.sets:
        corners = x[torch.from_numpy(sets)]
        if sets.shape[1] <= 2 or graph.norm == "linf":
            middles.append((corners.amin(1) + corners.amax(1)) / 2)
        else:
            where = enclosing_balls(graph.squares(sets, precise=True))[1]
            middles.append(torch.einsum("sm,smd->sd", torch.from_numpy(where), corners))
    positions = torch.cat(middles)
    mass = np.concatenate(plan.mass)
    member = np.concatenate([sets.ravel() for sets in plan.sets])
    of_set = np.repeat(np.arange(len(mass)), np.concatenate([np.full(len(sets), sets.shape[1]) for sets in plan.sets]))
    # Every example moves like the point that it stands for.
    probability = mass[of_set] / points.weight[member]
    examples = np.flatnonzero(points.origin >= 0)
    by_point = examples[np.argsort(points.origin[examples], kind="stable")]
    many = np.bincount(points.origin[examples], minlength=len(points.y))
    begin = np.cumsum(many) - many
    repeats = many[member]
    move = np.repeat(np.arange(len(member)), repeats)
    within = np.arange(len(move)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    example = by_point[begin[member[move]] + within]
    likely = probability[move]
    tensors = (example, of_set[move], likely, likely * points.share[example], points.y[member[move]])
    return OptimalAttack(positions.reshape(len(mass), *shape), *(torch.from_numpy(np.ascontiguousarray(t)) for t in tensors))

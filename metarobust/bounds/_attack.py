"""The adversary's side of the optimum: who moves where, with which probability."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import message, require
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

    def __repr__(self) -> str:
        return f"OptimalAttack({len(self.example)} moves to {len(self.positions)} positions)"

    def risk(self, classifier: Callable[[Tensor], Tensor]) -> float:
        """Expected error under these moves of a ``classifier`` that returns probabilities ``[batch, classes]``.

        At least ``lower`` of the bound, for whatever classifier. For a network pass ``lambda x: model(x.float()).softmax(1)``, or
        one-hot predictions.

        Raises:
            ValueError: the classifier fails on float64 inputs, or returns anything but probabilities.
        """
        remedy = "for a network that returns logits write attack.risk(lambda x: model(x.float()).softmax(1))"
        expected = "a function from float64 inputs to probabilities [batch, classes]"
        try:
            with torch.no_grad():
                probability = classifier(self.positions)
        except RuntimeError as error:
            raise ValueError(message("classifier", expected, f"one that fails ({error})", remedy)) from error
        shape = list(getattr(probability, "shape", ())) or type(probability).__name__
        fits = isinstance(probability, Tensor) and probability.dim() == 2 and len(probability) == len(self.positions)
        require(
            fits and probability.shape[1] > int(self.label.max()), "classifier", expected, f"a result of shape {shape}", remedy
        )
        sums = bool((probability >= -1e-6).all()) and bool((probability.double().sum(1) - 1).abs().max() < 1e-3)
        require(sums, "classifier", expected, "rows that are no probabilities of sum 1", remedy)
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

"""The bracket on the optimal adversarial risk: what any classifier must suffer on the given points."""

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from metarobust import __version__
from metarobust._checks import choice, finite, integer, message, require
from metarobust._tensors import digest
from metarobust.bounds._conflicts import ConflictGraph, conflicts
from metarobust.bounds._pairs import pairs_within
from metarobust.bounds._points import as_points
from metarobust.bounds._proof import EXACT, Proof, prove
from metarobust.bounds._result import RiskBound, per_example
from metarobust.bounds._resume import read_proofs, write_proofs
from metarobust.threat_models import ThreatModel

MOST_SETS = 5_000_000


def adversarial_risk_bound(
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    order: int | str = "auto",
    method: str = "exact",
    weights: Tensor | None = None,
    closed: bool = True,
    most_sets: int = MOST_SETS,
) -> RiskBound:
    r"""Bracket the smallest adversarial risk that any classifier can have on these points.

    For points :math:`x_i` with labels :math:`y_i` and weights :math:`w_i` of sum 1, over all probabilistic classifiers f,

    .. math:: R^* = \min_f \sum_i w_i \sup_{\|x' - x_i\| \le \epsilon} (1 - f_{y_i}(x')).

    By duality (Garcia Trillos, Jacobs, Kim, 2023) :math:`1 - R^* = \max \sum_i w_i q_i` over :math:`0 \le q \le 1` with
    :math:`\sum_{i \in S} q_i \le 1` for every set S of points of different classes whose balls share a point. Keeping only sets
    of at most L points gives a lower bound that grows with L (Garcia Trillos et al., 2024, arXiv 2401.09191, section 3).

    The lower end is the risk that the returned `RiskBound.attack` forces on every classifier, the upper end the risk of the
    returned `RiskBound.classifier`: neither trusts a solver. **The bound is for these points with these weights (the empirical
    distribution), not for the population that they were drawn from:** a classifier that knows them may do as well on them, and
    on others worse.

    Args:
        x: points in input units, ``[examples, ...]``, finite. They need not lie in the box of ``threat_model``; where they do,
            the box changes nothing, because every optimal move stays in the convex hull of the points.
        y: labels from 0, int64 ``[examples]``.
        threat_model: ``"l2"`` or ``"linf"`` and epsilon in input units.
        order: the largest sets that count: 2 (by maximum flow), 3 or more (by linear programming), or ``"auto"``, which climbs
            until the bracket closes, no set is left or ``most_sets`` is spent.
        method: ``"exact"``, or ``"sinkhorn"`` for the paper's entropic algorithm (see `sinkhorn_risk` for its settings).
        weights: of the examples, at least 0, float ``[examples]``; normalised to sum 1. Default: all equal.
        closed: balls contain their boundary, so that two points exactly ``2 * epsilon`` apart conflict (8-bit images have such
            ties; for them distances are compared as integers). False leaves out every pair within rounding of ``2 * epsilon``:
            a relative 1e-9 for 8-bit images and float64 data, 1e-6 for other float32 data. That much longer than epsilon the
            moves of the attack may be, too.
        most_sets: candidate sets that one search for broken constraints may look at; beyond it the bracket may stay open.

    Raises:
        ValueError: another norm, wrong shapes, NaN, negative labels or weights, more than 50 million conflicting pairs.
        TypeError: x is not floating point or y not int64.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> bound = adversarial_risk_bound(x, torch.tensor([0, 1]), ThreatModel(norm="l2", epsilon=0.5))
        >>> bound.lower, bound.upper, bound.exact
        (0.5, 0.5, True)
    """
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel", repr(threat_model)))
    bounds = _bounds(
        x,
        y,
        threat_model.norm,
        [float(threat_model.epsilon)],
        order=order,
        method=method,
        weights=weights,
        closed=closed,
        most_sets=most_sets,
    )
    return bounds[0]


def risk_curve(
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    epsilons: Sequence[float],
    order: int | str = "auto",
    method: str = "exact",
    weights: Tensor | None = None,
    closed: bool = True,
    most_sets: int = MOST_SETS,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[RiskBound]:
    """`adversarial_risk_bound` at several radii, in the order given; close pairs are looked for once, at the largest.

    Args:
        x, y, order, method, weights, closed, most_sets: as for `adversarial_risk_bound`.
        norm: ``"l2"`` or ``"linf"``.
        epsilons: radii in input units, at least 0.
        checkpoint: a file that keeps what is found at each radius as soon as it is. If it is there already, the sweep goes on
            after the last radius in it, and gives what it would have given without a stop; it must be of this same sweep. Close
            pairs are looked for again. Its folder must exist. Loading it executes no code.

    Raises:
        ValueError: as for `adversarial_risk_bound`; the checkpoint is damaged or of another sweep.
        FileNotFoundError: the folder of ``checkpoint`` is missing.

    Example:
        >>> x, y = torch.tensor([[0.0], [0.4], [1.0]]), torch.tensor([0, 1, 1])
        >>> [round(bound.lower, 4) for bound in risk_curve(x, y, norm="l2", epsilons=[0.1, 0.2, 0.5])]
        [0.0, 0.3333, 0.3333]
    """
    if isinstance(epsilons, (int, float, str)):
        raise TypeError(message("epsilons", "a list of radii", repr(epsilons), f"write epsilons=[{epsilons}]"))
    require(len(epsilons) > 0, "epsilons", "at least one radius", "none")
    for epsilon in epsilons:
        if isinstance(epsilon, str):
            raise TypeError(message("epsilons", "a list of radii", repr(epsilon), f"write {epsilon} as a number"))
    return _bounds(
        x,
        y,
        norm,
        [float(e) for e in epsilons],
        order=order,
        method=method,
        weights=weights,
        closed=closed,
        most_sets=most_sets,
        checkpoint=checkpoint,
    )


def _bounds(
    x: Tensor,
    y: Tensor,
    norm: str,
    epsilons: list[float],
    *,
    order: int | str,
    method: str,
    weights: Tensor | None,
    closed: bool,
    most_sets: int,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[RiskBound]:
    remedy = "l1 balls have no such solver here" if norm == "l1" else ""
    require(norm in ("l2", "linf"), "norm", "'l2' or 'linf'", repr(norm), remedy)
    choice("method", method, ("exact", "sinkhorn"))
    if order != "auto":
        integer("order", order, least=2)
    integer("most_sets", most_sets, least=1)
    for epsilon in epsilons:
        finite("epsilon", epsilon, least=0)
    begin = time.perf_counter()
    points = as_points(x, y, weights)
    settings: dict[str, Any] = {}
    proofs: list[Proof] = []
    if checkpoint is not None:
        weighted = None if weights is None else f"{weights.dtype} {digest(weights)}"
        settings = {"data": f"{list(x.shape)} {x.dtype} {digest(x, y)}", "weights": weighted, "norm": norm, "epsilons": epsilons}
        settings |= {"order": order, "method": method, "closed": closed, "most_sets": most_sets, "metarobust": __version__}
        proofs = read_proofs(Path(checkpoint), settings, len(points.y))
    largest = max(epsilons)
    pairs = pairs_within(points, norm, 2 * largest, [2 * epsilon for epsilon in epsilons])
    seconds = {"pairs": time.perf_counter() - begin}
    found = []
    for epsilon in epsilons:
        graph = conflicts(points, pairs, norm, epsilon, closed=closed)
        some, every = (pairs.count_within(2 * replace(graph, closed=c).radius) for c in (False, True))
        if len(found) == len(proofs):
            proofs.append(prove(graph, method, order, most_sets))
            if checkpoint is not None:
                write_proofs(Path(checkpoint), settings, proofs)
        proof = proofs[len(found)]
        for text in proof.warnings:
            warnings.warn(text, stacklevel=3)
        found.append(_result(graph, proof, method, every - some, seconds | proof.seconds, x))
    return found


def _result(graph: ConflictGraph, proof: Proof, method: str, ties: int, seconds: dict[str, float], x: Tensor) -> RiskBound:
    points = graph.points
    return RiskBound(
        lower=proof.lower,
        upper=proof.upper,
        exact=proof.upper - proof.lower <= EXACT,
        order=proof.order,
        potentials=per_example(proof.potential, points.origin),
        guarantees=per_example(proof.guarantee, points.origin),
        norm=graph.norm,
        epsilon=graph.epsilon,
        closed=graph.closed,
        method=method,
        examples=len(x),
        points=len(points.y),
        pairs=len(graph.pairs.first),
        sets=proof.sets,
        ties=ties,
        seconds=seconds,
        _graph=graph,
        _guarantee=proof.guarantee,
        _plan=proof.plan,
        _shape=tuple(x.shape[1:]),
    )

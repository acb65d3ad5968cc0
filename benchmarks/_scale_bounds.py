"""Series of `benchmarks.scale`: conflict edges, maximum flow, linear program, Sinkhorn."""

from collections.abc import Mapping
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks._scale_measure import Prepared, Series
from metarobust.bounds._bound import MOST_SETS
from metarobust.bounds._conflicts import ConflictGraph, conflicts
from metarobust.bounds._flow import pair_bound
from metarobust.bounds._pairs import Pairs, pairs_within
from metarobust.bounds._points import Points, as_points
from metarobust.bounds._sinkhorn import solve_by_sinkhorn
from metarobust.bounds._solution import solve
from metarobust.data import load

EPSILON, LARGE_EPSILON, LINF_EPSILON = 3.0, 3.25, 0.47
"""The radii of docs/papers/risk_bounds.md."""
SHARE = 1e-4
"""Of all pairs of synthetic points, so many are within the radius."""


@cache
def _mnist(parts: int) -> tuple[Tensor, Tensor]:
    found = [load("mnist", train=train) for train in (False, True)[:parts]]
    return torch.cat([part.images for part in found]), torch.cat([part.labels for part in found])


def mnist(count: int, classes: int = 10) -> Points:
    """The 10,000 test images in their order, then the training images; of the first so many classes."""
    x, y = _mnist(1 if count <= 10_000 else 2)
    chosen = (y < classes).nonzero().squeeze(1)[:count]
    return as_points(x[chosen], y[chosen], None)


def synthetic(count: int, dimensions: int) -> tuple[Points, float]:
    """Ten classes of one Gaussian with 16 large directions, and the radius within which `SHARE` of all pairs are."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(16, dimensions, generator=draw) / dimensions**0.5
    x = (
        torch.randn(count, 16, generator=draw) @ directions
        + 0.1 * torch.randn(count, dimensions, generator=draw) / dimensions**0.5
    )
    some = x[:2000].double()
    radius = torch.pdist(some).kthvalue(int(SHARE * 2000 * 1999 / 2)).values.item()
    return as_points(x, torch.arange(count) % 10, None), radius


def edges(points: Points, norm: str, radius: float, size: float) -> Prepared:
    def run() -> Mapping[str, float]:
        return {"edges": len(pairs_within(points, norm, radius, [radius]).first)}

    return Prepared(run, size)


def mnist_edges(norm: str, count: int) -> Prepared:
    return edges(mnist(count), norm, 2 * (EPSILON if norm == "l2" else LINF_EPSILON), count)


def synthetic_edges(axis: str, size: int) -> Prepared:
    count, dimensions = (size, 64) if axis == "points" else (4000, size)
    return edges(*_with_norm(*synthetic(count, dimensions)), size)


def _with_norm(points: Points, radius: float) -> tuple[Points, str, float]:
    return points, "l2", radius


def graph_of(points: Points, epsilon: float) -> ConflictGraph:
    pairs: Pairs = pairs_within(points, "l2", 2 * epsilon, [2 * epsilon])
    return conflicts(points, pairs, "l2", epsilon, closed=True)


def flow(count: int) -> Prepared:
    graph = graph_of(mnist(count), EPSILON)
    first, second, points = graph.pairs.first, graph.pairs.second, graph.points

    def run() -> Mapping[str, float]:
        return {"risk": float(pair_bound(first, second, points.weight, points.copies).mass.sum()), "points": count}

    return Prepared(run, len(first))


def program(count: int) -> Prepared:
    graph = graph_of(mnist(count), LARGE_EPSILON)

    def run() -> Mapping[str, float]:
        found = solve(graph, 3, MOST_SETS)
        return {"edges": len(graph.pairs.first), "order": found.order}

    return Prepared(run, count)


def sinkhorn(axis: str, size: int) -> Prepared:
    if axis == "points":
        graph, order = graph_of(mnist(size), LARGE_EPSILON), 2
    else:
        graph, order = graph_of(mnist(4000, size), LARGE_EPSILON), 3

    def run() -> Mapping[str, float]:
        found = solve_by_sinkhorn(graph, order, MOST_SETS)
        return {"sets": sum(len(some) for some in found.sets), "edges": len(graph.pairs.first)}

    return Prepared(run, size)


def series() -> list[Series]:
    l2, note = "MNIST, l2, radius 3", "test images, then training images"
    return [
        Series(
            part="edges, MNIST, l2", axis="points", sizes=(2500, 5000, 10000, 20000),
            prepare=partial(mnist_edges, "l2"), time=2, memory=2, note=f"{l2}; {note}", mnist=True,
        ),
        Series(
            part="edges, MNIST, l_inf", axis="points", sizes=(2500, 5000, 10000),
            prepare=partial(mnist_edges, "linf"), time=2, memory=1, note=f"radius 0.47; {note}", mnist=True,
        ),
        Series(
            part="edges, synthetic, l2", axis="points", sizes=(5000, 10000, 20000),
            prepare=partial(synthetic_edges, "points"), time=2, memory=2, note="64 dimensions, 16 large; 1e-4 of all pairs",
        ),
        Series(
            part="edges, synthetic, l2", axis="dimensions", sizes=(64, 256, 1024, 4096),
            prepare=partial(synthetic_edges, "dimensions"), time=1, memory=1, note="4,000 points; 1e-4 of all pairs",
        ),
        Series(
            part="maximum flow, order 2", axis="edges", sizes=(5000, 10000, 20000), prepare=flow, time=1.25,
            memory=1, note=f"{l2}; 5,000 to 20,000 points", mnist=True,
        ),
        Series(
            part="linear program, order 3", axis="points", sizes=(2500, 5000, 10000), prepare=program, time=None, memory=None,
            note="MNIST, l2, radius 3.25", mnist=True,
        ),
        Series(
            part="Sinkhorn, order 2", axis="points", sizes=(1250, 2500, 5000), prepare=partial(sinkhorn, "points"),
            time=2, memory=2, note="MNIST, l2, radius 3.25", mnist=True,
        ),
        Series(
            part="Sinkhorn, order 3", axis="classes", sizes=(3, 6, 10), prepare=partial(sinkhorn, "classes"), time=None,
            memory=None, note="4,000 points of the first so many classes of MNIST, l2, radius 3.25", mnist=True,
        ),
    ]  # fmt: skip

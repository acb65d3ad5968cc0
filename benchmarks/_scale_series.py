"""Every series of `benchmarks.scale` by name, and the function that measures a point of one in another process."""

from typing import Any

from benchmarks import _scale_bounds, _scale_learning, _scale_meta
from benchmarks._scale_measure import Series, measured

SERIES: dict[str, Series] = {one.name: one for one in (*_scale_learning.series(), *_scale_bounds.series(), *_scale_meta.series())}


def point(name: str, size: int, rank: int = 0, store: str = "") -> dict[str, Any]:
    """`measured` of the series with this name."""
    return measured(SERIES[name], size, rank=rank, store=store)

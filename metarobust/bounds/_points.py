"""Labelled points as the bounds see them: flattened, checked, duplicates merged, sorted by label, weights normalised."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import floating, kind, message, require, tensor_of
from metarobust._checks import labels as check_labels
from metarobust._tensors import flat

MOST_CLASSES = 1_000_000
"""Tables of classes are as long as the largest label."""


class Points(NamedTuple):
    """Distinct labelled points, sorted by label.

    Attributes:
        x: ``[points, dimensions]``, on the device of the data; 8-bit images in steps of 1, everything else as it came.
        y: ``[points]`` labels, ascending.
        weight: ``[points]`` float64, positive, sum 1.
        copies: ``[points]`` int64, examples merged into each point where all examples weigh the same, otherwise None.
        origin: for each example of the data its point, -1 where the example has weight 0.
        share: for each example its part of the total weight, float64, sum 1.
        unit: input units per unit of ``x``: 1/255 for 8-bit images, otherwise 1.
        rounding: relative error of a distance below which two numbers count as equal.
    """

    x: Tensor
    y: np.ndarray
    weight: np.ndarray
    copies: np.ndarray | None
    origin: np.ndarray
    share: np.ndarray
    unit: float
    rounding: float

    @property
    def first(self) -> np.ndarray:
        """For each point the first example of the data that it stands for."""
        examples = np.flatnonzero(self.origin >= 0)[::-1]
        first = np.empty(len(self.y), dtype=np.int64)
        first[self.origin[examples]] = examples
        return first


def as_points(x: Tensor, y: Tensor, weights: Tensor | None) -> Points:
    """Check and merge the data. Merging identical rows of one label by adding their weights changes no bound.

    Args:
        x: floating point ``[examples, ...]``, finite; not necessarily inside a box.
        y: int64 ``[examples]``, labels at least 0.
        weights: ``[examples]``, at least 0, not all 0; default: all equal.

    Raises:
        TypeError: x is not floating point, y not int64, weights not a tensor.
        ValueError: NaN or infinite values, wrong shapes, negative labels or weights, no example.
    """
    floating("x", x)
    require(x.dim() >= 1 and len(x) > 0, "x", "at least one example, [examples, ...]", list(x.shape))
    check_labels(y, examples=len(x))
    low, high = (int(label) for label in y.aminmax())
    require(low >= 0, "y", "labels of at least 0", low, "number the classes from 0")
    remedy = "number the classes from 0: write y = y.unique(return_inverse=True)[1]"
    require(high < MOST_CLASSES, "y", f"labels below {MOST_CLASSES:,}", high, remedy)
    rows = flat(x.detach())
    rows = rows.float() if rows.element_size() < 4 else rows
    remedy = "find them with x.isfinite().logical_not().nonzero()"
    require(bool(rows.isfinite().all()), "x", "finite", "NaN or infinite values", remedy)
    require(rows.shape[1] > 0, "x", "of at least one coordinate per example", list(x.shape))
    low, high = (abs(v.item()) for v in rows.aminmax())
    size = max(low, high)
    require(size == 0 or 1e-150 < size < 1e150, "x", "of a size that can be squared", f"values up to {size:.3g}", "rescale x")
    rows = rows.double() if size > 1e15 or 0 < size < 1e-15 else rows
    weight = _as_weights(weights, len(x))

    levels = _levels(rows)
    is_8_bit, rows = levels is not None, rows if levels is None else levels
    labels = y.cpu().numpy()
    origin, first = _merged(rows.cpu().numpy(), labels, weight > 0)
    by_label = np.argsort(labels[first], kind="stable")
    rank = np.empty_like(by_label)
    rank[by_label] = np.arange(len(by_label))
    origin = np.where(origin >= 0, rank[origin], -1)
    first = first[by_label]
    merged = np.bincount(origin[origin >= 0], weights=weight[origin >= 0], minlength=len(first))
    copies = None
    kept = weight[weight > 0]
    if kept.min() == kept.max():
        copies = np.bincount(origin[origin >= 0], minlength=len(first))
        merged = copies.astype(np.float64)
    return Points(
        x=rows[torch.from_numpy(first).to(rows.device)].contiguous(),
        y=labels[first],
        weight=merged / merged.sum(),
        copies=copies,
        origin=origin,
        share=weight / weight.sum(),
        unit=1 / 255 if is_8_bit else 1.0,
        rounding=1e-9 if is_8_bit or rows.dtype == torch.float64 else 1e-6,
    )


def _levels(rows: Tensor) -> Tensor | None:
    """The integers k of 8-bit images, where all values are k / 255: distances become integers, ties exact.

    Torchvision's ``ToTensor`` divides by 255 and its second version multiplies by 1 / 255; either in float32 or float64.
    """
    low, high = rows.aminmax()
    if low < 0 or high > 1:
        return None
    levels = (rows * 255).round()
    ways = (lambda k: k / 255, lambda k: k * (1 / 255), lambda k: k.float() / 255, lambda k: k.float() * (1 / 255))
    return levels if any(torch.equal(way(levels).to(rows.dtype), rows) for way in ways) else None


def _as_weights(weights: Tensor | None, examples: int) -> np.ndarray:
    if weights is None:
        return np.ones(examples)
    if not isinstance(weights, Tensor):
        raise TypeError(message("weights", "a tensor [examples]", kind(weights), tensor_of("weights", weights)))
    require(weights.shape == (examples,), "weights", f"of shape [{examples}], one per example", list(weights.shape))
    weight = weights.detach().double().cpu().numpy()
    proper, got = bool(np.isfinite(weight).all() and (weight >= 0).all()), f"values from {weight.min():g} to {weight.max():g}"
    require(proper, "weights", "finite and at least 0", got)
    require(bool(weight.sum() > 0), "weights", "positive for one example at least", "zeros only")
    return weight


def _merged(rows: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each example the number of its distinct point (-1 where not kept), and each point's first example."""
    rows = np.ascontiguousarray(rows) + 0.0  # -0.0 and 0.0 are one value with two bit patterns
    seen: dict[tuple[int, bytes], int] = {}  # 16 bytes of a cryptographic hash stand for a row
    origin = np.full(len(rows), -1, dtype=np.int64)
    first: list[int] = []
    for example in np.flatnonzero(kept).tolist():
        number = seen.setdefault((int(labels[example]), hashlib.blake2b(rows[example], digest_size=16).digest()), len(first))
        if number == len(first):
            first.append(example)
        origin[example] = number
    return origin, np.array(first, dtype=np.int64)

"""The exponent of a power law through measured points, and how far it can be trusted."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Exponent(NamedTuple):
    """``value`` is proportional to ``size`` to this power.

    Attributes:
        slope: least squares of the logarithm of the medians on the logarithm of the sizes.
        error: its standard error, from the residuals; infinite for two sizes.
        lowest: the smallest slope through one repetition of each size, first with first, second with second.
        highest: the largest of these.
        last: the slope between the two largest sizes alone, where fixed costs weigh least.
    """

    slope: float
    error: float
    lowest: float
    highest: float
    last: float


def exponent(sizes: Sequence[float], samples: Sequence[Sequence[float]]) -> Exponent:
    """The exponent of what was measured, ``samples[i]`` being the repetitions at ``sizes[i]``, all positive.

    Raises:
        ValueError: fewer than two different sizes, or a value that has no logarithm.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(samples):
        raise ValueError(f"sizes must be at least two different ones, one for each list of samples, got {list(sizes)}")
    if min(*sizes, *(value for some in samples for value in some)) <= 0:
        raise ValueError("sizes and samples must be positive to have a logarithm; leave out what was too small to measure")
    order = sorted(range(len(sizes)), key=lambda place: sizes[place])
    sizes, samples = [sizes[i] for i in order], [samples[i] for i in order]
    medians = [statistics.median(some) for some in samples]
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in medians]
    slope, offset = statistics.linear_regression(x, y)
    left = sum((b - slope * a - offset) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    error = math.sqrt(left / (len(x) - 2) / spread) if len(x) > 2 else math.inf
    rounds = zip(*samples, strict=False)
    slopes = [statistics.linear_regression(x, [math.log(value) for value in one]).slope for one in rounds]
    return Exponent(slope, error, min(slopes), max(slopes), (y[-1] - y[-2]) / (x[-1] - x[-2]))

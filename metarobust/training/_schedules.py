"""Learning-rate schedules: pure functions of the progress, so that a resumed run needs no state of theirs."""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from metarobust._checks import finite, message, require

Schedule: TypeAlias = Callable[[float], float]
"""From the fraction of the steps that are done, in [0, 1), to a factor of the initial learning rate, at least 0."""


def piecewise(factors: Mapping[float, float]) -> Schedule:
    """A factor for each progress from which it holds; 1 before the first.

    Args:
        factors: from progress, in [0, 1), to factor, at least 0.

    Raises:
        TypeError: no mapping, or something in it is no number.
        ValueError: a progress or a factor is out of range.

    Example:
        >>> schedule = piecewise({0.5: 0.1, 0.75: 0.01})  # TRADES, CIFAR-10: the rate falls at epochs 50 and 75 of 100
        >>> [schedule(progress) for progress in (0.0, 0.49, 0.5, 0.8)]
        [1.0, 1.0, 0.1, 0.01]
    """
    if not isinstance(factors, Mapping):
        raise TypeError(message("factors", "a mapping from progress to factor", repr(factors), "write {0.5: 0.1, 0.75: 0.01}"))
    for progress, factor in factors.items():
        finite("a progress", progress, least=0.0)
        require(progress < 1, "a progress", "a fraction of the steps below 1", progress, "divide by the number of epochs")
        finite("a factor", factor, least=0.0)
    steps = sorted(factors.items())

    def schedule(progress: float) -> float:
        return next((float(factor) for start, factor in reversed(steps) if progress >= start), 1.0)

    return schedule


def cosine(progress: float) -> float:
    r"""Half a cosine, from 1 down to 0: :math:`(1 + \cos \pi t) / 2` (Loshchilov & Hutter, 2017, arXiv 1608.03983, eq. 5).

    Args:
        progress: the fraction t of the steps that are done, in [0, 1].

    Example:
        >>> round(cosine(0.0), 3), round(cosine(0.5), 3)
        (1.0, 0.5)
    """
    finite("progress", progress)
    return 0.5 * (1 + math.cos(math.pi * progress))

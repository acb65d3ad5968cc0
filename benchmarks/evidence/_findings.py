"""A claim, what was measured of it, and the words of a verdict."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.evidence._catalogue import Measured

SHOWN, PARTLY, NOT_SHOWN, OPPOSITE = "shown here", "shown in part", "not shown here", "the opposite is seen here"


class Finding(NamedTuple):
    """Sentences, and a verdict by the claim's rule."""

    sentences: list[str]
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of a paper.

    Attributes:
        name: a short handle, also the anchor on the page.
        says: what the paper says, in our words.
        rule: how the verdict follows from the figures.
        measurement: its name in the catalogue.
        measured: reads the figures.
    """

    name: str
    says: str
    rule: str
    measurement: str
    measured: Callable[[Measured], Finding | None]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean, and lowest to highest."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def share_verdict(met: int, of: int) -> str:
    """All cases: shown; half of them or more: in part; fewer: not shown."""
    return SHOWN if met == of else PARTLY if 2 * met >= of else NOT_SHOWN

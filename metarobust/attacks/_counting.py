"""Counting attack calls, so that "no attack was called here" is measured and not promised."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class CallCounter:
    """How many attacks were called (``calls``) and on how many rows in all (``examples``) since counting began."""

    calls: int = 0
    examples: int = 0


_counters: ContextVar[tuple[CallCounter, ...]] = ContextVar("attack_call_counters", default=())


@contextmanager
def count_calls() -> Iterator[CallCounter]:
    """Count every attack call of this library inside the ``with`` block; blocks may be nested.

    Example:
        >>> from metarobust.attacks import FGSM
        >>> from metarobust.threat_models import ThreatModel
        >>> with count_calls() as counter:
        ...     _ = FGSM(threat_model=ThreatModel())(lambda x: x, torch.rand(3, 4), torch.tensor([0, 1, 2]))
        >>> counter
        CallCounter(calls=1, examples=3)
    """
    counter = CallCounter()
    token = _counters.set((*_counters.get(), counter))
    try:
        yield counter
    finally:
        _counters.reset(token)


def record_call(examples: int) -> None:
    """Tell the counters in force that an attack was called; every attack does this first."""
    for counter in _counters.get():
        counter.calls += 1
        counter.examples += examples

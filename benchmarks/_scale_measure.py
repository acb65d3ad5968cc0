"""One point of a series: set up, memory of the first call, then repetitions of the CPU time of a call."""

import ctypes
import gc
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed

LEAST_SECONDS, MOST_CALLS = 0.05, 200
"""A repetition makes as many calls as take this long, but no more than that."""
REPETITIONS, MORE_REPETITIONS, SHORT = 3, 7, 0.3
"""More of them where one is shorter than so many seconds."""


class Prepared(NamedTuple):
    """What is measured: a call that can be repeated and may return counts, and where it stands on the axis."""

    run: Callable[[], Mapping[str, float] | None]
    size: float
    per: int = 1
    """Steps that one call makes; time is told per step."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One part as a function of one size.

    Attributes:
        part: what is measured.
        axis: what grows.
        sizes: what ``prepare`` is called with, ascending; the first also warms up the others.
        prepare: sets up one size.
        time: exponent that theory gives the time; None where it gives none.
        memory: the same of the memory.
        note: what is held fixed.
        processes: processes that share the work over gloo.
        mnist: whether it needs MNIST.
    """

    part: str
    axis: str
    sizes: tuple[int, ...]
    prepare: Callable[[int], Prepared]
    time: float | None
    memory: float | None
    note: str
    processes: int = 1
    mnist: bool = False

    @property
    def name(self) -> str:
        return f"{self.part}, by {self.axis}"


def measured(series: Series, size: int, *, rank: int = 0, store: str = "") -> dict[str, Any]:
    """Measure one point; to be called in a process that has measured nothing before.

    Memory is the peak of the resident set (``ru_maxrss``) during the first call above the resident set before it: Linux is asked
    to forget the peak of the set-up, and the allocator to give back what the set-up has freed. Where the system does not reset
    the peak, what a call needs below that of the set-up is not seen, and ``peak_reset`` is false.
    """
    torch.set_num_threads(1)
    if series.processes > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=series.processes)
    torch.manual_seed(0)
    series.prepare(series.sizes[0]).run()  # what is imported or compiled at first use
    torch.manual_seed(0)
    prepared = series.prepare(size)
    gc.collect()
    reset = _forget_peak()
    before = _peak()
    begin = time.process_time()
    counts = dict(prepared.run() or {})
    first = time.process_time() - begin
    memory = _peak() - before
    calls = max(1, min(MOST_CALLS, round(LEAST_SECONDS / max(first, 1e-6))))
    repetitions = MORE_REPETITIONS if calls * first < SHORT else REPETITIONS
    if series.processes > 1:  # all processes must make the same number of calls
        plan = torch.tensor([calls, repetitions])
        distributed.broadcast(plan, src=0)
        calls, repetitions = plan.tolist()
    seconds, wall = [], []
    for _ in range(repetitions):
        began, begin = time.perf_counter(), time.process_time()
        for _ in range(calls):
            prepared.run()
        seconds.append((time.process_time() - begin) / calls / prepared.per)
        wall.append((time.perf_counter() - began) / calls / prepared.per)
    if series.processes > 1:
        distributed.destroy_process_group()
    return {
        "seconds": seconds,
        "wall_seconds": wall,
        "memory_bytes": memory,
        "peak_reset": reset,
        "calls": calls,
        "size": prepared.size,
        "counts": counts,
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak() -> bool:
    """Give free memory back to the system, and make the peak what is resident now; whether the latter went well."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True

"""How a meta-training is watched: a live table on a terminal, plain lines everywhere else."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from metarobust.command_line._meta_train import MetaTrain

BARS = "▁▂▃▄▅▆▇█"
RECENT = 40
"""Values in the sparkline."""
LINE_EVERY = 10
"""Meta-updates between two plain lines; a generation of the search always has one."""


@contextmanager
def shown(flags: "MetaTrain", *, leads: bool) -> Iterator[Callable[[int, Any], None] | None]:
    """What to call after each round; None on processes that are silent."""
    if not leads:
        yield None
        return
    progress = Progress(total=flags.rounds, searches=flags.searches)
    if not sys.stdout.isatty():
        every = 1 if flags.searches else LINE_EVERY

        def line(done: int, found: Any) -> None:
            progress.add(done, found)
            if done % every == 0 or done == progress.total:
                print(progress.line(), flush=True)

        yield line
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    bars = console.encoding.lower().startswith("utf")
    with Live(progress.table(bars=bars), console=console, refresh_per_second=4) as live:

        def refresh(done: int, found: Any) -> None:
            progress.add(done, found)
            live.update(progress.table(bars=bars))

        yield refresh


class Progress:
    """What is known so far: numbers of the last round, recent values, and how long the rest will take.

    The time that remains is that of the rounds of this call, so that a resumed run does not count what it did not do.
    """

    def __init__(self, *, total: int, searches: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.searches, self.clock = total, searches, clock
        self.begin, self.done, self.rounds = clock(), 0, 0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.numbers: dict[str, float] = {}

    def add(self, done: int, found: Any) -> None:
        """A finished round: a meta-loss, or a generation of the search."""
        self.done, self.rounds = done, self.rounds + 1
        self.recent.append(found.mean if self.searches else found)
        if self.searches:
            self.numbers = {"best": found.best, "mean": found.mean, "median": found.median}
        else:
            last = list(self.recent)[-LINE_EVERY:]
            self.numbers = {"meta-loss": found, "mean of the last": sum(last) / len(last)}

    def times(self) -> dict[str, str]:
        """Elapsed, and remaining once a round is done."""
        elapsed = self.clock() - self.begin
        left = "?" if self.rounds == 0 else told_seconds(elapsed / self.rounds * (self.total - self.done))
        return {"elapsed": told_seconds(elapsed), "remaining": left}

    def line(self) -> str:
        """The last round on one line."""
        what = "generation" if self.searches else "iteration"
        parts = [f"{name} {value:.3f}" for name, value in self.numbers.items()]
        parts += [f"{name} {value}" for name, value in self.times().items()]
        return f"{what} {self.done} of {self.total}: {', '.join(parts)}"

    def table(self, *, bars: bool) -> "Table":
        """The same as a table, with a sparkline where the terminal can draw one."""
        from rich.table import Table

        cells = {"generation" if self.searches else "iteration": f"{self.done} of {self.total}"}
        cells |= {name: f"{value:.3f}" for name, value in self.numbers.items()} | self.times()
        if bars and self.recent:
            cells["score" if self.searches else "recent meta-losses"] = sparkline(self.recent)
        table = Table()
        for name in cells:
            table.add_column(name, justify="right")
        table.add_row(*cells.values())
        return table


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """A bar for each value, from the lowest to the highest; a question mark where it is no number.

    Example:
        >>> sparkline([0.0, 1.0, 0.5, float("nan")])
        '▁█▅?'
    """
    finite = [value for value in values if math.isfinite(value)]
    low, span = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    steps = [round((value - low) / span * (len(BARS) - 1)) if span and math.isfinite(value) else 0 for value in values]
    return "".join(BARS[step] if math.isfinite(value) else "?" for value, step in zip(values, steps, strict=True))


def told_seconds(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))

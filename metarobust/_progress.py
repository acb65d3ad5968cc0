"""A progress bar that is silent unless someone watches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Move the bar on by ``steps`` and optionally show a short text."""

    def __call__(self, steps: int, text: str = "") -> None: ...


@contextmanager
def progress_bar(title: str, total: int, *, silent: bool = False) -> Iterator[Advance]:
    """A rich progress bar on standard error; nothing at all when standard error is no terminal or ``silent``."""
    if silent or not sys.stderr.isatty():
        yield lambda steps, text="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=total, text="")
        yield lambda steps, text="": progress.update(bar, advance=steps, text=text)

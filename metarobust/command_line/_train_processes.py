"""The processes of torchrun under a command: each with a device, all of them stopped by the failure of one."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed

from metarobust._processes import Processes
from metarobust.command_line._evaluate_run import _device
from metarobust.training import initialise_from_environment

T = TypeVar("T")


@contextmanager
def joined_processes(device: str) -> Iterator[tuple[torch.device, Processes]]:
    """The device of this process and its place among those that torchrun started; alone without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        yield _device(device), Processes()
        return
    if device != "auto":
        raise ValueError(f"--device must be left out under torchrun, which gives each process its own, got {device}")
    own = initialise_from_environment()
    try:
        yield own, Processes.current()
    finally:
        distributed.destroy_process_group()


def agreed(processes: Processes, work: Callable[[], T]) -> T:
    """What ``work`` returns if it succeeds on every process; otherwise rank 0 raises the first failure, and the others end."""
    try:
        found, failure = work(), None
    except Exception as error:
        found, failure = None, error
    told = processes.gather(None if failure is None else str(failure))
    if failure is not None and processes.rank == 0:
        raise failure
    failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
    if failed and processes.rank == 0:
        rank, text = failed[0]
        raise ValueError(f"process {rank}: {text}")
    if failed:
        sys.exit(2)
    return found  # pyright: ignore[reportReturnType]

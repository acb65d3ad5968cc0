"""Runs the function of a script in two processes, which tests start as ``python SCRIPT FOLDER``."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch


def run(main: Callable[[Path, int], None]) -> NoReturn:
    """Call ``main(folder, rank)`` in two processes and end with the worse of their exit codes."""
    folder = Path(sys.argv[1])
    # Python 3.12 and later warn of threads where a process forks; these are idle ones of a linear algebra library.
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
    # The first optimizer imports slow parts of torch: here once, and not in every child.
    torch.optim.Adam([torch.zeros(1, requires_grad=True)]).step()
    children = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            try:
                main(folder, rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))

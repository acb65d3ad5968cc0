"""Both gradient streams under DistributedDataParallel: two processes with half a batch each find those of the batch."""

import os
import subprocess
import sys
from pathlib import Path

import factor_processes
import pytest
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, here = tmp_path_factory.mktemp("factors"), Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "error", str(here / "factor_processes.py"), str(folder)],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": f"{here.parent}:{here}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("source", factor_processes.SOURCES)
def test_two_processes_find_the_mean_of_their_halves(folder: Path, source: str) -> None:
    halves = [factor_processes.outcome(source, rows, parallel=False) for rows in (slice(0, 4), slice(4, 8))]
    first, second = (torch.load(folder / f"{source}-{rank}.pt", weights_only=True) for rank in range(2))
    streams = 3 * (len(first) // 4)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b)
        if number < streams:
            torch.testing.assert_close(a, (halves[0][number] + halves[1][number]) / 2, rtol=1e-6, atol=1e-12)


def test_the_estimate_of_two_processes_is_that_of_the_whole_batch(folder: Path) -> None:
    """It treats examples apart; the scaled factors do not, their activation scale is the mean over a process's batch."""
    source = "gradient+adversarial_estimate"
    together = torch.load(folder / f"{source}-0.pt", weights_only=True)
    for a, b in zip(together, factor_processes.outcome(source, slice(0, 8), parallel=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)

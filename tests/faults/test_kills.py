"""``kill -9`` at any moment: the same command again ends with the bits of one that was left alone; nothing is half-written.

Real processes, real SIGKILL: see killing.py beside this file.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import killing
import pytest


def outcomes(folder: Path, kills: int, writes: int, seed: int) -> dict[str, dict[str, Any]]:
    """What killing.py prints, by job; it fails by itself where anything differs."""
    command = [sys.executable, "-W", "error", killing.__file__, str(folder), str(kills), str(writes), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {found["job"]: found for found in map(json.loads, done.stdout.splitlines())}


def test_killed_at_some_moments(tmp_path: Path) -> None:
    found = outcomes(tmp_path, kills=1, writes=2, seed=0)
    assert found.keys() == killing.JOBS.keys()
    for told in found.values():
        assert (told["kills"], told["in_writes"]) == (1, 2)
        assert told["completed"] >= 1


@pytest.mark.slow
def test_killed_at_twenty_five_random_moments_and_in_ten_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = outcomes(tmp_path, kills=25, writes=10, seed=0)
    with capsys.disabled():
        print("", *found.values(), sep="\n")
    assert found.keys() == killing.JOBS.keys()
    for told in found.values():
        assert (told["kills"], told["in_writes"]) == (25, 10)
        assert told["resumed"] >= 10, "otherwise hardly a restart found anything to go on from"
        assert told["partial"] >= 3, "otherwise hardly a kill hit a write"

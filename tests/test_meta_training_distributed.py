"""Two processes that meta-train together end where one process ends, and resume bit by bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_training_processes import ESTIMATORS, outcome, run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("meta_training_processes.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in folder.glob("*.safetensors*")) == sorted(
        [f"{estimator}.safetensors{rank}" for estimator in ESTIMATORS for rank in ("", ".rank1")] + ["lost.safetensors"]
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_processes_are_one(estimator: str, found: list[dict[str, Any]]) -> None:
    trained = run(estimator)
    assert trained is not None
    alone = outcome(trained)
    first, second = (share[estimator]["straight"] for share in found)
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-9)
    for name, value in first["rule"].items():
        assert torch.equal(value, second["rule"][name]), name
        torch.testing.assert_close(value, alone["rule"][name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_both_resume_bit_by_bit(estimator: str, found: list[dict[str, Any]]) -> None:
    for share in found:
        straight, resumed = share[estimator]["straight"], share[estimator]["resumed"]
        assert straight["losses"] == resumed["losses"]
        assert all(torch.equal(value, resumed["rule"][name]) for name, value in straight["rule"].items())


def test_processes_that_stand_at_different_places_do_not_go_on(found: list[dict[str, Any]]) -> None:
    for share in found:
        assert share["half lost"].endswith(
            "must be as far on in every process, got 4 on rank 0, 0 on rank 1; bring back the files that are missing or behind, "
            "or delete all of them to start again"
        )

"""One weighting learned by two processes: the meta-step of the joint batch, and networks that stay together."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from weighting_processes import METHODS, meta_step, statistics


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("weighting_processes.py")
    outcome = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_take_the_meta_step_of_the_joint_batch(method: str, found: list[dict[str, Any]]) -> None:
    alone = meta_step(method, 0, 1)
    shares = [part["meta"][method] for part in found]
    torch.testing.assert_close(torch.cat([share["weights"] for share in shares]), alone["weights"], rtol=1e-7, atol=1e-12)
    for share in shares:
        assert share["meta_loss"] == pytest.approx(alone["meta_loss"], rel=1e-10)
        assert share["norm"] == pytest.approx(alone["norm"], rel=1e-7)
        torch.testing.assert_close(share["virtual"], alone["virtual"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(share["network"], alone["network"], rtol=1e-6, atol=1e-10)
    assert all(torch.equal(value, shares[1]["network"][name]) for name, value in shares[0]["network"].items())


def test_statistics_are_those_of_the_joint_batches(found: list[dict[str, Any]]) -> None:
    for share in found:
        torch.testing.assert_close(share["statistics"], statistics(0, 1), rtol=1e-12, atol=0)


def test_networks_that_differ_at_first_are_one_after_training(found: list[dict[str, Any]]) -> None:
    first, second = (share["trained"] for share in found)
    assert int(first["calls"]) == 9
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

"""Training in two processes (gloo): the parameters of one process, one file, one course. See tests/training_processes.py."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training_processes as processes
from torch import Tensor

from metarobust.training import initialise_from_environment

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What rank 0 and rank 1 wrote."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-W", "error", processes.__file__, str(folder)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_states(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", processes.RUNS)
def test_two_processes_end_with_the_parameters_of_one(name: str, found: list[Found]) -> None:
    """Joint batches of 8, 8 and 7 rows; each process starts from other parameters, those of rank 0 count."""
    expected = processes.told(processes.build(**processes.RUNS[name]))
    first, second = (rank[name] for rank in found)
    for part in ("last", "best"):
        assert_states(first[part], expected[part], 1e-10)
        assert_states(second[part], first[part])
    assert first["best_epoch"] == second["best_epoch"] == expected["best_epoch"]
    assert first["history"] == second["history"]
    for mine, theirs in zip(first["history"], expected["history"], strict=True):
        for value in ("loss", "learning_rate", "clean_accuracy", "robust_accuracy"):
            assert mine[value] == pytest.approx(theirs[value], abs=1e-10), value
    start = processes.network().state_dict()
    assert all((first["last"][key] - start[key]).abs().max() > 1e-3 for key in start), "otherwise nothing was compared"


def test_clipping_and_diagnostics_are_those_of_the_joint_batch(found: list[Found]) -> None:
    free, clipped = (found[0][name]["last"]["0.weight"] for name in ("adversarial training", "clipped"))
    assert not torch.equal(free, clipped)
    assert found[0]["scalar"]["history"][0]["diagnostics"] == pytest.approx(
        {"rows": (8 * 4 + 8 * 4 + 7 * 3.5) / 23, "odd": 3.0}  # one process alone has an odd part of the last batch
    )
    dual = found[0]["armor"]["history"][0]["diagnostics"]
    expected = processes.told(processes.build(**processes.RUNS["armor"]))["history"][0]["diagnostics"]
    assert dual == pytest.approx(expected, abs=1e-9)
    assert dual.keys() >= {"reweighting"}


def test_a_run_in_parts_ends_with_the_same_bits_on_both_processes(found: list[Found]) -> None:
    """Noise, dropout and BatchNorm; the first part of five begins with the parameters of rank 0, the others with any."""
    for rank in found:
        for part in ("last", "best"):
            assert_states(rank["resume"]["resumed"][part], rank["resume"]["straight"][part])
            assert_states(rank["resume"]["straight"][part], found[0]["resume"]["straight"][part])
        assert rank["resume"]["resumed"]["history"] == rank["resume"]["straight"]["history"]
    assert found[0]["resume"]["files"] >= 9
    assert found[1]["resume"]["files"] == 0, "rank 0 alone writes"


def test_each_process_has_noise_of_its_own(found: list[Found]) -> None:
    seeds = found[0]["streams"] + found[1]["streams"]
    assert len(set(seeds)) == len(seeds) == 18


def test_every_process_refuses_with_the_same_sentence(found: list[Found]) -> None:
    first, second = (rank["refusals"] for rank in found)
    assert first == second
    assert re.match(r"FloatingPointError: training must be .*, got loss nan in epoch 1, step \d of 3, examples \[", first["nan"])
    examples = re.search(r"examples \[(.*?)\]", first["nan"])
    assert examples is not None
    assert set(examples[1].split(", ")) <= {"4", "9"}
    assert "loss depends on every parameter that requires a gradient, got no gradient for 0.bias, 2.weight" in first["unused"]
    assert "such that every process gets an example of each batch, got 1 for 2 processes" in first["too small"]
    assert "got on rank 1, against rank 0, seed 1 there and 0 here; call fit with the same" in first["other seed"]
    assert "got on rank 1, against rank 0, finished epochs 0 there and 3 here" in first["other file"]


def test_without_torchrun_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert initialise_from_environment().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not torch.distributed.is_initialized()


def test_torchrun_variables_are_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    initialise_from_environment()
    assert calls == ["nccl" if torch.cuda.is_available() else "gloo"]


def test_radius_and_price_of_armor_get_the_gradient_of_the_joint_batch(found: list[Found]) -> None:
    expected = processes.learned(0, 1)
    assert bool((expected.abs() > 1e-3).all())
    for rank in found:
        torch.testing.assert_close(rank["learned"], expected, rtol=1e-9, atol=0)

"""The command line as a user meets it: help, one-sentence errors with exit code 2, and the quick demo from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from metarobust.meta_optimizers import load
from metarobust.models import mlp


def metarobust(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "import sys; from metarobust.command_line import main; main(sys.argv[1:])"
    environment = os.environ | {"COLUMNS": "120", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


def test_help_names_the_verbs_and_their_flags() -> None:
    top = metarobust("--help")
    assert top.returncode == 0
    assert "demo" in top.stdout
    verb = metarobust("demo", "--help")
    assert verb.returncode == 0
    for flag in ("--out", "--quick", "--seed"):
        assert flag in verb.stdout


def test_help_imports_nothing_heavy() -> None:
    """Beyond what the interpreter and tyro load, --help must not even import torch."""
    code = (
        "import sys\n"
        "from metarobust.command_line import main\n"
        "try:\n    main(['demo', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'torchvision', 'sklearn', 'matplotlib', 'learn2learn', 'ot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("arguments", [("demo", "--fast"), ("dem",), ("demo", "--seed", "one"), ("demo", "--seed", "-1"), ()])
def test_bad_flags_exit_with_2_and_one_sentence(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = metarobust(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("metarobust: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unwritable_out_is_one_sentence_before_any_work(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    done = metarobust("demo", "--out", str(occupied / "below"))
    assert done.returncode == 2
    expected = f"--out must be a folder that can be written to, got {occupied / 'below'} (Not a directory); pass another folder"
    assert done.stderr.strip().splitlines() == [f"metarobust: {expected}"]
    assert occupied.read_text() == "not a folder"


def test_quick_demo_from_end_to_end(tmp_path: Path) -> None:
    """The same pipeline as the default: contract of report.json, files whole, optimizer usable, no attack on a target."""
    out = tmp_path / "out"
    done = metarobust("demo", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "quick run: a smoke test, not evidence" in done.stdout
    assert sorted(p.name for p in out.iterdir()) == ["meta_optimizer.safetensors", "report.json", "robust_accuracy.png"]
    assert (out / "robust_accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"quick", "data", "settings", "attack_calls_on_target", "targets", "seconds", "versions"}
    assert report["quick"] is True
    assert report["attack_calls_on_target"] == 0
    assert set(report["targets"]) == {"mlp", "cnn"}
    methods = {"lstm", "lstm_one_stream", "control", "factor_rule", "adam", "sgd_momentum", "pgd_adversarial_training"}
    for target in report["targets"].values():
        assert set(target) == {"results", "gap_closed"}
        assert set(target["results"]) == methods
        robust = {name: values["robust"]["mean"] for name, values in target["results"].items()}
        for values in target["results"].values():
            for kind in ("clean", "robust"):
                assert set(values[kind]) == {"mean", "sd", "seeds"}
                assert len(values[kind]["seeds"]) == 3
                assert values[kind]["mean"] == pytest.approx(sum(values[kind]["seeds"]) / 3)
            assert values["robust"]["mean"] <= values["clean"]["mean"]
            assert values["clean"]["mean"] > 0.5, "every method must have learned something"
        baseline = max(robust["adam"], robust["sgd_momentum"])
        share = (robust["lstm"] - baseline) / (robust["pgd_adversarial_training"] - baseline)
        assert target["gap_closed"] == pytest.approx(share)
    with safe_open(out / "meta_optimizer.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["metarobust_header"])
    assert header["settings"]["gradient_source"] == "gradient+perturbed_factors"
    assert header["record"]["meta_training"]["iterations"] == 24
    optimizer = load(out / "meta_optimizer.safetensors").torch_optimizer(mlp([4, 3, 2]).parameters(), total_steps=5)
    assert isinstance(optimizer, torch.optim.Optimizer)

"""The command line as a user meets it: help, one-sentence errors with exit code 2, and the quick demo from end to end."""

import json
import os
import pickle
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from metarobust import __version__
from metarobust.command_line import _version, main
from metarobust.command_line._evaluate import parse_number
from metarobust.data import load as load_data
from metarobust.evaluation import evaluate
from metarobust.evaluation._run import EvaluationRun
from metarobust.meta_optimizers import load
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel


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


def test_a_renamed_flag_is_told() -> None:
    done = metarobust("train", "--data", "digits", "--epsilon", "0.1", "--optimizer", "sgd")
    assert done.returncode == 2
    assert done.stderr == "metarobust: train does not know --optimizer (it is --update now); run metarobust train --help\n"


def test_a_reader_that_stops_is_no_failure() -> None:
    code = "import sys; from metarobust.command_line._main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()  # before anything is written
        said = running.stderr.read()
    assert said == ""
    assert running.returncode == 141


def test_help_names_the_verbs_and_their_flags() -> None:
    top = metarobust("--help")
    assert top.returncode == 0
    assert "demo" in top.stdout
    assert "evaluate" in top.stdout
    verb = metarobust("demo", "--help")
    assert verb.returncode == 0
    for flag in ("--out", "--quick", "--seed"):
        assert flag in verb.stdout


@pytest.mark.parametrize("verb", ["demo", "evaluate"])
def test_help_imports_nothing_heavy(verb: str) -> None:
    """Beyond what the interpreter and tyro load, --help must not even import torch."""
    code = (
        "import sys\n"
        "from metarobust.command_line import main\n"
        f"try:\n    main(['{verb}', '--help'])\nexcept SystemExit:\n    pass\n"
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
    assert not re.search("──|---|Traceback", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "evaluate --eps .3 --model a:b --data mnist",
            "evaluate does not know --eps (did you mean --epsilon?) and needs --epsilon",
        ),
        (
            "bound --data digits --epsilons 0.8 0.9",
            "bound has no place for 0.9; write the values of one flag in one word, with commas: 0.8,0.9",
        ),
        ("evaluate --eps=.3 --model a:b --data mnist --epsilon 1", "evaluate does not know --eps=.3 (did you mean --epsilon?)"),
        ("evaluate --data mnist", "evaluate needs --model, --epsilon"),
        ("bound --model a:b --epsilons 1 --data mnist", "bound does not know --model"),
        ("demo --fast", "demo does not know --fast"),
        (
            "evalute --norm l2",
            "the first word must be one of demo, train, evaluate, bound, meta-train, transfer, version, got 'evalute'",
        ),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_unknown_and_missing_flags_are_named(
    arguments: str, sentence: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    verb = "" if arguments.startswith("evalute") else arguments.split()[0] + " "
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"metarobust: {sentence}; run metarobust {verb}--help\n"


def test_version_as_a_flag_and_as_a_verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("--version", "version"):
        main([word])
        first, *others = capsys.readouterr().out.splitlines()
        assert first == f"metarobust {__version__}"
        told = dict(line.split(": ", 1) for line in others)
        assert list(told) == ["python", "system", "packages", "processors", "GPUs"]
        assert f"torch {torch.__version__.split('+')[0]}" in told["packages"]
        assert told["python"].startswith(platform.python_version())
    monkeypatch.setattr(_version, "PACKAGES", ("torch", "no-such-package"))
    assert _version.surroundings()["packages"].endswith("no-such-package not installed")


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
    attacks = report["settings"]["evaluation_attacks"]
    assert list(attacks) == ["pgd-20", "margin-pgd-20"], "as the axis of the figure says"
    assert ["steps=20" in attack for attack in attacks.values()] == [True, True]
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


# metarobust evaluate --------------------------------------------------------------------------------------------------

NETS = """
from torch import nn
from metarobust.models import Normalize, mlp

def build():
    return mlp([64, 8, 10])

def wide():
    return mlp([64, 9, 10])

def deeper():
    return mlp([64, 8, 8, 10])

def colour():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 10))

def whole():
    return nn.Sequential(Normalize(0.5, 0.5), build())

def colour3():
    return nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), build())

def number():
    return 7

def broken():
    return undefined_name

not_a_function = 3
"""


@cache
def trained_net() -> nn.Module:
    """An MLP on digits, by 60 steps of plain gradient descent (torch.optim takes seconds to import)."""
    torch.manual_seed(0)
    model, digits = mlp([64, 8, 10]), load_data("digits", train=True)
    for _ in range(60):
        loss = F.cross_entropy(model(digits.images), digits.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p -= 0.5 * gradient
    return model.eval()


class Shell:
    """A folder with nets.py and net.pt, and the command run inside this process (a fresh interpreter takes seconds)."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        (folder / "nets.py").write_text(NETS)
        self.model = trained_net()
        torch.save(self.model.state_dict(), folder / "net.pt")

    def __call__(self, *more: str, **flags: Any) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        chosen = {"model": f"{self.folder}/nets.py:build", "weights": self.folder / "net.pt", "data": "digits", "epsilon": "0.1"}
        chosen |= {"protocol": "quick", "examples": 40, "device": "cpu"} | flags
        arguments = [word for name, v in chosen.items() if v is not None for word in ("--" + name.replace("_", "-"), str(v))]
        code = 0
        try:
            main(["evaluate", *arguments, *more])
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def fails(self, **flags: Any) -> str:
        """The one sentence of a failure, without the program's name."""
        code, out, err = self(**flags)
        assert (code, out) == (2, ""), (code, out, err)
        (line,) = err.splitlines()
        assert line.startswith("metarobust: ")
        return line.removeprefix("metarobust: ")


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    return Shell(tmp_path, capsys)


def test_evaluate_prints_the_library_report_and_writes_its_files(shell: Shell) -> None:
    code, out, err = shell(json=shell.folder / "r.json", plot=shell.folder / "r.png", seed=3, batch_size=16)
    assert (code, err) == (0, "")
    assert out.startswith("40 examples, l_inf, epsilon 0.1, box [0, 1]\n")
    assert out.endswith(f"wrote {shell.folder / 'r.json'} and {shell.folder / 'r.png'}\n")
    assert (shell.folder / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    data = load_data("digits", train=False).select(torch.arange(40))
    expected = evaluate(shell.model.eval(), data, threat_model=ThreatModel(epsilon=0.1), protocol="quick", seed=3, batch_size=16)
    written, own = json.loads((shell.folder / "r.json").read_text()), json.loads(expected.to_json())
    del written["seconds"], own["seconds"]
    assert written == own
    assert expected.clean_accuracy > expected.worst_case_accuracy > 0


@pytest.mark.parametrize(
    ("text", "value"), [("0.3", 0.3), ("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("1e-2", 0.01), ("0", 0.0), ("-1/2", -0.5)]
)
def test_numbers_and_fractions(text: str, value: float) -> None:
    assert parse_number("--epsilon", text) == value


def test_weights_in_every_usual_wrapping_give_the_same_report(shell: Shell) -> None:
    state = shell.model.state_dict()
    parallel = {f"module.{name}": value for name, value in state.items()}
    compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
    forms = {
        "nested.pt": {"state_dict": state, "epoch": 3},
        "model.pt": {"model": parallel, "best": 0.5},
        "deep.pt": {"state_dict": {"model": compiled}},
        "parallel.pt": parallel,
    }
    for name, content in forms.items():
        torch.save(content, shell.folder / name)
    save_file(state, shell.folder / "net.safetensors")
    plain = shell(json=shell.folder / "r.json")
    expected = json.loads((shell.folder / "r.json").read_text())
    assert plain[0] == 0
    for name in (*forms, "net.safetensors"):
        assert shell(weights=shell.folder / name, json=shell.folder / "r.json")[0] == 0, name
        assert json.loads((shell.folder / "r.json").read_text()) | {"seconds": 0} == expected | {"seconds": 0}, name


def test_npz_data_is_read(shell: Shell) -> None:
    digits = load_data("digits", train=False).select(torch.arange(30))
    pixels = (digits.images.squeeze(1) * 255).round().to(torch.uint8).numpy()
    np.savez(shell.folder / "own.npz", images=pixels, labels=digits.labels.numpy())
    code, out, _ = shell(data=shell.folder / "own.npz", examples=None)
    assert code == 0
    assert out.startswith("30 examples")


class Payload:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("loading weights executed code",))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"epsilon": "8:255"}, "--epsilon must be a number such as 0.3 or 8/255, got '8:255'"),
        ({"epsilon": "1/0"}, "--epsilon must be a number such as 0.3 or 8/255, got '1/0'"),
        ({"epsilon": "8"}, "epsilon must be at most 1 .* write 8 / 255"),
        ({"examples": 0}, "--examples must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be an integer >= 1, got 0"),
        ({"seed": -1}, "--seed must be an integer >= 0, got -1"),
        ({"norm": "l3"}, ".*l3.*; run metarobust evaluate --help"),
        ({"device": "abacus"}, "--device must be cpu, or a device that this machine has, got 'abacus'"),
        ({"data": "mnst"}, "--data mnst: name must be one of 'digits', 'mnist', .* got 'mnst'; .* a file that ends in .npz"),
        ({"data": "none.npz"}, "--data must name a file that exists, got none.npz"),
        ({"data": "FOLDER/wrong.npz"}, "--data .*/wrong.npz: .*labels.*"),
        ({"model": "nets.py"}, "--model must be FILE.py:FUNCTION, got 'nets.py'; write nets.py:build"),
        ({"model": "FOLDER/none.py:build"}, "--model must name a file that exists, got .*none.py"),
        ({"model": "FOLDER/nets.py:biuld"}, "--model must name a function of .*, got 'biuld'; the file has build, wide, .*"),
        ({"model": "FOLDER/nets.py:not_a_function"}, "--model must name a function of .*"),
        ({"model": "FOLDER/nets.py:number"}, "--model must name a function that returns an nn.Module, number returned a int"),
        ({"model": "FOLDER/nets.py:broken"}, "--model must run without errors, got NameError in .*nets.py, line 27: .*"),
        ({"model": "FOLDER/syntax.py:build"}, "--model must run without errors, got SyntaxError in .*syntax.py, line 2: .*"),
        ({"model": "FOLDER/nets.py:colour", "weights": None}, r"--model must take images of the data, \[1, 1, 8, 8\], got .*"),
        ({"model": "FOLDER/nets.py:whole"}, r"--weights .* which fits its part '1' alone; load the weights inside whole\(\), .*"),
        ({"model": "FOLDER/nets.py:colour3", "weights": None}, r"--model must take .* ValueError: x must be of 3 channels, .*"),
        ({"weights": "FOLDER/none.pt"}, "--weights must name a file that exists, got .*none.pt"),
        ({"weights": "FOLDER/nets.py"}, "--weights must be a state dictionary that loads without executing code, got .*"),
        ({"weights": "FOLDER/payload.pt"}, "--weights must be a state dictionary that loads without executing code, got .*"),
        ({"weights": "FOLDER/half.safetensors"}, "--weights .* must be a safetensors file, got one that cannot be read, .*"),
        ({"weights": "FOLDER/tensor.pt"}, "--weights must be a state dictionary, got a Tensor in .*"),
        ({"model": "FOLDER/nets.py:wide"}, r"--weights must fit the model, got \S+ of shape \[8, 64\] .* needs \[9, 64\]"),
        ({"model": "FOLDER/nets.py:deeper"}, r"--weights must fit the model, got .* with \S+, \S+ missing; build the model .*"),
        ({"weights": "FOLDER/other.pt"}, r".* with \S+, \S+, \S+ and 1 more missing and a, b, c and 2 more unexpected; .*"),
        ({"checkpoint": "FOLDER/none/run"}, "--checkpoint must be a file .*, got .*, whose folder does not exist; .*"),
        ({"json": "FOLDER"}, "--json must be a file in an existing folder, got the folder .*; pass another path"),
        ({"plot": "FOLDER/none/p.png"}, "--plot must be a file in an existing folder, got .*"),
        ({"plot": "FOLDER/p.doc"}, "--plot must end in .png, .jpg, .pdf or .svg, got .*p.doc"),
        ({"checkpoint": "FOLDER/other.pt"}, "checkpoint .* must be a safetensors file, got one that cannot be read, .*"),
    ],
)  # fmt: skip
def test_evaluate_fails_with_one_sentence(shell: Shell, flags: dict[str, Any], sentence: str) -> None:
    folder = shell.folder
    (folder / "syntax.py").write_text("import torch\ndef build(:\n")
    np.savez(folder / "wrong.npz", images=np.zeros((2, 8, 8), dtype=np.uint8))
    (folder / "payload.pt").write_bytes(pickle.dumps(Payload()))
    (folder / "half.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({name: torch.zeros(1) for name in "abcde"}, folder / "other.pt")
    said = shell.fails(**{name: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for name, v in flags.items()})
    assert re.fullmatch(sentence, said), said


def test_root_and_download_are_passed_on_and_absence_is_a_sentence(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    roots: list[Any] = []

    def absent(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("no such root")

    def load(name: str, *, train: bool, root: Path | None, download: bool) -> Any:
        roots.append((name, train, root, download))
        return load_data("digits", train=False)

    monkeypatch.setattr("metarobust.command_line._points.load", load)
    assert shell(data="mnist")[0] == 0
    assert shell("--download", data="mnist", root="/somewhere")[0] == 0
    assert roots == [("mnist", False, None, False), ("mnist", False, Path("/somewhere"), True)]
    monkeypatch.setattr("metarobust.command_line._points.load", absent)
    said = shell.fails(data="mnist")
    remedy = "pass --root or set METAROBUST_DATA to a folder that has it, or pass --download"
    assert said == f"--data mnist is not in the data root; {remedy}"


def test_interrupt_says_how_to_go_on_and_the_same_command_goes_on(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked, rows_done = EvaluationRun._attacked, []

    def interrupt(run: EvaluationRun, attack: Any, rows: Tensor, generator: torch.Generator) -> Any:
        if len(rows_done) == 2:
            raise KeyboardInterrupt
        rows_done.append(rows.tolist())
        return attacked(run, attack, rows, generator)

    path = shell.folder / "run.safetensors"
    whole = shell(json=shell.folder / "whole.json", batch_size=8)
    assert whole[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationRun, "_attacked", interrupt)
        code, _, err = shell(batch_size=8)
        assert code == 130
        assert err.splitlines()[-1] == (
            "metarobust: interrupted; nothing was kept: with --checkpoint FILE the same command would go on from where it stopped"
        )
        rows_done.clear()
        code, _, err = shell(batch_size=8, checkpoint=path)
        assert code == 130
        kept = f"metarobust: interrupted; the work is kept in {path}: run the same command again to go on"
        assert err.splitlines()[-1] == kept
    code, _, err = shell(batch_size=8, checkpoint=path, json=shell.folder / "resumed.json")
    assert code == 0
    found, expected = (json.loads((shell.folder / f"{name}.json").read_text()) for name in ("resumed", "whole"))
    assert found | {"seconds": 0} == expected | {"seconds": 0}
    assert "seed 0 there and 1 here" in shell.fails(batch_size=8, checkpoint=path, seed=1)

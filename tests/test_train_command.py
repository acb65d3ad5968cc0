"""``metarobust train`` as a user meets it: every objective, files, resume, refused flags, the command that judges the model."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from metarobust.attacks import PGD
from metarobust.command_line import _train_run, main
from metarobust.command_line._train import Train
from metarobust.command_line._train_data import divided, read_training_data
from metarobust.command_line._train_network import chosen_network
from metarobust.command_line._train_processes import agreed
from metarobust.command_line._train_report import reporter
from metarobust.data import LabelledImages, load
from metarobust.divergences import KL, Alpha, Renyi
from metarobust.objectives import ARMOR, MART, TRADES, UDR, AdversarialTraining, BETATraining, SmoothedBETATraining
from metarobust.threat_models import ThreatModel
from metarobust.training import EpochRecord, TrainingResult, fit

Shell = Callable[..., tuple[int, str, str]]
PLOT, PNG = TrainingResult.plot, b"\x89PNG\r\n\x1a\n"
FILES = ["net-last.safetensors", "net.json", "net.png", "net.py", "net.safetensors"]
NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))

def five():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
"""


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs the command inside this process, in a folder of its own; gives exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(TrainingResult, "plot", lambda _, path, title: path.write_bytes(PNG))  # drawing takes long

    def run(*more: str, **flags: Any) -> tuple[int, str, str]:
        chosen = {"data": "digits", "epsilon": "0.1", "examples": 60, "batch_size": 30, "epochs": 1, "steps": 1}
        chosen |= {"device": "cpu", "out": "net.safetensors"} | flags
        arguments = [word for name, v in chosen.items() if v is not None for word in ("--" + name.replace("_", "-"), str(v))]
        code = 0
        try:
            main(["train", *arguments, *more])
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any, dict[str, Any]]]:
    """Model, objective, data and the other arguments of each ``fit``, with what it returned under ``result``."""
    seen: list[tuple[Any, Any, Any, dict[str, Any]]] = []

    def recorded(model: Any, objective: Any, data: Any, **others: Any) -> Any:
        seen.append((model, objective, data, others))
        others_of_fit = dict(others)
        others["result"] = fit(model, objective, data, **others_of_fit)
        return others["result"]

    monkeypatch.setattr(_train_run, "fit", recorded)
    return seen


def record(name: str = "net") -> dict[str, Any]:
    return json.loads(Path(f"{name}.json").read_text())


def in_folder() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


# Objectives and settings ----------------------------------------------------------------------------------------------

BALL = ThreatModel(norm="linf", epsilon=0.1)
ATTACK = PGD(threat_model=BALL, steps=1)
OBJECTIVES = {
    "at": ({}, AdversarialTraining(attack=ATTACK)),
    "trades": ({"beta": 2}, TRADES(threat_model=BALL, steps=1, beta=2.0)),
    "mart": ({"beta": 0}, MART(attack=ATTACK, beta=0.0)),
    "udr": ({}, UDR(threat_model=BALL, steps=1)),
    "beta": ({"hypergradient": "unrolled"}, BETATraining(threat_model=BALL, steps=1, hypergradient="unrolled")),
    "smoothed-beta": ({"mu": 0.5}, SmoothedBETATraining(threat_model=BALL, steps=1, mu=0.5)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_built_from_its_flags_and_trains(shell: Shell, name: str) -> None:
    flags, expected = OBJECTIVES[name]
    code, out, _ = shell(objective=name, **flags)
    assert code == 0
    assert record()["objective"] == repr(expected)
    assert out.startswith(f"{name}, l_inf, epsilon 0.1, digits: 54 examples to train on, 6 held out\nmodel mlp:128, 9,610 par")
    assert in_folder() == FILES


ARMOURED = {
    "armor-at": ({}, {"divergence": KL()}),
    "armor-trades": ({"divergence": "kl", "kappa": 0.25}, {"divergence": KL(), "kappa": 0.25}),
    "armor-mart": ({"divergence": "alpha", "order": 2}, {"divergence": Alpha(order=2.0)}),
    "armor-udr": ({"divergence": "renyi", "order": 0.5}, {"divergence": Renyi(order=0.5)}),
    "armor-beta": ({"robust_classes": "3, 1,3"}, {"divergence": KL(), "robust_classes": (1, 3)}),
    "armor-smoothed-beta": ({"natural_weight": 0.25}, {"divergence": KL(), "natural_weight": 0.25}),
}


@pytest.mark.parametrize("name", ARMOURED)
def test_armor_goes_in_front_of_every_objective(shell: Shell, name: str) -> None:
    flags, settings = ARMOURED[name]
    inner, loss = OBJECTIVES[name.removeprefix("armor-")]
    assert shell(objective=name, radius=0.2, **inner, **flags)[0] == 0
    assert record()["objective"] == repr(ARMOR(robust_loss=loss, radius=0.2, **settings))
    assert "multiplier" in record()["history"][0]["diagnostics"]


def test_losses_keep_their_own_defaults(shell: Shell, fits: list[Any]) -> None:
    for name in ("trades", "mart", "beta"):
        assert shell(objective=name, out=f"{name}.safetensors", norm="l2", epsilon="1/2", steps=2)[0] == 0
    ball = ThreatModel(norm="l2", epsilon=0.5)
    expected = [TRADES(threat_model=ball, steps=2), MART(attack=PGD(threat_model=ball, steps=2))]
    assert [objective for _, objective, _, _ in fits] == [*expected, BETATraining(threat_model=ball, steps=2)]
    assert fits[0][3]["validation_attack"] == PGD(threat_model=ball, steps=20)
    assert "--norm l2 --epsilon 1/2" in record("beta")["evaluate"]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [({"steps": 3}, 3), ({}, 10), ({"transport": "pgd"}, 10), ({"transport": "fgsm"}, None), ({"transport": "none"}, None)],
)
def test_the_record_tells_the_steps_that_the_attack_took(
    shell: Shell, interrupt: Any, fits: list[Any], flags: dict[str, Any], steps: int | None
) -> None:
    interrupt(2)
    assert shell(**{"steps": None} | flags)[0] == 130
    assert record()["settings"]["steps"] == steps
    if steps == 10:  # a default that is written out is the same command
        flags = flags | {"steps": 10}
    code, out, err = shell(**{"steps": None} | flags)
    assert code == 0, err
    assert "going on from net.checkpoint" in out
    assert record()["settings"]["steps"] == steps
    assert getattr(fits[-1][1].attack, "steps", None) == steps


@pytest.mark.parametrize(
    ("flags", "kind", "settings", "factors"),
    [
        ({}, torch.optim.Adam, {"lr": 0.001, "weight_decay": 0}, [1, 0.1, 0.01]),
        ({"update": "sgd"}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005}, [1, 0.1, 0.01]),
        ({"update": "adamw", "schedule": "cosine"}, torch.optim.AdamW, {"lr": 0.001, "weight_decay": 0.01}, [1, 0.5, 0.095]),
        (
            {"update": "sgd", "learning_rate": 0.2, "momentum": 0, "weight_decay": 0, "schedule": "0.4:0.5"},
            torch.optim.SGD, {"lr": 0.2, "momentum": 0, "weight_decay": 0}, [1, 0.5, 0.5],
        ),
        ({"learning_rate": 0.01, "schedule": "constant"}, torch.optim.Adam, {"lr": 0.01}, [1, 1, 1]),
    ],
)  # fmt: skip
def test_optimizer_and_schedule(
    shell: Shell, fits: list[Any], flags: dict[str, Any], kind: type, settings: dict[str, float], factors: list[float]
) -> None:
    assert shell(**flags)[0] == 0
    ((_, _, _, others),) = fits
    assert type(others["optimizer"]) is kind
    assert {name: others["optimizer"].param_groups[0][name] for name in settings} == settings
    schedule = others["schedule"] or (lambda progress: 1)
    assert [schedule(progress) for progress in (0.0, 0.5, 0.8)] == pytest.approx(factors, abs=1e-3)


def test_the_other_settings_reach_the_training(shell: Shell, fits: list[Any]) -> None:
    code, _, _ = shell(
        epochs=2, batch_size=20, clip_norm=0.5, amp="bfloat16", seed=5, validation="12", data="digits", examples=80
    )
    assert code == 0
    ((_, _, data, others),) = fits
    expected = {"epochs": 2, "batch_size": 20, "clip_norm": 0.5, "amp": "bfloat16", "seed": 5}
    assert {name: others[name] for name in expected} == expected
    assert (len(data), len(others["validation"])) == (68, 12)
    for state, name in ((others["result"].best, "net"), (others["result"].last, "net-last")):
        assert_same(load_file(f"{name}.safetensors"), state)
    found = record()
    assert [epoch["loss"] for epoch in found["history"]] == [epoch.loss for epoch in others["result"].history]
    assert found["best_epoch"] == others["result"].best_epoch
    assert found["settings"]["clip_norm"] == 0.5
    assert found["validation"] == {"train": 68, "held_out": 12, "attack": repr(PGD(threat_model=BALL, steps=20))}
    assert set(found["versions"]) == {"metarobust", "torch", "python"}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_seed_decides_parameters_and_split(shell: Shell, fits: list[Any]) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert shell(out=f"{name}.safetensors", seed=seed)[0] == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (load_file(f"{name}-last.safetensors") for name in "abc")
    assert_same(a, b)
    assert (a["1.weight"] - c["1.weight"]).abs().max() > 0.05, "other initial parameters"
    splits = [others["validation"].images for _, _, _, others in fits]
    assert torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[0], splits[2])


@pytest.mark.parametrize(("validation", "count"), [("0.25", 75), ("1/3", 100), ("40", 40), ("1e2", 100)])
def test_validation_is_a_stratified_part_of_the_training_data(validation: str, count: int) -> None:
    flags = Train(data="digits", epsilon="0.1", examples=300, validation=validation)
    data = read_training_data(flags)
    assert torch.equal(data.images, load("digits", train=True).images[:300])
    parts = divided(flags, data)
    train, held_out = parts.train, parts.held_out
    assert (len(train), len(held_out)) == (300 - count, count)
    share = data.labels.bincount() * count / 300
    assert (held_out.labels.bincount(minlength=10) - share).abs().max() <= 2
    rows = torch.cat([train.images, held_out.images]).flatten(1)
    assert torch.equal(rows.unique(dim=0), data.images.flatten(1).unique(dim=0)), "every example once, in one of the two"


def test_only_training_data_is_read(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def digits(name: str, *, train: bool, root: Path | None, download: bool) -> LabelledImages:
        asked.append((name, train, root, download))
        return load("digits", train=True)

    monkeypatch.setattr("metarobust.command_line._points.load", digits)
    assert shell("--download", data="mnist", root="/some where")[0] == 0
    assert asked == [("mnist", True, Path("/some where"), True)]
    assert record()["evaluate"].endswith("--data mnist --norm linf --epsilon 0.1 --root '/some where'")


# Networks, and the command that judges ------------------------------------------------------------------------------------


def images(channels: int, height: int, width: int, classes: int = 3) -> LabelledImages:
    return LabelledImages(torch.rand(4, channels, height, width), torch.zeros(4, dtype=torch.int64), classes)


@pytest.mark.parametrize(
    ("text", "shape", "name", "source"),
    [
        (None, (1, 8, 8), "mlp:128", "mlp([64, 128, 3])"),
        (None, (1, 10, 12), "mlp:128", "mlp([120, 128, 3])"),
        (None, (3, 12, 12), "cnn:32,64", "cnn([32, 64], image_size=12, image_channels=3, classes=3)"),
        ("mlp:7, 5", (1, 12, 12), "mlp:7,5", "mlp([144, 7, 5, 3])"),
        ("cnn:4", (2, 8, 8), "cnn:4", "cnn([4], image_size=8, image_channels=2, classes=3)"),
    ],
)
def test_a_network_fits_the_data_and_its_file_builds_it(
    text: str | None, shape: tuple[int, int, int], name: str, source: str
) -> None:
    data = images(*shape)
    network = chosen_network(text, data)
    assert network.name == name
    assert network.source is not None
    assert source in network.source
    assert network.build()(data.images).shape == (4, 3)
    space: dict[str, Any] = {}
    exec(network.source, space)
    built = space["build"]()
    assert not built.training
    assert repr(built) == repr(network.build())


@pytest.mark.parametrize("model", ["mlp:16", "cnn:4", "nets.py:build"])
def test_the_printed_command_judges_the_best_parameters(shell: Shell, capsys: pytest.CaptureFixture[str], model: str) -> None:
    Path("nets.py").write_text(NETS)
    code, out, _ = shell(model=model, epochs=4, learning_rate=0.03, examples=300, epsilon="1/20", out="my net.safetensors")
    assert code == 0
    own = model == "nets.py:build"
    assert Path("my net.py").exists() != own
    command = out.splitlines()[-1].strip()
    place = model if own else "'my net.py:build'"
    words = "--weights 'my net.safetensors' --data digits --norm linf --epsilon 1/20"
    assert command == f"metarobust evaluate --model {place} {words}"
    assert record("my net")["evaluate"] == command
    main([*shlex.split(command)[1:], "--protocol", "quick", "--json", "report.json"])
    assert "no_better_than_chance" not in capsys.readouterr().out
    report = json.loads(Path("report.json").read_text())
    data = load("digits", train=False)
    network = chosen_network(None if own else model, data).build() if not own else own_network()
    network.load_state_dict(load_file("my net.safetensors"))
    with torch.no_grad():
        right = (network.eval()(data.images).argmax(1) == data.labels).float().mean()
    assert report["clean_accuracy"] == pytest.approx(float(right))
    assert right > 0.3, "the weights of the training, not initial ones"
    assert report["settings"]["epsilon"] == 0.05


def own_network() -> torch.nn.Module:
    space: dict[str, Any] = {}
    exec(NETS, space)
    return space["build"]()


def test_npz_data_has_no_test_part(shell: Shell) -> None:
    digits = load("digits", train=True).select(torch.arange(40))
    np.savez("own.npz", images=digits.images.squeeze(1).numpy(), labels=digits.labels.numpy())
    code, out, _ = shell(data="own.npz", examples=None, batch_size=10)
    assert code == 0
    said, command = out.splitlines()[-2:]
    assert said == "test data is for the end; put yours, which is not own.npz, in the place of TEST.npz:"
    assert "--data TEST.npz" in command
    assert "36 examples to train on, 4 held out" in out


def test_table_lines_and_figure(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingResult, "plot", PLOT)
    code, out, err = shell(epochs=3, warm_up=1, learning_rate=0.01, examples=300, epsilon="0.04")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines[:-1])) <= 80 + len("  ")
    number = r"\d\.\d{3}"
    assert re.fullmatch(rf"warm-up 1 of 1, epsilon 0.02: loss {number}\d, [\d.]+ s", lines[2])
    assert re.fullmatch(rf"epoch 3 of 3: loss {number}\d, clean {number}, robust {number}, [\d.]+ s", lines[5])
    found = record()
    best, last = found["history"][found["best_epoch"] - 1], found["history"][-1]
    rows = [re.split(r"\s*│\s*", line.strip("│ \n")) for line in lines if line.startswith("│")]
    for row, name, epoch, file in zip(rows, ("best", "last"), (best, last), ("net.safetensors", FILES[0]), strict=True):
        assert row == [name, str(epoch["epoch"]), f"{epoch['clean_accuracy']:.3f}", f"{epoch['robust_accuracy']:.3f}", file]
    assert "accuracy on 30 held-out examples, PGD-20, l_inf, epsilon 0.04" in out
    assert "wrote net.safetensors, net-last.safetensors, net.json, net.png and net.py" in lines
    assert Path("net.png").read_bytes()[:8] == PNG
    assert Path("net.png").stat().st_size > 10_000


def test_a_model_without_robustness_is_told(shell: Shell) -> None:
    code, _, err = shell(epsilon="0.5")
    assert code == 0
    said = r"metarobust: always predicting one class would be as robust \(0.\d+\); pass a larger --warm-up, or more --epochs\n"
    assert re.fullmatch(said, err)


def test_no_lines_beside_a_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class JobOfOneEpoch:
        flags, balls = Train(data="digits", epsilon="0.1", epochs=1), [BALL]

    epoch = EpochRecord(epoch=1, loss=1.0, learning_rate=0.1, clean_accuracy=0.5, robust_accuracy=0.25, seconds=2.0)
    for watched, said in ((False, "epoch 1 of 1: loss 1.0000, clean 0.500, robust 0.250, 2.0 s\n"), (True, "")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        reporter(JobOfOneEpoch(), 0)(epoch)  # pyright: ignore[reportArgumentType]
        assert capsys.readouterr().out == said


# Warm-up and resume ---------------------------------------------------------------------------------------------------


def test_warm_up_raises_epsilon_in_equal_steps_before_the_training(shell: Shell, fits: list[Any]) -> None:
    assert shell(warm_up=2, epsilon="0.3", epochs=2, objective="armor-trades", radius=0.1)[0] == 0
    epsilons = [objective.robust_loss.threat_model.epsilon for _, objective, _, _ in fits]
    assert epsilons == pytest.approx([0.1, 0.2, 0.3])
    assert epsilons[-1] == 0.3
    assert [others["epochs"] for *_, others in fits] == [1, 1, 2]
    assert [others.get("schedule") is None for *_, others in fits] == [True, True, False]
    assert len({others["seed"] for *_, others in fits}) == 3, "else every stage draws the same order"
    assert len({id(others["optimizer"]) for *_, others in fits}) == 1
    assert len({id(model) for model, *_ in fits}) == 1
    assert [epoch["epoch"] for epoch in record()["history"]] == [1, 2]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Ctrl-C when the objective is called the so manyth time from now."""
    calls: dict[str, int | None] = {"left": None}
    call = AdversarialTraining.__call__

    def interrupted(self: AdversarialTraining, *arguments: Any, **others: Any) -> Tensor:
        if calls["left"] is not None:
            calls["left"] -= 1
            if calls["left"] == 0:
                calls["left"] = None
                raise KeyboardInterrupt
        return call(self, *arguments, **others)

    monkeypatch.setattr(AdversarialTraining, "__call__", interrupted)
    return lambda count: calls.update(left=count)


RUN = {"model": "nets.py:build", "warm_up": 2, "epochs": 2, "seed": 3, "batch_size": 27, "update": "sgd"}
"""Two steps in each epoch: 1 to 4 are of the warm-up, 5 to 8 of the training. BatchNorm and momentum must resume too."""


def test_a_command_that_was_interrupted_goes_on_to_the_same_files(shell: Shell, interrupt: Any, fits: list[Any]) -> None:
    Path("nets.py").write_text(NETS)
    assert shell(**RUN, out="whole.safetensors")[0] == 0
    expected = record("whole")
    for moments, stages in (((4,), [1]), ((3,), [0]), ((5, 2), [1, 2]), ((7,), [2]), ((2, 3, 4), [0, 1, 2])):
        for moment, stage in zip(moments, stages, strict=True):
            interrupt(moment)
            code, _, err = shell(**RUN)
            assert code == 130
            name = "net.checkpoint" if stage == 2 else f"net.warm-up-{stage + 1}.checkpoint"
            assert err == f"metarobust: interrupted; the work is kept in {name}: run the same command again to go on\n"
            assert "net.safetensors" not in in_folder()
        fits.clear()
        code, out, _ = shell(**RUN)
        assert code == 0
        assert f"going on from {name}\n" in out
        assert len(fits) == 3 - stages[-1], "finished stages are not trained again"
        for suffix in (".safetensors", "-last.safetensors"):
            assert Path(f"net{suffix}").read_bytes() == Path(f"whole{suffix}").read_bytes()
        for mine, theirs in zip(record()["history"], expected["history"], strict=True):
            assert mine | {"seconds": 0} == theirs | {"seconds": 0}
        assert not list(Path().glob("*.checkpoint"))
        for path in Path().glob("net[-.]*"):
            path.unlink()


def test_an_interrupt_before_the_first_step_leaves_nothing(shell: Shell, interrupt: Any) -> None:
    interrupt(1)
    code, _, err = shell(warm_up=1)
    assert (code, err) == (130, "metarobust: interrupted before the first step was done; nothing was kept\n")
    assert in_folder() == []
    Path("net.py").write_text(NETS)
    interrupt(1)
    assert shell(model="net.py:build")[0] == 130
    assert Path("net.py").read_text() == NETS, "a file of the user's that happens to have the name"


def test_an_interrupt_while_the_results_are_written_costs_nothing(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, fits: list[Any]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingResult, "plot", stopped)
        assert shell()[0] == 130
    assert in_folder() == ["net-last.safetensors", "net.checkpoint", "net.json", "net.py", "net.safetensors"]
    assert shell()[0] == 0
    assert in_folder() == FILES


# Files that are there -------------------------------------------------------------------------------------------------

TAKEN = r"metarobust: --out must be a name whose files are not there yet, got net.safetensors and "


def test_a_finished_command_says_what_is_there(shell: Shell) -> None:
    assert shell()[0] == 0
    before = {name: Path(name).read_bytes() for name in FILES}
    code, out, err = shell(device="auto")  # where it ran is no part of the result
    assert (code, out) == (2, "")
    assert err == (
        "metarobust: this training is finished and its files are there; to train again pass another --out, and to judge "
        f"net.safetensors: {record()['evaluate']}\n"
    )
    code, out, err = shell(seed=2, objective="trades")
    differing = "--objective at there and trades here, --seed 0 there and 2 here"
    assert re.fullmatch(rf"{TAKEN}those of a finished training with {differing}; pass another --out, or delete .*\n", err), err
    assert before == {name: Path(name).read_bytes() for name in FILES}
    assert in_folder() == FILES


def test_an_interrupted_run_of_another_command_is_kept(shell: Shell, interrupt: Any) -> None:
    interrupt(3)
    assert shell(warm_up=1)[0] == 130
    before = {name: Path(name).read_bytes() for name in in_folder()}
    code, _, err = shell(warm_up=0, clip_norm=1)
    differing = "--warm-up 1 there and 0 here, --clip-norm left out there and 1.0 here"
    remedy = "repeat its command to go on, pass another --out, or delete net.warm-up-1.checkpoint to start again"
    assert code == 2
    assert re.fullmatch(rf"{TAKEN}those of an interrupted training with {differing}; {remedy}\n", err), err
    assert before == {name: Path(name).read_bytes() for name in in_folder()}
    Path("net.warm-up-1.checkpoint").unlink()
    assert shell(warm_up=0, clip_norm=1)[0] == 0, "as the sentence says"
    assert in_folder() == FILES


@pytest.mark.parametrize("name", [*FILES, "net.checkpoint"])
def test_files_of_others_are_not_touched(shell: Shell, name: str) -> None:
    Path(name).write_text("mine")
    code, out, err = shell()
    assert (code, out) == (2, "")
    assert err == f"{TAKEN}{name}; pass another --out, or move what is there\n"
    assert in_folder() == [name]
    assert Path(name).read_text() == "mine"


def test_data_that_changed_is_not_mixed_with_a_checkpoint(shell: Shell, interrupt: Any) -> None:
    digits = load("digits", train=True).select(torch.arange(60))
    for shift in (0, 1):
        np.savez("own.npz", images=digits.images.squeeze(1).numpy(), labels=(digits.labels.numpy() + shift) % 10)
        interrupt(4 if shift == 0 else None)
        code, _, err = shell(data="own.npz", epochs=3)
    assert code == 2
    assert "net.checkpoint must be of this same training run, got other data" in err
    assert "net.checkpoint" in in_folder()


# What is wrong --------------------------------------------------------------------------------------------------------

ARMOR_ONLY = "is read by armor-\\* objectives only, not by {0}; leave it out, or write --objective armor-{0}"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        *(({name: value, "objective": "trades"}, f"--{name} {ARMOR_ONLY.format('trades')}".replace("_", "-", 1))
          for name, value in [("divergence", "kl"), ("order", 2), ("radius", 0), ("kappa", 0), ("natural_weight", 0),
                              ("robust_classes", "1")]),
        ({"beta": 6}, "--beta is read by trades, mart, .* and meta-weight-net only, with or without armor-, not by at; .*"),
        ({"mu": 1, "objective": "beta"}, "--mu is read by smoothed-beta only, with or without armor-, not by beta; leave it out"),
        ({"hypergradient": "none", "objective": "armor-smoothed-beta", "radius": 1, "mu": 1}, "--hypergradient is read by .*"),
        ({"objective": "armor-at", "radius": 0.1, "order": 2}, "--order is read by --divergence alpha and renyi only, .*"),
        ({"objective": "armor-at", "radius": 0.1, "divergence": "alpha"}, "--order must be given for --divergence alpha, .*"),
        ({"objective": "armor-at"}, "--radius must be given for armor-at, which has no default for it; see .*"),
        ({"objective": "smoothed-beta"}, "--mu must be given for smoothed-beta, which has no default for it; see .*"),
        ({"objective": "udr", "norm": "l2"}, "--norm must be linf for udr, got l2"),
        ({"momentum": 0.9}, "--momentum is read by --update sgd only, not by adam; leave it out"),
        ({"root": "."}, "--root is read for data that torchvision loads, not for digits; leave it out"),
        ({"objective": "armor-at", "radius": -1}, "radius must be a finite number >= 0, got -1.0"),
        ({"objective": "armor-at", "radius": 1, "divergence": "alpha", "order": 1}, "order must be > 1, got 1.0; .*"),
        ({"objective": "armor-at", "radius": 1, "natural_weight": 2}, "natural_weight must be a share from 0 to 1, got 2.0"),
        ({"objective": "armor-at", "radius": 1, "robust_classes": "one"}, "--robust-classes must be class numbers .*"),
        ({"objective": "armor-at", "radius": 1, "robust_classes": "1,12"}, "--robust-classes must be among .*, got 12"),
        ({"objective": "pgd"}, ".*(must be one of|invalid choice:?) .*'pgd'.*"),
        ({"epsilon": "8"}, "epsilon must be at most 1 .* write 8 / 255"),
        ({"epsilon": "x"}, "--epsilon must be a number such as 0.3 or 8/255, got 'x'"),
        ({"learning_rate": 0}, "--learning-rate must be a finite number > 0, got 0.0"),
        ({"weight_decay": -1}, "--weight-decay must be a finite number >= 0, got -1.0"),
        ({"momentum": -1, "update": "sgd"}, "--momentum must be a finite number >= 0, got -1.0"),
        ({"clip_norm": 0}, "clip_norm must be a finite number > 0, got 0.0"),
        ({"schedule": "linear"}, "--schedule must be constant, cosine, .*, got 'linear'"),
        ({"schedule": "0.5:0.1,0.75"}, "--schedule must be constant, cosine, .*, got '0.5:0.1,0.75'"),
        ({"schedule": "50:0.1"}, "--schedule: a progress must be a fraction of the steps below 1, got 50.0; .*"),
        ({"validation": "0"}, "--validation must be a share between 0 and 1 or a number of examples >= 1, got 0"),
        ({"validation": "2.5"}, "--validation must be a share .*, got 2.5"),
        ({"validation": "60"}, "--validation must leave examples to train on, got 60 of 60"),
        ({"epochs": 0}, "--epochs must be an integer >= 1, got 0"),
        ({"warm_up": -1}, "--warm-up must be an integer >= 0, got -1"),
        ({"seed": -1}, "--seed must be an integer >= 0, got -1"),
        ({"amp": "float16"}, "amp must be 'bfloat16' or False on this device, got 'float16' on cpu; .*"),
        ({"out": "net.pt"}, "--out must end in .safetensors, got net.pt; write net.safetensors"),
        ({"out": "none/net.safetensors"}, "--out must be a file in an existing folder, got none/net.safetensors, .*"),
        ({"model": "resnet"}, "--model must be mlp or cnn, .*, or FILE.py:FUNCTION, got 'resnet'"),
        ({"model": "mlp:"}, "--model must be mlp or cnn, .*, got 'mlp:'"),
        ({"model": "mlp:0"}, "--model must be mlp or cnn, .*, got 'mlp:0'"),
        ({"model": "none.py:build"}, "--model must name a file that exists, got none.py"),
        ({"model": "nets.py:five"}, r"data: y must be in \[0, 5\), the classes that the model has logits for, got .*"),
        ({"model": "cnn", "data": "wide.npz"}, "--model cnn takes square images, got 4 x 6 pixels; .*"),
        ({"model": "nets.py:build", "data": "wide.npz"}, r"--model must take images of the data, \[1, 1, 4, 6\], got .*"),
        ({"data": "letters"}, "--data letters: name must be one of 'digits', .*, got 'letters'; for data of your own pass .*"),
        ({"device": "abacus"}, "--device must be cpu, or a device that this machine has, got 'abacus'"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_no_file(shell: Shell, flags: dict[str, Any], sentence: str) -> None:
    Path("nets.py").write_text(NETS)
    np.savez("wide.npz", images=np.zeros((60, 4, 6)), labels=np.arange(60) % 3)
    code, _, err = shell(**flags)
    assert code == 2
    (line,) = err.splitlines()
    assert re.fullmatch("metarobust: " + sentence, line), line
    assert in_folder() in (["nets.py", "wide.npz"], ["__pycache__", "nets.py", "wide.npz"])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom metarobust.command_line import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "--warm-up" in done.stdout


# Several processes ----------------------------------------------------------------------------------------------------


def test_two_processes_of_torchrun_train_the_model_of_one(shell: Shell) -> None:
    """At epsilon 0 nothing is drawn, so the parameters are those of one process up to rounding; one process speaks."""
    flags = {"epsilon": "0", "epochs": 2, "warm_up": 1, "objective": "armor-at", "radius": 0.1, "learning_rate": 0.01}
    assert shell(**flags)[0] == 0
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    words += ["--data", "digits", "--examples", "60", "--batch-size", "30", "--steps", "1", "--out", "two.safetensors"]
    program = "from metarobust.command_line import main; main()"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, sys.executable, "-c", program, "train", *words],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2 of 2") == done.stdout.count("wrote two.safetensors") == 1
    assert "on 2 processes" in done.stdout
    one, two = load_file("net-last.safetensors"), load_file("two-last.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
    assert not list(Path().glob("*.checkpoint"))


def test_a_device_is_not_chosen_under_torchrun(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = shell()
    said = "--device must be left out under torchrun, which gives each process its own, got cpu"
    assert (code, err) == (2, f"metarobust: {said}\n")
    monkeypatch.setenv("RANK", "1")
    assert shell()[0::2] == (2, ""), "one process speaks"


class Two:
    """Two processes of which this is one, and what both tell."""

    def __init__(self, rank: int, told: list[str | None]) -> None:
        self.rank, self.told = rank, told

    def gather(self, value: str | None) -> list[str | None]:
        assert value == self.told[self.rank]
        return self.told


def test_a_failure_of_one_process_stops_all_and_rank_0_tells_it() -> None:
    def work(processes: Any) -> Any:
        def fail_or_not() -> int:
            text = processes.told[processes.rank]
            if text is not None:
                raise ValueError(text)
            return 7

        return agreed(processes, fail_or_not)

    assert [work(Two(rank, [None, None])) for rank in (0, 1)] == [7, 7]
    for told, said in ((["a", "b"], "^a$"), (["a", None], "^a$"), ([None, "b"], "^process 1: b$")):
        with pytest.raises(ValueError, match=said):
            work(Two(0, told))
        with pytest.raises(SystemExit) as stop:
            work(Two(1, told))
        assert stop.value.code == 2

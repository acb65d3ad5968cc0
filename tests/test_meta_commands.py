"""``metarobust meta-train`` and ``metarobust transfer`` as a user meets them: real small runs, resume, files, refused flags."""

import copy
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from metarobust._randomness import generator_for
from metarobust.attacks import FGSM, PGD
from metarobust.command_line import _meta_train_display, _meta_train_run, _transfer_methods, _transfer_run, main
from metarobust.command_line._meta_train import MetaTrain, parse_counts, parse_range
from metarobust.command_line._meta_train_display import Progress, sparkline
from metarobust.command_line._meta_train_run import architectures, prepared, read_pools, starting_rule
from metarobust.command_line._train_network import chosen_network
from metarobust.command_line._transfer import Transfer
from metarobust.command_line._transfer_methods import (
    LEARNING_RATES,
    Setting,
    Trained,
    descend_by,
    share_of_gap,
    train_baseline,
    train_with,
    training_attack,
)
from metarobust.command_line._transfer_run import conclusion, divided, gap_share, read_parts
from metarobust.data import LabelledImages, digits_pools, load, minibatch
from metarobust.divergences import KL
from metarobust.evaluation import Doubt
from metarobust.meta_optimizers import Generation, InterpretableOptimizer, LSTMOptimizer, save
from metarobust.meta_optimizers import load as load_optimizer
from metarobust.meta_optimizers._distribution import pgd_5
from metarobust.models import mlp
from metarobust.objectives import ARMOR, TRADES, AdversarialTraining, BETATraining
from metarobust.threat_models import ThreatModel

Shell = Callable[..., tuple[int, str, str]]
BALL = ThreatModel(norm="linf", epsilon=0.1)
SEARCH = {"iterations": 2, "population": 3, "total_steps": "3,5"}
UPDATES = {"estimator": "second-order", "iterations": 7, "total_steps": "4", "unroll": 2}
NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 10))
"""


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs a verb inside this process, in a folder of its own; gives exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    common: dict[str, dict[str, Any]] = {
        "meta-train": {"data": "digits", "architectures": "mlp:4", "examples": "20,30", "copies": 1, "out": "rule.safetensors"},
        "transfer": {"data": "digits", "epsilon": "0.1", "model": "mlp:8", "steps": 4, "protocol": "quick", "judge_examples": 20,
                     "baselines": "none", "out": "net.safetensors", "device": "cpu"},
    }  # fmt: skip

    def run(verb: str, **flags: Any) -> tuple[int, str, str]:
        chosen = common[verb] | flags
        words = [word for name, v in chosen.items() if v is not None for word in ("--" + name.replace("_", "-"), str(v))]
        code = 0
        try:
            main([verb, *words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def read(name: str) -> dict[str, Any]:
    return json.loads(Path(name).read_text())


def in_folder() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def images(channels: int, height: int, width: int, classes: int = 3) -> LabelledImages:
    return LabelledImages(torch.rand(4, channels, height, width), torch.zeros(4, dtype=torch.int64), classes)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


# The third network of the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape", "name", "source"),
    [
        ("residual", (1, 8, 8), "residual:16,32,64", "residual_network([16, 32, 64], image_channels=1, classes=3)"),
        ("residual:8, 16", (3, 10, 12), "residual:8,16", "residual_network([8, 16], image_channels=3, classes=3)"),
    ],
)
def test_a_residual_network_fits_the_data_and_its_file_builds_it(
    text: str, shape: tuple[int, int, int], name: str, source: str
) -> None:
    data = images(*shape)
    network = chosen_network(text, data)
    assert network.name == name
    assert network.source is not None
    assert source in network.source
    assert network.build()(data.images).shape == (4, 3)
    space: dict[str, Any] = {}
    exec(network.source, space)
    assert not space["build"]().training
    assert repr(space["build"]()) == repr(network.build())


def test_widths_of_a_residual_network_are_whole_groups() -> None:
    with pytest.raises(ValueError, match="--model residual takes widths that are multiples of 4, got 'residual:6'; write"):
        chosen_network("residual:6", images(1, 8, 8))


# meta-train -----------------------------------------------------------------------------------------------------------


def test_the_search_leaves_a_rule_that_loads(shell: Shell) -> None:
    code, out, _ = shell("meta-train", **SEARCH)
    assert code == 0
    assert in_folder() == ["rule.json", "rule.safetensors"]
    rule, record = load_optimizer("rule.safetensors"), read("rule.json")
    assert isinstance(rule, InterpretableOptimizer)
    assert rule.gradient_source == "gradient+adversarial_tangent"
    tasks = {"data": ["digits"], "architectures": ["mlp:4"], "examples": [20, 30], "epsilon": [0.05, 0.15], "norm": "linf",
             "meta_loss": "pgd", "copies": 1}  # fmt: skip
    assert rule.record["tasks"] == record["tasks"] == tasks
    assert rule.record["meta_search"]["total_steps"] == [3, 5]
    assert rule.table() in out
    assert out.splitlines()[1] == "networks mlp:4; data digits"
    assert [line[:17] for line in out.splitlines() if line.startswith("gen")] == ["generation 1 of 2", "generation 2 of 2"]
    assert "wrote rule.safetensors and rule.json\n" in out
    assert record["finished"]
    assert record["settings"]["population"] == 3
    assert [found["mean"] for found in record["history"]] == rule.record["scores"]
    start = starting_rule(MetaTrain(data="digits"))
    assert isinstance(start, InterpretableOptimizer)
    start.turn(rule.record["knobs"])
    assert all(torch.equal(p, q) for p, q in zip(rule.parameters(), start.parameters(), strict=True))


@pytest.mark.parametrize(
    ("flags", "attack", "objective"),
    [
        ({"meta_loss": "pgd"}, pgd_5, None),
        ({"meta_loss": "clean"}, None, None),
        ({"meta_loss": "trades"}, pgd_5, TRADES(threat_model=BALL, steps=5)),
        ({"meta_loss": "beta"}, pgd_5, BETATraining(threat_model=BALL, steps=5)),
        (
            {"meta_loss": "armor"}, pgd_5,
            ARMOR(robust_loss=AdversarialTraining(attack=PGD(threat_model=BALL, steps=5)), divergence=KL(), radius=0.1),
        ),
    ],
)  # fmt: skip
def test_what_a_meta_loss_means(tmp_path: Path, flags: dict[str, Any], attack: Any, objective: Any) -> None:
    chosen = MetaTrain(data="digits", estimator="pes", out=tmp_path / "a.safetensors", norm="l2", epsilon="1/8", **flags)
    tasks = prepared(chosen, read_pools(chosen), 1).tasks
    assert tasks.attack is attack
    assert (None if tasks.meta_objective is None else tasks.meta_objective(BALL)) == objective
    assert (tasks.norm, tasks.epsilon) == ("l2", (0.125, 0.125))
    assert tasks.copies == (1 if flags["meta_loss"] == "beta" else 4)
    assert tuple(tasks.architectures) == ("mlp:48", "cnn:4,8", "residual:8,16")


@pytest.mark.parametrize(
    "flags",
    [
        {"meta_loss": "beta"},
        {"meta_loss": "armor", "copies": 2, "estimator": "first-order", "rule": "lstm", "architectures": "cnn:2"},
        {"meta_loss": "trades", "estimator": "pes", "gradient_source": "gradient", "architectures": "residual:4"},
    ],
)
def test_meta_losses_are_learned_from(shell: Shell, flags: dict[str, Any]) -> None:
    code, out, err = shell("meta-train", **(UPDATES | {"iterations": 2} | flags))
    assert (code, err) == (0, "")
    rule, record = load_optimizer("rule.safetensors"), read("rule.json")
    assert isinstance(rule, LSTMOptimizer if flags.get("rule") == "lstm" else InterpretableOptimizer)
    assert rule.gradient_source == flags.get("gradient_source", "gradient+adversarial_tangent")
    assert rule.record["meta_training"]["estimator"] == flags.get("estimator", "second-order").replace("-", "_")
    assert len(record["history"]) == 2
    assert all(0 < loss < 10 for loss in record["history"])
    assert "iteration 2 of 2: meta-loss" in out
    assert ("| role |" in out) == (flags.get("rule") != "lstm")


def test_settings_reach_the_meta_training(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def recorded(rule: Any, tasks: Any, **settings: Any) -> Any:
        seen.append(settings)
        return SimpleNamespace(losses=[])

    monkeypatch.setattr(_meta_train_run, "meta_train", recorded)
    more = {"learning_rate": 0.01, "tasks_per_step": 3, "seed": 5, "checkpoint": "kept.here", "total_steps": "10,30", "unroll": 7}
    more |= {"recompute_every": 4}
    assert shell("meta-train", **(UPDATES | more))[0] == 0
    on_iteration = seen[0].pop("on_iteration")
    assert callable(on_iteration)
    assert seen[0] == {
        "iterations": 7, "total_steps": 30, "shortest_steps": 10, "unroll": 7, "slots": 6, "tasks_per_step": 3,
        "learning_rate": 0.01, "estimator": "second_order", "seed": 5, "checkpoint": Path("kept.here"), "checkpoint_every": 10,
        "recompute_every": 4, "silent": True,
    }  # fmt: skip


@pytest.mark.parametrize("flags", [SEARCH | {"iterations": 4}, UPDATES])
def test_an_interrupted_command_goes_on_when_it_is_repeated(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    monkeypatch.setattr(_meta_train_run, "CHECKPOINT_EVERY", 2)
    assert shell("meta-train", **flags, out="straight.safetensors")[0] == 0
    add = Progress.add

    def stopping(self: Progress, done: int, found: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt
        add(self, done, found)

    monkeypatch.setattr(Progress, "add", stopping)
    code, _, err = shell("meta-train", **flags)
    assert code == 130
    kept = "the work is kept in rule.checkpoint: run the same command again to go on"
    assert err == f"metarobust: interrupted; {kept}\n"
    assert not read("rule.json")["finished"]
    monkeypatch.setattr(Progress, "add", add)
    code, _, err = shell("meta-train", **flags, seed=1)
    assert code == 2
    assert "--checkpoint must be this command's, got one with --seed 0 there and 1 here; repeat its command" in err
    code, out, _ = shell("meta-train", **flags)
    assert code == 0
    assert "going on from rule.checkpoint\n" in out
    assert in_folder() == ["rule.json", "rule.safetensors", "straight.json", "straight.safetensors"]
    assert_same(load_optimizer("rule.safetensors"), load_optimizer("straight.safetensors"))
    assert read("rule.json")["history"] == read("straight.json")["history"]
    assert len(read("rule.json")["history"]) == flags["iterations"]


def test_an_interrupt_before_the_first_checkpoint_leaves_nothing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(self: Progress, done: int, found: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "add", stopping)
    code, _, err = shell("meta-train", **UPDATES)
    assert (code, err) == (130, "metarobust: interrupted; nothing was kept in rule.checkpoint yet\n")
    assert in_folder() == []


def test_files_that_are_there_are_kept(shell: Shell) -> None:
    Path("rule.safetensors").write_text("mine")
    code, _, err = shell("meta-train", **SEARCH)
    assert code == 2
    assert "--out must be a name whose files are not there yet, got rule.safetensors; pass another --out" in err
    Path("rule.safetensors").rename("rule.json")
    code, _, err = shell("meta-train", **SEARCH)
    assert code == 2
    assert "got rule.json; pass another --out" in err
    Path("rule.json").rename("rule.checkpoint")
    code, _, err = shell("meta-train", **SEARCH)
    assert code == 2
    assert "--checkpoint must be this command's, got rule.checkpoint without a record at rule.json" in err
    assert Path("rule.checkpoint").read_text() == "mine"


def test_of_digits_only_the_meta_training_pool_is_seen() -> None:
    pools = read_pools(MetaTrain(data=" digits "))
    assert list(pools) == ["digits"]
    assert torch.equal(pools["digits"].images, digits_pools(0).meta_train.images)


def test_a_cnn_is_left_out_where_images_are_not_square() -> None:
    assert list(architectures(None, images(1, 8, 10))) == ["mlp:48", "residual:8,16"]
    builders = architectures(["mlp:5", "cnn"], images(2, 6, 6))
    assert [build()(torch.rand(2, 2, 6, 6)).shape for build in builders.values()] == [(2, 3), (2, 3)]


@pytest.mark.parametrize(
    ("source", "first", "others"),
    [
        ("gradient", None, None),
        ("gradient+perturbed_factors", 1.5, 0.15),
        ("gradient+adversarial_estimate", 1.0, 1.0),
        ("gradient+adversarial_tangent", 1.0, 1.0),
    ],
)
def test_where_an_interpretable_rule_starts(source: Any, first: float | None, others: float | None) -> None:
    rule = starting_rule(MetaTrain(data="digits", gradient_source=source))
    assert isinstance(rule, InterpretableOptimizer)
    for role, factor in (("first dense", first), ("inner convolution", others)):
        found = [rule.coefficients(role=role, fan_in=64, time=time) for time in (0.0, 0.5, 1.0)]
        assert found[1].get("factor") == (None if factor is None else pytest.approx(factor))
        assert found[0]["adam"] > found[1]["adam"] > found[2]["adam"]
        assert rule.coefficients(role="bias", fan_in=64, time=0.5).get("factor", 0.0) == 0.0
        assert found[1]["adam"] == pytest.approx(0.003)
        assert found[1]["l1"] == pytest.approx(2e-5 if role.startswith("first") else 1e-6)
        assert found[1]["l2"] == pytest.approx(1e-5)


def test_the_seed_decides_where_an_lstm_starts() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (starting_rule(MetaTrain(data="digits", rule="lstm", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same(a, b)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def test_ranges() -> None:
    assert parse_range("--x", "1/4, 0.5") == (0.25, 0.5)
    assert parse_range("--x", "2") == (2.0, 2.0)
    assert parse_counts("--x", " 3, 7 ") == (3, 7)
    assert parse_counts("--x", "3") == (3, 3)


# How a meta-training is watched ---------------------------------------------------------------------------------------


def test_remaining_time_counts_the_rounds_of_this_call() -> None:
    now = iter([100.0, 105.0, 110.0])
    progress = Progress(total=50, searches=False, clock=lambda: next(now))
    assert progress.times() == {"elapsed": "0:00:05", "remaining": "?"}
    progress.add(11, 1.0)  # resumed behind the tenth
    progress.add(12, 2.0)
    assert progress.line() == "iteration 12 of 50: meta-loss 2.000, mean of the last 1.500, elapsed 0:00:10, remaining 0:03:10"


def test_a_generation_shows_its_scores() -> None:
    now = iter([0.0, 61.0])
    progress = Progress(total=3, searches=True, clock=lambda: next(now))
    progress.add(2, Generation(0.9, 0.8, 0.7, {}))
    expected = "generation 2 of 3: best 0.900, mean 0.800, median 0.700, elapsed 0:01:01, remaining 0:01:01"
    assert progress.line() == expected
    assert list(progress.recent) == [0.8]


def test_sparklines() -> None:
    assert sparkline([0.0, 1.0, 0.5, float("nan")]) == "▁█▅?"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([float("inf")]) == "?"


def test_plain_lines_come_every_tenth_iteration_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with _meta_train_display.shown(MetaTrain(data="digits", estimator="pes", iterations=23), leads=True) as report:
        assert report is not None
        for done in range(1, 24):
            report(done, 1.0)
    assert re.findall(r"iteration (\d+) of 23", capsys.readouterr().out) == ["10", "20", "23"]
    with _meta_train_display.shown(MetaTrain(data="digits"), leads=False) as report:
        assert report is None


def test_a_terminal_has_a_live_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with _meta_train_display.shown(MetaTrain(data="digits", estimator="pes", iterations=2), leads=True) as report:
        assert report is not None
        report(1, 0.5)
        report(2, 1.5)
    out = capsys.readouterr().out
    assert all(word in out for word in ("meta-loss", "1.500", "elapsed", "remaining", "2 of 2", "▁█"))
    assert "iteration 2 of 2" not in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"meta_loss": "trades"},
            "--meta-loss must be pgd or clean for --estimator search, .*, got trades; write .*",
        ),
        ({"rule": "lstm"}, "--estimator must be second-order, .* for it, .*, got --rule lstm; write --estimator second-order"),
        ({"unroll": 5}, "--unroll is read by --estimator second-order, first-order or pes only, not by search; leave it out"),
        (
            {"recompute_every": 5, "estimator": "pes"},
            "--recompute-every must be left out with --estimator pes, which keeps no graph",
        ),
        (
            {"recompute_every": 5},
            "--recompute-every is read by --estimator second-order or first-order only, not by search; leave it out",
        ),
        ({"population": 5, "estimator": "pes"}, "--population is read by --estimator search only, not by pes; leave it out"),
        ({"population": 1}, "--population must be an integer >= 2, got 1"),
        ({"iterations": 0}, "--iterations must be an integer >= 1, got 0"),
        ({"seed": -1}, "--seed must be an integer >= 0, got -1"),
        ({"learning_rate": 0, "estimator": "pes"}, "--learning-rate must be a finite number > 0, got 0.0"),
        (
            {"meta_loss": "beta", "estimator": "pes", "copies": 2},
            "--copies must be 1 for --meta-loss beta, .*, got 2; leave .*",
        ),
        ({"architectures": " ; "}, "--architectures must name at least one network, got ' ; '; write .*"),
        ({"architectures": "mlp:4;resnet"}, "--architectures must name mlp, cnn or residual, .*, got 'resnet'"),
        ({"architectures": "mlp:x"}, "--architectures must be mlp or cnn, .*, got 'mlp:x'"),
        ({"architectures": "residual:6"}, "--architectures residual takes widths that are multiples of 4, got 'residual:6'; .*"),
        ({"epsilon": "0.2,0.1"}, "--epsilon must be a range from the least to the largest, got '0.2,0.1'; write 0.1,0.2"),
        ({"epsilon": "0"}, "--epsilon must be finite and > 0, got '0'; write 0.05,0.15"),
        ({"epsilon": "big"}, "--epsilon must be a number such as 0.3 or 8/255, got 'big'"),
        ({"epsilon": "1,2,3"}, "--epsilon must be one number or a range of two, got '1,2,3'; write least,largest"),
        ({"examples": "30,20"}, "--examples must be a range from the least to the largest, got '30,20'; write 20,30"),
        ({"examples": "0.5"}, "--examples must be an integer or a range of two, got '0.5'; write 100 or 100,200"),
        ({"examples": "0"}, "--examples must be at least 1, got '0'"),
        ({"examples": "5000"}, "--examples for digits: examples must be at most .* here, .*"),
        ({"total_steps": "9,3"}, "--total-steps must be a range from the least to the largest, got '9,3'; write 3,9"),
        ({"norm": "l1"}, "--norm must be one of .*, got 'l1'; run metarobust meta-train --help"),
        ({"data": ","}, "--data must name at least one data set, got ','; write --data digits"),
        ({"data": "mnst"}, "--data mnst: name must be one of .*"),
        (
            {"data": "digits,wide.npz"},
            r"--data must name sets .*, got \[1, 8, 8\] with 10 in digits and \[1, 4, 6\] with 2 .*",
        ),
        ({"out": "rule.pt"}, "--out must end in .safetensors, got rule.pt; write rule.safetensors"),
        ({"out": "no/rule.safetensors"}, "--out must be a file in an existing folder, got .*; pass another path"),
        ({"checkpoint": "rule.json"}, "--checkpoint must be another file than those of --out, got rule.json; leave it out"),
    ],
)
def test_wrong_flags_of_meta_train_are_one_sentence(shell: Shell, flags: dict[str, Any], sentence: str) -> None:
    np.savez("wide.npz", images=np.zeros((4, 4, 6), np.uint8), labels=np.arange(4) % 2)
    code, _, err = shell("meta-train", **flags)
    assert code == 2
    assert re.fullmatch("metarobust: " + sentence, err.rstrip("\n")), err
    assert in_folder() == ["wide.npz"]


def test_armor_is_for_one_process(tmp_path: Path) -> None:
    flags = MetaTrain(data="digits", estimator="pes", meta_loss="armor", out=tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="--meta-loss must be another than armor, .*, for 2 processes; leave out torchrun"):
        prepared(flags, read_pools(flags), 2)


# transfer -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def setting() -> Setting:
    pool = digits_pools(0).target
    rows = torch.arange(60)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        initial = mlp([64, 8, 10])
    return Setting(
        initial=initial, train=pool.select(rows), validation=pool.select(rows + 60), threat_model=BALL, steps=6, batch_size=16,
        seed=3,
    )  # fmt: skip


def test_transfer_trains_compares_and_writes(shell: Shell) -> None:
    code, out, err = shell("transfer", steps=30, baselines="adam,pgd", examples=150, judge_examples=60)
    assert (code, err) == (0, "")
    assert in_folder() == ["net.json", "net.py", "net.safetensors"]
    found = read("net.json")
    assert found["settings"]["steps"] == 30
    assert found["model"] == "mlp:8"
    assert found["data"] == {"train": 120, "held_out": 30, "test": 60}
    assert "digits: 120 examples to train on, 30 held out, 60 to judge on\n" in out
    learned, adam, pgd = found["methods"]
    assert [row["method"] for row in found["methods"]] == ["robust-small-v1", "adam", "pgd"]
    assert [row["attack_calls"] for row in found["methods"]] == [0, 0, 30]
    assert [row["passes"] for row in found["methods"]] == pytest.approx([40, 30, 130])
    assert learned["learning_rate"] is None
    assert learned["candidates"] == []
    for row in (adam, pgd):
        rates = {candidate["learning_rate"]: candidate["robust_accuracy"] for candidate in row["candidates"]}
        assert tuple(rates) == LEARNING_RATES[row["method"]]
        assert rates[row["learning_rate"]] == max(rates.values())
    for row in found["methods"]:
        assert row["worst_case_accuracy"] == row["report"]["worst_case_accuracy"] <= row["clean_accuracy"]
        low, high = row["worst_case_interval"]
        assert low <= row["worst_case_accuracy"] <= high
        assert row["report"]["settings"]["protocol"] == "quick"
        assert row["report"]["examples"] == 60
    top, clean = pgd["worst_case_accuracy"], adam["worst_case_accuracy"]
    expected = None if top <= clean else (learned["worst_case_accuracy"] - clean) / (top - clean)
    assert found["share_of_gap"] == (None if expected is None else pytest.approx(expected))
    assert "attack calls while robust-small-v1 trained: 0\n" in out
    assert "7 runs were trained to choose the baselines' learning rates\n" in out
    assert out.endswith("wrote net.safetensors, net.py and net.json\n")
    space: dict[str, Any] = {}
    exec(Path("net.py").read_text(), space)
    model, test = space["build"](), load("digits", train=False).select(torch.arange(60))
    model.load_state_dict(load_file("net.safetensors"))
    with torch.no_grad():
        right = (model(test.images).argmax(1) == test.labels).double().mean()
    assert learned["clean_accuracy"] == pytest.approx(float(right))
    code, _, err = shell("transfer", baselines="none")
    assert code == 2
    assert "--out must be a name whose files are not there yet, got net.safetensors and net.json; pass another" in err


def test_the_meta_optimizer_is_followed_step_by_step(setting: Setting) -> None:
    rule = load_optimizer("robust-small-v1")
    trained = train_with(rule, "rule", setting)
    model = copy.deepcopy(setting.initial)
    optimizer: Any = rule.torch_optimizer(model.parameters(), total_steps=6)
    order, noise = (generator_for(3, f"transfer {what}", 0) for what in ("order", "noise"))
    for _ in range(6):
        batch = minibatch(setting.train, 16, generator=order)
        optimizer.zero_grad()
        with optimizer.record_factors(model, threat_model=BALL, generator=noise) as recorder:
            recorder.backward(F.cross_entropy(model(batch.images), batch.labels))
        optimizer.step()
    assert_same(trained.model, model)
    assert not trained.model.training
    assert (trained.attack_calls, trained.learning_rate, trained.passes) == (0, None, pytest.approx(8))
    assert trained.notes == ()


class Attacking(nn.Module):
    """A network that attacks itself while it trains, as no method here may do unseen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            FGSM(threat_model=BALL)(self.inner, x, torch.zeros(len(x), dtype=torch.int64))
        return self.inner(x)


def test_attack_calls_are_counted_and_not_assumed(setting: Setting) -> None:
    attacking = replace(setting, initial=Attacking(setting.initial))
    trained = train_with(load_optimizer("robust-small-v1"), "rule", attacking)
    assert trained.attack_calls == 12, "the rule runs the network twice in each of six steps"
    assert conclusion([(trained, report(0.5))], None, 1)[0] == "attack calls while rule trained: 12"


@pytest.mark.parametrize(
    ("kind", "source", "passes"),
    [
        (InterpretableOptimizer, "gradient", 6),
        (InterpretableOptimizer, "gradient+perturbed_factors", 6),
        (LSTMOptimizer, "gradient", 6),
        (LSTMOptimizer, "gradient+adversarial_estimate", 8),
        (InterpretableOptimizer, "gradient+adversarial_tangent", 8),
        (LSTMOptimizer, "gradient+adversarial_tangent", 10),
    ],
)
def test_passes_of_a_step(setting: Setting, kind: Callable[..., Any], source: str, passes: int) -> None:
    """One; a third more for a rule that reads two streams apart, and a third more for tangents."""
    assert train_with(kind(gradient_source=source), "rule", setting).passes == pytest.approx(passes)


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_a_baseline_is_its_textbook_loop(setting: Setting, name: str) -> None:
    found, model = copy.deepcopy(setting.initial), copy.deepcopy(setting.initial)
    calls = descend_by(name, 0.01, found, setting)
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    }
    optimizer = kinds.get(name, lambda: torch.optim.Adam(model.parameters(), lr=0.01))()
    order, noise = generator_for(3, "transfer order", 0), generator_for(3, "transfer noise", 0)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 6)
        batch = minibatch(setting.train, 16, generator=order)
        x = batch.images
        if name in ("fgsm", "pgd"):
            x = training_attack(name, BALL)(model, x, batch.labels, generator=noise)
        optimizer.zero_grad()
        F.cross_entropy(model(x), batch.labels).backward()
        optimizer.step()
    assert calls == (6 if name in ("fgsm", "pgd") else 0)
    assert not found.training
    for p, q in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_training_attacks() -> None:
    assert training_attack("pgd", BALL) == PGD(threat_model=BALL, steps=5)
    assert training_attack("fgsm", BALL) == PGD(threat_model=BALL, steps=1, step_size=0.125)


def test_a_baseline_keeps_the_first_best_learning_rate(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.4, 0.4])
    monkeypatch.setattr(_transfer_methods, "robust_accuracy", lambda model, setting: next(scores))
    trained = train_baseline("pgd", setting)
    assert (trained.learning_rate, trained.passes, trained.attack_calls) == (3e-3, pytest.approx(26), 6)
    assert trained.candidates == {1e-3: 0.2, 3e-3: 0.4, 1e-2: 0.4}


def test_robust_accuracy_is_that_under_pgd_20(setting: Setting) -> None:
    assert setting.validation is not None
    model = train_with(load_optimizer("robust-small-v1"), "rule", replace(setting, steps=60)).model
    x, y = setting.validation.images, setting.validation.labels
    x_adv = PGD(threat_model=BALL, steps=20)(model, x, y, generator=generator_for(3, "transfer validation", 0))
    expected = float((model(x_adv).argmax(1) == y).double().mean())
    assert _transfer_methods.robust_accuracy(model, setting) == pytest.approx(expected, abs=1 / 60)
    assert 0 < expected < 1


def test_runs_that_are_not_finite_are_no_candidates(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEARNING_RATES, "sgd", (1e30, 0.01))
    trained = train_baseline("sgd", setting)
    assert trained.learning_rate == 0.01
    assert trained.candidates[1e30] is None
    monkeypatch.setitem(LEARNING_RATES, "sgd", (1e30,))
    with pytest.raises(FloatingPointError, match="--baselines must keep the weights finite, .* by sgd; leave it out"):
        train_baseline("sgd", setting)
    wild = InterpretableOptimizer(gradient_source="gradient", initial_learning_rate=1e36)
    with pytest.raises(FloatingPointError, match="--optimizer must keep the weights finite, .* by wild; pass another one"):
        train_with(wild, "wild", setting)


def report(worst_case: float) -> Any:
    return SimpleNamespace(worst_case_accuracy=worst_case, warnings=())


def method(name: str) -> Trained:
    return Trained(name=name, model=nn.Identity(), learning_rate=None, steps=1, passes_per_step=1.0, attack_calls=0)


def test_share_of_the_gap() -> None:
    assert share_of_gap(0.55, clean=0.4, top=0.6) == pytest.approx(0.75)
    assert share_of_gap(0.3, clean=0.4, top=0.6) == pytest.approx(-0.5)
    assert share_of_gap(0.7, clean=0.4, top=0.6) == pytest.approx(1.5)
    assert share_of_gap(0.5, clean=0.6, top=0.6) is None
    judged = [(method(name), report(found)) for name, found in
              (("rule", 0.55), ("adam", 0.3), ("sgd", 0.4), ("fgsm", 0.9), ("pgd", 0.6))]  # fmt: skip
    assert gap_share(judged) == pytest.approx(0.75), "of clean baselines the best one counts, and PGD, not FGSM, is the top"
    assert gap_share([judged[0], judged[4]]) is None
    assert gap_share(judged[:4]) is None
    said = conclusion(judged, 0.75, 14)
    assert said[1:] == [
        "share of the gap from the best clean baseline to PGD training: 0.75",
        "passes are those of the chosen run; 13 runs were trained to choose the baselines' learning rates",
    ]
    assert "there is no gap" in conclusion(judged, None, 14)[1]
    assert len(conclusion([judged[0], judged[4]], None, 1)) == 1
    doubtful = SimpleNamespace(warnings=(Doubt(check="few", reason="there are 12 examples", remedy="take more"),))
    told = conclusion([(method("rule"), doubtful)], None, 1)  # pyright: ignore[reportArgumentType]
    assert told[1:] == ["rule: there are 12 examples; take more"]


def test_digits_are_of_the_pools_that_no_meta_training_sees() -> None:
    pool, test = read_parts(Transfer(data="digits", epsilon="0.1"))
    pools = digits_pools(0)
    assert torch.equal(pool.images, pools.target.images)
    assert sorted(test.images.sum((1, 2, 3)).tolist()) == sorted(pools.test.images.sum((1, 2, 3)).tolist())


def test_parts_are_disjoint_and_as_large_as_asked_for() -> None:
    pool = LabelledImages(torch.arange(100.0).reshape(100, 1, 1, 1) / 100, torch.arange(100) % 10, 10)
    flags = Transfer(data="own.npz", epsilon="0.1", examples=50, validation=0.2, judge_examples=7)
    parts = divided(flags, pool, images(1, 1, 1), choosing=True)
    assert parts.sizes() == {"train": 40, "held_out": 10, "test": 4}
    assert parts.validation is not None
    assert not set(parts.train.images.flatten().tolist()) & set(parts.validation.images.flatten().tolist())
    assert parts.validation.labels.bincount().tolist() == [1] * 10
    assert divided(flags, pool, pool, choosing=False).sizes() == {"train": 50, "held_out": 0, "test": 7}


def test_of_an_npz_file_a_part_is_held_back_for_judging(shell: Shell) -> None:
    digits = load("digits", train=True).select(torch.arange(100))
    np.savez("own.npz", images=digits.images.squeeze(1).numpy(), labels=digits.labels.numpy())
    pool, test = read_parts(Transfer(data="own.npz", epsilon="0.1"))
    assert (len(pool), len(test)) == (70, 30)
    rows = [{tuple(image.flatten().tolist()) for image in part.images} for part in (pool, test)]
    assert not rows[0] & rows[1]
    code, out, _ = shell("transfer", data="own.npz", epsilon="0.02")
    assert code == 0
    assert "own.npz: 70 examples to train on, 0 held out, 20 to judge on\nown.npz has no test part: 0.3 of it were held" in out


def test_a_radius_outside_of_the_meta_training_is_told(shell: Shell) -> None:
    rule = InterpretableOptimizer()
    rule.record = {"threat_models": {"norm": "linf", "epsilon": [0.05, 0.15], "box": [0.0, 1.0]}}
    save(rule, "own.safetensors")
    assert shell("transfer", optimizer="own.safetensors", out="within.safetensors")[2] == ""
    code, _, err = shell("transfer", optimizer="own.safetensors", epsilon="0.5")
    assert code == 0
    assert err.startswith("metarobust: the meta-optimizer was trained with linf, epsilon 0.05 to 0.15")
    assert len(err.splitlines()) == 1
    assert read("net.json")["methods"][0]["notes"][0] in err


def test_batch_normalisation_and_dropout_of_the_users_own_network(shell: Shell) -> None:
    Path("nets.py").write_text(NETS)
    before = torch.random.get_rng_state()
    for out in ("a.safetensors", "b.safetensors"):
        code, said, _ = shell("transfer", model="nets.py:build", baselines="fgsm", out=out)
        assert code == 0
        assert "model nets.py:build on cpu" in said
    assert torch.equal(torch.random.get_rng_state(), before)
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(value, b[name]) for name, value in a.items()), "the seed decides dropout too"
    assert int(a["2.num_batches_tracked"]) == 4
    assert in_folder() == ["a.json", "a.safetensors", "b.json", "b.safetensors", "nets.py"]


def test_a_rule_of_ones_own(shell: Shell) -> None:
    save(LSTMOptimizer(gradient_source="gradient", hidden_size=2), "own.safetensors")
    code, out, _ = shell("transfer", optimizer="own.safetensors", norm="l2", epsilon="1/2", model="residual:4")
    assert code == 0
    assert "attack calls while own.safetensors trained: 0" in out
    (row,) = read("net.json")["methods"]
    assert (row["method"], row["passes_per_step"]) == ("own.safetensors", 1.0)
    assert read("net.json")["threat_model"] == repr(ThreatModel(norm="l2", epsilon=0.5))
    assert "from metarobust.models import residual_network" in Path("net.py").read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"optimizer": "robust-big"}, "--optimizer: no meta-optimizer at robust-big; write .* a trained one: robust-small-v1"),
        ({"optimizer": "nets.py"}, "--optimizer: nets.py must be a safetensors file, got one that cannot be read, damaged .*"),
        ({"optimizer": "."}, "--optimizer must be a file or the name of a trained meta-optimizer, got the folder ."),
        ({"norm": "l1"}, "--norm must be one of .*, got 'l1'; run metarobust transfer --help"),
        ({"steps": 0}, "--steps must be an integer >= 1, got 0"),
        ({"examples": 1}, "--examples must be an integer >= 2, got 1"),
        ({"examples": 401}, "--examples must be at most 400, which the training part of digits has, got 401"),
        ({"validation": 1}, "--validation must be a share between 0 and 1, got 1.0"),
        ({"validation": 0.9, "examples": 3, "baselines": "sgd"}, "--validation must leave examples to train on, got 0.9 of 3"),
        ({"baselines": "adam,sam"}, "--baselines must be among adam, .* with commas between, or none, got 'adam,sam'"),
        ({"baselines": "none,pgd"}, "--baselines must be among .*, got 'none,pgd'"),
        ({"epsilon": "-1"}, "epsilon must be .*, got -1.0.*"),
        ({"epsilon": "x"}, "--epsilon must be a number such as 0.3 or 8/255, got 'x'"),
        ({"model": "resnet"}, "--model must be mlp or cnn, .*, got 'resnet'"),
        ({"data": "none.npz"}, "--data must name a file that exists, got none.npz"),
        ({"out": "net.bin"}, "--out must end in .safetensors, got net.bin; write net.safetensors"),
        ({"out": "nets.safetensors"}, "--out must be a name whose files are not there yet, got nets.py; pass .*"),
        ({"device": "tpu9"}, "--device must be .*, got 'tpu9'"),
    ],
)
def test_wrong_flags_of_transfer_are_one_sentence(shell: Shell, flags: dict[str, Any], sentence: str) -> None:
    Path("nets.py").write_text(NETS)
    code, _, err = shell("transfer", **flags)
    assert code == 2
    assert re.fullmatch("metarobust: " + sentence, err.rstrip("\n")), err
    assert in_folder() == ["nets.py"]


def test_an_interrupted_transfer_leaves_nothing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(_transfer_run, "train_with", stopping)
    code, _, err = shell("transfer")
    assert (code, err) == (130, "metarobust: interrupted; files that were complete stay, nothing was half-written\n")
    assert in_folder() == []


def test_the_command_that_meta_train_prints_is_one_of_transfer(shell: Shell) -> None:
    _, out, _ = shell("meta-train", **(SEARCH | {"iterations": 1}))
    command = shlex.split(out.splitlines()[-1].partition(": ")[2])
    assert command[:2] == ["metarobust", "transfer"]
    code, said, _ = shell("transfer", optimizer=command[command.index("--optimizer") + 1])
    assert code == 0
    assert "attack calls while rule.safetensors trained: 0" in said

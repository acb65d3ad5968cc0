"""``metarobust train`` with objectives that learn weights, and with long tails and wrong labels."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from metarobust._randomness import generator_for
from metarobust.attacks import PGD
from metarobust.command_line import _train_run, main
from metarobust.command_line._train import Train
from metarobust.command_line._train_data import Parts, divided, read_training_data
from metarobust.command_line._train_weighting import told_of, what_was_learned
from metarobust.data import LabelledImages, load, split
from metarobust.divergences import KL
from metarobust.meta_weighters import CAAT, FRL, GradientBound, MetaWeightNet, ReMargin, WeightingNetwork
from metarobust.objectives import ARMOR, MART, TRADES, AdversarialTraining, ClassWeighted, LogitAdjusted
from metarobust.threat_models import ThreatModel
from metarobust.training import TrainingResult, fit

Shell = Callable[..., tuple[int, str, str]]
BALL = ThreatModel(norm="linf", epsilon=0.1)
PNG = b"\x89PNG\r\n\x1a\n"
ARMOR_CAAT = {"objective": "armor-caat", "radius": 0.1}
PAIR = {"noise": "pair", "noise_rate": 0.4}


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs the command inside this process, in a folder of its own; gives exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(TrainingResult, "plot", lambda _, path, title: path.write_bytes(PNG))  # drawing takes long

    def run(**flags: Any) -> tuple[int, str, str]:
        chosen = {"data": "digits", "epsilon": "0.1", "examples": 300, "batch_size": 90, "epochs": 2, "steps": 1}
        chosen |= {"model": "mlp:16", "device": "cpu", "out": "net.safetensors"} | flags
        arguments = [word for name, v in chosen.items() if v is not None for word in ("--" + name.replace("_", "-"), str(v))]
        code = 0
        try:
            main(["train", *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any, dict[str, Any]]]:
    """Model, objective, data and the other arguments of each ``fit``."""
    seen: list[tuple[Any, Any, Any, dict[str, Any]]] = []

    def recorded(model: Any, objective: Any, data: Any, **others: Any) -> Any:
        seen.append((model, objective, data, others))
        return fit(model, objective, data, **others)

    monkeypatch.setattr(_train_run, "fit", recorded)
    return seen


def record(name: str = "net") -> dict[str, Any]:
    return json.loads(Path(f"{name}.json").read_text())


def parts_of(**flags: Any) -> Parts:
    given: dict[str, Any] = {"data": "digits", "epsilon": "0.1"} | flags
    chosen = Train(**given)
    return divided(chosen, read_training_data(chosen))


# Objectives -----------------------------------------------------------------------------------------------------------

TRADES_OF_CAAT = TRADES(threat_model=BALL, steps=1, beta=1.5)
PLAIN = AdversarialTraining(attack=PGD(threat_model=BALL, steps=1))
WEIGHTERS = {
    "caat": ({"objective": "caat"}, CAAT, TRADES_OF_CAAT),
    "caat-mart": ({"objective": "caat", "base": "mart", "beta": 3}, CAAT, MART(attack=PGD(threat_model=BALL, steps=1), beta=3.0)),
    "caat-at": ({"objective": "caat", "base": "at", "update": "sgd"}, CAAT, PLAIN),
    "caat-beta": ({"objective": "caat", "beta": 4}, CAAT, TRADES(threat_model=BALL, steps=1, beta=4.0)),
    "meta-weight-net": ({"objective": "meta-weight-net"}, MetaWeightNet, PLAIN),
    "meta-weight-net-trades": (
        {"objective": "meta-weight-net", "base": "trades", "update": "adamw"},
        MetaWeightNet,
        TRADES(threat_model=BALL, steps=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTERS)
@pytest.mark.parametrize("armor", [False, True])
def test_learned_weights_train_with_the_defaults_of_their_classes(shell: Shell, fits: list[Any], name: str, armor: bool) -> None:
    flags, kind, loss = WEIGHTERS[name]
    armoured = {"objective": f"armor-{flags['objective']}", "radius": 0.1} if armor else {}
    code, out, err = shell(**(flags | armoured))
    assert code == 0, err
    ((_, around, data, others),) = fits
    assert isinstance(around, ARMOR) == armor
    objective = around.robust_loss if armor else around
    assert type(objective) is kind
    assert objective.optimizer is others["optimizer"]
    assert objective.branches.robust_loss == objective.meta_loss == loss
    with_defaults = kind(
        threat_model=BALL, meta_data=objective.meta_data, optimizer=others["optimizer"], class_counts=data.labels.bincount(),
        robust_loss=loss, steps=1,
    )  # fmt: skip
    with_defaults.network.temperature = objective.network.temperature  # annealed
    assert repr(with_defaults) == repr(objective)
    assert with_defaults.network.layers[0].weight.shape == objective.network.layers[0].weight.shape
    parts = parts_of(**(flags | armoured | {"examples": 300}))
    assert parts.meta is not None
    assert torch.equal(objective.meta_data[0], parts.meta.images)
    assert torch.equal(data.images, parts.train.images)
    assert int(objective.calls) == 2 * 3
    told = record()["history"][-1]["diagnostics"]
    assert {"meta_loss", "meta_gradient", "adversary"} <= told.keys()
    assert ("multiplier" in told) == armor
    assert re.match(rf"{record()['settings']['objective']}, l_inf, .*: 210 examples to train on, 60 meta-examples \(6 of", out)


def test_the_record_of_batches_without_a_robust_class_is_json(shell: Shell) -> None:
    code, _, err = shell(**ARMOR_CAAT, robust_classes=1, examples=100, batch_size=8, epochs=1)
    assert code == 0, err

    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(Path("net.json").read_text(), parse_constant=refused)
    told = content["history"][0]["diagnostics"]
    assert told["adversary"] + told["anti_adversary"] == pytest.approx(1)
    assert told["radius"] == pytest.approx(0.1)


def test_settings_of_caat_reach_it(shell: Shell, fits: list[Any]) -> None:
    bounds = {"fixed": type(None), "gradient": GradientBound, "remargin": ReMargin, "learned": type(None)}
    for bound, kind in bounds.items():
        code, _, err = shell(
            objective="caat", bound=bound, routing="soft", anti_factor=1.5, meta_every=2, meta_per_class=7, steps=2, epochs=1,
            out=f"{bound}.safetensors", warm_up=1,
        )  # fmt: skip
        assert code == 0, err
        for objective in (fits[-2][1], fits[-1][1]):
            assert type(objective.bound) is kind
            assert objective.network.bound_range == ((0.5, 2.0) if bound == "learned" else None)
            assert (objective.routing, objective.meta_every, len(objective.meta_data[0])) == ("soft", 2, 70)
            assert (objective.branches.steps, objective.branches.anti_factor) == (2, 1.5)
        assert fits[-1][1].threat_model.epsilon == 2 * fits[-2][1].threat_model.epsilon == 0.1
        told = record(bound)["history"][-1]["diagnostics"]
        assert (told["radius"] == pytest.approx(0.1)) == (bound == "fixed")


@pytest.mark.parametrize("armor", [False, True])
def test_frl_measures_errors_on_the_meta_set(shell: Shell, fits: list[Any], armor: bool) -> None:
    flags = {"objective": "armor-frl", "radius": 0.1} if armor else {"objective": "frl"}
    code, out, err = shell(**flags, beta=2, epochs=2, examples=200)
    assert code == 0, err
    ((_, objective, data, _),) = fits
    objective = objective.robust_loss if armor else objective
    assert isinstance(objective, FRL)
    assert (objective.beta, objective.steps, objective.threat_model) == (2.0, 1, BALL)
    meta = parts_of(**flags, examples=200).meta
    assert meta is not None
    assert torch.equal(objective.held_out[0], meta.images)
    assert repr(objective.balance) == repr(ReMargin(classes=10))
    assert float(objective.balance.margin_multiplier.abs().max()) > 0, "it was told that epochs start"
    assert "largest_factor" in record()["history"][0]["diagnostics"]
    assert "meta-examples" in out
    assert record()["weighting"] is None
    assert data.labels.numel() + len(meta) == 180


def test_the_first_parameters_of_the_network_are_from_the_seed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[Tensor] = []

    def watched(model: Any, objective: Any, data: Any, **others: Any) -> Any:
        first.append(objective.network.layers[0].weight.detach().clone())
        return fit(model, objective, data, **others)

    monkeypatch.setattr(_train_run, "fit", watched)
    for number, (name, seed) in enumerate((("a", 0), ("b", 0), ("c", 1))):
        torch.manual_seed(number)
        state = torch.random.get_rng_state()
        assert shell(objective="caat", out=f"{name}.safetensors", seed=seed, epochs=1)[0] == 0
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    a, b = (load_file(f"{name}-last.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_class_weights_go_around_robust_losses(shell: Shell, fits: list[Any]) -> None:
    scenario = {"imbalance": 5, "noise": "uniform", "noise_rate": 0.3, "epochs": 1, "examples": 400}
    for number, (objective, weights) in enumerate(
        [("trades", "balanced"), ("armor-trades", "balanced"), ("caat", "balanced"), ("frl", "balanced"),
         ("trades", "logit-adjusted"), ("armor-trades", "logit-adjusted"), ("armor-frl", "logit-adjusted")]
    ):  # fmt: skip
        radius = {"radius": 0.1} if objective.startswith("armor") else {}
        code, _, err = shell(objective=objective, **radius, **scenario, class_weights=weights, out=f"{number}.safetensors")
        assert code == 0, err
        _, found, data, others = fits[-1]
        counts = data.labels.bincount(minlength=10)
        assert counts.tolist() == record(str(number))["data"]["labelled_counts"]
        assert counts.tolist() != record(str(number))["data"]["class_counts"]
        if weights == "logit-adjusted":
            assert isinstance(found, LogitAdjusted)
            assert list(found.class_counts) == counts.tolist()
            inner = found.robust_loss
        else:
            inner = found
        if objective.startswith("armor"):
            assert isinstance(inner, ARMOR)
            inner = inner.robust_loss
        if weights == "balanced":
            assert isinstance(inner, ClassWeighted)
            expected = len(data) / (10 * counts.double())
            assert torch.tensor(inner.class_weights, dtype=torch.float64).allclose(expected)
            inner = inner.robust_loss
        assert type(inner) is {"trades": TRADES, "caat": CAAT, "frl": FRL}[objective.removeprefix("armor-")]
        if isinstance(inner, CAAT):
            assert inner.optimizer is others["optimizer"]
            assert inner.statistics.share.tolist() == pytest.approx((counts / len(data)).tolist())


# The parts of the data --------------------------------------------------------------------------------------------------


def rows_in(data: LabelledImages, part: LabelledImages) -> list[int]:
    """Where the examples of a part stand in the data, by their pixels."""
    table = {row.numpy().tobytes(): number for number, row in enumerate(data.images)}
    assert len(table) == len(data)
    return [table[row.numpy().tobytes()] for row in part.images]


@pytest.mark.parametrize("objective", ["at", "caat", "meta-weight-net", "frl"])
@pytest.mark.parametrize("scenario", [{}, {"imbalance": 10.0}, {"noise": "pair", "noise_rate": 0.4},
                                      {"imbalance": 10.0, "noise": "flip2", "noise_rate": 0.5}])  # fmt: skip
def test_parts_are_disjoint_and_all_but_one_are_clean(objective: str, scenario: dict[str, Any]) -> None:
    data = load("digits", train=True)
    parts = parts_of(objective=objective, **scenario)
    _, expected = split(data, (len(data) - 110, 110), generator=generator_for(0, "validation split", 0))
    assert torch.equal(parts.held_out.images, expected.images), "the same for every objective and scenario"
    assert torch.equal(parts.held_out.labels, expected.labels)
    places = [rows_in(data, parts.train), rows_in(data, parts.held_out)]
    if objective == "at":
        assert parts.meta is None
    else:
        assert parts.meta is not None
        places.append(rows_in(data, parts.meta))
        assert parts.meta.labels.bincount().tolist() == [20] * 10
        assert torch.equal(parts.meta.labels, data.labels[places[2]])
        clean = parts_of(objective=objective)
        assert clean.meta is not None
        assert torch.equal(parts.meta.images, clean.meta.images), "the same for every scenario"
    together = [row for place in places for row in place]
    assert len(set(together)) == len(together)
    assert torch.equal(parts.true_labels, data.labels[places[0]])
    available = data.labels[sorted(set(range(len(data))) - set(together[len(places[0]) :]))].bincount()
    sizes = sorted(parts.class_counts, reverse=True)
    if "imbalance" in scenario:
        head = int(available.min())
        assert sizes == [max(1, int(head / 10 ** (rank / 9) * (1 + 1e-12))) for rank in range(10)]
    else:
        assert parts.class_counts == available.tolist()
    wrong = parts.wrong.double().mean()
    rate = scenario.get("noise_rate", 0)
    assert abs(wrong - rate) <= 4 * (rate * (1 - rate) / len(parts.train)) ** 0.5
    if scenario.get("noise") == "pair":
        assert set(((parts.train.labels - parts.true_labels) % 10).tolist()) == {0, 1}
    if scenario.get("noise") == "flip2":
        targets = [set(parts.train.labels[(parts.true_labels == c) & parts.wrong].tolist()) for c in range(10)]
        assert max(map(len, targets)) == 2


def test_parts_are_a_function_of_the_seed() -> None:
    scenario = {"objective": "caat", "imbalance": 4.0, "noise": "flip1", "noise_rate": 0.3}
    first, again, other = (parts_of(**scenario, seed=seed) for seed in (0, 0, 1))
    for name in ("train", "meta", "held_out"):
        one, same, another = (getattr(parts, name) for parts in (first, again, other))
        assert torch.equal(one.images, same.images)
        assert torch.equal(one.labels, same.labels)
        assert one.images.shape != another.images.shape or not torch.equal(one.images, another.images)


def test_every_draw_has_the_seed() -> None:
    flips, tails, masks = set(), set(), []
    for seed in range(3):
        flipped = parts_of(noise="flip1", noise_rate=1.0, seed=seed)
        flips.add(tuple(int(flipped.train.labels[flipped.true_labels == label][0]) for label in range(10)))
        tails.add(tuple(parts_of(imbalance=20.0, seed=seed).class_counts))
        paired = parts_of(noise="pair", noise_rate=0.5, seed=seed)
        masks.append(paired.wrong.masked_fill(paired.true_labels == 9, False))  # whose interval of draws lies elsewhere
    assert len(flips) == len(tails) == 3
    agreement = (masks[0] == masks[1]).double().mean()
    assert agreement < 0.7, "the same draws would agree but for the rows of class 9"


@pytest.mark.parametrize(
    ("examples", "given", "found"), [(None, None, 20), (None, 50, 50), (300, None, 6), (60, None, 1), (80, 2, 2)]
)
def test_the_meta_set_is_small_where_the_data_are(examples: int | None, given: int | None, found: int) -> None:
    parts = parts_of(objective="frl", examples=examples, meta_per_class=given)
    assert parts.meta is not None
    assert parts.meta.labels.bincount().tolist() == [found] * 10
    assert min(parts.class_counts) > 0


def test_what_the_data_came_to_is_printed_and_kept(shell: Shell) -> None:
    code, out, err = shell(objective="caat", imbalance=8, noise="uniform", noise_rate=0.4, examples=600, epochs=1)
    assert code == 0, err
    parts = parts_of(objective="caat", imbalance=8.0, noise="uniform", noise_rate=0.4, examples=600)
    assert parts.meta is not None
    lines, share = out.splitlines(), float(parts.wrong.double().mean())
    sizes = sorted(parts.class_counts, reverse=True)
    said = f"{len(parts.train)} examples to train on, {len(parts.meta)} meta-examples (13 of each class), 60 held out"
    assert lines[0].endswith(said)
    assert lines[1] == f"examples of a class from head to tail: {', '.join(map(str, sizes))}"
    assert sizes[-1] == sizes[0] // 8
    assert lines[2] == f"wrong labels among those to train on: {share:.1%} (uniform noise of rate 0.4)"
    assert record()["data"] == {
        "train": len(parts.train), "meta": 130, "held_out": 60, "wrong_labels": int(parts.wrong.sum()),
        "class_counts": parts.true_labels.bincount(minlength=10).tolist(),
        "labelled_counts": parts.train.labels.bincount(minlength=10).tolist(),
    }  # fmt: skip


def test_many_classes_are_told_by_both_ends() -> None:
    data = LabelledImages(torch.rand(210, 1, 2, 2), torch.arange(20).repeat_interleave(torch.arange(1, 21)), 20)
    parts = Parts(train=data, true_labels=data.labels, held_out=data, meta=None)
    (line,) = parts.scenario(Train(data="x.npz", epsilon="0", imbalance=20.0))
    assert line == "examples of a class from head to tail: 20, 19, 18, 17, 16, ..., 5, 4, 3, 2, 1"


# What was learned -------------------------------------------------------------------------------------------------------


def area_by_pairs(score: Tensor, flag: Tensor) -> float:
    """How often an example with the flag has the higher score, over all pairs; ties count half."""
    difference = score[flag][:, None] - score[~flag][None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_shares_and_auroc_of_the_anti_adversary(routing: str) -> None:
    parts = parts_of(objective="caat", noise="uniform", noise_rate=0.5)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    assert parts.meta is not None
    network = WeightingNetwork(favoured=0.5, generator=torch.Generator().manual_seed(1))
    caat = CAAT(
        threat_model=BALL, meta_data=parts.meta, optimizer=optimizer, class_counts=parts.labelled_counts, network=network,
        routing=routing, meta_every=3, steps=1, anti_factor=1.0,
    )  # fmt: skip
    fit(model, caat, parts.train, optimizer=optimizer, epochs=1, silent=True)  # 7 steps
    armoured = ARMOR(robust_loss=caat, divergence=KL(), radius=0.1)
    for objective in (caat, armoured, ClassWeighted(robust_loss=caat, class_weights=(1.0,) * 10)):
        found = what_was_learned(objective, model, parts, torch.device("cpu"))
        assert found is not None
        weights = caat.weigh(model, parts.train.images, parts.train.labels).weights
        anti = weights[:, 1].double().mean() if routing == "soft" else (weights[:, 1] > 0.5).double().mean()
        assert 0.05 < float(anti) < 0.95
        assert found["meta_steps"] == 3
        assert found["shares"] == pytest.approx({"adversary": 1 - float(anti), "anti_adversary": float(anti)}, abs=1e-6)
        assert found["auroc"] == pytest.approx(area_by_pairs(weights[:, 1], parts.wrong), abs=1e-6)
    words = told_of(found)
    kind = {"soft": "mean weights", "hard": "branches"}[routing]
    assert words[0].startswith(
        f"{kind} of the examples to train on, after 3 meta-steps: adversary {1 - float(anti):.1%}, anti-adv"
    )
    assert words[1] == f"weight of the anti-adversary as a sign of a wrong label: AUROC {found['auroc']:.3f}"


def test_the_summary_tells_what_caat_learned(shell: Shell, fits: list[Any]) -> None:
    for name, noise in (
        ("noisy", PAIR),
        ("none", {}),
        ("zero", PAIR | {"noise_rate": 0.0}),
    ):
        code, out, err = shell(**ARMOR_CAAT, **noise, meta_every=50, out=f"{name}.safetensors")
        assert code == 0, err
        model, objective, data, _ = fits[-1]
        found = record(name)["weighting"]
        weights = objective.robust_loss.weigh(model, data.images, data.labels).weights
        share = f"adversary {float(weights[:, 0].double().mean()):.1%}, anti-adversary "
        assert f"mean weights of the examples to train on, after 1 meta-step: {share}" in out
        if name == "noisy":
            true = parts_of(**(ARMOR_CAAT | noise), examples=300).true_labels
            assert found["auroc"] == pytest.approx(area_by_pairs(weights[:, 1], data.labels != true), abs=1e-6)
            assert f"a sign of a wrong label: AUROC {found['auroc']:.3f}" in out
        else:
            assert found["auroc"] is None
            assert "AUROC" not in out


def test_no_other_objective_speaks_of_branches(shell: Shell) -> None:
    for name in ("meta-weight-net", "at"):
        code, out, err = shell(objective=name, **PAIR, out=f"{name}.safetensors", epochs=1)
        assert code == 0, err
        assert "branches" not in out
        assert record(name)["weighting"] is None


# Warm-up and resume ---------------------------------------------------------------------------------------------------


def test_warm_up_hands_on_what_was_learned(shell: Shell, fits: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, Tensor]] = []
    start_epoch = CAAT.start_epoch

    def watched(self: CAAT, *arguments: Any, **others: Any) -> None:
        starts.append({name: value.clone() for name, value in self.state_dict().items()})
        start_epoch(self, *arguments, **others)

    monkeypatch.setattr(CAAT, "start_epoch", watched)
    assert shell(objective="caat", warm_up=2, epochs=1, meta_every=1)[0] == 0
    assert len(fits) == len(starts) == 3
    for (_, before, _, _), after in zip(fits[:-1], starts[1:], strict=True):
        ended = before.state_dict()
        assert ended.keys() == after.keys()
        assert all(torch.equal(ended[name], after[name]) for name in ended)
    assert [int(objective.calls) for _, objective, _, _ in fits] == [3, 6, 9]
    assert not torch.equal(starts[0]["network.layers.0.weight"], starts[1]["network.layers.0.weight"])


LEARNERS = {
    "caat": {"objective": "caat", "bound": "remargin", "noise": "uniform", "noise_rate": 0.4, "imbalance": 3, "meta_every": 2},
    "armor-caat": {"objective": "armor-caat", "radius": 0.1, "bound": "learned", "routing": "soft", "update": "sgd"},
    "meta-weight-net": {"objective": "meta-weight-net", "class_weights": "balanced"},
    "frl": {"objective": "frl", "class_weights": "logit-adjusted"},
}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Ctrl-C when an objective that learns is called the so manyth time from now."""
    left: dict[str, int | None] = {"calls": None}

    def watch(kind: type) -> None:
        call = kind.forward

        def interrupted(self: Any, *arguments: Any, **others: Any) -> Tensor:
            if left["calls"] is not None:
                left["calls"] -= 1
                if left["calls"] == 0:
                    left["calls"] = None
                    raise KeyboardInterrupt
            return call(self, *arguments, **others)

        monkeypatch.setattr(kind, "forward", interrupted)

    for kind in (CAAT, FRL):
        watch(kind)
    return lambda count: left.update(calls=count)


@pytest.mark.parametrize("name", LEARNERS)
def test_an_interrupted_command_goes_on_to_the_same_files(shell: Shell, interrupt: Any, name: str) -> None:
    """Two or three steps in an epoch; the moments are in the warm-up, between the stages, and in the training proper."""
    flags = LEARNERS[name] | {"warm_up": 1, "epochs": 2, "examples": 200, "batch_size": 50, "model": "mlp:8"}
    code, _, err = shell(**flags, out="whole.safetensors")
    assert code == 0, err
    whole = record("whole")
    steps = -(-whole["data"]["train"] // 50)
    for moments in ((2,), (steps + 1,), (steps + 2, steps - 1), (2 * steps + 2,)):
        for moment in moments:
            interrupt(moment)
            assert shell(**flags)[0] == 130
        code, out, err = shell(**flags)
        assert code == 0, err
        assert "going on from" in out
        for suffix in (".safetensors", "-last.safetensors"):
            assert Path(f"net{suffix}").read_bytes() == Path(f"whole{suffix}").read_bytes()
        found = record()
        for mine, theirs in zip(found["history"], whole["history"], strict=True):
            assert mine | {"seconds": 0} == theirs | {"seconds": 0}
        assert {key: found[key] for key in ("data", "weighting", "objective")} == {
            key: whole[key] for key in ("data", "weighting", "objective")
        }
        for path in Path().glob("net[-.]*"):
            path.unlink()


# What is wrong --------------------------------------------------------------------------------------------------------

ONLY = "only, with or without armor-, not by {}; leave it out"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"imbalance": 0.5}, "--imbalance must be a finite number >= 1, how many .* as the smallest, got 0.5"),
        ({"imbalance": "nan"}, "--imbalance must be a finite number >= 1, .*, got nan"),
        ({"imbalance": "inf"}, "--imbalance must be a finite number >= 1, .*, got inf"),
        ({"imbalance": 2, "data": "gap.npz"}, "--imbalance: dataset must be .* none of class 1; .*"),
        ({"noise": "uniform"}, "--noise-rate must be given for --noise uniform, which has no default for it; see .*"),
        ({"noise_rate": 0.2}, "--noise-rate is read with --noise only; leave it out, or write --noise uniform"),
        *(({"noise": "pair", "noise_rate": rate}, f"--noise-rate must be a share from 0 to 1, got {float(rate)}; .*")
          for rate in (-0.1, 1.5, "nan")),
        ({"noise": "flip3", "noise_rate": 0.1}, ".*(must be one of|invalid choice:?) .*'flip3'.*"),
        ({"noise": "flip2", "noise_rate": 0.1, "data": "two.npz"}, "--noise: num_classes must be at least 3 .*, got 2; .*"),
        ({"base": "mart"}, f"--base is read by caat and meta-weight-net {ONLY.format('at')}"),
        ({"meta_every": 5, "objective": "frl"}, f"--meta-every is read by caat and meta-weight-net {ONLY.format('frl')}"),
        *(({name: value, "objective": "meta-weight-net"},
           f"--{name.replace('_', '-')} is read by caat {ONLY.format('meta-weight-net')}")
          for name, value in [("anti_factor", 2), ("bound", "fixed"), ("routing", "soft")]),
        ({"objective": "caat", "base": "at", "beta": 6}, "--beta is read by --base trades and mart, not by at, .*"),
        ({"objective": "meta-weight-net", "beta": 6}, "--beta is read by --base trades and mart, .*"),
        ({"objective": "caat", "radius": 1}, "--radius is read by armor-\\* .*; leave it out, or write --objective armor-caat"),
        ({"objective": "armor-frl"}, "--radius must be given for armor-frl, which has no default for it; see .*"),
        ({"objective": "armor-caat", "radius": 1, "class_weights": "logit-adjusted"},
         "--class-weights must be none or balanced for armor-caat, whose meta-data are balanced already, .*, got logit-adjusted"),
        ({"class_weights": "balanced", "data": "gap.npz"}, "--class-weights must meet an .* labelled 1; .*"),
        ({"class_weights": "logit-adjusted", "data": "gap.npz"}, "--class-weights must meet an .* labelled 1; .*"),
        ({"objective": "caat", "meta_every": 0}, "--meta-every must be an integer >= 1, got 0"),
        ({"objective": "caat", "meta_per_class": 0}, "--meta-per-class must be an integer >= 1, got 0"),
        ({"objective": "caat", "anti_factor": 0}, "anti_factor must be a finite number > 0, got 0.0"),
        ({"objective": "caat", "beta": -1}, "beta must be a finite number >= 0, got -1.0"),
        ({"objective": "frl", "beta": -1}, "beta must be a finite number >= 0, got -1.0"),
        ({"objective": "caat", "meta_per_class": 40}, "--meta-per-class must be at most \\d+ here, .*, got 40; .*"),
        ({"objective": "frl", "examples": 20}, "--data must have two .* for frl, .*, got [01] of class \\d .*"),
        ({"objective": "caat", "data": "gap.npz"}, "--data must have two .* for caat, .*, got 0 of class 1 .*"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_no_file(shell: Shell, flags: dict[str, Any], sentence: str) -> None:
    for name, labels in (("gap", np.arange(60) % 2 * 2), ("two", np.arange(60) % 2)):
        np.savez(f"{name}.npz", images=np.zeros((60, 4, 4)), labels=labels)
    code, _, err = shell(**flags)
    assert code == 2
    (line,) = err.splitlines()
    assert re.fullmatch("metarobust: " + sentence, line), line
    assert sorted(path.name for path in Path().iterdir()) == ["gap.npz", "two.npz"]


def test_any_objective_can_hold_a_meta_set_back() -> None:
    """So that it trains on what CAAT trains on."""
    with_weights, without = parts_of(objective="caat", meta_per_class=5), parts_of(objective="trades", meta_per_class=5)
    assert without.meta is not None
    assert len(without.meta) == 5 * without.meta.num_classes
    assert torch.equal(with_weights.train.images, without.train.images)


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for words in (
        "caat", "meta-weight-net", "frl", "armor-caat", "armor-meta-weight-net", "armor-frl", "--base", "--meta-every",
        "--routing", "--anti-factor", "--bound", "--meta-per-class", "--class-weights", "logit-adjusted", "--imbalance",
        "--noise", "--noise-rate", "flip1", "remargin",
    ):  # fmt: skip
        assert words in said

"""Every transport with every weighting and every update: two steps each, or a sentence that says why not."""

import re
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from metarobust.command_line import main
from metarobust.command_line._train import Train
from metarobust.command_line._train_axes import DIVERGENCES, LOOKING_AHEAD, MOVED, PLAIN, along_the_axes, check_learned_update
from metarobust.command_line._train_checks import check_numbers, check_read
from metarobust.command_line._train_data import Parts, divided
from metarobust.command_line._train_objectives import build_objective, build_optimizer, build_schedule
from metarobust.command_line._train_report import axes_of
from metarobust.command_line._train_weighting import Known
from metarobust.data import LabelledImages
from metarobust.meta_optimizers import InterpretableOptimizer, LSTMOptimizer, save
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel
from metarobust.training import fit

BALL = ThreatModel(norm="linf", epsilon=0.1)
TRANSPORTS, WEIGHTINGS = (
    [value for choice in get_args(get_type_hints(Train)[axis]) for value in get_args(choice)]
    for axis in ("transport", "weighting")
)
FILES = {
    "interpretable, gradient": lambda: InterpretableOptimizer(gradient_source="gradient"),
    "interpretable, factors": lambda: InterpretableOptimizer(gradient_source="gradient+perturbed_factors"),
    "LSTM, gradient": lambda: LSTMOptimizer(gradient_source="gradient", hidden_size=2),
    "LSTM, estimate": lambda: LSTMOptimizer(gradient_source="gradient+adversarial_estimate", hidden_size=2),
}
UPDATES = ["sgd", "adam", "adamw", "robust-small-v1", *FILES]
MEANINGLESS = {
    **{
        ("at", transport, weighting, update): "whose meta-steps look ahead along a step of it"
        for transport, weighting, update in product(TRANSPORTS, LOOKING_AHEAD, UPDATES[3:])
    },
    **{
        ("at", transport, weighting, update): "finds adversaries and anti-adversaries in one ascent"
        for transport, weighting, update in product(TRANSPORTS, LOOKING_AHEAD, UPDATES)
        if transport != "pgd"
    },
    **{
        ("at", transport, "logit-adjusted", update): "which reads the model's own logits"
        for transport, update in product(TRANSPORTS, ("robust-small-v1", "LSTM, estimate"))
    },
}
"""The combinations on adversarial training that make no sense, and a part of what they are told."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("updates")
    rules = {name: build() for name, build in FILES.items()}
    for rule in rules.values():
        if rule.two_streams:
            rule.shift_factor_coefficients(first=1.0, others=1.0)
    return {name: str(save(rule, folder / f"{i}.safetensors")) for i, (name, rule) in enumerate(rules.items())}


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    draw = torch.Generator().manual_seed(0)
    return LabelledImages(images=torch.rand(60, 1, 4, 4, generator=draw), labels=torch.arange(60) % 3, num_classes=3)


def flags_of(files: dict[str, str], update: str, **given: Any) -> Train:
    steps = None if given.get("transport") in ("fgsm", "none") else 2
    return along_the_axes(
        Train(data="digits", epsilon="0.1", update=files.get(update, update), steps=steps, batch_size=18, epochs=1, **given)
    )


def trained(flags: Train, images: LabelledImages) -> tuple[dict[str, torch.Tensor], Parts]:
    """The parameters after an epoch of two steps, by the parts that the command is made of."""
    check_numbers(flags)
    check_read(flags)
    torch.manual_seed(0)
    parts, model = divided(flags, images), mlp([16, 4, 3])
    optimizer = build_optimizer(flags, model, BALL, len(parts.train))
    known = Known(parts=parts, optimizer=optimizer, device=torch.device("cpu"))
    objective = build_objective(flags, BALL, known)
    data = parts.train.select(torch.arange(36))
    fit(model, objective, data, optimizer=optimizer, epochs=1, batch_size=18, schedule=build_schedule(flags), silent=True)
    return {name: p.detach() for name, p in model.named_parameters()}, parts


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_three_axes(transport: str, weighting: str, update: str, files: dict[str, str], images: LabelledImages) -> None:
    reason = MEANINGLESS.get(("at", transport, weighting, update))
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            trained(flags_of(files, update, transport=transport, weighting=weighting), images)
        return
    flags = flags_of(files, update, transport=transport, weighting=weighting)
    found, _ = trained(flags, images)
    torch.manual_seed(0)
    before = dict(mlp([16, 4, 3]).named_parameters())
    assert all(p.isfinite().all() for p in found.values())
    assert all(not torch.equal(p, before[name]) for name, p in found.items())
    told = axes_of(flags)
    assert told["transport"] == transport
    assert weighting in told["weighting"]
    assert told["update"] == files.get(update, update)


@pytest.mark.parametrize("update", ["sgd", "robust-small-v1", "LSTM, gradient"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", [loss for loss in PLAIN if loss != "at"])
def test_other_objectives(objective: str, weighting: str, update: str, files: dict[str, str], images: LabelledImages) -> None:
    """Those that call the model twice, or charge no cross-entropy, have no second stream; learned weights weigh three losses."""
    given: dict[str, Any] = {"objective": objective, "weighting": weighting}
    given |= {"mu": 4.0} if objective == "smoothed-beta" else {}
    if weighting in LOOKING_AHEAD and objective not in ("trades", "mart"):
        with pytest.raises(ValueError, match="weighs --objective at, trades, mart"):
            flags_of(files, update, **given)
        return
    flags = flags_of(files, update, **given)
    if update != "sgd" and weighting in LOOKING_AHEAD:
        expected = "whose meta-steps look ahead along a step of it"
    elif update == "robust-small-v1" and (objective != "udr" or weighting in DIVERGENCES):
        expected = "whose second stream belongs to the cross-entropy of one pass"
    elif update == "robust-small-v1" and weighting == "logit-adjusted":
        expected = "which reads the model's own logits"
    else:
        found, _ = trained(flags, images)
        assert all(p.isfinite().all() for p in found.values())
        return
    with pytest.raises(ValueError, match=expected):
        trained(flags, images)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("objective", PLAIN)
def test_which_objectives_have_an_attack_to_choose(
    objective: str, transport: str, files: dict[str, str], images: LabelledImages
) -> None:
    if objective not in MOVED:
        with pytest.raises(ValueError, match="moves examples in its own way"):
            flags_of(files, "adam", objective=objective, transport=transport)
        return
    found, _ = trained(flags_of(files, "adam", objective=objective, transport=transport), images)
    assert all(p.isfinite().all() for p in found.values())


def test_the_axes_differ(files: dict[str, str], images: LabelledImages) -> None:
    """No choice is quietly another one."""

    def end(**given: Any) -> torch.Tensor:
        update = given.pop("update", "adam")
        return torch.cat([p.flatten() for p in trained(flags_of(files, update, **given), images)[0].values()])

    choices: list[dict[str, Any]] = [{"transport": name} for name in TRANSPORTS]
    choices += [{"weighting": name} for name in (*DIVERGENCES, "caat", "meta-weight-net")]
    choices += [{"update": name} for name in UPDATES if name != "adam"]
    ends = [end(**choice) for choice in choices]
    for i, a in enumerate(ends):
        for j in range(i):
            assert not torch.equal(a, ends[j]), (choices[i], choices[j])
    assert torch.equal(end(), end(transport="pgd")), "the default"
    assert torch.equal(end(weighting="mean"), end())
    assert torch.equal(end(weighting="kl"), end(objective="armor-at", radius=0.1))
    renyi = end(objective="armor-at", divergence="renyi", order=2.0, radius=0.1)
    assert torch.equal(end(weighting="renyi"), renyi)
    assert torch.equal(end(weighting="caat"), end(objective="caat", base="at"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"objective": "armor-at", "radius": 0.1, "weighting": "kl"}, "says how examples are weighed already"),
        ({"divergence": "kl", "weighting": "renyi"}, "--divergence and --weighting renyi are two flags for one thing"),
        ({"base": "at", "weighting": "caat"}, "--base and --weighting caat are two flags for one thing"),
        ({"class_weights": "balanced", "weighting": "balanced"}, "two flags for one thing"),
        ({"transport": "apgd", "steps": 1}, "--steps must be an integer >= 2 for --transport apgd, got 1"),
    ],
)
def test_two_flags_for_one_thing_are_a_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        along_the_axes(Train(data="digits", epsilon="0.1", **given))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"momentum": 0.9}, "--momentum is read by --update sgd, adam and adamw only"),
        ({"weight_decay": 0.1}, "--weight-decay is read by --update sgd, adam and adamw only"),
        ({"natural_weight": 0.5, "objective": "armor-at"}, "which add clean examples"),
        ({"robust_classes": "1", "objective": "armor-at"}, "which add clean examples"),
    ],
)
def test_what_a_learned_update_does_not_read(given: dict[str, Any], sentence: str) -> None:
    flags = Train(data="digits", epsilon="0.1", update="robust-small-v1", **given)
    with pytest.raises(ValueError, match=sentence):
        check_learned_update(flags, two_streams=True, reads_logits=True)


def test_an_update_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    flags = Train(data="digits", epsilon="0.1", update=str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match=r"--update: no meta-optimizer at .*; or write sgd, adam or adamw"):
        build_optimizer(flags, mlp([16, 4, 3]), BALL, 36)


def test_the_recipe_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python and its command, as they stand but for the length of the training."""
    page = (Path(__file__).parents[1] / "docs" / "combinations.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("20 * 4", "2 * 4").replace("epochs=20", "epochs=2"), names)
    assert len(names["result"].history) == 2
    words = command.split()
    assert words[:4] == ["uv", "run", "metarobust", "train"]
    monkeypatch.chdir(tmp_path)
    main([*words[3:], "--epochs", "1", "--steps", "2"])
    assert (tmp_path / "metarobust-model.safetensors").exists()


def test_an_epsilon_that_the_update_was_not_trained_with_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", "digits", "--examples", "60", "--epochs", "1", "--transport", "none", "--epsilon", "0.3"]
    main([*words, "--update", "robust-small-v1"])
    told = capsys.readouterr().err
    assert told.count("was trained with") == 1
    assert "robust-small-v1 was trained with linf and epsilon 0.0501 to 0.134; what it does beyond is not known" in told

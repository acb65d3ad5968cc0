"""Evaluation: per-example worst case, honest inputs, a report that survives a round trip."""

import dataclasses
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from metarobust.attacks import APGD, PGD, Square, count_calls
from metarobust.data import LabelledImages, load
from metarobust.evaluation import RobustnessReport, evaluate
from metarobust.evaluation._figures import most_perturbed
from metarobust.evaluation._inputs import data_digest
from metarobust.evaluation._reliability import Doubt
from metarobust.evaluation._table import threat_model_text
from metarobust.losses import margin
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)


def two_pixel(x: Tensor) -> Tensor:
    """Class 0 when the first pixel is larger: an l_inf attack of 0.1 flips exactly the examples with a lead below 0.2."""
    return x


def leads(*values: float) -> tuple[Tensor, Tensor]:
    x = torch.tensor([[0.5 + v / 2, 0.5 - v / 2] for v in values])
    return x, torch.zeros(len(values), dtype=torch.int64)


@pytest.mark.parametrize("protocol", ["quick", "standard", "strong"])
def test_linear_model_has_the_known_worst_case(protocol: str) -> None:
    report = evaluate(two_pixel, leads(0.9, 0.5, 0.3, 0.1, -0.2), threat_model=THREAT_MODEL, protocol=protocol)
    assert report.clean_accuracy == pytest.approx(0.8)
    assert report.worst_case_accuracy == pytest.approx(0.6)
    assert list(report.robust_accuracy.values())[-1] == pytest.approx(0.6)
    low, high = report.worst_case_interval
    assert low < 0.6 < high
    assert report.per_class_clean[0] == pytest.approx(0.8)
    assert math.isnan(report.per_class_clean[1])
    assert report.examples == 5
    assert set(report.seconds) == {"clean", *report.attacks, "reliability checks"}
    assert report.broken_by.tolist() == [-1, -1, -1, 0, -2]
    first = next(iter(report.attacks))
    assert (report.attacked[first], report.broken[first]) == (4, 1)


def test_worst_case_is_per_example_over_attacks() -> None:
    """Two attacks that each break another example: each alone leaves half, together nothing."""

    class Only:
        def __init__(self, row: float) -> None:
            self.row = row

        def __call__(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
            moved = x.clone()
            hit = (x[:, 0] - self.row).abs() < 1e-6
            moved[hit] = torch.tensor([0.45, 0.55])
            return moved

    attacks = {"a": Only(0.52), "b": Only(0.54)}
    data = (torch.tensor([[0.52, 0.48], [0.54, 0.46]]), torch.zeros(2, dtype=torch.int64))
    alone = evaluate(two_pixel, data, threat_model=THREAT_MODEL, attacks=attacks, survivors_only=False)
    assert alone.robust_accuracy == {"a": 0.5, "b": 0.5}
    assert alone.worst_case_accuracy == 0.0
    chained = evaluate(two_pixel, data, threat_model=THREAT_MODEL, attacks=attacks)
    assert chained.robust_accuracy == {"a": 0.5, "b": 0.0}


def test_loaders_and_tensors_give_the_same_report() -> None:
    torch.manual_seed(0)
    model = mlp([64, 8, 10]).eval()
    x, y = torch.rand(30, 1, 8, 8), torch.randint(10, (30,))
    images = LabelledImages(x, y, num_classes=10)
    forms = ((x, y), [x, y], images, DataLoader(TensorDataset(x, y), batch_size=7), DataLoader([(x[i], y[i]) for i in range(30)]))
    reports = [evaluate(model, data, threat_model=THREAT_MODEL, protocol="quick", batch_size=8) for data in forms]
    assert len(set(reports)) == 1
    for report in reports[1:]:
        assert torch.equal(report.adversarial_examples, reports[0].adversarial_examples)


def test_report_prints_and_serialises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(two_pixel, leads(0.9, 0.1), threat_model=THREAT_MODEL, protocol="quick")
    assert isinstance(report, RobustnessReport)
    loaded = json.loads(report.to_json(tmp_path / "report.json"))
    assert loaded == json.loads((tmp_path / "report.json").read_text())
    assert loaded["worst_case_accuracy"] == 0.5
    assert loaded["per_class_clean"] == [1.0, None]
    report.print()
    shown = capsys.readouterr().out
    assert "worst case" in shown
    assert "0.500" in shown


def test_attack_that_leaves_the_ball_is_refused() -> None:
    cheat = PGD(threat_model=ThreatModel(norm="linf", epsilon=0.3), steps=5)
    with pytest.raises(ValueError, match=r"attacks must be such that every result lies inside .*give the attack the same"):
        evaluate(two_pixel, leads(0.5, 0.4), threat_model=THREAT_MODEL, attacks={"cheat": cheat})


@pytest.mark.parametrize("spoil", [lambda x: x[:1], lambda x: x.double(), lambda x: x.tolist()])
def test_attack_that_returns_another_shape_or_dtype_is_refused(spoil: Any) -> None:
    def attack(model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Any:
        return spoil(x)

    with pytest.raises(ValueError, match=r"attacks must be such that every result is a tensor like x, \[2, 2\] torch.float32"):
        evaluate(two_pixel, leads(0.5, 0.4), threat_model=THREAT_MODEL, attacks={"spoiled": attack})


class _NaN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan")


@pytest.mark.parametrize(
    ("model", "data", "text"),
    [
        (nn.Linear(2, 2), leads(0.5), r"model must be in evaluation mode.*write model.eval\(\)"),
        (two_pixel, (torch.tensor([[float("nan"), 0.0]]), torch.tensor([0])), "x must be finite"),
        (two_pixel, (torch.tensor([[200.0, 20.0]]), torch.tensor([0])), "write x / 255"),
        (two_pixel, (torch.tensor([[-1.5, 1.0]]), torch.tensor([0])), "metarobust.models.Normalize"),
        (two_pixel, (torch.tensor([[1, 0]]), torch.tensor([0])), r"write x.float\(\) / 255"),
        (two_pixel, (torch.tensor([[0.5, 0.2]]), torch.tensor([0.0])), r"write y.long\(\)"),
        (two_pixel, (torch.tensor([[0.5, 0.2]]), torch.tensor([7])), r"y must be in \[0, 2\)"),
        (two_pixel, (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)), "at least one example"),
        (lambda x: x.sum(), leads(0.5), r"logits \[batch, classes\]"),
        (lambda x: (x, x), leads(0.5), r"logits \[batch, classes\], got tuple for 1 inputs"),
        (_NaN().eval(), leads(0.5), "logits are finite"),
        (None, leads(0.5), r"model must be a callable .*, got None; pass an nn.Module or a function"),
        ("net.pt", leads(0.5), r"model must be a callable .*, got 'net.pt'; build the network"),
        (
            two_pixel,
            [part.numpy() for part in leads(0.5)],
            r"got a pair of ndarray and ndarray; for arrays write torch.from_numpy",
        ),
        (two_pixel, (leads(0.5)[0], leads(0.5)[1].numpy()), "got a pair of Tensor and ndarray"),
        (two_pixel, [{"x": 1}], "got batches of something else: dict; .* write DataLoader"),
        (two_pixel, [leads(0.5), leads(0.5), None], "got batches of something else: NoneType"),
        (two_pixel, "mnist.npz", "got str"),
        (two_pixel, [], "at least one batch, got none"),
    ],
)
def test_bad_input_says_what_to_write(model: Any, data: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        evaluate(model, data, threat_model=THREAT_MODEL, protocol="quick")


def test_unknown_protocol() -> None:
    with pytest.raises(ValueError, match="protocol must be one of 'quick', 'standard', 'strong'"):
        evaluate(two_pixel, leads(0.5), threat_model=THREAT_MODEL, protocol="best")


def checks_of(report: RobustnessReport) -> set[str]:
    return {doubt.check for doubt in report.warnings}


def test_doubts_of_the_model_the_attacks_and_the_results_reach_the_report() -> None:
    data = leads(*torch.linspace(0.5, 0.9, 100).tolist())
    steep = evaluate(lambda v: 1e4 * v, data, threat_model=THREAT_MODEL, protocol="quick")
    assert "zero_gradients" in checks_of(steep)
    assert any("without any input gradient" in str(doubt) for doubt in steep.warnings)
    sound = evaluate(lambda v: 3 * v, data, threat_model=THREAT_MODEL, protocol="quick")
    assert sound.warnings == ()
    many = {"apgd": APGD(threat_model=THREAT_MODEL, steps=2, loss="margin", targets=5)}
    third = evaluate(lambda v: 3 * v, data, threat_model=THREAT_MODEL, attacks=many)
    assert checks_of(third) == {"fewer_classes_than_targets"}


def test_data_digest_names_the_data_and_not_where_or_how_it_lies() -> None:
    x, y = leads(0.9, 0.1)
    named = data_digest(x, y)
    assert re.fullmatch("[0-9a-f]{16}", named)
    for same in ((x.double(), y), (x.t().contiguous().t(), y), (x.reshape(2, 1, 1, 2), y), (x.clone(), y.int())):
        assert data_digest(*same) == named
    for other in ((x.flip(0), y), (x, 1 - y), (x[:1], y[:1]), (x + 1e-6, y)):
        assert data_digest(*other) != named
    for data in ((x, y), DataLoader(TensorDataset(x, y), batch_size=1)):
        report = evaluate(two_pixel, data, threat_model=THREAT_MODEL, protocol="quick", reliability_checks=False)
        assert json.loads(report.to_json())["settings"]["data"] == named


def test_a_model_without_its_weights_is_a_doubt() -> None:
    torch.manual_seed(0)
    digits = load("digits", train=False)
    report = evaluate(mlp([64, 16, 10]).eval(), digits, threat_model=THREAT_MODEL, protocol="quick")
    assert "no_better_than_chance" in checks_of(report)


def test_epsilon_curve_is_that_of_the_examples() -> None:
    """The lead of pixel 0 falls by twice the radius: accuracies at every radius are known."""
    values = [0.05 * k for k in range(1, 20)]
    report = evaluate(lambda v: 3 * v, leads(*values), threat_model=THREAT_MODEL, protocol="quick")
    assert [radius for radius, _ in report.epsilon_curve] == pytest.approx([0, 0.025, 0.05, 0.1, 0.2, 0.4, 1.0])
    for radius, accuracy in report.epsilon_curve:
        box_allows = [min(2 * radius, 1 + v) for v in values]
        assert accuracy == pytest.approx(
            sum(v > reach + 1e-6 for v, reach in zip(values, box_allows, strict=True)) / 19, abs=0.06
        )


def test_gradient_free_attack_that_wins_is_a_doubt() -> None:
    """Rounding hides the way from gradients; random search finds it, and the report says which attack it was."""

    def rounded(v: Tensor) -> Tensor:
        return 3 * ((v * 20).round() / 20 + 0 * v)

    data = leads(*[0.15] * 60)
    attacks = {"pgd": PGD(threat_model=THREAT_MODEL, steps=3), "square": Square(threat_model=THREAT_MODEL, queries=50)}
    report = evaluate(rounded, data, threat_model=THREAT_MODEL, attacks=attacks)
    assert report.broken["square"] > 10
    (doubt,) = [doubt for doubt in report.warnings if doubt.check == "gradient_free_wins"]
    assert doubt.reason.startswith(f"square broke {report.broken['square']} of 60 examples")


def test_models_that_autograd_cannot_follow_take_gradient_free_attacks() -> None:
    def detached(v: Tensor) -> Tensor:
        return 3 * v.detach()

    attacks = {"square": Square(threat_model=THREAT_MODEL, queries=50)}
    report = evaluate(detached, leads(0.9, 0.1), threat_model=THREAT_MODEL, attacks=attacks)
    assert report.broken_by.tolist() == [-1, 0]
    assert "zero_gradients" in checks_of(report)
    assert report.epsilon_curve == ()


def test_checks_can_be_left_out_and_the_report_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    data = leads(0.9, 0.1)
    with count_calls() as counter:
        report = evaluate(two_pixel, data, threat_model=THREAT_MODEL, protocol="quick", reliability_checks=False)
    assert counter.calls == len(report.attacks)
    assert (report.warnings, report.epsilon_curve, report.settings["checked_examples"]) == ((), (), 0)
    report.print()
    assert "reliability checks were left out" in capsys.readouterr().out
    full = evaluate(two_pixel, data, threat_model=THREAT_MODEL, protocol="quick")
    assert torch.equal(full.adversarial_examples, report.adversarial_examples), "checks use no noise of the attacks"
    assert full.settings["checked_examples"] == 2
    assert "few_examples" in checks_of(full)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"threat_model": "linf"}, "threat_model must be a ThreatModel"),
        ({"threat_model": THREAT_MODEL, "attacks": [PGD(threat_model=THREAT_MODEL)]}, "write {'pgd': attack}"),
        ({"threat_model": THREAT_MODEL, "batch_size": 1.5}, "batch_size must be an integer >= 1"),
    ],
)
def test_wrong_types(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        evaluate(two_pixel, leads(0.5), **arguments)
    with pytest.raises(TypeError, match="a pair"):
        evaluate(two_pixel, torch.zeros(3, 2), threat_model=THREAT_MODEL)


def test_robust_accuracy_without_any_attack_is_refused() -> None:
    with pytest.raises(ValueError, match="attacks must be at least one attack, got none"):
        evaluate(two_pixel, leads(0.5), threat_model=THREAT_MODEL, attacks={})


def test_attack_named_like_another_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="attacks must be named otherwise than 'clean'"):
        evaluate(two_pixel, leads(0.5), threat_model=THREAT_MODEL, attacks={"clean": PGD(threat_model=THREAT_MODEL)})


# What was counted -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Breaks the examples whose number (the first pixel, in thousandths) stands in its list: swaps the pixels, adds a mark."""

    numbers: tuple[int, ...]
    mark: float = 0.0

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        hit = torch.tensor([round(1000 * v) in self.numbers for v in x[:, 0].tolist()], dtype=torch.bool)
        return torch.where(hit[:, None], x.flip(1) + self.mark, x)


WIDE = ThreatModel(norm="linf", epsilon=1.0)


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 9),
    table=st.lists(st.lists(st.integers(0, 8), max_size=9), min_size=1, max_size=4),
    wrong=st.sets(st.integers(0, 8)),
    batch_size=st.integers(1, 5),
)
def test_counts_equal_those_of_a_loop_over_examples(
    examples: int, table: list[list[int]], wrong: set[int], batch_size: int
) -> None:
    """Random tables of which attack breaks which example, both modes, against sets counted one example at a time."""
    x = torch.tensor([[(900 + i) / 1000, 0.1] for i in range(examples)])
    y = torch.tensor([int(i in wrong) for i in range(examples)])
    attacks = {f"a{k}": Table(tuple(900 + i for i in row), mark=k / 64) for k, row in enumerate(table)}
    for survivors_only in (True, False):
        modes = {"survivors_only": survivors_only, "reliability_checks": False}
        report = evaluate(two_pixel, (x, y), threat_model=WIDE, attacks=attacks, batch_size=batch_size, **modes)
        standing = {i for i in range(examples) if i not in wrong}
        assert report.clean_accuracy == pytest.approx(len(standing) / examples)
        everyone, found = set(standing), [-2 if i in wrong else -1 for i in range(examples)]
        for k, row in enumerate(table):
            ran_on = standing if survivors_only else everyone
            hit = ran_on & set(row)
            for i in hit & standing:
                found[i] = k
            standing = standing - hit
            left = standing if survivors_only else everyone - hit
            assert report.attacked[f"a{k}"] == len(ran_on)
            assert report.broken[f"a{k}"] == len(hit)
            assert report.robust_accuracy[f"a{k}"] == pytest.approx(len(left) / examples)
        assert report.worst_case_accuracy == pytest.approx(len(standing) / examples)
        assert report.broken_by.tolist() == found
        moved = [(x[i].flip(0) + k / 64 if k >= 0 else x[i]).tolist() for i, k in enumerate(found)]
        assert report.adversarial_examples.tolist() == moved
        assert report.adversarial_predictions.tolist() == [int(found[i] >= 0) for i in range(examples)]


def test_classes_are_summarised_without_the_empty_ones() -> None:
    x = torch.tensor([[0.9, 0.1, 0.0]] * 3 + [[0.1, 0.9, 0.0]] * 2)
    y = torch.tensor([0, 0, 0, 1, 0])  # class 0: three of four right, class 1: one of one, class 2 has no example
    attacks = {"a": Table((900,))}

    report = evaluate(two_pixel, (x, y), threat_model=WIDE, attacks={"nothing": Table(())})
    assert report.per_class_clean[:2] == (0.75, 1.0)
    assert math.isnan(report.per_class_clean[2])
    assert report.clean_by_class == (0.875, 0.75, 0, 0.125)
    assert report.clean_by_class.spread == statistics.pstdev([0.75, 1.0])
    swapped = evaluate(lambda v: v[:, :2], (x[:, :2], y), threat_model=WIDE, attacks=attacks)
    assert swapped.per_class_robust == (0.0, 1.0)
    assert swapped.robust_by_class == (0.5, 0.0, 0, 0.5)


def test_a_model_that_answers_nan_under_attack_is_broken() -> None:
    def fragile(x: Tensor) -> Tensor:
        return torch.where(x[:, :1] < 0.5, float("nan"), x)

    data = (torch.tensor([[0.9, 0.1], [0.8, 0.1]]), torch.tensor([0, 0]))
    report = evaluate(fragile, data, threat_model=WIDE, attacks={"swap": Table((900,))})
    assert report.broken_by.tolist() == [0, -1]
    assert report.adversarial_predictions.tolist() == [-1, 0]


# Where it runs --------------------------------------------------------------------------------------------------------


@dataclass
class Spy:
    """A PGD attack that notes what it was given and draws from its generator."""

    attack: PGD
    seen: list[tuple[torch.dtype, torch.dtype]] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        self.seen.append((x.dtype, model(x).dtype))
        self.drawn.append(torch.rand((), generator=generator).item())
        return self.attack(model, x, y, generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_models_of_any_precision_are_attacked_in_float32_pixels(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    threat_model = ThreatModel(norm="linf", epsilon=2 / 255)
    model = mlp([64, 16, 10]).eval().to(dtype)
    x = torch.rand(40, 1, 8, 8)
    with torch.no_grad():
        y = model(x.to(dtype)).argmax(1)
    spy = Spy(PGD(threat_model=threat_model, steps=10, loss="margin"))
    report = evaluate(model, (x, y), threat_model=threat_model, attacks={"pgd": spy})
    assert spy.seen == [(torch.float32, torch.float32)]
    assert report.clean_accuracy == 1.0
    assert report.settings["dtype"] == str(dtype).removeprefix("torch.")
    assert 0 < report.broken["pgd"] < 40
    x_adv = report.adversarial_examples
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() <= 2 / 255 + 1e-7, "in bfloat16 a pixel near 1 moves in steps of 1/256"
    with torch.no_grad():
        predictions = model(x_adv.to(dtype)).argmax(1)
    assert torch.equal(predictions, report.adversarial_predictions)
    assert torch.equal(predictions != y, report.broken_by >= 0)
    assert all(p.dtype == dtype for p in model.parameters())


def test_half_precision_data_becomes_float32_and_float64_data_stays() -> None:
    x, y = leads(0.9, 0.1)
    for stored, worked in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        spy = Spy(PGD(threat_model=THREAT_MODEL, steps=5))
        report = evaluate(two_pixel, (x.to(stored), y), threat_model=THREAT_MODEL, attacks={"pgd": spy})
        assert spy.seen == [(worked, worked)]
        assert report.worst_case_accuracy == 0.5


def test_a_callable_with_half_precision_logits_gives_float32_to_the_attacks() -> None:
    spy = Spy(PGD(threat_model=THREAT_MODEL, steps=5))
    report = evaluate(lambda v: v.bfloat16(), leads(0.9, 0.1), threat_model=THREAT_MODEL, attacks={"pgd": spy})
    assert spy.seen == [(torch.float32, torch.float32)]
    assert report.settings["dtype"] == "bfloat16"
    assert report.broken_by.tolist() == [-1, 0]


def test_evaluation_inside_inference_mode() -> None:
    with torch.inference_mode():
        data = leads(0.9, 0.1)
        report = evaluate(two_pixel, data, threat_model=THREAT_MODEL, protocol="quick")
    assert report.worst_case_accuracy == 0.5


def test_noise_is_a_function_of_seed_attack_and_batch() -> None:
    data = leads(*[0.9] * 6)

    def drawn(seed: int) -> list[float]:
        spies = [Spy(PGD(threat_model=THREAT_MODEL, steps=1)) for _ in range(2)]
        torch.manual_seed(torch.seed())
        evaluate(two_pixel, data, threat_model=THREAT_MODEL, attacks={"a": spies[0], "b": spies[1]}, batch_size=2, seed=seed)
        return spies[0].drawn + spies[1].drawn

    assert drawn(0) == drawn(0)
    assert len(set(drawn(0) + drawn(1))) == 12, "two attacks, three batches, two seeds: all different"


# The report as a value ------------------------------------------------------------------------------------------------


def small_report(model: Any = two_pixel, **arguments: Any) -> RobustnessReport:
    attacks = {"pgd": PGD(threat_model=THREAT_MODEL, steps=5, loss=lambda logits, y: margin(logits, y))}
    return evaluate(model, leads(0.9, 0.1), threat_model=THREAT_MODEL, attacks=attacks, **arguments)


def test_equal_reports_are_equal_and_hash_alike() -> None:
    """NaN (a class without examples), functions in reprs, and other seconds must not make a difference; settings must."""
    first, second, other = small_report(), small_report(), small_report(seed=1)
    assert first.seconds != second.seconds
    assert math.isnan(first.per_class_clean[1])
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second, other}) == 2
    assert first != other
    assert first != "a report"
    assert dataclasses.replace(first, adversarial_examples=torch.zeros(2, 2)) == first, "tensors are not compared"


def test_json_is_plain_data_without_tensors() -> None:
    report = small_report()
    loaded = json.loads(report.to_json())
    names = {f.name for f in dataclasses.fields(report) if not isinstance(getattr(report, f.name), Tensor)}
    assert set(loaded) == names | {"clean_by_class", "robust_by_class", "errors"}
    assert loaded["robust_by_class"] == {"class_mean": 0.5, "worst": 0.5, "worst_class": 0, "spread": 0.0}
    assert loaded["settings"]["seed"] == 0
    assert loaded["attacked"] == {"pgd": 2}
    assert " at 0x" not in report.to_json()
    assert "tensor" not in repr(report)
    assert "torch.int64" not in repr(report)


def test_warnings_keep_reason_and_remedy_apart_in_json() -> None:
    doubt = Doubt(check="zero-gradients", reason="gradients are [zero]", remedy="use margins")
    report = dataclasses.replace(small_report(), warnings=(doubt,))
    expected = {"check": "zero-gradients", "reason": "gradients are [zero]", "remedy": "use margins"}
    assert json.loads(report.to_json())["warnings"] == [expected]


def test_print_fits_80_columns_and_explains_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    reason = "the gradients vanish [on most examples] " * 4
    doubt = Doubt(check="zero-gradients", reason=reason.strip(), remedy="use margins")
    attacks = {"[bold]pgd[/bold]": PGD(threat_model=THREAT_MODEL, steps=2), "x" * 90: PGD(threat_model=THREAT_MODEL, steps=3)}
    report = evaluate(two_pixel, leads(0.9, 0.1), threat_model=THREAT_MODEL, attacks=attacks)
    dataclasses.replace(report, warnings=(doubt,)).print()
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[0] == "2 examples, l_inf, epsilon 0.1, box [0, 1]"
    shown = "\n".join(lines)
    assert "[bold]pgd[/bold]" in shown, "names are no markup"
    assert "worst case 0.500, 95 % interval 0.095 to 0.905" in shown
    assert re.search(r"robust +│ +0\.500 │ +0\.500 │ 0\.500 \(class 0\) │ +0\.000", shown)
    begin = lines.index("warning: docs/trust.md#zero-gradients")
    assert lines[-1] == "  remedy: use margins"
    assert all(line.startswith("  ") for line in lines[begin + 1 :]), "reason and remedy stay indented where they wrap"
    assert " ".join(line.strip() for line in lines[begin + 1 : -1]) == reason.strip()


@pytest.mark.parametrize(
    ("threat_model", "text"),
    [
        (ThreatModel(epsilon=8 / 255), "l_inf, epsilon 8/255, box [0, 1]"),
        (ThreatModel(epsilon=0.2), "l_inf, epsilon 0.2, box [0, 1]"),
        (ThreatModel(norm="l2", epsilon=1 / 3, lower=-0.5, upper=2), "l_2, epsilon 0.3333, box [-0.5, 2]"),
        (ThreatModel(norm="l1", epsilon=12), "l_1, epsilon 12, box [0, 1]"),
    ],
)
def test_threat_models_as_a_reader_writes_them(threat_model: ThreatModel, text: str) -> None:
    report = small_report()
    changed = dataclasses.replace(report, settings=report.settings | dataclasses.asdict(threat_model))
    assert threat_model_text(changed) == text


# The figure -----------------------------------------------------------------------------------------------------------


def image_report(channels: int) -> RobustnessReport:
    """Class 0 if the image is dark: the attack brightens the pixels; two examples break, one stays."""
    x = torch.full((3, channels, 4, 4), 0.3)
    x[1], x[2] = 0.45, 0.48

    def model(v: Tensor) -> Tensor:
        bright = v.flatten(1).mean(1)
        return torch.stack([0.5 - bright, bright - 0.5], 1)

    pgd = PGD(threat_model=THREAT_MODEL, steps=5, loss="margin")
    return evaluate(model, (x, torch.zeros(3, dtype=torch.int64)), threat_model=THREAT_MODEL, attacks={"pgd": pgd})


@pytest.mark.parametrize("channels", [0, 1, 2, 3])
def test_figure_is_written_whole_and_without_pyplot(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails
    report = image_report(channels) if channels else small_report()
    assert len(most_perturbed(report)) == (2 if channels in (1, 3) else 0)
    path = report.plot(tmp_path / "report.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["report.png"]
    assert report.plot(tmp_path / "report.svg").read_text().lstrip().startswith("<?xml")


def test_most_perturbed_examples_come_first_and_only_broken_ones() -> None:
    report = image_report(1)
    x = torch.rand(8, 1, 4, 4)
    reach = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.2, 0.4, 0.8, 0.7])
    found = dataclasses.replace(
        report,
        inputs=x,
        adversarial_examples=x + reach[:, None, None, None],
        broken_by=torch.tensor([0, 0, 0, -1, 0, 0, -2, 0]),
    )
    assert most_perturbed(found) == [7, 1, 5, 2, 4]


@pytest.mark.parametrize("name", ["report", "report.txt"])
def test_figure_in_an_unknown_format_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path must be a file that ends in one of .*write report.png"):
        small_report().plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_report_in_the_fields_of_robustbench(tmp_path: Path) -> None:
    """Fields and types of the entries of its leaderboard; nothing is called AutoAttack that is not."""
    torch.manual_seed(0)
    x, y = torch.rand(20, 4), torch.randint(3, (20,))
    model = nn.Linear(4, 3).eval()
    report = evaluate(model, (x, y), threat_model=ThreatModel(epsilon=8 / 255), protocol="quick")
    options: dict[str, Any] = {"name": "Ours", "dataset": "cifar10", "architecture": "Linear", "footnote": "Untrained."}
    entry = report.to_robustbench(tmp_path / "Ours2026.json", **options)
    assert json.loads((tmp_path / "Ours2026.json").read_text()) == entry
    assert list(entry) == [
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
        "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable",
    ]  # fmt: skip
    assert entry["eps"] == "8/255"
    assert entry["clean_acc"] == f"{100 * report.clean_accuracy:.2f}"
    assert float(entry["reported"]) == pytest.approx(100 * report.worst_case_accuracy, abs=0.005)
    assert entry["autoattack_acc"] is None
    assert entry["footnote"].startswith("Worst case of ")
    assert entry["footnote"].endswith("on 20 examples, by metarobust 0.1.0. AutoAttack was not run. Untrained.")
    assert entry["unreliable"] == bool(report.warnings)
    with pytest.raises(ValueError, match="dataset must be not empty"):
        report.to_robustbench(**(options | {"dataset": ""}))
    summed = evaluate(model, (x, y), threat_model=ThreatModel(norm="l1", epsilon=1.0), protocol="quick")
    with pytest.raises(ValueError, match="for l_inf or l2, which RobustBench lists"):
        summed.to_robustbench(**options)

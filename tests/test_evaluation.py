"""Evaluation: per-example worst case, honest inputs, a report that survives a round trip."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from metarobust.attacks import PGD
from metarobust.evaluation import RobustnessReport, evaluate
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
    assert set(report.seconds) == {"clean", *report.attacks}


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


def test_loaders_batches_and_seeds_agree() -> None:
    torch.manual_seed(0)
    model = mlp([64, 8, 10]).eval()
    x, y = torch.rand(30, 1, 8, 8), torch.randint(10, (30,))
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    found = [
        evaluate(model, data, threat_model=THREAT_MODEL, protocol="quick", batch_size=size)
        for data, size in (((x, y), 1000), (loader, 1000))
    ]
    assert found[0].robust_accuracy == found[1].robust_accuracy
    assert found[0].per_class_robust == pytest.approx(found[1].per_class_robust, nan_ok=True)
    small = evaluate(model, (x, y), threat_model=THREAT_MODEL, protocol="quick", batch_size=4)
    assert small.clean_accuracy == found[0].clean_accuracy


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
        (_NaN().eval(), leads(0.5), "logits are finite"),
    ],
)
def test_bad_input_says_what_to_write(model: Any, data: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        evaluate(model, data, threat_model=THREAT_MODEL, protocol="quick")


def test_unknown_protocol() -> None:
    with pytest.raises(ValueError, match="protocol must be one of 'quick', 'standard', 'strong'"):
        evaluate(two_pixel, leads(0.5), threat_model=THREAT_MODEL, protocol="best")


def test_silent_gradients_are_reported() -> None:
    torch.manual_seed(0)
    x, y = leads(0.9, 0.8, 0.7, 0.6)
    report = evaluate(lambda v: 1e4 * v, (x, y), threat_model=THREAT_MODEL, protocol="quick")
    assert len(report.warnings) == 1
    assert "without any input gradient" in report.warnings[0]
    assert evaluate(two_pixel, (x, y), threat_model=THREAT_MODEL, protocol="quick").warnings == ()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"threat_model": "linf"}, "threat_model must be a ThreatModel"),
        ({"threat_model": THREAT_MODEL, "attacks": [PGD(threat_model=THREAT_MODEL)]}, "write {'pgd': attack}"),
    ],
)
def test_wrong_types(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        evaluate(two_pixel, leads(0.5), **arguments)
    with pytest.raises(TypeError, match="a pair"):
        evaluate(two_pixel, torch.zeros(3, 2), threat_model=THREAT_MODEL)

"""A report beside the bound on its own points: known values, both sides of each error, and the report as a value."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metarobust.attacks import PGD
from metarobust.bounds import adversarial_risk_bound
from metarobust.evaluation import RobustnessReport, evaluate
from metarobust.evaluation._distance import DistanceToBound
from metarobust.threat_models import ThreatModel


def threshold(at: float) -> Any:
    """Class 1 above ``at``: the worst case of a point is the end of its interval, which one signed step reaches."""
    return lambda x: torch.cat([2 * at - x, x], 1)


def measured(values: list[float], labels: list[int], at: float, epsilon: float, norm: str = "linf") -> RobustnessReport:
    threat_model = ThreatModel(norm=norm, epsilon=epsilon)
    attack = PGD(threat_model=threat_model, steps=1, step_size=max(epsilon, 0.1), random_start=False)
    data = torch.tensor(values, dtype=torch.float64)[:, None], torch.tensor(labels)
    return evaluate(threshold(at), data, threat_model=threat_model, attacks={"step": attack}, reliability_checks=False)


def distance(report: RobustnessReport, **arguments: Any) -> DistanceToBound:
    found = report.with_distance_to_bound(**arguments).distance_to_bound
    assert found is not None
    return found


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_known_values_on_a_line(norm: str) -> None:
    """0.3 and 0.45 of different classes lie within 2 epsilon: one of three is lost; the threshold 0.38 loses both."""
    found = distance(measured([0.3, 0.45, 0.9], [0, 1, 1], 0.38, 0.1, norm))
    assert (found.risk, found.lower, found.upper) == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert found.exact
    assert found.difference == pytest.approx(1 / 3)
    assert found.at_least == pytest.approx(1 / 3)
    best = distance(measured([0.3, 0.45, 0.9], [0, 1, 1], 0.5, 0.1, norm))
    assert best.difference == pytest.approx(0)


@settings(max_examples=30, deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1)), min_size=1, max_size=12),
    at=st.integers(0, 40),
    radius=st.integers(0, 12),
)
def test_no_threshold_beats_the_bound(points: list[tuple[int, int]], at: int, radius: int) -> None:
    """One signed step finds the exact worst case of a threshold, so the difference is never negative.

    The threshold lies off the grid, where a step that ends on it would be judged by rounding.
    """
    report = measured([v / 40 for v, _ in points], [y for _, y in points], (at + 0.5) / 40, radius / 40)
    lost = [min(v + radius, 40) > at if y == 0 else max(v - radius, 0) <= at for v, y in points]
    found = distance(report)
    assert found.risk == pytest.approx(sum(lost) / len(points))
    assert found.exact, "two classes: order 2 is always exact"
    assert found.difference >= -1e-9
    assert found.at_least == pytest.approx(found.difference, abs=1e-6)


def test_order_is_passed_on_and_an_open_bracket_separates_the_two_differences() -> None:
    """Three classes at one point: order 2 says 1/2, order 3 the truth, 2/3."""
    x, y = torch.full((3, 1), 0.5), torch.tensor([0, 1, 2])
    threat_model = ThreatModel(norm="l2", epsilon=0.1)

    def model(v: Tensor) -> Tensor:
        return torch.cat([0 * v - 1, v - v, 0 * v - 1], 1)

    attacks = {"pgd": PGD(threat_model=threat_model, steps=1)}
    report = evaluate(model, (x, y), threat_model=threat_model, attacks=attacks, reliability_checks=False)
    two, auto = distance(report, order=2), distance(report)
    assert (two.lower, two.upper, two.exact, two.order) == (pytest.approx(0.5), pytest.approx(2 / 3), False, 2)
    assert (two.difference, two.at_least) == (pytest.approx(1 / 6), pytest.approx(0, abs=1e-9))
    assert (auto.lower, auto.exact, auto.order) == (pytest.approx(2 / 3), True, 3)
    assert auto.difference == pytest.approx(0, abs=1e-9)
    assert "between 0.333 and 0.500" in two.sentence()


def test_the_box_and_the_units_are_those_of_the_report() -> None:
    x, y = torch.tensor([[-0.5], [1.5]]), torch.tensor([0, 1])
    threat_model = ThreatModel(norm="linf", epsilon=1.25, lower=-1, upper=2)
    attacks = {"pgd": PGD(threat_model=threat_model, steps=1)}
    report = evaluate(threshold(0.5), (x, y), threat_model=threat_model, attacks=attacks, reliability_checks=False)
    assert distance(report).lower == adversarial_risk_bound(x, y, threat_model).lower == pytest.approx(0.5)


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An attack that does nothing: what it measures is the clean risk."""

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return x.clone()


def lazy_report() -> RobustnessReport:
    data = torch.tensor([[0.3], [0.45], [0.9]]), torch.tensor([0, 1, 1])
    return evaluate(threshold(0.38), data, threat_model=ThreatModel(epsilon=0.1), attacks={"lazy": Lazy()})


def test_a_risk_below_the_bound_shows_that_the_attacks_failed() -> None:
    found = distance(lazy_report())
    assert found.risk == 0
    assert (found.difference, found.at_least) == (pytest.approx(-1 / 3), 0)
    assert found.sentence().endswith(
        "0.667 (sets of up to 2); the measured one is 0.333 above that, so the attacks missed examples"
    )


def test_the_report_stays_a_value(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bound nothing changes; with it, equality, JSON and print know it, and the first report does not."""
    monkeypatch.setenv("COLUMNS", "80")
    report, again = lazy_report(), lazy_report()
    bounded = report.with_distance_to_bound()
    assert report == again
    assert report.distance_to_bound is None
    assert json.loads(report.to_json())["distance_to_bound"] is None
    assert bounded == again.with_distance_to_bound()
    assert hash(bounded) == hash(again.with_distance_to_bound())
    assert bounded != report
    written = json.loads(bounded.to_json())["distance_to_bound"]
    assert written == {
        "risk": 0.0, "lower": pytest.approx(1 / 3), "upper": pytest.approx(1 / 3), "exact": True, "order": 2,
        "difference": pytest.approx(-1 / 3), "at_least": 0.0,
    }  # fmt: skip
    report.print()
    assert "best possible" not in capsys.readouterr().out
    bounded.print()
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert bounded.distance_to_bound is not None
    assert bounded.distance_to_bound.sentence() in " ".join(" ".join(lines).split())


def test_l1_is_refused_with_a_sentence() -> None:
    report = measured([0.3, 0.9], [0, 1], 0.5, 0.1, "l1")
    with pytest.raises(ValueError, match="norm must be 'l2' or 'linf', got 'l1'; l1 balls have no such solver here"):
        report.with_distance_to_bound()

"""Errors of a report by class: a case counted by hand, identities for random predictions, and what contradicts itself."""

import dataclasses
import json
import math
import re
import statistics
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metarobust.evaluation import ClassErrors, ErrorSummary, RobustnessReport, evaluate
from metarobust.evaluation._fairness import class_errors
from metarobust.threat_models import ThreatModel

WIDE = ThreatModel(norm="linf", epsilon=1.0)


@dataclass(frozen=True)
class Swap:
    """Turns the pixels of the examples of which one pixel is in its list around, so that the first class is wrong for them."""

    marks: tuple[float, ...]

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        hit = torch.tensor([any(round(v, 4) in self.marks for v in row) for row in x.tolist()], dtype=torch.bool)
        return torch.where(hit[:, None], x.flip(1), x)


def three_classes(**arguments: Any) -> RobustnessReport:
    """Class 0: of 4 examples 1 wrong, 2 broken (by two attacks). Class 2: of 2 examples 1 wrong. Class 1 has none."""
    rows = [(0.9, 0, 0.1), (0.8, 0, 0.1), (0.7, 0, 0.1), (0.1, 0, 0.9), (0.1, 0, 0.6), (0.5, 0, 0.1)]
    y = torch.tensor([0, 0, 0, 0, 2, 2])
    attacks = {"first": Swap((0.9,)), "second": Swap((0.8,))}
    return evaluate(lambda x: x, (torch.tensor(rows), y), threat_model=WIDE, attacks=attacks, **arguments)


def test_a_small_case_counted_by_hand() -> None:
    report = three_classes()
    assert report.broken_by.tolist() == [0, 1, -1, -2, -1, -2]
    errors = report.errors
    assert isinstance(errors, ClassErrors)
    assert isinstance(errors.natural, ErrorSummary)
    expected = {  # average, worst, where, spread, class 0, class 2
        "natural": (2 / 6, 0.5, 2, 0.125, 0.25, 0.5, 0.375),
        "boundary": (2 / 6, 0.5, 0, 0.25, 0.5, 0.0, 0.25),
        "robust": (4 / 6, 0.75, 0, 0.125, 0.75, 0.5, 0.625),
    }
    for kind, (average, worst, worst_class, spread, first, last, class_mean) in expected.items():
        found = getattr(errors, kind)
        assert found[:4] == (average, worst, worst_class, spread), kind
        assert (found.per_class[0], found.per_class[2]) == (first, last), kind
        assert math.isnan(found.per_class[1])
        assert found.class_mean == class_mean


predictions = st.integers(1, 6).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        st.lists(
            st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1), st.integers(-1, 3)), min_size=1, max_size=60
        ),
    )
)


@settings(max_examples=150, deadline=None)
@given(drawn=predictions)
def test_identities_for_random_predictions(drawn: tuple[int, list[tuple[int, int, int]]]) -> None:
    """Against fractions counted one example at a time; natural and boundary counts add up to the robust ones, class by class."""
    classes, rows = drawn
    rows = [(label, predicted, by if predicted == label else -2) for label, predicted, by in rows]
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    errors = class_errors(*columns, classes=classes)
    members = {c: [row for row in rows if row[0] == c] for c in range(classes)}
    known = [c for c in members if members[c]]
    kinds = {
        "natural": lambda label, predicted, by: predicted != label,
        "boundary": lambda label, predicted, by: predicted == label and by >= 0,
        "robust": lambda label, predicted, by: predicted != label or by >= 0,
    }
    counts = {}
    for kind, is_wrong in kinds.items():
        found = getattr(errors, kind)
        wrong = {c: sum(is_wrong(*row) for row in members[c]) for c in known}
        exact = {c: Fraction(wrong[c], len(members[c])) for c in known}
        assert found.average == sum(wrong.values()) / len(rows)
        assert [found.per_class[c] for c in known] == [float(exact[c]) for c in known]
        assert [c for c, error in enumerate(found.per_class) if not math.isnan(error)] == known
        assert len(found.per_class) == classes
        assert found.worst == float(max(exact.values()))
        assert found.worst_class == min(c for c in known if exact[c] == max(exact.values()))
        assert found.spread == pytest.approx(statistics.pstdev(exact.values()), abs=1e-12)
        assert found.class_mean == pytest.approx(float(statistics.mean(exact.values())), abs=1e-12)
        assert found.average <= found.worst
        sizes = [len(members[c]) for c in known]
        read = [found.per_class[c] * size for c, size in zip(known, sizes, strict=True)]
        assert all(abs(value - round(value)) < 1e-9 for value in read)
        counts[kind] = [round(value) for value in read] + [round(found.average * len(rows))]
    sums = [n + b for n, b in zip(counts["natural"], counts["boundary"], strict=True)]
    assert sums == counts["robust"]


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.integers(0, 1), min_size=1, max_size=8), hit=st.sets(st.integers(0, 7)), alone=st.booleans())
def test_errors_agree_with_the_accuracies_of_an_evaluation(labels: list[int], hit: set[int], alone: bool) -> None:
    x = torch.tensor([[0.9 + i / 100, 0.05] for i in range(len(labels))])  # all predicted as class 0
    attacks = {"swap": Swap(tuple(round(0.9 + i / 100, 4) for i in hit)), "nothing": Swap(())}
    more: dict[str, Any] = {"reliability_checks": False, "survivors_only": not alone}
    report = evaluate(lambda v: v, (x, torch.tensor(labels)), threat_model=WIDE, attacks=attacks, **more)
    errors = report.errors
    assert errors.natural.average == pytest.approx(1 - report.clean_accuracy)
    assert errors.robust.average == pytest.approx(1 - report.worst_case_accuracy)
    assert errors.boundary.average == pytest.approx(report.clean_accuracy - report.worst_case_accuracy)
    assert errors.natural.per_class == pytest.approx([1 - a for a in report.per_class_clean], nan_ok=True)
    assert errors.robust.per_class == pytest.approx([1 - a for a in report.per_class_robust], nan_ok=True)
    for error, accuracy in ((errors.natural, report.clean_by_class), (errors.robust, report.robust_by_class)):
        assert error.class_mean == pytest.approx(1 - accuracy.class_mean)
        assert error.worst == pytest.approx(1 - accuracy.worst)
        assert error.worst_class == accuracy.worst_class
        assert error.spread == pytest.approx(accuracy.spread, abs=1e-12)


def test_equal_errors_of_classes_of_other_sizes_name_the_first() -> None:
    """1/3 and 2/6 are one number, because each is a quotient of counts that is rounded once."""
    y = torch.tensor([1] * 6 + [0] * 3)
    predicted = y.clone()
    predicted[[0, 1, 6]] = 2
    errors = class_errors(y, predicted, torch.where(predicted == y, -1, -2), classes=3)
    assert errors.natural.worst_class == 0
    assert errors.natural.worst == 1 / 3
    assert errors.natural.spread == 0


def test_a_report_without_examples_has_no_errors() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    report = dataclasses.replace(three_classes(), labels=none, clean_predictions=none, broken_by=none)
    for summary in report.errors:
        assert all(math.isnan(v) for v in (summary.average, summary.worst, summary.spread, summary.class_mean))
        assert summary.worst_class == -1
        assert len(summary.per_class) == 3


# In JSON and in the terminal ------------------------------------------------------------------------------------------


def test_json_holds_the_six_figures_and_the_spread() -> None:
    report = three_classes()
    told = json.loads(report.to_json())["errors"]
    assert set(told) == {"natural", "boundary", "robust"}
    assert told["boundary"] == {"average": 2 / 6, "worst": 0.5, "worst_class": 0, "spread": 0.25, "per_class": [0.5, None, 0.0]}
    assert told["robust"]["per_class"] == [0.75, None, 0.5]
    changed = dataclasses.replace(report, broken_by=torch.tensor([-1, 1, -1, -2, -1, -2]))
    assert json.loads(changed.to_json())["errors"]["boundary"]["worst"] == 0.25, "read from the tensors"
    assert changed == report, "tensors are not compared"
    assert hash(changed) == hash(report)


def test_the_table_of_errors_fits_and_says_what_the_accuracies_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    three_classes().print()
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    rows = [re.split(r" *[│┃] *", line)[1:-1] for line in shown.splitlines()]
    at = rows.index(["error", "average", "class mean", "worst class", "spread"])
    assert rows[at + 2 : at + 5] == [
        ["natural", "0.333", "0.375", "0.500 (class 2)", "0.125"],
        ["boundary", "0.333", "0.250", "0.500 (class 0)", "0.250"],
        ["robust", "0.667", "0.625", "0.750 (class 0)", "0.125"],
    ]


def test_the_table_has_room_for_a_thousand_classes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    x, y = torch.eye(1000)[-3:], torch.tensor([998, 998, 999])
    evaluate(lambda v: v, (x, y), threat_model=WIDE, attacks={"nothing": Swap(())}, reliability_checks=False).print()
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert any("0.500 (class 998)" in line and line.startswith("│ natural") for line in lines)


# Contradictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"broken_by": [0, 1, -1, -1, -1, -2]},
         "broken_by must be -2 where the clean prediction is wrong, otherwise -1 or the position of an attack, "
         "got a wrong clean prediction and -1 in row 3, the first of 1 such rows; take all tensors from one evaluation"),
        ({"broken_by": [0, 1, -1, 0, -1, 1]}, "got a wrong clean prediction and 0 in row 3, the first of 2 such rows"),
        ({"broken_by": [0, -2, -1, -2, -1, -2]}, "got a right clean prediction and -2 in row 1, the first of 1 such rows"),
        # One error moved from one example to another of its class: no sum changes.
        ({"clean_predictions": [2, 0, 0, 0, 2, 0]}, "got a wrong clean prediction and 0 in row 0, the first of 2 such rows"),
        ({"labels": [0, 0, 0, 2, 2, 2]}, "got a right clean prediction and -2 in row 3"),
        ({"labels": [0, 0, 0, 0, 3, 2]}, "labels must be in [0, 3), the classes of the report, got 0 to 3"),
        ({"labels": [0, 0, -1, 0, 2, 2]}, "labels must be in [0, 3), the classes of the report, got -1 to 2"),
        ({"broken_by": [0, 1, -1]},
         "report must be one label, one clean prediction and one entry of broken_by for each example, got 6 and 6 and 3"),
    ],
)  # fmt: skip
def test_a_report_that_contradicts_itself_is_refused_in_one_sentence(changes: dict[str, list[int]], sentence: str) -> None:
    report = dataclasses.replace(three_classes(), **{name: torch.tensor(values) for name, values in changes.items()})
    for read in (lambda: report.errors, report.to_json, report.print):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            read()
    assert "RobustnessReport(" in repr(report)

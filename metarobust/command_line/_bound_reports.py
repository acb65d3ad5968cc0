"""Reports of ``metarobust evaluate`` beside a bound: what may be compared, and what the comparison says."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metarobust._files import read_json
from metarobust.evaluation._inputs import data_digest

if TYPE_CHECKING:
    from metarobust.bounds import RiskBound
    from metarobust.data import LabelledImages


class ModelReport(NamedTuple):
    """What a bound is compared with: ``risk`` is the robust risk that the attacks found, ``1 - worst_case_accuracy``."""

    name: str
    epsilon: float
    risk: float
    examples: int
    data: str | None
    other_points: bool = False

    def beside(self, points: "LabelledImages") -> "ModelReport":
        """The report, marked if it was measured on other points; one without a digest of its data tells by its number alone."""
        same = self.data in (None, data_digest(points.images, points.labels)) and self.examples == len(points)
        return self._replace(other_points=not same)

    def bound(self, bounds: Sequence["RiskBound"]) -> "RiskBound | None":
        """The best lower end that holds at the report's epsilon: the optimal risk grows with the radius."""
        below = [] if self.other_points else [b for b in bounds if b.epsilon <= self.epsilon * (1 + 1e-9)]
        return max(below, key=lambda bound: (bound.lower, bound.epsilon), default=None)


def read_reports(text: str | None, norm: str) -> list[ModelReport]:
    """The reports named in ``--reports``; one sentence for a file that is none, or that no bound in this norm applies to.

    Whether they were measured on the bound's points, `ModelReport.beside` tells.
    """
    paths = [Path(part.strip()) for part in (text or "").split(",") if part.strip()]
    stems = [path.stem for path in paths]
    return [
        _read(path, path.stem if stems.count(path.stem) == 1 else str(path.with_suffix("")), norm)
        for path in dict.fromkeys(paths)
    ]


def _read(path: Path, name: str, norm: str) -> ModelReport:
    if not path.is_file():
        raise FileNotFoundError(f"--reports must name files that exist, got {path}")
    try:
        content = read_json(path)
        settings, of = content["settings"], str(content["settings"]["norm"])
        epsilon, lower, upper = (float(settings[key]) for key in ("epsilon", "lower", "upper"))
        risk, examples = 1 - float(content["worst_case_accuracy"]), int(content["examples"])
        report = ModelReport(name, epsilon, risk, examples, settings.get("data"))
        if not (
            of in ("linf", "l2", "l1") and 0 <= epsilon < math.inf and 0 <= risk <= 1 and examples > 0
        ):  # NaN is none of these
            raise ValueError("values that no report has")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        expected = "reports that metarobust evaluate --json wrote"
        raise ValueError(f"--reports must be {expected}, got {path}, which is none") from error
    if of != norm:
        raise ValueError(f"--reports must be of the bound's norm, {norm}, got {path}, which is of {of}; pass --norm {of}")
    if (lower, upper) != (0, 1):
        got = f"{path} with the box [{lower:g}, {upper:g}]"
        raise ValueError(
            f"--reports must be of inputs in [0, 1], as the bound's points are, got {got}; its epsilon has other units"
        )
    return report


def doubts(reports: Sequence[ModelReport], bounds: Sequence["RiskBound"]) -> list[str]:
    """What does not fit together, one sentence each."""
    found = []
    for report in reports:
        bound = report.bound(bounds)
        if report.other_points:
            there = f"on {report.examples} examples, the bound is for {bounds[0].examples} points"
            if report.examples == bounds[0].examples:
                there = "on other examples than the bound's points"
            found.append(f"{report.name} was measured {there}: they say nothing about each other")
        elif bound is not None and report.risk < bound.lower - 1e-6:
            found.append(
                f"{report.name} has a measured robust risk of {report.risk:.4f} at epsilon {report.epsilon:g}, below the "
                f"{bound.lower:.4f} of every classifier on these points: its attacks missed examples, or its points are others"
            )
    return found


def rows(reports: Sequence[ModelReport], bounds: Sequence["RiskBound"]) -> list[dict[str, Any]]:
    """For JSON: each report with the lower bound that holds at its epsilon, and the difference."""
    found = []
    for report in reports:
        bound = report.bound(bounds)
        lower, at = (None, None) if bound is None else (bound.lower, bound.epsilon)
        difference = None if lower is None else report.risk - lower
        found.append(report._asdict() | {"lower_bound": lower, "lower_bound_at": at, "difference": difference})
    return found

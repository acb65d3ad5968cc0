"""What an evaluation found, as a value that prints, serialises, draws and explains itself."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from metarobust._files import json_text, write_atomically
from metarobust.evaluation._distance import DistanceToBound, distance_to_bound
from metarobust.evaluation._fairness import ClassErrors, ClassSummary, class_errors, class_summary
from metarobust.evaluation._reliability import Doubt
from metarobust.evaluation._robustbench import robustbench_entry


@dataclass(frozen=True, kw_only=True, eq=False)
class RobustnessReport:
    """Accuracies of one model on one data set, as fractions.

    Two reports are equal when all but their seconds and their per-example tensors agree.

    Attributes:
        clean_accuracy: fraction of examples classified correctly.
        robust_accuracy: for each attack, in order, the fraction still correct after it and every attack before it (each attack
            runs on the survivors of those before; with ``survivors_only=False``, after this attack alone).
        worst_case_accuracy: fraction correct under every attack.
        worst_case_interval: 95 % Wilson interval of ``worst_case_accuracy`` over the examples.
        per_class_clean: clean accuracy of each class (NaN for a class without examples).
        per_class_robust: worst-case accuracy of each class.
        examples: number of examples.
        attacked: for each attack, the number of examples that it ran on.
        broken: for each attack, how many of these it broke.
        epsilon_curve: pairs (radius in input units, accuracy under a short attack on at most 100 examples), up to the radius
            that covers the box: a check of the attacks, not a result to quote.
        threat_model: repr of the threat model.
        attacks: repr of each attack.
        settings: every argument of the evaluation; device, dtype and threads that it ran with; ``data``, a digest of examples and
            labels (none in reports of earlier versions).
        seconds: wall time of each stage.
        warnings: reasons to doubt the numbers, each with a remedy.
        versions: of the libraries that computed them.
        distance_to_bound: the measured robust risk beside the best possible one on the same points, if
            `with_distance_to_bound` was asked for it.
        inputs: the clean examples ``[n, ...]``. This and the following tensors are on the CPU, in the order of the data, and
            stand neither in the JSON nor in the repr.
        labels: int64 ``[n]``.
        clean_predictions: int64 ``[n]``.
        adversarial_examples: ``[n, ...]``; the clean example where nothing broke it.
        adversarial_predictions: int64 ``[n]``, for ``adversarial_examples``.
        broken_by: int64 ``[n]``, position of the first attack that broke the example; -1 where none did, -2 where the clean
            prediction is wrong already.
    """

    clean_accuracy: float
    robust_accuracy: dict[str, float]
    worst_case_accuracy: float
    worst_case_interval: tuple[float, float]
    per_class_clean: tuple[float, ...]
    per_class_robust: tuple[float, ...]
    examples: int
    attacked: dict[str, int]
    broken: dict[str, int]
    epsilon_curve: tuple[tuple[float, float], ...]
    threat_model: str
    attacks: dict[str, str]
    settings: dict[str, Any]
    seconds: dict[str, float]
    warnings: tuple[Doubt, ...]
    versions: dict[str, str]
    distance_to_bound: DistanceToBound | None = None
    inputs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    clean_predictions: Tensor = field(repr=False)
    adversarial_examples: Tensor = field(repr=False)
    adversarial_predictions: Tensor = field(repr=False)
    broken_by: Tensor = field(repr=False)

    @property
    def clean_by_class(self) -> ClassSummary:
        """Average, worst and spread of the clean accuracy over classes."""
        return class_summary(self.per_class_clean)

    @property
    def robust_by_class(self) -> ClassSummary:
        """Average, worst and spread of the worst-case accuracy over classes."""
        return class_summary(self.per_class_robust)

    @property
    def errors(self) -> ClassErrors:
        """Natural, boundary and robust error: average, worst class, spread over classes, each class.

        Raises:
            ValueError: ``labels``, ``clean_predictions`` and ``broken_by`` contradict each other.
        """
        return class_errors(self.labels, self.clean_predictions, self.broken_by, classes=len(self.per_class_clean))

    def with_distance_to_bound(self, *, order: int | str = "auto") -> "RobustnessReport":
        """The same report, and in it how far the model is from the best that any classifier can do on these points.

        Computes `metarobust.bounds.adversarial_risk_bound` on the report's own points, norm and epsilon. The measured risk errs
        below the model's true one, so that with an exact bound the difference is a lower bound of the true distance; see
        `DistanceToBound`. The bound is for these points alone, the empirical distribution: on few points it may be 0, although
        no practical classifier gets there.

        Args:
            order: the largest sets of points that count: 2, 3, ..., or ``"auto"``, until the bound is certified.

        Raises:
            ValueError: the report is for l1, or more than 50 million pairs of points conflict.

        Example:
            >>> from metarobust.evaluation import evaluate
            >>> from metarobust.threat_models import ThreatModel
            >>> x, y = torch.tensor([[0.3], [0.45], [0.9]]), torch.tensor([0, 1, 1])
            >>> model = lambda x: torch.cat([0.76 - x, x], 1)
            >>> report = evaluate(model, (x, y), threat_model=ThreatModel(epsilon=0.1), protocol="quick")
            >>> distance = report.with_distance_to_bound().distance_to_bound
            >>> round(distance.risk, 4), round(distance.lower, 4), round(distance.difference, 4)
            (0.6667, 0.3333, 0.3333)
        """
        risk = 1 - self.worst_case_accuracy
        distance = distance_to_bound(self.inputs, self.labels, risk, self.settings, order=order)
        return dataclasses.replace(self, distance_to_bound=distance)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text; written to ``path`` too, atomically, when one is given. NaN becomes null."""
        text = json_text(self._plain() | {"errors": _plain(self.errors.as_dict())})
        if path is not None:
            write_atomically(Path(path), lambda temporary: temporary.write_text(text))
        return text

    def to_robustbench(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        name: str,
        dataset: str,
        architecture: str,
        link: str = "",
        authors: str = "",
        venue: str = "Unpublished",
        additional_data: bool = False,
        number_forward_passes: int = 1,
        footnote: str = "",
        autoattack_accuracy: float | None = None,
    ) -> dict[str, Any]:
        """The report in the fields of RobustBench's model_info files; written to ``path`` too, atomically, when one is given.

        ``clean_acc`` and ``reported`` are percentages with two decimals. ``autoattack_acc`` is null unless it is given: this
        library's protocols are not AutoAttack, and the footnote says what ran. RobustBench ranks by that field and cannot read
        an entry without it. ``unreliable`` is true where the report has warnings.

        Args:
            path: a JSON file.
            name: of the paper or method.
            dataset: as RobustBench writes it, "cifar10".
            architecture: as "WideResNet-28-10".
            link: to the paper.
            authors: with commas between.
            venue: as "ICML 2023".
            additional_data: whether it was trained on more than the data set.
            number_forward_passes: of one prediction.
            footnote: added to the one about the attacks.
            autoattack_accuracy: accuracy under AutoAttack, a fraction, where that was run
                (docs/how-to/interoperate.md).

        Raises:
            ValueError: the report is for l1, a required field is empty, or an accuracy is no fraction.

        Example:
            >>> from metarobust.evaluation import evaluate
            >>> from metarobust.threat_models import ThreatModel
            >>> x, y = torch.tensor([[0.3], [0.45], [0.9]]), torch.tensor([0, 1, 1])
            >>> model = lambda x: torch.cat([0.76 - x, x], 1)
            >>> report = evaluate(model, (x, y), threat_model=ThreatModel(epsilon=8 / 255), protocol="quick")
            >>> entry = report.to_robustbench(name="A threshold", dataset="three points", architecture="one neuron")
            >>> entry["eps"], entry["clean_acc"], entry["reported"]
            ('8/255', '100.00', '100.00')
        """
        entry = robustbench_entry(
            self, name=name, dataset=dataset, architecture=architecture, link=link, authors=authors, venue=venue,
            additional_data=additional_data, number_forward_passes=number_forward_passes, footnote=footnote,
            autoattack_accuracy=autoattack_accuracy,
        )  # fmt: skip
        if path is not None:
            text = json_text(entry)
            write_atomically(Path(path), lambda temporary: temporary.write_text(text))
        return entry

    def print(self) -> None:
        """Show the report as a table."""
        from metarobust.evaluation._table import print_report

        print_report(self)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write one figure: accuracy against epsilon and, for images, the most perturbed examples.

        Args:
            path: a file that ends in ``.png``, ``.pdf``, ``.svg`` or another format of matplotlib; written atomically.
        """
        from metarobust.evaluation._figures import draw_report

        return draw_report(self, Path(path))

    def __eq__(self, other: object) -> bool:
        return self._compared() == other._compared() if isinstance(other, RobustnessReport) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> str:
        return json.dumps({name: value for name, value in self._plain().items() if name != "seconds"})

    def _plain(self) -> dict[str, Any]:
        named = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        content = {name: _plain(value) for name, value in named if not isinstance(value, Tensor)}
        content["clean_by_class"] = _plain(self.clean_by_class._asdict())
        content["robust_by_class"] = _plain(self.robust_by_class._asdict())
        return content


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion that stays inside [0, 1] and behaves at its ends (Wilson, 1927).

    Example:
        >>> [round(v, 3) for v in wilson_interval(0, 10)]
        [0.0, 0.278]
    """
    if trials == 0:
        return (0.0, 1.0)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return (max(0.0, centre - half), min(1.0, centre + half))


def _plain(value: Any) -> Any:
    """Lists, dictionaries, text, numbers and None only."""
    if isinstance(value, Doubt):
        return {"check": value.check, "reason": value.reason, "remedy": value.remedy}
    if isinstance(value, DistanceToBound):
        return value.as_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return value

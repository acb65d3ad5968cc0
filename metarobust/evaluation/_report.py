"""What an evaluation found, as a value that prints, serialises and explains itself."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from metarobust._files import write_atomically


@dataclass(frozen=True, kw_only=True)
class RobustnessReport:
    """Accuracies of one model on one data set, as fractions.

    Attributes:
        clean_accuracy: fraction of examples classified correctly.
        robust_accuracy: for each attack, in order, the fraction still correct after it and every attack before it (each attack
            runs on the survivors of those before; with ``survivors_only=False``, after this attack alone).
        worst_case_accuracy: fraction correct under every attack.
        worst_case_interval: 95 % Wilson interval of ``worst_case_accuracy`` over the examples.
        per_class_clean: clean accuracy of each class (NaN for a class without examples).
        per_class_robust: worst-case accuracy of each class.
        examples: number of examples.
        threat_model: repr of the threat model.
        attacks: repr of each attack.
        seconds: wall time of each stage.
        warnings: reasons to doubt the numbers, each with a remedy.
        versions: of the libraries that computed them.
    """

    clean_accuracy: float
    robust_accuracy: dict[str, float]
    worst_case_accuracy: float
    worst_case_interval: tuple[float, float]
    per_class_clean: tuple[float, ...]
    per_class_robust: tuple[float, ...]
    examples: int
    threat_model: str
    attacks: dict[str, str]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    versions: dict[str, str]

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text; written to ``path`` too, atomically, when one is given. NaN becomes null."""
        fields = {k: _without_nan(v) for k, v in asdict(self).items()}
        text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
        if path is not None:
            write_atomically(Path(path), lambda temporary: temporary.write_text(text))
        return text

    def print(self) -> None:
        """Show the report as a table."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        table = Table(title=f"{self.examples} examples, {self.threat_model}", title_justify="left")
        table.add_column("stage")
        table.add_column("accuracy", justify="right")
        table.add_column("seconds", justify="right")
        table.add_row("clean", f"{self.clean_accuracy:.3f}", f"{self.seconds['clean']:.1f}")
        for name, accuracy in self.robust_accuracy.items():
            table.add_row(name, f"{accuracy:.3f}", f"{self.seconds[name]:.1f}")
        low, high = self.worst_case_interval
        table.add_section()
        table.add_row("worst case", f"{self.worst_case_accuracy:.3f}", f"95 %: {low:.3f} to {high:.3f}")
        console.print(table)
        for warning in self.warnings:
            console.print(f"warning: {warning}", style="yellow", highlight=False)


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


def _without_nan(value: object) -> object:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, tuple):
        return [_without_nan(v) for v in value]
    return value

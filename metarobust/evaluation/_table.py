"""A report in the terminal, readable at 80 columns."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from metarobust.evaluation._report import RobustnessReport


def print_report(report: "RobustnessReport") -> None:
    """One table of stages, then the figures to quote, then the errors, then each doubt with its remedy."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    settings = report.settings
    # Text objects throughout: names and reasons may hold brackets, which rich would read as markup.
    console.print(Text(f"{report.examples} examples, {threat_model_text(report)}", "bold"))
    run = f"{settings['protocol'] or 'own attacks'}, seed {settings['seed']}, {settings['dtype']} on {settings['device']}"
    console.print(Text(f"protocol {run}" if settings["protocol"] else run))

    table = Table()
    for column in ("stage", "ran on", "broken", "accuracy", "seconds"):
        table.add_column(column, justify="left" if column == "stage" else "right", overflow="fold")
    wrong = report.examples - round(report.clean_accuracy * report.examples)
    _add_row(table, "clean", report.examples, wrong, report.clean_accuracy, report.seconds["clean"])
    for name, accuracy in report.robust_accuracy.items():
        _add_row(table, name, report.attacked[name], report.broken[name], accuracy, report.seconds[name])
    checks = {name: value for name, value in report.seconds.items() if name != "clean" and name not in report.attacks}
    if settings["checked_examples"]:
        for name, seconds in checks.items():
            table.add_row(Text(name), "", "", "", f"{seconds:.1f}")
    table.add_section()
    lost = report.examples - round(report.worst_case_accuracy * report.examples)
    _add_row(table, "worst case", report.examples, lost, report.worst_case_accuracy, sum(report.seconds.values()))
    console.print(table)

    low, high = report.worst_case_interval
    console.print(Text(f"worst case {report.worst_case_accuracy:.3f}, 95 % interval {low:.3f} to {high:.3f}", "bold"))
    if report.distance_to_bound is not None:
        console.print(Text(report.distance_to_bound.sentence()))
    console.print(_errors_table(report))
    if not settings["checked_examples"]:
        console.print(Text("reliability checks were left out", "yellow"))
    for doubt in report.warnings:
        console.print(Text.assemble(("warning", "yellow"), f": docs/trust.md#{doubt.check}"))
        for line in (doubt.reason, f"remedy: {doubt.remedy}"):
            console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


def threat_model_text(report: "RobustnessReport") -> str:
    """Ball and box as a reader writes them: ``l_inf, epsilon 0.1, box [0, 1]``."""
    settings = report.settings
    norm, epsilon = settings["norm"], _epsilon_text(settings["norm"], settings["epsilon"])
    return f"{norm.replace('l', 'l_', 1)}, epsilon {epsilon}, box [{settings['lower']:g}, {settings['upper']:g}]"


def _epsilon_text(norm: str, epsilon: float) -> str:
    """``0.1``, or in l_inf ``8/255`` where only the fraction is short."""
    levels = round(255 * epsilon)
    is_fraction = norm == "linf" and abs(255 * epsilon - levels) < 1e-9 and float(f"{epsilon:.4g}") != epsilon
    return f"{levels}/255" if is_fraction else f"{epsilon:.4g}"


def _add_row(table: "Table", stage: str, ran_on: int, broken: int, accuracy: float, seconds: float) -> None:
    from rich.text import Text

    table.add_row(Text(stage), str(ran_on), str(broken), f"{accuracy:.3f}", f"{seconds:.1f}")


def _errors_table(report: "RobustnessReport") -> "Table":
    """Natural, boundary and robust error: of the examples, and over the classes."""
    from rich.table import Table

    table = Table()
    for column in ("error", "average", "class mean", "worst class", "spread"):
        table.add_column(column, justify="left" if column == "error" else "right")
    for kind, error in report.errors._asdict().items():
        worst = f"{error.worst:.3f} (class {error.worst_class})"
        table.add_row(kind, f"{error.average:.3f}", f"{error.class_mean:.3f}", worst, f"{error.spread:.3f}")
    return table

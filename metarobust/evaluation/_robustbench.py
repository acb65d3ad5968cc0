"""A report in the fields of a RobustBench entry."""

from typing import TYPE_CHECKING, Any

from metarobust._checks import finite, integer, require

if TYPE_CHECKING:
    from metarobust.evaluation._report import RobustnessReport


def robustbench_entry(
    report: "RobustnessReport",
    *,
    name: str,
    dataset: str,
    architecture: str,
    link: str,
    authors: str,
    venue: str,
    additional_data: bool,
    number_forward_passes: int,
    footnote: str,
    autoattack_accuracy: float | None,
) -> dict[str, Any]:
    """See :meth:`RobustnessReport.to_robustbench`."""
    norm = report.settings["norm"]
    require(norm in ("linf", "l2"), "report", "for l_inf or l2, which RobustBench lists", norm)
    integer("number_forward_passes", number_forward_passes, least=1)
    told = {"name": name, "dataset": dataset, "architecture": architecture}
    for field, value in told.items():
        require(bool(value), field, "not empty", repr(value))
    if autoattack_accuracy is not None:
        remedy = "write it as a fraction, 0.5371 for 53.71 %"
        finite("autoattack_accuracy", autoattack_accuracy, least=0.0)
        require(autoattack_accuracy <= 1, "autoattack_accuracy", "at most 1", autoattack_accuracy, remedy)
    attacks = ", ".join(report.attacks)
    notes = [f"Worst case of {attacks} on {report.examples} examples, by metarobust {report.versions.get('metarobust', '')}."]
    notes += ["AutoAttack was not run."] if autoattack_accuracy is None else []
    notes += [footnote] if footnote else []
    return {
        "link": link,
        "name": name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": radius(report.settings["epsilon"]),
        "clean_acc": f"{100 * report.clean_accuracy:.2f}",
        "reported": f"{100 * report.worst_case_accuracy:.2f}",
        "autoattack_acc": None if autoattack_accuracy is None else f"{100 * autoattack_accuracy:.2f}",
        "footnote": " ".join(notes),
        "unreliable": bool(report.warnings),
    }


def radius(epsilon: float) -> str:
    """As the leaderboard writes it: in 255ths where it is a whole number of them and no short decimal, otherwise a decimal.

    Example:
        >>> radius(8 / 255), radius(0.5), radius(128 / 255)
        ('8/255', '0.5', '128/255')
    """
    steps = epsilon * 255
    if abs(steps - round(steps)) < 1e-6 and abs(1000 * epsilon - round(1000 * epsilon)) > 1e-6:
        return f"{round(steps)}/255"
    return f"{epsilon:.6g}"

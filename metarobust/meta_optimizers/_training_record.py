"""What a meta-optimizer remembers of the threat models it was trained with."""

from typing import Any

from metarobust.threat_models import ThreatModel


def widened(trained: dict[str, Any] | None, by: ThreatModel | None) -> dict[str, Any] | None:
    """Norm, box, lowest and highest epsilon so far; norm and box are None once they differ between tasks."""
    if by is None:
        return trained
    norm, box = by.norm, [by.lower, by.upper]
    if trained is None:
        return {"norm": norm, "epsilon": [by.epsilon, by.epsilon], "box": box}
    low, high = trained["epsilon"]
    return {
        "norm": norm if trained["norm"] == norm else None,
        "epsilon": [min(low, by.epsilon), max(high, by.epsilon)],
        "box": box if trained["box"] == box else None,
    }


def covers(trained: dict[str, Any], used: ThreatModel) -> bool:
    """Whether a threat model lies in the range of the training, up to a factor of 1.5 in epsilon."""
    low, high = trained["epsilon"]
    norm, box = trained["norm"] or used.norm, trained["box"] or [used.lower, used.upper]
    return norm == used.norm and box == [used.lower, used.upper] and low / 1.5 <= used.epsilon <= 1.5 * high

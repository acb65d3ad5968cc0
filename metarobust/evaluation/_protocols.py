"""Named sets of attacks, from a glance to a judgement."""

from metarobust._checks import choice
from metarobust.attacks import PGD
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack

PROTOCOLS = ("quick", "standard", "strong")


def protocol_attacks(protocol: str, threat_model: ThreatModel) -> dict[str, Attack]:
    """The attacks of a protocol, in the order in which they run.

    ``quick``: PGD-20 on cross-entropy. ``standard``: PGD-40 on cross-entropy, then on the margin. ``strong``: PGD-100 with 3
    restarts on each.
    """
    choice("protocol", protocol, PROTOCOLS)
    if protocol == "quick":
        return {"pgd-20": PGD(threat_model=threat_model, steps=20)}
    steps, restarts = (40, 1) if protocol == "standard" else (100, 3)
    suffix = f"-{steps}" + (f"x{restarts}" if restarts > 1 else "")
    return {
        f"pgd{suffix}": PGD(threat_model=threat_model, steps=steps, restarts=restarts),
        f"margin-pgd{suffix}": PGD(threat_model=threat_model, steps=steps, restarts=restarts, loss="margin"),
    }

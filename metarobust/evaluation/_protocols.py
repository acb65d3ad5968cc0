"""Named sets of attacks, from a glance to a judgement."""

from metarobust._checks import choice
from metarobust.attacks import APGD, BETA, Alternating, Square
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack

PROTOCOLS = ("quick", "standard", "strong")


def protocol_attacks(protocol: str, threat_model: ThreatModel, classes: int = 10) -> dict[str, Attack]:
    """The attacks of a protocol, in the order in which they run, each on the survivors of those before.

    - ``quick``: APGD-20 on the margin.
    - ``standard``: APGD-50 on cross-entropy; `Alternating` (BETA on every class, then rounds of random search and BETA on the
      examples that came closest); Square with 300 queries on every survivor, as the check without gradients.
    - ``strong``: APGD-100 with 5 restarts on cross-entropy; BETA-100 on every class; APGD-100 on the targeted DLR loss of 9
      classes (needs 4 classes); `Alternating` with more of everything, on half of the survivors; Square with 5,000 queries.

    Square is left out for l1, where it is not defined.

    Args:
        protocol: ``"quick"``, ``"standard"`` or ``"strong"``.
        threat_model: ball and box, in input units.
        classes: of the model; the targeted attacks ask for 4.
    """
    choice("protocol", protocol, PROTOCOLS)
    if protocol == "quick":
        return {"apgd-margin-20": APGD(threat_model=threat_model, steps=20, loss="margin", survivors_only=True)}
    free = threat_model.norm != "l1"
    if protocol == "standard":
        attacks: dict[str, Attack] = {
            "apgd-ce-50": APGD(threat_model=threat_model, steps=50, survivors_only=True),
            "alternating": Alternating(threat_model=threat_model),
        }
        return attacks | ({"square-300": Square(threat_model=threat_model, queries=300)} if free else {})
    attacks = {
        "apgd-ce-100x5": APGD(threat_model=threat_model, steps=100, restarts=5, survivors_only=True),
        "beta-100": BETA(threat_model=threat_model, steps=100, step_rule="apgd", survivors_only=True),
    }
    if classes >= 4:
        attacks["apgd-dlr-100t9"] = APGD(threat_model=threat_model, steps=100, loss="dlr", targets=9, survivors_only=True)
    attacks["alternating-strong"] = Alternating(threat_model=threat_model, steps=100, rounds=6, queries=2000, closest=0.5)
    return attacks | ({"square-5000": Square(threat_model=threat_model, queries=5000)} if free else {})

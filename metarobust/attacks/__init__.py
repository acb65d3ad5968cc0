"""Transport: how examples are moved inside a threat model, against the model (adversary) or for it (anti-adversary)."""

from metarobust.attacks._apgd import APGD
from metarobust.attacks._beta import BETA
from metarobust.attacks._counting import CallCounter, count_calls
from metarobust.attacks._gradient import FGSM, PGD

__all__ = ["APGD", "BETA", "FGSM", "PGD", "CallCounter", "count_calls"]

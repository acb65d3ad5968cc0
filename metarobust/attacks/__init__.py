"""Transport: how examples are moved inside a threat model, against the model (adversary) or for it (anti-adversary)."""

from metarobust.attacks._adapted import Adapted
from metarobust.attacks._alternating import Alternating
from metarobust.attacks._apgd import APGD
from metarobust.attacks._beta import BETA
from metarobust.attacks._counting import CallCounter, count_calls
from metarobust.attacks._gradient import FGSM, PGD
from metarobust.attacks._insertion import RandomRoundingFGSM
from metarobust.attacks._square import Square
from metarobust.attacks._transport import TransportAscent, TransportSearch
from metarobust.attacks._unrolled import Unrolled
from metarobust.attacks._worst_case import WorstCase

__all__ = [
    "APGD",
    "BETA",
    "FGSM",
    "PGD",
    "Adapted",
    "Alternating",
    "CallCounter",
    "RandomRoundingFGSM",
    "Square",
    "TransportAscent",
    "TransportSearch",
    "Unrolled",
    "WorstCase",
    "count_calls",
]

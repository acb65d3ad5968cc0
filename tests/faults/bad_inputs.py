"""What a row of the table of bad inputs is, and the small good things that rows spoil."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarobust.attacks import FGSM, PGD
from metarobust.data import LabelledImages
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel


class BadInput(NamedTuple):
    """A call that must be refused, and how.

    Attributes:
        of: the public name that is called, as ``"attacks.PGD"``.
        case: what is wrong with the call, in a few words.
        call: makes the call.
        error: the exact type of the exception.
        sentence: its exact text; ``...`` stands for what differs between machines and runs (paths, addresses, versions).
    """

    of: str
    case: str
    call: Callable[[], object]
    error: type[Exception]
    sentence: str


BALL = ThreatModel(norm="linf", epsilon=0.1)
ROUND = ThreatModel(norm="l2", epsilon=0.5)
DIAMOND = ThreatModel(norm="l1", epsilon=1.0)
ATTACK = FGSM(threat_model=BALL)
X = torch.linspace(0, 1, 24).reshape(6, 4)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
BYTES = (255 * X).to(torch.uint8)
PIXELS = 255 * X
WITH_NAN = X.clone()
WITH_NAN[2, 1] = torch.nan
NORMALISED = 4 * X - 2
"""As a model sees pixels behind a Normalize layer: no longer in [0, 1]."""
NOWHERE = torch.empty(6, 4, device="meta")
"""A tensor on another device than the model, on a machine with one device."""
LOGITS = torch.arange(18.0).reshape(6, 3)


def network() -> nn.Sequential:
    """A small classifier of X into three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mlp([4, 5, 3]).eval()


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(seed)


def pgd() -> PGD:
    """An attack of two steps."""
    return PGD(threat_model=BALL, steps=2)


def labelled(n: int = 30) -> LabelledImages:
    """Images of 8 x 8 pixels in three classes of equal size."""
    images = torch.rand(n, 1, 8, 8, generator=generator())
    return LabelledImages(images, torch.arange(n) % 3, num_classes=3)


def constant(x: Tensor) -> Tensor:
    """Logits that do not depend on x."""
    return torch.zeros(len(x), 3)

"""What every training benchmark judges its networks by, where the standard protocol would take longer than the training."""

from collections.abc import Sequence

import torch
from torch import nn

from metarobust.attacks import PGD
from metarobust.data import LabelledImages
from metarobust.threat_models import ThreatModel

LOSSES = ("cross_entropy", "margin")


def clean_and_robust(
    model: nn.Module, data: LabelledImages, threat_model: ThreatModel, *, steps: int, losses: Sequence[str] = LOSSES
) -> tuple[float, float]:
    """Clean accuracy, and accuracy under PGD on each of the losses, worst of them; the same noise for every model."""
    x, y = data.images, data.labels
    with torch.no_grad():
        clean = model(x).argmax(1) == y
    robust = clean.clone()
    for loss in losses:
        attack = PGD(threat_model=threat_model, steps=steps, loss=loss)
        moved = attack(model, x, y, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            robust &= model(moved).argmax(1) == y
    return clean.double().mean().item(), robust.double().mean().item()

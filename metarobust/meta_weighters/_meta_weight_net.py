"""Meta-Weight-Net: one weight per example, learned from its loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metarobust._checks import message
from metarobust.attacks import PGD
from metarobust.data import LabelledImages
from metarobust.meta_weighters._caat import CAAT
from metarobust.meta_weighters._network import WeightingNetwork
from metarobust.objectives import AdversarialTraining
from metarobust.threat_models import ThreatModel
from metarobust.types import RobustLoss


class MetaWeightNet(CAAT):
    r"""Meta-Weight-Net on a robust loss: :math:`w(\ell_i)\, \ell_i` (Shu et al., 2019, arXiv 1902.07379).

    `CAAT` with one branch, whose weight in (0, 1) a network with one hidden layer reads from the loss itself, and a meta-step in
    every call. The learning rates of networks and the other settings are those of the published code; there the losses are
    natural, and the virtual step is one of plain SGD, here one of ``optimizer``.

    Args:
        threat_model, meta_data, optimizer, class_counts, robust_loss: see `CAAT`.
        learning_rate: of AdamW on the network.
        meta_every: calls from one meta-step to the next; None for no meta-step.
        settings: further settings of `CAAT`, as ``meta_batch_size``, but for ``routing`` and ``reads_loss``: the network always
            reads the loss, and its weight is used as it is.

    Raises:
        TypeError: ``routing`` or ``reads_loss``, or what `CAAT` refuses.
        ValueError: see `CAAT`.

    Example:
        >>> from metarobust.threat_models import ThreatModel
        >>> model = torch.nn.Linear(4, 3)
        >>> objective = MetaWeightNet(
        ...     threat_model=ThreatModel(epsilon=0.1),
        ...     meta_data=(torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])),
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     class_counts=[20, 20, 5],
        ... )
        >>> objective(model, torch.rand(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])).shape
        torch.Size([8])
    """

    def __init__(
        self,
        *,
        threat_model: ThreatModel,
        meta_data: tuple[Tensor, Tensor] | LabelledImages,
        optimizer: torch.optim.Optimizer,
        class_counts: Sequence[int] | Tensor,
        robust_loss: RobustLoss | None = None,
        learning_rate: float = 1e-3,
        meta_every: int | None = 1,
        **settings: Any,
    ) -> None:
        for name, fixed in (("routing", "soft"), ("reads_loss", True)):
            if name in settings:
                expected = f"left out, since MetaWeightNet has {fixed!r}"
                raise TypeError(message(name, expected, repr(settings[name]), "CAAT takes others"))
        network = settings.pop("network", None) or WeightingNetwork(branches=("adversary",), inputs=1, favoured=0.5)
        if robust_loss is None:
            robust_loss = AdversarialTraining(attack=PGD(threat_model=threat_model))
        super().__init__(
            threat_model=threat_model,
            meta_data=meta_data,
            optimizer=optimizer,
            class_counts=class_counts,
            network=network,
            robust_loss=robust_loss,
            routing="soft",
            reads_loss=True,
            learning_rate=learning_rate,
            meta_every=meta_every,
            **settings,
        )

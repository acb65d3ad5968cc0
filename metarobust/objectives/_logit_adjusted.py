"""A robust loss of logits that carry the class frequencies: the fixed form of a learned balance between classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metarobust import _checks
from metarobust._checks import finite, require
from metarobust.objectives._armor import ARMOR
from metarobust.objectives._class_weighted import checked_counts
from metarobust.objectives._common import check_robust_loss
from metarobust.types import Model, RobustLoss


@dataclass(frozen=True, kw_only=True)
class LogitAdjusted:
    r"""The robust loss of the model with logits :math:`f(x)_c + \tau \log \pi_c`, where :math:`\pi_c = n_c / n`.

    For the cross-entropy at x this is the logit-adjusted softmax cross-entropy of Menon et al. (2021), "Long-tail learning via
    logit adjustment", arXiv 2007.07314, eq. 10. The offsets are for training: the adjusted logits learn the posterior of the
    data, and at temperature 1 f itself learns that of the same data with equally frequent classes. So evaluate, and use, the
    plain model. The paper is about clean inputs; here attack and loss both see the adjusted logits.

    With equal counts nothing changes but rounding; at temperature 0, nothing. The attack leaves mode and BatchNorm statistics of
    the model as they are; the passes of the loss move them, as they do without the adjustment. Logits in half precision are
    adjusted in float32.

    Around `ARMOR` the natural loss is adjusted too, and a transport cost is possible. Inside it, the natural loss is that of the
    plain model; a transport cost is refused, because it asks for a loss that charges a given point; and a `UDR` in here keeps its
    own multiplier.

    Args:
        robust_loss: `AdversarialTraining`, `TRADES`, `MART`, `UDR`, `BETATraining`, any other robust loss, or `ARMOR`.
        class_counts: examples of each class in the training data, at least 1 each, in the order of the logits:
            ``y.bincount().tolist()``.
        temperature: tau, at least 0.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the attack's noise.

    Raises:
        TypeError: a robust loss that cannot be called, counts that are no tuple of integers.
        ValueError: a class without examples, a negative temperature; on a call, a model with another number of classes.

    Example:
        >>> from metarobust.attacks import FGSM
        >>> from metarobust.objectives import AdversarialTraining
        >>> from metarobust.threat_models import ThreatModel
        >>> robust_loss = AdversarialTraining(attack=FGSM(threat_model=ThreatModel(norm="linf", epsilon=0.1)))
        >>> objective = LogitAdjusted(robust_loss=robust_loss, class_counts=(90, 10))
        >>> objective(lambda x: 0 * x, torch.rand(2, 2), torch.tensor([0, 1]))  # -log 0.9 and -log 0.1
        tensor([0.1054, 2.3026])
    """

    robust_loss: RobustLoss | ARMOR
    class_counts: Sequence[int]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_robust_loss(self.robust_loss)
        object.__setattr__(self, "class_counts", checked_counts(self.class_counts))
        finite("temperature", self.temperature, least=0.0)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Any:
        """Return what the robust loss returns: one loss per example, ``[batch]``, or the result of `ARMOR`."""
        _checks.model(model)
        n = sum(self.class_counts)
        offsets = [self.temperature * math.log(count / n) for count in self.class_counts]
        dtype = torch.promote_types(x.dtype, torch.float32)
        adjusted = _Adjusted(model, torch.tensor(offsets, dtype=dtype, device=x.device))
        # A module only around a module: attacks keep the buffers of modules, and read their mode.
        return self.robust_loss(adjusted if isinstance(model, nn.Module) else adjusted.forward, x, y, generator=generator)


class _Adjusted(nn.Module):
    """The model with an offset on each logit, in the mode that the model is in."""

    def __init__(self, model: Model, offsets: Tensor) -> None:
        super().__init__()
        self.model, self.offsets = model, offsets
        self.training = isinstance(model, nn.Module) and model.training

    def forward(self, x: Tensor) -> Tensor:
        logits = _checks.logits(self.model(x), examples=len(x))
        expected = f"one for each of the {logits.shape[1]} classes that the model has logits for"
        require(logits.shape[1] == len(self.offsets), "class_counts", expected, len(self.offsets))
        return logits + self.offsets

"""Auto-PGD: gradient ascent that sets its own step sizes."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metarobust._checks import integer, message, require
from metarobust.attacks._common import checked, checked_start
from metarobust.attacks._counting import record_call
from metarobust.attacks._search import Search
from metarobust.attacks._targets import TargetSet
from metarobust.losses import Loss, TargetedLoss, loss_function, targeted_loss_function
from metarobust.threat_models import ThreatModel
from metarobust.types import Model


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Auto-PGD: momentum, and a step size per row that starts at ``2 * epsilon`` and is halved when progress stalls.

    Croce and Hein (2020), arXiv 2003.01690, algorithm 1 with its checkpoints, for l_inf and l2; for l1 the sparse steps of Croce
    and Hein (2021), arXiv 2103.01208, with 30, 30 and 40 % of the steps at three, two and one epsilon. AutoAttack's "apgd-ce" is
    ``APGD(loss="cross_entropy")``, its "apgd-t" is ``APGD(loss="dlr", targets=9)``, run here on all targets at once.

    The result is, per example, the point of largest margin among those that fool the model, and where there is none the point
    of largest loss, over all steps, restarts, targets and the clean point. That takes ``steps`` forward-backward passes of
    ``batch * restarts * targets`` rows, one more forward pass, and one over the clean batch.

    Args:
        threat_model: ball and box, in input units.
        steps: number of gradient steps, at least 1 (AutoAttack: 100).
        loss: ``"cross_entropy"``, ``"dlr"``, ``"margin"`` or a callable: ``(logits, y) -> [batch]`` without targets,
            ``(logits, y, target) -> [batch]`` with them.
        targets: None climbs the loss itself; an integer climbs the targeted loss of so many wrong classes, those with the
            highest clean logits (AutoAttack: 9).
        restarts: independent runs from random points of the ball.
        random_start: False starts at x.
        eot_samples: random passes of the model that each gradient is averaged over (expectation over transformation,
            Athalye et al., 2018); 1 for a deterministic model, AutoAttack's "rand" uses 20.
        survivors_only: drop an example as soon as a point fools the model; for evaluation.
        memory_budget: bytes that saved activations may take; default: 32 MiB on a CPU, half of the free memory on a GPU.

    Raises:
        ValueError: on a call, for inputs outside the box, labels outside the classes, or too few classes for the DLR loss.
        TypeError: on a call, for inputs or labels of the wrong dtype.

    Example:
        >>> attack = APGD(threat_model=ThreatModel(norm="linf", epsilon=0.1), steps=10)
        >>> attack(lambda x: x, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), generator=torch.Generator())
        tensor([[0.5000, 0.5000]])
    """

    threat_model: ThreatModel
    steps: int = 100
    loss: str | Loss | TargetedLoss = "cross_entropy"
    targets: int | None = None
    restarts: int = 1
    random_start: bool = True
    eot_samples: int = 1
    survivors_only: bool = False
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.targets is not None:
            integer("targets", self.targets, least=1)
        _ = self._search

    @cached_property
    def _search(self) -> Search:
        named = targeted_loss_function if self.targets is not None else lambda loss: _untargeted(loss_function(loss))
        loss = named(self.loss)  # type: ignore[arg-type]
        return Search(
            threat_model=self.threat_model,
            steps=self.steps,
            restarts=self.restarts,
            rule="apgd",
            objective=loss,
            targets=None if self.targets is None else TargetSet(kind="top_logits", count=self.targets),
            random_start=self.random_start,
            eot_samples=self.eot_samples,
            survivors_only=self.survivors_only,
            by_margin=self.loss == "margin",
            memory_budget=self.memory_budget,
            phases=phases(self.threat_model),
        )

    @torch.inference_mode(False)
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached, inside ball and box.

        ``start``, points inside ball and box shaped like ``x``, is where the first restart begins and what it must beat.
        """
        return run(self._search, model, x, y, generator, start)


def _untargeted(loss: Loss) -> TargetedLoss:
    return lambda logits, y, target: loss(logits, y)


def phases(threat_model: ThreatModel) -> tuple[tuple[float, float], ...]:
    """Radii in multiples of epsilon with their shares of the steps: APGD for l1 begins outside the ball (2103.01208, 3.5)."""
    return ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4)) if threat_model.norm == "l1" else ((1.0, 1.0),)


def run(search: Search, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, start: Tensor | None) -> Tensor:
    """Check the batch, count the call, search."""
    x, y = checked(search.threat_model, model, x, y)
    if start is not None:
        start = checked_start(search.threat_model, start, x)
    record_call(len(x))
    if len(x) == 0 or search.threat_model.epsilon == 0:
        return x.clone()
    return search(model, x, y, generator, start)


def check_settings(attack: object) -> None:
    """The checks that APGD and BETA share."""
    fields = vars(attack)
    if not isinstance(fields["threat_model"], ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel", repr(fields["threat_model"])))
    for name in ("steps", "restarts", "eot_samples"):
        integer(name, fields[name], least=1)
    require(
        fields["random_start"] or fields["restarts"] == 1,
        "restarts",
        "1 without a random start (every restart would be the same)",
        fields["restarts"],
        "write random_start=True",
    )
    if fields["memory_budget"] is not None:
        integer("memory_budget", fields["memory_budget"], least=1)

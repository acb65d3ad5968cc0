"""BETA, the best targeted attack: every wrong class is a margin-maximisation problem of its own."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from metarobust._checks import choice, require
from metarobust.attacks._apgd import check_settings, phases, run
from metarobust.attacks._common import checked
from metarobust.attacks._counting import record_call
from metarobust.attacks._search import Search
from metarobust.attacks._step_rules import STEP_RULES
from metarobust.attacks._targets import TargetSet
from metarobust.losses import targeted_margin
from metarobust.threat_models import ThreatModel
from metarobust.types import Model


@dataclass(frozen=True, kw_only=True)
class BETA:
    r"""Best targeted attack: :math:`\max_{j \ne y} \max_{\|\eta\| \le \epsilon} f(x + \eta)_j - f(x + \eta)_y`.

    Robey et al. (2024), "Adversarial Training Should Be Cast as a Non-Zero-Sum Game", arXiv 2306.11035, algorithm 1. The sign of
    the joint maximum decides whether an adversarial example exists, which no maximum of the cross-entropy does for three
    classes or more. All classes, restarts and examples climb in one batch. Beyond the paper, a row counts for every class that
    it helps, not only for its target, and the best point over all steps (and the clean point) is kept, not the last. Its
    ancestor is the MultiTargeted attack (Gowal et al., 2019).

    It takes ``steps`` forward-backward passes of ``batch * restarts * targets`` rows, one more forward pass, and one over the
    clean batch; ``"nearest"`` adds one backward pass per class, ``"halving"`` saves about half of the rows.

    Args:
        threat_model: ball and box, in input units.
        steps: number of gradient steps, at least 1.
        restarts: independent runs per target from random points of the ball.
        step_rule: ``"rmsprop"`` (the paper), ``"sign"`` (lengths fall along a cosine), or ``"apgd"`` (adaptive, see `APGD`).
        targets: ``"all"`` wrong classes; ``"top_logits"``, those with the highest clean logits; ``"nearest"``, those with the
            smallest first-order distance (not for a model of ``torch.compile``, whose graph can be walked only once);
            ``"halving"``, all at first, and after each quarter of the steps the better half of an example's rows.
        target_count: how many targets, with ``"top_logits"`` and ``"nearest"``.
        random_start: False starts at x.
        eot_samples: random passes of the model that each gradient is averaged over; 1 for a deterministic model.
        survivors_only: drop an example as soon as a point fools the model; for evaluation. In training keep False: stopping
            at the first success would no longer maximise the margin.
        memory_budget: bytes that saved activations may take; default: 32 MiB on a CPU, half of the free memory on a GPU.

    Raises:
        ValueError: on a call, for inputs outside the box or labels outside the classes.
        TypeError: on a call, for inputs or labels of the wrong dtype.

    Example:
        >>> attack = BETA(threat_model=ThreatModel(norm="linf", epsilon=0.1), steps=10)
        >>> attack(lambda x: x, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), generator=torch.Generator())
        tensor([[0.5000, 0.5000]])
    """

    threat_model: ThreatModel
    steps: int = 30
    restarts: int = 1
    step_rule: str = "rmsprop"
    targets: str = "all"
    target_count: int | None = None
    random_start: bool = True
    eot_samples: int = 1
    survivors_only: bool = False
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        choice("step_rule", self.step_rule, STEP_RULES)
        _ = self._search

    @cached_property
    def _search(self) -> Search:
        return Search(
            threat_model=self.threat_model,
            steps=self.steps,
            restarts=self.restarts,
            rule=self.step_rule,
            objective=targeted_margin,
            targets=TargetSet(kind=self.targets, count=self.target_count),
            random_start=self.random_start,
            eot_samples=self.eot_samples,
            survivors_only=self.survivors_only,
            by_margin=True,
            memory_budget=self.memory_budget,
            phases=phases(self.threat_model) if self.step_rule == "apgd" else ((1.0, 1.0),),
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

    @torch.inference_mode(False)
    def each_target(
        self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return every target's best point ``[batch, targets, ...]`` and the targets ``[batch, targets]``, at the same cost.

        For target j the best is the largest :math:`M_j` over all rows of the example, whatever their target, all steps and the
        clean point. With all wrong classes as targets, the largest of them is the margin of the point that a call returns.

        Args:
            model, x, y, generator: as in a call, see `metarobust.types.Attack`.

        Raises:
            ValueError: ``survivors_only``, which stops before the other targets have had their steps.
        """
        require(not self.survivors_only, "survivors_only", "False for a point of each target", True)
        x, y = checked(self.threat_model, model, x, y)
        record_call(len(x))
        if len(x) == 0:
            return x.new_empty((0, 0, *x.shape[1:])), y.new_empty((0, 0))
        points, targets = replace(self._search, each_target=True).find(model, x, y, generator)
        assert targets is not None
        return points, targets

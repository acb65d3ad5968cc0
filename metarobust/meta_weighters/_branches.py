"""The branches of a batch: where each example can be charged, and what it is charged there."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarobust._checks import require
from metarobust._tensors import per_example, seeded
from metarobust.attacks._common import buffers_kept, check_step_size
from metarobust.losses import cross_entropy
from metarobust.meta_weighters._hypergradient import copied_buffers
from metarobust.meta_weighters._signed_pgd import signed_pgd
from metarobust.objectives._common import BallLoss, PairLoss, check_robust_loss
from metarobust.threat_models import ThreatModel
from metarobust.types import Model, Parameters, RobustLoss


class Call(NamedTuple):
    """One call of `CAAT`: the batch, its logits and characteristics, the radii of its examples if they have their own."""

    model: Model
    x: Tensor
    y: Tensor
    natural: Tensor
    six: Tensor
    radii: Tensor | None
    generator: torch.Generator | None


@dataclass(frozen=True, kw_only=True)
class Points:
    """Where the examples of a batch are moved, ``[batch, ...]`` each; None for a branch that nobody took."""

    adversary: Tensor | None = None
    anti_adversary: Tensor | None = None

    def chosen(self, x: Tensor, signs: Tensor) -> Tensor:
        """``x`` with the rows of sign +1 and -1 moved to their side."""
        for side, point in ((signs > 0, self.adversary), (signs < 0, self.anti_adversary)):
            x = x if point is None else torch.where(per_example(side, x), point, x)
        return x


@dataclass(frozen=True, kw_only=True)
class Branches:
    """The branches of a robust loss, in the order of ``names``.

    A `BallLoss` has its adversaries and anti-adversaries found by one `signed_pgd`. Any other `PairLoss` finds its adversaries
    itself; one that does not come apart is called whole, attack and all.
    """

    names: tuple[str, ...]
    robust_loss: RobustLoss
    threat_model: ThreatModel
    steps: int
    step_size: float | None
    anti_factor: float = 1.0  # of the radius of anti-adversaries

    def __post_init__(self) -> None:
        check_robust_loss(self.robust_loss)
        check_step_size(self.step_size, self.threat_model)
        attack = getattr(self.robust_loss, "attack", None)
        theirs = getattr(self.robust_loss, "threat_model", None) or getattr(attack, "threat_model", None)
        expected = f"one for the threat model of the weighting, {self.threat_model!r}"
        remedy = "give both the same: the meta-loss attacks with the one, the training with the other"
        require(theirs is None or theirs == self.threat_model, "robust_loss", expected, repr(theirs), remedy)

    @property
    def signed(self) -> bool:
        """Whether `signed_pgd` finds the adversaries, so that each can have its own radius."""
        return isinstance(self.robust_loss, BallLoss)

    @property
    def reads_clean(self) -> bool:
        """Whether a branch is charged for the logits at x."""
        loss = self.robust_loss
        return "natural" in self.names or (isinstance(loss, PairLoss) and loss.reads_clean)

    def radii(self, wanted: Tensor) -> Tensor:
        """Radii ``[batch]``, inside what the box allows."""
        widest = self.threat_model.upper - self.threat_model.lower if self.threat_model.norm == "linf" else float("inf")
        return wanted.clamp(max=widest)

    def points(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        signs: Tensor,
        natural: Tensor,
        radii: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """``x`` with the rows of sign +1 and -1 moved; ``natural`` are the logits at x, ``radii [batch]`` perhaps their own."""
        loss = self.robust_loss
        found, against = x, signs > 0
        if not isinstance(loss, BallLoss):
            rows = against.nonzero().squeeze(1)
            if isinstance(loss, PairLoss) and len(rows):
                found = x.index_copy(0, rows, loss.moved(model, x[rows], y[rows], generator=generator).detach())
            signs = signs.masked_fill(against, 0)
            if not bool(signs.any()):
                return found
        if self.anti_factor != 1 and bool((signs < 0).any()):
            radii = x.new_full(y.shape, self.threat_model.epsilon) if radii is None else radii
            radii = self.radii(torch.where(signs < 0, self.anti_factor * radii, radii))
        moved = signed_pgd(
            model,
            x,
            y,
            signs,
            threat_model=self.threat_model,
            epsilon=radii,
            steps=self.steps,
            step_size=self.step_size,
            natural_logits=natural,
            generator=generator,
            climbed=loss.climbed if isinstance(loss, BallLoss) else None,
        )
        return moved if found is x else torch.where(per_example(against, x), found, moved)

    def all_points(
        self, model: Model, x: Tensor, y: Tensor, natural: Tensor, radii: Tensor | None, generator: torch.Generator | None
    ) -> Points:
        """The points of every example in every branch; for a `BallLoss` by one attack on both sides at once."""
        against, sides = torch.ones_like(y), "anti_adversary" in self.names
        if not sides:
            return Points(adversary=self.points(model, x, y, against, natural, radii, generator))
        if not self.signed:
            return Points(
                adversary=self.points(model, x, y, against, natural, radii, generator),
                anti_adversary=self.points(model, x, y, -against, natural, radii, generator),
            )
        signs = torch.cat([against, -against])
        wide = None if radii is None else torch.cat([radii, radii])
        both = self.points(model, torch.cat([x, x]), torch.cat([y, y]), signs, torch.cat([natural, natural]), wide, generator)
        return Points(adversary=both[: len(x)], anti_adversary=both[len(x) :])

    def losses(
        self, call: Model, x: Tensor, y: Tensor, points: Points, *, joint: bool, seed: int, clean: Tensor | None = None
    ) -> Tensor:
        """What every example is charged in every branch, ``[batch, branches]``.

        ``call`` is the model, or a function at other parameters; ``joint`` says that its rows do not see each other, so that
        one pass serves all branches; ``seed`` is of the noise of an objective that is called whole; ``clean`` are the logits at
        x, if known.
        """
        loss = self.robust_loss
        whole = not isinstance(loss, PairLoss)
        wanted = {"clean": x if self.reads_clean and clean is None else None}
        wanted |= {"adversary": None if whole else points.adversary, "anti_adversary": points.anti_adversary}
        inputs = {name: value for name, value in wanted.items() if value is not None}
        if joint and len(inputs) > 1:
            logits = dict(zip(inputs, call(torch.cat(list(inputs.values()))).chunk(len(inputs)), strict=True))
        else:
            logits = {}
            for name, value in inputs.items():
                with buffers_kept(call) if name == "anti_adversary" else nullcontext():
                    logits[name] = call(value)
        clean = logits.get("clean", clean)
        columns = []
        for name in self.names:
            if name == "natural":
                assert clean is not None
                columns.append(cross_entropy(clean, y))
            elif name == "anti_adversary":
                columns.append(cross_entropy(logits[name], y))
            elif isinstance(loss, PairLoss):
                columns.append(loss.charge(logits[name] if clean is None else clean, logits[name], y))
            else:
                columns.append(loss(call, x, y, generator=torch.Generator().manual_seed(seed)))
        return torch.stack(columns, 1)

    def routed_losses(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        branch: Tensor,
        moved: Tensor,
        natural: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """What every example is charged in its one ``branch [batch]``, ``[batch]``; ``natural`` with its graph where it is read.

        Anti-adversaries pass last, and their pass does not move BatchNorm's running statistics: they look too easy.
        """
        loss, losses = self.robust_loss, natural.new_zeros(len(y))
        for name in ("natural", "adversary", "anti_adversary"):
            rows = (branch == self.names.index(name)).nonzero().squeeze(1) if name in self.names else branch[:0]
            if len(rows) == 0:
                continue
            everyone = len(rows) == len(y)
            inputs, labels, clean = (t if everyone else t[rows] for t in (moved, y, natural))
            if name == "natural":
                found = cross_entropy(clean, labels)
            elif name == "anti_adversary":
                with buffers_kept(model):
                    found = cross_entropy(model(inputs), labels)
            elif isinstance(loss, PairLoss):
                logits = model(inputs)
                found = loss.charge(clean if loss.reads_clean else logits, logits, labels)
            else:
                found = loss(model, inputs, labels, generator=generator)
            losses = found if everyone else losses.index_copy(0, rows, found.to(losses))
        return losses


def as_function(model: nn.Module, parameters: Parameters) -> Model:
    """The model at other parameters, on copies of its buffers; it is in the mode that it is in when it is called."""

    def call(x: Tensor) -> Tensor:
        return functional_call(model, {**copied_buffers(model), **parameters}, (x,))

    return call


def rows_independent(model: nn.Module) -> bool:
    """Whether an example's logits cannot depend on its batch: no module in training mode has buffers."""
    return not any(module.training and any(True for _ in module.buffers(recurse=False)) for module in model.modules())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def repeated_noise(seed: int) -> Iterator[None]:
    """Dropout, and whatever else draws from torch's global CPU generator, draws the same for the same seed."""
    with seeded(torch.Generator().manual_seed(seed)):
        yield

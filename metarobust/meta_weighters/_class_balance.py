"""FRL: weights and margins of classes that follow the errors on held-out data, epoch by epoch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarobust import _checks
from metarobust._checks import finite, integer, message, require
from metarobust.attacks import PGD
from metarobust.data import LabelledImages
from metarobust.evaluation._inputs import as_tensors, digest
from metarobust.losses import cross_entropy, kl_divergence
from metarobust.meta_weighters._branches import evaluation_mode
from metarobust.meta_weighters._signed_pgd import signed_pgd
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack, Model


class HeldOutErrors(NamedTuple):
    """Errors on held-out data, as fractions.

    Attributes:
        natural: share of each class that is misclassified as it is, ``[classes]``.
        boundary: share of each class that is right until it is attacked, ``[classes]``.
        natural_average: of all examples.
        boundary_average: of all examples.
    """

    natural: Tensor
    boundary: Tensor
    natural_average: float
    boundary_average: float


@torch.no_grad()
def held_out_errors(
    model: nn.Module, x: Tensor, y: Tensor, *, classes: int, attack: Attack, generator: torch.Generator, batch_size: int = 256
) -> HeldOutErrors:
    """Natural and boundary error of each class in evaluation mode; a class without examples has the averages.

    The boundary error counts examples that are classified rightly until they are attacked.

    Args:
        model: put into evaluation mode for the time of the call.
        x: ``[n, ...]`` in input units.
        y: int64 ``[n]``.
        classes: number of classes.
        attack: any attack.
        generator: of the attack's noise, on the CPU.
        batch_size: examples per pass.
    """
    integer("batch_size", batch_size, least=1)
    require(len(x) > 0, "x", "at least one example", "none")
    _checks.labels(y, examples=len(x), classes=classes)
    wrong, broken = [], []
    with evaluation_mode(model):
        for rows in torch.arange(len(x)).split(batch_size):
            inputs, labels = x[rows], y[rows]
            right = model(inputs).argmax(1) == labels
            attacked = model(attack(model, inputs, labels, generator=generator)).argmax(1) == labels
            wrong.append(~right)
            broken.append(right & ~attacked)
    counts = y.bincount(minlength=classes).double()
    columns, averages = [], []
    for flags in (torch.cat(wrong), torch.cat(broken)):
        average = float(flags.double().mean())
        totals = torch.zeros_like(counts).index_add_(0, y, flags.double())
        columns.append(torch.where(counts > 0, totals / counts.clamp(min=1), average))
        averages.append(average)
    return HeldOutErrors(columns[0], columns[1], averages[0], averages[1])


class ReMargin(nn.Module):
    r"""FRL's weights and margins of classes (Xu et al., 2021, arXiv 2010.06121, algorithm 1), moved once per epoch.

    With the errors of class c on held-out data, natural and boundary, and a tolerance,

    .. math:: g^0_c = nat_c - \overline{nat} - tolerance,\quad g^1_c = bdy_c - \overline{bdy} - tolerance,\\
        \lambda^0 \mathrel{+}= r_1 g^0,\quad \lambda^1 \mathrel{+}= 2 r_1 g^1,\quad \lambda^2 \mathrel{+}= r_2 g^1,

    with :math:`\lambda^0, \lambda^1` kept at or above 0 and each scaled down to a sum of ``limit``. Class weights are
    :math:`a_c = 1/C + \lambda_c - \bar\lambda`, and the factor of epsilon is :math:`\exp(2 \lambda^2_c)`, cut off. The settings
    are those of CAAT's published code. (FRL's own: tolerance 0.1, margin rate 0.1, highest factor 3.) As a ``bound`` of `CAAT`
    its factors alone are used; `FRL` uses the weights too.

    Args:
        classes: number of classes.
        tolerance: by which the error of a class may exceed the average.
        weight_rate: :math:`r_1`, halved every ``halving`` epochs.
        margin_rate: :math:`r_2`.
        limit: largest sum of the multipliers of a loss, below 1, so that class weights are positive.
        lowest, highest: factors of epsilon.
        halving: in epochs.

    Example:
        >>> balance = ReMargin(classes=2, tolerance=0.0)
        >>> errors = HeldOutErrors(torch.tensor([0.1, 0.3]), torch.tensor([0.0, 0.4]), 0.2, 0.2)
        >>> balance.start_epoch(errors, epoch=0)
        >>> [round(factor, 4) for factor in balance.factors.tolist()]  # exp(2 * 0.2 * 0.2) for the class that is attacked easily
        [0.98, 1.0833]
    """

    natural_multiplier: Tensor
    boundary_multiplier: Tensor
    margin_multiplier: Tensor

    def __init__(
        self,
        *,
        classes: int,
        tolerance: float = 0.07,
        weight_rate: float = 0.05,
        margin_rate: float = 0.2,
        limit: float = 0.5,
        lowest: float = 0.98,
        highest: float = 2.5,
        halving: int = 40,
    ) -> None:
        super().__init__()
        integer("classes", classes, least=2)
        settings = {"tolerance": tolerance, "weight_rate": weight_rate, "margin_rate": margin_rate, "limit": limit}
        for name, value in settings.items():
            finite(name, value, least=0.0)
        require(limit < 1, "limit", "< 1, so that class weights are positive", limit)
        finite("lowest", lowest, above=0.0)
        finite("highest", highest)
        require(lowest <= 1 <= highest, "lowest and highest", "such that 1 lies between them", (lowest, highest))
        integer("halving", halving, least=1)
        self.settings = {**settings, "lowest": lowest, "highest": highest, "halving": halving}
        self.tolerance, self.weight_rate, self.margin_rate, self.limit = tolerance, weight_rate, margin_rate, limit
        self.lowest, self.highest, self.halving = lowest, highest, halving
        for name in ("natural_multiplier", "boundary_multiplier", "margin_multiplier"):
            self.register_buffer(name, torch.zeros(classes, dtype=torch.float64))

    def start_epoch(self, errors: HeldOutErrors, *, epoch: int) -> None:
        """Move the multipliers by the ``errors`` that ``epoch`` (0, 1, ...) starts with."""
        rate = self.weight_rate * 0.5 ** (epoch // self.halving)
        natural = errors.natural.to(self.natural_multiplier) - errors.natural_average - self.tolerance
        boundary = errors.boundary.to(self.natural_multiplier) - errors.boundary_average - self.tolerance
        self.natural_multiplier.add_(rate * natural).clamp_(min=0)
        self.boundary_multiplier.add_(2 * rate * boundary).clamp_(min=0)
        self.margin_multiplier.add_(self.margin_rate * boundary)
        for multiplier in (self.natural_multiplier, self.boundary_multiplier):
            total = float(multiplier.sum())
            if total > self.limit:
                multiplier.mul_(self.limit / total)

    @property
    def natural_weights(self) -> Tensor:
        """Weights of the natural loss, float64 ``[classes]``, with the sum 1."""
        return 1 / len(self.natural_multiplier) + self.natural_multiplier - self.natural_multiplier.mean()

    @property
    def boundary_weights(self) -> Tensor:
        """Weights of the boundary loss, float64 ``[classes]``, with the sum 1."""
        return 1 / len(self.boundary_multiplier) + self.boundary_multiplier - self.boundary_multiplier.mean()

    @property
    def factors(self) -> Tensor:
        """Factors of epsilon, float64 ``[classes]``."""
        return (2 * self.margin_multiplier).exp().clamp(self.lowest, self.highest)

    def forward(self, characteristics: Tensor, y: Tensor) -> Tensor:
        """The factor of each example, ``[batch]``."""
        return self.factors.to(characteristics)[y]

    def extra_repr(self) -> str:
        told = ", ".join(f"{name}={value:g}" for name, value in self.settings.items())
        return f"classes={len(self.factors)}, {told}"


class FRL(nn.Module):
    r"""Fair robust learning: TRADES with weights and margins of classes (Xu et al., 2021, arXiv 2010.06121).

    With the class weights a and the factors m of a `ReMargin`, an example is charged

    .. math:: \frac{a^0_y}{\bar a^0}\, CE(f(x), y) + \beta \frac{a^1_y}{\bar a^1}\, KL(p(x) \| p(x')),
        \qquad \|x' - x\| \le m_y \epsilon,

    with the means over the batch, and x' from `signed_pgd` on the KL divergence. The multipliers move by the natural and boundary
    errors on held-out data, at each `start_epoch`, which `training.fit` calls. The means below the weights are those of CAAT's
    published code; FRL's divides by the sum of both weights instead, half as large a loss at equal weights.

    Args:
        threat_model: ball and box, in input units.
        held_out: ``(x, y)`` that the errors are measured on, in the model's place and dtype; not test data.
        beta: weight of the KL divergence.
        steps: of the attack.
        reweight: use the weights ("ReWeight").
        remargin: use the factors ("ReMargin").
        balance: a `ReMargin` with other settings than the published ones.
        held_out_attack: by default PGD with 20 steps of epsilon / 4, as published.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the attack's noise, and returns
    one loss per example.

    Example:
        >>> held_out = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> objective = FRL(threat_model=ThreatModel(epsilon=0.1), held_out=held_out)
        >>> model = torch.nn.Linear(4, 3)
        >>> objective.start_epoch(model, epoch=0, epochs=1, generator=torch.Generator().manual_seed(0))
        >>> objective(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    def __init__(
        self,
        *,
        threat_model: ThreatModel,
        held_out: tuple[Tensor, Tensor] | LabelledImages,
        beta: float = 6.0,
        steps: int = 10,
        reweight: bool = True,
        remargin: bool = True,
        balance: ReMargin | None = None,
        held_out_attack: Attack | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel", repr(threat_model)))
        finite("beta", beta, least=0.0)
        integer("steps", steps, least=1)
        self.threat_model, self.beta, self.steps = threat_model, beta, steps
        self.reweight, self.remargin = reweight, remargin
        x, y = as_tensors(held_out)
        require(len(x) > 0, "held_out", "at least one example", 0)
        _checks.images(x, lower=threat_model.lower, upper=threat_model.upper)
        _checks.labels(y, examples=len(x))
        self.held_out = (x, y)
        self.balance = ReMargin(classes=int(y.max()) + 1) if balance is None else balance
        self.held_out_attack = published_attack(threat_model) if held_out_attack is None else held_out_attack

    @property
    def diagnostics(self) -> dict[str, float]:
        """Numbers to log: the extremes of weights and factors."""
        balance = self.balance
        weights = balance.boundary_weights * len(balance.factors)
        return {"largest_boundary_weight": float(weights.max()), "largest_factor": float(balance.factors.max())}

    def start_epoch(self, model: nn.Module, *, epoch: int, epochs: int, generator: torch.Generator) -> None:
        """Measure ``model``'s held-out errors (attack noise: ``generator``) and move the multipliers; the model stays as it was.

        ``epoch`` counts from 0; ``epochs``, their number, is not read.
        """
        del epochs
        device = next(model.parameters()).device
        self.to(device)
        self.held_out = (self.held_out[0].to(device), self.held_out[1].to(device))
        x, y = self.held_out
        classes = len(self.balance.factors)
        errors = held_out_errors(model, x, y, classes=classes, attack=self.held_out_attack, generator=generator)
        self.balance.start_epoch(errors, epoch=epoch)

    def forward(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one loss per example, ``[batch]``."""
        clean = model(x)
        _checks.labels(y, examples=len(x), classes=len(self.balance.factors))
        radii = self.threat_model.epsilon * self.balance(clean.detach(), y) if self.remargin else None
        if radii is not None and self.threat_model.norm == "linf":
            radii = radii.clamp(max=self.threat_model.upper - self.threat_model.lower)
        moved = signed_pgd(
            model,
            x,
            y,
            torch.ones_like(y),
            threat_model=self.threat_model,
            epsilon=radii,
            steps=self.steps,
            natural_logits=clean,
            generator=generator,
        )
        natural, boundary = cross_entropy(clean, y), kl_divergence(clean, model(moved))
        if self.reweight:
            for_natural, for_boundary = self.balance.natural_weights[y], self.balance.boundary_weights[y]
            natural = (for_natural / for_natural.mean()).to(natural) * natural
            boundary = (for_boundary / for_boundary.mean()).to(boundary) * boundary
        return natural + self.beta * boundary

    def extra_repr(self) -> str:
        settings = f"beta={self.beta:g}, steps={self.steps}, reweight={self.reweight}, remargin={self.remargin}"
        data = f"held_out={digest(*self.held_out)}, held_out_attack={self.held_out_attack!r}"
        return f"threat_model={self.threat_model!r}, {settings}, {data}"


def published_attack(threat_model: ThreatModel) -> PGD:
    """PGD on the cross-entropy, 20 steps of a quarter of epsilon, from a random start."""
    return PGD(threat_model=threat_model, steps=20, step_size=max(threat_model.epsilon / 4, 1e-12))

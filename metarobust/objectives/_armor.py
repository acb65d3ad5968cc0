"""ARMOR_D: reweighting, and transport at a price, on top of any robust loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from metarobust._checks import finite, integer, message, require
from metarobust._processes import processes
from metarobust.attacks import TransportAscent, TransportSearch
from metarobust.attacks._common import buffers_kept
from metarobust.divergences import Divergence
from metarobust.dro import WorstCase, gather_examples, worst_case_expectation
from metarobust.losses import cross_entropy
from metarobust.objectives._common import PairLoss, check_robust_loss
from metarobust.objectives._udr import UDR
from metarobust.transport_costs import Insertion, TransportCost
from metarobust.types import Model, RobustLoss


class ARMORLoss(NamedTuple):
    """What `ARMOR` returns.

    Attributes:
        loss: the scalar to differentiate. Under `torch.distributed` its gradient is this process's share of the joint one times
            the number of processes, so that an average over them, as `DistributedDataParallel` takes, is the joint gradient.
        worst_case: of the robust losses in the joint batch, detached. One row of weights per robust example, in their order; one
            column without a transport cost, otherwise two, at x and moved. None if the batch holds no robust class.
        natural: mean natural cross-entropy of the joint batch; NaN if nothing asked for it.
    """

    loss: Tensor
    worst_case: WorstCase | None
    natural: float

    @property
    def diagnostics(self) -> dict[str, float]:
        """Numbers to log: multiplier, scale, the budget spent on reweighting and on transport, the largest weight times n.

        Those that are not finite, as the multiplier at radius 0, are left out.
        """
        worst = self.worst_case
        if worst is None:
            return {}
        told = {
            "multiplier": worst.multiplier,
            "scale": worst.scale,
            "reweighting": worst.reweighting,
            "transport": worst.transport,
            "largest_weight": float(worst.weights.sum(1).max()) * len(worst.weights),
        }
        return {name: value for name, value in told.items() if math.isfinite(value)}


@dataclass(frozen=True, kw_only=True)
class ARMOR:
    r"""The worst expectation of a robust loss over all distributions within an OT-regularised divergence of the batch.

    With t the natural weight, c the transport cost and D the divergence of the weights w from uniform ones,

    .. math:: t\, \overline{CE(f(x), y)} + (1 - t) \sup_{w, x'} \left\{ \sum_i w_i \ell_i(x_i') - \kappa B \;:\;
        B = D(w) + \sum_i w_i c(x_i, x_i') \le \epsilon \right\}

    (Birrell and Ebrahimi, 2025, arXiv 2309.03791). The supremum over w is exact, by the dual of `dro.worst_case_expectation` for
    each batch; the one over x' is as good as the attack. The gradient is the exact one at the points found: by the envelope
    theorem weights and points are constants where they maximise the same objective. They do with a transport cost, and for
    `AdversarialTraining` or `TRADES` with an attack on what is charged. Without a cost `MART` attacks the cross-entropy and
    charges more, as its authors do; the term through the point is dropped there, as it is for `BETATraining`.

    Without a transport cost the attack of the robust loss moves the examples inside its ball for free (c is 0 there and infinite
    outside), and the budget is for reweighting. At radius 0 this is the mean of the robust loss. With a cost, the points ascend
    the loss minus scale times the cost, and the scale is solved for during the ascent from the very candidates that it has
    found, so that attack and dual agree; x itself stays a candidate, of cost 0. At radius 0 only free moves are left.
    `UDR` brings its cost along; the dual takes the place of its multiplier. All this is for rows that do not see each other: with
    BatchNorm in training mode each pass has other batch statistics, so that the losses of the ascent are not quite those charged.

    A batch stands for the data: the worst case of the batch is larger than that of the data, the more so as the radius nears the
    logarithm of the batch size (KL).

    Args:
        robust_loss: `AdversarialTraining`, `TRADES`, `MART`, `UDR`, `BETATraining`, or any other robust loss. With a transport
            cost, one of the first four: it must say what it charges at a given point.
        divergence: `divergences.KL`, `Alpha` or `Renyi`.
        radius: epsilon, at least 0, in units of the divergence. KL cannot exceed the logarithm of the batch size, where all
            weight is on one example; 0.1 moves weights by factors up to 4 or so (`ARMORLoss.diagnostics` tells). To be learned
            by a loss on top, a scalar tensor > 0; `training.fit` moves the model only.
        kappa: price of the budget in units of the loss, at least 0.
        transport_cost: from `metarobust.transport_costs`; its ascent replaces the attack of the robust loss.
        natural_weight: t, from 0 to 1. The published variants are 0 ("adv_s") and above 0 ("adv_s+nat").
        robust_classes: the classes that are moved and reweighted; the others keep natural loss and weight, and the robust part
            counts with its share of the batch. Default: all. Their rows are attacked alone, which BatchNorm in training mode
            sees. The asymmetric variant ("adv_a") of the paper is not in its code, and may differ from this one.
        steps: of the ascent with a transport cost, by default 10; `UDR` brings its own along.
        step_size: of the ascent with a transport cost, see `attacks.TransportAscent`.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the attack's noise. Under
    `torch.distributed` the losses of all processes are gathered first: one dual, of the joint batch, and every process must call
    equally often.

    Raises:
        TypeError: a robust loss, divergence or cost that is none, or a cost with a loss that cannot be charged at a point.
        ValueError: a setting out of range.
        FloatingPointError: on a call, a loss that is NaN or infinite, with the rows named.

    Example:
        >>> from metarobust.attacks import PGD
        >>> from metarobust.divergences import KL
        >>> from metarobust.objectives import AdversarialTraining
        >>> from metarobust.threat_models import ThreatModel
        >>> attack = PGD(threat_model=ThreatModel(norm="linf", epsilon=0.1))
        >>> objective = ARMOR(robust_loss=AdversarialTraining(attack=attack), divergence=KL(), radius=0.1)
        >>> model, x, y = torch.nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> result = objective(model, x, y)
        >>> result.loss.backward()
        >>> round(result.worst_case.reweighting, 6), result.worst_case.weights.shape
        (0.1, torch.Size([4, 1]))
    """

    robust_loss: RobustLoss
    divergence: Divergence
    radius: float | Tensor
    kappa: float | Tensor = 0.0
    transport_cost: TransportCost | None = None
    natural_weight: float = 0.0
    robust_classes: Sequence[int] | None = None
    steps: int | None = None
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_robust_loss(self.robust_loss)
        if isinstance(self.divergence, type) or not hasattr(self.divergence, "tilt"):
            expected = "divergences.KL(), Alpha(order=...) or Renyi(order=...)"
            raise TypeError(message("divergence", expected, repr(self.divergence)))
        for name in ("radius", "kappa"):
            value = getattr(self, name)
            finite(name, value.item() if isinstance(value, Tensor) and value.dim() == 0 else value, least=0.0)
        finite("natural_weight", self.natural_weight, least=0.0)
        require(self.natural_weight <= 1, "natural_weight", "a share from 0 to 1", self.natural_weight)
        if self.robust_classes is not None:
            remedy = "write robust_classes=(1,), or leave it out for all classes"
            if not isinstance(self.robust_classes, (tuple, list, range)):
                raise TypeError(message("robust_classes", "a tuple of class indices", repr(self.robust_classes), remedy))
            object.__setattr__(self, "robust_classes", tuple(self.robust_classes))
            require(len(self.robust_classes) > 0, "robust_classes", "not empty", "()", remedy)
            for label in self.robust_classes:
                integer("robust_classes", label, least=0)
        if self.transport_cost is None:
            for name in ("steps", "step_size"):
                remedy = "give it to the attack, or to UDR"
                require(getattr(self, name) is None, name, "None without a transport cost", getattr(self, name), remedy)
        else:
            _ = self._ascent
            if not isinstance(self.robust_loss, PairLoss):
                name = type(self.robust_loss).__name__
                expected = "AdversarialTraining, TRADES, MART, UDR or another PairLoss beside a transport cost"
                raise TypeError(message("robust_loss", expected, name, "leave transport_cost out"))

    @property
    def _ascent(self) -> TransportAscent | None:
        """The search of the points, still without the loss that it climbs; None if the robust loss attacks by itself."""
        if isinstance(self.robust_loss, UDR) and self.transport_cost is None:
            return self.robust_loss.attack
        if self.transport_cost is None:
            return None
        start = isinstance(self.robust_loss, PairLoss) and self.robust_loss.reads_clean  # whose gradient can be 0 at x
        if start and isinstance(self.transport_cost, Insertion):
            name = type(self.robust_loss).__name__
            raise TypeError(
                message("robust_loss", "AdversarialTraining for binary features", name, f"{name} needs a start off the data")
            )
        return TransportAscent(
            transport_cost=self.transport_cost,
            steps=10 if self.steps is None else self.steps,
            step_size=self.step_size,
            random_start=start,
        )

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> ARMORLoss:
        """Return the scalar loss with the worst case behind it."""
        robust = torch.ones_like(y, dtype=torch.bool)
        if self.robust_classes is not None:
            robust = torch.isin(y, torch.tensor(self.robust_classes, device=y.device))
        everything = self.robust_classes is None
        rows = self._rows(robust)
        natural_needed = self.natural_weight > 0 or not everything
        x_robust, y_robust = (x, y) if everything else (x[rows], y[rows])

        ascent, loss = self._ascent, self.robust_loss
        costs = torch.zeros(len(y_robust), dtype=torch.float64, device=x.device)
        if ascent is None and not isinstance(loss, PairLoss):
            charged = loss(model, x_robust, y_robust, generator=generator)
            if not isinstance(charged, Tensor):
                raise TypeError(message("robust_loss", "one that returns a loss per example", type(charged).__name__))
            natural = charged.new_zeros(len(y))
            if natural_needed:
                logits = model(x)
                self._check_classes(logits)
                natural = cross_entropy(logits, y)
            unmoved = None
        else:
            assert isinstance(loss, PairLoss)
            # The attack before the passes that are differentiated, as the robust losses have it themselves.
            if ascent is None:
                moved = loss.moved(model, x_robust, y_robust, generator=generator)
            else:
                found = self._search(ascent, loss, model, x_robust, y_robust, rows, generator)
                moved, costs = found.x_adv, found.costs.double()
            reads = natural_needed or ascent is not None or loss.reads_clean
            clean = model(x) if reads else None
            logits = model(moved)
            clean_robust = logits if clean is None else clean if everything else clean[rows]
            charged = loss.charge(clean_robust, logits, y_robust)
            unmoved = None if ascent is None else loss.charge(clean_robust, clean_robust, y_robust)
            self._check_classes(logits)
            natural = cross_entropy(clean, y) if clean is not None and natural_needed else charged.new_zeros(len(y))
        return self._weighted(charged, unmoved, costs, natural, robust, natural_needed)

    def _check_classes(self, logits: Tensor) -> None:
        """Refuse chosen classes that the model does not have."""
        for label in self.robust_classes or ():
            expected = f"below {logits.shape[1]}, the classes that the model has logits for"
            require(label < logits.shape[1], "robust_classes", expected, label)

    def _search(
        self,
        ascent: TransportAscent,
        loss: PairLoss,
        model: Model,
        x: Tensor,
        y: Tensor,
        rows: Tensor,
        generator: torch.Generator | None,
    ) -> TransportSearch:
        """The points that ascend the charged loss at the scale that the dual of their own candidates asks for."""
        clean: list[Tensor] = []
        if loss.reads_clean:
            with torch.no_grad(), buffers_kept(model):
                clean.append(model(x))

        def charged(logits: Tensor, labels: Tensor) -> Tensor:
            return loss.charge(clean[0] if clean else logits, logits, labels)

        def rescale(losses: Tensor, costs: Tensor) -> float:
            together = gather_examples(torch.stack([losses.double(), costs.double()], 1))
            return self._solve(together[:, 0], together[:, 1], losses.sum(1), rows).scale if len(together) else 1.0

        # The scale is a slow fixed point where transport takes much of the budget: a renewal for every other step.
        climb = replace(ascent, loss=charged, rescalings=max(3, ascent.steps // 2))
        return climb.search(model, x, y, generator=generator, rescale=rescale)

    def _rows(self, robust: Tensor) -> Tensor:
        """Indices of the robust examples; a mask is not asked where all are, because an answer waits for the device."""
        if self.robust_classes is None:
            return torch.arange(len(robust), device=robust.device)
        return robust.nonzero().squeeze(1)

    def _solve(self, losses: Tensor, costs: Tensor | None, here: Tensor, rows: Tensor) -> WorstCase:
        """The dual of the joint batch; ``here`` are losses of this process, in these rows of its batch, to name a bad one."""
        try:
            radius, kappa = (_shared(value) for value in (self.radius, self.kappa))
            return worst_case_expectation(losses, divergence=self.divergence, radius=radius, kappa=kappa, costs=costs)
        except ValueError:
            _refuse_broken("robust", here, rows)
            if not bool(losses.isfinite().all()):
                raise FloatingPointError("a robust loss is NaN or infinite in another process; it names the row") from None
            raise

    def _weighted(
        self, charged: Tensor, unmoved: Tensor | None, costs: Tensor, natural: Tensor, robust: Tensor, natural_needed: bool
    ) -> ARMORLoss:
        """The loss of the joint batch: natural mean, worst case of the robust examples, natural mean of the others."""
        rows = self._rows(robust)
        expected = f"one that returns a loss per example, [{len(rows)}]"
        require(charged.shape == rows.shape, "robust_loss", expected, f"shape {list(charged.shape)}")
        unmoved_here = torch.zeros_like(charged) if unmoved is None else unmoved
        here = torch.stack([charged.double(), unmoved_here.double(), costs], 1)  # in half precision weights would not sum to 1
        table = here.new_zeros(len(robust), 3).index_copy(0, rows, here)
        joint = gather_examples(torch.cat([table, natural[:, None].double(), robust[:, None].double()], 1))
        everything = self.robust_classes is None
        chosen, others = (joint, joint[:0]) if everything else (joint[joint[:, 4] > 0], joint[joint[:, 4] == 0])
        worst, value = None, joint[:, 3].sum() * 0
        if len(chosen):
            columns = chosen[:, :1] if unmoved is None else chosen[:, :2].flip(1)
            prices = None if unmoved is None else torch.stack([torch.zeros_like(chosen[:, 2]), chosen[:, 2]], 1).detach()
            worst = self._solve(columns, prices, charged.detach() + unmoved_here.detach(), rows)
            value = worst.value * (len(chosen) / len(joint))
            worst = WorstCase(worst.value.detach(), worst.weights.detach(), *worst[2:])
        robust_part = value + (others[:, 3].sum() / len(joint) if len(others) else 0)
        mean = joint[:, 3].sum() / max(1, len(joint))  # of no examples at all: 0, as the worst case is
        if natural_needed and not math.isfinite(float(mean.detach())):
            _refuse_broken("natural", natural, torch.arange(len(natural)))
            raise FloatingPointError("a natural loss is NaN or infinite in another process; it names the row")
        loss = robust_part if self.natural_weight == 0 else self.natural_weight * mean + (1 - self.natural_weight) * robust_part
        world = processes()
        if world > 1:
            loss = loss.detach() + world * (loss - loss.detach())
        loss = loss if charged.dtype == torch.float64 else loss.float()
        return ARMORLoss(loss, worst, float(mean.detach()) if natural_needed else float("nan"))


def _shared(value: float | Tensor) -> float | Tensor:
    """A number that every process reads, with this process's share of its gradient; the losses' gradients are shares already."""
    world = processes()
    return value.detach() + (value - value.detach()) / world if isinstance(value, Tensor) and world > 1 else value


def _refuse_broken(kind: str, losses: Tensor, rows: Tensor) -> None:
    """Raise if a loss is NaN or infinite, with the first of the ``rows`` of the batch that the losses belong to."""
    bad = (~losses.isfinite()).nonzero().squeeze(1)
    if len(bad):
        raise FloatingPointError(
            f"the {kind} loss is NaN or infinite for {len(bad)} of {len(losses)} examples, the first in row "
            f"{int(rows[bad[0]])} of the batch; lower the learning rate or clip gradients"
        )

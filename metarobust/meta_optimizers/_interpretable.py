"""A learned update rule that can be read: a few named terms, with coefficients by tensor role and relative time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust._checks import choice, finite, integer
from metarobust._tensors import tree_detach
from metarobust.meta_optimizers._factor_gradients import GRADIENT_SOURCES
from metarobust.meta_optimizers._features import FAST, SECOND, root, time_basis
from metarobust.meta_optimizers._layout import NORMALISATION, ROLES, Layout
from metarobust.meta_optimizers._update_rule import COEFFICIENT_SPEED, LARGEST, UpdateRule, checked_streams

TERMS = ("adam", "momentum", "l2", "l1")
INITIAL = {"momentum": 1e-3, "l2": 1e-6, "l1": 1e-6}
"""Coefficients before meta-training: next to nothing beside the Adam term."""
LOG_SPEED = 4.0
"""Logarithms of coefficients are stored divided by this: within some hundred steps of 0.005 they may cross several decades."""
TYPICAL_FAN_IN = 64.0
LEAST_LEFT = 1e-6
"""Of the time, in the power that the learning rate falls by: with zero, a power of zero would be no limit of others."""
SHRINK_SCALE = 10.0
"""The L1 term has half its strength on weights of 1/10 of the size at which a layer is initialised, and fades out below."""


class InterpretableState(NamedTuple):
    """Everything an `InterpretableOptimizer` remembers.

    Attributes:
        momentum: running mean of the combined stream, ``[copies, coordinates]``.
        square: running mean of its square, likewise.
        step: count of updates, a scalar int64 tensor on the CPU.
    """

    momentum: Tensor
    square: Tensor
    step: Tensor

    def detach(self) -> "InterpretableState":
        """The same state cut from the graph: what every truncation must call."""
        return cast("InterpretableState", tree_detach(self))

    def to_dict(self) -> dict[str, Any]:
        """The tensors by name."""
        return self._asdict()

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "InterpretableState":
        """The inverse of `to_dict`, whose result ``found`` is."""
        return cls(found["momentum"], found["square"], torch.as_tensor(found["step"], dtype=torch.int64))


def _without_fall(rule: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Files of earlier versions have no such term."""
    state.setdefault(f"{prefix}fall", torch.zeros_like(cast("InterpretableOptimizer", rule).fall))


class InterpretableOptimizer(UpdateRule):
    r"""A learned update rule of four terms on the combined stream :math:`u = g + c_r(\tau)\, h`,

    .. math:: \Delta\theta = -\alpha_r(\tau) \frac{\hat m}{\sqrt{\hat v}} - \beta_r(\tau)\, \hat m - \lambda_r(\tau)\, \theta
              - \mu_r(\tau) \frac{10 \sqrt{n}\, \theta}{1 + 10 \sqrt{n}\, |\theta|},

    with Adam's bias-corrected running means :math:`\hat m` of u and :math:`\hat v` of its square, and the fan-in n of the tensor:
    Adam, momentum SGD, weight decay, and an L1 penalty that fades out near zero. The coefficients of a term are
    :math:`\exp(a_r + b_r P_1(\tau) + f \log(n / 64))` with relative time :math:`\tau = t/T`, one :math:`a_r, b_r` per tensor
    role r and one f per term, and :math:`\alpha` also times :math:`(1 - \tau)^q`, which can end at zero; those of h are
    :math:`c_r(\tau)`, of degree 2 in :math:`\tau`, and may be negative, times one factor for all of them in networks with
    normalisation layers, where the second stream is a worse estimate. That is 94 numbers; what they come to is returned by
    `coefficients` and printed by `table`. A fresh optimizer is Adam with ``initial_learning_rate`` on the ordinary gradient, up
    to small terms (`INITIAL`).

    Args:
        gradient_source: what the rule reads: ``"gradient+perturbed_factors"``, ``"gradient+adversarial_estimate"`` and
            ``"gradient+adversarial_tangent"`` are two streams (:class:`metarobust.types.Streams`, see :func:`record_factors`),
            ``"gradient"`` is one, without c. Stored in the checkpoint and checked on use.
        initial_learning_rate: :math:`\alpha` before meta-training, for a fan-in of 64.

    Example:
        >>> from metarobust.models import mlp
        >>> model = mlp([4, 3, 2])
        >>> rule = InterpretableOptimizer(gradient_source="gradient")
        >>> optimizer = rule.torch_optimizer(model.parameters(), total_steps=10)
        >>> model(torch.rand(5, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> round(rule.coefficients(role="first dense", fan_in=64, time=0.5)["adam"], 6)
        0.003
    """

    State = InterpretableState

    def __init__(self, *, gradient_source: str = "gradient+perturbed_factors", initial_learning_rate: float = 3e-3) -> None:
        super().__init__()
        choice("gradient_source", gradient_source, GRADIENT_SOURCES)
        finite("initial_learning_rate", initial_learning_rate, above=0.0)
        self.settings: dict[str, Any] = {
            "gradient_source": gradient_source,
            "initial_learning_rate": initial_learning_rate,
        }
        self.record: dict[str, Any] = {}
        """How this optimizer was trained: written by ``meta_train``, kept in the checkpoint."""
        self.gradient_source = gradient_source
        initial = {"adam": initial_learning_rate, **INITIAL}
        self.register_buffer("initial", torch.tensor([initial[term] for term in TERMS], dtype=torch.float64).log())
        self.log_coefficient = nn.Parameter(torch.zeros(len(TERMS), len(ROLES), 2))
        self.fan_in_power = nn.Parameter(torch.zeros(len(TERMS)))
        self.fall = nn.Parameter(torch.zeros(()))
        self.factor_coefficient = nn.Parameter(torch.zeros(len(ROLES), 3)) if self.two_streams else None
        self.normalised_factor = nn.Parameter(torch.zeros(())) if self.two_streams else None
        self.register_load_state_dict_pre_hook(_without_fall)

    initial: Tensor

    def initial_state(self, rows: Tensor) -> InterpretableState:
        """The state before the first step, for parameters ``rows [copies, coordinates]``."""
        return InterpretableState(torch.zeros_like(rows), torch.zeros_like(rows), torch.zeros((), dtype=torch.int64))

    def step(
        self,
        g: Tensor,
        h: Tensor | None,
        state: InterpretableState,
        parameters: Tensor,
        layout: Layout,
        *,
        total_steps: int,
    ) -> tuple[Tensor, InterpretableState]:
        """One update for all coordinates of all tensors and copies at once, all ``[copies, coordinates]``.

        Args:
            g: the gradient.
            h: the second stream, or None for a rule with one.
            state: an `InterpretableState`; it is not changed.
            parameters: before the update.
            layout: which coordinate belongs to which tensor.
            total_steps: the number of steps planned, T.
        """
        step = int(state.step) + 1
        g, h = checked_streams(self, g, h)
        terms, factors = self._by_tensor(layout, time_basis(step, total_steps, self.log_coefficient))
        u = g if h is None or factors is None else g + layout.spread(factors).to(g.dtype) * h
        momentum = torch.lerp(state.momentum, u, 1 - FAST)
        square = torch.lerp(state.square, u * u, 1 - SECOND)
        mean = momentum / (1 - FAST**step)
        adam = mean / (root(square / (1 - SECOND**step)) + 1e-8)
        pieces = []
        for number, (direction, slow, weight) in enumerate(
            zip(*(rows.split(layout.sizes, dim=1) for rows in (adam, mean, parameters)), strict=True)
        ):
            rate, drift, decay, shrink = terms[:, number].to(g.dtype)
            reach = SHRINK_SCALE * layout.roles[number].fan_in ** 0.5
            pieces.append(-(rate * direction + drift * slow + decay * weight + shrink * F.softsign(reach * weight)))
        return torch.cat(pieces, dim=1), InterpretableState(momentum, square, state.step + 1)

    @property
    def adds_streams(self) -> bool:
        """Whether there are two streams; it follows g + c h and nothing else."""
        return self.two_streams

    @torch.no_grad()
    def combining_coefficients(self, layout: Layout, *, step: int, total_steps: int) -> list[float] | None:
        """c of each tensor of ``layout`` in a ``step``, from 1, of ``total_steps``."""
        factors = self._by_tensor(layout, time_basis(step, total_steps, self.log_coefficient))[1]
        return None if factors is None else factors.tolist()

    def steps_in_place(self, parameters: Sequence[Tensor]) -> bool:
        """Whether `step_in_place` can take these ``parameters``: always."""
        return True

    @torch.no_grad()
    def step_in_place(
        self,
        parameters: Sequence[Tensor],
        g: Sequence[Tensor],
        h: Sequence[Tensor | None] | None,
        state: InterpretableState,
        layout: Layout,
        *,
        total_steps: int,
        lr: float,
    ) -> InterpretableState:
        """`step` times ``lr``, written into ``parameters`` and into the tensors of ``state``: no graph, no copies of either.

        Where an entry of ``h`` is None, that of ``g`` is the combined stream already.

        For tensors of the rule's own dtype; equal to `step` up to rounding.

        Args:
            parameters, g, h, state, layout, total_steps: as in `step`, the first three as one tensor per parameter.
            lr: factor on the update.
        """
        step = int(state.step) + 1
        terms, factors = self._by_tensor(layout, time_basis(step, total_steps, self.log_coefficient))
        coefficients = [] if factors is None else factors.tolist()  # one transfer from a GPU, not one per tensor
        first, root_of_second = 1 - FAST**step, math.sqrt(1 - SECOND**step)
        moments = (state.momentum.view(-1).split(layout.sizes), state.square.view(-1).split(layout.sizes))
        rows = zip(parameters, g, *moments, terms.T.tolist(), layout.roles, strict=True)
        for number, (p, gradient, momentum, square, (rate, drift, decay, shrink), role) in enumerate(rows):
            second = None if h is None else h[number]
            u = gradient if second is None else torch.add(gradient, second, alpha=coefficients[number])
            u = u.clamp(-LARGEST, LARGEST) if u is gradient else u.clamp_(-LARGEST, LARGEST)
            mean, mean_square = momentum.view(p.shape), square.view(p.shape)
            mean.lerp_(u, 1 - FAST)
            mean_square.mul_(SECOND).addcmul_(u, u, value=1 - SECOND)
            scale = torch.sqrt(mean_square, out=u).div_(root_of_second).add_(1e-8)
            reach = SHRINK_SCALE * role.fan_in**0.5
            below = p.abs().mul_(reach).add_(1)
            update = torch.div(p, below, out=below).mul_(-lr * shrink * reach)
            update.add_(p, alpha=-lr * decay).addcdiv_(mean, scale, value=-lr * rate / first).add_(
                mean, alpha=-lr * drift / first
            )
            p.add_(update)
        return InterpretableState(state.momentum, state.square, state.step + 1)

    @torch.no_grad()
    def coefficients(self, *, role: str, fan_in: int, time: float) -> dict[str, float]:
        """The coefficients of a tensor: ``"adam"``, ``"momentum"``, ``"l2"``, ``"l1"`` and, with two streams, ``"factor"``.

        Args:
            role: one of ``metarobust.meta_optimizers.ROLES``, as ``"inner convolution"``.
            fan_in: inputs of one output of the layer.
            time: relative time in [0, 1].
        """
        choice("role", role, ROLES)
        integer("fan_in", fan_in, least=1)
        finite("time", time, least=0.0)
        basis = time_basis(1 + round(1_000_000 * min(1.0, time)), 1_000_001, self.log_coefficient.detach())
        place = ROLES.index(role)
        found = self._terms(basis)[:, place] + self._fan_in(torch.tensor([float(fan_in)]))[:, 0]
        told: dict[str, float] = dict(zip(TERMS, (found.exp() * self._falling(basis)[:, 0]).tolist(), strict=True))
        if self.factor_coefficient is not None:  # in networks without normalisation
            told["factor"] = (COEFFICIENT_SPEED * (self.factor_coefficient[place] @ basis)).item()
        return told

    def table(self, *, fan_in: int = 64) -> str:
        """The coefficients of every role, for ``fan_in``, at the beginning, the middle and the end, as a table in Markdown.

        Factors are those of networks without normalisation; a last line tells what they are multiplied by in others.
        """
        names = [*TERMS, *(["factor"] if self.two_streams else [])]
        lines = ["| role | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
        for role in ROLES:
            found = [self.coefficients(role=role, fan_in=fan_in, time=time) for time in (0.0, 0.5, 1.0)]
            lines.append(f"| {role} | " + " | ".join(", ".join(f"{at[name]:.2g}" for at in found) for name in names) + " |")
        if self.normalised_factor is not None:
            factor = (LOG_SPEED * self.normalised_factor).exp().item()
            lines += ["", f"In networks with normalisation, factors are multiplied by {factor:.2g}."]
        return "\n".join(lines)

    def knobs(self) -> dict[str, tuple[float, dict[str, Tensor]]]:
        """Named directions for ``meta_search``: a typical spread, and by parameter the move of a unit along the direction.

        Units: logarithms of learning rate, weight decay, L1 penalty and of the factor on all coefficients of the second stream in
        networks with normalisation; plain numbers for those coefficients themselves.
        The slopes add their value at the end of training and take it away at the beginning; the fall is the power of the time
        that is left, 1 for a linear fall to zero; the learning rate's power of the fan-in leaves a fan-in of 64 alone.
        """

        def single(parameter: Tensor, scale: float, place: tuple[Any, ...]) -> Tensor:
            move = torch.zeros_like(parameter)
            move[place] = 1 / scale
            return move

        groups = {
            "first": [i for i, role in enumerate(ROLES) if role.startswith("first")],
            "inner": [i for i, role in enumerate(ROLES) if role.startswith("inner")],
            "last": [i for i, role in enumerate(ROLES) if role.startswith("last")],
            "biases and normalisations": [i for i, role in enumerate(ROLES) if role in ("bias", "normalisation")],
        }
        weights = groups["first"] + groups["inner"] + groups["last"]
        logs, (adam, l2, l1) = self.log_coefficient, (TERMS.index(term) for term in ("adam", "l2", "l1"))
        everywhere = slice(None)
        found: dict[str, tuple[float, dict[str, Tensor]]] = {
            "learning rate": (0.4, {"log_coefficient": single(logs, LOG_SPEED, (adam, everywhere, 0))}),
            "learning rate, slope": (0.6, {"log_coefficient": single(logs, LOG_SPEED, (adam, everywhere, 1))}),
            "learning rate, fall": (0.3, {"fall": torch.ones_like(self.fall)}),
            "learning rate, fan-in": (0.2, {"fan_in_power": single(self.fan_in_power, 1.0, (adam,))}),
            "weight decay": (1.5, {"log_coefficient": single(logs, LOG_SPEED, (l2, weights, 0))}),
            "l1, first": (1.5, {"log_coefficient": single(logs, LOG_SPEED, (l1, groups["first"], 0))}),
        }
        if self.factor_coefficient is not None:
            for name, roles in groups.items():
                for degree, (suffix, spread) in enumerate((("", 0.25), (", slope", 0.3))):
                    move = single(self.factor_coefficient, COEFFICIENT_SPEED, (roles, degree))
                    found[f"factor, {name}{suffix}"] = (spread, {"factor_coefficient": move})
            assert self.normalised_factor is not None
            single_number = torch.full_like(self.normalised_factor, 1 / LOG_SPEED)
            found["factor, networks with normalisation"] = (0.3, {"normalised_factor": single_number})
        return found

    @torch.no_grad()
    def turn(self, by: Mapping[str, float]) -> None:
        """Move this rule along its :meth:`knobs`, in place; ``by`` holds a distance per name.

        Example:
            >>> rule = InterpretableOptimizer()
            >>> rule.turn({"learning rate": math.log(2.0)})
            >>> round(rule.coefficients(role="inner dense", fan_in=64, time=0.5)["adam"], 6)
            0.006
        """
        available, parameters = self.knobs(), dict[str, Tensor](self.named_parameters())
        for name, size in by.items():
            choice("by", name, tuple(available))
            for parameter, direction in available[name][1].items():
                parameters[parameter] += size * direction

    def _terms(self, basis: Tensor) -> Tensor:
        """Logarithms of the coefficients for a typical fan-in, ``[terms, roles]``."""
        return self.initial.to(basis.dtype)[:, None] + LOG_SPEED * (self.log_coefficient @ basis[:2])

    def _fan_in(self, fan_in: Tensor) -> Tensor:
        """What a fan-in ``[tensors]`` adds to the logarithms, ``[terms, tensors]``."""
        return self.fan_in_power[:, None] * (fan_in.to(self.fan_in_power) / TYPICAL_FAN_IN).log()

    def _falling(self, basis: Tensor) -> Tensor:
        """What the time that is left makes of the coefficients, ``[terms, 1]``."""
        adam = torch.tensor([[1.0]] + [[0.0]] * (len(TERMS) - 1), dtype=basis.dtype, device=basis.device)
        left = ((1 - basis[1]) / 2).clamp(min=LEAST_LEFT)
        power = torch.where(self.fall >= 0, self.fall, 0.0)  # whose derivative at zero, where it starts, is not zero
        return left ** (adam * power)

    def _by_tensor(self, layout: Layout, basis: Tensor) -> tuple[Tensor, Tensor | None]:
        """Coefficients ``[terms, tensors]`` and those of the second stream ``[tensors]``."""
        roles = torch.tensor([role.role for role in layout.roles], device=basis.device)
        fan_in = torch.tensor([float(role.fan_in) for role in layout.roles], device=basis.device)
        terms = (self._terms(basis)[:, roles] + self._fan_in(fan_in)).exp() * self._falling(basis)
        if self.factor_coefficient is None:
            return terms, None
        factors = COEFFICIENT_SPEED * (self.factor_coefficient @ basis)[roles]
        if self.normalised_factor is not None and any(role.role == NORMALISATION for role in layout.roles):
            factors = factors * (LOG_SPEED * self.normalised_factor).exp()
        return terms, factors

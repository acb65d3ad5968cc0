"""The coordinatewise LSTM meta-optimizer: one small recurrent network, shared by all coordinates of all tensors."""

import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from metarobust._checks import choice, finite, integer, require
from metarobust._tensors import tree_detach
from metarobust.meta_optimizers import _features as features
from metarobust.meta_optimizers._factor_gradients import GRADIENT_SOURCES
from metarobust.meta_optimizers._features import Moments
from metarobust.meta_optimizers._layout import ROLES, Layout
from metarobust.meta_optimizers._lstm_in_place import lstm_step_in_place
from metarobust.meta_optimizers._update_rule import COEFFICIENT_SPEED, UpdateRule, checked_streams

BASES = ("adam", "none")


@cache
def _fused() -> ModuleType | None:
    """The step in three kernels; None where Triton is missing, or cannot be imported (its version 3.2 needs setuptools)."""
    try:
        from metarobust.meta_optimizers import _lstm_fused
    except ImportError:
        return None
    return _lstm_fused


class LSTMState(NamedTuple):
    """Everything an LSTM update rule remembers; a value, never hidden in the module.

    Attributes:
        hidden: ``[layers, units, copies * coordinates]``.
        cell: likewise.
        moments: running means of the streams and their squares, ``[copies, coordinates]`` each.
        step: count of updates, a scalar int64 tensor on the CPU.
    """

    hidden: Tensor
    cell: Tensor
    moments: Moments
    step: Tensor

    def detach(self) -> "LSTMState":
        """The same state cut from the graph: what every truncation must call."""
        return cast("LSTMState", tree_detach(self))

    def to_dict(self) -> dict[str, Any]:
        """The tensors by name, those of the moments too."""
        moments = {f"moment_{name}": value for name, value in self.moments._asdict().items()}
        return {"hidden": self.hidden, "cell": self.cell, "step": self.step, **moments}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "LSTMState":
        """The inverse of `to_dict`, whose result ``found`` is."""
        moments = Moments(**{name: found[f"moment_{name}"] for name in Moments._fields})
        return cls(found["hidden"], found["cell"], moments, torch.as_tensor(found["step"], dtype=torch.int64))


class LSTMOptimizer(UpdateRule):
    r"""A learned update rule, applied to every coordinate alike (Andrychowicz et al., 2016; Serban et al., 2020).

    With ``base="adam"`` the network corrects an Adam step on the combined stream :math:`g + c h`,

    .. math:: \Delta\theta = -\eta_r(\tau)\, e^{o_1} \frac{m_g + c\, m_h}{\sqrt{v(c)}} + s\, o_2, \qquad
              c = c_r(\tau) + o_3,

    where :math:`o_1, o_2, o_3` are the network's outputs for the coordinate, :math:`\eta_r` and :math:`c_r` are learned
    functions of relative time :math:`\tau = t/T` for each tensor role r, and :math:`v(c)` is the exact second moment of the
    combined stream at the current c. A fresh optimizer is Adam with ``initial_learning_rate`` on the ordinary gradient, up to
    the network's small random outputs. With ``base="none"`` the update is :math:`s\, o_2` alone, as in both papers.

    Args:
        gradient_source: what the rule reads: ``"gradient+perturbed_factors"``, ``"gradient+adversarial_estimate"`` and
            ``"gradient+adversarial_tangent"`` are two streams (:class:`metarobust.types.Streams`, see ``record_factors``),
            ``"gradient"`` is one. Stored in the checkpoint and checked on use.
        hidden_size: LSTM units per coordinate.
        layers: stacked LSTM cells.
        preprocessing: ``"full"`` (log-sign, Adam, parameter, tensor and time features), ``"log_sign"`` or ``"multiply"``
            (the two of the paper's code, with k = 20).
        base: ``"adam"`` or ``"none"``.
        output_scale: s above.
        initial_learning_rate: of the Adam base, before meta-training.

    Example:
        >>> from metarobust.models import mlp
        >>> model = mlp([4, 3, 2])
        >>> optimizer = LSTMOptimizer(gradient_source="gradient").torch_optimizer(model.parameters(), total_steps=10)
        >>> model(torch.rand(5, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    State = LSTMState

    def __init__(
        self,
        *,
        gradient_source: str = "gradient+perturbed_factors",
        hidden_size: int = 8,
        layers: int = 1,
        preprocessing: str = "full",
        base: str = "adam",
        output_scale: float = 0.01,
        initial_learning_rate: float = 3e-3,
    ) -> None:
        super().__init__()
        choice("gradient_source", gradient_source, GRADIENT_SOURCES)
        choice("preprocessing", preprocessing, features.PREPROCESSINGS)
        choice("base", base, BASES)
        integer("hidden_size", hidden_size, least=1)
        integer("layers", layers, least=1)
        finite("output_scale", output_scale, above=0.0)
        finite("initial_learning_rate", initial_learning_rate, above=0.0)
        require(
            gradient_source == "gradient" or (preprocessing == "full" and base == "adam"),
            "gradient_source",
            "'gradient' unless preprocessing is 'full' and base is 'adam'",
            repr(gradient_source),
        )
        self.settings: dict[str, Any] = {
            "gradient_source": gradient_source,
            "hidden_size": hidden_size,
            "layers": layers,
            "preprocessing": preprocessing,
            "base": base,
            "output_scale": output_scale,
            "initial_learning_rate": initial_learning_rate,
        }
        self.record: dict[str, Any] = {}
        """How this optimizer was trained: written by ``meta_train``, kept in the checkpoint."""
        self.gradient_source = gradient_source
        self.hidden_size, self.layers = hidden_size, layers
        self.preprocessing, self.base, self.output_scale = preprocessing, base, output_scale
        self.initial_learning_rate = initial_learning_rate

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(hidden_size))

        full = preprocessing == "full"
        inputs = features.dynamic_count(preprocessing, two_streams=self.two_streams)
        self.input_weight = uniform(4 * hidden_size, inputs + (features.STATIC_COUNT if full else 0))
        self.time_weight = uniform(4 * hidden_size, 3) if full else None
        self.recurrent_weight = uniform(layers, 4 * hidden_size, hidden_size)
        self.between_weight = uniform(layers - 1, 4 * hidden_size, hidden_size) if layers > 1 else None
        self.bias = nn.Parameter(torch.zeros(layers, 4 * hidden_size))
        with torch.no_grad():
            self.bias[:, hidden_size : 2 * hidden_size] = 1  # gates that begin by remembering
        outputs = 1 if base == "none" else 3 if self.two_streams else 2
        self.readout = nn.Parameter(0.01 * torch.randn(outputs, hidden_size))
        self.log_learning_rate = nn.Parameter(torch.zeros(len(ROLES), 3)) if base == "adam" else None
        self.factor_coefficient = nn.Parameter(torch.zeros(len(ROLES), 3)) if self.two_streams else None

    @classmethod
    def serban2020(cls) -> Self:
        """The network of the paper's code: two cells of 20 units, features ``[20 g, clamp(g e^20)]``, update 0.01 * output.

        Its training schedule is ``MetaTrainingSettings.serban2020``.
        """
        return cls(
            gradient_source="gradient",
            hidden_size=20,
            layers=2,
            preprocessing="multiply",
            base="none",
            output_scale=0.01,
        )

    def initial_state(self, rows: Tensor) -> LSTMState:
        """The state before the first step, for parameters ``rows [copies, coordinates]``."""
        hidden, cell = (rows.new_zeros(self.layers, self.hidden_size, rows.numel()) for _ in range(2))
        moments = features.initial_moments(rows.detach(), two_streams=self.two_streams)
        return LSTMState(hidden, cell, moments, torch.zeros((), dtype=torch.int64))

    def step(
        self,
        g: Tensor,
        h: Tensor | None,
        state: LSTMState,
        parameters: Tensor,
        layout: Layout,
        *,
        total_steps: int,
    ) -> tuple[Tensor, LSTMState]:
        """One update for all coordinates of all tensors and copies at once, all ``[copies, coordinates]``.

        Args:
            g: the gradient.
            h: the second stream, or None for a rule with one.
            state: an `LSTMState`; it is not changed.
            parameters: before the update.
            layout: which coordinate belongs to which tensor.
            total_steps: the number of steps planned, T.
        """
        step = int(state.step) + 1
        g, h = checked_streams(self, g, h)
        moments = features.update_moments(state.moments, g, h)
        rows = features.dynamic_rows(self.preprocessing, g, h, moments, parameters, layout, step)
        static = features.static_rows(layout, g.dtype, g.device)
        basis = features.time_basis(step, total_steps, g)
        bias = self.bias[0]
        inputs = [torch.stack(rows).flatten(1)]
        if self.time_weight is not None:
            inputs.append(static.repeat(1, layout.copies))
            bias = bias + self.time_weight @ basis
        hidden, cell = self._cells(inputs, bias, state)
        outputs = (self.readout @ hidden[-1]).reshape(-1, *g.shape)
        new_state = LSTMState(hidden, cell, moments, state.step + 1)
        if self.base == "none":
            return self.output_scale * outputs[0], new_state
        assert self.log_learning_rate is not None
        one_hot = static[: len(ROLES)]
        rate = (self.log_learning_rate @ basis) @ one_hot + outputs[0]
        coefficient = None
        if self.factor_coefficient is not None:
            coefficient = COEFFICIENT_SPEED * (self.factor_coefficient @ basis) @ one_hot + outputs[2]
        direction = features.adam_direction(moments, coefficient, step)
        update = self.output_scale * outputs[1] - self.initial_learning_rate * rate.exp() * direction
        return update, new_state

    def steps_in_place(self, parameters: Sequence[Tensor]) -> bool:
        """Whether `step_in_place` takes these ``parameters``: contiguous; a rule of all features and an Adam base.

        On a CPU always, on a GPU in float32 where Triton can compile for it; a warning says why it cannot.
        """
        made_for = self.preprocessing == "full" and self.base == "adam"
        devices = {p.device for p in parameters} | {self.bias.device}
        if not made_for or len(devices) > 1 or not all(p.is_contiguous() for p in parameters):
            return False
        return self.bias.device.type == "cpu" or (self.bias.device.type == "cuda" and self._fuses(parameters))

    def _fuses(self, parameters: Sequence[Tensor]) -> bool:
        fused = _fused()
        if fused is None or any(p.dtype != torch.float32 for p in (self.bias, *parameters)):
            return False
        return self.hidden_size <= fused.MOST_UNITS and fused.runs(self)

    def step_in_place(
        self,
        parameters: Sequence[Tensor],
        g: Sequence[Tensor],
        h: Sequence[Tensor | None] | None,
        state: LSTMState,
        layout: Layout,
        *,
        total_steps: int,
        lr: float,
    ) -> LSTMState:
        """`step` times ``lr``, written into ``parameters`` and into the tensors of ``state``: equal to it up to rounding.

        Args:
            parameters, g, h, state, layout, total_steps: as in `step`, the first three as one tensor per parameter.
            lr: factor on the update.
        """
        if parameters[0].device.type == "cpu":
            return lstm_step_in_place(self, parameters, g, h, state, layout, total_steps=total_steps, lr=lr)
        return cast("ModuleType", _fused()).lstm_step_fused(self, parameters, g, h, state, layout, total_steps=total_steps, lr=lr)

    def _cells(self, inputs: list[Tensor], bias: Tensor, state: LSTMState) -> tuple[Tensor, Tensor]:
        """All stacked cells once, units first: ``inputs [features, n] -> hidden, cell [layers, units, n]``.

        Written out, because the fused cells have no second derivative. The bias enters as the weight of a row of ones: one
        matrix product per cell, and no broadcast copy in either direction.
        """
        hiddens, cells = [], []
        ones = torch.ones_like(inputs[0][:1])
        weight = self.input_weight
        for layer in range(self.layers):
            if layer and self.between_weight is not None:
                weight, bias, inputs = self.between_weight[layer - 1], self.bias[layer], [hiddens[-1]]
            joined = torch.cat([weight, self.recurrent_weight[layer], bias[:, None]], dim=1)
            gates = joined @ torch.cat([*inputs, state.hidden[layer], ones])
            size = self.hidden_size
            openings, candidate = gates.split([3 * size, size])
            enter, keep, leave = openings.sigmoid().split(size)
            cells.append(torch.addcmul(keep * state.cell[layer], enter, candidate.tanh()))
            hiddens.append(leave * cells[-1].tanh())
        return torch.stack(hiddens), torch.stack(cells)

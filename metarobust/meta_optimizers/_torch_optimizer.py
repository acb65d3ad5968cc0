"""A learned update rule behind the interface of ``torch.optim``."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from metarobust._checks import finite, integer, message, require
from metarobust.meta_optimizers._factor_recorder import FactorRecorder
from metarobust.meta_optimizers._gradient_origin import Origin, belongs_to_gradient
from metarobust.meta_optimizers._kinds import MetaOptimizer, check_meta_optimizer
from metarobust.meta_optimizers._layout import layout_of
from metarobust.meta_optimizers._training_record import covers
from metarobust.threat_models import ThreatModel


class LearnedOptimizer(torch.optim.Optimizer):
    """A frozen meta-optimizer as a ``torch.optim.Optimizer``: parameter groups, ``state_dict``, schedulers, ``zero_grad``.

    ``step`` reads what `record_factors` filled: ``.grad`` alone for a rule with one stream or one that adds its two, and
    ``.second_grad`` beside it for others. The tensors of one group are read as one network, in their order.

    Args:
        params: parameters or parameter groups; a group may have its own ``lr`` and ``total_steps``.
        meta_optimizer: the learned rule; its parameters are left as they are.
        total_steps: the number of steps planned; relative time is clipped at 1.
        lr: factor on the learned update, 1 by default; this is what learning-rate schedulers move.
        threat_model: for ``record_factors``, where that is not given another; ``training.fit`` needs it for a second stream.

    Raises:
        ValueError: on ``step``, a stream that the meta-optimizer was trained with is missing.

    Example:
        >>> import torch.nn.functional as F
        >>> from metarobust.meta_optimizers import LSTMOptimizer
        >>> from metarobust.models import mlp
        >>> model, x, y = mlp([4, 3, 2]), torch.rand(8, 4), torch.randint(2, (8,))
        >>> optimizer = LSTMOptimizer().torch_optimizer(model.parameters(), total_steps=100)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     with optimizer.record_factors(model) as recorder:
        ...         recorder.backward(F.cross_entropy(model(x), y))
        ...     _ = optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        meta_optimizer: MetaOptimizer,
        *,
        total_steps: int,
        lr: float = 1.0,
        threat_model: ThreatModel | None = None,
    ) -> None:
        integer("total_steps", total_steps, least=1)
        finite("lr", lr, least=0.0)
        if threat_model is not None and not isinstance(threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel or None", repr(threat_model)))
        check_meta_optimizer(meta_optimizer)
        if isinstance(params, torch.nn.Module):
            raise TypeError(message("params", "parameters", type(params).__name__, "write model.parameters()"))
        params = list(params)
        require(len(params) > 0, "params", "at least one parameter", "none", "write model.parameters()")
        self.meta_optimizer, self.threat_model, self._warned = meta_optimizer, threat_model, False
        super().__init__(params, {"lr": lr, "total_steps": total_steps})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset ``.grad`` and the second stream of every parameter."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                for name in ("second_grad", "second_grad_origin"):
                    if getattr(p, name, None) is not None:
                        setattr(p, name, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every group; a closure, when given, is run first with gradients enabled."""
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None for p in group["params"]):
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = group["params"]
        layout = layout_of(tuple(p.shape for p in params), False)
        own = next(self.meta_optimizer.parameters())  # the rule computes in its own precision, whatever the model's
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        seconds = [self._second_stream(p) for p in params] if self.meta_optimizer.two_streams else None
        # The state of a group sits under its first parameter, where `state_dict` of torch.optim looks for it.
        holder = self.state[params[0]]
        if not holder:
            holder.update(self.meta_optimizer.initial_state(layout.pack(params).to(own.dtype)).to_dict())
        for name, value in holder.items():  # `load_state_dict` casts to the precision of the parameters
            if isinstance(value, Tensor) and value.is_floating_point():
                holder[name] = value.to(own.dtype)
        state: Any = self.meta_optimizer.State.from_dict(holder)
        total_steps = group["total_steps"]
        if all(p.dtype == own.dtype for p in params) and self.meta_optimizer.steps_in_place(params):
            left = [(p, p.clone()) for p in params if p.grad is None]  # as in torch.optim: no gradient, no step
            state = self.meta_optimizer.step_in_place(
                params, gradients, seconds, state, layout, total_steps=total_steps, lr=group["lr"]
            )
            holder.update(state.to_dict())
            for p, before in left:
                p.copy_(before)
            return
        g = layout.pack(gradients).to(own.dtype)
        h = None
        if seconds is not None:  # what is combined already has nothing to add
            present = [torch.zeros_like(p) if s is None else s for p, s in zip(params, seconds, strict=True)]
            h = layout.pack(present).to(own.dtype)
        rows = layout.pack(params).to(own.dtype)
        updates, state = self.meta_optimizer.step(g, h, state, rows, layout, total_steps=total_steps)
        holder.update(state.to_dict())
        for p, update in zip(params, layout.unpack(updates), strict=True):
            if p.grad is not None:
                p.add_(update.to(p.dtype), alpha=group["lr"])

    def _second_stream(self, p: Tensor) -> Tensor | None:
        """The second stream of a parameter; None where the gradient is the combined one already, or missing."""
        if p.grad is None:
            return None
        if belongs_to_gradient(p):
            origin: Origin = cast("Any", p).second_grad_origin
            self._compare(origin.threat_model, origin.gradient_source)
            if self.meta_optimizer.adds_streams or not origin.combined:
                return cast("Any", p).second_grad
        raise ValueError(
            message(
                "parameters",
                "with a second gradient stream (.second_grad), which this meta-optimizer was trained on",
                "gradients that were computed without it",
                "write `with optimizer.record_factors(model, threat_model=...) as recorder: recorder.backward(loss)`",
            )
        )

    def _compare(self, used: ThreatModel, gradient_source: str) -> None:
        own = self.meta_optimizer.gradient_source
        remedy = "write optimizer.record_factors(model, threat_model=...), which takes the right one"
        require(
            gradient_source == own,
            "record_factors",
            f"with gradient_source={own!r}, which this meta-optimizer reads",
            repr(gradient_source),
            remedy,
        )
        trained = self.meta_optimizer.record.get("threat_models")
        if trained is not None and not self._warned and not covers(trained, used):
            self._warned = True
            low, high = trained["epsilon"]
            warnings.warn(
                f"the meta-optimizer was trained with {trained['norm']}, epsilon {low:g} to {high:g} and box {trained['box']}, "
                f"its second stream now comes from {used!r}; pass record_factors the training's unless the difference is meant",
                stacklevel=5,
            )

    def record_factors(
        self, model: nn.Module, *, threat_model: ThreatModel | None = None, generator: torch.Generator | None = None
    ) -> AbstractContextManager[FactorRecorder]:
        """The recorder of what this optimizer reads; see :func:`metarobust.meta_optimizers.record_factors`.

        A rule that reads the sum g + c h alone, as an :class:`InterpretableOptimizer` does, is given it at once, in ``.grad``,
        with the c of the step to come: one weight gradient per layer where the two streams take two (``recorder.gradients`` is
        refused then). Tensors that belong to no group get both streams.

        Args:
            model, threat_model, generator: see :func:`metarobust.meta_optimizers.record_factors`; ``threat_model`` by default
                this optimizer's own.
        """
        coefficients: dict[Tensor, float] = {}
        for group in self.param_groups if self.meta_optimizer.adds_streams else ():
            params = group["params"]
            layout = layout_of(tuple(p.shape for p in params), False)
            step = int(self.state[params[0]].get("step", 0)) + 1
            found = self.meta_optimizer.combining_coefficients(layout, step=step, total_steps=group["total_steps"])
            coefficients |= dict(zip(params, found or [], strict=True))
        ball = self.threat_model if threat_model is None else threat_model
        return self.meta_optimizer.record_factors(
            model, threat_model=ball, coefficients=coefficients or None, generator=generator
        )

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles keep the rule
        return super().__getstate__() | {
            "meta_optimizer": self.meta_optimizer,
            "threat_model": self.threat_model,
            "_warned": self._warned,
        }

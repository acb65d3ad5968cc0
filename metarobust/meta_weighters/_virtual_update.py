"""The next step of a ``torch.optim`` optimizer as a pure function, with the state that the optimizer has now."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from metarobust._checks import message, require


class VirtualUpdate(NamedTuple):
    """The next step of an optimizer, for a tuple of parameters.

    Attributes:
        transformation: of TorchOpt.
        state: to begin with.
    """

    transformation: GradientTransformation
    state: Any


def virtual_update(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> VirtualUpdate:
    r"""What ``optimizer.step()`` would do next, as a TorchOpt transformation that can be differentiated.

    Learning rates, momentum (with dampening and Nesterov's form), weight decay and the running averages are those that the
    optimizer has at this moment, read and not changed. Adam's denominator is :math:`\sqrt{v} + \epsilon` as in torch; where v is
    exactly 0 its derivative, which is infinite, counts as 0.

    Args:
        optimizer: ``torch.optim.SGD``, ``Adam`` (without amsgrad) or ``AdamW`` over at least the parameters.
        parameters: in the order of the tuples that the transformation takes.

    Raises:
        TypeError: another optimizer. For a TorchOpt rule write ``VirtualUpdate(rule, rule.init(parameters))``.
        ValueError: the optimizer does not hold a parameter, or has a setting that is not supported.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> update = virtual_update(optimizer, (weight,))
        >>> gradient = torch.tensor([2.0])
        >>> (step,), _ = update.transformation.update((gradient,), update.state, params=(weight,), inplace=False)
        >>> step
        tensor([-0.2000])
    """
    rules = {torch.optim.SGD: _sgd, torch.optim.Adam: _adam, torch.optim.AdamW: _adam}
    if type(optimizer) not in rules:
        expected = "torch.optim.SGD, Adam or AdamW"
        remedy = "for a TorchOpt rule write VirtualUpdate(rule, rule.init(parameters))"
        raise TypeError(message("optimizer", expected, type(optimizer).__name__, remedy))
    rule = rules[type(optimizer)]
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [i for i, p in enumerate(parameters) if id(p) not in groups]
    require(not missing, "optimizer", "over every parameter of the model", f"none of the parameters {missing}")
    # Copies, because a scheduler writes into the optimizer's own; AdamW marks its groups in newer versions of torch only.
    decoupled = {"decoupled_weight_decay": type(optimizer) is torch.optim.AdamW}
    settings = [{**decoupled, **groups[id(p)], "lr": float(groups[id(p)]["lr"])} for p in parameters]
    for name in ("amsgrad", "maximize"):
        require(not any(group.get(name) for group in settings), f"{name} of the optimizer", "False for a virtual step", True)
    state = tuple({name: _value(v) for name, v in optimizer.state.get(p, {}).items()} for p in cast("Any", parameters))

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = False) -> tuple[Any, Any]:
        del inplace  # never
        found = [rule(g, p, s, group) for g, p, s, group in zip(updates, params, state, settings, strict=True)]
        return tuple(step for step, _ in found), tuple(after for _, after in found)

    def init(params: Any) -> Any:
        return tuple({} for _ in params)

    return VirtualUpdate(GradientTransformation(cast("Any", init), cast("Any", update)), state)


def _value(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _sgd(gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    if group["weight_decay"]:
        gradient = gradient + group["weight_decay"] * parameter
    momentum, direction = group["momentum"], gradient
    if momentum:
        buffer = state.get("momentum_buffer")
        direction = gradient if buffer is None else momentum * buffer + (1 - group["dampening"]) * gradient
        state = {"momentum_buffer": direction}
        if group["nesterov"]:
            direction = gradient + momentum * direction
    return -group["lr"] * direction, state


def _adam(gradient: Tensor, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    rate, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    shrink = torch.zeros_like(parameter)
    if decay and group["decoupled_weight_decay"]:
        shrink = -rate * decay * parameter
    elif decay:
        gradient = gradient + decay * parameter
    steps = int(state.get("step", 0)) + 1
    mean = beta1 * state.get("exp_avg", torch.zeros_like(gradient)) + (1 - beta1) * gradient
    square = beta2 * state.get("exp_avg_sq", torch.zeros_like(gradient)) + (1 - beta2) * gradient.square()
    # Where the average of the squares is 0 the slope of its root is infinite: the outer `where` cuts that branch off.
    moved = square > 0
    root = torch.where(moved, torch.where(moved, square, 1).sqrt(), 0) / (1 - beta2**steps) ** 0.5
    step = -rate / (1 - beta1**steps) * mean / (root + group["eps"])
    return shrink + step, {"step": steps, "exp_avg": mean, "exp_avg_sq": square}

"""The checks of what ``fit`` is given, each failure one sentence before any work."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metarobust import _checks
from metarobust._checks import choice, finite, message, require
from metarobust.data import LabelledImages
from metarobust.evaluation._inputs import placement
from metarobust.meta_optimizers import LearnedOptimizer
from metarobust.objectives import LogitAdjusted

PRECISIONS = ("bfloat16", "float16")


def check_model(model: Any) -> torch.device:
    """Check that ``model`` can be trained; returns its device."""
    if not isinstance(model, nn.Module):
        raise TypeError(message("model", "an nn.Module", repr(model)))
    trainable = [p for p in model.parameters() if p.requires_grad]
    require(
        len(trainable) > 0, "model", "a module with parameters that require a gradient", "none", "write model.requires_grad_()"
    )
    devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    require(len(devices) == 1, "model", "on one device", " and ".join(devices), "write model.to(device)")
    others = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    require(not others, "model", "such that its state_dict holds tensors only", f"something else under {others}")
    return trainable[0].device


def check_data(name: str, data: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
    """``(x, y)`` of ``data``, if the model can be trained on them; what fails is told with ``name`` before it."""
    if isinstance(data, LabelledImages):
        data = (data.images, data.labels)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        remedy = "read a DataLoader into two tensors first, and pass augmentations as augment="
        raise TypeError(message(name, "a pair (x, y) of tensors or a LabelledImages", type(data).__name__, remedy))
    x, y = data
    try:
        _checks.images(x, lower=-math.inf, upper=math.inf)
        require(len(x) > 0, "x", "at least one example", "none")
        device, dtype = placement(model, x)
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != dtype:
            expected = f"of the model's dtype {dtype}, which must be torch.float32 or torch.float64"
            remedy = "write x.to(next(model.parameters()).dtype); for half precision write amp='bfloat16'"
            raise TypeError(message("x", expected, x.dtype, remedy))
        _checks.labels(y, examples=len(x))
        with torch.no_grad():  # a model in evaluation mode: one row is enough for BatchNorm, and dropout draws nothing
            logits = _checks.logits(_checks.called(model, x[:1].to(device)), examples=1)
        _checks.labels(y, examples=len(x), classes=logits.shape[1])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    return x.detach(), y.detach()


def check_objective(objective: Any) -> None:
    """Check that ``objective`` can be called on a batch."""
    if isinstance(objective, type) or not callable(objective):
        raise TypeError(message("objective", "a robust loss", repr(objective), "write AdversarialTraining(attack=PGD(...))"))
    own = isinstance(objective, nn.Module) and any(p.requires_grad for p in objective.parameters())
    if own and not hasattr(objective, "start_epoch"):  # one that is told of epochs trains its parameters itself
        remedy = "write objective.requires_grad_(False); only the model is trained"
        raise ValueError(message("objective", "without parameters of its own", type(objective).__name__, remedy))
    check_takes_generator("objective", objective)


def check_takes_generator(name: str, function: Any) -> None:
    """Check that a loss or an attack can be called with ``generator=``, as far as its signature tells."""
    try:
        parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):
        return
    if "generator" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        remedy = "write def f(model, x, y, *, generator=None)"
        raise TypeError(message(name, "callable as f(model, x, y, generator=...)", repr(function), remedy))


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Check that ``optimizer`` moves exactly the parameters of the model that require a gradient."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        remedy = "write torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)"
        raise TypeError(message("optimizer", "a torch.optim.Optimizer over the model's parameters", repr(optimizer), remedy))
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(message("optimizer", "one whose step() needs no closure", type(optimizer).__name__, "write SGD or Adam"))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers = len(held - {id(p) for p in model.parameters()})
    remedy = "build it after the model is on its device, from model.parameters()"
    require(not strangers, "optimizer", "over parameters of the model", f"{strangers} tensors that are none", remedy)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    remedy = "add them, or freeze them with requires_grad_(False)"
    require(
        not missing, "optimizer", "over every parameter that requires a gradient", f"one without {', '.join(missing)}", remedy
    )
    for group in optimizer.param_groups:
        require("lr" in group, "optimizer", "one with a learning rate 'lr' in each group", f"the entries {sorted(group)}")


def check_second_stream(optimizer: Any, objective: Any, clip_norm: Any, amp: Any) -> None:
    """Check what a learned optimizer with a second stream needs."""
    if not isinstance(optimizer, LearnedOptimizer) or not optimizer.meta_optimizer.two_streams:
        return
    known, remedy = optimizer.threat_model is not None, "write torch_optimizer(..., threat_model=ThreatModel(...))"
    require(known, "optimizer", "one that knows the ball of its second stream", "threat_model=None", remedy)
    source = optimizer.meta_optimizer.gradient_source
    while objective is not None and source != "gradient+perturbed_factors":
        expected, remedy = f"one of the model's own logits for {source!r}", "leave LogitAdjusted out, or take another optimizer"
        require(not isinstance(objective, LogitAdjusted), "objective", expected, "one of adjusted logits", remedy)
        objective = getattr(objective, "robust_loss", None)
    if optimizer.meta_optimizer.adds_streams:
        return
    rule = f"{type(optimizer.meta_optimizer).__name__}, which reads two streams apart"
    require(clip_norm is None, "clip_norm", f"None for an {rule}", clip_norm, "leave it out: the rule clamps its updates")
    require(amp != "float16", "amp", f"False or 'bfloat16' for an {rule}", repr(amp), "write amp='bfloat16'")


def check_schedule(schedule: Callable[[float], float] | None, steps: int) -> tuple[float, ...]:
    """The factors at the run's steps, or at a thousand of them or more, if each is a finite number >= 0."""
    if schedule is None:
        return ()
    if not callable(schedule):
        raise TypeError(message("schedule", "a function from progress in [0, 1) to a factor", repr(schedule), "write cosine"))
    factors = tuple(schedule(step / steps) for step in range(0, steps, max(1, steps // 1000)))
    for factor in factors:
        finite("schedule's factor", factor, least=0.0)
    return factors


def check_precision(amp: Any, device: torch.device) -> str | None:
    """The name of the dtype that ``torch.autocast`` shall use, None without."""
    if amp is False or amp is None:
        return None
    if amp is True:
        raise TypeError(message("amp", "False, 'bfloat16' or 'float16'", amp, "write amp='bfloat16'"))
    choice("amp", amp, PRECISIONS)
    if amp == "float16" and device.type != "cuda":
        raise ValueError(message("amp", "'bfloat16' or False on this device", f"'float16' on {device}", "write amp='bfloat16'"))
    return amp

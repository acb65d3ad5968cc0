"""What the reliability checks share: a doubt, the examples they look at, and a model left as it was found."""

import dis
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metarobust.attacks._common import buffers_kept
from metarobust.types import Model

CHECKED_EXAMPLES = 100
DEEPEST, MOST = 4, 500


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """One reason to doubt a robustness number; ``docs/trust.md`` has a section per ``check``.

    Attributes:
        check: stable identifier, for example ``"shattered_gradients"``.
        reason: what was seen, with the measured figure.
        remedy: what to do or write instead.

    Example:
        >>> print(Doubt(check="few_examples", reason="there are 12 examples", remedy="take more"))
        there are 12 examples; take more
    """

    check: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


def percent(share: float) -> str:
    """``0.004 -> "0.4 %"``, ``0.25 -> "25 %"``."""
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def spread_rows(x: Tensor, y: Tensor, most: int = CHECKED_EXAMPLES) -> tuple[Tensor, Tensor]:
    """At most so many examples, evenly over the data, which may be sorted by class; outside of any inference mode."""
    if len(x) > most:
        rows = torch.linspace(0, len(x) - 1, most, device=x.device).long()
        x, y = x[rows], y[rows]
    x, y = (t.clone() if t.is_inference() else t for t in (x, y))
    return x.detach(), y


@contextmanager
def left_alone(model: Model, x: Tensor) -> Iterator[list[nn.Module]]:
    """Give the buffers of modules in training mode, and the global random state, back at the end; yields the modules found.

    A checked model may draw random numbers, and a module in training mode moves its statistics: neither may outlive a check.
    """
    modules = modules_behind(model)
    with ExitStack() as kept:
        kept.enter_context(torch.random.fork_rng(devices=[x.device] if x.is_cuda else []))
        for module in modules:
            if module.training:
                kept.enter_context(buffers_kept(module))
        yield modules


def modules_behind(model: Model) -> list[nn.Module]:
    """Every ``nn.Module`` that a callable can be seen to hold, children included.

    Followed are bound methods, ``functools.partial``, closures, default arguments, the globals that a function reads, the
    attributes of a callable object, and containers of these, a few levels deep.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    queue: deque[tuple[Any, int]] = deque([(model, 0)])
    while queue and len(seen) < MOST:
        thing, depth = queue.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found.update((id(module), module) for module in thing.modules())
        if depth < DEEPEST:
            queue.extend((part, depth + 1) for part in _parts(thing))
    return list(found.values())


def _parts(thing: Any) -> Iterable[Any]:
    if isinstance(thing, (list, tuple, set)):
        return thing
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, FunctionType):
        return _read_by(thing)
    if isinstance(thing, nn.Module):
        # Registered children are found by modules(). A list or an object kept aside (a teacher, a trainer) need not be part of
        # the forward pass; a function most probably is.
        return [value for value in vars(thing).values() if isinstance(value, (FunctionType, MethodType, partial))]
    if isinstance(thing, (type, ModuleType, Tensor, str, bytes)) or not hasattr(thing, "__dict__"):
        return []
    return vars(thing).values()


def _read_by(function: FunctionType) -> list[Any]:
    """Cells, defaults, and the modules, functions and containers among the globals that are loaded."""
    parts: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # an empty cell: the name is bound later
            continue
    names = {step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL"}
    read = (function.__globals__.get(name) for name in names)
    parts += [value for value in read if isinstance(value, (nn.Module, FunctionType, MethodType, partial, list, tuple, dict))]
    return parts

"""An attack of another library as one of this library's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from metarobust._checks import finite, message, require
from metarobust._tensors import seeded
from metarobust.attacks._common import buffers_kept, checked
from metarobust.attacks._counting import record_call
from metarobust.threat_models import ThreatModel
from metarobust.types import Model

Find = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What another library finds, checked against the ball, as an attack for objectives, `evaluate`, `WorstCase` and counts.

    torchattacks binds its model when it is built, foolbox wraps it (and moves it to a GPU unless told where it is); both are
    written in one expression:

    - ``find=lambda model, x, y: torchattacks.PGD(model, eps=8 / 255)(x, y)``
    - ``find=lambda model, x, y: LinfPGD()(PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=8 / 255)[1]``

    The other way round nothing is needed: ``functools.partial(attack, model)`` is called with ``x, y`` as an attack of
    torchattacks is, and ``attack(foolbox_model, x, y)`` runs on Foolbox's wrapped model (docs/how-to/interoperate.md).

    Around the call the model keeps mode, buffers and ``.grad``, and ``find`` gets an ``nn.Module`` in evaluation mode whatever
    callable the model is. Points within ``tolerance`` of the ball are projected onto it; others are refused, since another
    library's epsilon is easily in other units.

    Args:
        threat_model: the ball and box that the points must lie in.
        find: ``find(model, x, y) -> x_adv``, shaped like ``x``. Randomness from torch's global CPU generator is drawn from the
            ``generator`` of the call; other sources of it are the library's own affair.
        tolerance: largest distance beyond epsilon, and beyond the box, that counts as rounding, in input units.

    A call takes ``x [batch, ...]`` in input units and ``y [batch]`` int64.

    Raises:
        TypeError: ``find`` cannot be called, or returns no tensor.
        ValueError: on a call, points of another shape, NaN, or outside of ball and box.

    Example:
        >>> ball = ThreatModel(norm="linf", epsilon=0.1)
        >>> shade = Adapted(threat_model=ball, find=lambda model, x, y: (x - 0.1).clamp(0, 1))
        >>> shade(lambda x: x, torch.tensor([[0.55, 0.05]]), torch.tensor([0]))
        tensor([[0.4500, 0.0000]])
    """

    threat_model: ThreatModel
    find: Find
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not isinstance(self.threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel", repr(self.threat_model)))
        if isinstance(self.find, type) or not callable(self.find):
            remedy = "write lambda model, x, y: torchattacks.PGD(model, eps=8 / 255)(x, y)"
            raise TypeError(message("find", "a function of model, x and y", repr(self.find), remedy))
        finite("tolerance", self.tolerance, least=0.0)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x_adv``, shaped like ``x``, detached, inside ball and box."""
        x, y = checked(self.threat_model, model, x, y)
        record_call(len(x))
        if len(x) == 0:
            return x.clone()
        drawing = nullcontext() if generator is None else seeded(generator)
        with buffers_kept(model), _lent(model, x) as module, drawing:
            found = self.find(module, x.clone(), y)
        if not isinstance(found, Tensor):
            raise TypeError(message("find", "a function that returns the moved examples", type(found).__name__))
        require(found.shape == x.shape, "find", f"a function that returns {list(x.shape)}", list(found.shape))
        found = found.detach().to(x)
        require(bool(found.isfinite().all()), "find", "a function that returns finite values", "NaN or infinite ones")
        ball = self.threat_model
        beyond = float((ball.distance(found, x) - ball.epsilon).max())
        outside = float(torch.maximum(ball.lower - found, found - ball.upper).max())
        remedy = "give it the same norm and epsilon, in input units, and the same box"
        got = f"{max(beyond, outside):.3g} beyond it"
        require(max(beyond, outside) <= self.tolerance, "find", f"a function that stays inside {ball!r}", got, remedy)
        return ball.project(found, x)


class _Called(nn.Module):
    """Any callable as a module, with a parameter to tell device and dtype by."""

    def __init__(self, model: Model, x: Tensor) -> None:
        super().__init__()
        self._model = (model,)
        self.place = nn.Parameter(torch.zeros((), dtype=x.dtype, device=x.device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._model[0](x)


@contextmanager
def _lent(model: Model, x: Tensor) -> Iterator[nn.Module]:
    """The model as a module in evaluation mode, with modes and gradients as they were afterwards."""
    if not isinstance(model, nn.Module):
        yield _Called(model, x).eval()
        return
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        yield cast("nn.Module", model).eval()
    finally:
        for module, training in modes:
            module.training = training
        for p, gradient in gradients:
            p.grad = gradient

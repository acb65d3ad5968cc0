"""What the transfer benchmark compares with: how each method trains, and the settings it may choose from."""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple, cast

import torch
import torchopt
from torch import Tensor
from torchopt.base import EmptyState, GradientTransformation
from torchopt.schedule import linear_schedule

from metarobust.attacks import PGD
from metarobust.meta_optimizers import ClassificationTask, combine_factors, gradients_only
from metarobust.meta_optimizers._layout import ROLES, tensor_roles
from metarobust.types import Batch, Streams

CLEAN = ("Adam", "AdamW", "SGD momentum", "SGD momentum, first-layer L1", "SAM (Adam)")
"""Methods that see clean examples alone, one pass per step (SAM: two)."""

AT_EQUAL_PASSES = ("FGSM training, equal passes", "free training, equal passes")


class Candidate(NamedTuple):
    """One setting of a method: the rule for T steps, how the task is changed for it, steps (a share of T), passes per step."""

    settings: dict[str, Any]
    rule: Callable[[int], GradientTransformation]
    steps: tuple[float, ...] = (1.0,)
    passes: float = 1.0
    kind: type[ClassificationTask] = ClassificationTask
    options: dict[str, Any] = {}  # noqa: RUF012  # a NamedTuple's default, never written to


class SharpnessAware(ClassificationTask):
    """Gradients at the weights moved uphill by ``radius``, as SAM (Foret et al., 2021) takes them: two passes per step."""

    def __init__(self, *, radius: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.radius = radius

    def streams(
        self, parameters: tuple[Tensor, ...], *, generator: torch.Generator, create_graph: bool = False
    ) -> tuple[Tensor, Streams]:
        """The loss at the weights and the gradient at the moved weights, on one minibatch."""
        before = generator.get_state()
        losses, streams = super().streams(parameters, generator=generator)
        square = sum(g.flatten(1).square().sum(1) for g in streams.gradients)
        length = cast("Tensor", square).sqrt().clamp(min=1e-12)
        moved = tuple(
            p + self.radius * g / length.reshape(-1, *[1] * (g.dim() - 1))
            for p, g in zip(parameters, streams.gradients, strict=True)
        )
        generator.set_state(before)  # the same minibatch
        _, streams = super().streams(moved, generator=generator)
        return losses, streams


class FreeAdversarialTraining(ClassificationTask):
    """A minibatch is used ``replays`` times, each pass moves the examples too (Shafahi et al., 2019): one pass per step."""

    def __init__(self, *, replays: int, epsilon: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.replays, self.epsilon, self.count = replays, epsilon, 0
        self.batch: Batch | None = None
        self.moves: Tensor | None = None

    def streams(
        self, parameters: tuple[Tensor, ...], *, generator: torch.Generator, create_graph: bool = False
    ) -> tuple[Tensor, Streams]:
        """Loss and gradient at the moved minibatch; the same pass moves it on."""
        if self.count % self.replays == 0:
            self.batch = self._draw(self.subsets, self.batch_size, generator)
        self.count += 1
        assert self.batch is not None
        x, y = self.batch
        self.moves = torch.zeros_like(x) if self.moves is None else self.moves
        parameters = tuple(p.detach().requires_grad_() for p in parameters)
        x_adv = (x + self.moves).clamp(0, 1).requires_grad_()
        losses = self._losses(self.model(parameters), x_adv, y)
        *gradients, uphill = torch.autograd.grad(losses.sum(), [*parameters, x_adv])
        self.moves = (self.moves + self.epsilon * uphill.sign()).clamp(-self.epsilon, self.epsilon)
        return losses.detach(), Streams(tuple(gradients), tuple(torch.zeros_like(g) for g in gradients))


def first_layer_l1(strength: float) -> GradientTransformation:
    """Shrinks the first layer's weights by ``strength`` times their sign in each step: put it last in a chain."""

    def update(updates: tuple[Tensor, ...], state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        roles = [ROLES[role.role] for role in tensor_roles([p.shape[1:] for p in params])]
        shrunk = (
            u - strength * p.sign() if role.startswith("first") else u for u, p, role in zip(updates, params, roles, strict=True)
        )
        return tuple(shrunk), state

    return GradientTransformation(cast("Any", lambda params: EmptyState()), cast("Any", update))


def adam(learning_rate: float, *, falling: bool = False, weight_decay: float = 0.0) -> Callable[[int], GradientTransformation]:
    """Adam on the first stream, with a constant rate or one that falls to zero."""

    def rule(steps: int) -> GradientTransformation:
        rate = linear_schedule(learning_rate, 0.0, steps) if falling else learning_rate
        made = torchopt.adamw(rate, weight_decay=weight_decay) if weight_decay else torchopt.adam(rate)
        return torchopt.chain(gradients_only(), made)

    return rule


def sgd(learning_rate: float, shrinking: float = 0.0) -> Callable[[int], GradientTransformation]:
    """SGD with momentum 0.9, and L1 on the first layer."""

    def rule(steps: int) -> GradientTransformation:
        parts = [gradients_only(), torchopt.sgd(learning_rate, momentum=0.9)]
        return torchopt.chain(*parts, *([first_layer_l1(shrinking)] if shrinking else []))

    return rule


def hand_set(first: float, others: float, *, falling: bool, rate: float = 3e-3) -> Callable[[int], GradientTransformation]:
    """Adam on g + c h for weights, on g for biases and normalisations."""

    def rule(steps: int) -> GradientTransformation:
        combined = combine_factors(first=first, others=others, biases=0.0, stacked=True)
        return torchopt.chain(combined, torchopt.adam(linear_schedule(rate, 0.0, steps) if falling else rate))

    return rule


def baselines(threat_model: Any, *, small: bool) -> dict[str, list[Candidate]]:
    """The settings of each baseline; ``small``: a shorter grid, for targets where a run takes minutes."""
    rates = (1e-3, 3e-3) if small else (3e-4, 1e-3, 3e-3, 1e-2)
    lengths = (0.5, 1.0) if small else (0.25, 0.5, 1.0, 2.0)
    found: dict[str, list[Candidate]] = {
        "Adam": [Candidate({"lr": lr}, adam(lr), lengths) for lr in rates],
        "AdamW": [
            Candidate({"lr": lr, "decay": decay}, adam(lr, weight_decay=decay), lengths)
            for lr, decay in product((1e-3, 3e-3), (0.1,) if small else (0.1, 1.0))
        ],
        "SGD momentum": [Candidate({"lr": lr}, sgd(lr), lengths) for lr in ((0.03,) if small else (0.01, 0.03, 0.1))],
        "SGD momentum, first-layer L1": [
            Candidate({"lr": lr, "l1": l1}, sgd(lr, l1), lengths)
            for lr, l1 in product((0.03,) if small else (0.01, 0.03), (3e-4,) if small else (1e-4, 3e-4, 1e-3))
        ],
        "SAM (Adam)": [
            Candidate({"lr": lr, "radius": r}, adam(lr), (0.5, 1.0), 2.0, SharpnessAware, {"radius": r})
            for lr, r in product((1e-3,) if small else (1e-3, 3e-3), (0.1,) if small else (0.05, 0.1, 0.2))
        ],
    }
    attack_rates = product((3e-3, 1e-2), (True,) if small else (True, False))
    settings = [({"lr": lr, "falling": falling}, adam(lr, falling=falling)) for lr, falling in attack_rates]
    fgsm = PGD(threat_model=threat_model, steps=1, step_size=1.25 * threat_model.epsilon)
    pgd = PGD(threat_model=threat_model, steps=5)
    # As many passes as the learned rule takes, 4/3 of the target's steps: a step of FGSM training takes 5/3, of free training 1.
    found["FGSM training, equal passes"] = [
        Candidate(s, rule, (0.8,), 5 / 3, options={"training_attack": fgsm}) for s, rule in settings
    ]
    free = {"replays": 4, "epsilon": threat_model.epsilon}
    found["free training, equal passes"] = [
        Candidate(s, rule, (4 / 3,), 1.0, FreeAdversarialTraining, free) for s, rule in settings
    ]
    found["PGD-5 training"] = [Candidate(s, rule, (1.0,), 13 / 3, options={"training_attack": pgd}) for s, rule in settings]
    return found

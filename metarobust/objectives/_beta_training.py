"""Training as a non-zero-sum game: the cross-entropy at the point of the best targeted attack."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from metarobust._checks import choice, finite, integer, message, require
from metarobust.attacks import BETA, Unrolled
from metarobust.attacks._common import buffers_kept, checked
from metarobust.losses import cross_entropy, targeted_margin
from metarobust.objectives._hypergradient import climbed, cross_entropy_at_optimum, rival, rmsprop
from metarobust.threat_models import ThreatModel
from metarobust.types import Model

HYPERGRADIENTS = ("none", "unrolled", "implicit")


@dataclass(frozen=True, kw_only=True)
class BETATraining:
    r"""Non-zero-sum adversarial training: :math:`CE(f(x + \eta^*), y)`, where :math:`\eta^*` maximises the margin, not the loss.

    Robey et al. (2024), "Adversarial Training Should Be Cast as a Non-Zero-Sum Game", arXiv 2306.11035, algorithm 2, with

    .. math:: (j^*, \eta^*) \in \arg\max_{j \ne y,\ \|\eta\| \le \epsilon} M_j(x + \eta), \qquad
        M_j(x) = f(x)_j - f(x)_y,

    found by `metarobust.attacks.BETA`. With two classes the cross-entropy grows with the margin, and this is
    `AdversarialTraining` on the margin. With more, attacker and model play for different stakes, so that Danskin's theorem does
    not hold: :math:`\eta^*` moves with the parameters, and the loss with it. ``hypergradient`` says what becomes of that term.

    - ``"none"``: it is dropped, as published.
    - ``"unrolled"``: the exact derivative of the loss at the last of ``steps`` steps. BETA chooses the class; from the same start
      (one per example, shared by its classes) the climb for that class is repeated with its graph. The choice is locally
      constant; steps made of signs, and coordinates that ball or box cut off, have derivative 0 (see
      `metarobust.attacks.Unrolled`). BETA keeps the best point of a climb, this the last.
    - ``"implicit"``: the derivative of the maximiser, by the implicit function theorem. Coordinates that ball or box hold stay;
      the others, on an l2 sphere its tangent, move by :math:`-(H - \mu I)^{-1}\, \partial_\theta G` with G and H gradient and
      Hessian of :math:`M_{j^*}`, and :math:`\mu = \|G\| / \epsilon` on the sphere, 0 inside and for l_inf. The adjoint system
      is solved by conjugate gradients with Hessian-vector products, example by example.

    The implicit derivative is as good as the maximum. What is left of G in the free directions makes it the derivative of
    something else, often far too large. In l2 ten steps come close enough; in l_inf they do not: take ``steps=100,
    step_rule="apgd"``. Where the point is no strict maximum (a direction without negative curvature), the solution of an example
    ends with the directions before, at worst without the term. Piecewise-linear networks have H = 0. In l_inf they lose the
    whole term, although their maximisers sit on kinks, which move; in l2 it is exact as long as no kink is met.

    Both derivatives need a model that is twice differentiable, which compiled ones are not. ``"implicit"`` takes examples for
    independent, which BatchNorm in training mode undoes; ``"unrolled"`` goes through batch statistics too. How large the term is:
    docs/hypergradient.md.

    The attack takes ``steps`` forward-backward passes of ``batch * (classes - 1)`` rows and one more forward pass, and one over
    the clean batch; then the loss takes one pass over ``batch`` rows. ``"unrolled"`` adds one forward pass and ``steps``
    forward-backward passes of ``batch`` rows, kept in memory and differentiated again; ``"implicit"`` adds up to ``iterations``
    Hessian-vector products of ``batch`` rows. The attack leaves mode and BatchNorm statistics as they are, its steps are taken in
    the mode the model is in; the pass of the loss moves the statistics of a model in training mode.

    Args:
        threat_model: ball and box, in input units; with ``"implicit"`` l_inf or l2.
        steps: number of gradient steps, at least 1.
        step_rule: of the attack, see `metarobust.attacks.BETA`.
        random_start: False starts at x.
        attack: a BETA that takes the place of ``threat_model``; ``steps``, ``step_rule`` and ``random_start`` are not read.
        hypergradient: ``"none"``, ``"unrolled"`` or ``"implicit"``.
        update_rule: what the climb of ``"unrolled"`` moves by, a TorchOpt gradient transformation. Default: BETA's RMSprop.
        damping: added to the curvature -H + mu by ``"implicit"``, in logits per squared input unit, at least 0. It bounds the
            move of points whose maximum is nearly flat, and draws the derivative towards that of ``"none"``.
        iterations: of the conjugate gradients, at most.

    A call takes ``x [batch, ...]`` in input units, ``y [batch]`` int64 and the CPU generator of the attack's noise.

    Raises:
        TypeError: neither a threat model nor an attack, or both; settings of the wrong type.
        ValueError: a setting out of range; on a call, inputs outside the box or labels outside the classes.

    Example:
        >>> objective = BETATraining(threat_model=ThreatModel(norm="linf", epsilon=0.1), hypergradient="unrolled")
        >>> model, x, y = torch.nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> losses = objective(model, x, y, generator=torch.Generator().manual_seed(0))
        >>> losses.mean().backward()
        >>> losses.shape
        torch.Size([4])
    """

    threat_model: ThreatModel | None = None
    steps: int = 10
    step_rule: str = "rmsprop"
    random_start: bool = True
    attack: BETA | None = None
    hypergradient: str = "none"
    update_rule: GradientTransformation | None = None
    damping: float = 0.0
    iterations: int = 20

    def __post_init__(self) -> None:
        choice("hypergradient", self.hypergradient, HYPERGRADIENTS)
        finite("damping", self.damping, least=0.0)
        integer("iterations", self.iterations, least=1)
        norm, unrolled, implicit = (self._attack.threat_model.norm, *(self.hypergradient == h for h in HYPERGRADIENTS[1:]))
        remedy = "write hypergradient='unrolled'"
        require(not implicit or norm != "l1", "norm", "'linf' or 'l2' with hypergradient='implicit'", "'l1'", remedy)
        require(unrolled or self.update_rule is None, "update_rule", "None without the steps that it makes", "a rule", remedy)
        if unrolled:
            _ = self._climb

    @cached_property
    def _attack(self) -> BETA:
        return built_attack(self)

    @property
    def _climb(self) -> Unrolled:
        threat_model, steps = self._attack.threat_model, self._attack.steps
        rule = rmsprop(threat_model, steps) if self.update_rule is None else self.update_rule
        return Unrolled(threat_model=threat_model, update_rule=rule, steps=steps)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one loss per example, ``[batch]``."""
        if self.hypergradient == "unrolled":
            return cross_entropy(model(self._climbed(model, x, y, generator)), y)
        x_adv = self._attack(model, x, y, generator=generator)
        if self.hypergradient == "none":
            return cross_entropy(model(x_adv), y)
        threat_model = self._attack.threat_model
        settings = {"damping": self.damping, "iterations": self.iterations}
        return cross_entropy_at_optimum(model, x_adv, x.detach(), y, threat_model, **settings)

    def _climbed(self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        """The last point of the climb for the class that BETA chooses, from the start of BETA."""
        attack, differentiable = self._attack, torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
            x, y = checked(attack.threat_model, model, x, y)
            start = attack.threat_model.sample(x, generator=generator) if attack.random_start else x
            x_adv = attack(model, x, y, generator=generator, start=start)
            if len(x) == 0 or attack.threat_model.epsilon == 0:
                return x_adv
            with torch.no_grad(), buffers_kept(model):
                target = rival(model(x_adv), y)
            climb = replace(self._climb, loss=lambda logits, y: targeted_margin(logits, y, target))
            return climbed(climb, model, x, y, start)


def built_attack(objective: Any) -> BETA:
    """The attack that was given, or BETA with the fields of the objective."""
    attack, threat_model = objective.attack, objective.threat_model
    if attack is None:
        if not isinstance(threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel, or a BETA as attack in its place", repr(threat_model)))
        return BETA(
            threat_model=threat_model,
            steps=objective.steps,
            step_rule=objective.step_rule,
            random_start=objective.random_start,
        )
    if not isinstance(attack, BETA):
        raise TypeError(message("attack", "a BETA", repr(attack), "write BETA(threat_model=...), or use AdversarialTraining"))
    if threat_model is not None:
        raise TypeError(message("threat_model", "None beside an attack, which has its own", repr(threat_model)))
    return attack

"""Adversaries and anti-adversaries in one batch: every example has its own direction, radius and step."""

from collections.abc import Callable

import torch
from torch import Tensor

from metarobust._checks import finite, integer, message, require
from metarobust._tensors import normal, per_example
from metarobust.attacks._common import buffers_kept, check_step_size, checked, checked_logits, input_gradient
from metarobust.attacks._counting import record_call
from metarobust.losses import cross_entropy, kl_divergence
from metarobust.threat_models import ThreatModel
from metarobust.types import Model

PairedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.inference_mode(False)
def signed_pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    signs: Tensor,
    *,
    threat_model: ThreatModel,
    epsilon: Tensor | None = None,
    steps: int = 10,
    step_size: float | None = None,
    climbed: PairedLoss | None = None,
    natural_logits: Tensor | None = None,
    start_std: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Projected steps against the model where the sign is +1, in its favour where it is -1, none where it is 0.

    Adversaries climb ``climbed``, by default :math:`KL(p(x) \| p(x'))` as in TRADES; anti-adversaries descend the cross-entropy
    (Zhou et al., 2023, arXiv 2304.12550). All start at x plus small Gaussian noise, because the gradient of the KL divergence is
    zero at x, and take ``steps`` forward-backward passes together, over the rows that move. One step of example i has the length
    :math:`2.5\, \epsilon_i / steps` in the norm of the ball, so that each can reach its own boundary. (The published code takes
    one length for all, too short to fill its largest balls.)

    The model is called in the mode it is in; its buffers stay as they were. In training mode BatchNorm takes its statistics over
    the rows that move, adversaries and anti-adversaries together.

    Args:
        model: any callable from inputs to logits.
        x: ``[batch, ...]`` in input units, inside the box.
        y: labels, int64 ``[batch]``.
        signs: ``[batch]`` of +1, 0 and -1, any dtype.
        threat_model: norm and box; its epsilon is everyone's radius unless ``epsilon`` is given.
        epsilon: radius of each example ``[batch]``, at least 0, input units.
        steps: number of gradient steps, at least 1.
        step_size: length of a step of an example whose radius is the threat model's, input units; the others step in proportion.
        climbed: ``(natural logits, moved logits, y) -> [batch]``, what adversaries climb; by default the KL divergence.
        natural_logits: the model's logits at x, ``[batch, classes]``, if they are known; otherwise one forward pass finds them.
        start_std: standard deviation of the start, input units, at least 0.
        generator: CPU generator of the start.

    Returns:
        The moved points, shaped like ``x``, detached, inside ball and box.

    Raises:
        TypeError: inputs, labels or settings of the wrong type.
        ValueError: signs or radii that are none, inputs outside the box, labels outside the classes.

    Example:
        >>> x, y = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4]]), torch.tensor([0, 0, 0])
        >>> threat_model = ThreatModel(norm="linf", epsilon=0.1)
        >>> signs = torch.tensor([1, -1, 0])
        >>> signed_pgd(lambda x: x, x, y, signs, threat_model=threat_model, climbed=lambda _, z, y: z[:, 1] - z[:, 0])
        tensor([[0.5000, 0.5000],
                [0.7000, 0.3000],
                [0.6000, 0.4000]])
    """
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel", repr(threat_model)))
    x, y = checked(threat_model, model, x, y)
    valid = isinstance(signs, Tensor) and signs.shape == y.shape and bool(((signs == 0) | (signs.to(x).abs() == 1)).all())
    require(valid, "signs", f"a tensor [{len(y)}] of +1 (adversary), 0 (stay) and -1 (anti-adversary)", signs)
    integer("steps", steps, least=1)
    finite("start_std", start_std, least=0.0)
    check_step_size(step_size, threat_model)
    if step_size is not None:
        finite("epsilon of the threat model (a step size is its share)", threat_model.epsilon, above=0.0)
    radii = x.new_full(y.shape, threat_model.epsilon)
    if epsilon is not None:
        sound = isinstance(epsilon, Tensor) and epsilon.shape == y.shape and bool(((epsilon >= 0) & epsilon.isfinite()).all())
        require(sound, "epsilon", f"a tensor [{len(y)}] of finite radii >= 0 in input units", epsilon)
        radii = epsilon.detach().to(x)
    record_call(len(x))
    rows = ((signs != 0) & (radii > 0)).nonzero().squeeze(1)
    # The noise of every row is drawn, so that the start of an example does not depend on where the others go.
    noise = normal(x.shape, like=x, generator=generator) if start_std > 0 else None
    if len(rows) == 0:
        return x.clone()
    natural = None if natural_logits is None else checked_logits(natural_logits.detach(), y)
    if natural is None:
        with torch.no_grad(), buffers_kept(model):
            natural = checked_logits(model(x), y)
    whole = len(rows) == len(x)
    origin, labels, clean, radius, against = x, y, natural, radii, signs > 0
    if not whole:
        origin, labels, clean, radius, against = x[rows], y[rows], natural[rows], radii[rows], against[rows]
    ball = _Ball(threat_model, origin, None if epsilon is None else radius, steps, step_size)
    moved = origin.clone() if noise is None else ball.project(origin + start_std * (noise if whole else noise[rows]))

    def gained(logits: Tensor) -> Tensor:
        return kl_divergence(clean, logits) if climbed is None else climbed(clean, logits, labels)

    one_sided = bool(against.all()) or not bool(against.any())
    with torch.enable_grad(), buffers_kept(model):
        for _ in range(steps):
            leaf = moved.detach().requires_grad_()
            logits = model(leaf)
            if one_sided:
                gain = gained(logits) if bool(against[0]) else -cross_entropy(logits, labels)
            else:
                gain = torch.where(against, gained(logits), -cross_entropy(logits, labels))
            moved = ball.step(moved, input_gradient(gain, leaf))
    return moved if whole else x.index_copy(0, rows, moved)


class _Ball:
    """Balls of one norm around ``x``, cut by the box, and the steps inside them.

    Without radii the numbers are those of `PGD` and `TRADES` to the last bit.
    """

    def __init__(self, threat_model: ThreatModel, x: Tensor, radii: Tensor | None, steps: int, step_size: float | None) -> None:
        self.threat_model, self.x, self.radii = threat_model, x, radii
        self.bounds = threat_model.bounds(x, radius=radii) if threat_model.norm == "linf" else None
        epsilon = threat_model.epsilon
        self.length: float | Tensor = 2.5 * epsilon / steps if step_size is None else step_size
        if radii is not None:
            self.length = per_example(2.5 * radii / steps if step_size is None else step_size * radii / epsilon, x)

    def project(self, moved: Tensor) -> Tensor:
        """The nearest points inside ball and box."""
        if self.bounds is not None:
            return moved.clamp(*self.bounds)
        return self.threat_model.project(moved, self.x, radius=self.radii)

    def step(self, moved: Tensor, gradient: Tensor) -> Tensor:
        """One projected step of steepest ascent; ``moved`` may be written over."""
        if self.bounds is None:
            return self.project(moved + self.length * self.threat_model.ascent_direction(gradient, moved))
        if isinstance(self.length, Tensor):
            return moved.addcmul_(gradient.sign(), self.length).clamp_(*self.bounds)
        return moved.add_(gradient.sign(), alpha=self.length).clamp_(*self.bounds)

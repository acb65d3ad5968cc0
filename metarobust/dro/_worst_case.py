"""The worst-case expectation of losses: the dual's value, the weights, and how the budget is spent."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import finite, floating, message, require
from metarobust.divergences import Divergence
from metarobust.dro._dual import solve
from metarobust.dro._implicit import Optimum, Value


class WorstCase(NamedTuple):
    """The solution of `worst_case_expectation`.

    Attributes:
        value: the worst-case expectation, a scalar of the losses' dtype; differentiable.
        weights: of the examples ``[n]`` or of their candidates ``[n, m]``, sum 1; differentiable. Detach them to weight losses.
        multiplier: lambda, the price of the radius; 0 when it is not used up, inf at radius 0 (unless it is not needed).
        scale: s = lambda + kappa, which an attack ascending ``loss - s * cost`` needs.
        converged: the budget is spent to 1e-6 of the radius, or there is some left and the multiplier is 0.
        reweighting: the divergence of the weights from the base weights, a part of the budget.
        transport: the mean cost of the candidates under the weights, the other part.
    """

    value: Tensor
    weights: Tensor
    multiplier: float
    scale: float
    converged: bool
    reweighting: float
    transport: float


def worst_case_expectation(
    losses: Tensor,
    *,
    divergence: Divergence,
    radius: float | Tensor,
    kappa: float | Tensor = 0.0,
    base_weights: Tensor | None = None,
    costs: Tensor | None = None,
) -> WorstCase:
    r"""The largest mean loss after moving and reweighting the examples, both paid from one budget.

    With candidates of loss :math:`l_{ij}` and transport cost :math:`c_{ij}` for each example and base weights P, over all weights
    w of examples and all choices among (mixtures of) their candidates,

    .. math:: \sup \{E_w l - \kappa B : B \le \epsilon\}, \qquad B = D(w \| P) + E_w c,

    is solved exactly through its dual of one variable (Birrell and Ebrahimi, 2025, arXiv 2309.03791): the minimum over
    :math:`\lambda \ge 0` of :math:`\lambda \epsilon + s \Lambda(\Phi(s) / s)`, where :math:`s = \lambda + \kappa`,
    :math:`\Phi_i(s) = \max_j (l_{ij} - s c_{ij})` and :math:`\Lambda` is the convex conjugate of :math:`D(\cdot \| P)`. Without
    costs (a hard ball) this reweights only; radius 0 then gives the mean loss and a large radius the maximum. Where the best
    candidate changes in a jump, two candidates are mixed such that the budget is spent exactly. Candidates are a subset of what
    an adversary may reach, so the value is a lower bound on the supremum over the whole space.

    The arithmetic is float64 whatever the losses' dtype. Tensors on another device are copied to the host once and back once.

    The value is differentiable by the envelope theorem: in the losses (the weights), the costs (minus s times the weights), the
    radius (lambda) and kappa (minus the budget spent). The weights are differentiable in the same four by the implicit function
    theorem, once; the value twice, so that a radius can be learned through training steps on it. Base weights are constants.
    `torch.func` transforms are not supported.

    Args:
        losses: one loss per example ``[n]``, or one per candidate ``[n, m]``, finite, floating-point.
        divergence: `divergences.KL`, `Alpha` or `Renyi`. Renyi restricts w to the examples of positive base weight.
        radius: epsilon, at least 0, the budget in units of the divergence. To be differentiated, a scalar tensor > 0.
        kappa: price of the budget in units of the loss, at least 0; above 0 it bounds the weights however large the radius.
        base_weights: P, ``[n]``, at least 0, normalised to sum 1 here. Default: all equal. An example of weight 0 is left out.
        costs: of the candidates, shaped like the losses, at least 0; inf: not available. Default: all 0. The natural example
            belongs among the candidates with cost 0; otherwise small radii allow nothing.

    Raises:
        TypeError: losses, costs or base weights are no floating-point tensors, or a divergence that is none.
        ValueError: wrong shapes, losses that are not finite, a negative radius, kappa, cost or weight, a radius that is smaller
            than what the cheapest candidates cost, a radius of 0 or base weights that should be differentiated.
        RuntimeError: no solution within 1e-6 of the radius was found.

    Example:
        >>> from metarobust.divergences import KL
        >>> worst = worst_case_expectation(torch.tensor([0.0, 1.0, 2.0]), divergence=KL(), radius=0.1)
        >>> worst.weights
        tensor([0.1697, 0.3000, 0.5303])
        >>> worst.value, worst.converged
        (tensor(1.3605), True)
    """
    _check_arguments(losses, costs, base_weights, divergence)
    budget, price = _number("radius", radius, losses), _number("kappa", kappa, losses)
    table, prices, base, radius_value, kappa_value = _on_host(losses, costs, base_weights, budget, price)
    finite("radius", radius_value, least=0)
    finite("kappa", kappa_value, least=0)
    solution = solve(table, prices, base, radius=radius_value, kappa=kappa_value, divergence=divergence)
    if not solution.converged:
        raise RuntimeError(
            f"the dual of {divergence!r} at radius {radius_value:g} did not converge: a budget of "
            f"{solution.reweighting + solution.transport:g} is spent at multiplier {solution.multiplier:g}"
        )
    require(
        np.isfinite(solution.multiplier) or not (budget.requires_grad and torch.is_grad_enabled()),
        "radius",
        "> 0 to be differentiated",
        f"{radius_value:g}",
        "the derivative at 0 is infinite; pass radius.detach()",
    )
    shape = (len(losses), -1)
    inputs = losses.double().reshape(shape), None if costs is None else costs.double().reshape(shape), budget, price, solution
    value, (weights, _, _) = Value.apply(*inputs), Optimum.apply(*inputs)
    return WorstCase(
        value=value.to(losses.dtype),
        weights=weights.reshape(losses.shape).to(losses.dtype),
        multiplier=solution.multiplier,
        scale=solution.scale,
        converged=solution.converged,
        reweighting=solution.reweighting,
        transport=solution.transport,
    )


def _check_arguments(losses: Tensor, costs: Tensor | None, base_weights: Tensor | None, divergence: Divergence) -> None:
    if isinstance(divergence, type) or not hasattr(divergence, "tilt"):
        raise TypeError(message("divergence", "divergences.KL(), Alpha(order=...) or Renyi(order=...)", repr(divergence)))
    for name, value in (("losses", losses), ("costs", costs), ("base_weights", base_weights)):
        if value is not None:
            floating(name, value)
    proper = losses.dim() in (1, 2) and losses.numel() > 0
    require(proper, "losses", "of shape [n] or [n, candidates], not empty", list(losses.shape))
    if costs is not None:
        require(costs.shape == losses.shape, "costs", f"shaped like the losses, {list(losses.shape)}", list(costs.shape))
    if base_weights is not None:
        examples = (len(losses),)
        require(base_weights.shape == examples, "base_weights", f"of shape [{len(losses)}]", list(base_weights.shape))
        learned = base_weights.requires_grad and torch.is_grad_enabled()
        require(not learned, "base_weights", "constants", "a tensor that requires a gradient", "write base_weights.detach()")


def _number(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A scalar tensor in float64 beside the losses."""
    if not isinstance(value, Tensor):
        finite(name, value, least=0)
        return torch.tensor(float(value), dtype=torch.float64, device=like.device)
    require(value.dim() == 0, name, "a number or a scalar tensor", f"shape {list(value.shape)}")
    return value.to(device=like.device, dtype=torch.float64)


def _on_host(
    losses: Tensor, costs: Tensor | None, base_weights: Tensor | None, radius: Tensor, kappa: Tensor
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, float, float]:
    """Everything in float64 on the host, by one copy, and checked there."""
    n, size = len(losses), losses.numel()
    parts = [part for part in (losses, costs, base_weights, radius, kappa) if part is not None]
    together = torch.cat([p.detach().to(device=losses.device, dtype=torch.float64).reshape(-1) for p in parts]).cpu().numpy()
    where = "find them with losses.isfinite().logical_not().nonzero()"
    require(bool(np.isfinite(together[:size]).all()), "losses", "finite", "NaN or infinite values", where)
    begin, c = size, None
    if costs is not None:
        c = together[size : 2 * size].reshape(n, -1)
        begin = 2 * size
        require(
            bool((c >= 0).all()), "costs", ">= 0", "negative or NaN values", "a natural example costs 0, one out of reach inf"
        )
        require(bool((c < np.inf).any(1).all()), "costs", "finite for at least one candidate per example", "only inf for one")
    base = np.full(n, 1 / n)
    if base_weights is not None:
        base = together[begin : begin + n]
        proper = bool((base >= 0).all()) and 0 < base.sum() < np.inf
        require(proper, "base_weights", "finite and >= 0, and not all 0", f"values from {base.min():g} to {base.max():g}")
        base = base / base.sum()
    return together[:size].reshape(n, -1), c, base, float(together[-2]), float(together[-1])

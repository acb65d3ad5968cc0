"""The Sinkhorn bound as a function to differentiate: in the weights, and through soft costs in the points."""

import numpy as np
import torch
from torch import Tensor

from metarobust._checks import choice, finite, integer, message, require
from metarobust._tensors import flat
from metarobust.bounds._bound import MOST_SETS
from metarobust.bounds._conflicts import ConflictGraph, conflicts
from metarobust.bounds._pairs import pairs_within
from metarobust.bounds._points import Points, as_points
from metarobust.bounds._sinkhorn import feasible_sets, too_many
from metarobust.bounds._sinkhorn_gradient import ImplicitRisk, squared_radii
from metarobust.bounds._sinkhorn_sweeps import fixed_point, incidence_of, rounded, sweep_until_balanced, warn_unless_balanced
from metarobust.threat_models import ThreatModel


def sinkhorn_risk(
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    weights: Tensor | None = None,
    order: int = 2,
    regularisation: float = 0.05,
    tolerance: float = 1e-6,
    most_iterations: int = 1000,
    softness: float = 0.0,
    gradient: str = "implicit",
    closed: bool = True,
    most_sets: int = MOST_SETS,
) -> Tensor:
    r"""A lower bound on the adversarial risk of any classifier, differentiable in the weights and the points.

    For the feasible sets S of at most ``order`` points (see `adversarial_risk_bound`), weights w of sum 1 and costs c, Sinkhorn
    sweeps solve

    .. math:: \min_{x \ge 0} \sum_S c_S x_S + \eta \sum_S x_S (\log x_S - 1)
              \quad\text{with}\quad \sum_{S \ni i} x_S = w_i \text{ for every point } i,

    whose solution is :math:`x_S = \exp((\sum_{i \in S} \phi_i - c_S) / \eta)`. Rounded to a plan that exists, it proves the value
    :math:`1 - \sum_S x_S = \sum_S (|S| - 1) x_S`: whatever the settings, no classifier has a smaller risk on these points. With a
    softness s > 0 the cost grows from 1 to infinity at the border of the threat model,

    .. math:: c_S = 1 + s\, t_S^2 / (1 - t_S^2), \qquad t_S = r_S / \epsilon, \qquad |S| \ge 2,

    r_S the radius of the smallest ball round S, so that the mass of a set vanishes smoothly when its points move apart. It also
    vanishes then from sets whose balls still meet: the bound stays valid, and becomes smaller.

    With ``gradient="implicit"``, value and gradient are those of the fixed point: short runs of sweeps at a falling
    regularisation, each finished by Newton steps, find it to rounding, and the implicit function theorem differentiates it. With
    :math:`A_{iS} = 1[i \in S]` and :math:`H = A \operatorname{diag}(x) A^\top`, one linear system :math:`H \bar\phi = w`
    (conjugate gradients) gives

    .. math:: d \sum_S x_S = \bar\phi^\top dw + \tfrac1\eta \sum_S x_S \Big(\sum_{i \in S} \bar\phi_i - 1\Big) dc_S.

    ``gradient="unrolled"`` makes the sweeps alone, and differentiates them and the rounding; its memory grows with their number.
    Both have first derivatives only. Identical examples are not merged here, unlike in `adversarial_risk_bound`, so that the
    value is continuous where two of them part; each gets its own gradient.

    Args:
        x: points in input units, ``[examples, ...]``, finite.
        y: labels from 0, int64 ``[examples]``.
        threat_model: ``"l2"`` or ``"linf"`` and epsilon in input units; the box plays no role.
        weights: of the examples, at least 0, ``[examples]``, normalised to sum 1 (the gradient includes that). Default: all
            equal. An example of weight 0 is left out; its gradients are 0.
        order: the largest sets that count, at least 2. All of them are listed.
        regularisation: eta, above 0, in units of the cost of a set (1). Smaller is tighter and harder to solve.
        tolerance: the sum over points of ``|w_i - sum of x_S|`` at which unrolled sweeps stop; 0: make all of them.
        most_iterations: sweeps over all classes, at least 1; for ``"implicit"`` in each of its runs.
        softness: s, at least 0. At 0 the value jumps where sets become feasible and has no gradient in ``x``. As c grows to 2,
            a pair stops paying off: it keeps mass up to about :math:`t^2 = 1 / (1 + s)`.
        gradient: ``"implicit"`` or ``"unrolled"``.
        closed: balls contain their boundary, as for `adversarial_risk_bound`; no matter where softness > 0.
        most_sets: candidates that listing the sets of 3 and more points may look at.

    Returns:
        A scalar, float64, on the device of ``x``. At epsilon 0 it does not depend on ``x``: that gradient is 0.

    Raises:
        ValueError: l1, wrong shapes, NaN, negative labels or weights, settings out of range, ``x`` asks for a gradient while
            softness is 0, more sets than ``most_sets``, more than 50 million conflicting pairs.
        TypeError: x is not floating point, y not int64, or a setting of the wrong kind.

    Warns:
        UserWarning: the tolerance was not reached; the value is a valid bound all the same, the gradient inexact.

    Example:
        >>> x = torch.tensor([[0.0], [0.6], [2.0]], dtype=torch.float64, requires_grad=True)
        >>> threat_model = ThreatModel(norm="l2", epsilon=0.35)
        >>> risk = sinkhorn_risk(x, torch.tensor([0, 1, 1]), threat_model, regularisation=0.1, softness=0.1)
        >>> risk.backward()  # moved together, the first two would conflict more
        >>> round(risk.item(), 3), [round(slope, 3) for slope in x.grad[:, 0].tolist()]
        (0.318, [0.258, -0.258, 0.0])

    The algorithm is the entropic one of Garcia Trillos et al. (2024, arXiv 2401.09191) for the truncated problem. Deviations:
    classes take turns (the authors' code picks the one that is furthest off), everything happens in the log domain, the rounding
    scales masses by the factor itself (their code adds its logarithm to potentials that are divided by eta later); soft costs,
    Newton steps and gradients are additions.
    """
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel", repr(threat_model)))
    norm = threat_model.norm
    require(norm in ("l2", "linf"), "threat_model.norm", "'l2' or 'linf'", repr(norm), "l1 balls have no such solver here")
    integer("order", order, least=2)
    finite("regularisation", regularisation, above=0)
    finite("tolerance", tolerance, least=0)
    integer("most_iterations", most_iterations, least=1)
    finite("softness", softness, least=0)
    choice("gradient", gradient, ("implicit", "unrolled"))
    integer("most_sets", most_sets, least=1)
    points, examples = _separate(as_points(x, y, weights))
    if x.requires_grad and torch.is_grad_enabled():
        require(softness > 0, "softness", "> 0 for a gradient in x", softness, "write softness=0.1, or pass x.detach()")
    epsilon = float(threat_model.epsilon)
    graph = conflicts(points, pairs_within(points, norm, 2 * epsilon), norm, epsilon, closed=closed)
    groups = feasible_sets(graph, order, most_sets)
    if groups is None:
        raise too_many(order, most_sets)

    kept = torch.from_numpy(examples).to(x.device)
    given = torch.ones(len(x)) if weights is None else weights
    weight = given.to(x.device, torch.float64)[kept]
    weight = weight / weight.sum()
    groups, cost = _costs(flat(x)[kept].double(), groups, graph, softness)
    incidence = incidence_of(groups, points.y, x.device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and gradient == "unrolled"):
        log_weight = weight.log()
        if gradient == "implicit":
            scaling = fixed_point(incidence, cost, log_weight, regularisation, most_iterations)
        else:
            scaling = sweep_until_balanced(incidence, -cost / regularisation, log_weight, tolerance, most_iterations)
        value = ((incidence.size - 1) * rounded(incidence, scaling.log_mass, log_weight).exp()).sum()
    warn_unless_balanced(scaling, tolerance, "raise most_iterations or regularisation", stacklevel=3)
    if gradient == "implicit":
        value = ImplicitRisk.apply(value, weight, cost, scaling.log_mass, incidence, regularisation)
    return value


def _separate(merged: Points) -> tuple[Points, np.ndarray]:
    """The points before identical rows were merged, by label, and the example that each of them is."""
    examples = np.flatnonzero(merged.origin >= 0)
    examples = examples[np.argsort(merged.y[merged.origin[examples]], kind="stable")]
    row = merged.origin[examples]
    origin = np.full_like(merged.origin, -1)
    origin[examples] = np.arange(len(examples))
    x = merged.x[torch.from_numpy(row).to(merged.x.device)]
    return merged._replace(x=x, y=merged.y[row], weight=merged.share[examples], copies=None, origin=origin), examples


def _costs(x: Tensor, groups: list[np.ndarray], graph: ConflictGraph, softness: float) -> tuple[list[np.ndarray], Tensor]:
    """The sets of finite cost and their costs; ``x [points, dimensions]`` float64 in input units."""
    nothing = x.reshape(-1)[:0].sum()  # ties the value to x, so that a gradient of 0 comes back where no cost depends on it
    if softness == 0 or graph.epsilon == 0:
        return groups, x.new_ones(sum(map(len, groups))) + nothing
    kept, costs = groups[:1], [x.new_ones(len(groups[0])) + nothing]
    for sets in groups[1:]:
        closeness = squared_radii(x, sets, graph) / graph.epsilon**2
        inside = (closeness < 1).nonzero().squeeze(1)  # at the border the cost is infinite and the mass 0
        kept.append(sets[inside.cpu().numpy()])
        costs.append(1 + softness * closeness[inside] / (1 - closeness[inside]))
    return kept, torch.cat(costs)

"""Scaling a kernel over sets of points until every point carries its weight: sweeps, Newton steps, rounding."""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST_SOLVER_STEPS = 10_000
ROUGHLY = 1e-4  # accuracy of the linear system of a Newton step
BALANCED = 1e-13  # of a total mass of 1
MOST_NEWTON_STEPS = 50
MOST_HALVINGS = 20
EASY = 0.1  # a regularisation at which a few sweeps suffice
NEAR = 1e-2  # marginal error from which Newton steps converge


class Block(NamedTuple):
    """The points of one class, and what belongs to them. A set has at most one point per class, so ``set`` repeats nothing.

    Attributes:
        points: where they stand, a slice.
        member: ``[entries]``, places within the slice, ascending.
        set: ``[entries]``, a set that each of these belongs to.
    """

    points: slice
    member: Tensor
    set: Tensor


class Incidence(NamedTuple):
    """Which point belongs to which set: the matrix A of the constraints ``A x = w``.

    Attributes:
        point: ``[entries]`` int64, ascending.
        set: ``[entries]`` int64.
        size: ``[sets]`` float64, points per set.
        blocks: the same entries class by class.
    """

    point: Tensor
    set: Tensor
    size: Tensor
    blocks: list[Block]

    def total(self, per_point: Tensor) -> Tensor:
        """The sum over each set's points, ``A^T v``."""
        return torch.zeros_like(self.size).index_add_(0, self.set, per_point[self.point])

    def covered(self, per_set: Tensor) -> Tensor:
        """The sum over each point's sets, ``A x``."""
        last = self.blocks[-1].points.stop
        return self.size.new_zeros(last).index_add_(0, self.point, per_set[self.set])


class Scaling(NamedTuple):
    """The state in which the sweeps ended.

    Attributes:
        log_mass: ``[sets]``, the logarithm of the coupling.
        potential: ``[points]``, in units of the regularisation.
        error: the sum over points of ``|w_i - covered_i|``.
        sweeps: passes over all classes.
    """

    log_mass: Tensor
    potential: Tensor
    error: float
    sweeps: int


def incidence_of(groups: list[np.ndarray], y: np.ndarray, device: torch.device) -> Incidence:
    """The incidence of sets, numbered through the groups in their order; ``y`` ascends."""
    sizes = np.concatenate([np.full(len(sets), sets.shape[1]) for sets in groups])
    point = np.concatenate([sets.ravel() for sets in groups])
    order = np.argsort(point, kind="stable")
    members, of_set = (torch.from_numpy(v).to(device) for v in (point[order], np.repeat(np.arange(len(sizes)), sizes)[order]))
    ends = [0, *(np.flatnonzero(np.diff(y)) + 1).tolist(), len(y)]
    at = np.searchsorted(point[order], ends).tolist()
    blocks = [
        Block(slice(ends[k], ends[k + 1]), members[at[k] : at[k + 1]] - ends[k], of_set[at[k] : at[k + 1]])
        for k in range(len(ends) - 1)
    ]
    return Incidence(members, of_set, torch.from_numpy(sizes).to(device, torch.float64), blocks)


def log_covered(block: Block, log_mass: Tensor) -> Tensor:
    """``log (A x)_i`` for the points of one class; every point has its singleton, so no sum is empty."""
    points = block.points.stop - block.points.start
    entries = log_mass[block.set]
    top = entries.new_full((points,), -torch.inf).scatter_reduce_(0, block.member, entries.detach(), "amax")
    return top + torch.zeros_like(top).index_add(0, block.member, (entries - top[block.member]).exp()).log()


def sweep_until_balanced(
    incidence: Incidence, log_kernel: Tensor, log_weight: Tensor, tolerance: float, most_iterations: int
) -> Scaling:
    r"""Scale the kernel until every point carries its weight: :math:`\log x_S = \log K_S + \sum_{i \in S} \phi_i / \eta`.

    Given all others, the potentials of one class are solved for exactly, because no set holds two of its points. Classes take
    turns. Gradients flow if the arguments carry them.
    """
    log_mass = log_kernel.clone()
    steps: list[Tensor] = [torch.zeros_like(log_weight[block.points]) for block in incidence.blocks]
    weight = log_weight.detach().exp()
    sweeps, error = 0, float("inf")
    while sweeps < most_iterations:
        moved = weight.new_zeros(())
        for number, block in enumerate(incidence.blocks):
            covered = log_covered(block, log_mass)
            moved += (weight[block.points] - covered.detach().exp()).abs().sum()
            step = log_weight[block.points] - covered
            log_mass.index_add_(0, block.set, step[block.member])  # in place: nothing of the graph needs the old values
            steps[number] = steps[number] + step
        sweeps += 1
        # What the classes had to move is cheap to know and about the error; only then is the error itself worth a pass.
        if moved <= tolerance or sweeps == most_iterations:
            error = float((weight - incidence.covered(log_mass.detach().exp())).abs().sum())
            if error <= tolerance:
                break
    return Scaling(log_mass, torch.cat(steps), error, sweeps)


def rounded(incidence: Incidence, log_mass: Tensor, log_weight: Tensor) -> Tensor:
    """Log masses under which no point carries more than its weight: classes in turn shrink the sets of overfull points.

    What is then missing belongs to the singletons. They count nothing for the risk, ``sum (size - 1) x``, and are left as is.
    """
    log_mass = log_mass.clone()
    for block in incidence.blocks:
        step = (log_weight[block.points] - log_covered(block, log_mass)).clamp(max=0)
        log_mass.index_add_(0, block.set, step[block.member])
    return log_mass


def finished(incidence: Incidence, scaling: Scaling, log_weight: Tensor, error: float = BALANCED) -> Scaling:
    """Newton steps from where the sweeps ended until the marginals are off by at most ``error``; no gradient.

    Sweeps slow down where the masses of singletons nearly vanish, as in a pair of equal weights without other conflicts. There
    the derivative in the weights is sensitive to what they leave undone.
    """
    log_mass, potential, weight = scaling.log_mass, scaling.potential, log_weight.exp()
    missing = weight - incidence.covered(log_mass.exp())
    for _ in range(MOST_NEWTON_STEPS):
        if float(missing.abs().sum()) <= error:
            break
        direction = solved(incidence, log_mass.exp(), missing, ROUGHLY)
        step = incidence.total(direction)
        # Far from the solution a full step may overshoot by orders of magnitude; a short enough one always helps.
        for halvings in range(MOST_HALVINGS):
            length = 0.5**halvings
            candidate = log_mass + length * step
            left = weight - incidence.covered(candidate.exp())
            if _size(left, weight) <= (1 - length / 4) * _size(missing, weight):
                break
        else:
            break
        log_mass, potential, missing = candidate, potential + length * direction, left
    return Scaling(log_mass, potential, float(missing.abs().sum()), scaling.sweeps)


def fixed_point(incidence: Incidence, cost: Tensor, log_weight: Tensor, regularisation: float, most_iterations: int) -> Scaling:
    """The solution to rounding: short runs of sweeps and Newton steps, from a strong regularisation down by halves; no gradient.

    Potentials depend little on the regularisation, so each run begins near its end.
    """
    halvings = max(0, math.ceil(math.log2(EASY / regularisation)))
    potential = torch.zeros_like(log_weight)
    scaling = None
    for level in range(halvings, -1, -1):
        eta = regularisation * 2**level
        kernel = (incidence.total(potential) - cost) / eta
        scaling = sweep_until_balanced(incidence, kernel, log_weight, NEAR, most_iterations)
        scaling = finished(incidence, scaling, log_weight, BALANCED if level == 0 else NEAR**2)
        potential = potential + eta * scaling.potential
    assert scaling is not None
    return scaling._replace(potential=potential / regularisation)


def _size(missing: Tensor, weight: Tensor) -> float:
    return float((missing.square() / weight).sum().sqrt())


def solved(incidence: Incidence, mass: Tensor, right: Tensor, accuracy: float) -> Tensor:
    r"""Conjugate gradients for :math:`A \operatorname{diag}(x) A^\top v = b`, preconditioned by the diagonal ``A x``."""
    diagonal = incidence.covered(mass)
    solution, residual = torch.zeros_like(diagonal), right.clone()
    scaled = residual / diagonal
    direction = scaled
    square = begin = float(residual @ scaled)
    for _ in range(MOST_SOLVER_STEPS):
        if square <= accuracy**2 * begin:
            break
        image = incidence.covered(mass * incidence.total(direction))
        curvature = float(direction @ image)
        if curvature <= 0:  # all that is left has underflown
            break
        length = square / curvature
        solution, residual = solution + length * direction, residual - length * image
        scaled = residual / diagonal
        before, square = square, float(residual @ scaled)
        direction = scaled + square / before * direction
    return solution


def warn_unless_balanced(scaling: Scaling, tolerance: float, remedy: str, *, stacklevel: int) -> None:
    """Say that the tolerance was missed: the rounded plan is a bound all the same, only lower than it could be."""
    if scaling.error > tolerance > 0:
        text = f"Sinkhorn stopped after {scaling.sweeps} sweeps at a marginal error of {scaling.error:.2g} (> {tolerance:g}); "
        warnings.warn(text + f"the bound is valid but looser than it could be: {remedy}", stacklevel=stacklevel)

"""Which sets of points fit into one ball: midranges in l_inf, smallest enclosing balls in l2, for many sets at once."""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor


def enclosing_balls(square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Smallest enclosing l2 balls of many sets of m points, from their squared distances.

    A ball's centre is a convex combination of the points, and by duality its radius satisfies

    .. math:: r^2 = \max_{\lambda \in \Delta} \tfrac12 \lambda^\top D \lambda.

    The maximum sits on an affinely independent support, where :math:`D \lambda` is constant (the circumcentre). All supports are
    tried: every one with :math:`\lambda \ge 0` is a lower bound, and the best is the radius. Sets have one point per class, so m
    is small.

    Args:
        square: ``[sets, m, m]``, squared distances, float64.

    Returns:
        The radii ``[sets]`` and the barycentric coordinates ``[sets, m]`` of the centres.

    Example:
        >>> radius, where = enclosing_balls(np.array([[[0.0, 4.0], [4.0, 0.0]]]))
        >>> radius.tolist(), where.tolist()
        ([1.0], [[0.5, 0.5]])
    """
    sets, m = square.shape[:2]
    best, where = np.zeros(sets), np.zeros((sets, m))
    where[:, :1] = 1
    for size in range(2, m + 1):
        for support in combinations(range(m), size):
            inner = torch.from_numpy(square[:, support][:, :, support])
            solved = _circumcentres(inner)
            value = (solved[:, None] @ inner @ solved[:, :, None]).squeeze((1, 2)).numpy() / 2
            valid = (solved >= 0).all(1).numpy() & np.isfinite(value) & (value > best)
            best[valid] = value[valid]
            where[valid] = 0
            where[np.flatnonzero(valid)[:, None], list(support)] = solved.numpy()[valid]
    return np.sqrt(best), where


def _circumcentres(square: Tensor) -> Tensor:
    """Barycentric coordinates of the circumcentres, ``D lambda`` constant and ``sum lambda = 1``; NaN for singular sets."""
    scale = square.amax((1, 2), keepdim=True)
    scaled = square / torch.where(scale > 0, scale, 1.0)
    solution, info = torch.linalg.solve_ex(scaled, torch.ones_like(scaled[:, :, :1]))
    solution = solution.squeeze(2)
    solution = solution / solution.sum(1, keepdim=True)
    residual = (scaled @ solution[:, :, None]).squeeze(2)
    flat = (residual - residual.mean(1, keepdim=True)).abs().amax(1) <= 1e-9
    return torch.where(((info == 0) & flat)[:, None], solution, torch.nan)


def feasible(square: np.ndarray, epsilon: float) -> np.ndarray:
    """Whether each set fits into an l2 ball of radius ``epsilon``: three points by formula, more by all supports."""
    if square.shape[1] == 3:
        sides = np.sqrt(square[:, (0, 0, 1), (1, 2, 2)])
        return triangle_radius(sides) <= epsilon
    return enclosing_balls(square)[0] <= epsilon


def triangle_radius(sides: np.ndarray) -> np.ndarray:
    """Radius of the smallest ball round a triangle with the given sides ``[triangles, 3]``: half the longest side, or the
    circumradius if no angle is obtuse; Kahan's order of operations keeps needle triangles exact.

    Example:
        >>> triangle_radius(np.array([[3.0, 4.0, 5.0], [1.0, 1.0, 1.0]])).round(6).tolist()
        [2.5, 0.57735]
    """
    a, b, c = np.sort(sides, 1).T
    product = (c + (b + a)) * (a - (c - b)) * (a + (c - b)) * (c + (b - a))
    with np.errstate(divide="ignore", invalid="ignore"):
        circumradius = a * b * c / np.sqrt(product)
    obtuse = (a * a + b * b <= c * c) | ~(product > 0)
    return np.where(obtuse, c / 2, circumradius)

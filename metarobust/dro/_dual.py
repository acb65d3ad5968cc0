"""The dual problem of one variable, solved on the host in float64.

The arrays are as long as a batch, and there an operation of NumPy costs a fraction of one of torch. A problem on another
device costs one copy here and one back, and no synchronisation in between, however many iterations it takes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from metarobust._checks import require
from metarobust.divergences import Divergence, Tilt

MOST_ITERATIONS = 200
SMALLEST_SCALE = 1e-30  # relative to the spread of the losses: the value is then the maximum up to rounding
SPENT = 1e-12  # relative difference between budget and radius at which the search ends
ROUNDING = 1e-6  # the same, for a solution that counts as converged
TIE = 16 * float(np.finfo(np.float64).eps)


class Point(NamedTuple):
    """The inner solution at one scale ``s``: which candidates are chosen, the weights, and the budget that they spend."""

    log_scale: float
    chosen: np.ndarray  # [n], the candidate of each example
    losses: np.ndarray  # [n], of these candidates, and so the costs
    costs: np.ndarray
    tilt: Tilt
    budget: float
    slope: float  # minus the derivative of the budget in log s, with the candidates held


class Solution(NamedTuple):
    """The optimum: weights of examples and candidates, the split of the budget, and what derivatives need."""

    value: float
    multiplier: float
    scale: float  # s = multiplier + kappa
    weights: np.ndarray  # [n], of the examples
    shares: np.ndarray  # [n, m], of the candidates of an example
    mixed: np.ndarray | None  # [n, m], +1 and -1 for two candidates between which examples are split at a kink
    kink_price: float  # by how much the budgets of the two sides of the kink differ
    reweighting: float
    transport: float
    converged: bool
    relative_losses: np.ndarray  # [n], (chosen loss - maximum) / s
    tilt: Tilt


class Problem:
    """Examples of positive base weight with finite candidates, losses scaled to maximum 0 and spread 1."""

    def __init__(self, losses: np.ndarray, costs: np.ndarray | None, base: np.ndarray, divergence: Divergence) -> None:
        self.hard = costs is None
        self.costs = np.zeros_like(losses) if costs is None else costs
        self.losses, self.base, self.divergence = losses, base, divergence
        self.rows = np.arange(len(losses))

    def at(self, log_scale: float, *, cheapest: bool = True, near: Point | None = None) -> Point:
        """The solution at one scale; of tied candidates the ``cheapest`` is chosen, or the dearest."""
        scale = float(np.exp(log_scale))
        if self.hard and self.losses.shape[1] == 1:
            chosen, losses, costs = self.rows * 0, self.losses[:, 0], self.costs[:, 0]
            z = losses / scale
        else:
            values = self.losses - scale * self.costs
            best = values.max(1)
            size = np.abs(self.losses).max(1, where=np.isfinite(self.losses), initial=0)
            close = values >= (best - TIE * (size + np.abs(best)))[:, None]
            chosen = np.where(close, self.costs if cheapest else -self.costs, np.inf).argmin(1)
            losses, costs = self.losses[self.rows, chosen], self.costs[self.rows, chosen]
            z = losses / scale - costs
        tilt = self.divergence.tilt(z, self.base, None if near is None else near.tilt.inner)
        weights = self.base * tilt.ratio
        slope = float(quadratic_form(tilt, weights, losses / scale))
        return Point(log_scale, chosen, losses, costs, tilt, tilt.divergence + float(weights @ costs), slope)

    def limit(self) -> Point:
        """The limit of scale 0: weights on the examples that reach the largest loss, each by its cheapest way."""
        best = self.losses.max(1)
        chosen = np.where(self.losses == best[:, None], self.costs, np.inf).argmin(1)
        costs = self.costs[self.rows, chosen]
        tilt = self.divergence.tilt(np.where(best == self.losses.max(), -costs, -np.inf), self.base)
        reached = np.where(tilt.ratio > 0, costs, 0)
        budget = tilt.divergence + float(self.base @ (tilt.ratio * reached))
        return Point(-np.inf, chosen, best, costs, tilt, budget, 0.0)

    def smallest_budget(self) -> float:
        """What reaching any candidates at all costs: 0 if every example has one of cost 0."""
        least = self.costs.min(1)
        if not least.any():
            return 0.0
        tilt = self.divergence.tilt(-least, self.base)
        return tilt.divergence + float(self.base @ (tilt.ratio * least))


def quadratic_form(tilt: Tilt, weights: np.ndarray, x: np.ndarray) -> float:
    """``x @ J @ x``; J annuls constants, so the entry where h is largest is moved to 0 against cancellation."""
    x = x - x[int(tilt.curvature.argmax())]
    hx = tilt.curvature * x
    h, w = float(hx.sum()), float(weights @ x)
    hh, hw, ww = tilt.correction
    return float(hx @ x) - (hh * h + 2 * hw * w) * h - ww * w * w


def starting_scale(problem: Problem, radius: float) -> float:
    """``log s`` with s = sqrt(Var / (2 radius)), right for small radii."""
    losses = problem.losses.max(1)
    variance = float(problem.base @ np.square(losses - problem.base @ losses))
    return 0.5 * float(np.log(max(variance, 1e-12) / (2 * radius)))


def brackets(problem: Problem, radius: float, least: float) -> Iterator[Point]:
    """Two points with budgets above and below the radius; a single one if even the smallest scale leaves something over.

    Raises:
        RuntimeError: there is no bracket.
    """
    start = max(starting_scale(problem, radius), least)
    here = low = high = problem.at(start)
    step = np.log(4.0)
    while high.budget > radius:
        low, high = high, problem.at(high.log_scale + step, near=high)
        step *= 2
        if high.log_scale > 600:
            raise RuntimeError(
                f"the dual of radius {radius:g} has no solution: a budget of {high.budget:g} is spent at any multiplier"
            )
    if low is high:
        low, step = here, np.log(4.0)
        while low.budget <= radius:
            high = low
            if low.log_scale <= least:
                yield low
                return
            low = problem.at(max(low.log_scale - step, least), near=low)
            step *= 2
    yield low
    yield high


def search(problem: Problem, radius: float, least: float) -> tuple[Point, Point]:
    """The point whose budget is the radius, twice; or the two sides of a kink, the dearer first.

    The budget falls in s: smoothly while the candidates stay, in jumps where one replaces another. Jumps inside the bracket are
    visited by bisection over their places, until the smooth piece or the jump with the solution is found.
    """
    low, *rest = brackets(problem, radius, least)
    if not rest:
        return low, low
    high = rest[0]
    while not problem.hard:
        changes = np.flatnonzero(low.chosen != high.chosen)
        gain = low.losses[changes] - high.losses[changes]
        price = low.costs[changes] - high.costs[changes]
        places = np.log((gain / price)[(price > 0) & (gain > 0)])
        inside = np.sort(places[(places > low.log_scale) & (places < high.log_scale)])
        if not inside.size:
            break
        place = float(inside[inside.size // 2])
        cheap = problem.at(place, near=low)
        if cheap.budget > radius:
            low = cheap
            continue
        dear = problem.at(place, cheapest=False, near=cheap)
        if dear.budget >= radius:
            return dear, cheap
        high = dear
    return smooth(problem, low, high, radius)


def smooth(problem: Problem, low: Point, high: Point, radius: float) -> tuple[Point, Point]:
    """Newton's method on ``log budget`` against ``log s``, which is a line for small radii; bisection where it fails."""
    point = min(low, high, key=lambda p: abs(p.budget - radius))
    left, right = low.log_scale, high.log_scale
    last = before = right - left
    for _ in range(MOST_ITERATIONS):
        if abs(point.budget - radius) <= SPENT * radius or right - left <= 1e-15 * max(1.0, abs(left)):
            break
        ratio = np.log(point.budget / radius) if point.budget > 0 else -1.0
        step = ratio * point.budget / point.slope if point.slope > 0 else np.inf
        if not (left < point.log_scale + step < right and abs(step) <= before / 2):
            step = (left + right) / 2 - point.log_scale
        before, last = last, abs(step)
        point = problem.at(point.log_scale + step, near=point)
        if point.budget > radius:
            left, low = point.log_scale, point
        else:
            right, high = point.log_scale, point
    narrow = right - left <= 1e-14 * max(1.0, abs(left))
    if abs(point.budget - radius) > SPENT * radius and narrow and low.budget > radius >= high.budget:
        return low, high  # the budget falls so steeply that neighbouring numbers spend too much and too little: mix them too
    return point, point


def solve(
    losses: np.ndarray, costs: np.ndarray | None, base: np.ndarray, *, radius: float, kappa: float, divergence: Divergence
) -> Solution:
    """The worst-case expectation of finite ``losses [n, m]`` at ``costs [n, m]`` (None: all 0), base weights of sum 1.

    Raises:
        ValueError: not even moving each example the shortest way fits into the radius.
    """
    with np.errstate(all="ignore"):
        kept = base > 0
        if costs is not None:
            losses = np.where(np.isinf(costs), -np.inf, losses)
        kept_losses = losses[kept]
        largest = float(kept_losses.max())
        spread = largest - float(kept_losses.min(where=np.isfinite(kept_losses), initial=largest))
        unit = spread if spread > 0 else 1.0
        problem = Problem((kept_losses - largest) / unit, None if costs is None else costs[kept], base[kept], divergence)
        least = problem.smallest_budget()
        require(
            radius >= least if least == 0 else radius > least,
            "radius",
            f"> {least:g}, what moving every example to its cheapest candidate spends",
            f"{radius:g}",
            "add each natural example as a candidate of cost 0",
        )
        first = problem.limit() if kappa == 0 else problem.at(float(np.log(kappa / unit)))
        if first.budget <= radius:
            dear = cheap = first
            scale = kappa / unit
        elif radius == 0:
            dear = cheap = _natural(problem)
            scale = np.inf
        else:
            dear, cheap = search(problem, radius, np.log(max(kappa / unit, SMALLEST_SCALE)))
            floored = cheap.budget < radius and cheap.log_scale <= np.log(max(kappa / unit, SMALLEST_SCALE))
            scale = kappa / unit if floored else float(np.exp(cheap.log_scale))
        return _solution(problem, dear, cheap, scale=scale, radius=radius, kappa=kappa, unit=unit, top=largest, kept=kept)


def _natural(problem: Problem) -> Point:
    """Radius 0: base weights, and the largest loss among the candidates of cost 0."""
    free = np.where(problem.costs == 0, problem.losses, -np.inf)
    chosen = free.argmax(1)
    none = np.zeros(len(free))
    tilt = Tilt(np.ones(len(free)), 0.0, none, (0.0, 0.0, 0.0), 0.0)
    return Point(np.inf, chosen, free.max(1), none, tilt, 0.0, 0.0)


def _solution(
    problem: Problem,
    dear: Point,
    cheap: Point,
    *,
    scale: float,
    radius: float,
    kappa: float,
    unit: float,
    top: float,
    kept: np.ndarray,
) -> Solution:
    """The mixture that spends the budget exactly, in the caller's units and for all examples."""
    mixing = 0.0 if dear is cheap else (radius - cheap.budget) / (dear.budget - cheap.budget)
    mixing = min(max(mixing, 0.0), 1.0)
    tilt = cheap.tilt._replace(
        ratio=cheap.tilt.ratio + mixing * (dear.tilt.ratio - cheap.tilt.ratio),
        divergence=cheap.tilt.divergence + mixing * (dear.tilt.divergence - cheap.tilt.divergence),
    )
    weights = problem.base * tilt.ratio
    multiplier = max(scale - kappa / unit, 0.0)
    constrained = multiplier > 0
    attained = float((problem.base * cheap.tilt.ratio) @ np.where(cheap.tilt.ratio > 0, cheap.losses, 0))
    if scale < np.inf:  # the dual's value, at the cheaper side
        attained += (multiplier * radius if constrained else 0.0) - scale * cheap.budget
    converged = dear is not cheap or (abs(cheap.budget - radius) <= ROUNDING * radius if constrained else cheap.budget <= radius)
    losses = cheap.losses + mixing * (dear.losses - cheap.losses)
    costs = np.where(weights > 0, cheap.costs + mixing * (dear.costs - cheap.costs), 0)

    def everywhere(values: np.ndarray) -> np.ndarray:
        full = np.zeros((len(kept), *values.shape[1:]))
        full[kept] = values
        return full

    shares = np.zeros_like(problem.losses)
    shares[problem.rows, cheap.chosen] = 1 - mixing
    shares[problem.rows, dear.chosen] += mixing
    mixed = None
    if (dear.chosen != cheap.chosen).any():
        mixed = np.zeros_like(problem.losses)
        mixed[problem.rows, dear.chosen] = 1
        mixed[problem.rows, cheap.chosen] -= 1
        mixed = everywhere(mixed)
    tilt = tilt._replace(ratio=everywhere(tilt.ratio), curvature=everywhere(tilt.curvature))
    return Solution(
        value=top + unit * attained,
        multiplier=unit * multiplier,
        scale=unit * scale if constrained else kappa,
        weights=everywhere(weights),
        shares=everywhere(shares),
        mixed=mixed,
        kink_price=dear.budget - cheap.budget,
        reweighting=tilt.divergence,
        transport=float(weights @ costs),
        converged=bool(converged and np.isfinite(attained)),
        relative_losses=everywhere(losses / scale if scale > 0 else np.zeros_like(losses)),
        tilt=tilt,
    )

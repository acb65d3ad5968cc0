"""How the rows of a search move: sign steps, RMSprop, and the adaptive steps of APGD, each with a state of its own per row."""

import math
from typing import Protocol

import torch
from torch import Tensor

from metarobust._tensors import flat, per_example
from metarobust.threat_models import ThreatModel

STEP_RULES = ("rmsprop", "sign", "apgd")


class Ball:
    """Ball and box of ``examples``, each with ``group`` rows in a row: ``[examples * group, ...]``.

    l_inf keeps one pair of bounds per example and broadcasts it over the group, which spares memory traffic.
    """

    def __init__(self, threat_model: ThreatModel, x: Tensor, group: int) -> None:
        self.threat_model, self.x, self.group = threat_model, x, group
        self.box = threat_model.bounds(x) if threat_model.norm == "linf" else None
        self.rows = x.repeat_interleave(group, 0) if self.box is None and group > 1 else x

    def project_(self, rows: Tensor) -> Tensor:
        """The projection of the rows; l_inf works in place."""
        if self.box is None:
            return self.threat_model.project(rows, self.rows)
        self.clamp_(rows.view(len(self.x), self.group, *rows.shape[1:]), slice(None))
        return rows

    def clamp_(self, rows: Tensor, part: slice) -> None:
        """Project ``[examples, group, ...]``, the rows of some examples, onto the l_inf ball and the box, in place."""
        assert self.box is not None
        rows.clamp_(*(bound[part].unsqueeze(1) for bound in self.box))


class StepRule(Protocol):
    """Moves rows. ``state`` maps names to tensors with one entry per row, so that rows can be dropped from outside."""

    state: dict[str, Tensor]

    def move(self, ball: Ball, rows: Tensor, gradient: Tensor, values: Tensor) -> Tensor:
        """The next point of each row, given the objective's gradient and value there; may overwrite its arguments."""
        ...


def step_rule(name: str, threat_model: ThreatModel, steps: int) -> StepRule:
    """A fresh rule for a run of ``steps`` steps."""
    if name == "apgd":
        return APGDSparse(threat_model, steps) if threat_model.norm == "l1" else APGDSteps(threat_model, steps)
    return RMSpropSteps(threat_model, steps) if name == "rmsprop" else SignSteps(threat_model, steps)


class SignSteps:
    """Steps of steepest ascent whose length falls from ``epsilon / 2`` to 0 along half a cosine."""

    def __init__(self, threat_model: ThreatModel, steps: int) -> None:
        self.threat_model, self.steps, self.step = threat_model, steps, 0
        self.state: dict[str, Tensor] = {}

    def move(self, ball: Ball, rows: Tensor, gradient: Tensor, values: Tensor) -> Tensor:
        length = self.threat_model.epsilon / 4 * (1 + math.cos(math.pi * self.step / self.steps))
        self.step += 1
        return ball.project_(rows.add_(self.threat_model.ascent_direction(gradient, rows), alpha=length))


class RMSpropSteps:
    r"""RMSprop, :math:`v \leftarrow a v + (1 - a) g^2,\ x \leftarrow x + \eta g / \sqrt v`, with ``a = 0.99``.

    Under a constant gradient step ``t`` has length :math:`\eta / \sqrt{1 - a^t}`; :math:`\eta` is set so that all steps together
    travel ``TRAVEL * epsilon``. For l2 and l1 ``v`` follows the squared norm of the gradient instead of each coordinate (the
    coordinatewise rule would spend a round ball on unimportant coordinates), and the way is longer: on the sphere the distance
    to the best point falls only like ``exp(-travel / epsilon)``.
    """

    DECAY = 0.99
    TRAVEL = 3.0
    TRAVEL_ROUND = 15.0
    BLOCK = 2**18  # elements; four single-precision tensors of this size fit the second-level caches of two cores

    def __init__(self, threat_model: ThreatModel, steps: int) -> None:
        self.norm = threat_model.norm
        per_unit = sum((1 - self.DECAY**t) ** -0.5 for t in range(1, steps + 1))
        travel = self.TRAVEL if self.norm == "linf" else self.TRAVEL_ROUND
        self.rate = travel * threat_model.epsilon / per_unit
        self.threat_model = threat_model
        self.scale = 1.0
        self.state: dict[str, Tensor] = {}

    def move(self, ball: Ball, rows: Tensor, gradient: Tensor, values: Tensor) -> Tensor:
        if self.norm == "linf":
            return self._coordinatewise(ball, rows, gradient)
        dual = flat(gradient).square().sum(1) if self.norm == "l2" else flat(gradient).abs().amax(1).square()
        if "square" not in self.state:
            self.state["square"] = torch.zeros_like(dual)
        square = self.state["square"]
        square.mul_(self.DECAY).add_(dual, alpha=1 - self.DECAY)
        length = self.rate * (dual / square.clamp(min=torch.finfo(square.dtype).tiny)).sqrt()
        return ball.project_(rows + per_example(length, rows) * self.threat_model.ascent_direction(gradient, rows))

    def _coordinatewise(self, ball: Ball, rows: Tensor, gradient: Tensor) -> Tensor:
        """The l_inf step; ``square`` holds v divided by ``scale``, which spares a pass over memory.

        On a CPU a few examples are moved at a time, so that the operations on them meet in the cache.
        """
        square = self.state.get("square")
        if square is None or self.scale < 1e-10:
            least = max(torch.finfo(rows.dtype).tiny, 1e-24)  # keeps 0 / 0 away where a gradient is always 0
            square = torch.full_like(rows, least) if square is None else square.mul_(self.scale).clamp_(min=least)
            self.state["square"], self.scale = square, 1.0
        self.scale *= self.DECAY
        fresh, rate = (1 - self.DECAY) / self.scale, self.rate / self.scale**0.5
        examples = len(ball.x)
        at_once = max(1, self.BLOCK * examples // rows.numel()) if rows.device.type == "cpu" else examples
        of_examples = [tensor.view(examples, -1, *rows.shape[1:]) for tensor in (rows, gradient, square)]
        for part in (slice(begin, begin + at_once) for begin in range(0, examples, at_once)):
            x, g, v = (tensor[part] for tensor in of_examples)
            v.addcmul_(g, g, value=fresh)
            ball.clamp_(x.addcdiv_(g, v.sqrt(), value=rate), part)
        return rows


def checkpoints(steps: int) -> list[int]:
    """The numbers of steps after which APGD may halve its step sizes (Croce and Hein, 2020, section 3.1).

    Example:
        >>> checkpoints(100)
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    interval, shrink, shortest = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    found = [interval]
    while found[-1] < steps:
        interval = max(interval - shrink, shortest)
        found.append(found[-1] + interval)
    return [point for point in found if point < steps]


class APGDSteps:
    """Auto-PGD for l_inf and l2 (Croce and Hein, 2020, arXiv 2003.01690, algorithm 1): momentum and a step size per row.

    Each row starts with steps of ``2 * epsilon``. At a checkpoint its step is halved, and it goes back to its best point, if
    the objective rose in at most 75 % of the steps since the last checkpoint, or if the step was not halved there and the best
    value has not improved since. Both projections are exact, where AutoAttack projects onto the ball and clips to the box.
    """

    RISE = 0.75
    MOMENTUM = 0.75

    def __init__(self, threat_model: ThreatModel, steps: int) -> None:
        self.threat_model = threat_model
        self.checkpoints = checkpoints(steps)
        self.step, self.last_checkpoint = 0, 0
        self.state: dict[str, Tensor] = {}

    def move(self, ball: Ball, rows: Tensor, gradient: Tensor, values: Tensor) -> Tensor:
        state = self.state
        if self.step == 0:
            state.update(
                best=rows.clone(),
                best_gradient=gradient.clone(),
                best_value=values.clone(),
                checked_value=values.clone(),
                last_value=values,
                rises=torch.zeros_like(values),
                halved=torch.ones_like(values, dtype=torch.bool),
                length=torch.full_like(values, 2 * self.threat_model.epsilon),
                previous=rows,
            )
        else:
            self._remember(rows, gradient, values)
            if self.step in self.checkpoints:
                self._check(rows, gradient)
        ahead = self.threat_model.ascent_direction(gradient, rows).mul_(per_example(state["length"], rows))
        ahead = ball.project_(ahead.add_(rows))
        if self.step > 0:  # x + a (ahead - x) + (1 - a) (x - previous), collected by tensors
            a = self.MOMENTUM
            ahead = ball.project_(ahead.mul_(a).add_(rows, alpha=2 * (1 - a)).add_(state["previous"], alpha=a - 1))
        state["previous"] = rows
        self.step += 1
        return ahead

    def _remember(self, rows: Tensor, gradient: Tensor, values: Tensor) -> None:
        state = self.state
        state["rises"] += values > state["last_value"]
        state["last_value"] = values
        better = values > state["best_value"]
        overwrite(state["best"], better, rows)
        overwrite(state["best_gradient"], better, gradient)
        state["best_value"] = torch.maximum(state["best_value"], values)

    def _check(self, rows: Tensor, gradient: Tensor) -> None:
        state = self.state
        stuck = state["rises"] <= self.RISE * (self.step - self.last_checkpoint)
        stalled = ~state["halved"] & (state["best_value"] <= state["checked_value"])
        halve = stuck | stalled
        state["length"] = torch.where(halve, state["length"] / 2, state["length"])
        state["halved"], state["checked_value"] = halve, state["best_value"].clone()
        state["rises"].zero_()
        self.last_checkpoint = self.step
        overwrite(rows, halve, state["best"])
        overwrite(gradient, halve, state["best_gradient"])


class APGDSparse:
    """Auto-PGD for l1 (Croce and Hein, 2021, arXiv 2103.01208, section 3.4): sparse steps whose sparsity follows the best point.

    A step moves the ``k`` coordinates of largest gradient that the box leaves free by equal amounts. Every 4 % of the steps,
    ``k`` is set to two thirds of the coordinates that the best point has moved; where that number fell by more than 5 %, the
    step goes back to ``epsilon`` and the row to its best point, elsewhere the step shrinks by 1.5, not below ``epsilon / 10``.
    """

    START_SHARE = 0.2
    SHRINK = 1.5
    SMALLEST = 10.0

    def __init__(self, threat_model: ThreatModel, steps: int) -> None:
        self.threat_model = threat_model
        self.interval = max(int(0.04 * steps), 1)
        self.step = 0
        self.state: dict[str, Tensor] = {}

    def move(self, ball: Ball, rows: Tensor, gradient: Tensor, values: Tensor) -> Tensor:
        state, epsilon = self.state, self.threat_model.epsilon
        dimensions = flat(rows).shape[1]
        if self.step == 0:
            state.update(
                best=rows.clone(),
                best_gradient=gradient.clone(),
                best_value=values.clone(),
                length=torch.full_like(values, epsilon),
                moved=torch.full_like(values, self.START_SHARE * dimensions),
                count=torch.full_like(values, self.START_SHARE * dimensions),
            )
        else:
            better = values > state["best_value"]
            overwrite(state["best"], better, rows)
            overwrite(state["best_gradient"], better, gradient)
            state["best_value"] = torch.maximum(state["best_value"], values)
            if self.step % self.interval == 0:
                moved = (flat(state["best"]) != flat(ball.rows)).sum(1).to(values.dtype)
                sparser = moved < 0.95 * state["moved"]
                state["count"], state["moved"] = moved / self.SHRINK, moved
                shorter = (state["length"] / self.SHRINK).clamp(epsilon / self.SMALLEST, epsilon)
                state["length"] = torch.where(sparser, epsilon, shorter)
                overwrite(rows, sparser, state["best"])
                overwrite(gradient, sparser, state["best_gradient"])
        self.step += 1
        direction = self._direction(rows, gradient)
        return ball.project_(rows + per_example(state["length"].to(rows), rows) * direction)

    def _direction(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Signs of the ``count`` largest free entries, scaled to unit l1 norm."""
        threat_model = self.threat_model
        stuck = torch.where(gradient > 0, rows >= threat_model.upper, rows <= threat_model.lower)
        magnitude = flat(gradient).abs().masked_fill(flat(stuck), 0)
        most = magnitude.shape[1]
        count = self.state["count"].long().clamp(1, most)
        largest = magnitude.topk(min(int(count.max()), most), dim=1).values
        threshold = largest.gather(1, (count - 1)[:, None])
        signs = flat(gradient).sign() * ((magnitude >= threshold) & (magnitude > 0))
        return (signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).reshape(rows.shape)


def overwrite(old: Tensor, where: Tensor, new: Tensor) -> None:
    """``old[where] = new[where]`` along the first axis, in place: by index on the CPU, without a synchronisation elsewhere."""
    if old.device.type == "cpu":
        rows = where.nonzero().squeeze(1)
        if len(rows):
            old.index_copy_(0, rows, new.index_select(0, rows))
    else:
        old.copy_(torch.where(per_example(where, old), new, old))

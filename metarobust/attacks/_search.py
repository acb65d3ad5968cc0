"""The engine behind APGD and BETA: many rows per example (targets x restarts) climb at once, and the best point found is kept."""

from dataclasses import dataclass, field, replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from metarobust import _checks
from metarobust._checks import losses
from metarobust.attacks._common import buffers_kept, checked_logits, input_gradient
from metarobust.attacks._memory import halving_on_out_of_memory, rows_within
from metarobust.attacks._step_rules import Ball, overwrite, step_rule
from metarobust.attacks._targets import TargetSet
from metarobust.losses import TargetedLoss, margin
from metarobust.threat_models import ThreatModel
from metarobust.types import Model

COMPACTION_SHARE = 0.9
"""Finished examples are dropped once at most this share of a chunk is left standing; each drop copies the state once."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What to climb and how; see `APGD` and `BETA` for the meaning of the fields.

    ``objective(logits, y, target)`` is the quantity that each row climbs. Without ``targets`` the group holds restarts only, and
    the objective receives the label as its target. ``phases`` are multiples of epsilon with shares of the steps. With
    ``each_target`` the result is the best point by the margin of each target, ``[batch, targets, ...]``, whatever row found it.
    """

    threat_model: ThreatModel
    steps: int
    restarts: int
    rule: str
    objective: TargetedLoss
    targets: TargetSet | None
    random_start: bool
    eot_samples: int
    survivors_only: bool
    by_margin: bool
    memory_budget: int | None
    phases: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    each_target: bool = False

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, start: Tensor | None = None
    ) -> Tensor:
        return self.find(model, x, y, generator, start)[0]

    def find(
        self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The points found, and each example's targets ``[batch, targets]``."""
        x = x.contiguous()
        begin = x if start is None else start.contiguous()
        with buffers_kept(model):
            most_rows = rows_within(self.memory_budget, model, x)
            standing, best, targets = self._look(model, begin, y, most_rows)
            result = best.x.clone()
            examples = standing.nonzero().squeeze(1)
            if len(examples) == 0 or self.threat_model.epsilon == 0:
                return result, targets
            group = self.restarts * (1 if targets is None else targets.shape[1])
            starts = self._starts(x[examples], None if start is None else begin[examples], group, generator)
            at_once = max(1, most_rows // (group * self.eot_samples))

            def climb(part: slice) -> None:
                chosen = examples[part]
                chunk = _Chunk(self, model, x[chosen], y[chosen], group, None if targets is None else targets[chosen])
                chunk.offer(best.select(chosen))
                chunk.climb(starts[part].clone())
                result[chosen] = chunk.found.x

            halving_on_out_of_memory(climb, len(examples), at_once)
        return result, targets

    def _look(
        self, model: Model, x: Tensor, y: Tensor, most_rows: int
    ) -> tuple[Tensor, "Best | BestOfEachTarget", Tensor | None]:
        """One forward pass over the first points: who still stands, the first candidate, and each example's targets."""
        logits = torch.cat([self._mean_logits(model, part) for part in x.split(most_rows)])
        checked_logits(logits, y)
        targets = None if self.targets is None else self.targets.choose(model, x, y, logits, self.threat_model)
        if self.each_target:
            assert targets is not None
            points = repeat(x, "examples ... -> examples targets ...", targets=targets.shape[1])
            return torch.ones_like(y, dtype=torch.bool), BestOfEachTarget(margins_of_each(logits, y, targets), points), targets
        clean = margin(logits, y)
        value = losses(self.objective(logits, y, y if targets is None else targets[:, 0]), examples=len(y))
        standing = clean <= 0 if self.survivors_only else torch.ones_like(clean, dtype=torch.bool)
        return standing, Best(clean if self.by_margin else value, clean, x), targets

    def _starts(self, x: Tensor, begin: Tensor | None, group: int, generator: torch.Generator | None) -> Tensor:
        """First points ``[examples, targets * restarts, ...]``, drawn for all examples together: chunks do not change them.

        The restarts are drawn one after the other, so that more restarts begin with the points of fewer; where ``begin`` is
        given the first restart starts there.
        """
        pattern, targets = "examples ... -> (examples targets) ...", group // self.restarts
        each = repeat(x, pattern, targets=targets)
        draws = [] if begin is None else [repeat(begin, pattern, targets=targets)]
        while len(draws) < self.restarts:
            draws.append(self.threat_model.sample(each, generator=generator) if self.random_start else each)
        starts = torch.stack(draws, 1)
        return rearrange(starts, "(examples targets) restarts ... -> examples (targets restarts) ...", examples=len(x))

    @torch.no_grad()
    def _mean_logits(self, model: Model, x: Tensor) -> Tensor:
        """Logits in single precision at least, averaged over the random passes of each row."""
        logits = _checks.logits(
            model(x if self.eot_samples == 1 else x.repeat_interleave(self.eot_samples, 0)), examples=len(x) * self.eot_samples
        )
        logits = logits.float() if logits.element_size() < 4 else logits
        return logits if self.eot_samples == 1 else rearrange(logits, "(x samples) k -> x samples k", x=len(x)).mean(1)


@dataclass
class Best:
    """The best point of each example: ``value`` ranks points that do not fool the model, ``margin`` those that do."""

    value: Tensor
    margin: Tensor
    x: Tensor

    def select(self, rows: Tensor) -> "Best":
        return Best(self.value[rows], self.margin[rows], self.x[rows])

    def update(self, value: Tensor, margin: Tensor, rows: Tensor) -> None:
        """Take, per example, the best of ``[examples, group]`` new points: success first, then the margin or the value."""
        wrong = margin > 0
        rank = torch.where(wrong, margin, torch.where(wrong.any(1, keepdim=True), float("-inf"), value))
        winner = rank.argmax(1, keepdim=True)
        value, margin = value.gather(1, winner).squeeze(1), margin.gather(1, winner).squeeze(1)
        fooled, before = margin > 0, self.margin > 0
        better = torch.where(fooled == before, torch.where(fooled, margin > self.margin, value > self.value), fooled)
        first = torch.arange(len(value), device=value.device) * rank.shape[1]
        if rows.device.type == "cpu":
            taken = better.nonzero().squeeze(1)
            if len(taken):
                self.x.index_copy_(0, taken, rows.index_select(0, (first + winner.squeeze(1))[taken]))
        else:
            overwrite(self.x, better, rows[first + winner.squeeze(1)])
        self.value, self.margin = torch.where(better, value, self.value), torch.where(better, margin, self.margin)


@dataclass
class BestOfEachTarget:
    """The best point of each example for each of its targets: ``margin [examples, targets]``, ``x [examples, targets, ...]``."""

    margin: Tensor
    x: Tensor

    def select(self, rows: Tensor) -> "BestOfEachTarget":
        return BestOfEachTarget(self.margin[rows], self.x[rows])

    def update(self, value: Tensor, margin: Tensor, rows: Tensor) -> None:
        """Take, per example and target, the best of ``[examples, group, targets]`` new margins; ``value`` is not read."""
        winner = margin.argmax(1, keepdim=True)
        margin, winner = margin.gather(1, winner).squeeze(1), winner.squeeze(1)
        better = margin > self.margin
        first = torch.arange(len(margin), device=margin.device)[:, None] * (len(rows) // len(margin))
        overwrite(self.x.flatten(0, 1), better.flatten(), rows[(first + winner).flatten()])  # flatten views: x is contiguous
        self.margin = torch.where(better, margin, self.margin)


def margins_of_each(logits: Tensor, y: Tensor, targets: Tensor) -> Tensor:
    """The margin of each target, ``[rows, targets]``."""
    return logits.gather(1, targets) - logits.gather(1, y[:, None])


@dataclass
class _Chunk:
    """Examples that climb together, ``group`` rows each."""

    search: Search
    model: Model
    x: Tensor
    y: Tensor
    group: int
    targets: Tensor | None
    found: Best | BestOfEachTarget = field(init=False)

    def offer(self, clean: Best | BestOfEachTarget) -> None:
        self.found = clean
        self.examples = torch.arange(len(self.x), device=self.x.device)  # where the live examples are in `found`

    def climb(self, starts: Tensor) -> None:
        """Move the rows through every phase; ``found`` holds the best points at the end."""
        search = self.search
        self.live = self.found.select(self.examples)
        self.row_y = self.y.repeat_interleave(self.group)
        self.row_target = self.row_y if self.targets is None else self.targets.repeat_interleave(search.restarts, 1).flatten()
        rows = starts.flatten(0, 1)
        for number, (radius, share) in enumerate(search.phases):
            last = number == len(search.phases) - 1
            steps = (
                search.steps - sum(int(s * search.steps) for _, s in search.phases[:-1]) if last else int(share * search.steps)
            )
            wide = (
                replace(search.threat_model, epsilon=radius * search.threat_model.epsilon) if radius != 1 else search.threat_model
            )
            rows = self._phase(rows, wide, steps, last=last)
            if len(self.x) == 0:
                break
        self._put_back()

    def _phase(self, rows: Tensor, threat_model: ThreatModel, steps: int, *, last: bool) -> Tensor:
        """``steps`` moves; outside the last phase the ball is wider, so only the way counts and no point is kept."""
        search = self.search
        ball = Ball(threat_model, self.x, self.group)
        rows = ball.project_(rows)
        rule = step_rule(search.rule, threat_model, steps)
        halvings = search.targets.halvings(self.group, steps) if search.targets is not None and last else {}
        reached = None
        for step in range(steps):
            gradient, values, margins = self._gradient(rows)
            if last:
                self._record(rows, values, margins)
                if halvings:
                    reached = values if reached is None else torch.maximum(reached, values)
            keep = self._standing(step) if last else None
            if step in halvings and reached is not None:
                keep = self._promising(reached, halvings[step], keep)
            if keep is not None:
                if len(keep) == 0:
                    return rows[:0]
                rows, gradient, values = rows[keep], gradient[keep], values[keep]
                rule.state = {name: value[keep] for name, value in rule.state.items()}
                reached = reached[keep] if reached is not None else None
                ball = Ball(threat_model, self.x, self.group)
            rows = rule.move(ball, rows, gradient, values)
        if last:
            with torch.no_grad():
                values, margins = self._measure(self.model(self._sampled(rows)))
            self._record(rows, values, margins)
        return rule.state["best"] if not last and "best" in rule.state else rows

    def _sampled(self, rows: Tensor) -> Tensor:
        return rows if self.search.eot_samples == 1 else rows.repeat_interleave(self.search.eot_samples, 0)

    def _measure(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and margin (best wrong class of all, not only the target) of each row, averaged over random passes."""
        logits = logits.float() if logits.element_size() < 4 else logits
        samples = self.search.eot_samples
        y, target = (t.repeat_interleave(samples) if samples > 1 else t for t in (self.row_y, self.row_target))
        values, margins = losses(self.search.objective(logits, y, target), examples=len(y)), self._margins(logits.detach(), y)
        if samples > 1:
            pattern = "(rows samples) ... -> rows samples ..."
            values, margins = (rearrange(v, pattern, samples=samples).mean(1) for v in (values, margins))
        return values, margins

    def _margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """What the record ranks points by: the best margin of each row, or the margins of all of its example's targets."""
        if not self.search.each_target:
            return margin(logits, y)
        assert self.targets is not None
        return margins_of_each(logits, y, self.targets.repeat_interleave(len(y) // len(self.targets), 0))

    def _gradient(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            values, margins = self._measure(self.model(self._sampled(leaf)))
            return input_gradient(values, leaf).contiguous(), values.detach(), margins

    def _record(self, rows: Tensor, values: Tensor, margins: Tensor) -> None:
        margins = margins.view(-1, self.group, *margins.shape[1:])
        # A row's target margin says how to climb; the best wrong class of the row says how good the point is.
        self.live.update(margins if self.search.by_margin else values.view(-1, self.group), margins, rows)

    def _standing(self, step: int) -> Tensor | None:
        """Rows of the examples that still stand, or None as long as dropping the others is not worth a copy."""
        if not self.search.survivors_only or (self.x.device.type != "cpu" and step % 5):
            return None
        standing = (self.live.margin <= 0).nonzero().squeeze(1)
        if len(standing) > COMPACTION_SHARE * len(self.x):
            return None
        self._put_back()
        self.live, self.examples = self.live.select(standing), self.examples[standing]
        self.x, self.y = self.x[standing], self.y[standing]
        keep = (standing[:, None] * self.group + torch.arange(self.group, device=standing.device)).flatten()
        self.row_y, self.row_target = self.row_y[keep], self.row_target[keep]
        return keep

    def _promising(self, reached: Tensor, count: int, keep: Tensor | None) -> Tensor:
        """The ``count`` rows of each example whose objective has come highest."""
        reached = reached if keep is None else reached[keep]
        rows = reached.view(-1, self.group).topk(count, dim=1).indices.sort(1).values
        rows = (rows + torch.arange(len(rows), device=rows.device)[:, None] * self.group).flatten()
        self.row_y, self.row_target, self.group = self.row_y[rows], self.row_target[rows], count
        return rows if keep is None else keep[rows]

    def _put_back(self) -> None:
        self.found.x[self.examples], self.found.margin[self.examples] = self.live.x, self.live.margin

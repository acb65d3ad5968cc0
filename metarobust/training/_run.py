"""The state of a training run between two steps, and what one step and the end of an epoch do to it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metarobust._checks import explained_memory, is_out_of_memory, message
from metarobust._processes import Processes
from metarobust._randomness import generator_for
from metarobust.meta_optimizers import FactorRecorder, LearnedOptimizer
from metarobust.training._objective_call import ObjectiveCall, stateful_part
from metarobust.training._result import EpochRecord, TrainingResult
from metarobust.training._schedules import Schedule
from metarobust.types import Attack

NAMED = 8
"""Examples that an error names."""
SMALLEST_SCALE = 2.0**-24
"""A float16 loss scale below this has been halved forty times: no smaller one would help."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``fit`` was asked for, checked."""

    model: nn.Module
    objective: Callable[..., Any]
    x: Tensor
    y: Tensor
    optimizer: torch.optim.Optimizer
    epochs: int
    batch_size: int
    validation: tuple[Tensor, Tensor] | None
    validation_attack: Attack | None
    schedule: Schedule | None
    augment: Callable[[Tensor, torch.Generator], Tensor] | None
    clip_norm: float | None
    amp: str | None
    seed: int
    device: torch.device
    processes: Processes

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.x) / self.batch_size)


class TrainingRun:
    """A run in progress; with the model and the optimizer these fields are all that a resumed run needs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.history: list[EpochRecord] = []
        self.best: dict[str, Tensor] | None = None
        self.best_epoch: int | None = None
        self.step = 0  # finished steps of the epoch in progress
        self.loss_sum = 0.0  # over the examples of these steps
        self.diagnostics: dict[str, list[float]] = {}  # name to (sum over examples, examples)
        self.seconds = 0.0  # of the epoch in progress, until the last checkpoint
        self.begin = time.perf_counter()
        self.parameters = [p for group in plan.optimizer.param_groups for p in group["params"]]
        self.learning_rates = [group["lr"] for group in plan.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.amp == "float16")
        self.call = ObjectiveCall(plan.model, plan.objective, plan.processes.count)
        self.synchronised: nn.Module = self.call
        self.stateful = stateful_part(plan.objective)

    def join(self) -> None:
        """Connect the processes; each leaves with the parameters and buffers of rank 0."""
        if self.plan.processes.count > 1:
            self.synchronised = DistributedDataParallel(self.call)

    def elapsed(self) -> float:
        """Seconds of the epoch in progress."""
        return self.seconds + time.perf_counter() - self.begin

    def batches(self) -> list[Tensor]:
        """The rows of every joint batch of the epoch in progress."""
        order = torch.randperm(len(self.plan.x), generator=generator_for(self.plan.seed, "training order", len(self.history)))
        return list(order.tensor_split(self.plan.steps))

    def start_epoch(self) -> None:
        """Tell an objective that has a state, and a ``start_epoch``, that an epoch begins."""
        start, epoch = getattr(self.stateful, "start_epoch", None), len(self.history)
        if start is not None and self.step == 0:
            generator = generator_for(self.plan.seed, "training epoch", epoch)
            start(self.plan.model, epoch=epoch, epochs=self.plan.epochs, generator=generator)

    def advance(self, rows: Tensor) -> float:
        """One step on the joint batch ``rows``; returns its loss.

        Raises:
            FloatingPointError: loss or gradient are not finite; parameters and buffers are as they were before.
        """
        plan = self.plan
        number = len(self.history) * plan.steps + self.step
        mine = plan.processes.share(rows)
        x, y = (t[mine.to(t.device)].to(plan.device) for t in (plan.x, plan.y))
        generator = generator_for(plan.seed, f"training noise {plan.processes.rank}", number)
        buffers = [buffer.clone() for buffer in plan.model.buffers()]
        self.set_learning_rates(number)
        plan.optimizer.zero_grad()
        told = "pass a smaller one, with another checkpoint; that of this run goes on where more memory is free"
        roomy = explained_memory("batch_size", f"{plan.batch_size} ({self.position()})", told)
        try:
            with roomy, self.recording(generator) as recorder:
                loss = self.charged(x, y, generator, len(rows), recorded=recorder is not None)
                scaled = self.scaler.scale(loss)
                if recorder is None:
                    scaled.backward()
                else:
                    recorder.backward(scaled)
        except FloatingPointError as error:  # of an objective that looks at its losses itself
            self.undo(buffers)
            raise FloatingPointError(f"{error} ({self.position()}, {_batch(rows)})") from error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self.undo(buffers)
            raise
        self.scaler.unscale_(plan.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        values = [*self.call.diagnostics.values()]
        known = [float(value is not None) for value in values]  # by this process; the mean is over those that know it
        told = torch.tensor([*(value or 0.0 for value in values), *known], dtype=torch.float64, device=loss.device)
        shared = plan.processes.sum(torch.cat([loss.detach().double()[None], told]))
        joint_loss, joint_norm, *told = torch.cat([shared[:1], norm.double().to(loss.device)[None], shared[1:]]).tolist()
        joint_loss /= plan.processes.count
        skipped = self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE
        if not math.isfinite(joint_loss) or not (math.isfinite(joint_norm) or skipped):
            self.undo(buffers)
            self.refuse(rows, mine, joint_loss, joint_norm)
        self.check_used()
        if plan.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, plan.clip_norm, norm)
        self.scaler.step(plan.optimizer)
        self.scaler.update()
        self.step += 1
        self.loss_sum += joint_loss * len(rows)
        for name, value, count in zip(self.call.diagnostics, told[: len(values)], told[len(values) :], strict=True):
            if count > 0:
                total, examples = self.diagnostics.get(name, [0.0, 0.0])
                self.diagnostics[name] = [total + value / count * len(rows), examples + len(rows)]
        return joint_loss

    @contextmanager
    def recording(self, generator: torch.Generator) -> Iterator[FactorRecorder | None]:
        """The recorder of the second stream for an optimizer that reads one; None for others."""
        optimizer = self.plan.optimizer
        if not isinstance(optimizer, LearnedOptimizer) or not optimizer.meta_optimizer.two_streams:
            yield None
            return
        with optimizer.record_factors(self.plan.model, generator=generator) as recorder:
            recorder.averages = self.plan.processes.count > 1
            yield recorder

    def charged(self, x: Tensor, y: Tensor, generator: torch.Generator, joint: int, *, recorded: bool) -> Tensor:
        """The objective at this process's part of a joint batch, augmented, in the precision that was asked for.

        ``recorded``: a recorder differentiates it and connects the processes.
        """
        plan = self.plan
        dtype = None if plan.amp is None else getattr(torch, plan.amp)
        with global_generators_from(generator, plan.device):
            if plan.augment is not None:
                x = self.augmented(x, generator)
            # Without its cache, which in older versions of torch hands the casts of a pass under no_grad, such as an attack
            # makes, on to the pass that is differentiated: then the parameters get no gradient.
            with torch.autocast(plan.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
                return (self.call if recorded else self.synchronised)(x, y, generator, joint)

    def set_learning_rates(self, number: int) -> None:
        """Those of the step of this number in the whole run, from its progress alone."""
        plan = self.plan
        factor = 1.0 if plan.schedule is None else plan.schedule(number / (plan.epochs * plan.steps))
        for group, initial in zip(plan.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = initial * factor

    def augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """What ``augment`` makes of a batch, if it keeps shape and dtype."""
        assert self.plan.augment is not None
        found = self.plan.augment(x, generator)
        if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != x.dtype:
            got = f"{list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(message("augment", f"a function that returns a tensor like x, {list(x.shape)} {x.dtype}", got))
        return found

    def check_used(self) -> None:
        """Refuse, before the first update, parameters that get no gradient: the other processes would wait for them."""
        if self.plan.processes.count > 1 and self.step == 0:
            unused = [name for name, p in self.plan.model.named_parameters() if p.requires_grad and p.grad is None]
            if unused:
                remedy = "freeze the others with requires_grad_(False)"
                expected = "such that the loss depends on every parameter that requires a gradient"
                raise ValueError(message("model", expected, f"no gradient for {', '.join(unused)}", remedy))

    def undo(self, buffers: list[Tensor]) -> None:
        """Forget a step that was not finished: gradients go, buffers get their values back."""
        self.plan.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, value in zip(self.plan.model.buffers(), buffers, strict=True):
                buffer.copy_(value)

    def position(self) -> str:
        """Where the run stands, in words."""
        return f"epoch {len(self.history) + 1}, step {self.step + 1} of {self.plan.steps}"

    def refuse(self, rows: Tensor, mine: Tensor, loss: float, norm: float) -> NoReturn:
        """Raise a sentence that says where, and on which examples, loss or gradient became infinite or NaN."""
        broken = [] if self.call.losses is None else mine[~self.call.losses.isfinite().cpu()].tolist()
        broken = [row for part in self.plan.processes.gather(broken[:NAMED]) for row in part][:NAMED]
        where = f"examples {broken} of data" if broken else _batch(rows)
        what = f"loss {loss:.4g}" if not math.isfinite(loss) else f"a gradient of norm {norm:.4g}"
        remedy = "look at these examples, lower the learning rate, or set clip_norm"
        if self.plan.amp is not None:
            remedy += f"; amp={self.plan.amp!r} is short of range or digits, so try amp=False"
        expected = "such that loss and gradient stay finite"
        raise FloatingPointError(message("training", expected, f"{what} in {self.position()}, {where}", remedy))

    def finish_epoch(self) -> EpochRecord:
        """Validate, put the epoch into the history, and keep the parameters if they are the best so far."""
        plan = self.plan
        # Again, for a run that was interrupted after the last step of the epoch: the record shows the rate of that step.
        self.set_learning_rates((len(self.history) + 1) * plan.steps - 1)
        plan.processes.align_buffers(plan.model)
        plan.model.eval()
        clean, robust = (None, None) if plan.validation is None else self.accuracies(*plan.validation)
        record = EpochRecord(
            epoch=len(self.history) + 1,
            loss=self.loss_sum / len(plan.x),
            learning_rate=float(plan.optimizer.param_groups[0]["lr"]),
            clean_accuracy=clean,
            robust_accuracy=robust,
            seconds=self.elapsed(),
            diagnostics={name: total / examples for name, (total, examples) in self.diagnostics.items()},
        )
        highest = max((r.robust_accuracy for r in self.history if r.robust_accuracy is not None), default=-1.0)
        if robust is not None and robust > highest:
            self.best, self.best_epoch = cpu_state(plan.model), record.epoch
        self.history.append(record)
        self.step, self.loss_sum, self.diagnostics = 0, 0.0, {}
        self.seconds, self.begin = 0.0, time.perf_counter()
        return record

    def accuracies(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Clean and robust accuracy in evaluation mode, with the same noise each time; processes take turns at the batches."""
        plan = self.plan
        assert plan.validation_attack is not None
        hits = torch.zeros(2, dtype=torch.float64, device=plan.device)
        for batch, rows in enumerate(torch.arange(len(x)).split(max(1, plan.batch_size // plan.processes.count))):
            if batch % plan.processes.count != plan.processes.rank:
                continue
            inputs, labels = (t[rows.to(t.device)].to(plan.device) for t in (x, y))
            generator = generator_for(plan.seed, "training validation", batch)
            with torch.no_grad(), global_generators_from(generator, plan.device):
                right = self.right(inputs, labels)
                # As in evaluate: an example counts as robust if its prediction is right and no attack changes it.
                inputs, labels = inputs[right], labels[right]
                if len(inputs):
                    x_adv = plan.validation_attack(plan.model, inputs, labels, generator=generator)
                    hits += torch.stack([right.sum(), self.right(x_adv, labels).sum()])
        clean, robust = (plan.processes.sum(hits) / len(x)).tolist()
        return clean, robust

    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """Which rows are classified correctly; one with a NaN among its logits is not."""
        logits = self.plan.model(x)
        return (logits.argmax(1) == y) & ~logits.isnan().any(1)

    def result(self) -> TrainingResult:
        """What the finished run leaves."""
        return TrainingResult(
            last=cpu_state(self.plan.model), best=self.best, best_epoch=self.best_epoch, history=tuple(self.history)
        )


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU, each entry with memory of its own (shared weights too)."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@contextmanager
def global_generators_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of ``device`` from ``generator``, and give them back as they were."""
    seed = int(torch.randint(2**62, (), generator=generator))
    gpus = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def _batch(rows: Tensor) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"batch of the examples {rows[:NAMED].tolist()}{more} of data"

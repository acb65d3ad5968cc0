"""Meta-training: exact meta-gradients, honest truncation, flat memory, bit-identical resume, clear failures."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarobust._tensors import tree_detach
from metarobust.attacks import PGD, count_calls
from metarobust.data import LabelledImages
from metarobust.meta_optimizers import (
    ClassificationTask,
    InterpretableOptimizer,
    LSTMOptimizer,
    calibrate,
    factor_gradients,
    meta_train,
)
from metarobust.meta_optimizers._calibration import smallest_within_noise
from metarobust.meta_optimizers._estimators import Slot, backpropagated, persistent_evolution, unroll
from metarobust.meta_optimizers._kinds import MetaOptimizer
from metarobust.meta_optimizers._meta_training import MetaTrainingRun, MetaTrainingSettings
from metarobust.models import cnn, mlp, stack
from metarobust.threat_models import ThreatModel
from metarobust.types import Streams

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)


@dataclass
class SmoothTask:
    """A differentiable classification task in float64: softplus networks, full-batch, so that central differences converge."""

    optimizees: int = 2

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.rand(self.optimizees * 6, 1, 2, 2, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (len(self.x),), generator=generator)
        self.template = stack([self.build() for _ in range(self.optimizees)])
        self.names = [name for name, _ in self.template.named_parameters()]

    @staticmethod
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 3)).double()

    def initial_parameters(self, *, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in self.template.parameters())

    def _losses(self, parameters: tuple[Tensor, ...], x: Tensor) -> Tensor:
        named = dict(zip(self.names, parameters, strict=True))
        losses = F.cross_entropy(functional_call(self.template, named, (x,)), self.y, reduction="none")
        return losses.reshape(self.optimizees, -1).mean(1)

    def streams(
        self, parameters: tuple[Tensor, ...], *, generator: torch.Generator, create_graph: bool = False
    ) -> tuple[Tensor, Streams]:
        if not create_graph:
            parameters = tuple(p.detach().requires_grad_() for p in parameters)
        found = factor_gradients(
            self.template,
            lambda: self._losses(parameters, self.x).sum(),
            threat_model=THREAT_MODEL,
            parameters=parameters,
            create_graph=create_graph,
        )
        return found.loss.detach(), Streams(found.gradients, found.second_gradients)

    def meta_loss(self, parameters: tuple[Tensor, ...], *, generator: torch.Generator) -> Tensor:
        return self._losses(parameters, 1 - self.x)


def settings(**changes: Any) -> MetaTrainingSettings:
    values: dict[str, Any] = {
        "iterations": 10, "total_steps": 10, "unroll": 5, "slots": 1, "learning_rate": 1e-2, "clip_norm": 1.0,
        "loss_cap": 10.0, "late_weight": 1.0, "meta_loss_every": 1, "seed": 0,
    }  # fmt: skip
    return MetaTrainingSettings(**(values | changes))


def unrolled_loss(run: MetaTrainingRun, slot: Slot) -> Tensor:
    """Advance the slot by one unroll, graph kept."""
    window = unroll(slot, run.rule_for(slot.total_steps), run.settings, (slot.parameters, slot.state))
    slot.parameters, slot.state, slot.age = window.parameters, window.state, slot.age + run.settings.unroll
    return window.loss


def smooth_optimizer() -> LSTMOptimizer:
    torch.manual_seed(0)
    optimizer = LSTMOptimizer(hidden_size=4, initial_learning_rate=0.05).double()
    with torch.no_grad():
        for p in optimizer.parameters():  # move every parameter off its symmetric start, so that each one matters
            p.add_(0.1 * torch.randn_like(p))
    return optimizer


def unrolled(optimizer: LSTMOptimizer, steps: int, *, every: int = 1) -> Tensor:
    run = MetaTrainingRun(optimizer, lambda generator: SmoothTask(), settings(unroll=steps, meta_loss_every=every))
    return unrolled_loss(run, run.slots[0])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_meta_gradient_equals_central_differences(steps: int) -> None:
    """Every parameter tensor of the meta-optimizer, along a random direction, in float64, through the real unroll."""
    optimizer = smooth_optimizer()
    gradients = torch.autograd.grad(unrolled(optimizer, steps), list(optimizer.parameters()), allow_unused=True)
    generator = torch.Generator().manual_seed(5)
    for (name, p), gradient in zip(optimizer.named_parameters(), gradients, strict=True):
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        found = 0.0 if gradient is None else (gradient * direction).sum().item()
        start, ends, size = p.detach().clone(), [], 1e-5
        for sign in (1, -1):
            with torch.no_grad():
                p.copy_(start + sign * size * direction)
            ends.append(unrolled(optimizer, steps).item())
        with torch.no_grad():
            p.copy_(start)
        expected = (ends[0] - ends[1]) / (2 * size)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), name
        if steps > 1 and name != "factor_coefficient":
            assert found != 0, f"{name} has no influence: the check would be empty"


def test_first_order_drops_exactly_the_path_through_the_optimizee_gradients() -> None:
    """One step: both agree, because the first gradient depends on no meta-parameter. Two steps: they differ."""
    for steps, equal in ((1, True), (2, False)):
        found = []
        for estimator in ("second_order", "first_order"):
            optimizer = smooth_optimizer()
            run = MetaTrainingRun(optimizer, lambda generator: SmoothTask(), settings(unroll=steps, estimator=estimator))
            found.append(torch.autograd.grad(unrolled_loss(run, run.slots[0]), optimizer.readout)[0])
        assert torch.allclose(*found, rtol=1e-10, atol=1e-12) is equal


def test_truncation_equals_full_when_the_windows_match() -> None:
    """A window of 4 after 3 detached steps has the gradient of those 4 steps alone; losses match the uncut run."""
    optimizer = smooth_optimizer()
    run = MetaTrainingRun(optimizer, lambda generator: SmoothTask(), settings(unroll=3, total_steps=7))
    slot = run.slots[0]
    first = unrolled_loss(run, slot).item()
    slot.parameters, slot.state = tuple(p.detach() for p in slot.parameters), slot.state.detach()
    run.settings = settings(unroll=4, total_steps=7)
    second = unrolled_loss(run, slot)
    full = MetaTrainingRun(optimizer, lambda generator: SmoothTask(), settings(unroll=7, total_steps=7))
    whole = unrolled_loss(full, full.slots[0])
    weights = [0.3 + t / 7 for t in range(1, 8)]
    joined = (first * sum(weights[:3]) + second.item() * sum(weights[3:])) / sum(weights)
    assert joined == pytest.approx(whole.item(), rel=1e-12)
    # The window's gradient by hand: the same four steps from the same detached values.
    again = MetaTrainingRun(optimizer, lambda generator: SmoothTask(), settings(unroll=3, total_steps=7))
    unrolled_loss(again, again.slots[0])
    start = tuple(p.detach().requires_grad_() for p in again.slots[0].parameters)
    state, total, task = again.slots[0].state.detach(), torch.zeros(()), SmoothTask()
    parameters = start
    for t in range(4, 8):
        _, streams = task.streams(parameters, generator=again.generator, create_graph=True)
        updates, state = again.rule_for(7).update(cast("Any", streams), state, params=cast("Any", parameters))
        parameters = tuple(p + u for p, u in zip(parameters, cast("Any", updates), strict=True))
        total = total + (0.3 + t / 7) * task.meta_loss(parameters, generator=again.generator).mean() / sum(weights[3:])
    for p in optimizer.parameters():
        a, b = (torch.autograd.grad(value, p, retain_graph=True, allow_unused=True)[0] for value in (second, total))
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


class SavedBytes:
    """Bytes that autograd keeps for a backward pass, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "KeptTensor":
        return KeptTensor(tensor, self)


class KeptTensor:
    def __init__(self, tensor: Tensor, books: SavedBytes) -> None:
        self.tensor, self.books = tensor, books
        books.now += tensor.nbytes
        books.most = max(books.most, books.now)

    def __del__(self) -> None:
        self.books.now -= self.tensor.nbytes


@pytest.mark.parametrize("estimator", ["second_order", "first_order"])
@pytest.mark.parametrize("every", [1, 3, 20])
def test_recomputed_steps_give_the_same_gradient_for_less_memory(estimator: str, every: int) -> None:
    """Loss, gradient, randomness and end of an unroll of 7 steps, in parts of one step, of three, and as one."""
    found = []
    for recompute_every in (None, every):
        optimizer, books = smooth_optimizer(), SavedBytes()
        changed = settings(unroll=7, total_steps=20, meta_loss_every=2, estimator=estimator, recompute_every=recompute_every)
        run = MetaTrainingRun(optimizer, lambda generator: SmoothTask(), changed)
        slot, parameters = run.slots[0], list(optimizer.parameters())
        for _ in range(2):  # the second unroll starts from a state that is not zero
            with torch.autograd.graph.saved_tensors_hooks(books.pack, lambda kept: kept.tensor):
                loss, gradients = backpropagated(slot, run.rule_for(20), changed, parameters)
        found.append((loss, gradients, slot, books.most))
    (loss, gradients, slot, most), (again, regained, other, less) = found
    assert again == pytest.approx(loss, rel=1e-12)
    assert any(g.abs().max() > 1e-6 for g in gradients)
    for a, b in zip(gradients, regained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    for a, b in zip(slot.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert torch.equal(slot.generator.get_state(), other.generator.get_state())
    assert slot.age == other.age == 14
    if every < 7:
        assert less < (0.3 if every == 1 else 0.6) * most


def live_tensors() -> int:
    import gc

    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_memory_is_flat_over_100_truncations() -> None:
    run = MetaTrainingRun(
        LSTMOptimizer(hidden_size=2).double(),
        lambda generator: SmoothTask(),
        settings(unroll=2, total_steps=20, iterations=200),
    )
    for _ in range(12):
        run.advance()
    before, horizon = live_tensors(), []
    for _ in range(100):
        run.advance()
        assert all(p.grad_fn is None for p in run.slots[0].parameters)
        assert run.slots[0].state.hidden.grad_fn is None
        horizon.append(run.slots[0].age)
    assert max(horizon) <= 20
    assert live_tensors() <= before + 5


def pool(size: int = 60) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 10
    images = torch.rand(size, 1, 8, 8, generator=generator)
    return LabelledImages(images, labels, num_classes=10)


def digit_task(generator: torch.Generator) -> ClassificationTask:
    subsets = torch.stack([torch.randperm(60, generator=generator)[:20] for _ in range(2)])
    build = (lambda: mlp([64, 4, 10])) if torch.rand((), generator=generator) < 0.5 else (lambda: cnn([2, 3]))
    attack = PGD(threat_model=THREAT_MODEL, steps=1)
    return ClassificationTask(
        build=build, dataset=pool(), subsets=subsets, threat_model=THREAT_MODEL, meta_attack=attack, meta_batch_size=16
    )


def test_persistent_evolution_credits_the_noise_of_earlier_unrolls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaged over all signs of two moves, the estimate of the second unroll is its whole derivative, both paths included."""
    from metarobust.meta_optimizers import _meta_training

    torch.manual_seed(0)
    rule = InterpretableOptimizer(initial_learning_rate=0.05).double().requires_grad_(False)
    rule.fan_in_power.requires_grad_()

    def run_with(**changes: Any) -> MetaTrainingRun:
        return MetaTrainingRun(rule, lambda generator: SmoothTask(), settings(unroll=2, total_steps=4, **changes))

    exact = run_with()
    unrolled_loss(exact, exact.slots[0])
    loss = unrolled_loss(exact, exact.slots[0])
    wanted = float(torch.autograd.grad(loss, rule.fan_in_power)[0].sum())
    cut = run_with()
    unrolled_loss(cut, cut.slots[0])
    cut.slots[0].parameters, cut.slots[0].state = tree_detach(cut.slots[0].parameters), tree_detach(cut.slots[0].state)
    window = float(torch.autograd.grad(unrolled_loss(cut, cut.slots[0]), rule.fan_in_power)[0].sum())
    found, before = [], rule.fan_in_power.detach().clone()
    for signs in itertools.product((1.0, -1.0), repeat=2):
        moves = iter(signs)
        run = run_with(estimator="pes", noise=1e-4)

        def prescribed(shape: torch.Size, moves: Any = moves, **how: Any) -> Tensor:
            return torch.full(shape, next(moves), dtype=how["dtype"])

        monkeypatch.setattr(_meta_training.torch, "randn", prescribed)
        for _ in range(2):
            middle, gradients = persistent_evolution(
                run.slots[0], run.rule_for(4), run.settings, run.parameters, run.draw_noise()
            )
        monkeypatch.undo()
        assert middle == pytest.approx(loss.item(), abs=1e-6)
        found.append(float(gradients[0].sum()) / len(gradients[0]))
    assert torch.equal(rule.fan_in_power, before)
    assert sum(found) / len(found) == pytest.approx(wanted, rel=1e-5)
    assert abs(window - wanted) > 0.2 * abs(wanted), "the window alone must miss something, or the check is empty"


def test_several_tasks_per_step_average_their_gradients() -> None:
    def gradient(**changes: Any) -> list[list[Tensor]]:
        seen: list[list[Tensor]] = []
        run = MetaTrainingRun(smooth_optimizer(), lambda g: Drawn(g), settings(slots=3, unroll=2, **changes))
        take = run.step

        def spy(loss: float, gradients: list[Tensor], *, age: int) -> float:
            seen.append(gradients)
            take(loss, [torch.zeros_like(g) for g in gradients], age=age)
            return loss

        run.step = spy  # type: ignore[method-assign]
        losses = [run.advance() for _ in range(6 // run.settings.tasks_per_step)]
        return [[torch.tensor(losses)], *seen]

    class Drawn(SmoothTask):
        def __init__(self, generator: torch.Generator) -> None:
            super().__init__()
            self.x = torch.rand(self.x.shape, generator=generator, dtype=torch.float64)

    (alone, *singles), (joint, *triples) = gradient(), gradient(tasks_per_step=3)
    torch.testing.assert_close(alone[0].reshape(2, 3).mean(1), joint[0])
    for number, triple in enumerate(triples):
        for i, mean in enumerate(triple):
            torch.testing.assert_close(mean, sum(singles[3 * number + k][i] for k in range(3)) / 3)


def test_both_copies_of_persistent_evolution_meet_the_same_randomness() -> None:
    class Noisy(SmoothTask):
        def meta_loss(self, parameters: tuple[Tensor, ...], *, generator: torch.Generator) -> Tensor:
            return super().meta_loss(parameters, generator=generator) + torch.rand(2, generator=generator, dtype=torch.float64)

    found = []
    for task in (SmoothTask, Noisy):
        torch.manual_seed(0)
        rule = InterpretableOptimizer(initial_learning_rate=0.05).double()
        run = MetaTrainingRun(rule, lambda generator, task=task: task(), settings(estimator="pes", noise=1e-4))
        arguments = run.slots[0], run.rule_for(10), run.settings, run.parameters
        found.append([persistent_evolution(*arguments, run.draw_noise())[1] for _ in range(2)])
    for plain, noisy in zip(*found, strict=True):
        for a, b in zip(plain, noisy, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_tasks_of_several_lengths(generator: torch.Generator) -> None:
    """Log-uniform between the two ends, and no longer than the curriculum allows."""
    chosen = settings(total_steps=400, shortest_steps=25, curriculum=0.5)
    late = torch.tensor([chosen.horizon(0.5, generator) for _ in range(2000)], dtype=torch.float64)
    assert late.min() >= 25
    assert late.max() <= 400
    assert float((late <= 100).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert max(chosen.horizon(0.25, generator) for _ in range(500)) <= 100
    assert chosen.horizon(0.0, generator) == 25
    state = generator.get_state()
    assert settings(total_steps=40).horizon(0.3, generator) == 40
    assert torch.equal(generator.get_state(), state), "one length draws nothing"
    run = MetaTrainingRun(smooth_optimizer(), lambda g: SmoothTask(), settings(total_steps=40, shortest_steps=10, slots=5))
    assert len({slot.total_steps for slot in run.slots}) > 2
    for _ in range(60):
        run.advance()
        assert all(slot.age < slot.horizon <= slot.total_steps <= 40 for slot in run.slots)


RUN: dict[str, Any] = {
    "total_steps": 12,
    "unroll": 4,
    "slots": 2,
    "seed": 3,
    "iterations": 9,
    "silent": True,
}


@pytest.mark.parametrize("kind", [lambda: LSTMOptimizer(hidden_size=3), InterpretableOptimizer], ids=["lstm", "interpretable"])
@pytest.mark.parametrize("estimator", ["second_order", "first_order", "pes"])
def test_resume_is_bit_identical(tmp_path: Path, estimator: str, kind: Callable[[], MetaOptimizer]) -> None:
    def fresh() -> MetaOptimizer:
        torch.manual_seed(0)
        return kind()

    class Killed(Exception):
        pass

    def kill(iteration: int, loss: float) -> None:
        if iteration == 6:
            raise Killed

    arguments = RUN | {"estimator": estimator, "shortest_steps": 6}
    straight = meta_train(fresh(), digit_task, **arguments)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        meta_train(fresh(), digit_task, **(arguments | {"on_iteration": kill}), checkpoint=path, checkpoint_every=2)
    resumed = meta_train(fresh(), digit_task, **arguments, checkpoint=path, checkpoint_every=2)
    assert resumed.losses == straight.losses
    for a, b in zip(straight.meta_optimizer.parameters(), resumed.meta_optimizer.parameters(), strict=True):
        assert torch.equal(a, b)
    finished = meta_train(fresh(), digit_task, **arguments, checkpoint=path)
    assert finished.losses == straight.losses
    with pytest.raises(ValueError, match=r"seed=3 there and 4 here"):
        meta_train(fresh(), digit_task, **(arguments | {"seed": 4}), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        meta_train(fresh(), digit_task, **arguments, checkpoint=path)


@pytest.mark.parametrize("estimator", ["second_order", "pes"])
@pytest.mark.parametrize(
    "kind",
    [
        lambda: LSTMOptimizer(hidden_size=4, initial_learning_rate=1e-3),
        lambda: InterpretableOptimizer(initial_learning_rate=1e-3),
    ],
    ids=["lstm", "interpretable"],
)
def test_meta_training_lowers_the_meta_loss_and_records_itself(kind: Callable[[], MetaOptimizer], estimator: str) -> None:
    """Fifty meta-steps on one smooth task must beat the untrained rule on it, by a margin far above rounding."""
    torch.manual_seed(0)
    optimizer = kind().double()
    trained = meta_train(
        optimizer, lambda generator: SmoothTask(), iterations=50, total_steps=10, unroll=5, slots=1,
        learning_rate=3e-2, estimator=estimator, silent=True,
    )  # fmt: skip
    assert sum(trained.losses[-10:]) < 0.9 * sum(trained.losses[:10])
    assert optimizer.record["meta_training"]["iterations"] == 50
    assert optimizer.record["torch"] == torch.__version__


def test_loss_cap_gives_no_gradient_and_nan_raises() -> None:
    class Exploded(SmoothTask):
        def meta_loss(self, parameters: tuple[Tensor, ...], *, generator: torch.Generator) -> Tensor:
            return 1e6 * super().meta_loss(parameters, generator=generator)

    run = MetaTrainingRun(smooth_optimizer(), lambda generator: Exploded(), settings())
    assert run.advance() == pytest.approx(10.0)

    class Broken(SmoothTask):
        def meta_loss(self, parameters: tuple[Tensor, ...], *, generator: torch.Generator) -> Tensor:
            return super().meta_loss(parameters, generator=generator) * float("nan")

    run = MetaTrainingRun(smooth_optimizer(), lambda generator: Broken(), settings())
    with pytest.raises(FloatingPointError, match=r"meta-loss nan.*iteration 1.*lower learning_rate"):
        run.advance()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"iterations": 0}, "iterations must be an integer >= 1"),
        ({"estimator": "es"}, "estimator must be one of 'second_order', 'first_order', 'pes'"),
        ({"noise": 0.0}, "noise must be a finite number > 0"),
        ({"shortest_steps": 13}, "shortest_steps must be at most total_steps, got 13"),
        ({"tasks_per_step": 3}, r"tasks_per_step must be at most slots \(=2\), got 3"),
        ({"recompute_every": 0}, "recompute_every must be an integer >= 1"),
        ({"recompute_every": 2, "estimator": "pes"}, "recompute_every must be None with estimator='pes'"),
        ({"curriculum": 1.5}, "curriculum must be a share of the iterations"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number > 0"),
        ({"late_weight": -1.0}, "late_weight must be a finite number >= 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer >= 1"),
    ],
)
def test_bad_settings(change: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        meta_train(LSTMOptimizer(), digit_task, **(RUN | change))


def test_task_draws_judging_examples_outside_the_subset_and_counts_attacks() -> None:
    task = digit_task(torch.Generator().manual_seed(1))
    for copy in range(2):
        assert not set(task.subsets[copy].tolist()) & set(task.held_out[copy].tolist())
        assert len(task.held_out[copy]) == 40
    generator = torch.Generator().manual_seed(2)
    parameters = task.initial_parameters(generator=generator)
    with count_calls() as counter:
        task.streams(parameters, generator=generator)
        assert counter.calls == 0
        task.meta_loss(parameters, generator=generator)
        assert counter.calls == 1
    with pytest.raises(ValueError, match="subsets must be smaller than the data set"):
        ClassificationTask(build=lambda: mlp([64, 10]), dataset=pool(), subsets=torch.arange(60)[None], threat_model=THREAT_MODEL)


def test_task_without_second_stream_is_the_same_gradient() -> None:
    task = digit_task(torch.Generator().manual_seed(1))
    plain = ClassificationTask(build=task.build, dataset=task.dataset, subsets=task.subsets, threat_model=None)
    parameters = task.initial_parameters(generator=torch.Generator().manual_seed(0))
    found = [t.streams(parameters, generator=torch.Generator().manual_seed(5))[1] for t in (task, plain)]
    for a, b in zip(found[0].gradients, found[1].gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert any(h.any() for h in found[0].second_gradients)
    assert not any(h.any() for h in found[1].second_gradients)


def test_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    optimizer_state = digit_task(torch.Generator().manual_seed(1)).initial_parameters(generator=torch.Generator())
    assert optimizer_state[0].shape[0] == 2
    assert torch.equal(before, torch.get_rng_state())


def test_calibration_scores_every_pair_and_keeps_the_smallest_within_noise() -> None:
    torch.manual_seed(0)
    optimizer = LSTMOptimizer(hidden_size=2)
    assert optimizer.factor_coefficient is not None
    before = optimizer.factor_coefficient.detach().clone()
    tasks = [digit_task(torch.Generator().manual_seed(s)) for s in (1, 2)]
    arguments: dict[str, Any] = {"total_steps": 3, "first": (0.0, 0.5), "others": (0.0, 0.1)}
    chosen = calibrate(optimizer, tasks, **arguments)
    assert set(chosen.scores) == {(0.0, 0.0), (0.0, 0.1), (0.5, 0.0), (0.5, 0.1)}
    assert len(optimizer.record["calibration"]["scores"]) == 4
    shifted = optimizer.factor_coefficient.detach() - before
    again = LSTMOptimizer(hidden_size=2)
    again.shift_factor_coefficients(first=chosen.offsets[0], others=chosen.offsets[1])
    assert again.factor_coefficient is not None
    torch.testing.assert_close(shifted, again.factor_coefficient.detach())
    again.load_state_dict(optimizer.state_dict())
    again.shift_factor_coefficients(first=-chosen.offsets[0], others=-chosen.offsets[1])
    assert calibrate(again, tasks, **arguments).scores == chosen.scores, "same tasks, same seeds, same scores"


def test_smallest_offset_within_noise() -> None:
    best = torch.tensor([0.6, 0.7, 0.5, 0.6])
    clear = {(0.0, 0.0): best - 0.1, (0.5, 0.0): best - 0.05, (1.0, 0.0): best}
    assert smallest_within_noise(clear) == (1.0, 0.0), "a constant paired difference is no noise"
    noise = torch.tensor([0.1, -0.1, 0.1, -0.09])
    assert smallest_within_noise({(0.0, 0.0): best + noise - 0.01, (1.0, 0.0): best}) == (0.0, 0.0)


def test_calibration_needs_two_streams_and_tasks() -> None:
    with pytest.raises(ValueError, match="one that reads two streams"):
        calibrate(LSTMOptimizer(gradient_source="gradient"), [digit_task(torch.Generator())], total_steps=2)
    with pytest.raises(ValueError, match="at least one task"):
        calibrate(LSTMOptimizer(), [], total_steps=2)


def test_one_stream_meta_optimizers_train_on_the_same_tasks() -> None:
    torch.manual_seed(0)
    optimizer = LSTMOptimizer.serban2020()
    before = [p.detach().clone() for p in optimizer.parameters()]
    paper = asdict(MetaTrainingSettings.serban2020(iterations=2))
    trained = meta_train(optimizer, digit_task, **paper, silent=True)
    assert len(trained.losses) == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, optimizer.parameters(), strict=True))

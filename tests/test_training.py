"""The training loop: its steps against plain formulas, resume to the bit, what it refuses, what it leaves alone."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from training_setting import (
    NOISY,
    PLAIN,
    THREAT_MODEL,
    Recorded,
    Scalar,
    assert_equal_states,
    cross_entropy,
    data,
    network,
    rows_of,
    sgd,
    train,
    without_seconds,
)

from metarobust.attacks import FGSM, PGD
from metarobust.data import LabelledImages
from metarobust.evaluation import evaluate
from metarobust.meta_optimizers import LSTMOptimizer
from metarobust.objectives import MART, TRADES, AdversarialTraining
from metarobust.training import cosine, fit, piecewise

# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [PLAIN, TRADES(attack=FGSM(threat_model=THREAT_MODEL)), MART(attack=PLAIN.attack)])
def test_a_run_is_plain_gradient_descent_on_the_mean_loss_of_its_batches(objective: Any) -> None:
    """SGD by hand on the batches that the objective saw, in float64, with a deterministic attack."""
    model, recorded = network().double(), Recorded(objective)
    by_hand = copy.deepcopy(model)
    result = train(model, recorded, data(dtype=torch.float64), epochs=3)
    assert len(recorded.x) == 9
    losses = []
    for x, y in zip(recorded.x, recorded.y, strict=True):
        parameters = list(by_hand.parameters())
        per_example = objective(by_hand, x, y)
        losses.append(per_example.detach())
        gradients = torch.autograd.grad(per_example.mean(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= 0.1 * g
    for found, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for epoch, record in enumerate(result.history):
        assert record.epoch == epoch + 1
        assert record.loss == pytest.approx(torch.cat(losses[3 * epoch : 3 * epoch + 3]).mean().item(), rel=1e-12)


def test_an_epoch_is_a_new_order_of_all_examples_in_batches_of_equal_size() -> None:
    x, y = data()
    orders = {}
    for seed in (0, 0, 1):
        recorded = Recorded(PLAIN)
        train(network(), recorded, (x, y), seed=seed, epochs=2)
        assert [len(batch) for batch in recorded.x] == [8, 7, 7, 8, 7, 7]
        rows = [rows_of(batch, x) for batch in recorded.x]
        for batch, labels in zip(rows, recorded.y, strict=True):
            assert torch.equal(y[batch], labels)
        first, second = ([row for batch in epoch for row in batch] for epoch in (rows[:3], rows[3:]))
        assert sorted(first) == sorted(second) == list(range(22))
        assert first != second
        assert first != list(range(22))
        assert orders.setdefault(seed, rows) == rows, "the same seed gives the same order"
    assert orders[0] != orders[1]


def test_noise_is_new_in_each_step_and_follows_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        model, recorded = network(), Recorded(NOISY)
        train(model, recorded, seed=seed)
        assert len(set(recorded.seeds)) == len(recorded.seeds) == 6
        found.append(model.state_dict())
    assert_equal_states(found[0], found[1])
    assert not torch.equal(found[0]["0.weight"], found[2]["0.weight"])


def test_dropout_needs_no_global_state_and_leaves_it_as_it_was() -> None:
    masks: list[Tensor] = []
    found = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        model = network(full=True)
        model[3].register_forward_hook(lambda module, inputs, output: masks.append((output == 0).float()))
        before = torch.get_rng_state()
        train(model, NOISY, data(24), epochs=1, validation=data(9, 1), validation_attack=NOISY.attack)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model.state_dict())
    assert_equal_states(*found)
    assert len({str(mask.tolist()) for mask in masks if mask.any() and len(mask) == 8}) > 3


def test_augmentation_comes_before_the_objective_and_draws_reproducibly() -> None:
    def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
        return (0.5 * x + 0.1 * torch.rand(x.shape, generator=generator) + 0.1 * torch.rand(x.shape)).clamp(0, 1)

    seen = []
    for _ in range(2):
        recorded = Recorded(PLAIN)
        train(network(), recorded, augment=shifted)
        seen.append(torch.cat(recorded.x))
    assert torch.equal(*seen)
    assert seen[0].max() <= 0.7
    with pytest.raises(ValueError, match=r"augment must be a function that returns a tensor like x, \[8, 5\] torch.float32, got"):
        train(network(), augment=lambda x, generator: x[:, :4])


def test_the_schedule_scales_the_initial_rates_by_the_progress() -> None:
    model, rates = network(), []
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 0.02}]
    optimizer = torch.optim.SGD(groups)
    optimizer.register_step_pre_hook(lambda o, *_: rates.append([group["lr"] for group in o.param_groups]))
    result = train(model, epochs=4, batch_size=11, optimizer=optimizer, schedule=piecewise({0.5: 0.1, 0.75: 0.01}))
    factors = [1.0] * 4 + [0.1] * 2 + [0.01] * 2
    assert rates == [pytest.approx([0.2 * f, 0.02 * f]) for f in factors]
    assert [record.learning_rate for record in result.history] == pytest.approx([0.2, 0.2, 0.02, 0.002])
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.02], "given back, so that a second run starts right"
    with pytest.raises(ZeroDivisionError):
        train(model, optimizer=optimizer, schedule=lambda t: 0.5, on_epoch=lambda record: 1 / 0)
    assert optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("clip_norm", [0.01, 1e6])
def test_clipping_bounds_the_norm_over_all_parameters(clip_norm: float) -> None:
    found = []
    for clip in (clip_norm, None):
        model = network().double()
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        train(model, examples=data(8, dtype=torch.float64), epochs=1, optimizer=sgd(model, lr=1.0), clip_norm=clip)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
    clipped, free = found
    assert free.norm() > 0.02
    expected = free if clip_norm > 1 else free * (clip_norm / free.norm())
    torch.testing.assert_close(clipped, expected, rtol=1e-3, atol=0)


def test_modes_and_batch_statistics() -> None:
    """Steps in training mode; validation and callbacks in evaluation mode, where they move no statistics."""
    model, modes, counted = network(full=True), [], []
    model[1].register_forward_hook(lambda module, inputs, output: counted.append(module.training))

    def attack(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Tensor:
        modes.append(model.training)
        return x

    def record(_: Any) -> None:
        modes.append(model.training)
        counted.append(int(model[1].num_batches_tracked))

    train(model, cross_entropy, validation=data(5, 1), validation_attack=attack, on_epoch=record)
    assert modes == [False] * 4
    assert [c for c in counted if not isinstance(c, bool)] == [3, 6]
    assert counted.count(True) == 6
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_autocast_keeps_the_gradients_of_objectives_that_first_run_without_a_graph() -> None:
    """TRADES calls the model under no_grad first; with the cache of older versions of torch the weights then stand still."""
    seen: list[torch.dtype] = []
    caches: list[bool] = []
    states = []
    for amp in (False, "bfloat16"):
        model = network()
        model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        model[0].register_forward_hook(
            lambda *_: caches.append(torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
        )
        result = train(
            model, TRADES(threat_model=THREAT_MODEL, steps=2), amp=amp, validation=data(6, 1), validation_attack=PLAIN.attack
        )
        states.append(model.state_dict())
        assert math.isfinite(result.history[-1].loss)
    assert not any(caches)
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert seen[-1] == torch.float32, "validation is in full precision"
    for name, start in network().state_dict().items():
        moved, expected = states[1][name] - start, states[0][name] - start
        assert expected.norm() > 1e-3
        assert (moved - expected).norm() < 0.1 * expected.norm(), name


def test_a_batch_size_above_the_number_of_examples_means_all_of_them():
    one, other = (train(network(), cross_entropy, epochs=2, batch_size=size) for size in (22, 1000))
    assert all(torch.equal(other.last[name], value) for name, value in one.last.items())


def test_half_precision_losses_are_added_in_single_precision() -> None:
    losses: list[Tensor] = []

    def objective(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Tensor:
        found = PLAIN(model, x, y).bfloat16()
        losses.append(found.detach().double())
        return found

    result = train(network(), objective, epochs=1, batch_size=22)
    assert result.history[0].loss == pytest.approx(losses[0].mean().item(), rel=1e-6)


def test_an_objective_may_give_a_scalar_with_diagnostics() -> None:
    def objective(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Scalar:
        losses = PLAIN(model, x, y, generator=generator)
        sizes.append(len(x))
        return Scalar(losses.mean(), {"size": float(len(x)), **({"odd": 3.0} if len(x) % 2 else {})})

    sizes: list[int] = []
    found, expected = network().double(), network().double()
    scalar = train(found, objective, data(dtype=torch.float64))
    plain = train(expected, PLAIN, data(dtype=torch.float64))
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert [r.loss for r in scalar.history] == pytest.approx([r.loss for r in plain.history], rel=1e-12)
    assert sizes[:3] == [8, 7, 7]
    assert scalar.history[0].diagnostics == pytest.approx({"size": (64 + 49 + 49) / 22, "odd": 3.0})
    assert plain.history[0].diagnostics == {}


def test_learned_optimizers_work_and_say_what_a_second_stream_needs() -> None:
    torch.manual_seed(0)
    model = network()
    rule = LSTMOptimizer(gradient_source="gradient", hidden_size=4)
    train(model, optimizer=rule.torch_optimizer(model.parameters(), total_steps=6))
    assert not torch.equal(model[0].weight, network()[0].weight)
    with pytest.raises(ValueError, match="one that knows the ball of its second stream"):
        train(model, optimizer=LSTMOptimizer(hidden_size=4).torch_optimizer(model.parameters(), total_steps=6))


# Validation and result -----------------------------------------------------------------------------------------------


def planned(accuracies: list[float], examples: int = 10) -> Any:
    """An attack with given robust accuracies, epoch after epoch, on a model that is right on each example, [1, 0] and [0, 1]."""
    calls: list[int] = []

    def attack(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Tensor:
        broken = round((1 - accuracies[len(calls)]) * examples)
        calls.append(len(x))
        return torch.cat([1 - x[:broken], x[broken:]])

    return attack


def sure_setting() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
        model.bias.zero_()
    y = torch.arange(10) % 2
    return model, (torch.eye(2)[y], y)


def test_the_best_epoch_is_the_first_of_the_highest_robust_accuracy() -> None:
    model, examples = sure_setting()
    states: list[dict[str, Tensor]] = []
    accuracies = [0.2, 0.7, 0.4, 0.7, 0.5]
    result = train(
        model, cross_entropy, examples, epochs=5, batch_size=10,
        validation=examples, validation_attack=planned(accuracies),
        on_epoch=lambda record: states.append(copy.deepcopy(model.state_dict())),
    )  # fmt: skip
    assert [record.robust_accuracy for record in result.history] == pytest.approx(accuracies)
    assert [record.clean_accuracy for record in result.history] == [1.0] * 5
    assert result.best_epoch == 2
    assert result.best is not None
    assert_equal_states(result.best, states[1])
    assert_equal_states(result.last, states[4])
    assert_equal_states(result.last, model.state_dict())
    assert not torch.equal(result.best["weight"], result.last["weight"])
    assert result.overfitting_gap == pytest.approx(0.2)
    with torch.no_grad():
        model.weight.zero_()
    assert_equal_states(result.last, states[4])


def test_accuracies_are_those_of_evaluate() -> None:
    attack, validation = PGD(threat_model=THREAT_MODEL, steps=3, random_start=False), data(50, 1)
    model = network()
    more = {"validation": validation, "validation_attack": attack}
    result = train(model, cross_entropy, epochs=30, optimizer=sgd(model, lr=0.5), **more)
    report = evaluate(model, validation, threat_model=THREAT_MODEL, attacks={"pgd": attack}, reliability_checks=False)
    record = result.history[-1]
    assert record.clean_accuracy == pytest.approx(report.clean_accuracy)
    assert record.robust_accuracy == pytest.approx(report.worst_case_accuracy)
    assert 0 < report.worst_case_accuracy < report.clean_accuracy < 1


def test_each_epoch_is_judged_with_the_same_noise() -> None:
    """A model that stands still keeps its accuracies to the last example, though the attack starts at random."""
    seen: list[Tensor] = []

    def attack(model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        seen.append(THREAT_MODEL.sample(x, generator=generator))
        return seen[-1]

    train(network(), epochs=2, schedule=lambda t: 0.0, validation=data(20, 1), validation_attack=attack)
    half = len(seen) // 2
    assert half > 1
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_examples_with_nan_logits_count_as_wrong() -> None:
    class Sometimes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits if self.training else logits.where(x[:, :1] < 0.5, math.nan)

    x, _ = data(20, 1)
    result = train(Sometimes(5, 3), validation=(x, torch.zeros(20).long()), validation_attack=PLAIN.attack)
    clean = result.history[0].clean_accuracy
    assert clean is not None
    assert clean <= (x[:, 0] < 0.5).float().mean().item() < 1


def test_without_validation_there_is_no_best() -> None:
    result = train(network())
    assert (result.best, result.best_epoch, result.overfitting_gap) == (None, None, None)
    assert result.history[0].clean_accuracy is result.history[0].robust_accuracy is None
    assert repr(result) == "TrainingResult(best_epoch=None)"


def test_labelled_images_are_data() -> None:
    x, y = data()
    model = nn.Sequential(nn.Flatten(), network())
    images = LabelledImages(x.reshape(22, 1, 1, 5), y, num_classes=3)
    found = train(model, examples=images, validation=images, validation_attack=PLAIN.attack)
    expected = train(network(), validation=(x, y), validation_attack=PLAIN.attack)
    assert without_seconds(found) == without_seconds(expected)


@pytest.mark.parametrize("validated", [True, False])
def test_result_on_disk(validated: bool, tmp_path: Path) -> None:
    model = network(full=True)
    more = {"validation": data(9, 1), "validation_attack": PLAIN.attack} if validated else {}
    result = train(model, **more)
    folder = result.save(tmp_path / "run")
    assert_equal_states(load_file(folder / "last.safetensors"), result.last)
    assert (folder / "best.safetensors").exists() is validated
    if validated:
        assert_equal_states(load_file(folder / "best.safetensors"), result.best or {})
    told = json.loads((folder / "history.json").read_text())
    assert told["best_epoch"] == result.best_epoch
    assert told["history"] == [vars(record) for record in result.history]
    picture = result.plot(tmp_path / "run.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="path must be a file that ends in one of .*, .pdf, .*; write run.png"):
        result.plot(tmp_path / "run.txt")
    with pytest.raises(FileNotFoundError, match="folder must be inside an existing folder"):
        result.save(tmp_path / "nowhere" / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.png"]


def test_tied_weights_can_be_trained_saved_and_resumed(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        model[2].weight = model[0].weight
        return model

    result = train(tied(), checkpoint=tmp_path / "run.safetensors")
    model = tied()
    again = train(model, checkpoint=tmp_path / "run.safetensors")
    assert_equal_states(again.last, result.last)
    assert not model.training
    assert torch.equal(result.last["0.weight"], result.last["2.weight"])
    result.save(tmp_path / "result")


# Numbers that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[3, 11], list(range(12))])
def test_a_loss_that_is_not_finite_names_the_examples_and_leaves_all_as_it_was(bad: list[int], tmp_path: Path) -> None:
    x, y = data()
    marked = torch.isin(torch.arange(22), torch.tensor(bad))
    model, path, after = network(full=True), tmp_path / "run.safetensors", []

    def objective(model: Any, x_batch: Tensor, y: Tensor, *, generator: Any) -> Tensor:
        spoilt = torch.tensor([bool(marked[row]) for row in rows_of(x_batch, x)])
        logits = model(x_batch + (1e30 if len(after) == 1 and spoilt.any() else 0.0))  # spoils the running statistics too
        losses = F.cross_entropy(logits, y, reduction="none")
        return losses.where(~spoilt, math.nan) if len(after) == 1 else losses

    recorded = Recorded(objective)
    with pytest.raises(FloatingPointError) as caught:
        train(model, recorded, (x, y), batch_size=22 if len(bad) > 8 else 8, epochs=3, checkpoint=path,
              on_epoch=lambda record: after.append(path.read_bytes()))  # fmt: skip
    found = re.search(r"got loss nan in epoch 2, step (\d) of (\d), examples (\[.*\]) of data; look at these", str(caught.value))
    assert found is not None, str(caught.value)
    named = json.loads(found[3])
    in_batch = [row for row in rows_of(recorded.x[-1], x) if row in bad]
    assert named == in_batch[:8] != []
    assert_equal_states(dict(model.state_dict()), recorded.states[-1])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert path.read_bytes() == after[0] or int(found[1]) > 1
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_or_a_scalar_that_is_not_finite_names_the_batch() -> None:
    def kinked(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Tensor:
        return (0 * model(x).sum(1)).sqrt()

    def scalar(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Scalar:
        return Scalar(model(x).sum() * math.inf, {})

    def raising(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Scalar:
        model(x)
        raise FloatingPointError("row 3 is NaN")

    for objective, text in (
        (kinked, r"got a gradient of norm nan in epoch 1, step 1 of 3, batch of the examples \[\d+(, \d+){7}\] of data; look"),
        (scalar, r"got loss (nan|-?inf) in epoch 1, step 1 of 3, batch of the examples \["),
        (raising, r"row 3 is NaN \(epoch 1, step 1 of 3, batch of the examples \["),
    ):
        model = network(full=True)
        with pytest.raises(FloatingPointError, match=text):
            train(model, objective)
        assert_equal_states(dict(model.state_dict()), dict(network(full=True).state_dict()))
    with pytest.raises(FloatingPointError, match=r"\[\d+(, \d+){7}\] and 14 more of data.*amp='bfloat16' is short of range"):
        train(network(), kinked, batch_size=22, amp="bfloat16")


# Schedules -----------------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    assert [piecewise({0.75: 0.01, 0.5: 0.1})(t) for t in (0.0, 0.4999, 0.5, 0.7499, 0.75, 0.99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert piecewise({0.0: 2.0})(0.0) == 2.0
    assert piecewise({})(0.5) == 1.0
    assert [cosine(t) for t in (0.0, 1 / 3, 0.5)] == pytest.approx([1.0, 0.75, 0.5])
    assert cosine(0.999) > 0
    for factors, text in (
        ({1.0: 0.1}, "a progress must be a fraction of the steps below 1, got 1.0; divide"),
        ({-0.1: 0.1}, "a progress must be a finite number >= 0"),
        ({0.5: -1.0}, "a factor must be a finite number >= 0"),
        ([0.5], "factors must be a mapping from progress to factor"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            piecewise(factors)  # type: ignore[arg-type]


# Wrong arguments -----------------------------------------------------------------------------------------------------


def no_graph(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Tensor:
    return PLAIN(model, x, y).detach()


def strange_optimizers() -> dict[str, torch.optim.Optimizer]:
    return {"other": sgd(network()), "closure": torch.optim.LBFGS(network().parameters())}


X, Y = data()
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": lambda x: x}, "model must be an nn.Module, got"),
    ({"model": nn.Sequential(nn.Flatten())}, "model must be a module with parameters that require a gradient, got none"),
    ({"model": nn.Linear(4, 3)}, "mat1 and mat2 shapes cannot be multiplied"),
    ({"model": network().half()}, "data: x must be of the model's dtype torch.float16, which must be torch.float32 or"),
    ({"objective": "pgd"}, "objective must be a robust loss, got 'pgd'; write Adv"),
    ({"objective": AdversarialTraining}, "objective must be a robust loss, got <class"),
    ({"objective": lambda m, x, y, generator: F.cross_entropy(m(x), y)}, r"got a tensor of shape \[\]; leave out the mean"),
    ({"objective": lambda m, x, y, generator: None}, r"one loss per example, \[8\], or an object with a scalar .loss, got None"),
    ({"objective": no_graph}, "objective must be differentiable in the model's parameters, got a loss without a graph; remove"),
    ({"objective": nn.Linear(2, 2)}, "objective must be without parameters of its own, got Linear"),
    ({"data": X}, r"data must be a pair \(x, y\) of tensors or a LabelledImages, got Tensor; read a DataLoader"),
    ({"data": (X.numpy(), Y)}, r"data: x must be a floating-point tensor, got ndarray; write torch.from_numpy\(x\)"),
    ({"data": ((255 * X).byte(), Y)}, r"data: x must be a floating-point tensor, got torch.uint8; for 8-bit images write x.fl"),
    ({"data": (X.where(X > 0.1, math.nan), Y)}, "data: x must be finite, got NaN"),
    ({"data": (X.double(), Y)}, r"data: x must be of the model's dtype torch.float32.*got torch.float64; write x.to"),
    ({"data": (X, Y.float())}, "data: y must be class indices of dtype torch.int64"),
    ({"data": (X, Y[:-1])}, r"data: y must be of shape \[22\]"),
    ({"data": (X, Y + 1)}, r"data: y must be in \[0, 3\), the classes that the model has logits for, got labels from 1 to 3"),
    ({"data": (X[:0], Y[:0])}, "data: x must be at least one example"),
    ({"validation": (X, Y - 1), "validation_attack": PLAIN.attack}, r"validation: y must be in \[0, 3\)"),
    ({"validation": (X, Y)}, "validation_attack must be an attack where validation is given, got None; write PGD"),
    ({"validation_attack": PLAIN.attack}, "validation must be data where validation_attack is given, got None"),
    ({"validation": (X, Y), "validation_attack": FGSM}, "validation_attack must be an attack, got <class"),
    ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
    ({"epochs": 2.0}, "epochs must be an integer >= 1, got 2.0"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1"),
    ({"objective": nn.CrossEntropyLoss()}, r"must be callable as f\(model, x, y, generator=...\), got CrossEntropyLoss\(\)"),
    ({"objective": lambda m, x, y: x}, r"write def f\(model, x, y, \*, generator=None\)"),
    ({"seed": -1}, "seed must be an integer >= 0"),
    ({"clip_norm": 0.0}, "clip_norm must be a finite number > 0"),
    ({"checkpoint_seconds": -1.0}, "checkpoint_seconds must be a finite number >= 0"),
    ({"amp": True}, "amp must be False, 'bfloat16' or 'float16', got True; write amp='bfloat16'"),
    ({"amp": "fp16"}, "amp must be one of 'bfloat16', 'float16', got 'fp16'"),
    ({"amp": "float16"}, "amp must be 'bfloat16' or False on this device, got 'float16' on cpu"),
    ({"schedule": 0.5}, r"schedule must be a function from progress in \[0, 1\) to a factor, got 0.5; write cosine"),
    ({"schedule": lambda t: -t}, "schedule's factor must be a finite number >= 0"),
    ({"augment": 1}, "augment must be a function, got 1"),
    ({"optimizer": 0.1}, "optimizer must be a torch.optim.Optimizer over the model's parameters, got 0.1"),
    ({"optimizer": "other"}, "optimizer must be over parameters of the model, got 4 tensors that are none"),
    ({"optimizer": "closure"}, r"optimizer must be one whose step\(\) needs no closure, got LBFGS"),
    ({"optimizer": "part"}, "optimizer must be over every parameter that requires a gradient, got one without 2.weight, 2.bias"),
    ({"checkpoint": "nowhere/run.safetensors"}, "checkpoint must be a file in an existing folder, got nowhere"),
    ({"checkpoint": "."}, "checkpoint must be a file, got the folder ."),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_end_in_one_sentence(changes: dict[str, Any], text: str) -> None:
    model = changes.get("model", network())
    trainable = isinstance(model, nn.Module) and any(True for _ in model.parameters())
    optimizer: Any = changes.get("optimizer", sgd(model if trainable else network()))
    if optimizer == "part":
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    elif optimizer == "closure":
        optimizer = torch.optim.LBFGS(model.parameters())
    elif optimizer == "other":
        optimizer = sgd(network())
    arguments = {"epochs": 1, "batch_size": 8, **changes, "optimizer": optimizer}
    objective, examples = (arguments.pop(name, default) for name, default in (("objective", PLAIN), ("data", (X, Y))))
    arguments.pop("model", None)
    with pytest.raises((TypeError, ValueError, FileNotFoundError, RuntimeError), match=text) as caught:
        fit(model, objective, examples, **arguments)
    assert "\n" not in str(caught.value)


def test_frozen_parameters_stay_and_need_no_place_in_the_optimizer() -> None:
    model = network()
    model[0].requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1))
    assert torch.equal(model[0].weight, start["0.weight"])
    assert not torch.equal(model[2].weight, start["2.weight"])
    train(model, optimizer=sgd(model))
    assert torch.equal(model[0].weight, start["0.weight"])


def test_a_refusal_leaves_the_modes_of_the_model() -> None:
    model = network(full=True).train()
    model[1].eval()
    with pytest.raises(ValueError, match="data: y"):
        train(model, examples=(X, Y + 1))
    assert [module.training for module in model] == [True, False, True, True, True]


def test_inside_no_grad_and_inference_mode() -> None:
    found = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        model = network()
        optimizer = sgd(model)
        with context():
            found.append(train(model, optimizer=optimizer).last)
    assert_equal_states(found[1], found[0])
    assert_equal_states(found[2], found[0])


def test_functions_are_told_apart_by_what_they_compute(tmp_path: Path) -> None:
    """Two lambdas have one name; a checkpoint of the one must not pass for a run of the other."""
    path = tmp_path / "run.safetensors"
    scaled = [lambda m, x, y, generator, f=f: f * cross_entropy(m, x, y, generator=generator) for f in (1.0, 2.0)]
    train(network(), scaled[0], epochs=1, checkpoint=path)
    train(network(), scaled[0], epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="of this same training run"):
        train(network(), scaled[1], epochs=1, checkpoint=path)

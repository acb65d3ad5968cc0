"""Task distributions and the search by whole runs: draws, resume, processes' share of the work, what is learned."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from metarobust._randomness import torch_seed
from metarobust.attacks import PGD, count_calls
from metarobust.data import LabelledImages, digits_pools
from metarobust.divergences import KL
from metarobust.meta_optimizers import (
    ClassificationTask,
    Generation,
    InterpretableOptimizer,
    LSTMOptimizer,
    TaskDistribution,
    _search,
    calibrate,
    load,
    meta_search,
    meta_train,
    save,
)
from metarobust.models import mlp
from metarobust.objectives import ARMOR, TRADES, AdversarialTraining
from metarobust.threat_models import ThreatModel
from metarobust.types import Streams

TASKS = TaskDistribution(
    architectures={"narrow": partial(mlp, [64, 4, 10]), "wide": partial(mlp, [64, 8, 10])},
    datasets={"digits": digits_pools(0).meta_train},
    examples=(40, 60),
    gradient_source="gradient+adversarial_tangent",
    copies=2,
)
SMALL = {"generations": 3, "population": 4, "elite": 2, "total_steps": (4, 8)}


def width(task: ClassificationTask) -> int:
    return next(task.build().parameters()).shape[0]


def test_a_distribution_draws_within_its_ranges_and_repeats_itself() -> None:
    found = [TASKS(torch.Generator().manual_seed(seed)) for seed in range(16)]
    assert {task.examples for task in found} <= set(range(40, 61))
    assert len({task.examples for task in found}) > 5
    radii = [task.threat_model.epsilon for task in found if task.threat_model is not None]
    assert 0.05 <= min(radii) < 0.08
    assert 0.11 < max(radii) <= 0.15
    assert {width(task) for task in found} == {4, 8}
    again = TASKS(torch.Generator().manual_seed(3))
    assert torch.equal(again.subsets, found[3].subsets)
    assert again.threat_model == found[3].threat_model
    assert all(task.meta_attack == PGD(threat_model=task.threat_model, steps=5) for task in found if task.threat_model)


@pytest.mark.parametrize("seed", [20260731120000, 99999999999999999999])
def test_every_seed_decides_a_search_and_a_meta_training(seed: int) -> None:
    small = {"generations": 1, "population": 2, "elite": 1, "total_steps": (1, 2), "final_draws": 1}
    searches, losses = [], []
    for own in (seed, seed, seed + 1):
        rule = InterpretableOptimizer(gradient_source="gradient+adversarial_tangent")
        searches.append(meta_search(rule, TASKS.one_of_each, **small, seed=own, silent=True)[0].knobs)
        losses.append(meta_train(rule, TASKS, iterations=2, total_steps=2, unroll=1, slots=1, seed=own, silent=True).losses)
    for found in (searches, losses):
        assert found[0] == found[1] != found[2]


def test_seeds_that_torch_takes_are_left_as_they_are() -> None:
    """The figures of the pages and of the demo were measured with them."""
    for seed in (0, 1, 20260731, 2**63, 2**64 - 1):
        assert torch_seed(seed) == seed
    assert len({torch_seed(2**64 + number) for number in range(100)} | {torch_seed(number) for number in range(100)}) == 200


def test_one_of_each_has_every_architecture_and_spreads_the_radii() -> None:
    for seed in range(10):
        tasks = TASKS.one_of_each(torch.Generator().manual_seed(seed))
        assert [width(task) for task in tasks] == [4, 8]
        radii = sorted(task.threat_model.epsilon for task in tasks if task.threat_model is not None)
        middle = (0.05 * 0.15) ** 0.5
        assert radii[0] <= middle <= radii[1]


def test_a_distribution_with_one_stream_and_a_clean_judge() -> None:
    task = replace(TASKS, gradient_source="gradient", attack=None)(torch.Generator().manual_seed(0))
    assert task.threat_model is None
    assert task.gradient_source == "gradient"
    assert task.meta_attack is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": {}}, "architectures must be at least one"),
        ({"datasets": {}}, "datasets must be at least one"),
        ({"examples": (60, 40)}, r"examples must be a pair \(least, most\)"),
        ({"epsilon": (0.2, 0.1)}, r"epsilon must be a pair \(least, largest\)"),
        ({"epsilon": (0.0, 0.1)}, "epsilon must be a finite number > 0"),
        ({"copies": 0}, "copies must be an integer >= 1"),
    ],
)
def test_bad_distributions(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(TASKS, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [TRADES, ARMOR], ids=["trades", "armor"])
def test_a_robust_objective_as_the_meta_loss(objective: type) -> None:
    """The meta-loss is the objective's value on the judging examples, copy by copy for one that treats examples apart."""

    def make(ball: ThreatModel) -> TRADES | ARMOR:
        base = AdversarialTraining(attack=PGD(threat_model=ball, steps=2))
        return TRADES(threat_model=ball, steps=2) if objective is TRADES else ARMOR(robust_loss=base, divergence=KL(), radius=0.1)

    task = replace(TASKS, meta_objective=make)(torch.Generator().manual_seed(0))
    parameters = tuple(p.requires_grad_() for p in task.initial_parameters(generator=torch.Generator().manual_seed(1)))
    with count_calls() as calls:
        losses = task.meta_loss(parameters, generator=torch.Generator().manual_seed(2))
    assert calls.calls == 1
    assert losses.shape == (2,)
    generator = torch.Generator().manual_seed(2)
    x, y = task._draw(task.held_out, task.meta_batch_size, generator)
    assert task.threat_model is not None
    values = make(task.threat_model)(task.model(parameters), x, y, generator=generator)
    expected = values.reshape(2, -1).mean(1) if isinstance(values, torch.Tensor) else values.loss.expand(2)
    torch.testing.assert_close(losses, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), parameters))
    rule = InterpretableOptimizer(gradient_source="gradient+adversarial_tangent")
    distribution = replace(TASKS, meta_objective=make)
    assert len(meta_train(rule, distribution, iterations=2, total_steps=4, unroll=2, slots=2, silent=True).losses) == 2


def test_knobs_turn_what_their_names_say() -> None:
    rule = InterpretableOptimizer(gradient_source="gradient+adversarial_tangent")
    before = {t: rule.coefficients(role="first dense", fan_in=64, time=t) for t in (0.0, 1.0)}
    rule.turn({"learning rate": 0.7, "learning rate, slope": -0.3, "weight decay": 2.0, "l1, first": 1.0, "factor, first": 0.5})
    rule.turn({"factor, first, slope": 0.2, "factor, biases and normalisations": -0.4})
    for time, slope in ((0.0, 0.3), (1.0, -0.3)):
        told = rule.coefficients(role="first dense", fan_in=64, time=time)
        grown = {name: told[name] / before[time][name] for name in ("adam", "l2", "l1", "momentum")}
        expected = [torch.tensor(v).exp().item() for v in (0.7 + slope, 2.0, 1.0, 0.0)]
        assert list(grown.values()) == pytest.approx(expected, rel=1e-4)
        assert told["factor"] == pytest.approx(0.5 - slope * 2 / 3, abs=1e-5)
    assert rule.coefficients(role="bias", fan_in=64, time=0.5)["factor"] == pytest.approx(-0.4, abs=1e-5)
    assert rule.coefficients(role="inner dense", fan_in=64, time=0.5)["l1"] == pytest.approx(1e-6, rel=1e-3)
    rates = {n: rule.coefficients(role="inner dense", fan_in=n, time=0.5)["adam"] for n in (64, 256)}
    rule.turn({"learning rate, fan-in": -0.5})
    assert rule.coefficients(role="inner dense", fan_in=64, time=0.5)["adam"] == pytest.approx(rates[64], rel=1e-5)
    assert rule.coefficients(role="inner dense", fan_in=256, time=0.5)["adam"] == pytest.approx(rates[256] / 2, rel=1e-4)
    factor = rule.coefficients(role="first dense", fan_in=64, time=0.5)["factor"]
    rule.turn({"factor, networks with normalisation": -0.5})
    assert rule.coefficients(role="first dense", fan_in=64, time=0.5)["factor"] == factor
    moves = {}
    for normalised in (False, True):  # the same tensors, but for a gain and a shift
        shapes = [(4, 3), *([(4,), (4,)] if normalised else []), (2, 4)]
        parameters = tuple(torch.zeros(shape) for shape in shapes)
        gradients = Streams(parameters, tuple(torch.full_like(p, 1e-3) for p in parameters))
        transformation = rule.as_gradient_transformation(total_steps=3)
        _, state = transformation.update(gradients, transformation.init(parameters), params=parameters)  # type: ignore[arg-type]
        moves[normalised] = state.momentum[0, 0].item()
    assert moves[True] / moves[False] == pytest.approx(torch.tensor(-0.5).exp().item(), rel=1e-4)
    assert not any("factor" in name for name in InterpretableOptimizer(gradient_source="gradient").knobs())
    with pytest.raises(ValueError, match="by must be one of 'learning rate'"):
        rule.turn({"momentum": 1.0})


def search(rule: InterpretableOptimizer, path: Path | None = None, stop: int | None = None, **more: Any) -> list[Generation]:
    def report(generation: int, found: Generation) -> None:
        if generation == stop:
            raise KeyboardInterrupt

    return meta_search(rule, TASKS.one_of_each, checkpoint=path, on_generation=report, **(SMALL | more))  # type: ignore[arg-type]


def fresh() -> InterpretableOptimizer:
    return InterpretableOptimizer(gradient_source="gradient+adversarial_tangent")


def test_an_interrupted_search_leaves_the_rule_and_goes_on_bit_by_bit(tmp_path: Path) -> None:
    straight = fresh()
    history = search(straight)
    assert len(history) == 3
    halted = fresh()
    start = {name: p.detach().clone() for name, p in halted.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        search(halted, tmp_path / "search", stop=3)
    assert all(torch.equal(p, start[name]) for name, p in halted.named_parameters())
    resumed = fresh()
    assert search(resumed, tmp_path / "search") == history  # two generations were kept, the third is done again
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.record["threat_models"] == straight.record["threat_models"]
    record = load(save(resumed, tmp_path / "rule.safetensors")).record
    assert record["kept"] == ("end" if record["final_scores"]["end"] > record["final_scores"]["start"] else "start")
    assert record["knobs"] == (history[-1].knobs if record["kept"] == "end" else dict.fromkeys(history[-1].knobs, 0.0))
    with pytest.raises(ValueError, match=r"clean_weight=0.5 there and 2.0 here"):
        search(fresh(), tmp_path / "search", clean_weight=2.0)


def test_a_search_from_another_start_or_of_knobs_in_another_order_is_another_search(tmp_path: Path) -> None:
    knobs = {"learning rate": 0.3, "weight decay": 0.2}
    with pytest.raises(KeyboardInterrupt):
        search(fresh(), tmp_path / "search", stop=2, knobs=knobs)
    turned = fresh()
    turned.turn({"learning rate": 3.0})
    with pytest.raises(ValueError, match="of a run with the same settings, got start="):
        search(turned, tmp_path / "search", knobs=knobs)
    with pytest.raises(ValueError, match="of a run with the same settings, got order="):
        search(fresh(), tmp_path / "search", knobs=dict(reversed(knobs.items())))


def test_an_end_that_is_no_better_on_new_tasks_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are drawn anew for the comparison, and both ends are judged on the same ones."""
    drawn: list[list[int]] = []
    score = _search._score

    def watched(rule: InterpretableOptimizer, tasks: Any, settings: Any) -> float:
        drawn.append([int(task.subsets.sum()) for task, _ in tasks])
        return score(rule, tasks, settings) if len(drawn) <= 12 else float(all(p.abs().max() == 0 for p in rule.parameters()))

    monkeypatch.setattr(_search, "_score", watched)
    rule = fresh()
    with torch.no_grad():
        for p in rule.parameters():
            p.zero_()
    rule.record = {"threat_models": {"norm": "l2"}, "meta_training": {"iterations": 3}}
    history = search(rule, final_draws=2)
    assert len(drawn) == 3 * 4 + 2 * 2
    assert drawn[12] == drawn[13]
    assert drawn[14] == drawn[15]
    assert all(tasks not in drawn[:12] for tasks in drawn[12:])
    assert all(p.abs().max() == 0 for p in rule.parameters())
    assert rule.record["final_scores"] == {"start": 1.0, "end": 0.0}
    assert rule.record["kept"] == "start"
    assert rule.record["threat_models"] == {"norm": "l2"}, "the same rule, trained for what it was trained for"
    assert rule.record["meta_training"] == {"iterations": 3}
    assert set(rule.record["knobs"].values()) == {0.0}
    assert any(history[-1].knobs.values())


def test_the_search_finds_a_learning_rate() -> None:
    """From a learning rate that is far too low, the score of the mean rises well beyond the spread of the first settings."""
    rule = InterpretableOptimizer(gradient_source="gradient", initial_learning_rate=1e-4)
    history = meta_search(
        rule,
        replace(TASKS, gradient_source="gradient", attack=None).one_of_each,
        knobs={"learning rate": 2.0},
        generations=6,
        population=6,
        elite=2,
        total_steps=(40, 40),
        silent=True,
    )
    assert history[-1].mean > history[0].best + 0.05
    assert rule.record["final_scores"]["end"] > rule.record["final_scores"]["start"] + 0.05
    assert rule.record["kept"] == "end"
    assert rule.coefficients(role="inner dense", fan_in=64, time=0.5)["adam"] > 3e-4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"elite": 4}, r"elite must be below population \(=4\)"),
        ({"generations": 0}, "generations must be an integer >= 1"),
        ({"total_steps": (8, 4)}, r"total_steps must be a pair \(least, most\)"),
        ({"knobs": {"momentum": 1.0}}, "knobs must be one of 'learning rate'"),
        ({"knobs": {"learning rate": 0.0}}, "learning rate must be a finite number > 0"),
        ({"clean_weight": -1.0}, "clean_weight must be a finite number >= 0"),
    ],
)
def test_bad_searches(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        search(fresh(), **change)


def test_only_what_can_be_turned_is_searched() -> None:
    with pytest.raises(TypeError, match="meta_optimizer must be an InterpretableOptimizer, got LSTMOptimizer"):
        meta_search(LSTMOptimizer(), TASKS.one_of_each)  # type: ignore[arg-type]


def test_tasks_of_another_source_are_refused_before_anything_is_learned() -> None:
    rule, told = (
        InterpretableOptimizer(),
        r"gradient_source='gradient\+perturbed_factors', like the rule, got 'gradient\+adversarial_tangent'",
    )
    with pytest.raises(ValueError, match=f"sample_task must be tasks with {told}"):
        meta_train(rule, TASKS, iterations=1, total_steps=2, unroll=2, slots=1)
    with pytest.raises(ValueError, match=f"sample_tasks must be tasks with {told}"):
        meta_search(rule, TASKS.one_of_each, **SMALL)
    with pytest.raises(ValueError, match=f"tasks must be tasks with {told}"):
        calibrate(LSTMOptimizer(), TASKS.one_of_each(torch.Generator().manual_seed(0)), total_steps=2)


def test_scores_count_clean_and_robust_accuracy() -> None:
    pool = LabelledImages(digits_pools(0).meta_train.images[:80], digits_pools(0).meta_train.labels[:80], 10)
    task = ClassificationTask(
        build=partial(mlp, [64, 4, 10]),
        dataset=pool,
        subsets=torch.arange(40).reshape(2, 20),
        threat_model=ThreatModel(epsilon=0.3),
        meta_attack=PGD(threat_model=ThreatModel(epsilon=0.3), steps=3),
    )
    parameters = task.initial_parameters(generator=torch.Generator().manual_seed(0))
    clean = task.clean_accuracy(parameters)
    for copy in range(2):
        model = task.build()
        model.load_state_dict(dict(zip(model.state_dict(), (p[copy] for p in parameters), strict=True)))
        rows = task.held_out[copy]
        expected = (model(pool.images[rows]).argmax(1) == pool.labels[rows]).float().mean()
        assert clean[copy] == pytest.approx(expected.item())
    assert (task.meta_accuracy(parameters, generator=torch.Generator().manual_seed(0)) <= clean).all()

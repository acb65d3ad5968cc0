"""Same seed, same bits: what repeats, what it does not depend on, and how verdicts of attacks relate to each other.

On one machine with one number of threads. Times are left out of what is compared.
"""

import json
from collections.abc import Callable
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import BALL, X, Y, generator, labelled, network, pgd
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metarobust._tensor_files import read_tensors, write_tensors
from metarobust.attacks import APGD, BETA, FGSM, PGD, Square, WorstCase
from metarobust.bounds import adversarial_risk_bound
from metarobust.divergences import KL, Renyi
from metarobust.dro import worst_case_expectation
from metarobust.evaluation import RobustnessReport, evaluate
from metarobust.losses import margin
from metarobust.meta_optimizers import ClassificationTask, InterpretableOptimizer, LSTMOptimizer, meta_search, meta_train
from metarobust.models import mlp
from metarobust.objectives import AdversarialTraining
from metarobust.training import fit

EXAMPLES = 24
ATTACKS = {
    "fgsm": FGSM(threat_model=BALL),
    "pgd": PGD(threat_model=BALL, steps=3),
    "apgd": APGD(threat_model=BALL, steps=4),
    "beta": BETA(threat_model=BALL, steps=3),
    "square": Square(threat_model=BALL, queries=8),
}


@cache
def sample() -> tuple[Tensor, Tensor]:
    """Points near the boundaries of the small network, with its own answers as labels, but for three of them."""
    x = 0.3 + 0.4 * torch.rand(EXAMPLES, 4, generator=generator(1))
    y = network()(x).argmax(1)
    y[::8] = (y[::8] + 1) % 3
    return x, y


def bits(found: Any) -> Any:
    """A result as plain values, floats as their exact text, tensors as bytes; what measures time is left out."""
    if isinstance(found, RobustnessReport):
        told = json.loads(found.to_json())
        return {name: value for name, value in told.items() if name != "seconds"} | {
            "adversarial": bits(found.adversarial_examples),
            "broken_by": bits(found.broken_by),
        }
    if isinstance(found, Tensor):
        return (str(found.dtype), tuple(found.shape), found.detach().contiguous().numpy().tobytes())
    if isinstance(found, dict):
        return {name: bits(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [bits(part) for part in found]
    return repr(found)


def evaluated(protocol: str) -> Callable[[], Any]:
    return lambda: evaluate(network(), sample(), threat_model=BALL, protocol=protocol, seed=3)


def trained() -> Any:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    objective = AdversarialTraining(attack=pgd())
    found = fit(
        model, objective, sample(), optimizer=optimizer, epochs=2, batch_size=7, seed=3, silent=True,
        validation=(X, Y), validation_attack=pgd(),
    )  # fmt: skip
    return found.last, found.best, [(r.loss, r.clean_accuracy, r.robust_accuracy) for r in found.history]


def task(draw: torch.Generator) -> ClassificationTask:
    subsets = torch.stack([torch.randperm(30, generator=draw)[:12] for _ in range(2)])
    return ClassificationTask(build=lambda: mlp([64, 4, 3]), dataset=labelled(), subsets=subsets, threat_model=BALL, batch_size=4)


def meta_trained() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = LSTMOptimizer(hidden_size=2)
    found = meta_train(rule, task, iterations=3, total_steps=4, unroll=2, slots=1, seed=3)
    return found.losses, dict(found.meta_optimizer.state_dict())


def searched() -> Any:
    rule = InterpretableOptimizer()
    history = meta_search(
        rule, lambda draw: [task(draw)], generations=1, population=3, elite=1, total_steps=(2, 3), final_draws=1, seed=3
    )
    return history, dict(rule.state_dict())


def bounded() -> Any:
    x, y = sample()
    found = [adversarial_risk_bound(x, y, BALL, method=method) for method in ("exact", "sinkhorn")]
    return [(b.lower, b.upper, b.exact, b.order, b.potentials, b.guarantees, b.attack().positions) for b in found]


def reweighted() -> Any:
    losses = torch.rand(50, generator=generator(2))
    return [worst_case_expectation(losses, divergence=divergence, radius=0.2) for divergence in (KL(), Renyi(order=2))]


RUNS: dict[str, Callable[[], Any]] = {
    "evaluate, quick": evaluated("quick"),
    "evaluate, standard": evaluated("standard"),
    "evaluate, strong": evaluated("strong"),
    "training.fit": trained,
    "meta_train": meta_trained,
    "meta_search": searched,
    "risk bounds": bounded,
    "dro": reweighted,
}
QUICK = [name for name in RUNS if name != "evaluate, strong"]


def repeats(name: str) -> None:
    """Twice the same, whatever was drawn from the global generators before, which are left as they were."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = bits(RUNS[name]())
    assert torch.equal(torch.get_rng_state(), before), "the global generator was drawn from"
    torch.manual_seed(2)
    torch.rand(1001)
    assert bits(RUNS[name]()) == first


@pytest.mark.parametrize("name", QUICK)
def test_same_seed_same_bits(name: str) -> None:
    repeats(name)


@pytest.mark.slow
def test_same_seed_same_bits_under_the_strong_protocol() -> None:
    repeats("evaluate, strong")


def test_another_seed_draws_other_noise() -> None:
    """Otherwise the tests above would compare constants."""
    x, y = sample()
    one, other = (PGD(threat_model=BALL, steps=1)(network(), x, y, generator=generator(seed)) for seed in (0, 1))
    assert not torch.equal(one, other)


def test_restored_tensors_lie_in_memory_of_their_own(tmp_path: Path) -> None:
    """Matrix products of tensors at odd addresses may round otherwise: a resumed run would drift from an uninterrupted one."""
    tensors = {f"{n}": torch.rand(n) for n in range(1, 9)}
    write_tensors(tmp_path / "run.safetensors", tensors, {"format": "test"})
    restored, _ = read_tensors(tmp_path / "run.safetensors", expected="test")
    assert bits(restored) == bits(tensors)
    assert all(t.data_ptr() % 64 == 0 for t in restored.values())


def judged(names: tuple[str, ...], **changed: Any) -> RobustnessReport:
    return evaluate(
        network(), sample(), threat_model=BALL, attacks={name: ATTACKS[name] for name in names},
        **{"reliability_checks": False, "seed": 3, **changed},
    )  # fmt: skip


@cache
def alone(name: str) -> Tensor:
    """Which examples one attack breaks with a generator of its own, ``[n]``."""
    x, y = sample()
    model = network()
    return margin(model(ATTACKS[name](model, x, y, generator=generator(7))), y).detach() > 0


orders = st.lists(st.sampled_from(sorted(ATTACKS)), min_size=1, max_size=4, unique=True)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(names=orders, more=st.sampled_from(sorted(ATTACKS)))
def test_an_attack_more_never_saves_an_example(names: list[str], more: str) -> None:
    """Appended to any sequence: every example broken before is broken still, by the same attack, and accuracy does not rise."""
    if more in names:
        return
    less, all_of_them = judged(tuple(names)), judged((*names, more))
    broken = less.broken_by >= 0
    assert torch.equal(all_of_them.broken_by[broken], less.broken_by[broken])
    assert all_of_them.worst_case_accuracy <= less.worst_case_accuracy
    stages = [judged(tuple(names[: k + 1])).broken_by >= 0 for k in range(len(names))]
    assert all(bool((later | ~earlier).all()) for earlier, later in pairwise(stages))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(names=st.sets(st.sampled_from(sorted(ATTACKS)), min_size=1, max_size=3), more=st.sets(st.sampled_from(sorted(ATTACKS))))
def test_a_superset_breaks_what_a_subset_breaks(names: set[str], more: set[str]) -> None:
    """Per example, for attacks with noise of their own: the worst case of a superset is at most that of the subset."""
    subset = torch.stack([alone(name) for name in names]).any(0)
    superset = torch.stack([alone(name) for name in names | more]).any(0)
    assert bool((superset | ~subset).all())


@pytest.mark.parametrize("names", [("fgsm", "apgd"), ("apgd", "square", "fgsm")])
def test_the_worst_case_attack_is_no_weaker_than_its_first(names: tuple[str, ...]) -> None:
    """`WorstCase` passes what its first attack broke through, and moves the others as far or further."""
    x, y = sample()
    model = network()
    first = margin(model(ATTACKS[names[0]](model, x, y, generator=generator(7))), y)
    both = WorstCase([ATTACKS[name] for name in names])(model, x, y, generator=generator(7))
    reached = margin(model(both), y)
    clean = margin(model(x), y) > 0
    assert bool(((reached > 0) | ~(first > 0)).all())
    assert bool((reached >= margin(model(x), y)).all())
    assert bool(clean.any())


DETERMINISTIC = {
    "fgsm": FGSM(threat_model=BALL),
    "pgd without a random start": PGD(threat_model=BALL, steps=3, random_start=False),
    "apgd without a random start": APGD(threat_model=BALL, steps=4, random_start=False),
}


def test_without_noise_verdicts_do_not_depend_on_the_batch_size() -> None:
    """With noise they do: the noise belongs to the batch, so another batch size draws other noise."""
    found = [
        evaluate(network(), sample(), threat_model=BALL, attacks=DETERMINISTIC, batch_size=size, reliability_checks=False)
        for size in (1, 5, EXAMPLES)
    ]
    assert all(torch.equal(report.broken_by, found[0].broken_by) for report in found[1:])
    assert all(torch.allclose(r.adversarial_examples, found[0].adversarial_examples, atol=1e-6) for r in found[1:])
    assert len(set(chain.from_iterable(found[0].broken_by.tolist() for _ in found))) > 1


def test_clean_verdicts_do_not_depend_on_the_batch_size() -> None:
    reports = [
        evaluate(network(), sample(), threat_model=BALL, attacks=DETERMINISTIC, batch_size=size, reliability_checks=False)
        for size in (1, 7, EXAMPLES)
    ]
    assert all(torch.equal(report.clean_predictions, reports[0].clean_predictions) for report in reports[1:])


def test_noise_belongs_to_the_batch() -> None:
    x, y = sample()
    attack, model = PGD(threat_model=BALL, steps=1, step_size=1e-3), network()
    whole = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    parts = [attack(model, a[None], b[None], generator=torch.Generator().manual_seed(0)) for a, b in zip(x, y, strict=True)]
    assert not torch.equal(whole, torch.cat(parts))

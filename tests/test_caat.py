"""CAAT: limits, routing, what a call may touch, learning which labels are wrong, and training with it."""

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from metarobust.attacks import PGD
from metarobust.data import load_digits, noise_matrix, split, split_meta, with_label_noise
from metarobust.divergences import KL
from metarobust.losses import cross_entropy, kl_divergence
from metarobust.meta_weighters import CAAT, FRL, GradientBound, MetaWeightNet, ReMargin, WeightingNetwork, signed_pgd
from metarobust.meta_weighters._branches import rows_independent
from metarobust.models import Normalize, mlp
from metarobust.objectives import (
    ARMOR,
    MART,
    TRADES,
    UDR,
    AdversarialTraining,
    BETATraining,
    ClassWeighted,
    LogitAdjusted,
    SmoothedBETATraining,
)
from metarobust.threat_models import ThreatModel
from metarobust.training import fit

BALL = ThreatModel(norm="linf", epsilon=0.1)
CLASSES = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int = 0, n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = generator(seed)
    return torch.rand(n, 6, generator=draw).to(dtype), torch.randint(CLASSES, (n,), generator=draw)


def network_of(seed: int = 0, *, norm: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle: list[nn.Module] = [nn.BatchNorm1d(8)] if norm else []
        return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, CLASSES)).to(dtype)


def sgd(model: nn.Module, lr: float = 0.1, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **settings)


def caat(model: nn.Module, **changes: Any) -> CAAT:
    defaults: dict[str, Any] = {
        "threat_model": BALL,
        "meta_data": batch(99, 9, next(model.parameters()).dtype),
        "optimizer": sgd(model),
        "class_counts": [10, 20, 30],
        "network": WeightingNetwork(generator=generator(5)),
        "steps": 3,
        "routing": "hard",
        "anti_factor": 1.0,
    }
    return CAAT(**{**defaults, **changes})


def leaning(
    towards: str, branches: tuple[str, ...] = ("adversary", "anti_adversary"), dtype: torch.dtype = torch.float32
) -> WeightingNetwork:
    """A network that gives every example the same branch."""
    network = WeightingNetwork(branches=branches)
    last = network.layers[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-50.0)
        last.bias[branches.index(towards)] = 50.0
    return network


class Counting(nn.Module):
    """A model that knows how many rows it has seen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.inner(x)


# Limits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_adversaries_alone_reproduce_trades_to_the_last_bit(norm: str, normalised: bool, routing: str) -> None:
    ball = ThreatModel(norm=norm, epsilon=0.2)
    x, y = batch()
    found = []
    for number in range(2):
        model = network_of(norm=normalised).train()
        trades = TRADES(threat_model=ball, beta=1.5, steps=3)
        objective: Any = trades
        if number:
            network = leaning("adversary") if routing != "soft" else leaning("adversary", ("adversary",))
            objective = caat(model, threat_model=ball, robust_loss=trades, network=network, meta_every=None, routing=routing)
        losses = objective(model, x, y, generator=generator())
        losses.mean().backward()
        found.append([losses, *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_the_other_branches_are_the_cross_entropies_of_their_points() -> None:
    model, (x, y) = network_of(dtype=torch.float64), batch(dtype=torch.float64)
    three = ("natural", "adversary", "anti_adversary")
    natural = caat(model, network=leaning("natural", three), meta_every=None)(model, x, y)
    assert torch.equal(natural, cross_entropy(model(x), y))
    anti = caat(model, network=leaning("anti_adversary", three), meta_every=None)(model, x, y, generator=generator(1))
    moved = signed_pgd(model, x, y, -torch.ones_like(y), threat_model=BALL, steps=3, generator=generator(1))
    torch.testing.assert_close(anti, cross_entropy(model(moved), y))
    assert bool((anti < natural).all())


def test_soft_weights_add_the_branches_up() -> None:
    model, (x, y) = network_of(dtype=torch.float64), batch(dtype=torch.float64)
    network = WeightingNetwork(branches=("natural", "adversary", "anti_adversary"), favoured=0.4, generator=generator(3)).double()
    objective = caat(model, network=network, meta_every=None, routing="soft", robust_loss=TRADES(threat_model=BALL, beta=2.0))
    losses = objective(model, x, y, generator=generator(1))
    weights = objective.weigh(model, x, y).weights  # the statistics have moved since: only the class losses differ
    twice = torch.cat([x, x]), torch.cat([y, y])
    signs = torch.cat([torch.ones_like(y), -torch.ones_like(y)])
    moved = signed_pgd(model, *twice, signs, threat_model=BALL, steps=3, generator=generator(1))
    clean, against, anti = model(x), model(moved[:12]), model(moved[12:])
    columns = [cross_entropy(clean, y), cross_entropy(clean, y) + 2 * kl_divergence(clean, against), cross_entropy(anti, y)]
    torch.testing.assert_close(losses, (weights * torch.stack(columns, 1)).sum(1), rtol=2e-2, atol=0)
    fresh = caat(model, network=network, meta_every=None, routing="soft", robust_loss=TRADES(threat_model=BALL, beta=2.0))
    fresh.network.mean.zero_(), fresh.network.square.zero_(), fresh.network.seen.zero_()
    assert not torch.equal(fresh(model, x, y, generator=generator(2)), losses), "another start, other points"


# Routing ---------------------------------------------------------------------------------------------------------------


def test_hard_routing_attacks_each_example_on_one_side_only() -> None:
    model = Counting(network_of())
    x, y = batch()
    objective = caat(model, meta_every=None, steps=4, network=WeightingNetwork(favoured=0.5, generator=generator(2)))
    losses = objective(model, x, y, generator=generator())
    assert 0 < objective.diagnostics["anti_adversary"] < 1, "the case must have both sides"
    assert model.rows == 12 + 4 * 12 + 12, "natural pass, attack, and one pass over the moved points"
    assert losses.shape == (12,)


def test_random_routing_keeps_the_shares_and_ignores_the_examples() -> None:
    model, (x, y) = network_of(), batch(n=40)
    made = [caat(model, meta_every=None, routing=routing) for routing in ("hard", "random")]
    for objective in made:
        objective.network.load_state_dict(WeightingNetwork(favoured=0.5, generator=generator(2)).state_dict())
    losses = [objective(model, x, y, generator=generator()) for objective in made]
    assert made[0].diagnostics == made[1].diagnostics
    assert not torch.allclose(*losses)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_anti_adversaries_may_have_a_radius_of_their_own(factor: float) -> None:
    model, (x, y) = nn.Linear(6, CLASSES), batch()
    x = 0.4 + 0.2 * x
    seen: list[Tensor] = []
    objective = caat(model, network=leaning("anti_adversary"), meta_every=None, anti_factor=factor, steps=20)
    objective(lambda z: (seen.append(z.detach()), model(z))[1], x, y, generator=generator())
    assert math.isclose(float((seen[-1] - x).abs().max()), 0.1 * factor, rel_tol=1e-4)


def test_bounds_reach_the_attack() -> None:
    model, (x, y) = nn.Linear(6, CLASSES), batch()
    x = 0.4 + 0.2 * x
    seen: list[Tensor] = []

    def spy(z: Tensor) -> Tensor:
        seen.append(z.detach())
        return model(z)

    factors = torch.linspace(0.5, 2, 12)
    objective = caat(model, network=leaning("adversary"), meta_every=None, bound=lambda known, y: factors, steps=20)
    objective(spy, x, y, generator=generator())
    torch.testing.assert_close((seen[-1] - x).abs().amax(1), 0.1 * factors, rtol=1e-4, atol=0)
    remargin = ReMargin(classes=CLASSES)
    remargin.margin_multiplier.copy_(torch.tensor([0.0, 0.1, 0.3]))
    caat(model, network=leaning("adversary"), meta_every=None, bound=remargin, steps=20)(spy, x, y, generator=generator())
    expected = 0.1 * torch.tensor([0.0, 0.2, 0.6]).exp()[y]
    torch.testing.assert_close((seen[-1] - x).abs().amax(1), expected, rtol=1e-4, atol=0)
    gradient = GradientBound(power=1.0)
    caat(model, network=leaning("adversary"), meta_every=None, bound=gradient, steps=20)(spy, x, y, generator=generator())
    with torch.no_grad():
        p = model(x).softmax(1)
        doubt = (p - nn.functional.one_hot(y, CLASSES)).norm(dim=1)
    expected = 0.1 * (doubt / doubt.mean()).clamp(0.5, 2)
    torch.testing.assert_close((seen[-1] - x).abs().amax(1), expected, rtol=1e-4, atol=0)


def test_epsilon_is_in_input_units_behind_a_normalisation() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), Normalize([0.5], [0.1]), nn.Flatten(), network_of())
    seen: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    x, y = batch()
    x = 0.4 + 0.2 * x
    caat(model, network=leaning("adversary"), meta_every=None)(model, x, y, generator=generator())
    assert float((seen[-1] - x).abs().max()) == pytest.approx(0.1, rel=1e-4)


# What a call may touch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["hard", "soft"])
@pytest.mark.parametrize("hypergradient", ["double_backward", "jvp", "finite_difference"])
def test_meta_steps_and_attacks_leave_the_model_alone(routing: str, hypergradient: str) -> None:
    """After a call with a meta-step, buffers are those of the natural and the adversarial pass, as in TRADES."""
    x, y = batch()
    buffers = []
    for meta_every in (None, 1):
        model = network_of(norm=True).train()
        model[2].eval()  # a part in another mode
        objective = caat(model, meta_every=meta_every, routing=routing, hypergradient=hypergradient, learning_rate=1e-12)
        before = [p.detach().clone() for p in model.parameters()]
        state = torch.get_rng_state()
        objective(model, x, y, generator=generator())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert all(p.grad is None for p in model.parameters())
        assert [module.training for module in model] == [True, True, False, True]
        assert not objective.optimizer.state
        buffers.append([b.clone() for b in model.buffers()])
    assert int(buffers[1][2]) == 2, "natural and adversarial pass, and none for anti-adversaries or meta-steps"
    assert torch.equal(buffers[0][0], buffers[1][0]) or routing == "hard"


def test_anti_adversaries_do_not_move_running_statistics() -> None:
    model, (x, y) = network_of(norm=True).train(), batch()
    caat(model, network=leaning("anti_adversary"), meta_every=None)(model, x, y, generator=generator())
    once = network_of(norm=True).train()
    once(x)
    for ours, theirs in zip(model.buffers(), once.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_virtual_step_is_the_step_that_the_optimizer_takes() -> None:
    """With the network all but fixed, the meta-loss meets the parameters that the model has one step later."""
    model, (x, y) = network_of(dtype=torch.float64), batch(dtype=torch.float64)
    optimizer = sgd(model, momentum=0.9, weight_decay=0.01, nesterov=True)
    probe, met = batch(7, 5, torch.float64)[0], []

    def meta_loss(virtual: Any, x: Tensor, y: Tensor, *, generator: Any = None) -> Tensor:
        met.append(virtual(probe).detach())
        return cross_entropy(virtual(x), y)

    objective = caat(model, optimizer=optimizer, meta_loss=meta_loss, meta_every=1, learning_rate=1e-14)
    objective.network.double()
    for call in range(3):
        loss = objective(model, x, y, generator=generator(call)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(met[-1], model(probe).detach(), rtol=1e-9, atol=1e-10)


def test_the_meta_loss_meets_meta_labels_and_evaluation_mode() -> None:
    model, (x, y) = network_of(norm=True).train(), batch()
    meta = batch(99, 9)
    pairs = {tuple(row.tolist()): int(label) for row, label in zip(*meta, strict=True)}
    calls = []

    def meta_loss(virtual: Any, x: Tensor, y: Tensor, *, generator: Any = None) -> Tensor:
        assert [pairs[tuple(row.tolist())] for row in x] == y.tolist()
        calls.append([module.training for module in model.modules()])
        return cross_entropy(virtual(x), y)

    objective = caat(model, meta_data=meta, meta_loss=meta_loss, meta_every=2, meta_batch_size=4)
    for _ in range(5):
        objective(model, x, y)
    assert len(calls) == 3
    assert not any(mode for call in calls for mode in call)


def test_the_loss_of_the_classes_is_really_updated() -> None:
    model, (x, y) = network_of(), batch()
    objective = caat(model, meta_every=None)
    assert objective.statistics.class_loss.tolist() == pytest.approx([math.log(CLASSES)] * CLASSES)
    objective(model, x, y)
    with torch.no_grad():
        losses = cross_entropy(model(x), y)
    expected = [float(losses[y == c].mean()) for c in range(CLASSES)]
    assert objective.statistics.class_loss.tolist() == pytest.approx(expected)


# Learning --------------------------------------------------------------------------------------------------------------


def noisy_digits() -> tuple[Any, Any, Tensor]:
    draw = generator(3)
    pool, _ = split(load_digits(), (600, 0), generator=draw)
    rest, meta = split_meta(pool, 10, generator=draw)
    noisy = with_label_noise(rest, noise_matrix("uniform", 0.4, 10), generator=draw)
    return noisy.data, meta, noisy.flipped


def test_wrong_labels_are_found() -> None:
    """Forty per cent of the labels are wrong, and nobody says which: the network sends them to the anti-adversary."""
    train, meta, flipped = noisy_digits()
    torch.manual_seed(0)
    model = mlp([64, 64, 10])
    optimizer = sgd(model, momentum=0.9)
    objective = CAAT(
        threat_model=BALL,
        meta_data=meta,
        optimizer=optimizer,
        class_counts=train.labels.bincount(minlength=10),
        network=WeightingNetwork(generator=generator(1)),
        meta_every=2,
        learning_rate=3e-3,
        steps=3,
    )
    fit(model, objective, train, optimizer=optimizer, epochs=15, batch_size=64, silent=True)
    anti = objective.weigh(model, train.images, train.labels).weights[:, 1]
    above = (anti[flipped][:, None] > anti[~flipped][None]).double().mean()
    assert float(above) > 0.9, "area under the ROC curve against the true noise flag"


def test_fit_resumes_a_learned_objective_bit_by_bit(tmp_path: Any) -> None:
    def start() -> tuple[nn.Module, CAAT]:
        model = network_of()
        optimizer = sgd(model, momentum=0.9)
        bound = ReMargin(classes=CLASSES, tolerance=0.0)
        temperature = (1.0, 0.1)
        return model, caat(model, optimizer=optimizer, meta_every=2, learning_rate=0.01, bound=bound, temperature=temperature)

    data, ends = batch(1, 30), []

    class Stop(Exception):
        pass

    for stops in ((), (1, 2)):
        for after in (*stops, None):
            model, objective = start()

            def on_epoch(record: Any, after: int | None = after) -> None:
                if record.epoch == after:
                    raise Stop

            path = tmp_path / f"run{len(stops)}.safetensors"
            try:
                result = fit(
                    model,
                    objective,
                    data,
                    optimizer=objective.optimizer,
                    epochs=4,
                    batch_size=8,
                    checkpoint=path,
                    on_epoch=on_epoch,
                    silent=True,
                )
            except Stop:
                continue
            ends.append((result, objective.state_dict()))
    (plain, plain_state), (resumed, resumed_state) = ends
    assert all(torch.equal(plain.last[name], resumed.last[name]) for name in plain.last)
    assert plain_state.keys() == resumed_state.keys()
    assert all(torch.equal(plain_state[name], resumed_state[name]) for name in plain_state)
    assert float(plain_state["temperature"]) == pytest.approx(0.1)
    assert int(plain_state["calls"]) == 16
    assert [record.diagnostics for record in plain.history] == [record.diagnostics for record in resumed.history]
    assert {"meta_loss", "adversary"} <= plain.history[0].diagnostics.keys()


LOSSES: dict[str, Any] = {
    "at": AdversarialTraining(attack=PGD(threat_model=BALL, steps=2)),
    "trades": TRADES(threat_model=BALL, steps=2),
    "mart": MART(attack=PGD(threat_model=BALL, steps=2)),
    "udr": UDR(threat_model=BALL, steps=2),
    "beta": BETATraining(threat_model=BALL, steps=2),
    "smoothed-beta": SmoothedBETATraining(threat_model=BALL, steps=2, mu=0.5),
    "balanced": ClassWeighted(robust_loss=TRADES(threat_model=BALL, steps=2), class_weights=(1.0, 2.0, 0.5)),
}


@pytest.mark.parametrize("routing", ["hard", "soft"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_robust_loss_can_be_weighted(name: str, routing: str) -> None:
    model, (x, y) = network_of(norm=name == "trades"), batch()
    objective = caat(model, robust_loss=LOSSES[name], routing=routing, meta_every=1)
    result = fit(model, objective, (x, y), optimizer=objective.optimizer, epochs=2, batch_size=6, silent=True)
    assert math.isfinite(result.history[-1].loss)
    assert math.isfinite(result.history[-1].diagnostics["meta_gradient"])


def test_meta_gradients_agree_for_every_loss_that_comes_apart() -> None:
    for name in ("at", "trades", "mart", "udr"):
        told = []
        for hypergradient in ("double_backward", "jvp"):
            model = network_of(norm=True, dtype=torch.float64)
            network = WeightingNetwork(generator=generator(5)).double()
            objective = caat(model, robust_loss=LOSSES[name], network=network, meta_every=1, hypergradient=hypergradient)
            objective(model, *batch(dtype=torch.float64), generator=generator())
            told.append(objective.diagnostics["meta_gradient"])
        assert told[0] == pytest.approx(told[1], rel=1e-10)
        assert told[0] > 0


@pytest.mark.parametrize("around", ["armor", "balanced", "adjusted"])
def test_a_learned_weighting_goes_inside_other_weightings(around: str, tmp_path: Any) -> None:
    model = network_of()
    inner = caat(model, meta_every=1, steps=2)
    outer: Any = {
        "armor": lambda: ARMOR(robust_loss=inner, divergence=KL(), radius=0.1),
        "balanced": lambda: ClassWeighted(robust_loss=inner, class_weights=(1.0, 2.0, 0.5)),
        "adjusted": lambda: LogitAdjusted(robust_loss=inner, class_counts=(10, 20, 30)),
    }[around]()
    path = tmp_path / "run.safetensors"
    result = fit(model, outer, batch(), optimizer=inner.optimizer, epochs=2, batch_size=6, silent=True, checkpoint=path)
    assert "meta_loss" in result.history[-1].diagnostics, "fit finds the part that learns"
    assert int(inner.calls) == 4
    again = network_of()
    restored = caat(again, meta_every=1, steps=2)
    outer_again: Any = {
        "armor": lambda: ARMOR(robust_loss=restored, divergence=KL(), radius=0.1),
        "balanced": lambda: ClassWeighted(robust_loss=restored, class_weights=(1.0, 2.0, 0.5)),
        "adjusted": lambda: LogitAdjusted(robust_loss=restored, class_counts=(10, 20, 30)),
    }[around]()
    fit(again, outer_again, batch(), optimizer=restored.optimizer, epochs=2, batch_size=6, silent=True, checkpoint=path)
    assert int(restored.calls) == 4, "and keeps its state in the checkpoint"


def test_its_state_is_whole_inside_a_module(tmp_path: Any) -> None:
    """Temperature and optimizer of the network too, under the name that the module gives it."""

    class Around(nn.Module):
        def __init__(self, inner: CAAT) -> None:
            super().__init__()
            self.inner = inner

    model = network_of()
    inner = caat(model, meta_every=1, steps=2)
    inner(model, *batch(), generator=generator())
    inner.network.temperature = 0.5
    told = Around(inner).state_dict()
    assert {name.removeprefix("inner.") for name in told} == inner.state_dict().keys()
    assert any(name.startswith("inner.network_optimizer.0.") for name in told)
    other = caat(network_of(), meta_every=1, steps=2)
    Around(other).load_state_dict(told)
    assert other.network.temperature == 0.5
    for name, value in inner.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match=r'Missing key.*"inner.temperature"'):
        Around(other).load_state_dict({name: value for name, value in told.items() if not name.endswith("temperature")})


def test_a_learned_bound_moves() -> None:
    model, (x, y) = network_of(), batch()
    network = WeightingNetwork(bound_range=(0.25, 4.0), generator=generator(2))
    still = caat(model, network=network, meta_every=None)
    still(model, x, y)
    first = still.diagnostics["radius"]
    objective = caat(model, network=network, meta_every=1, learning_rate=0.05)
    for _ in range(5):
        objective(model, x, y)
    assert first == pytest.approx(0.1, rel=0.2)
    assert objective.diagnostics["radius"] != pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("settings", [{"routing": "soft"}, {"bound": GradientBound()}, {"reads_loss": True}], ids=str)
def test_a_batch_without_examples_has_no_means_to_tell(settings: dict[str, Any]) -> None:
    model, (x, y) = network_of(), batch()
    if "reads_loss" in settings:
        settings = settings | {"routing": "soft", "network": WeightingNetwork(inputs=1, branches=("adversary",))}
    objective = caat(model, meta_every=2, **settings)
    objective(model, x, y)
    full = objective.diagnostics
    assert objective(model, x[:0], y[:0]).shape == (0,)
    told = {name: objective.diagnostics[name] for name in ("meta_loss", "meta_gradient")}
    assert objective.diagnostics == dict.fromkeys((*objective.network.branches, "radius")) | told
    assert list(objective.diagnostics) == list(full)


def test_an_epoch_tells_the_means_of_the_steps_that_had_examples() -> None:
    """Class 2 alone is robust, and only the first of two batches holds it."""
    model, (x, _) = network_of(), batch(n=8)
    y = torch.zeros(8, dtype=torch.int64)
    objective = caat(model, class_counts=[6, 1, 1], routing="soft")
    seen = []

    def watched(*arguments: Any, **others: Any) -> Any:
        found = ARMOR(robust_loss=objective, divergence=KL(), radius=0.1, robust_classes=(2,))(*arguments, **others)
        seen.append((len(found.worst_case.weights) if found.worst_case else 0, objective.diagnostics))
        return Watched(found.loss, objective.diagnostics)

    for labels in (y, y.index_fill(0, torch.tensor([3]), 2)):
        seen.clear()
        result = fit(model, watched, (x, labels), optimizer=objective.optimizer, epochs=1, batch_size=4, silent=True)
        (told,) = [record.diagnostics for record in result.history]
        counts = [count for count, _ in seen]
        assert sorted(counts) == [0, int((labels == 2).sum())]
        assert all(value is not None and math.isfinite(value) for value in told.values())
        if not any(counts):
            assert told.keys() == {"meta_loss", "meta_gradient"}
            continue
        ((_, known),) = [one for one in seen if one[0]]
        assert told["adversary"] == pytest.approx(known["adversary"])
        assert told["radius"] == pytest.approx(0.1)


class Watched(NamedTuple):
    loss: Tensor
    diagnostics: dict[str, float | None]


def test_meta_weight_net_anneals_a_temperature_like_caat() -> None:
    model = network_of()
    shared: dict[str, Any] = {"threat_model": BALL, "meta_data": batch(99, 9), "class_counts": [10, 20, 30]}
    objective = MetaWeightNet(**shared, optimizer=sgd(model), temperature=(1.0, 0.25))
    temperatures = []
    for epoch in range(3):
        objective.start_epoch(model, epoch=epoch, epochs=3, generator=generator())
        temperatures.append(objective.network.temperature)
    assert temperatures == pytest.approx([1.0, 0.5, 0.25])


def test_meta_weight_net_weighs_the_loss_by_its_network() -> None:
    model, (x, y) = network_of(), batch()
    robust = TRADES(threat_model=BALL, steps=3)
    objective = MetaWeightNet(
        threat_model=BALL,
        meta_data=batch(99, 9),
        optimizer=sgd(model),
        class_counts=[10, 20, 30],
        robust_loss=robust,
        meta_every=None,
        steps=3,
    )
    found = objective(model, x, y, generator=generator())
    plain = robust(model, x, y, generator=generator())
    weights = objective.network(plain.detach()[:, None]).weights.squeeze(1)
    torch.testing.assert_close(found, weights * plain)
    assert bool(((weights > 0) & (weights < 1)).all())


# The Gaussian mixture of the paper's section on theory -----------------------------------------------------------------

PHI = NormalDist().cdf


def closed_form(k: float, a: float, s_hard: float, s_easy: float, tau: float = 0.0) -> tuple[float, float]:
    """Errors of the hard and of the easy class at equal priors, for training moves s and a test attack tau, K > 1."""
    mean = a - (s_hard + s_easy) / 2
    big, q = 2 * mean / (k * k - 1), 2 * math.log(k) / (k * k - 1)
    r = math.sqrt(big * big + q)
    return PHI(-k * big + r - s_hard / k + tau / k), PHI(big - k * r - s_easy + tau)


ERRORS = {  # (moves of the hard and of the easy class): natural errors, robust errors at tau 0.5; K = 2, a = 2
    (0.0, 0.0): ((0.1210, 0.0485), (0.1788, 0.1230)),
    (0.5, 0.5): ((0.1490, 0.0275), (0.2145, 0.0780)),
    (0.5, 0.0): ((0.1088, 0.0625), (0.1628, 0.1506)),
    (0.5, -0.25): ((0.0922, 0.0892), (0.1407, 0.1988)),
    (0.5, -0.5): ((0.0778, 0.1230), (0.1210, 0.2547)),
}


def trained(k: float, a: float, s_hard: float, s_easy: float) -> tuple[Tensor, Tensor]:
    """Weights and offset of the linear model of least error on the moved mixture, by descent on the population's error."""
    d = 4
    eta = a / math.sqrt(d)  # sigma of the easy class is 1
    centre = torch.full((d,), eta, dtype=torch.float64)
    w = torch.tensor([1.0, 0.8, 1.2, 0.9], dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    # One exact step of signed_pgd on the linear model moves class y by -y e along the signs of w, which are all +1.
    e_hard, e_easy = s_hard / math.sqrt(d), s_easy / math.sqrt(d)
    optimizer = torch.optim.LBFGS(
        [w, b], lr=0.5, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def risk() -> Tensor:
        length = w.norm()
        hard = normal.cdf(-(w @ (centre - e_hard) + b) / (k * length))
        easy = normal.cdf((w @ (-centre + e_easy) + b) / length)
        return (hard + easy) / 2

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = risk()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), b.detach()


@pytest.mark.parametrize("moves", ERRORS)
def test_errors_on_the_gaussian_mixture(moves: tuple[float, float]) -> None:
    natural, robust = ERRORS[moves]
    assert closed_form(2, 2, *moves) == pytest.approx(natural, abs=1e-4)
    assert closed_form(2, 2, *moves, tau=0.5) == pytest.approx(robust, abs=1e-4)
    w, b = trained(2, 2, *moves)
    scale = w.sum() / math.sqrt(len(w)) / w.norm()  # 1 for weights along (1, ..., 1)
    offset = float(b / w.norm())
    for tau, expected in ((0.0, natural), (0.5, robust)):
        found = PHI(-(2 * float(scale) + offset - tau) / 2), PHI(-2 * float(scale) + offset + tau)
        assert found == pytest.approx(expected, abs=1e-4)


def test_equal_bounds_widen_the_gap_and_opposite_ones_close_it() -> None:
    for s, gap in ((0.0, 0.0725), (0.5, 0.1214), (0.8, 0.1531)):
        hard, easy = closed_form(2, 2, s, s)
        assert hard - easy == pytest.approx(gap, abs=1e-4)
    k, a = 2.0, 2.0
    big, q = 2 * a / (k * k - 1), 2 * math.log(k) / (k * k - 1)
    r = math.sqrt(big * big + q)
    delta = k * ((-k * big + r) - (big - k * r)) / (k + 1)
    assert delta == pytest.approx(0.32658, abs=1e-5)
    assert closed_form(k, a, delta, -delta) == pytest.approx((0.09121, 0.09121), abs=1e-5)
    w, b = trained(k, a, delta, -delta)
    errors = (
        PHI(-(w.sum().item() * a / 2 + b.item()) / (k * w.norm().item())),
        PHI(-(w.sum().item() * a / 2 - b.item()) / w.norm().item()),
    )
    assert errors == pytest.approx((0.09121, 0.09121), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(sign=st.sampled_from([-1, 1]), epsilon=st.floats(0.01, 0.3), label=st.sampled_from([0, 1]))
def test_signed_moves_of_a_linear_model_are_the_ones_of_the_theory(sign: int, epsilon: float, label: int) -> None:
    """x moves by -y e 1 against the model and by +y e 1 in its favour, with y = -1 or +1."""
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.stack([-torch.ones(4), torch.ones(4)]))
    x, y = torch.full((1, 4), 0.5), torch.tensor([label])
    ball = ThreatModel(norm="linf", epsilon=epsilon)
    climbed = lambda clean, moved, y: cross_entropy(moved, y)  # noqa: E731
    moved = signed_pgd(model, x, y, torch.tensor([sign]), threat_model=ball, climbed=climbed, generator=generator())
    torch.testing.assert_close(moved, x - (2 * label - 1) * sign * epsilon)


# Refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"threat_model": 0.1}, "threat_model must be a ThreatModel, got 0.1"),
        ({"routing": "Hard "}, "routing must be one of 'hard', 'soft', 'random', got 'Hard '; write 'hard'"),
        ({"meta_every": 0}, "meta_every must be an integer >= 1, got 0"),
        ({"hypergradient": "vjp"}, "hypergradient must be one of 'auto', 'jvp', 'double_backward', 'finite_difference', got"),
        ({"network": WeightingNetwork(inputs=2)}, "network must be with inputs=6, got 2"),
        (
            {"bound": GradientBound(), "robust_loss": LOSSES["beta"]},
            "robust_loss must be one whose adversaries signed_pgd can find",
        ),
        ({"hypergradient": "jvp", "robust_loss": LOSSES["beta"]}, "hypergradient must be not 'jvp' for a loss that attacks"),
        ({"meta_data": (torch.full((2, 6), 2.0), torch.tensor([0, 1]))}, "x must be in the box"),
        ({"meta_data": (torch.full((2, 6), 0.5), torch.tensor([0, 3]))}, "y must be in [0, 3)"),
        ({"temperature": (1.0, 0.0)}, "temperature must be a finite number > 0, got 0.0"),
        ({"anti_factor": 0.0}, "anti_factor must be a finite number > 0, got 0.0"),
        ({"robust_loss": TRADES}, "robust_loss must be a robust loss, got"),
        ({"robust_loss": TRADES(threat_model=ThreatModel(epsilon=0.2))}, "robust_loss must be one for the threat model of the"),
        ({"robust_loss": MART(attack=PGD(threat_model=ThreatModel(norm="l2")))}, "robust_loss must be one for the threat model"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        caat(network_of(), **changes)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_meta_steps_need_a_module_and_its_own_optimizer() -> None:
    model, (x, y) = network_of(), batch()
    with pytest.raises(
        TypeError, match="model must be an nn.Module for meta-steps, got function; pass the module, or set meta_every"
    ):
        caat(model)(lambda z: model(z), x, y)
    with pytest.raises(ValueError, match="optimizer must be the one that the objective was given"):
        fit(model, caat(model), (x, y), optimizer=sgd(model), epochs=1, silent=True)


def test_frl_trains() -> None:
    model, data = network_of(), batch(1, 30)
    objective = FRL(threat_model=BALL, held_out=batch(2, 12), steps=2, held_out_attack=PGD(threat_model=BALL, steps=2))
    result = fit(model, objective, data, optimizer=sgd(model), epochs=3, batch_size=10, silent=True)
    assert result.history[-1].diagnostics["largest_boundary_weight"] >= 1
    assert not rows_independent(network_of(norm=True).train())
    assert rows_independent(network_of(norm=True).eval())

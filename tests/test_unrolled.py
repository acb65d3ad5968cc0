"""Unrolled and learned attacks: every derivative against central differences in float64, and the contract of an attack."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torchopt.base import EmptyState, GradientTransformation

from metarobust.attacks import PGD, count_calls
from metarobust.attacks._unrolled import Unrolled
from metarobust.losses import cross_entropy, margin
from metarobust.meta_optimizers import LSTMOptimizer, gradients_only, meta_train, train_optimizees
from metarobust.meta_optimizers._attack_task import AttackTask
from metarobust.meta_optimizers._estimators import Slot, unroll
from metarobust.meta_optimizers._meta_training import MetaTrainingRun, MetaTrainingSettings
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack

CLASSES, SHAPE, BATCH = 3, (1, 3, 4), 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(*layers: nn.Module, seed: int = 2) -> nn.Sequential:
    """A small smooth classifier in float64."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), *layers, nn.Tanh(), nn.Linear(8, CLASSES)).double()
    generator = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def batch(*, near_the_box: bool, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Inputs in the box: far from its sides, or with half of the coordinates close enough for the box to bind."""
    x = 0.35 + 0.3 * torch.rand(size, *SHAPE, generator=seeded(1), dtype=torch.float64)
    if near_the_box:
        sides = torch.rand(x.shape, generator=seeded(3), dtype=torch.float64)
        x = torch.where(sides < 0.25, 0.02 * x, torch.where(sides > 0.75, 1 - 0.02 * x, x))
    return x, torch.arange(size) % CLASSES


def sign_descent(step_size: float) -> GradientTransformation:
    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        return tuple(-step_size * g.sign() for g in updates), state

    return GradientTransformation(cast("Any", lambda params: EmptyState()), cast("Any", update))


def steepest_descent(threat_model: ThreatModel, step_size: float) -> GradientTransformation:
    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        return tuple(step_size * threat_model.ascent_direction(-g, p) for g, p in zip(updates, params, strict=True)), state

    return GradientTransformation(cast("Any", lambda params: EmptyState()), cast("Any", update))


def learned(total_steps: int, **settings: Any) -> tuple[GradientTransformation, list[Tensor]]:
    torch.manual_seed(0)
    optimizer = LSTMOptimizer(gradient_source="gradient", hidden_size=4, initial_learning_rate=0.1, **settings).double()
    with torch.no_grad():
        for p in optimizer.parameters():  # away from the symmetric start, so that each parameter matters
            p.add_(0.1 * torch.randn_like(p))
    return optimizer.as_gradient_transformation(total_steps=total_steps, stacked=True), list(optimizer.parameters())


def make_rule(name: str, steps: int) -> tuple[Callable[[], GradientTransformation], list[Tensor]]:
    """What makes a rule, and the tensors inside of it that can be learned. TorchOpt reads a step size when a rule is made."""
    if name == "lstm":
        rule, parameters = learned(steps)
        return lambda: rule, parameters
    step_size = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    if name == "sgd":
        return lambda: torchopt.sgd(cast("Any", step_size)), [step_size]
    return lambda: torchopt.adam(cast("Any", step_size), eps_root=1e-8), [step_size]


def check_against_central_differences(
    outer: Callable[[], Tensor], groups: Sequence[Sequence[Tensor]], *, rel: float = 1e-6, size: float = 1e-5
) -> list[float]:
    """Each group of tensors along a random direction, differences of fourth order; returns the derivatives."""
    tensors = [t for group in groups for t in group]
    found = dict(zip(map(id, tensors), torch.autograd.grad(outer(), tensors, allow_unused=True), strict=True))
    generator, derivatives = seeded(9), []
    for group in groups:
        directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in group]
        starts, expected = [t.detach().clone() for t in group], 0.0
        for place, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1), (0, 0)):
            with torch.no_grad():
                for t, start, direction in zip(group, starts, directions, strict=True):
                    t.copy_(start + place * size * direction)
            expected += weight * outer().item() / (12 * size)
        gradients = [found[id(t)] for t in group]
        derivatives.append(sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True) if g is not None))
        assert derivatives[-1] == pytest.approx(expected, rel=rel, abs=1e-9)
    return derivatives


# The projection ------------------------------------------------------------------------------------------------------

NORMS = {"linf": 0.2, "l2": 0.5, "l1": 1.0}


def moves(norm: str, *, seed: int = 5) -> tuple[ThreatModel, Tensor, Tensor]:
    """Points inside the ball, outside of it, and stopped by the box, in one batch."""
    x, _ = batch(near_the_box=True, size=8)
    length = torch.tensor([1e-3, 0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    move = length * torch.randn(x.shape, generator=seeded(seed), dtype=torch.float64)
    return ThreatModel(norm=norm, epsilon=NORMS[norm]), x + move, x


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(5))
def test_the_projection_has_the_derivative_of_a_projection_and_the_same_value_without_a_graph(norm: str, seed: int) -> None:
    threat_model, moved, x = moves(norm, seed=seed)
    moved.requires_grad_(), x.requires_grad_()
    projected = threat_model.project(moved, x)
    with torch.no_grad():
        assert torch.equal(threat_model.project(moved, x), projected)  # the graph changes no value
    weights = torch.randn(x.shape, generator=seeded(7), dtype=torch.float64)
    derivatives = check_against_central_differences(
        lambda: (weights * threat_model.project(moved, x)).sum(), [[moved], [x]], size=1e-6
    )
    assert all(derivatives)


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_has_a_derivative_where_nothing_moved(norm: str) -> None:
    """There the ball is not reached: the projection is the identity in the point, whatever the norm."""
    x, _ = batch(near_the_box=False)
    moved = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(ThreatModel(norm=norm, epsilon=0.3).project(moved, x).sum(), moved)
    assert torch.equal(found, torch.ones_like(x))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_coordinates_that_did_not_move_share_the_derivative_of_the_others(norm: str) -> None:
    """Beyond the l2 ball a still coordinate is scaled like all others; an l1 ball keeps it at x."""
    x = torch.full((1, 4), 0.5, dtype=torch.float64)
    moved = (x + torch.tensor([[0.3, 0.4, 0.0, 0.0]], dtype=torch.float64)).requires_grad_()
    projected = ThreatModel(norm=norm, epsilon=0.25).project(moved, x)
    (found,) = torch.autograd.grad(projected[0, 2], moved)
    expected = [0, 0, 0.5 if norm == "l2" else 0.0, 0]
    assert torch.allclose(found[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-12, 1e-6, 1e6, 1e18])
def test_derivatives_of_the_projection_are_finite_for_tiny_and_huge_moves_in_single_precision(norm: str, length: float) -> None:
    x = torch.rand(4, *SHAPE, generator=seeded(1))
    x[0], x[1] = 0, 1
    moved = (x + length * torch.randn(x.shape, generator=seeded(5))).requires_grad_()
    x.requires_grad_()
    projected = ThreatModel(norm=norm, epsilon=NORMS[norm]).project(moved, x)
    assert all(g.isfinite().all() for g in torch.autograd.grad(projected.sum(), [moved, x]))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_coordinate_just_short_of_the_box_is_free(norm: str) -> None:
    x = torch.tensor([[1e-8, 1e-8, 0.5]])
    moved = (x - torch.tensor([[1e-10, 2e-8, 1e-3]])).requires_grad_()
    (found,) = torch.autograd.grad(ThreatModel(norm=norm, epsilon=0.1).project(moved, x).sum(), moved)
    assert found.tolist() == [[1, 0, 1]]


# Derivatives of the attack -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("rule", ["sgd", "adam", "lstm"])
@pytest.mark.parametrize(("norm", "near_the_box"), [("linf", False), ("linf", True), ("l2", False), ("l2", True), ("l1", True)])
def test_gradients_equal_central_differences(norm: str, near_the_box: bool, rule: str, steps: int) -> None:
    """Of the cross-entropy at x_adv: by the model's parameters, by what is learned inside the rule, and by x."""
    threat_model = ThreatModel(norm=norm, epsilon={"linf": 0.1, "l2": 0.2, "l1": 0.5}[norm])
    make, inside = make_rule(rule, steps)
    attack = Unrolled(threat_model=threat_model, update_rule=make(), steps=steps, random_start=True)
    model, judge = network(), network(seed=8).requires_grad_(False)
    x, y = batch(near_the_box=near_the_box)
    x.requires_grad_()
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def outer() -> Tensor:
        def closure(rows: Tensor) -> Tensor:
            return functional_call(model, dict(zip(names, parameters, strict=True)), (rows,))

        x_adv = dataclasses.replace(attack, update_rule=make())(closure, x, y, generator=seeded(4))
        assert threat_model.contains(x_adv, x, tolerance=1e-9).all()
        return cross_entropy(judge(x_adv), y).sum()  # another model judges: every path leads through the attack

    x_adv = attack(model, x, y, generator=seeded(4))
    on_the_box = ((x_adv == 0) | (x_adv == 1)).double().mean().item()
    assert (0.03 < on_the_box < 0.6) if near_the_box else on_the_box == 0
    assert all(check_against_central_differences(outer, [parameters, inside, [x]]))


def test_every_weight_of_a_learned_rule_is_reached() -> None:
    rule, weights = learned(total_steps=3)
    attack = Unrolled(threat_model=ThreatModel(norm="l2", epsilon=0.5), update_rule=rule, steps=3)
    model, (x, y) = network(), batch(near_the_box=False)
    gradients = torch.autograd.grad(cross_entropy(model(attack(model, x, y)), y).sum(), weights)
    assert all(g.any() for g in gradients)


def test_a_rule_of_signs_passes_nothing_on() -> None:
    attack = Unrolled(threat_model=ThreatModel(epsilon=0.1), update_rule=sign_descent(0.03), steps=3)
    model, judge, (x, y) = network(), network(seed=8), batch(near_the_box=False)
    gradients = torch.autograd.grad(cross_entropy(judge(attack(model, x, y)), y).sum(), list(model.parameters()))
    assert not any(g.any() for g in gradients)


def by_hand(model: nn.Module, x: Tensor, y: Tensor, attack: Unrolled, *, cut: int) -> Tensor:
    """The attack as a plain loop; point and state are detached after ``cut`` steps."""
    x_adv, rule = x.clone(), attack.update_rule
    state: Any = rule.init(cast("Any", (x_adv,)))
    for step in range(attack.steps):
        if step == cut:
            x_adv = x_adv.detach()
            state = torchopt.pytree.tree_map(lambda s: s.detach() if isinstance(s, Tensor) else s, state)
        point = x_adv if x_adv.requires_grad else x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(-cross_entropy(model(point), y).sum(), point, create_graph=True)
        updates, state = rule.update(cast("Any", (gradient,)), state, params=cast("Any", (point,)), inplace=False)
        x_adv = attack.threat_model.project(point + cast("Any", updates)[0], x)
    return x_adv


@pytest.mark.parametrize("rule", ["momentum", "lstm"])
@pytest.mark.parametrize(("truncation", "cut"), [(None, 0), (5, 0), (8, 0), (2, 3), (1, 4)])
def test_truncation_is_the_chain_with_a_detached_beginning(rule: str, truncation: int | None, cut: int) -> None:
    update_rule = torchopt.sgd(0.1, momentum=0.9) if rule == "momentum" else learned(5)[0]
    threat_model = ThreatModel(norm="l2", epsilon=0.4)
    attack = Unrolled(threat_model=threat_model, update_rule=update_rule, steps=5, truncation=truncation)
    model, (x, y) = network(), batch(near_the_box=True)
    results = [attack(model, x, y), by_hand(model, x, y, attack, cut=cut)]
    assert torch.equal(*results)
    assert torch.equal(results[0], dataclasses.replace(attack, truncation=None)(model, x, y))
    gradients = [torch.autograd.grad(cross_entropy(model(r), y).sum(), list(model.parameters())) for r in results]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_truncation_detaches_a_learned_initial_state() -> None:
    step_size = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        return tuple(-state * g for g in updates), state

    rule = GradientTransformation(cast("Any", lambda params: 1.0 * step_size), cast("Any", update))
    model, (x, y), found = network(), batch(near_the_box=False), []
    for truncation in (None, 3, 2):
        attack = Unrolled(threat_model=ThreatModel(norm="l2", epsilon=9), update_rule=rule, steps=3, truncation=truncation)
        found.append(torch.autograd.grad(attack(model, x, y).sum(), step_size, allow_unused=True)[0])
    assert found[0] is not None
    assert torch.equal(found[0], found[1])
    assert found[2] is None


# Memory --------------------------------------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """The largest number of bytes that tensors made inside the block held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torchopt.pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


def gradients_and_peak(**settings: Any) -> tuple[list[Tensor], int]:
    model, (x, y) = network(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)), batch(near_the_box=True, size=64)
    attack = Unrolled(threat_model=ThreatModel(norm="l2", epsilon=0.4), update_rule=torchopt.sgd(0.1, momentum=0.5), **settings)
    with PeakBytes() as memory:
        loss = cross_entropy(model(attack(model, x, y)), y).sum()
        return list(torch.autograd.grad(loss, list(model.parameters()))), memory.peak


def test_activation_checkpointing_gives_equal_gradients_in_less_memory() -> None:
    plain, peak = gradients_and_peak(steps=8)
    recomputed, lower = gradients_and_peak(steps=8, activation_checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert lower < 0.5 * peak


def test_activation_checkpointing_works_with_a_learned_rule_and_a_batch_norm() -> None:
    rule, weights = learned(3)
    attack = Unrolled(threat_model=ThreatModel(epsilon=0.1), update_rule=rule, steps=3)
    model, (x, y) = network(nn.BatchNorm1d(8, dtype=torch.float64)), batch(near_the_box=True)
    found = []
    for checkpointing in (False, True):
        x_adv = dataclasses.replace(attack, activation_checkpointing=checkpointing)(model, x, y)
        found.append(torch.autograd.grad(cross_entropy(x_adv.flatten(1), y).sum(), [*weights, *model[1].parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_memory_does_not_grow_with_the_steps_under_truncation_or_without_a_graph() -> None:
    assert gradients_and_peak(steps=4, truncation=2)[1] == gradients_and_peak(steps=12, truncation=2)[1]
    assert gradients_and_peak(steps=4)[1] > 1.5 * gradients_and_peak(steps=4, truncation=2)[1]
    model, (x, y), peaks = network(), batch(near_the_box=True), []
    for steps in (3, 9):
        attack = Unrolled(threat_model=ThreatModel(norm="l2"), update_rule=torchopt.sgd(0.1), steps=steps)
        with PeakBytes() as memory, torch.no_grad():
            attack(model, x, y)
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1]


# The contract of an attack -------------------------------------------------------------------------------------------

RULES = {"sgd": lambda: torchopt.sgd(0.2), "adam": lambda: torchopt.adam(0.1), "lstm": lambda: learned(4)[0]}
THREATS = [ThreatModel(norm="linf", epsilon=0.1), ThreatModel(norm="l2", epsilon=0.4), ThreatModel(norm="l1", epsilon=0.8)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("threat_model", THREATS, ids=lambda t: t.norm)
def test_contract(rule: str, threat_model: ThreatModel) -> None:
    attack = Unrolled(threat_model=threat_model, update_rule=RULES[rule](), steps=4)
    assert isinstance(attack, Attack)
    model, (x, y) = network(nn.BatchNorm1d(8, dtype=torch.float64)), batch(near_the_box=True)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    state, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with count_calls() as counter:
        x_adv = attack(model, x, y)
    assert (counter.calls, counter.examples) == (1, BATCH)
    assert x_adv.requires_grad
    assert threat_model.contains(x_adv, x, tolerance=1e-9).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert torch.equal(attack(model, x, y), x_adv)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            plain = attack(model, x, y)
        assert torch.equal(plain, x_adv)
        assert plain.grad_fn is None
        assert not plain.requires_grad
        assert not plain.is_inference()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all((p.grad == 7).all() for p in model.parameters() if p.grad is not None)
    assert torch.equal(torch.get_rng_state(), random_state)
    cross_entropy(model.eval()(x_adv), y).sum().backward()  # the buffers were put back without breaking the graph
    assert all((p.grad != 7).any() for p in model.parameters() if p.grad is not None)
    eased = dataclasses.replace(attack, direction="anti_adversary")
    with torch.no_grad():
        losses = [cross_entropy(model(moved), y) for moved in (eased(model, x, y), x, attack(model, x, y))]
    assert losses[0].mean() < losses[1].mean() < losses[2].mean()


@pytest.mark.parametrize("threat_model", THREATS, ids=lambda t: t.norm)
@pytest.mark.parametrize("random_start", [False, True])
def test_steepest_descent_is_pgd_bit_for_bit(threat_model: ThreatModel, random_start: bool) -> None:
    step = 0.3 * threat_model.epsilon
    rule = sign_descent(step) if threat_model.norm == "linf" else steepest_descent(threat_model, step)
    shared: dict[str, Any] = {"threat_model": threat_model, "steps": 5, "random_start": random_start}
    model, (x, y) = network(), batch(near_the_box=True)
    for direction in ("adversary", "anti_adversary"):
        pgd = PGD(**shared, step_size=step, direction=direction)(model, x, y, generator=seeded())
        unrolled = Unrolled(**shared, update_rule=rule, direction=direction)
        with torch.no_grad():
            assert torch.equal(unrolled(model, x, y, generator=seeded()), pgd)
        assert torch.equal(unrolled(model, x, y, generator=seeded()), pgd)


@pytest.mark.parametrize("rule", RULES)
def test_examples_do_not_see_each_other(rule: str) -> None:
    attack = Unrolled(threat_model=THREATS[1], update_rule=RULES[rule](), steps=4)
    model, (x, y) = network(), batch(near_the_box=True)
    order = torch.tensor([3, 1])
    assert torch.allclose(attack(model, x[order], y[order]), attack(model, x, y)[order], rtol=0, atol=1e-12)


def test_empty_batches_radius_zero_and_single_precision() -> None:
    rule, model = learned(2)[0], network()
    x, y = batch(near_the_box=True)
    attack = Unrolled(threat_model=THREATS[1], update_rule=rule, steps=2)
    assert attack(model, x[:0], y[:0]).shape == (0, *SHAPE)
    still = dataclasses.replace(attack, threat_model=ThreatModel(norm="l2", epsilon=0))(model, x, y)
    assert torch.equal(still, x)
    assert still.data_ptr() != x.data_ptr()
    x.requires_grad_()
    assert attack(model, x, y).data_ptr() != x.data_ptr()
    widening = torchopt.chain(torchopt.sgd(0.1), GradientTransformation(cast("Any", lambda p: EmptyState()), cast("Any", widen)))
    narrow = dataclasses.replace(attack, update_rule=widening)(network().float(), x.detach().float(), y)
    assert narrow.dtype == torch.float32


def widen(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
    return tuple(u.double() for u in updates), state


def test_forward_passes_are_the_steps() -> None:
    rows, model = [], network()

    def counted(x: Tensor) -> Tensor:
        rows.append(len(x))
        return model(x)

    for truncation in (None, 2):
        Unrolled(threat_model=THREATS[0], update_rule=torchopt.sgd(0.1), steps=5, truncation=truncation)(
            counted, *batch(near_the_box=False)
        )
    assert rows == [BATCH] * 10


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"threat_model": 0.3}, "threat_model must be a ThreatModel, got 0.3"),
        ({"update_rule": 0.1}, "update_rule must be a TorchOpt GradientTransformation, got 0.1; write torchopt.sgd(0.1)"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"truncation": 0}, "truncation must be an integer >= 1, got 0"),
        ({"loss": "hinge"}, "loss must be one of "),
        ({"direction": "up"}, "direction must be one of 'adversary', 'anti_adversary', got 'up'"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(change: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        Unrolled(**{"threat_model": THREATS[0], "update_rule": torchopt.sgd(0.1), **change})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda x, y: (x * 255, y), "8-bit images belong in [0, 1]: write x / 255"),
        (lambda x, y: (x, y.float()), "write y.long()"),
        (lambda x, y: (x, y + 1), "y must be in [0, 3), the classes that the model has logits for, got labels from 1 to 3"),
    ],
)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_bad_batches_are_refused_in_one_sentence(spoil: Callable[..., Any], text: str, context: Any) -> None:
    attack = Unrolled(threat_model=THREATS[0], update_rule=torchopt.sgd(0.1))
    with context(), pytest.raises((ValueError, TypeError)) as caught:
        attack(network(), *spoil(*batch(near_the_box=False)))
    assert text in str(caught.value)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_a_model_without_input_gradient_is_refused_in_one_sentence(context: Any) -> None:
    attack, model = Unrolled(threat_model=THREATS[0], update_rule=torchopt.sgd(0.1)), network()
    for cut in (lambda x: model(x.detach()), lambda x: model(x).detach()):
        with context(), pytest.raises(ValueError, match=r"^the model's logits must depend differentiably on x"):
            attack(cut, *batch(near_the_box=False))


# Learning to attack --------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> MetaTrainingSettings:
    values: dict[str, Any] = {
        "iterations": 10, "total_steps": 4, "unroll": 4, "slots": 1, "learning_rate": 1e-2, "clip_norm": 1.0,
        "loss_cap": 100.0, "late_weight": 1.0, "meta_loss_every": 1, "seed": 0,
    }  # fmt: skip
    return MetaTrainingSettings(**(values | changes))


def unrolled_loss(run: MetaTrainingRun, slot: Slot) -> Tensor:
    """Advance the slot by one unroll, graph kept."""
    window = unroll(slot, run.rule_for(slot.total_steps), run.settings, (slot.parameters, slot.state))
    slot.parameters, slot.state, slot.age = window.parameters, window.state, slot.age + run.settings.unroll
    return window.loss


def attack_task(threat_model: ThreatModel, **changes: Any) -> AttackTask:
    x, y = batch(near_the_box=True)
    return AttackTask(**{"model": network(), "x": x, "y": y, "threat_model": threat_model, **changes})


@pytest.mark.parametrize("threat_model", THREATS, ids=lambda t: t.norm)
def test_whole_runs_keep_the_optimizee_where_it_may_be(threat_model: ThreatModel) -> None:
    task = attack_task(threat_model)
    (moved,) = train_optimizees(
        task, torchopt.chain(gradients_only(), torchopt.sgd(10.0)), total_steps=3, generator=torch.Generator()
    )[3]
    assert not torch.equal(moved, task.x)
    assert threat_model.contains(moved, task.x).all()


def fresh_optimizer() -> LSTMOptimizer:
    torch.manual_seed(0)
    return LSTMOptimizer(gradient_source="gradient", hidden_size=4, initial_learning_rate=0.02).double()


@pytest.mark.parametrize("threat_model", THREATS, ids=lambda t: t.norm)
@pytest.mark.parametrize("direction", ["adversary", "anti_adversary"])
def test_meta_gradient_equals_central_differences(threat_model: ThreatModel, direction: str) -> None:
    optimizer = fresh_optimizer()
    with torch.no_grad():
        for p in optimizer.parameters():
            p.add_(0.1 * torch.randn_like(p))

    def outer() -> Tensor:
        task = attack_task(threat_model, direction=direction, meta_objective="cross_entropy", random_start=True)
        run = MetaTrainingRun(optimizer, lambda generator: task, settings(unroll=2))
        return unrolled_loss(run, run.slots[0])

    assert all(check_against_central_differences(outer, [[p] for p in optimizer.parameters()]))


@pytest.mark.parametrize("threat_model", THREATS, ids=lambda t: t.norm)
@pytest.mark.parametrize("estimator", ["second_order", "first_order", "pes"])
def test_meta_training_takes_the_very_steps_of_the_unrolled_attack(threat_model: ThreatModel, estimator: str) -> None:
    optimizer, task = fresh_optimizer(), attack_task(threat_model)
    run = MetaTrainingRun(optimizer, lambda generator: task, settings(estimator=estimator))
    unrolled_loss(run, run.slots[0])
    rule = optimizer.as_gradient_transformation(total_steps=4, stacked=True)
    attack = Unrolled(threat_model=threat_model, update_rule=rule, steps=4)
    assert torch.equal(run.slots[0].parameters[0], attack(network(), *batch(near_the_box=True)))
    assert threat_model.contains(run.slots[0].parameters[0], task.x, tolerance=1e-9).all()


def test_meta_training_learns_to_attack_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Twenty meta-updates raise the margin that the attack reaches, also beyond what the rule does before them."""
    threat_model = THREATS[1]
    arguments: dict[str, Any] = {"total_steps": 4, "unroll": 2, "slots": 2, "learning_rate": 3e-2, "loss_cap": 100.0}

    def sample_task(generator: torch.Generator) -> AttackTask:
        return attack_task(threat_model, random_start=bool(torch.rand((), generator=generator) < 0.5))

    def reached(optimizer: LSTMOptimizer) -> float:
        rule = optimizer.as_gradient_transformation(total_steps=4, stacked=True)
        model, (x, y) = network(), batch(near_the_box=True)
        attack = Unrolled(threat_model=threat_model, update_rule=rule, steps=4)
        return margin(model(attack(model, x, y)), y).mean().item()

    before, path = reached(fresh_optimizer()), tmp_path / "run.safetensors"
    trained = meta_train(fresh_optimizer(), sample_task, iterations=20, **arguments, silent=True)
    assert reached(trained.meta_optimizer) > before + 0.1
    ball = {"norm": threat_model.norm, "epsilon": [threat_model.epsilon] * 2, "box": [threat_model.lower, threat_model.upper]}
    assert trained.meta_optimizer.record["threat_models"] == ball

    class Killed(Exception):
        pass

    def kill(iteration: int, loss: float) -> None:
        if iteration == 9:
            raise Killed

    shared = arguments | {"iterations": 20, "checkpoint": path, "checkpoint_every": 4}
    with pytest.raises(Killed):
        meta_train(fresh_optimizer(), sample_task, **shared, silent=True, on_iteration=kill)
    resumed = meta_train(fresh_optimizer(), sample_task, **shared, silent=True)
    assert resumed.losses == trained.losses
    pairs = zip(trained.meta_optimizer.parameters(), resumed.meta_optimizer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_task_leaves_the_model_alone_and_explains_bad_input() -> None:
    model = network(nn.BatchNorm1d(8, dtype=torch.float64))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    task = attack_task(THREATS[0], model=model)
    (start,) = task.initial_parameters(generator=seeded())
    assert torch.equal(start, task.x)
    losses, streams = task.streams((start,), generator=seeded())
    assert losses.shape == task.meta_loss((start,), generator=seeded()).shape == (BATCH,)
    assert streams.gradients[0].shape == task.x.shape
    assert not streams.second_gradients[0].any()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for change, text in (
        ({"x": task.x * 255}, "write x / 255"),
        ({"x": task.x[:0], "y": task.y[:0]}, "x must be at least one example"),
        ({"y": task.y + 1}, "the classes that the model has logits for"),
        ({"direction": "up"}, "direction must be one of"),
        ({"meta_objective": "hinge"}, "loss must be one of"),
        ({"threat_model": 0.1}, "threat_model must be a ThreatModel, got 0.1"),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            attack_task(**{"threat_model": THREATS[0], **cast("Any", change)})
        assert text in str(caught.value)

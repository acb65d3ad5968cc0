"""The contract of update rules: one table, every property for every row."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torchopt.base import GradientTransformation

from metarobust.meta_optimizers import (
    InterpretableOptimizer,
    LSTMOptimizer,
    combine_factors,
    gradients_only,
    load,
    record_factors,
    save,
)
from metarobust.meta_optimizers._kinds import MetaOptimizer
from metarobust.meta_optimizers._layout import ROLES, tensor_roles
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel
from metarobust.types import Streams


@dataclass(frozen=True)
class Rule:
    """One row: how to make the rule, and which of the optional properties apply to it."""

    make: Callable[[], MetaOptimizer]
    two_streams: bool
    decreases_quadratic: bool

    def transformation(self, *, stacked: bool = False) -> GradientTransformation:
        torch.manual_seed(0)
        return self.make().as_gradient_transformation(total_steps=50, stacked=stacked)

    def updates(self, gradients: tuple[Tensor, ...]) -> object:
        return Streams(gradients, tuple(0.5 * g for g in gradients)) if self.two_streams else gradients


RULES = {
    "two streams": Rule(lambda: LSTMOptimizer(), True, True),
    "one stream": Rule(lambda: LSTMOptimizer(gradient_source="gradient"), False, True),
    "two layers": Rule(lambda: LSTMOptimizer(gradient_source="gradient", layers=2, hidden_size=5), False, True),
    "log-sign": Rule(lambda: LSTMOptimizer(gradient_source="gradient", preprocessing="log_sign"), False, True),
    # Untrained, these two have no reason to descend: their whole update is the network's output.
    "no base": Rule(lambda: LSTMOptimizer(gradient_source="gradient", base="none"), False, False),
    "serban2020": Rule(LSTMOptimizer.serban2020, False, False),
    "interpretable": Rule(InterpretableOptimizer, True, True),
    "interpretable, estimate": Rule(lambda: InterpretableOptimizer(gradient_source="gradient+adversarial_estimate"), True, True),
    "interpretable, one stream": Rule(lambda: InterpretableOptimizer(gradient_source="gradient"), False, True),
}

rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def parameters(generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, generator=generator) for shape in ((3, 4), (3,), (5, 3, 2, 2), (5,), (7,), (2, 5)))


@rules
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_finite_for_zero_and_for_huge_gradients(rule: Rule, size: float, generator: torch.Generator) -> None:
    params = parameters(generator)
    transformation = rule.transformation()
    state = transformation.init(params)
    for _ in range(3):
        updates, state = transformation.update(rule.updates(tuple(size * p for p in params)), state, params=params)
        assert all(u.isfinite().all() for u in updates)


@rules
def test_state_is_a_value(rule: Rule, generator: torch.Generator) -> None:
    params = parameters(generator)
    transformation = rule.transformation()
    state = transformation.init(params)
    gradients = rule.updates(params)
    first, after = transformation.update(gradients, state, params=params)
    second, again = transformation.update(gradients, state, params=params)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(after.to_dict().values(), again.to_dict().values(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert int(state.step) == 0
    assert int(after.step) == 1


@rules
def test_one_call_equals_one_call_per_tensor(rule: Rule, generator: torch.Generator) -> None:
    """The flat call is only a faster way: with roles given by a single weight matrix, splitting its rows changes nothing."""
    weight = torch.randn(6, 4, generator=generator)
    transformation = rule.transformation()
    whole, _ = transformation.update(rule.updates((weight,)), transformation.init((weight,)), params=(weight,))
    stacked = rule.transformation(stacked=True)
    copies = (torch.stack([weight, 2 * weight]),)
    together, _ = stacked.update(rule.updates(copies), stacked.init(copies), params=copies)
    torch.testing.assert_close(together[0][0], whole[0])
    alone, _ = transformation.update(rule.updates((2 * weight,)), transformation.init((weight,)), params=(2 * weight,))
    torch.testing.assert_close(together[0][1], alone[0])


@rules
def test_works_on_shapes_never_seen(rule: Rule, generator: torch.Generator) -> None:
    for shapes in ([(1, 1)], [(2, 3, 4)], [(4,), (4,)], [(2, 3), (2,), (4, 2), (4,), (4,), (4,)]):
        params = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        transformation = rule.transformation()
        updates, _ = transformation.update(rule.updates(params), transformation.init(params), params=params)
        assert [u.shape for u in updates] == [p.shape for p in params]


@rules
def test_decreases_a_convex_quadratic(rule: Rule, generator: torch.Generator) -> None:
    if not rule.decreases_quadratic:
        pytest.skip("untrained, this rule is a random direction")
    params = (torch.randn(4, 3, generator=generator),)
    transformation = rule.transformation()
    state, before = transformation.init(params), params[0].square().sum()
    for _ in range(50):
        updates, state = transformation.update(rule.updates(tuple(2 * p for p in params)), state, params=params)
        params = tuple(p + u.detach() for p, u in zip(params, updates, strict=True))
        state = state.detach()
    assert params[0].square().sum() < 0.9 * before


@rules
def test_file_round_trip_is_bit_equal(rule: Rule, tmp_path: Path, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    original = rule.make()
    original.record = {"note": "kept", "losses": [1.5]}
    path = save(original, tmp_path / "optimizer.safetensors")
    loaded = load(path)
    assert loaded.settings == original.settings
    assert loaded.record == original.record
    assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in loaded.parameters())
    params = parameters(generator)
    results = []
    for optimizer in (original, loaded):
        transformation = optimizer.as_gradient_transformation(total_steps=9)
        results.append(transformation.update(rule.updates(params), transformation.init(params), params=params)[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@rules
def test_works_with_torchopt_wrappers_and_chains(rule: Rule) -> None:
    if rule.two_streams:
        pytest.skip("TorchOpt's wrappers compute one stream")
    x, y = torch.rand(6, 4), torch.randint(2, (6,))
    model = mlp([4, 3, 2])
    start = [p.clone() for p in model.parameters()]
    chain = torchopt.chain(torchopt.clip_grad_norm(1.0), rule.transformation())
    optimizer = torchopt.Optimizer(list(model.parameters()), chain)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    functional = torchopt.FuncOptimizer(rule.transformation())
    params = tuple(p.detach().clone().requires_grad_() for p in mlp([4, 3, 2]).parameters())
    assert len(functional.step((params[0] ** 2).sum() + params[2].sum(), params)) == 4
    meta_model = mlp([4, 3, 2])
    meta = torchopt.MetaOptimizer(meta_model, rule.transformation())
    meta.step(F.cross_entropy(meta_model(x), y))
    assert F.cross_entropy(meta_model(x), y).requires_grad


@rules
def test_torch_optimizer_interface(rule: Rule) -> None:
    torch.manual_seed(0)
    learned = rule.make()
    x, y = torch.rand(6, 4), torch.randint(2, (6,))

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
        for _ in range(steps):
            optimizer.zero_grad()
            with learned.record_factors(model) if learned.two_streams else record_factors(model) as recorder:
                recorder.backward(F.cross_entropy(model(x), y))
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    model = mlp([4, 3, 2])
    twin = copy.deepcopy(model)
    optimizer = learned.torch_optimizer(model.parameters(), total_steps=10)
    assert isinstance(optimizer, torch.optim.Optimizer)
    straight = train(model, optimizer, 4)
    half = learned.torch_optimizer(twin.parameters(), total_steps=10)
    train(twin, half, 2)
    resumed = learned.torch_optimizer(twin.parameters(), total_steps=10)
    resumed.load_state_dict(half.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(straight, train(twin, resumed, 2), strict=True))


def test_torch_optimizer_groups_schedulers_and_zero_grad() -> None:
    torch.manual_seed(0)
    learned = LSTMOptimizer()
    model = mlp([4, 3, 2])
    parameters = list(model.parameters())
    optimizer = learned.torch_optimizer([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.0}], total_steps=10)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    before = [p.detach().clone() for p in parameters]
    with record_factors(model) as recorder:
        recorder.backward(model(torch.rand(5, 4)).square().mean())
    optimizer.step()
    schedule.step()
    assert not torch.equal(before[0], parameters[0])
    assert torch.equal(before[2], parameters[2]), "a group with lr 0 stays"
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)
    assert all(p.second_grad is None for p in parameters)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [LSTMOptimizer, InterpretableOptimizer])
def test_a_parameter_without_a_gradient_stays(kind: type[MetaOptimizer], dtype: torch.dtype) -> None:
    """As in torch.optim, in place and through the transformation: a frozen tensor, and one that the loss does not reach."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2)).to(dtype)
    model[0].weight.requires_grad_(False)
    optimizer = kind(gradient_source="gradient").torch_optimizer(model.parameters(), total_steps=10)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model[:3](torch.rand(5, 4, dtype=dtype)).square().mean().backward()
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [False, True, True, True, False, False]


def test_torch_optimizer_equals_the_transformation() -> None:
    torch.manual_seed(0)
    learned = LSTMOptimizer()
    model = mlp([4, 3, 2])
    params = tuple(p.detach().clone() for p in model.parameters())
    transformation = learned.as_gradient_transformation(total_steps=10)
    state = transformation.init(params)
    optimizer = learned.torch_optimizer(model.parameters(), total_steps=10)
    for _ in range(3):
        with record_factors(model) as recorder:
            optimizer.zero_grad()
            recorder.backward(model(torch.linspace(0, 1, 20).reshape(5, 4)).square().mean())
        g, h = (tuple(getattr(p, name) for p in model.parameters()) for name in ("grad", "second_grad"))
        updates, state = transformation.update(Streams(g, h), state, params=params)
        params = tuple(p + u.detach() for p, u in zip(params, updates, strict=True))
        optimizer.step()
        for a, b in zip(params, model.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("two_streams", [True, False])
def test_silent_network_is_adam(two_streams: bool) -> None:
    """With zero readouts and coefficients the rule is torch's Adam, compared as change from the start in float64."""
    torch.manual_seed(0)
    source = "gradient+perturbed_factors" if two_streams else "gradient"
    learned = LSTMOptimizer(gradient_source=source, initial_learning_rate=1e-2).double()
    with torch.no_grad():
        learned.readout.zero_()
    start = (torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
    reference = tuple(p.clone().requires_grad_() for p in start)
    adam = torch.optim.Adam(reference, lr=1e-2, eps=1e-8)
    transformation = learned.as_gradient_transformation(total_steps=20)
    params, state = start, transformation.init(start)
    for step in range(20):
        gradients = tuple(torch.sin(p + step) for p in params)
        for p, r in zip(reference, gradients, strict=True):
            p.grad = r.clone()
        adam.step()
        updates: object = Streams(gradients, gradients) if two_streams else gradients
        moves, state = transformation.update(updates, state, params=params)
        params = tuple(p + m.detach() for p, m in zip(params, moves, strict=True))
    for p, r, s in zip(params, reference, start, strict=True):
        torch.testing.assert_close(p - s, (r - s).detach(), rtol=1e-6, atol=1e-9)


def test_constant_coefficient_is_adam_on_the_combined_stream() -> None:
    """The three second moments give the combined one exactly: same path as torch's Adam on g + c h, c per role."""
    torch.manual_seed(0)
    learned = LSTMOptimizer(initial_learning_rate=1e-2).double()
    with torch.no_grad():
        learned.readout.zero_()
    learned.shift_factor_coefficients(first=1.7, others=0.4)
    start = (torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64))
    reference = tuple(p.clone().requires_grad_() for p in start)
    adam = torch.optim.Adam(reference, lr=1e-2)
    combine = combine_factors(first=1.7, others=0.4)
    transformation = learned.as_gradient_transformation(total_steps=20)
    params, state = start, transformation.init(start)
    for step in range(20):
        g = tuple(torch.sin(params[0].mean() + step + (i + 1) * p) for i, p in enumerate(params))
        h = tuple(torch.cos(3 * p + step) for p in params)
        moves, state = transformation.update(Streams(g, h), state, params=params)
        params = tuple(p + m.detach() for p, m in zip(params, moves, strict=True))
        for p, combined in zip(reference, combine.update(Streams(g, h), ())[0], strict=True):
            p.grad = combined
        adam.step()
    for p, r, s in zip(params, reference, start, strict=True):
        torch.testing.assert_close(p - s, (r - s).detach(), rtol=1e-6, atol=1e-9)


def test_gradients_only_drops_the_second_stream() -> None:
    g, h = (torch.ones(2, 2),), (torch.full((2, 2), 9.0),)
    rule = torchopt.chain(gradients_only(), torchopt.sgd(0.1))
    for updates in (Streams(g, h), g):
        found, _ = rule.update(updates, rule.init(g), params=g, inplace=False)
        torch.testing.assert_close(found[0], torch.full((2, 2), -0.1))


def test_missing_streams_and_parameters_say_what_to_write() -> None:
    params = (torch.zeros(2, 2),)
    two = LSTMOptimizer().as_gradient_transformation(total_steps=5)
    with pytest.raises(ValueError, match="compute both with metarobust.meta_optimizers.factor_gradients"):
        two.update(params, two.init(params), params=params)
    one = LSTMOptimizer(gradient_source="gradient").as_gradient_transformation(total_steps=5)
    with pytest.raises(ValueError, match="pass the gradients alone"):
        one.update(Streams(params, params), one.init(params), params=params)
    with pytest.raises(ValueError, match=r"write update\(..., params=params\)"):
        one.update(params, one.init(params))
    with pytest.raises(TypeError, match="updates must be Streams"):
        combine_factors(first=1.0, others=1.0).update(params, ())
    model = mlp([4, 3, 2])
    optimizer = LSTMOptimizer().torch_optimizer(model.parameters(), total_steps=5)
    model(torch.rand(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="recorder.backward"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"gradient_source": "both"}, "gradient_source must be one of"),
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1"),
        ({"preprocessing": "log_sign"}, "unless preprocessing is 'full'"),
        ({"output_scale": -1.0}, "output_scale must be a finite number > 0"),
    ],
)
def test_bad_settings(arguments: dict[str, object], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        LSTMOptimizer(**arguments)  # type: ignore[arg-type]


def test_corrupt_and_foreign_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no meta-optimizer at .* a name of a trained one: robust-small-v1"):
        load(tmp_path / "none.safetensors")
    damaged = save(LSTMOptimizer(), tmp_path / "damaged.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or of another kind"):
        load(damaged)
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="damaged or of another kind"):
        load(tmp_path / "pickle.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="a safetensors file of another program"):
        load(tmp_path / "foreign.safetensors")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = save(LSTMOptimizer(), tmp_path / "optimizer.safetensors")
    before = path.read_bytes()
    broken = LSTMOptimizer()
    broken.record = {"unserialisable": object()}
    with pytest.raises(TypeError):
        save(broken, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["optimizer.safetensors"]


LAYER_ORDERS = {
    "plain": [nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)],
    "convolutions with normalisation": [
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Linear(4, 2),
    ],
    "no bias before normalisation": [
        nn.Conv2d(1, 4, 3, bias=False),
        nn.GroupNorm(2, 4),
        nn.Linear(4, 4, bias=False),
        nn.Linear(4, 4),
    ],
}


@pytest.mark.parametrize("layers", LAYER_ORDERS.values(), ids=LAYER_ORDERS.keys())
def test_roles_are_the_same_in_every_interface(layers: list[nn.Module]) -> None:
    """By PyTorch's order (weight, bias) and by TorchOpt's sorted one (bias, weight), against the layers' types."""
    expected, listed, by_name = [], [], []
    for place, layer in enumerate(layers):
        for name, p in layer.named_parameters():
            if isinstance(layer, nn.GroupNorm):
                role = "normalisation"
            elif name == "bias":
                role = "bias"
            else:
                where = "first" if place == 0 else "last" if place == len(layers) - 1 else "inner"
                role = f"{where} {'dense' if isinstance(layer, nn.Linear) else 'convolution'}"
            expected.append((place, name, role, p.shape))
    listed = [ROLES[r.role] for r in tensor_roles([shape for *_, shape in expected])]
    assert listed == [role for *_, role, _ in expected]
    ordered = sorted(expected, key=lambda entry: (entry[0], entry[1]))
    by_name = [ROLES[r.role] for r in tensor_roles([shape for *_, shape in ordered])]
    assert by_name == [role for *_, role, _ in ordered]


def test_meta_optimizer_of_torchopt_moves_like_torch_optimizer() -> None:
    torch.manual_seed(0)
    learned = LSTMOptimizer(gradient_source="gradient")
    with torch.no_grad():
        learned.log_learning_rate.copy_(torch.randn(len(ROLES), 3))  # type: ignore[union-attr]
    x, y = torch.rand(6, 4), torch.randint(2, (6,))
    model = mlp([4, 3, 3, 2])
    twin = copy.deepcopy(model)
    meta = torchopt.MetaOptimizer(twin, learned.as_gradient_transformation(total_steps=5))
    optimizer = learned.torch_optimizer(model.parameters(), total_steps=5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        meta.step(F.cross_entropy(twin(x), y))
    for layer, other in zip(model, twin, strict=True):
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(layer.weight, other.weight)
            torch.testing.assert_close(layer.bias, other.bias)


def test_stale_second_stream_is_refused_and_a_foreign_threat_model_warned_of() -> None:
    torch.manual_seed(0)
    learned, model, x, y = LSTMOptimizer(), mlp([4, 3, 2]), torch.rand(6, 4), torch.randint(2, (6,))
    optimizer = learned.torch_optimizer(model.parameters(), total_steps=5)
    with record_factors(model, threat_model=ThreatModel(epsilon=0.1)) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    optimizer.step()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="gradients that were computed without it"):
        optimizer.step()
    learned.record["threat_models"] = {"norm": "linf", "epsilon": [0.2, 0.3], "box": [0.0, 1.0]}
    optimizer.zero_grad()
    with record_factors(model, threat_model=ThreatModel(epsilon=0.1)) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    with pytest.warns(UserWarning, match="was trained with linf, epsilon 0.2 to 0.3"):
        optimizer.step()
    assert copy.deepcopy(optimizer).param_groups[0]["total_steps"] == 5
    optimizer.zero_grad()
    with record_factors(model, gradient_source="gradient+adversarial_estimate") as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match="gradient_source='gradient\\+perturbed_factors'"):
        optimizer.step()


def test_rule_computes_in_its_own_precision() -> None:
    model = mlp([4, 3, 2]).double()
    optimizer = LSTMOptimizer().torch_optimizer(model.parameters(), total_steps=5)
    with record_factors(model) as recorder:
        recorder.backward(model(torch.rand(5, 4, dtype=torch.float64)).square().mean())
    optimizer.step()
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_a_scalar_parameter_has_a_role() -> None:
    params = (torch.ones(()), torch.ones(3, 4), torch.ones(3))
    rule = LSTMOptimizer(gradient_source="gradient").as_gradient_transformation(total_steps=5)
    updates, _ = rule.update(params, rule.init(params), params=params)
    assert [u.shape for u in updates] == [p.shape for p in params]

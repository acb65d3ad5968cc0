"""Virtual steps, the derivative of the meta-loss in the weights of the examples, and the step of the weighting network.

The reference of the derivatives steps a copy of the model with torch's own optimizer and takes central differences.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torch.func import functional_call

from metarobust._tensors import per_example
from metarobust.meta_weighters import (
    HYPERGRADIENTS,
    Hypergradient,
    VirtualUpdate,
    WeightingNetwork,
    hypergradient,
    meta_weighted_step,
    virtual_update,
)
from metarobust.types import Parameters

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1}),
    "weight_decay": (SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2}),
    "adam": (Adam, {"lr": 0.03}),
    "adam_weight_decay": (Adam, {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3}),
    "adamw": (AdamW, {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.5}),
    "tensor_lr": (SGD, {"lr": torch.tensor(0.1, dtype=torch.float64), "momentum": 0.5}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# Virtual updates ------------------------------------------------------------------------------------------------------


def leaves() -> list[nn.Parameter]:
    return [nn.Parameter(randn(3, 2)), nn.Parameter(randn(4, seed=1)), nn.Parameter(randn(1, seed=2)[0])]


def gradients_of(step: int) -> list[Tensor]:
    return [randn(3, 2, seed=10 + step), randn(4, seed=20 + step), randn(1, seed=30 + step)[0]]


def take_step(optimizer: Any, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    optimizer.step()


def predicted(update: VirtualUpdate, parameters: list[Any], gradients: list[Tensor], state: Any = None) -> tuple[Any, Any]:
    state = update.state if state is None else state
    moves, state = update.transformation.update(tuple(gradients), state, params=tuple(parameters), inplace=False)
    return [p + move for p, move in zip(parameters, moves, strict=True)], state


def build(name: str, parameters: Any) -> Any:
    kind, arguments = OPTIMIZERS[name]
    return kind(parameters, **arguments)


def assert_close(these: Any, those: Any, tolerance: float = 1e-12) -> None:
    for one, other in zip(these, those, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * 1e-2)


@every_optimizer
def test_a_virtual_update_is_the_next_step_and_changes_nothing(name: str) -> None:
    parameters = leaves()
    optimizer = build(name, parameters)
    for step in range(4):  # the first without a state
        before, state = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
        update = virtual_update(optimizer, parameters)
        expected, _ = predicted(update, [p.detach() for p in parameters], gradients_of(step))
        after = optimizer.state_dict()
        assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))
        assert state["param_groups"] == after["param_groups"]
        assert state["state"].keys() == after["state"].keys()
        for number, entries in state["state"].items():
            assert all(torch.equal(torch.as_tensor(after["state"][number][k]), torch.as_tensor(v)) for k, v in entries.items())
        take_step(optimizer, parameters, gradients_of(step))
        assert_close(expected, [p.detach() for p in parameters])
        assert all((one - other).abs().max() > 1e-3 for one, other in zip(expected, before, strict=True))


@every_optimizer
@pytest.mark.parametrize("warm", [0, 2])
def test_the_state_of_a_virtual_update_goes_on(name: str, warm: int) -> None:
    parameters = leaves()
    optimizer = build(name, parameters)
    for step in range(warm):
        take_step(optimizer, parameters, gradients_of(step))
    update, state = virtual_update(optimizer, parameters), None
    virtual: list[Any] = [p.detach().clone() for p in parameters]
    for step in range(warm, warm + 3):
        virtual, state = predicted(update, virtual, gradients_of(step), state)
        take_step(optimizer, parameters, gradients_of(step))
        assert_close(virtual, [p.detach() for p in parameters])


def test_parameter_groups_keep_their_settings_and_the_moment_counts() -> None:
    parameters = leaves()
    groups = [{"params": parameters[:1], "lr": 0.5, "weight_decay": 0.2}, {"params": parameters[1:], "momentum": 0.9}]
    optimizer = SGD(groups, lr=0.1)
    take_step(optimizer, parameters, gradients_of(0))
    update = virtual_update(optimizer, parameters[::-1])
    before = [p.detach().clone() for p in parameters]
    take_step(optimizer, parameters, gradients_of(1))
    for group in optimizer.param_groups:
        group["lr"] = 100.0  # a scheduler, later
    expected, _ = predicted(update, before[::-1], gradients_of(1)[::-1])
    assert_close(expected[::-1], [p.detach() for p in parameters])


@every_optimizer
@pytest.mark.parametrize("warm", [0, 2])
def test_the_derivative_of_an_update_is_that_of_central_differences(name: str, warm: int) -> None:
    parameters = leaves()
    optimizer = build(name, parameters)
    for step in range(warm):
        take_step(optimizer, parameters, gradients_of(step))
    update, point = virtual_update(optimizer, parameters), [p.detach() for p in parameters]
    cotangents = gradients_of(7)

    def value(gradients: list[Tensor]) -> Tensor:
        return sum(
            ((c * p).sum() for c, p in zip(cotangents, predicted(update, point, gradients)[0], strict=True)), torch.zeros(())
        )

    gradients = [g.requires_grad_() for g in gradients_of(5)]
    found = torch.autograd.grad(value(gradients), gradients)
    h = 1e-6
    for which, slope in enumerate(found):
        for index in range(slope.numel()):
            values = []
            for sign in (1, -1):
                moved = [g.detach().clone() for g in gradients]
                moved[which].view(-1)[index] += sign * h
                values.append(value(moved).item())
            difference = (values[0] - values[1]) / (2 * h)
            assert slope.reshape(-1)[index].item() == pytest.approx(difference, rel=1e-6, abs=2e-9)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_the_derivative_is_finite_where_the_average_of_the_squares_is_0(kind: Any) -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    optimizer = kind(parameters, lr=0.1, eps=1e-2)
    take_step(optimizer, parameters, [torch.tensor([0.0, 0.0, 1.0])])
    update = virtual_update(optimizer, parameters)
    gradient = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    moved, _ = predicted(update, [parameters[0].detach()], [gradient])
    (slope,) = torch.autograd.grad(moved[0].sum(), gradient)
    assert moved[0].isfinite().all()
    assert slope.isfinite().all()
    # The first has moved by nothing but its root: - lr / (1 - 0.9^2) * 0.1 / eps.
    assert slope[0].item() == pytest.approx(-0.1 / 0.19 * 0.1 / 1e-2, rel=1e-5)
    take_step(optimizer, parameters, [gradient.detach()])
    torch.testing.assert_close(moved[0].detach(), parameters[0].detach())


@pytest.mark.parametrize(
    ("build_it", "error", "sentence"),
    [
        (
            lambda p: torch.optim.RMSprop(p),
            TypeError,
            r"optimizer must be torch.optim.SGD, Adam or AdamW, got RMSprop; for a TorchOpt",
        ),
        (lambda p: torchopt.sgd(lr=0.1), TypeError, "optimizer must be torch.optim.SGD"),
        (lambda p: Adam(p, amsgrad=True), ValueError, "amsgrad of the optimizer must be False for a virtual step"),
        (lambda p: SGD(p, lr=0.1, maximize=True), ValueError, "maximize of the optimizer must be False for a virtual step"),
        (lambda p: SGD(p[:2], lr=0.1), ValueError, r"optimizer must be over every parameter of the model, .*\[2\]"),
    ],
)
def test_other_optimizers_are_refused(build_it: Any, error: Any, sentence: str) -> None:
    parameters = leaves()
    with pytest.raises(error, match="^" + sentence):
        virtual_update(build_it(parameters), parameters)


# Hypergradients -------------------------------------------------------------------------------------------------------

BATCH, BRANCHES = 5, 3


def classifier(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        middle = {"tanh": [nn.Tanh()], "relu": [nn.ReLU()], "batchnorm": [nn.BatchNorm1d(6), nn.Tanh()]}[kind]
        # No bias before BatchNorm: its gradient is rounding alone, and Adam blows that up.
        return nn.Sequential(nn.Linear(4, 6, bias=kind != "batchnorm"), *middle, nn.Linear(6, 3)).double()


class Setting(NamedTuple):
    """A model in training, its optimizer, three points per example, directions of the bounds, and meta-data."""

    model: Any
    optimizer: Any
    build: Callable[[Any], Any]
    x: Tensor
    y: Tensor
    directions: Tensor
    meta_x: Tensor
    meta_y: Tensor

    @property
    def parameters(self) -> Parameters:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def losses_of(self, call: Callable[[Tensor], Tensor], factors: Tensor | None = None) -> Tensor:
        """``[batch, branches]``: natural, and at two moved points; the middle one is a divergence."""
        factors = torch.ones(BATCH, dtype=torch.float64) if factors is None else factors
        moved = [self.x + per_example(factors, self.x) * d for d in self.directions]
        clean, against, favour = call(self.x), call(moved[0]), call(moved[1])
        divergence = F.kl_div(against.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="none").sum(1)
        crosses = [F.cross_entropy(logits, self.y, reduction="none") for logits in (clean, favour)]
        return torch.stack([crosses[0], 2 * divergence + crosses[0], crosses[1]], 1)

    def branch_losses(self, parameters: Parameters, factors: Tensor | None = None) -> Tensor:
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return self.losses_of(lambda x: functional_call(self.model, {**buffers, **parameters}, (x,)), factors)

    def meta_loss(self, parameters: Parameters) -> Tensor:
        modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        loss = F.cross_entropy(functional_call(self.model, parameters, (self.meta_x,)), self.meta_y)
        for module, training in modes:
            module.training = training
        return loss

    def update(self) -> VirtualUpdate:
        return virtual_update(self.optimizer, list(self.model.parameters()))

    def really(self, weights: Tensor, factors: Tensor | None = None, steps: int = 1) -> float:
        """The meta-loss after real steps of a copy of the model by a copy of its optimizer."""
        model = copy.deepcopy(self.model)
        optimizer = self.build(model.parameters())
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        buffers = [b.clone() for b in model.buffers()]
        for _ in range(steps):
            optimizer.zero_grad()
            ((weights * self.losses_of(model, factors)).sum() / BATCH).backward()
            optimizer.step()
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
        with torch.no_grad():
            return F.cross_entropy(model.eval()(self.meta_x), self.meta_y).item()


def setting(kind: str, optimizer: str | Callable[[Any], Any] = "sgd", *, warm: int = 2) -> Setting:
    model = classifier(kind)

    def builder(parameters: Any) -> Any:
        return build(optimizer, parameters) if isinstance(optimizer, str) else optimizer(parameters)

    inner = builder(model.parameters())
    x, y = randn(BATCH, 4, seed=1), torch.tensor([0, 1, 2, 0, 1])
    found = Setting(model, inner, builder, x, y, 0.3 * randn(2, BATCH, 4, seed=2), randn(7, 4, seed=3), torch.arange(7) % 3)
    for _ in range(warm):  # so that momentum, averages and statistics are not those of the start
        inner.zero_grad()
        found.losses_of(model).mean().backward()
        inner.step()
    inner.zero_grad()
    return found


def some_weights(name: str) -> Tensor:
    if name == "one_hot":
        return F.one_hot(torch.tensor([0, 1, 2, 1, 2]), BRANCHES).double()
    return randn(BATCH, BRANCHES, seed=4).softmax(1)


def central_differences(function: Callable[[Tensor], float], at: Tensor, h: float = 1e-5) -> Tensor:
    found = torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros(at.numel(), dtype=at.dtype)
        shift[index] = h
        shift = shift.reshape(at.shape)
        found.view(-1)[index] = (function(at + shift) - function(at - shift)) / (2 * h)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def derivative(of: Setting, weights: Tensor, **changes: Any) -> Hypergradient:
    arguments: dict[str, Any] = {"update": of.update()} | changes
    return hypergradient(of.branch_losses, of.meta_loss, of.parameters, weights, **arguments)


@pytest.mark.parametrize("weighting", ["soft", "one_hot"])
@pytest.mark.parametrize("kind", ["tanh", "relu", "batchnorm"])
@every_optimizer
def test_exact_hypergradients_agree_and_are_central_differences_of_real_steps(name: str, kind: str, weighting: str) -> None:
    of, weights = setting(kind, name), some_weights(weighting)
    forward, double = (derivative(of, weights, method=method) for method in ("jvp", "double_backward"))
    assert forward.weights_gradient.shape == weights.shape
    assert forward.bound_gradient is None
    assert relative(forward.weights_gradient, double.weights_gradient) < 1e-10
    expected = central_differences(of.really, weights)
    assert expected.abs().max() > 1e-5
    assert relative(double.weights_gradient, expected) < 1e-6
    for found in (forward, double):
        assert found.meta_loss.item() == pytest.approx(of.really(weights), rel=1e-12)
        assert of.meta_loss(found.parameters).item() == pytest.approx(of.really(weights), rel=1e-12)
        assert not any(t.requires_grad for t in (found.weights_gradient, found.meta_loss, *found.parameters.values()))


@pytest.mark.parametrize("kind", ["tanh", "batchnorm"])
@pytest.mark.parametrize("name", ["nesterov", "adam_weight_decay"])
def test_the_first_step_of_an_optimizer_counts_too(name: str, kind: str) -> None:
    of, weights = setting(kind, name, warm=0), some_weights("soft")
    expected = central_differences(of.really, weights)
    for method in ("jvp", "double_backward"):
        assert relative(derivative(of, weights, method=method).weights_gradient, expected) < 1e-6


@pytest.mark.parametrize("kind", ["tanh", "batchnorm"])
@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam_weight_decay", "adamw"])
def test_several_virtual_steps_are_central_differences_of_several_real_steps(name: str, kind: str) -> None:
    of, weights = setting(kind, name), some_weights("soft")
    found = derivative(of, weights, steps=3)
    assert found.meta_loss.item() == pytest.approx(of.really(weights, steps=3), rel=1e-12)
    assert relative(found.weights_gradient, central_differences(lambda w: of.really(w, steps=3), weights)) < 1e-6
    assert relative(found.weights_gradient, derivative(of, weights).weights_gradient) > 0.1


def with_rule(of: Setting, rule: Any) -> VirtualUpdate:
    return VirtualUpdate(rule, rule.init(tuple(of.parameters.values())))


def by_hand(of: Setting, rule: str, weights: Tensor, steps: int) -> float:
    """Steps of SGD with momentum, or of Adam with a term under the root, written out."""
    parameters = {name: p.clone().requires_grad_() for name, p in of.parameters.items()}
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = copy.deepcopy(first)
    for t in range(1, steps + 1):
        loss = (weights * of.branch_losses(parameters)).sum() / BATCH
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for (name, p), g in zip(list(parameters.items()), gradients, strict=True):
            if rule == "sgd":
                first[name] = 0.9 * first[name] + g
                move = 0.1 * first[name]
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.99 * second[name] + 0.01 * g * g
                root = (second[name] / (1 - 0.99**t) + 1e-4).sqrt() + 1e-6
                move = 0.05 * first[name] / (1 - 0.9**t) / root
            parameters[name] = (p - move).detach().requires_grad_()
    return of.meta_loss(parameters).item()


@pytest.mark.parametrize("kind", ["tanh", "batchnorm"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_unrolled_rules_of_torchopt_are_central_differences(name: str, kind: str) -> None:
    of, weights = setting(kind), some_weights("soft")
    rules = {
        "sgd": torchopt.sgd(lr=0.1, momentum=0.9),
        "adam": torchopt.adam(lr=0.05, betas=(0.9, 0.99), eps=1e-6, eps_root=1e-4),
    }
    found = derivative(of, weights, update=with_rule(of, rules[name]), steps=3)
    exact = name == "sgd"  # the bias correction of TorchOpt's Adam is of single precision
    assert found.meta_loss.item() == pytest.approx(by_hand(of, name, weights, 3), rel=1e-10 if exact else 1e-6)
    tolerance = 1e-6 if exact else 1e-5
    assert relative(found.weights_gradient, central_differences(lambda w: by_hand(of, name, w, 3), weights)) < tolerance
    one = [derivative(of, weights, update=with_rule(of, rules[name]), method=method) for method in ("jvp", "double_backward")]
    assert relative(one[0].weights_gradient, one[1].weights_gradient) < 1e-10


@pytest.mark.parametrize("steps", [1, 2])
def test_it_is_what_torchopts_module_optimizer_gives(steps: int) -> None:
    of, weights = setting("tanh"), some_weights("soft")
    model, leaf = copy.deepcopy(of.model), weights.clone().requires_grad_()
    optimizer = torchopt.MetaSGD(model, lr=0.1, momentum=0.9, weight_decay=0.05)
    for _ in range(steps):
        optimizer.step((leaf * of.losses_of(model)).sum() / BATCH)
    reached = F.cross_entropy(model(of.meta_x), of.meta_y)
    (expected,) = torch.autograd.grad(reached, leaf)
    rule = torchopt.sgd(lr=0.1, momentum=0.9, weight_decay=0.05)
    found = derivative(of, weights, update=with_rule(of, rule), steps=steps)
    assert found.meta_loss.item() == pytest.approx(reached.item(), rel=1e-12)
    assert relative(found.weights_gradient, expected) < 1e-10


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["tanh", "batchnorm"])
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_the_derivative_in_the_bounds_is_that_of_central_differences(name: str, kind: str, steps: int) -> None:
    of, weights = setting(kind, name), some_weights("soft")
    factors = (0.5 + rand(BATCH, seed=6)).requires_grad_()
    found = hypergradient(
        lambda p: of.branch_losses(p, factors),
        of.meta_loss,
        of.parameters,
        weights,
        update=of.update(),
        bound=factors,
        steps=steps,
    )
    expected = central_differences(lambda v: of.really(weights, v, steps), factors.detach())
    assert found.bound_gradient is not None
    assert relative(found.bound_gradient, expected) < 1e-6
    alone = central_differences(lambda w: of.really(w, factors.detach(), steps), weights)
    assert relative(found.weights_gradient, alone) < 1e-6
    assert factors.grad is None


@pytest.mark.parametrize("weighting", ["soft", "one_hot"])
@pytest.mark.parametrize("name", ["momentum", "adam_weight_decay"])
def test_finite_differences_come_close_on_a_network_of_relus(name: str, weighting: str) -> None:
    of, weights = setting("relu", name), some_weights(weighting)
    exact = derivative(of, weights, method="double_backward").weights_gradient
    assert relative(derivative(of, weights, method="jvp").weights_gradient, exact) < 1e-10
    assert relative(derivative(of, weights, method="finite_difference").weights_gradient, exact) < 0.05
    smooth = setting("tanh", name)
    exact = derivative(smooth, weights).weights_gradient
    assert relative(derivative(smooth, weights, method="finite_difference").weights_gradient, exact) < 1e-4
    closer = derivative(smooth, weights, method="finite_difference", relative_step=1e-4).weights_gradient
    assert relative(closer, exact) < 1e-6


@pytest.mark.parametrize("method", HYPERGRADIENTS)
@pytest.mark.parametrize("kind", ["tanh", "batchnorm"])
def test_nothing_but_the_answer_changes(kind: str, method: str) -> None:
    of, weights = setting(kind, "nesterov"), some_weights("soft")
    of.model[0].weight.grad = torch.ones_like(of.model[0].weight)
    state = {name: value.clone() for name, value in of.model.state_dict().items()}
    modes, kept = [m.training for m in of.model.modules()], weights.clone()
    optimizer, generator = copy.deepcopy(of.optimizer.state_dict()), torch.get_rng_state()
    found = []
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            found.append(derivative(of, weights, method=method))
    assert torch.equal(found[0].weights_gradient, found[1].weights_gradient)
    assert all(torch.equal(value, state[name]) for name, value in of.model.state_dict().items())
    assert modes == [m.training for m in of.model.modules()]
    assert torch.equal(of.model[0].weight.grad, torch.ones_like(of.model[0].weight))
    assert all(p.grad is None for name, p in of.model.named_parameters() if name != "0.weight")
    assert all(p.requires_grad for p in of.model.parameters())
    assert torch.equal(weights, kept)
    assert not weights.requires_grad
    for number, entries in of.optimizer.state_dict()["state"].items():
        assert torch.equal(entries["momentum_buffer"], optimizer["state"][number]["momentum_buffer"])
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("method", HYPERGRADIENTS)
def test_a_meta_loss_that_training_does_not_reach_has_the_derivative_0(method: str) -> None:
    parameters = {"used": torch.tensor(2.0), "unused": torch.tensor(1.0)}
    rule = torchopt.sgd(lr=0.1)
    found = hypergradient(
        lambda p: (p["used"] * torch.arange(4.0))[:, None],
        lambda p: p["unused"] ** 2,
        parameters,
        torch.ones(4, 1),
        update=VirtualUpdate(rule, rule.init(tuple(parameters.values()))),
        method=method,
    )
    assert torch.equal(found.weights_gradient, torch.zeros(4, 1))
    assert found.parameters["unused"] == 1
    assert found.parameters["used"].item() == pytest.approx(2 - 0.1 * 1.5)


def test_bad_calls_of_the_hypergradient_end_in_one_sentence() -> None:
    of, weights, factors = setting("tanh"), some_weights("soft"), torch.ones(BATCH, requires_grad=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "implicit"}, "method must be one of 'jvp', 'double_backward', 'finite_difference', got 'implicit'"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"steps": 2, "method": "jvp"}, r"steps must be 1 for method='jvp', got 2; write method='double_backward'"),
        ({"steps": 2, "method": "finite_difference"}, "steps must be 1 for method='finite_difference'"),
        ({"bound": factors, "method": "jvp"}, "bound must be None for method='jvp'"),
        ({"bound": factors, "method": "finite_difference"}, "bound must be None for method='finite_difference'"),
        ({"bound": factors.detach()}, "bound must be a leaf that requires a gradient, got one without"),
        ({"bound": 2 * factors}, "bound must be a leaf that requires a gradient"),
        ({"relative_step": 0.0}, "relative_step must be a finite number > 0"),
    ]
    for changes, sentence in cases:
        with pytest.raises(ValueError, match="^" + sentence):
            derivative(of, weights, **changes)
    with pytest.raises(ValueError, match=r"^branch_losses must be of shape \[5, 2\], as the weights, got \[5, 3\]"):
        derivative(of, weights[:, :2])
    for meta_loss, got in ((lambda p: p["0.bias"], r"shape \[6\]"), (lambda p: torch.zeros(()), "a constant")):
        with pytest.raises(ValueError, match="^meta_loss must be a function to a scalar .*, got " + got):
            hypergradient(of.branch_losses, meta_loss, of.parameters, weights, update=of.update())


# Steps of the network -------------------------------------------------------------------------------------------------


def network_of(seed: int = 0, **changes: Any) -> WeightingNetwork:
    branches = ("natural", "adversary", "anti_adversary")
    found = WeightingNetwork(branches=branches, hidden=5, favoured=0.4, generator=seeded(seed), **changes).double()
    with torch.no_grad():
        found.layers[-1].weight.mul_(50)  # so that the weights differ from example to example
    found.observe(randn(50, 6, seed=7))
    return found


def meta_step(of: Setting, network: WeightingNetwork, optimizer: Any, factors: Tensor | None = None, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"update": of.update(), "bound": factors} | changes
    return meta_weighted_step(
        network, optimizer, known(), lambda p: of.branch_losses(p, factors), of.meta_loss, of.parameters, **arguments
    )


def known() -> Tensor:
    return randn(BATCH, 6, seed=8)


def flattened(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def moved_network(network: WeightingNetwork, shift: Tensor) -> WeightingNetwork:
    found = copy.deepcopy(network)
    nn.utils.vector_to_parameters(flattened(network) + shift, found.parameters())
    return found


@pytest.mark.parametrize("with_bound", [False, True])
@pytest.mark.parametrize(("method", "steps"), [("double_backward", 1), ("double_backward", 2), ("jvp", 1)])
def test_the_network_goes_down_the_gradient_of_the_meta_loss(method: str, steps: int, with_bound: bool) -> None:
    if with_bound and method == "jvp":
        return
    of, network = setting("batchnorm", "nesterov"), network_of(bound_range=(0.5, 2.0) if with_bound else None)
    before = copy.deepcopy(network)
    weighting = network(known())
    factors = weighting.bound.detach().requires_grad_() if with_bound else None
    found = meta_step(of, network, SGD(network.parameters(), lr=1.0), factors, hypergradient=method, steps=steps)
    gradient = flattened(before) - flattened(network)

    def reached(shift: Tensor) -> float:
        there = moved_network(before, shift)(known())
        return of.really(there.weights.detach(), there.bound.detach() if with_bound else None, steps)

    h, generator = 1e-5, seeded(9)
    directions = [torch.randn(len(gradient), generator=generator, dtype=torch.float64) for _ in range(3)]
    directions += [F.one_hot(torch.tensor(index), len(gradient)).double() for index in (0, len(gradient) - 1, len(gradient) - 20)]
    for direction in directions:
        difference = (reached(h * direction) - reached(-h * direction)) / (2 * h)
        assert (gradient @ direction).item() == pytest.approx(difference, rel=1e-5, abs=1e-9)
    assert found.norm == pytest.approx(gradient.norm().item(), rel=1e-10)
    assert found.meta_loss == pytest.approx(reached(torch.zeros_like(gradient)), rel=1e-10)
    assert torch.equal(found.weighting.weights, weighting.weights)
    assert not found.weighting.weights.requires_grad
    assert (found.bound_gradient is not None) == with_bound
    assert all(p.grad is None for p in network.parameters())


def test_a_hard_step_is_straight_through() -> None:
    of, network = setting("tanh", "momentum"), network_of()
    before = copy.deepcopy(network)
    soft = before(known()).weights
    one_hot = F.one_hot(soft.argmax(1), BRANCHES).double()
    assert len(one_hot.argmax(1).unique()) > 1
    found = meta_step(of, network, SGD(network.parameters(), lr=1.0), hard=True)
    assert torch.equal(found.weighting.weights, one_hot)
    assert found.meta_loss == pytest.approx(of.really(one_hot), rel=1e-12)
    expected = derivative(of, one_hot)
    assert torch.equal(found.weights_gradient, expected.weights_gradient)
    assert all(torch.equal(found.parameters[name], p) for name, p in expected.parameters.items())
    gradients = torch.autograd.grad((expected.weights_gradient * soft).sum(), list(before.parameters()))
    torch.testing.assert_close(flattened(before) - flattened(network), torch.cat([g.flatten() for g in gradients]))


def test_one_branch_alone_is_routed_from_one_half_on() -> None:
    network = WeightingNetwork(branches=("adversary",), inputs=1, favoured=0.5, generator=seeded()).double()
    x = randn(8, seed=3)
    network.observe(x[:, None])
    soft = network(x[:, None]).weights
    rule, parameters = torchopt.sgd(lr=0.1), {"w": torch.tensor(0.5, dtype=torch.float64)}
    update = VirtualUpdate(rule, rule.init(tuple(parameters.values())))
    step = meta_weighted_step(
        network, SGD(network.parameters(), lr=0.1), x[:, None], lambda p: (p["w"] * x)[:, None], lambda p: p["w"] ** 2,
        parameters, update=update, hard=True,
    )  # fmt: skip
    assert torch.equal(step.weighting.weights, (soft >= 0.5).double())
    assert 0 < step.weighting.weights.sum() < 8


@pytest.mark.parametrize("clip", [1e-5, 1e3])
def test_the_gradient_of_the_network_is_clipped(clip: float) -> None:
    of, free, clipped = setting("tanh"), network_of(), network_of()
    start = flattened(free)
    one = meta_step(of, free, SGD(free.parameters(), lr=1.0))
    other = meta_step(of, clipped, SGD(clipped.parameters(), lr=1.0), clip_norm=clip)
    assert one.norm == other.norm
    assert 1e-4 < one.norm < 1e2
    whole, part = start - flattened(free), start - flattened(clipped)
    torch.testing.assert_close(part, whole * min(1.0, clip / one.norm), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("broken", ["meta_loss", "branch_losses"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(broken: str, clip: float | None) -> None:
    of, network = setting("tanh"), network_of()
    optimizer = Adam(network.parameters(), lr=1e-2)
    meta_step(of, network, optimizer)
    state, before = copy.deepcopy(optimizer.state_dict()), flattened(network)
    functions: dict[str, Any] = {"meta_loss": of.meta_loss, "branch_losses": of.branch_losses}
    healthy = functions[broken]
    functions[broken] = lambda p: healthy(p) * (p["0.bias"].sum() * float("inf"))
    with pytest.raises(FloatingPointError, match="the meta-gradient must be finite, got norm .*; lower the learning rate"):
        meta_weighted_step(
            network, optimizer, known(), functions["branch_losses"], functions["meta_loss"], of.parameters, update=of.update(),
            clip_norm=clip,
        )  # fmt: skip
    assert torch.equal(flattened(network), before)
    assert all(p.grad is None for p in network.parameters())
    for number, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][number][name]) for name, value in entries.items())


def test_a_bound_belongs_to_a_network_with_this_output() -> None:
    of, factors = setting("tanh"), torch.ones(BATCH, dtype=torch.float64, requires_grad=True)
    sentence = "bound must be given for a network with bound_range, and for no other, got "
    for network, bound, got in ((network_of(), factors, "a tensor"), (network_of(bound_range=(0.5, 2.0)), None, "None")):
        with pytest.raises(ValueError, match=sentence + got):
            meta_step(of, network, SGD(network.parameters(), lr=1.0), bound)
    with pytest.raises(ValueError, match="clip_norm must be a finite number > 0"):
        meta_step(of, network_of(), SGD(network_of().parameters(), lr=1.0), clip_norm=0.0)


def test_meta_steps_take_the_weight_from_wrong_labels() -> None:
    """Half of the labels are wrong, and the one characteristic says which."""
    x = randn(40, 3, seed=1)
    right, wrong = (x[:, 0] > 0).double(), (torch.arange(40) % 2).double()
    labels = torch.where(wrong > 0, 1 - right, right)
    network = WeightingNetwork(branches=("adversary",), inputs=1, favoured=0.5, generator=seeded()).double()
    network.observe(wrong[:, None])
    optimizer, parameters = Adam(network.parameters(), lr=0.05), {"w": torch.zeros(3, dtype=torch.float64)}
    rule = torchopt.sgd(lr=1.0)

    def loss(p: Parameters, rows: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(rows @ p["w"], y, reduction="none")

    meta_x = randn(20, 3, seed=2)
    meta_y, told = (meta_x[:, 0] > 0).double(), []
    for _ in range(20):
        step = meta_weighted_step(
            network, optimizer, wrong[:, None], lambda p: loss(p, x, labels)[:, None], lambda p: loss(p, meta_x, meta_y).mean(),
            parameters, update=VirtualUpdate(rule, rule.init(tuple(parameters.values()))),
        )  # fmt: skip
        told.append(step.meta_loss)
    weights = network(wrong[:, None]).weights.detach()[:, 0]
    assert weights[wrong == 0].min() > 0.8
    assert weights[wrong == 1].max() < 0.2
    assert told[-1] < told[0] - 0.05

"""The interpretable update rule: its formula, its limits, and gradients in its coefficients."""

import math

import pytest
import torch
import torchopt
from torch import Tensor, nn

from metarobust.meta_optimizers import ROLES, InterpretableOptimizer, combine_factors, gradients_only
from metarobust.meta_optimizers._interpretable import LOG_SPEED, TERMS
from metarobust.types import Streams


def rule_with(seed: int, *, size: float = 0.2, **settings: object) -> InterpretableOptimizer:
    """A rule in float64 whose stored coefficients are random."""
    rule = InterpretableOptimizer(**settings).double()  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(size * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return rule


def silence(rule: InterpretableOptimizer, *terms: str) -> None:
    with torch.no_grad():
        for term in terms:
            rule.initial[TERMS.index(term)] = -math.inf


SHAPES = ((4, 3), (4,), (5, 4), (2, 5))
NAMES = ("first dense", "bias", "inner dense", "last dense")
FAN_IN = (3, 3, 4, 5)


def start() -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES)


def streams(params: tuple[Tensor, ...], step: int) -> Streams:
    g = tuple(torch.sin(params[0].mean() + step + (i + 1) * p) for i, p in enumerate(params))
    return Streams(g, tuple(torch.cos(3 * p + step) for p in params))


def test_two_steps_of_every_tensor_by_hand() -> None:
    """The formula of the docstring, term by term, written with the coefficients that the rule tells of itself."""
    rule, params = rule_with(0), start()
    transformation = rule.as_gradient_transformation(total_steps=3)
    state = transformation.init(params)
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    for step in (1, 2):
        found = streams(params, step)
        moves, state = transformation.update(found, state, params=params)
        for i, (p, g, h) in enumerate(zip(params, *found, strict=True)):
            told = rule.coefficients(role=NAMES[i], fan_in=FAN_IN[i], time=(step - 1) / 2)
            u = g + told["factor"] * h
            m[i], v[i] = 0.9 * m[i] + 0.1 * u, 0.999 * v[i] + 0.001 * u * u
            mean, second = m[i] / (1 - 0.9**step), v[i] / (1 - 0.999**step)
            expected = told["adam"] * mean / (second.sqrt() + 1e-8) + told["momentum"] * mean
            reach = 10 * math.sqrt(FAN_IN[i])
            expected = expected + told["l2"] * p + told["l1"] * reach * p / (1 + reach * p.abs())
            torch.testing.assert_close(moves[i], -expected, rtol=1e-6, atol=1e-12)
        params = tuple(p + move.detach() for p, move in zip(params, moves, strict=True))


@pytest.mark.parametrize("offsets", [(0.0, 0.0), (1.7, 0.4)])
def test_without_its_other_terms_it_is_adam_on_the_combined_stream(offsets: tuple[float, float]) -> None:
    rule = InterpretableOptimizer(initial_learning_rate=1e-2).double()
    silence(rule, "momentum", "l2", "l1")
    rule.shift_factor_coefficients(first=offsets[0], others=offsets[1])
    weights = (start()[0], start()[2])  # no bias: `combine_factors` has a coefficient for it, whose h is zero in practice
    reference = tuple(p.clone().requires_grad_() for p in weights)
    adam = torch.optim.Adam(reference, lr=1e-2)
    combine = combine_factors(first=offsets[0], others=offsets[1])
    transformation = rule.as_gradient_transformation(total_steps=20)
    params, state = weights, transformation.init(weights)
    for step in range(20):
        found = streams(params, step)
        moves, state = transformation.update(found, state, params=params)
        params = tuple(p + move.detach() for p, move in zip(params, moves, strict=True))
        for p, combined in zip(reference, combine.update(found, ())[0], strict=True):
            p.grad = combined
        adam.step()
    for p, r, s in zip(params, reference, weights, strict=True):
        torch.testing.assert_close(p - s, (r - s).detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("source", ["gradient", "gradient+perturbed_factors"])
def test_gradients_in_the_coefficients_against_central_differences(source: str) -> None:
    """Through three steps, whose gradients depend on where the steps before have led."""
    rule = rule_with(1, gradient_source=source)
    with torch.no_grad():
        rule.fall.abs_()  # a negative one counts as zero

    def final() -> Tensor:
        chain = rule.as_gradient_transformation(total_steps=4)
        chain = chain if rule.two_streams else torchopt.chain(gradients_only(), chain)
        params, state = start(), chain.init(start())
        for step in range(3):
            moves, state = chain.update(streams(params, step), state, params=params, inplace=False)
            params = tuple(p + 30 * move for p, move in zip(params, moves, strict=True))
        return sum((p.sin().sum() for p in params), torch.zeros((), dtype=torch.float64))

    # The tensors have no normalisation, on which alone its factor acts.
    stored = [p for name, p in rule.named_parameters() if name != "normalised_factor"]
    gradients = torch.autograd.grad(final(), stored)
    draw = torch.Generator().manual_seed(5)
    for p, gradient in zip(stored, gradients, strict=True):
        direction = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        values = []
        for side in (1e-6, -1e-6):
            with torch.no_grad():
                p.add_(side * direction)
                values.append(final().item())
                p.sub_(side * direction)
        slope = (gradient * direction).sum().item()
        assert abs(slope) > 1e-4
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_the_learning_rate_falls_by_a_power_of_the_time_that_is_left() -> None:
    rule = InterpretableOptimizer(gradient_source="gradient")
    at = lambda time: rule.coefficients(role="inner dense", fan_in=64, time=time)  # noqa: E731
    rule.turn({"learning rate, fall": 2.0})
    for time in (0.0, 0.25, 0.5, 1.0):
        assert at(time)["adam"] == pytest.approx(3e-3 * (1 - time) ** 2, rel=1e-4)
        assert at(time)["l2"] == pytest.approx(1e-6)
    weight = nn.Parameter(torch.ones(3))
    optimizer = rule.torch_optimizer([weight], total_steps=5)
    sizes = []
    for _ in range(8):
        before, weight.grad = weight.detach().clone(), torch.full((3,), 0.001)
        optimizer.step()
        sizes.append((before - weight.detach()).max().item())
    assert sizes[:5] == pytest.approx([3e-3 * (1 - k / 4) ** 2 for k in range(5)], abs=2e-5)
    assert max(sizes[5:]) < 2e-5, "after the planned steps it stands still, but for the small terms"
    rule.turn({"learning rate, fall": -5.0})
    assert at(0.5)["adam"] == pytest.approx(3e-3), "a negative power counts as none"


def test_a_model_of_another_precision_takes_the_same_steps() -> None:
    """Half precision goes through the rule's own: same path as rounding the parameters after each step."""
    rule = rule_with(4, gradient_source="gradient").float()
    half = nn.Linear(4, 3).to(torch.bfloat16)
    full = [p.detach().float() for p in half.parameters()]
    optimizer = rule.torch_optimizer(half.parameters(), total_steps=6)
    twin = rule.torch_optimizer([p.requires_grad_() for p in full], total_steps=6)
    for step in range(3):
        for p, q in zip(half.parameters(), full, strict=True):
            p.grad = torch.sin(q.detach() + step).to(torch.bfloat16)
            q.grad = p.grad.float()
        optimizer.step()
        twin.step()
        with torch.no_grad():
            for p, q in zip(half.parameters(), full, strict=True):
                torch.testing.assert_close(p.float(), q.detach(), rtol=1e-2, atol=1e-2)
                q.copy_(p.float())


def test_coefficients_are_log_linear_in_time_and_in_fan_in() -> None:
    rule = rule_with(2)
    for role in ROLES:
        told = [rule.coefficients(role=role, fan_in=9, time=time) for time in (0.0, 0.25, 0.5, 1.0)]
        for number, term in enumerate(TERMS):
            logs = [math.log(at[term]) for at in told]
            slope = 2 * LOG_SPEED * rule.log_coefficient[number, ROLES.index(role), 1].item()
            assert logs[1] - logs[0] == pytest.approx(slope / 4, abs=1e-5)
            assert logs[3] - logs[0] == pytest.approx(slope, abs=1e-5)
            wider = rule.coefficients(role=role, fan_in=36, time=0.25)[term]
            assert math.log(wider) - logs[1] == pytest.approx(rule.fan_in_power[number].item() * math.log(4), abs=1e-5)
    after = rule.coefficients(role="bias", fan_in=4, time=7.0)
    assert after == rule.coefficients(role="bias", fan_in=4, time=1.0), "time is clipped at the end"


def test_the_table_has_every_role_and_term() -> None:
    rule = InterpretableOptimizer()
    rule.shift_factor_coefficients(first=1.5, others=0.25)
    lines = rule.table().splitlines()
    assert lines[0] == "| role | adam | momentum | l2 | l1 | factor |"
    assert [line.split("|")[1].strip() for line in lines[2:-2]] == list(ROLES)
    assert lines[-1] == "In networks with normalisation, factors are multiplied by 1."
    cells = [cell.strip() for cell in lines[2].split("|")[2:-1]]
    assert cells[0] == "0.003, 0.003, 0.003"
    assert cells[-1] == "1.5, 1.5, 1.5"
    assert "factor" not in InterpretableOptimizer(gradient_source="gradient").table()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"gradient_source": "both"}, "gradient_source must be one of"),
        ({"initial_learning_rate": 0.0}, "initial_learning_rate must be a finite number > 0"),
    ],
)
def test_bad_settings(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        InterpretableOptimizer(**arguments)  # type: ignore[arg-type]


def test_bad_questions() -> None:
    rule = InterpretableOptimizer(gradient_source="gradient")
    with pytest.raises(ValueError, match="role must be one of 'first dense'"):
        rule.coefficients(role="dense", fan_in=3, time=0.0)
    with pytest.raises(ValueError, match="fan_in must be an integer >= 1"):
        rule.coefficients(role="bias", fan_in=0, time=0.0)
    with pytest.raises(ValueError, match="time must be a finite number >= 0"):
        rule.coefficients(role="bias", fan_in=1, time=-1.0)
    with pytest.raises(ValueError, match="gradient_source must be one with a second stream"):
        rule.shift_factor_coefficients(first=1.0, others=1.0)


def test_a_file_from_before_the_learning_rate_could_fall_is_the_same_rule() -> None:
    rule = rule_with(2)
    older = {name: p for name, p in rule.state_dict().items() if name != "fall"}
    found = InterpretableOptimizer().double()
    found.load_state_dict(older)
    assert found.fall.item() == 0.0
    assert torch.equal(found.log_coefficient, rule.log_coefficient)

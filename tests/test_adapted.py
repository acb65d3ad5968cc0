"""Attacks of other libraries behind this one's interface."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust.attacks import PGD, Adapted, WorstCase, count_calls
from metarobust.evaluation import evaluate
from metarobust.models import cnn
from metarobust.objectives import AdversarialTraining
from metarobust.threat_models import ThreatModel

BALL = ThreatModel(norm="linf", epsilon=0.1)


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 8, 8, generator=draw), torch.randint(10, (12,), generator=draw)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(cnn([3, 4]), nn.BatchNorm1d(10))


def careless(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What a library may do: change the mode, fill the gradients of parameters, draw from the global generator."""
    assert not model.training
    x_adv = (x + 0.05 * torch.randn_like(x).sign()).clamp(0, 1).requires_grad_()
    model.train()
    F.cross_entropy(model(x_adv), y).backward()
    assert x_adv.grad is not None
    return (x + 0.1 * x_adv.grad.sign()).clamp(0, 1)


def test_the_model_is_left_as_it_was_and_noise_comes_from_the_generator() -> None:
    model, (x, y) = network().train(), batch()
    model(x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attack = Adapted(threat_model=BALL, find=careless)
    before = torch.get_rng_state()
    with count_calls() as counter:
        first = attack(model, x, y, generator=torch.Generator().manual_seed(1))
        second = attack(model, x, y, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert (counter.calls, counter.examples) == (2, 24)
    assert torch.equal(first, second)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True) if p.grad is not None)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert not first.requires_grad
    assert BALL.contains(first, x, tolerance=1e-6).all()


def test_any_callable_is_a_module_to_it() -> None:
    model, (x, y) = network().eval(), batch()

    def find(module: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
        assert next(module.parameters()).device == points.device
        return (points + 0.1 * (module(points).sum() > -1e9)).clamp(0, 1)

    moved = Adapted(threat_model=BALL, find=find)(lambda v: model(v), x, y)
    torch.testing.assert_close(moved, (x + 0.1).clamp(0, 1))


def test_it_goes_where_an_attack_goes() -> None:
    model, (x, y) = network().eval(), batch()
    attack = Adapted(threat_model=BALL, find=careless)
    losses = AdversarialTraining(attack=attack)(model, x, y, generator=torch.Generator().manual_seed(0))
    assert losses.shape == (12,)
    worst = WorstCase((attack, PGD(threat_model=BALL, steps=2)))(model, x, y, generator=torch.Generator().manual_seed(0))
    assert BALL.contains(worst, x).all()
    assert len(Adapted(threat_model=BALL, find=careless)(model, x[:0], y[:0])) == 0
    report = evaluate(model, (x, y), threat_model=BALL, protocol="quick", reliability_checks=False)
    assert 0 <= report.worst_case_accuracy <= 1


@pytest.mark.parametrize(
    ("find", "sentence"),
    [
        (lambda model, x, y: x + 0.2, r"stays inside ThreatModel\(.*, got .* beyond it; give it the same norm and epsilon"),
        (lambda model, x, y: x - 0.1, "beyond it"),
        (lambda model, x, y: x[:3], "a function that returns .12, 1, 8, 8."),
        (lambda model, x, y: x * torch.nan, "finite values"),
    ],
)
def test_what_comes_back_is_checked(find: Any, sentence: str) -> None:
    model, (x, y) = network().eval(), batch()
    with pytest.raises(ValueError, match=sentence):
        Adapted(threat_model=BALL, find=find)(model, x, y)


def test_what_is_no_attack() -> None:
    model, (x, y) = network().eval(), batch()
    with pytest.raises(TypeError, match="returns the moved examples"):
        Adapted(threat_model=BALL, find=lambda model, x, y: None)(model, x, y)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="a function of model, x and y"):
        Adapted(threat_model=BALL, find=PGD)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["PGD", "FGSM", "MIFGSM", "APGD"])
def test_torchattacks(name: str) -> None:
    """As strong as it is by itself, and next to this library's own PGD where it is the same attack."""
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = network().eval(), batch()
    y = model(x).argmax(1)
    options = {"eps": 0.1} | ({"alpha": 0.025, "steps": 10, "random_start": False} if name == "PGD" else {})
    attack = Adapted(threat_model=BALL, find=lambda module, v, w: getattr(torchattacks, name)(module, **options)(v, w))
    moved = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert F.cross_entropy(model(moved), y) > F.cross_entropy(model(x), y)
    if name == "PGD":
        own = PGD(threat_model=BALL, steps=10, step_size=0.025, random_start=False)(model, x, y)
        torch.testing.assert_close(moved, own, rtol=0, atol=1e-5)

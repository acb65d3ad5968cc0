"""``fit`` with learned optimizers that read a second stream: the update axis, with any attack and weighting."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust._randomness import generator_for
from metarobust.attacks import BETA, PGD
from metarobust.divergences import KL
from metarobust.meta_optimizers import InterpretableOptimizer, LSTMOptimizer
from metarobust.models import mlp
from metarobust.objectives import ARMOR, MART, TRADES, AdversarialTraining, ClassWeighted, LogitAdjusted
from metarobust.threat_models import ThreatModel
from metarobust.training import fit

BALL = ThreatModel(norm="linf", epsilon=0.1)
SOURCES = ("gradient+perturbed_factors", "gradient+adversarial_estimate", "gradient+adversarial_tangent")
ATTACK = PGD(threat_model=BALL, steps=2)


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(24, 1, 4, 4, generator=draw), torch.randint(3, (24,), generator=draw)


def network() -> nn.Module:
    torch.manual_seed(0)
    return mlp([16, 6, 3])


def rule_of(kind: Any, source: str) -> Any:
    torch.manual_seed(1)
    rule = kind(gradient_source=source)
    rule.shift_factor_coefficients(first=1.0, others=0.5)
    return rule


def trained(rule: Any, objective: Any, *, epochs: int = 2, **options: Any) -> list[Tensor]:
    model = network()
    optimizer = rule.torch_optimizer(model.parameters(), total_steps=6, threat_model=BALL)
    fit(model, objective, data(), optimizer=optimizer, epochs=epochs, batch_size=8, silent=True, **options)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", [InterpretableOptimizer, LSTMOptimizer])
def test_a_step_is_that_of_a_loop_of_ones_own(kind: Any, source: str) -> None:
    """Attack, then the streams of the cross-entropy at its examples, which alone are watched."""
    rule, (x, y) = rule_of(kind, source), data()
    model = network()
    optimizer = rule.torch_optimizer(model.parameters(), total_steps=6, threat_model=BALL)
    objective = AdversarialTraining(attack=ATTACK)
    fit(model, objective, (x, y), optimizer=optimizer, epochs=1, batch_size=24, silent=True, seed=3)
    own = network()
    generator = generator_for(3, "training noise 0", 0)
    torch.randint(2**62, (), generator=generator)  # the seed of dropout
    rows = torch.randperm(24, generator=generator_for(3, "training order", 0))
    optimizer = rule.torch_optimizer(own.parameters(), total_steps=6)
    own.train()
    x_adv = ATTACK(own, x[rows], y[rows], generator=generator)
    with optimizer.record_factors(own, threat_model=BALL, generator=generator) as recorder:
        recorder.backward(F.cross_entropy(own(x_adv), y[rows]))
    optimizer.step()
    for a, b in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert not torch.equal(next(model.parameters()), next(network().parameters()))


@pytest.mark.parametrize("kind", [InterpretableOptimizer, LSTMOptimizer])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(kind: Any, tmp_path: Path) -> None:
    rule = rule_of(kind, "gradient+adversarial_tangent")
    objective = ARMOR(robust_loss=AdversarialTraining(attack=ATTACK), divergence=KL(), radius=0.1)
    whole = trained(rule, objective)
    path = tmp_path / "training.safetensors"

    def stop(record: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(rule, objective, checkpoint=path, on_epoch=stop)
    resumed = trained(rule, objective, checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    other = copy.deepcopy(rule)
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="rule"):
        trained(other, objective, checkpoint=path)


def test_another_attack_and_precision() -> None:
    rule = rule_of(InterpretableOptimizer, "gradient+adversarial_tangent")
    plain = trained(rule, AdversarialTraining(attack=ATTACK))
    for objective, options in (
        (AdversarialTraining(attack=BETA(threat_model=BALL, steps=2)), {}),
        (AdversarialTraining(attack=PGD(threat_model=ThreatModel(epsilon=0.0))), {}),
        (AdversarialTraining(attack=ATTACK), {"clip_norm": 0.01}),
        (AdversarialTraining(attack=ATTACK), {"amp": "bfloat16"}),
    ):
        found = trained(rule, objective, **options)
        assert all(p.isfinite().all() for p in found)
        assert not all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_what_does_not_fit_together_is_a_sentence() -> None:
    rule, apart = rule_of(InterpretableOptimizer, SOURCES[2]), rule_of(LSTMOptimizer, SOURCES[2])
    for objective in (TRADES(threat_model=BALL, steps=1), MART(attack=ATTACK)):
        with pytest.raises(ValueError, match="for training.fit take an objective that calls it once"):
            trained(rule, objective)
    with pytest.raises(ValueError, match="leave it out: the rule clamps its updates"):
        trained(apart, AdversarialTraining(attack=ATTACK), clip_norm=1.0)
    adjusted = LogitAdjusted(robust_loss=AdversarialTraining(attack=ATTACK), class_counts=(5, 5, 5))
    for objective in (adjusted, ClassWeighted(robust_loss=adjusted, class_weights=(1.0, 1.0, 1.0))):
        with pytest.raises(ValueError, match="of the model's own logits for 'gradient.adversarial_tangent', got one of adjusted"):
            trained(rule, objective)
    assert all(p.isfinite().all() for p in trained(rule_of(InterpretableOptimizer, "gradient+perturbed_factors"), adjusted))
    model = network()
    optimizer = rule.torch_optimizer(model.parameters(), total_steps=6)
    with pytest.raises(ValueError, match=r"threat_model=ThreatModel\(...\)"):
        fit(model, AdversarialTraining(attack=ATTACK), data(), optimizer=optimizer, epochs=1, silent=True)
    with pytest.raises(TypeError, match="a ThreatModel or None"):
        rule.torch_optimizer(model.parameters(), total_steps=6, threat_model=0.1)

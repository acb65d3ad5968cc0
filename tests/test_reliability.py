"""Reliability checks: each fires on a case built to show it, and none on sound models."""

import copy
import math
import re
from collections.abc import Callable
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust.attacks import APGD, BETA, PGD, WorstCase
from metarobust.data import digits_pools
from metarobust.evaluation._reliability import Doubt, modules_behind, percent, spread_rows
from metarobust.evaluation._reliability_model import class_doubts, model_doubts
from metarobust.evaluation._reliability_results import covering_radius, epsilon_curve, result_doubts, step_losses
from metarobust.models import cnn, mlp
from metarobust.threat_models import ThreatModel

ROOT = Path(__file__).resolve().parent.parent
LINF = ThreatModel(norm="linf", epsilon=0.1)
L2 = ThreatModel(norm="l2", epsilon=0.5)
L1 = ThreatModel(norm="l1", epsilon=2.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def before_attacks(model: Any, x: Tensor, y: Tensor, threat_model: ThreatModel = LINF, **more: Any) -> dict[str, Doubt]:
    doubts = model_doubts(model, x, y, threat_model=threat_model, generator=seeded(), **more)
    named = {doubt.check: doubt for doubt in doubts}
    assert len(named) == len(doubts), "one doubt per check"
    return named


def after_attacks(model: Any, x: Tensor, y: Tensor, threat_model: ThreatModel = LINF) -> dict[str, Doubt]:
    curve = epsilon_curve(model, x, y, threat_model=threat_model, generator=seeded())
    losses = step_losses(model, x, y, threat_model=threat_model, generator=seeded())
    predicted = model(x).argmax(1)
    doubts = result_doubts(
        threat_model=threat_model,
        correct=predicted == y,
        predicted=predicted,
        broken_by={},
        curve=curve,
        curve_examples=len(x),
        losses=losses,
        classes=model(x).shape[1],
    )
    return {doubt.check: doubt for doubt in doubts}


# ------------------------------------------------------------------------------------------------------------- sound models


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pools = digits_pools()
    return pools.meta_train.images, pools.meta_train.labels, pools.test.images[:100], pools.test.labels[:100]


def with_batchnorm() -> nn.Sequential:
    features = (nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
    return nn.Sequential(*features, nn.Linear(128, 10))


ARCHITECTURES: dict[str, Callable[[], nn.Sequential]] = {
    "mlp": partial(mlp, [64, 48, 10]),
    "cnn": partial(cnn, [6, 12]),
    "batchnorm": with_batchnorm,
    "gelu": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 10)),
}


@cache
def trained(architecture: str, against: ThreatModel | None = None, epochs: int = 12) -> nn.Sequential:
    """A digit classifier, in evaluation mode; ``against`` names the ball of adversarial training."""
    torch.manual_seed(0)
    model, order = ARCHITECTURES[architecture](), seeded()
    attack = None if against is None else PGD(threat_model=against, steps=2)
    parameters = list(model.parameters())
    speeds = [torch.zeros_like(p) for p in parameters]
    images, labels, *_ = digits()
    for rows in (rows for _ in range(epochs) for rows in torch.randperm(len(images), generator=order).split(100)):
        x, y = images[rows], labels[rows]
        moved = x if attack is None else attack(model.eval(), x, y, generator=order)
        gradients = torch.autograd.grad(F.cross_entropy(model.train()(moved), y), parameters)
        with torch.no_grad():  # momentum by hand: importing an optimizer takes longer than the training
            for parameter, speed, gradient in zip(parameters, speeds, gradients, strict=True):
                parameter -= 0.1 * speed.mul_(0.9).add_(gradient)
    return model.eval()


def in_bfloat16(model: nn.Module) -> Callable[[Tensor], Tensor]:
    half = copy.deepcopy(model).bfloat16()
    return lambda x: half(x.bfloat16()).float()


def eight_bit(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Rounds its input to 8-bit images and passes the gradient straight through: finer than any step that counts."""
    return lambda x: model(x + ((255 * x).round() / 255 - x).detach())


SOUND: dict[str, tuple[Callable[[], Any], ThreatModel]] = {
    "mlp linf": (lambda: trained("mlp"), LINF),
    "mlp small linf": (lambda: trained("mlp"), ThreatModel(epsilon=1 / 255)),
    "mlp l2": (lambda: trained("mlp"), L2),
    "mlp l1": (lambda: trained("mlp"), L1),
    "mlp trained long": (lambda: trained("mlp", epochs=60), LINF),
    "mlp adversarial linf": (lambda: trained("mlp", LINF), LINF),
    "mlp adversarial l2": (lambda: trained("mlp", L2), L2),
    "mlp adversarial l1": (lambda: trained("mlp", L1), L1),
    "cnn linf": (lambda: trained("cnn"), LINF),
    "cnn adversarial linf": (lambda: trained("cnn", LINF), LINF),
    "batchnorm linf": (lambda: trained("batchnorm"), LINF),
    "batchnorm l2": (lambda: trained("batchnorm"), L2),
    "gelu, layernorm l2": (lambda: trained("gelu"), L2),
    "bfloat16 linf": (lambda: in_bfloat16(trained("mlp")), LINF),
    "bfloat16 batchnorm l2": (lambda: in_bfloat16(trained("batchnorm")), L2),
    "log-probabilities": (lambda: lambda x: trained("mlp")(x).log_softmax(1), LINF),
    "8-bit inputs": (lambda: eight_bit(trained("mlp")), LINF),
    "float64 l1": (lambda: lambda x: copy.deepcopy(trained("mlp")).double()(x.double()), L1),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_models_raise_no_doubt(name: str) -> None:
    build, threat_model = SOUND[name]
    *_, x, y = digits()
    model = build()
    assert (model(x).argmax(1) == y).float().mean() > 0.8, "or the test is about nothing"
    assert before_attacks(model, x, y, threat_model) == {}
    assert before_attacks(model, x[:24], y[:24], threat_model) == {}
    assert after_attacks(model, x, y, threat_model) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_precision_raise_no_doubt(dtype: torch.dtype) -> None:
    *_, x, y = digits()
    assert before_attacks(copy.deepcopy(trained("batchnorm")).to(dtype), x.to(dtype), y) == {}


# --------------------------------------------------------------------------------------------------- a toy for the unsound ones

WEIGHT = torch.randn(16, 4, generator=seeded(1))


def linear(x: Tensor) -> Tensor:
    return x @ WEIGHT.to(x.dtype)


def toy(examples: int = 100) -> tuple[Tensor, Tensor]:
    """Uniform points and the classes that ``linear`` gives them."""
    x = torch.rand(examples, 16, generator=seeded(2))
    return x, linear(x).argmax(1)


class ReplacedBackward(torch.autograd.Function):
    """``forward(x)`` of one function with ``backward(gradient)`` of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.replaced = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.replaced(gradients[0]), None, None


def backwards(x: Tensor) -> Tensor:
    """The linear model with a gradient that points the other way."""
    return linear(ReplacedBackward.apply(x, torch.clone, torch.neg))  # type: ignore[arg-type]


def test_linear_model_raises_no_doubt() -> None:
    assert before_attacks(linear, *toy()) == {}
    assert after_attacks(linear, *toy()) == {}


# ---------------------------------------------------------------------------------------------------------------- the checks


class Wrapper:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)

    def logits(self, x: Tensor) -> Tensor:
        return self.model(x)


class Door(nn.Module):
    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


GLOBAL = nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5))


def reads_a_global(x: Tensor) -> Tensor:
    return GLOBAL(x)


def decorated(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor) -> Tensor:
        return model(x)

    @wraps(inner)
    def outer(*arguments: Any) -> Tensor:
        return inner(*arguments)

    return outer


WRAPPINGS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "module": lambda model: model,
    "closure": lambda model: lambda x: model(x),
    "default argument": lambda model: lambda x, inner=model: inner(x),
    "partial": lambda model: partial(torch.func.functional_call, model, dict(model.named_parameters())),
    "bound method": lambda model: Wrapper(model).logits,
    "callable object": lambda model: Wrapper(model),
    "ensemble": lambda model: (lambda models: lambda x: torch.stack([m(x) for m in models]).mean(0))([model]),
    "decorator": decorated,
    "function inside a module": lambda model: Door(lambda x: model(x)).eval(),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_training_mode_is_seen_through_wrappings(wrapping: str) -> None:
    inner = nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5))
    wrapped = WRAPPINGS[wrapping](inner)
    found = before_attacks(wrapped, *toy())
    assert re.search(r"\d of \d modules .* in training mode", found["training_mode"].reason)
    assert "randomised_output" in found
    inner.eval()
    assert "training_mode" not in before_attacks(wrapped, *toy())


def test_training_mode_of_globals_and_of_parts() -> None:
    x, y = toy()
    assert "training_mode" in before_attacks(reads_a_global, x, y)
    GLOBAL.eval()
    try:
        assert "training_mode" not in before_attacks(reads_a_global, x, y)
        GLOBAL[1].train()
        assert before_attacks(reads_a_global, x, y)["training_mode"].reason.startswith("1 of 3 modules")
    finally:
        GLOBAL.train()


def test_modules_that_the_model_does_not_call_are_left_out() -> None:
    model = Door(linear).eval()
    model._trainer = Wrapper(nn.Linear(2, 2))  # type: ignore[assignment]
    model.teachers = [nn.Linear(2, 2)]  # type: ignore[assignment]
    assert modules_behind(model) == [model]
    assert modules_behind(linear) == []
    cyclic = Wrapper(nn.Linear(2, 2))
    cyclic.itself = cyclic  # type: ignore[attr-defined]
    assert modules_behind(cyclic) == [cyclic.model]


def normalised(batches_seen: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A model that classifies perfectly with batch statistics; its running ones saw so many batches."""
    torch.manual_seed(0)
    first = nn.Linear(16, 16)
    nn.init.constant_(first.bias, 5.0)
    model = nn.Sequential(first, nn.BatchNorm1d(16), nn.Linear(16, 4, bias=False))
    x, _ = toy()
    y = copy.deepcopy(model).train()(x).argmax(1)
    for _ in range(batches_seen):
        model.train()(x)
    return model.eval(), x, y


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_batchnorm_statistics_that_were_never_updated(wrapping: str) -> None:
    model, x, y = normalised(batches_seen=0)
    wrapped = WRAPPINGS[wrapping](model)
    right = (model(x).argmax(1) == y).double().mean().item()
    assert before_attacks(wrapped, x, y)["batchnorm_gap"].reason.startswith(f"accuracy is {percent(right)} with")
    assert "and 100 % with those of the batch" in before_attacks(wrapped, x, y)["batchnorm_gap"].reason
    model, x, y = normalised(batches_seen=100)
    assert "batchnorm_gap" not in before_attacks(WRAPPINGS[wrapping](model), x, y)


def test_batchnorm_gap_is_no_matter_of_what_is_in_the_batch() -> None:
    """One class alone has other statistics than the data; running ones are right, and those of the batch lose."""
    model, x, y = normalised(batches_seen=100)
    alone = y == y.mode().values
    assert "batchnorm_gap" not in before_attacks(model, x[alone], y[alone])
    stale, x, y = normalised(batches_seen=0)
    assert "batchnorm_gap" not in before_attacks(stale, x[:1], y[:1]), "one example has no statistics"


def test_batchnorm_gap_of_a_model_that_passes_hooks_by() -> None:
    """As a compiled module does, which keeps the original under this name."""

    class Compiled(nn.Module):
        def __init__(self, module: nn.Sequential) -> None:
            super().__init__()
            self._orig_mod = module

        def forward(self, x: Tensor) -> Tensor:
            for layer in self._orig_mod:
                x = layer.forward(x)
            return x

    model, x, y = normalised(batches_seen=0)
    assert "batchnorm_gap" in before_attacks(Compiled(model).eval(), x, y)


def images_of(scale: float, shift: float) -> Tensor:
    *_, x, _ = digits()
    return scale * x.expand(-1, 3, -1, -1) + shift


@pytest.mark.parametrize(
    ("x", "box", "reason"),
    [
        (images_of(1 / 255, 0.0), (0.0, 1.0), r"inputs lie in \[0, 0.00392\], 0.4 % of the box \[0, 1\]"),
        (images_of(1 / 16, 0.0), (0.0, 1.0), "6 % of the box"),
        (images_of(1.0, 0.0), (0.0, 255.0), "0.4 % of the box"),
        (images_of(2.66, -0.81), (-3.0, 3.0), "mean .* standard deviation .* they look normalised"),
        (images_of(1.0, 0.0), (0.0, 1.0), None),
        (images_of(2.0, -1.0), (-1.0, 1.0), None),
        (images_of(0.5, 0.25), (0.0, 1.0), None),
        (images_of(1.0, 0.0).gt(0.3).float() * 2 - 1, (-1.0, 1.0), None),  # mean 0, deviation 1, and the whole box
        (images_of(2.66, -0.81)[:, 0, 0], (-3.0, 3.0), None),  # a table of standardised features may be judged as it is
        (torch.tensor([[0.52, 0.48], [0.54, 0.46]]), (0.0, 1.0), None),  # too few numbers to speak of a range
    ],
)
def test_normalised_inputs(x: Tensor, box: tuple[float, float], reason: str | None) -> None:
    threat_model = ThreatModel(epsilon=1e-4, lower=box[0], upper=box[1])
    weight = torch.randn(x[0].numel(), 4, generator=seeded())
    found = before_attacks(lambda v: v.flatten(1) @ weight, x, torch.zeros(len(x), dtype=torch.int64), threat_model)
    assert ("normalised_inputs" in found) == (reason is not None)
    if reason is not None:
        assert re.search(reason, found["normalised_inputs"].reason)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_epsilon_that_reaches_other_classes(norm: str) -> None:
    """Two points of different classes at a known distance, many times over."""
    near, far = torch.full((4,), 0.4), torch.full((4,), 0.6)
    distance = {"linf": 0.2, "l2": 0.4, "l1": 0.8}[norm]
    x, y = torch.stack([near, far] * 20), torch.tensor([0, 1] * 20)
    for epsilon, doubted in ((0.99 * distance, False), (1.01 * distance, True)):
        found = before_attacks(lambda v: v[:, :3] * torch.arange(3.0), x, y, ThreatModel(norm=norm, epsilon=epsilon))
        assert ("large_epsilon" in found) == doubted
    assert found["large_epsilon"].reason.startswith("for 100 % of the examples")


def test_softmax_outputs() -> None:
    x, y = toy()
    assert "softmax_outputs" in before_attacks(lambda v: linear(v).softmax(1), x, y)
    assert "softmax_outputs" in before_attacks(lambda v: linear(v).bfloat16().softmax(1).float(), x, y)
    assert "softmax_outputs" not in before_attacks(lambda v: linear(v).log_softmax(1), x, y)
    assert "softmax_outputs" not in before_attacks(lambda v: linear(v).sigmoid(), x, y)
    sums_to_one = torch.tensor([[0.95, 0.05], [0.3, 0.7], [0.6, 0.4]])  # of inputs only, not of outputs in general
    assert before_attacks(lambda v: v, sums_to_one, sums_to_one.argmax(1)) == {}


def test_cross_entropy_without_gradient() -> None:
    x, y = toy()
    clear = linear(x).topk(2, 1).values.diff(dim=1).squeeze(1) < -0.5  # no lead is lost to the noise beside the example
    found = before_attacks(lambda v: 1e6 * linear(v), x[clear], y[clear])
    assert set(found) == {"zero_gradients"}
    assert "100 % of the examples have a cross-entropy without any input gradient" in found["zero_gradients"].reason
    assert "trust the attacks on the margin" in found["zero_gradients"].remedy


@pytest.mark.parametrize("dead", [0, 1, 2, 25])
def test_dead_examples_are_counted(dead: int) -> None:
    """The second logit is a rectifier that so many of 100 examples do not reach: no gradient at all there."""
    x = torch.full((100, 2), 0.9)
    x[:dead] = 0.1

    def model(v: Tensor) -> Tensor:
        return torch.stack([torch.ones(len(v)), 0.5 * (v.sum(1) - 1).relu()], 1)

    found = before_attacks(model, x, torch.zeros(100, dtype=torch.int64))
    assert ("zero_gradients" in found) == (dead > 1)
    if dead > 1:
        assert f"{dead} % of the examples have a margin, and {dead} % a cross-entropy" in found["zero_gradients"].reason


def test_models_that_autograd_cannot_follow() -> None:
    x, y = toy()
    for model in (lambda v: linear((8 * v).round() / 8), lambda v: linear(v).detach()):
        assert "100 % of the examples have a margin" in before_attacks(model, x, y)["zero_gradients"].reason
    root = before_attacks(lambda v: linear(v) + (v - v.detach()).sum(1, keepdim=True).sqrt(), x, y)
    assert "zero_gradients" in root, "an infinite gradient is none"


SHATTERED: dict[str, Callable[[Tensor], Tensor]] = {
    "straight through a rounding": lambda x: linear(x + ((4 * x).round() / 4 - x).detach()),
    "rounding with a replaced backward": lambda x: linear(
        ReplacedBackward.apply(x, lambda v: (8 * v).round() / 8, torch.clone)  # type: ignore[arg-type]
    ),
    "backward negated": backwards,
    "backward scaled": lambda x: linear(ReplacedBackward.apply(x, torch.clone, lambda g: 0.1 * g)),  # type: ignore[arg-type]
    "backward shuffled": lambda x: linear(ReplacedBackward.apply(x, torch.clone, lambda g: g.roll(1, 1))),  # type: ignore[arg-type]
    "part detached": lambda x: linear(x) + 3 * linear(x).detach(),
    "fast waves in the input": lambda x: linear(x + 0.05 * torch.sin(1000 * x)),
    "fast waves in the logits": lambda x: linear(x) + 0.5 * torch.sin(500 * linear(x)),
}


@pytest.mark.parametrize("threat_model", [LINF, L2, L1], ids=["linf", "l2", "l1"])
@pytest.mark.parametrize("name", SHATTERED)
def test_shattered_gradients(name: str, threat_model: ThreatModel) -> None:
    x, _ = toy()
    model = SHATTERED[name]
    found = before_attacks(model, x, model(x).argmax(1), threat_model)
    assert set(found) == {"shattered_gradients"}
    assert re.search(r"for \d+ % of the examples a step of epsilon / (64|16|8)", found["shattered_gradients"].reason)


def test_rounding_is_not_taken_for_shattering() -> None:
    """Steps far below the resolution of the arithmetic change the margin by noise; that is no property of the gradient."""
    x, y = toy()
    for model, epsilon in ((linear, 1e-6), (lambda v: linear(v.bfloat16()).float(), 1e-2), (lambda v: 1e4 + linear(v), 1e-2)):
        assert "shattered_gradients" not in before_attacks(model, x, y, ThreatModel(epsilon=epsilon))


def test_randomised_output() -> None:
    x, y = toy()
    for noise, doubted in ((0.1, True), (1e-2, True), (1e-6, False)):

        def noisy(v: Tensor, noise: float = noise) -> Tensor:
            return linear(v) + noise * torch.randn(len(v), 4)

        assert set(before_attacks(noisy, x, y)) == ({"randomised_output"} if doubted else set())
    found = before_attacks(lambda v: F.dropout(linear(v), 0.5), x, y)
    assert "eot_samples=20" in found["randomised_output"].remedy


def test_batch_dependent_output() -> None:
    x, y = toy()

    def same_noise_by_position(v: Tensor) -> Tensor:
        return linear(v) + 0.3 * torch.randn(len(v), 4, generator=seeded())

    def normalised_by_batch(v: Tensor) -> Tensor:
        return F.batch_norm(linear(v), None, None, training=True)

    assert "batch_dependent_output" in before_attacks(same_noise_by_position, x, y)
    assert "batch_dependent_output" in before_attacks(normalised_by_batch, x, normalised_by_batch(x).argmax(1))


# ------------------------------------------------------------------------------------------------------------------- results


def results(examples: int, **more: Any) -> dict[str, Any]:
    """A sound evaluation of a model that is right everywhere and never broken."""
    everyone = torch.ones(examples, dtype=torch.bool)
    plain = {"threat_model": LINF, "correct": everyone, "predicted": torch.arange(examples) % 10, "broken_by": {}}
    return plain | {"curve_examples": examples} | more


def checks(**more: Any) -> set[str]:
    return {doubt.check for doubt in result_doubts(**more)}


@pytest.mark.parametrize("examples", [100, 500, 1000, 10_000])
def test_gradient_free_wins_beyond_luck(examples: int) -> None:
    """The least number of wins whose chance at a rate of 0.2 % is below 5 %, by the sum over the binomial distribution."""

    def tail(wins: int) -> float:
        return 1 - sum(math.comb(examples, k) * 0.002**k * 0.998 ** (examples - k) for k in range(wins))

    least = next(wins for wins in range(1, examples) if tail(wins) < 0.05)
    assert {100: 2, 500: 4}.get(examples, least) == least
    for wins, doubted in ((least - 1, False), (least, True)):
        broken = {"pgd": torch.zeros(examples, dtype=torch.bool), "square": torch.arange(examples) < wins}
        found = checks(**results(examples, broken_by=broken, gradient_free={"square"}))
        assert found == ({"gradient_free_wins"} if doubted else set())


def test_gradient_free_attack_before_the_gradient_attacks_proves_nothing() -> None:
    broken = {"square": torch.arange(100) < 50, "pgd": torch.arange(100) >= 50}
    assert checks(**results(100, broken_by=broken, gradient_free={"square"})) == set()
    assert checks(**results(100, broken_by=broken, gradient_free={"pgd"})) == {"gradient_free_wins"}
    assert checks(**results(100, broken_by={"square": torch.arange(100) < 50}, gradient_free={"square"})) == set()


@pytest.mark.parametrize(
    ("after_few", "after_many", "doubted"),
    [
        (torch.linspace(-0.8, -0.5, 100), torch.linspace(-0.7, -0.4, 100), False),  # more steps find more
        (torch.full((100,), -0.5), torch.full((100,), -0.5), False),  # five steps found it all
        (torch.full((100,), -0.5), torch.full((100,), -0.501), False),  # within a hundredth of the gain
        (torch.full((100,), -0.5), torch.full((100,), -0.7), True),  # more steps lose
        (torch.full((100,), -0.5), -0.5 - 0.2 * (torch.arange(100) < 9), False),  # nine in a row may be luck
        (torch.full((100,), -0.5), -0.5 - 0.2 * (torch.arange(100) < 10), True),
        (torch.full((100,), -1.0), torch.full((100,), -1.0), True),  # nothing moves
        (torch.full((100,), -1.3), torch.full((100,), -1.5), True),  # down instead of up
    ],
)
def test_steps_that_do_not_help(after_few: Tensor, after_many: Tensor, doubted: bool) -> None:
    losses = {0: torch.full((100,), -1.0).double(), 5: after_few.double(), 20: after_many.double()}
    assert checks(**results(100, losses=losses)) == ({"steps_do_not_help"} if doubted else set())
    wrong = {count: margins + 3 for count, margins in losses.items()}  # nobody attacks what is misclassified already
    assert checks(**results(100, losses=wrong)) == set()


@pytest.mark.parametrize(
    ("accuracies", "doubted"),
    [
        ((0.96, 0.90, 0.81, 0.48, 0.01, 0.0, 0.0), False),
        ((1.00, 1.00, 1.00, 1.00, 1.00, 0.93, 0.0), False),  # a provable model far inside its radius
        ((0.94, 0.01, 0.00, 0.00, 0.00, 0.00, 0.0), False),  # an undefended one: all are broken at once
        ((0.96, 0.90, 0.92, 0.48, 0.10, 0.12, 0.0), False),  # the luck of the start
        ((0.96, 0.90, 0.60, 0.80, 0.10, 0.00, 0.0), True),  # rises
        ((0.96, 0.87, 0.90, 0.88, 0.83, 0.60, 0.0), True),  # four times the radius, and not one more
        ((0.96, 0.93, 0.93, 0.93, 0.93, 0.93, 0.0), False),  # too few broken to expect more
    ],
)
def test_larger_epsilon_that_does_not_help(accuracies: tuple[float, ...], doubted: bool) -> None:
    curve = tuple(zip((0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 1.0), accuracies, strict=True))
    assert checks(**results(100, curve=curve)) == ({"larger_epsilon_does_not_help"} if doubted else set())


@pytest.mark.parametrize(("last", "doubted"), [(0.0, False), (0.02, False), (0.03, True), (0.9, True)])
def test_accuracy_at_full_epsilon(last: float, doubted: bool) -> None:
    curve = ((0.0, 1.0), (1.0, last))
    assert checks(**results(100, curve=curve)) == ({"not_zero_at_full_epsilon"} if doubted else set())
    assert checks(**results(100, curve=curve, predicted=torch.zeros(100))) == set(), "one class can stay for ever"


def test_failing_attack_end_to_end() -> None:
    """Gradients that point the other way: the attack climbs down, at every radius and with any number of steps."""
    found = after_attacks(backwards, *toy())
    assert set(found) == {"steps_do_not_help", "not_zero_at_full_epsilon"}
    assert found["not_zero_at_full_epsilon"].reason.startswith("accuracy is still 100 % at epsilon = 1")


@pytest.mark.parametrize(
    ("right", "examples", "classes", "doubted"),
    [
        (2, 20, 10, True),
        (3, 20, 10, True),
        (4, 20, 10, False),
        (0, 19, 10, False),  # too few to tell
        (190, 1000, 10, True),
        (191, 1000, 10, False),
        (550, 1000, 2, True),
        (551, 1000, 2, False),
        (1000, 1000, 10, False),
        (1000, 1000, 1, False),  # one class: nothing to guess
        (0, 1000, None, False),
    ],
)
def test_accuracy_of_guessing(right: int, examples: int, classes: int | None, doubted: bool) -> None:
    found = result_doubts(**results(examples, correct=torch.arange(examples) < right, classes=classes))
    found = [doubt for doubt in found if doubt.check != "few_examples"]
    assert [doubt.check for doubt in found] == (["no_better_than_chance"] if doubted else [])
    if doubted:
        assert f"guessing among {classes} classes gives {percent(1 / (classes or 1))}" in found[0].reason


@pytest.mark.parametrize("robust", [0, 10, 5])
def test_few_examples_names_the_width(robust: int) -> None:
    """Wilson's interval of k out of 10, from the roots of its quadratic equation."""
    ten, z = 10, 1.959964
    a, b, c = 1 + z * z / ten, -(2 * robust / ten + z * z / ten), (robust / ten) ** 2
    width = math.sqrt(b * b - 4 * a * c) / a
    (doubt,) = result_doubts(**results(ten, broken_by={"pgd": torch.arange(ten) >= robust}))
    assert doubt.check == "few_examples"
    assert f"is {percent(width)} wide" in doubt.reason
    assert checks(**results(100)) == set()


def test_no_results_no_doubts() -> None:
    nothing = torch.zeros(0, dtype=torch.bool)
    empty = {"correct": nothing, "predicted": nothing.long(), "broken_by": {"pgd": nothing}, "curve_examples": 0}
    assert result_doubts(threat_model=LINF, **empty) == ()
    x, y = toy(0)
    assert model_doubts(linear, x, y, threat_model=LINF, generator=seeded()) == ()
    assert epsilon_curve(linear, x, y, threat_model=LINF, generator=seeded()) == ()
    assert {len(margins) for margins in step_losses(linear, x, y, threat_model=LINF, generator=seeded()).values()} == {0}


def test_classes_that_attacks_ask_for() -> None:
    dlr, targeted = APGD(threat_model=LINF, loss="dlr"), APGD(threat_model=LINF, loss="dlr", targets=9)
    beta = BETA(threat_model=LINF, targets="top_logits", target_count=3)
    plain = {"pgd": PGD(threat_model=LINF), "beta": BETA(threat_model=LINF), "margin": APGD(threat_model=LINF, loss="margin")}
    assert class_doubts(2, plain) == ()
    assert class_doubts(3, {"dlr": dlr}) == ()
    assert class_doubts(10, {"dlr": dlr, "targeted": targeted, "beta": beta}) == ()
    assert [d.reason for d in class_doubts(2, {"a": dlr, "b": targeted})] == [
        "a climbs DLR, which needs 3 classes, and the model has 2",
        "b climbs targeted DLR, which needs 4 classes, and the model has 2",
    ]
    assert class_doubts(3, {"t": targeted})[0].reason.startswith("t climbs targeted DLR, which needs 4")
    (doubt,) = class_doubts(4, {"t": targeted})
    assert (doubt.check, doubt.reason) == ("fewer_classes_than_targets", "t asks for 9 wrong classes, and the model has 3")
    assert class_doubts(3, {"beta": beta})[0].reason == "beta asks for 3 wrong classes, and the model has 2"
    assert class_doubts(2, {"worst": WorstCase([PGD(threat_model=LINF), dlr])})[0].reason.startswith("worst[1] climbs DLR")
    x, y = toy()
    assert "fewer_classes_than_targets" in before_attacks(linear, x, y, attacks={"t": targeted})


# --------------------------------------------------------------------------------------------------------- curve and bystanders


@pytest.mark.parametrize(("norm", "reach"), [("linf", 2.0), ("l2", math.sqrt(2)), ("l1", 1.0)])
def test_curve_of_a_linear_model_is_exact(norm: str, reach: float) -> None:
    """Two pixels, the larger one is the class: a ball of radius r changes the lead by ``reach * r``."""
    leads = torch.tensor([0.05, 0.15, 0.25, 0.35, 0.45, -0.1])
    x = torch.stack([0.5 + leads / 2, 0.5 - leads / 2], 1)
    threat_model = ThreatModel(norm=norm, epsilon=0.2 / reach)
    curve = epsilon_curve(lambda v: v, x, torch.zeros(6, dtype=torch.int64), threat_model=threat_model, generator=seeded())
    changes = (0.05, 0.1, 0.2, 0.4, 0.8)
    radii = [0.0, *(change / reach for change in changes), covering_radius(x, threat_model)]
    assert [radius for radius, _ in curve] == pytest.approx(radii)
    # A lead of 0.05 meets a change of 0.05: both answers are right.
    assert curve[1][1] in (pytest.approx(4 / 6), pytest.approx(5 / 6))
    assert [accuracy for _, accuracy in curve[2:]] == pytest.approx([4 / 6, 3 / 6, 1 / 6, 0, 0])
    assert curve[0][1] == pytest.approx(5 / 6)


def test_curve_stops_at_the_box_and_starts_at_zero() -> None:
    x, y = toy(10)
    wide = ThreatModel(epsilon=0.5)
    assert [r for r, _ in epsilon_curve(linear, x, y, threat_model=wide, generator=seeded())] == [0, 0.125, 0.25, 0.5, 1]
    still = ThreatModel(epsilon=0.0)
    assert [r for r, _ in epsilon_curve(linear, x, y, threat_model=still, generator=seeded())] == [0, 1]
    assert after_attacks(linear, *toy(), still) == {}
    assert before_attacks(linear, *toy(), still) == {}
    for norm, farthest in (("l2", math.hypot(0.8, 1.5)), ("l1", 2.3)):
        box = ThreatModel(norm=norm, lower=-1.0, upper=1.0)
        assert covering_radius(torch.tensor([[0.0, 0.0], [0.2, -0.5]]), box) >= farthest - 1e-6


def test_curve_attacks_no_example_twice_at_one_radius() -> None:
    calls: list[int] = []

    def counting(v: Tensor) -> Tensor:
        calls.append(len(v))
        return v

    x, y = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.4, 0.6]]), torch.tensor([0, 0, 0])
    epsilon_curve(counting, x, y, threat_model=ThreatModel(epsilon=0.9), fractions=(1,), generator=seeded())
    assert calls == [3] + 2 * (5 + 1) * [2], "two radii, five steps and a look, on the two that are right"


def test_short_attack_spends_an_l1_ball_that_is_wider_than_its_steps_are_many() -> None:
    """A change of 30 in 400 coordinates that have room for 0.5 each takes 60 coordinates, three times the steps."""
    x, ball = torch.full((4, 400), 0.5), ThreatModel(norm="l1", epsilon=40.0)

    def model(v: Tensor) -> Tensor:
        return torch.stack([torch.full((len(v),), 30.0), (v - 0.5).sum(1)], 1)

    zeros = torch.zeros(4, dtype=torch.int64)
    curve = epsilon_curve(model, x, zeros, threat_model=ball, fractions=(0.7, 1), generator=seeded())
    assert [accuracy for _, accuracy in curve] == [1, 1, 0, 0]


def test_steps_are_compared_from_one_start() -> None:
    """Where the gradient is zero, an attack ends where it began."""
    x, y = toy(10)
    flat = step_losses(lambda v: linear(v.detach()) + 0 * v.sum(), x, y, threat_model=LINF, generator=seeded())
    assert torch.equal(flat[5], flat[20])
    assert not torch.equal(flat[0], flat[5])


def test_examples_are_taken_from_the_whole_of_sorted_data() -> None:
    x, y = torch.arange(1000.0)[:, None], torch.arange(1000) // 100
    few, labels = spread_rows(x, y)
    assert (len(few), labels.bincount().tolist()) == (100, [10] * 10)
    assert torch.equal(few[:, 0].long() // 100, labels)
    with torch.inference_mode():
        frozen = torch.rand(3, 2)
    assert not spread_rows(frozen, torch.arange(3))[0].is_inference()


def state_of(model: nn.Module) -> list[Any]:
    hooks = [len(m._forward_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    tensors = {name: value.tolist() for name, value in model.state_dict().items()}
    return [hooks, modes, tensors, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("training", [False, True])
def test_checks_leave_no_trace(training: bool) -> None:
    """Not even when a callable hides a model in training mode, whose every call draws noise and moves statistics."""
    model = with_batchnorm().train(training)
    *_, x, y = digits()
    x, y = x[:20].clone().requires_grad_(), y[:20]
    before, pixels = state_of(model), x.detach().clone()
    common = {"threat_model": LINF, "generator": seeded()}
    wrapped = Wrapper(model)
    with torch.inference_mode():
        doubts = model_doubts(wrapped, x, y, **common)
        epsilon_curve(wrapped, x, y, **common)
        step_losses(wrapped, x, y, **common)
    assert ("training_mode" in [doubt.check for doubt in doubts]) == training
    assert state_of(model) == before
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(x, pixels)


def test_same_generator_same_doubts() -> None:
    x, y = toy()
    assert before_attacks(SHATTERED["fast waves in the input"], x, y) == before_attacks(
        SHATTERED["fast waves in the input"], x, y
    )
    curves = [epsilon_curve(linear, x, y, threat_model=LINF, generator=seeded()) for _ in range(2)]
    assert curves[0] == curves[1]


def test_checks_before_the_attacks_take_a_few_passes() -> None:
    model, x, y = normalised(batches_seen=1)
    rows: list[int] = []

    def counting(v: Tensor) -> Tensor:
        rows.append(len(v))
        return model(v)

    before_attacks(counting, x, y)
    assert len(rows) == 14, "thirteen passes, one of them in two halves"
    assert sum(rows) == 13 * len(x)
    rows.clear()
    before_attacks(counting, x.repeat(5, 1), y.repeat(5))
    assert max(rows) <= 100


def test_every_check_is_explained() -> None:
    sources = (ROOT / "metarobust" / "evaluation").glob("*.py")
    named = {name for source in sources for name in re.findall(r'check="(\w+)"', source.read_text())}
    page = (ROOT / "docs" / "trust.md").read_text()
    assert named == set(re.findall(r"^### (\w+)$", page, flags=re.MULTILINE))
    assert str(Doubt(check="c", reason="because", remedy="do this")) == "because; do this"


def test_percent() -> None:
    assert [percent(v) for v in (0.0, 0.0039, 0.01, 0.254, 1.0)] == ["0 %", "0.4 %", "1 %", "25 %", "100 %"]

"""The same numbers on a GPU, up to its arithmetic; run with ``uv run pytest -m gpu``."""

import contextlib
import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from metarobust.attacks import APGD, BETA, PGD, Alternating, Square
from metarobust.bounds import adversarial_risk_bound
from metarobust.evaluation import evaluate
from metarobust.losses import cross_entropy, margin
from metarobust.meta_optimizers import LSTMOptimizer, factor_gradients, load, record_factors
from metarobust.meta_weighters import CAAT, WeightingNetwork, hypergradient, virtual_update
from metarobust.models import cnn
from metarobust.threat_models import ThreatModel
from metarobust.training import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)


class Stopped(Exception):
    """The end of a run that is to be resumed."""


def setting() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return cnn([4, 8]).eval(), torch.rand(16, 1, 8, 8), torch.randint(10, (16,))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_noise_is_the_same_on_every_device(norm: str) -> None:
    x = torch.rand(5, 1, 8, 8)
    threat_model = ThreatModel(norm=norm, epsilon=0.5)
    host = threat_model.sample(x, generator=torch.Generator().manual_seed(0))
    device = threat_model.sample(x.cuda(), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(device.cpu(), host, rtol=1e-5, atol=1e-6)


def test_attack_factors_and_evaluation_agree_with_the_cpu() -> None:
    model, x, y = setting()
    device_model = copy.deepcopy(model).cuda()
    attack = PGD(threat_model=THREAT_MODEL, steps=1)
    host = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    device = attack(device_model, x.cuda(), y.cuda(), generator=torch.Generator().manual_seed(0))
    assert device.is_cuda
    assert ((device.cpu() - host).abs() < 1e-5).float().mean() > 0.99, "single signs may flip at zero gradients"
    found = factor_gradients(device_model, lambda: F.cross_entropy(device_model(x.cuda()), y.cuda()), threat_model=THREAT_MODEL)
    expected = factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=THREAT_MODEL)
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)
    report = evaluate(device_model, (x, y), threat_model=THREAT_MODEL, protocol="quick")
    assert report.worst_case_accuracy <= report.clean_accuracy


def test_learned_optimizer_trains_on_the_device() -> None:
    model, x, y = setting()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    optimizer = LSTMOptimizer().cuda().torch_optimizer(model.parameters(), total_steps=20)
    before = F.cross_entropy(model(x), y).item()
    for _ in range(20):
        optimizer.zero_grad()
        with record_factors(model, threat_model=THREAT_MODEL) as recorder:
            recorder.backward(F.cross_entropy(model(x), y))
        optimizer.step()
    assert F.cross_entropy(model(x), y).item() < before


@pytest.mark.parametrize(("units", "layers"), [(8, 1), (20, 2)])
@pytest.mark.parametrize("source", ["gradient", "gradient+adversarial_tangent"])
def test_the_fused_step_is_taken_and_equals_the_step_on_the_cpu(source: str, units: int, layers: int) -> None:
    rule = LSTMOptimizer(gradient_source=source, hidden_size=units, layers=layers, initial_learning_rate=0.1)
    ends = []
    for device in ("cpu", "cuda"):
        model, x, y = setting()
        model, placed = model.to(device), copy.deepcopy(rule).to(device)
        assert placed.steps_in_place(list(model.parameters()))
        optimizer = placed.torch_optimizer(model.parameters(), total_steps=4)
        draw = torch.Generator().manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            if source == "gradient":
                F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            else:
                with optimizer.record_factors(model, threat_model=THREAT_MODEL) as recorder:
                    recorder.backward(F.cross_entropy(model(x.to(device)), y.to(device)))
            for p in model.parameters():  # the same streams on both, whatever a convolution rounds
                assert p.grad is not None
                p.grad.copy_(torch.randn(p.shape, generator=draw))
                if getattr(p, "second_grad", None) is not None:
                    p.second_grad.copy_(torch.randn(p.shape, generator=draw))  # type: ignore[attr-defined]
            optimizer.step()
        ends.append([p.detach().cpu() for p in model.parameters()])
    for host, device_end in zip(*ends, strict=True):
        torch.testing.assert_close(device_end, host, rtol=1e-4, atol=1e-5)


def test_the_shipped_optimizer_takes_the_steps_that_it_takes_on_the_cpu() -> None:
    model, x, y = setting()
    ends = []
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(model).to(device)
        optimizer = load("robust-small-v1").to(device).torch_optimizer(twin.parameters(), total_steps=20)
        draw = torch.Generator().manual_seed(2)
        for _ in range(5):
            optimizer.zero_grad()
            with optimizer.record_factors(twin, threat_model=THREAT_MODEL, generator=draw) as recorder:
                recorder.backward(F.cross_entropy(twin(x.to(device)), y.to(device)))
            optimizer.step()
        ends.append([p.detach().cpu() for p in twin.parameters()])
    for host, device_end in zip(*ends, strict=True):
        torch.testing.assert_close(device_end, host, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [APGD, BETA, Alternating, Square], ids=lambda attack: attack.__name__)
def test_searches_reach_what_they_reach_on_the_cpu(attack: Any, norm: str) -> None:
    if attack is Square and norm == "l1":
        pytest.skip("Square is not defined for l1")
    model, x, _ = setting()
    y = model(x).argmax(1)
    device_model = copy.deepcopy(model).cuda()
    threat_model = ThreatModel(norm=norm, epsilon={"linf": 0.1, "l2": 0.5, "l1": 1.5}[norm])
    settings = {"queries": 100} if attack is Square else {"steps": 20}
    search = attack(threat_model=threat_model, **settings)
    host = search(model, x, y, generator=torch.Generator().manual_seed(0))
    device = search(device_model, x.cuda(), y.cuda(), generator=torch.Generator().manual_seed(0)).cpu()
    assert threat_model.contains(device, x).all()
    torch.testing.assert_close(margin(model(device), y), margin(model(host), y), rtol=0.05, atol=0.01)


def test_chunks_fit_the_memory_and_do_not_change_the_result() -> None:
    model, x, y = setting()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    attack = BETA(threat_model=THREAT_MODEL, steps=5)
    whole = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    chunked = dataclasses.replace(attack, memory_budget=1)(model, x, y, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(margin(model(chunked), y), margin(model(whole), y), rtol=1e-3, atol=1e-3)


def test_half_precision_and_compiled_models_evaluate_like_the_plain_one() -> None:
    model, x, _ = setting()
    y = model(x).argmax(1)
    plain = evaluate(copy.deepcopy(model).cuda(), (x, y), threat_model=THREAT_MODEL, protocol="standard")
    half = evaluate(copy.deepcopy(model).cuda().bfloat16(), (x, y), threat_model=THREAT_MODEL, protocol="standard")
    compiled = evaluate(torch.compile(copy.deepcopy(model).cuda()), (x, y), threat_model=THREAT_MODEL, protocol="quick")
    assert abs(half.worst_case_accuracy - plain.worst_case_accuracy) <= 2 / 16
    assert compiled.clean_accuracy == plain.clean_accuracy
    assert compiled.worst_case_accuracy >= plain.worst_case_accuracy


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("levels", [True, False])
def test_pairs_are_found_on_the_gpu_and_bounds_agree_with_the_cpu(norm: str, levels: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(600, 6, generator=generator)
    x = (x * 255).round() / 255 if levels else x
    y = torch.randint(4, (600,), generator=generator)
    epsilon = 0.12 if norm == "l2" else 0.08
    threat_model = ThreatModel(norm=norm, epsilon=epsilon)
    host, device = (adversarial_risk_bound(x.to(place), y.to(place), threat_model) for place in ("cpu", "cuda"))
    assert device.pairs == host.pairs > 50
    assert (device.lower, device.upper) == pytest.approx((host.lower, host.upper), abs=1e-9)
    assert device.potentials.device.type == "cpu"
    attack, classifier = device.attack(), device.classifier()
    assert classifier(x.cuda()).is_cuda
    assert attack.risk(classifier) == pytest.approx(host.attack().risk(host.classifier()), abs=1e-6)


def test_the_pairs_of_many_points_do_not_fill_a_gpu() -> None:
    x = torch.rand(20_000, 50, generator=torch.Generator().manual_seed(0)).cuda()
    torch.cuda.reset_peak_memory_stats()
    adversarial_risk_bound(x, torch.arange(20_000) % 5, ThreatModel(norm="l2", epsilon=0.9), order=2)
    assert torch.cuda.max_memory_allocated() < 0.8e9  # all distances in float32 take 1.6e9 bytes


@pytest.mark.parametrize("method", ["jvp", "double_backward"])
def test_hypergradients_are_those_of_the_cpu(method: str) -> None:
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for place in ("cpu", "cuda"):
        moved, inputs, labels = copy.deepcopy(model).to(place), x.to(place), y.to(place)
        optimizer = torch.optim.SGD(moved.parameters(), lr=0.1, momentum=0.9)
        named = dict(moved.named_parameters())

        def losses(
            parameters: Any, moved: Any = moved, inputs: torch.Tensor = inputs, labels: torch.Tensor = labels
        ) -> torch.Tensor:
            return cross_entropy(torch.func.functional_call(moved, parameters, (inputs,)), labels)[:, None]

        update = virtual_update(optimizer, list(named.values()))
        weights = torch.ones(len(y), 1, device=place)
        step = hypergradient(losses, lambda p, losses=losses: losses(p).mean(), named, weights, update=update, method=method)
        assert step.weights_gradient.device.type == place
        found.append(step.weights_gradient.cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_caat_follows_its_data_to_the_gpu_and_resumes_there(tmp_path: Any) -> None:
    ends = []
    for epochs_of_runs in ((3,), (1, 3)):
        for stop in epochs_of_runs:
            model, x, y = setting()
            model = copy.deepcopy(model).cuda()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            weigher = WeightingNetwork(generator=torch.Generator().manual_seed(0))
            classes = model(x.cuda()).shape[1]
            objective = CAAT(
                threat_model=THREAT_MODEL,
                meta_data=(x, y),
                optimizer=optimizer,
                class_counts=y.bincount(minlength=classes),
                network=weigher,
                meta_every=1,
                steps=2,
            )

            def on_epoch(record: Any, stop: int = stop) -> None:
                if record.epoch == stop < 3:
                    raise Stopped

            path = tmp_path / f"run{len(epochs_of_runs)}"
            with contextlib.suppress(Stopped):
                fit(
                    model,
                    objective,
                    (x, y),
                    optimizer=optimizer,
                    epochs=3,
                    batch_size=8,
                    checkpoint=path,
                    on_epoch=on_epoch,
                    silent=True,
                )
                ends.append(objective.state_dict())
    straight, resumed = ends
    assert straight["network.mean"].is_cuda
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-6)

"""Models and attacks of other libraries go in as they are, and attacks and reports of this one go out.

`uv run --group interop pytest tests/test_interoperability.py` runs it all but RobustBench, whose package needs two older ones:
`uv run --group interop --with robustbench --with "setuptools<81" pytest tests/test_interoperability.py`.
"""

import importlib
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust.attacks import BETA, PGD, Adapted
from metarobust.evaluation import evaluate
from metarobust.meta_optimizers import factor_gradients, load
from metarobust.models import Normalize, cnn
from metarobust.threat_models import ThreatModel

BALL = ThreatModel(norm="linf", epsilon=8 / 255)
HOW = 'write `uv run --group interop pytest tests/test_interoperability.py`, with `--with robustbench --with "setuptools<81"`'


def imported(name: str) -> ModuleType:
    """An optional library, whose own warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed; {HOW}")


def images(channels: int = 3, size: int = 32, classes: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(4, channels, size, size, generator=draw), torch.arange(4) % classes


class Architecture(NamedTuple):
    """A network of timm, and the kinds of layer in it that have gradients but no second stream."""

    name: str
    options: dict[str, Any]
    left_alone: set[str]


ARCHITECTURES = (
    Architecture("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, set()),
    Architecture("mobilenetv3_small_050", {}, {"BatchNormAct2d"}),
    Architecture("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, {"LayerNorm2d", "ConvNeXtBlock"}),
    Architecture(
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48},
        {"LayerNorm", "VisionTransformer"},
    ),
)


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_networks_of_timm_go_in_as_they_are(row: Architecture) -> None:
    """Attacks, evaluation and the shipped meta-optimizer; its second stream is there wherever this library knows the layer."""
    timm = imported("timm")
    torch.manual_seed(0)
    network = timm.create_model(row.name, pretrained=False, num_classes=4, **row.options)
    model = nn.Sequential(Normalize(mean=[0.5] * 3, std=[0.25] * 3), network).eval()
    x, y = images()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for attack in (PGD(threat_model=BALL, steps=3), BETA(threat_model=BALL, steps=3)):
        found = attack(model, x, y, generator=torch.Generator().manual_seed(0))
        assert BALL.contains(found, x).all()
        assert not torch.equal(found, x)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    report = evaluate(model, (x, y), threat_model=BALL, protocol="quick", reliability_checks=False)
    assert report.worst_case_accuracy <= report.clean_accuracy

    rule = load("robust-small-v1")
    model.train()
    found = factor_gradients(
        model, lambda: F.cross_entropy(model(x), y), threat_model=BALL, gradient_source=rule.gradient_source,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    layers, names = dict(model.named_modules()), [name for name, _ in model.named_parameters()]
    without, seconds = set(), found.second_gradients
    for name, gradient, second in zip(names, found.gradients, seconds, strict=True):
        assert second.isfinite().all()
        if gradient.any() and not second.any():  # both vanish in residual branches that begin at zero
            without.add(type(layers[name.rpartition(".")[0]]).__name__)
    own = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("timm.")}  # differs between its versions
    assert without == row.left_alone & own
    optimizer = rule.torch_optimizer(model.parameters(), total_steps=5, threat_model=ThreatModel(epsilon=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.record_factors(model) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    with_gradient = [bool(p.grad.any()) for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    moved = [not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True)]
    assert [m for m, g in zip(moved, with_gradient, strict=True) if g] == [True] * sum(with_gradient)


def test_attention_in_windows_is_refused_by_the_second_stream_in_one_sentence() -> None:
    """Swin folds its windows into the batch; whose example a row is cannot be told then."""
    timm = imported("timm")
    torch.manual_seed(0)
    options = {"img_size": 32, "window_size": 4, "depths": (1,), "num_heads": (2,), "embed_dim": 16}
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=4, **options)
    x, y = images()
    assert BALL.contains(PGD(threat_model=BALL, steps=2)(model, x, y), x).all()
    source = load("robust-small-v1").gradient_source
    with pytest.raises(ValueError, match="every layer keeps one row per example, got a layer with 16 rows for 4 examples"):
        factor_gradients(model, lambda: F.cross_entropy(model(x), y), threat_model=BALL, gradient_source=source)


@pytest.mark.parametrize(
    ("name", "norm"), [("LinfPGD", "linf"), ("LinfFastGradientAttack", "linf"), ("L2PGD", "l2"), ("L2DeepFoolAttack", "l2")]
)
def test_attacks_of_foolbox(name: str, norm: Any) -> None:
    """Inside the ball, the same for the same generator, and stronger than no attack."""
    foolbox = imported("foolbox")
    torch.manual_seed(0)
    model, (x, _) = cnn([4, 8], classes=4).eval(), images(channels=1, size=8)
    y, ball = model(x).argmax(1), ThreatModel(norm=norm, epsilon=0.1 if norm == "linf" else 0.5)

    def find(module: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(module, bounds=(0, 1), device=points.device)
        return getattr(foolbox.attacks, name)()(wrapped, points, labels, epsilons=ball.epsilon)[1]

    attack = Adapted(threat_model=ball, find=find)
    first, second = (attack(model, x, y, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert ball.contains(first, x, tolerance=1e-6).all()
    with torch.no_grad():
        assert F.cross_entropy(model(first), y) > F.cross_entropy(model(x), y)
    report = evaluate(model, (x, y), threat_model=ball, attacks={name: attack}, reliability_checks=False)
    assert list(report.robust_accuracy) == [name]


def test_our_attacks_on_a_model_of_foolbox_and_in_place_of_one_of_torchattacks() -> None:
    foolbox = imported("foolbox")
    torch.manual_seed(0)
    model, (x, _) = cnn([4, 8], classes=4).eval(), images(channels=1, size=8)
    y, attack = model(x).argmax(1), PGD(threat_model=ThreatModel(epsilon=0.1), steps=5, random_start=False)
    own = attack(model, x, y)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    assert torch.equal(attack(wrapped, x, y), own)
    assert foolbox.utils.accuracy(wrapped, own, y) == (model(own).argmax(1) == y).float().mean().item()
    bound = partial(attack, model)
    assert torch.equal(bound(x, y), own)


def test_autoattack_of_torchattacks_beside_ours() -> None:
    """Its four attacks as one of an evaluation's, and its figure in a RobustBench entry."""
    torchattacks = imported("torchattacks")
    torch.manual_seed(0)
    model, (x, y) = cnn([4, 8], classes=4).eval(), images(channels=1, size=8)
    ball = ThreatModel(epsilon=0.1)

    def find(module: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
        return torchattacks.AutoAttack(module, norm="Linf", eps=0.1, n_classes=4)(points, labels)

    attacks = {"autoattack": Adapted(threat_model=ball, find=find), "pgd": PGD(threat_model=ball, steps=5)}
    report = evaluate(model, (x, y), threat_model=ball, attacks=attacks, reliability_checks=False)
    accuracy = report.robust_accuracy["autoattack"]
    told = report.to_robustbench(name="Ours", dataset="cifar10", architecture="CNN", autoattack_accuracy=accuracy)
    assert told["autoattack_acc"] == f"{100 * accuracy:.2f}"
    assert "AutoAttack was not run" not in told["footnote"]
    with pytest.raises(ValueError, match="autoattack_accuracy must be at most 1, got 53.7; write it as a fraction"):
        report.to_robustbench(name="Ours", dataset="cifar10", architecture="CNN", autoattack_accuracy=53.7)


@pytest.fixture
def robustbench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """RobustBench 1.1.1, which imports AutoAttack by the name of its repository, not by that of the package it asks for."""
    monkeypatch.setitem(sys.modules, "autoattack", imported("pyautoattack"))
    monkeypatch.setitem(sys.modules, "autoattack.state", imported("pyautoattack.state"))
    return imported("robustbench.utils")


@pytest.mark.parametrize("name", ["Ding2020MMA", "Wong2020Fast"])
def test_what_robustbench_loads_goes_in_as_it_is(name: str, robustbench: Any, tmp_path: Path) -> None:
    """`load_model` with random weights in the file that it would download."""
    zoo = imported("robustbench.model_zoo").model_dicts
    enums = imported("robustbench.model_zoo.enums")
    torch.manual_seed(0)
    untrained = zoo[enums.BenchmarkDataset.cifar_10][enums.ThreatModel.Linf][name]["model"]()
    file = tmp_path / "cifar10" / "Linf" / f"{name}.pt"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": untrained.state_dict()}, file)
    model = robustbench.load_model(name, model_dir=tmp_path, dataset="cifar10", threat_model="Linf")
    x, y = images()
    report = evaluate(model, (x, y), threat_model=BALL, protocol="quick", reliability_checks=False)
    assert report.examples == 4
    assert BALL.contains(BETA(threat_model=BALL, steps=2)(model, x, y), x).all()
    rule = load("robust-small-v1")
    optimizer = rule.torch_optimizer(model.parameters(), total_steps=5, threat_model=ThreatModel(epsilon=0.1))
    with optimizer.record_factors(model) as recorder:
        recorder.backward(F.cross_entropy(model(x), y))
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_robustbench_reads_our_entries(
    robustbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its table of models has ours; an entry without a figure of AutoAttack cannot be ranked by it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model_info" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).eval(), images()
    report = evaluate(model, (x, y), threat_model=BALL, protocol="quick", reliability_checks=False)
    options: dict[str, Any] = {"name": "Ours", "dataset": "cifar10", "architecture": "Linear"}
    entry = report.to_robustbench(folder / "Standard.json", **options, autoattack_accuracy=0.25)
    known = {field.name for field in robustbench.dataclasses.fields(robustbench.ModelInfo)}
    assert set(entry) - known == {"unreliable"}  # in its files, not in its class
    robustbench.list_available_models("cifar10", "Linf")
    assert "*[Ours]()*" in capsys.readouterr().out
    assert json.loads((folder / "Standard.json").read_text())["autoattack_acc"] == "25.00"
    report.to_robustbench(folder / "Standard.json", **options)
    with pytest.raises(TypeError):
        robustbench.list_available_models("cifar10", "Linf")


def test_the_fields_of_a_robustbench_entry_are_those_of_its_files() -> None:
    """The fields of model_info/cifar10/Linf/Bartoldson2024Adversarial_WRN-94-16.json there, in that order, and their types."""
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).eval(), images()
    report = evaluate(model, (x, y), threat_model=BALL, protocol="quick", reliability_checks=False)
    entry = report.to_robustbench(name="Ours", dataset="cifar10", architecture="Linear", autoattack_accuracy=0.5)
    kinds = {
        "link": str, "name": str, "authors": str, "additional_data": bool, "number_forward_passes": int, "dataset": str,
        "venue": str, "architecture": str, "eps": str, "clean_acc": str, "reported": str, "autoattack_acc": str,
        "footnote": str, "unreliable": bool,
    }  # fmt: skip
    assert {field: type(value) for field, value in entry.items()} == kinds
    assert list(entry) == list(kinds)

"""The scale benchmark: its fit on known powers, its smallest points, and what its measurements led to in the library."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import scale
from benchmarks._scale_fit import exponent
from benchmarks._scale_series import SERIES
from benchmarks._scale_show import draw, found, table
from metarobust.attacks import PGD
from metarobust.evaluation import _evaluate, evaluate
from metarobust.meta_optimizers import InterpretableOptimizer, LSTMOptimizer
from metarobust.meta_optimizers._layout import layout_of
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel

SIZES = (10.0, 40.0, 160.0, 640.0)
SHAPES = ((32, 64), (32,), (16, 32), (16,), (8, 16), (8,))


def test_exponent_of_an_exact_power() -> None:
    fitted = exponent(SIZES, [[3 * size**1.7] * 3 for size in SIZES])
    assert fitted.slope == pytest.approx(1.7)
    assert fitted.error == pytest.approx(0, abs=1e-6)
    assert (fitted.lowest, fitted.highest, fitted.last) == pytest.approx((1.7, 1.7, 1.7))


def test_exponent_with_a_fixed_cost_is_too_small_and_its_end_is_less_so() -> None:
    fitted = exponent(SIZES, [[1000 + size**2] for size in SIZES])
    assert fitted.slope < fitted.last < 2
    assert fitted.last > 1.9
    assert fitted.error > 0.1


def test_exponent_of_noise_has_the_error_of_least_squares() -> None:
    """Residuals +e, -e, -e, +e are orthogonal to the line, so slope and error have closed forms."""
    e = 0.1
    logs = [math.log(size) for size in SIZES]
    samples = [[math.exp(x + r), math.exp(x + r)] for x, r in zip(logs, (e, -e, -e, e), strict=True)]
    samples[0][1], samples[3][1] = samples[0][0] * 2, samples[3][0]
    fitted = exponent(SIZES, [[one[0]] for one in samples])
    spread = sum((x - sum(logs) / 4) ** 2 for x in logs)
    assert fitted.slope == pytest.approx(1)
    assert fitted.error == pytest.approx(math.sqrt(4 * e**2 / 2 / spread))
    ranged = exponent(SIZES, samples)
    assert ranged.highest == pytest.approx(1)
    assert ranged.lowest == pytest.approx(1 + (logs[0] - sum(logs) / 4) * math.log(2) / spread)


@pytest.mark.parametrize(
    ("sizes", "samples", "sentence"),
    [
        ([10.0, 10.0], [[1.0], [1.0]], "sizes must be at least two different ones"),
        ([10.0, 20.0], [[1.0]], "sizes must be at least two different ones"),
        ([10.0, 20.0], [[1.0], [0.0]], "must be positive"),
    ],
)
def test_exponent_refuses(sizes: list[float], samples: list[list[float]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        exponent(sizes, samples)


def test_smallest_points_are_measured_resumed_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, path = ["PGD, by points", "dual, KL, by batch"], tmp_path / "scale.jsonl"
    scale.run(names[:1], path, first=1)
    scale.run(names, path, first=1)
    lines = scale.read(path)
    assert [(line["series"], line["asked"]) for line in lines] == [(name, SERIES[name].sizes[0]) for name in names]
    for line in lines:
        assert len(line["seconds"]) >= 3
        assert min(line["seconds"]) > 0
        assert line["memory_bytes"] >= 0
        assert line["environment"]["threads"] == 1
    assert capsys.readouterr().out.count("PGD, by points 16:") == 1, "what is in the file is not measured again"
    rows = table(lines)
    assert len(rows) == 2 + len(names)
    assert rows[2].startswith("| PGD, by points | 16 to 16 (1) |")
    draw(lines, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 0


def test_every_series_appears_in_the_figure_and_has_three_sizes() -> None:
    from benchmarks._scale_show import PANELS

    assert sorted(name for _, names in PANELS for name in names) == sorted(SERIES)
    assert all(len(one.sizes) >= 3 and list(one.sizes) == sorted(one.sizes) for one in SERIES.values())


def test_exponents_of_the_file_need_three_points_and_visible_memory() -> None:
    name = "PGD, by points"
    lines = [{"series": name, "size": size, "seconds": [size, size], "memory_bytes": 2**20 * size} for size in (1.0, 10.0, 100.0)]
    assert found(lines[:2])[name].time_exponent is None
    one = found(lines)[name]
    assert one.time_exponent is not None
    assert one.time_exponent.slope == pytest.approx(1)
    assert one.memory_exponent is None, "only two of three are above 4 MiB"


def test_the_measured_file_holds_each_point_of_the_series_once() -> None:
    path = Path(scale.__file__).parent / "measured" / "scale.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    measured = [(line["series"], line["asked"]) for line in lines]
    assert sorted(measured) == sorted((name, size) for name, one in SERIES.items() for size in one.sizes)


# What the measurements led to ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [InterpretableOptimizer, LSTMOptimizer])
def test_a_step_in_place_keeps_no_index_of_coordinates(kind: type[Any]) -> None:
    """The index is eight bytes per parameter, as much as Adam's state."""
    shapes = tuple(map(torch.Size, SHAPES))
    layout_of.cache_clear()
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    kind(gradient_source="gradient").torch_optimizer(params, total_steps=10).step()
    layout = layout_of(shapes, False)
    assert "tensor_of_coordinate" not in vars(layout)
    assert torch.equal(layout.tensor_of_coordinate.bincount(), torch.tensor([math.prod(shape) for shape in shapes]))


def test_the_interpretable_rule_acts_on_shards_by_rows_as_on_the_whole() -> None:
    """What docs/scale.md builds on: nothing but the streams is exchanged between owners of shards."""
    draw_ = torch.Generator().manual_seed(0)
    rule = InterpretableOptimizer(gradient_source="gradient")
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=draw_))
    start = [0.1 * torch.randn(shape, generator=draw_) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=draw_) for shape in SHAPES] for _ in range(5)]

    def trained(owner: slice, parts: int) -> list[torch.Tensor]:
        params = [nn.Parameter(torch.cat(p.chunk(parts)[owner]).clone()) for p in start]
        optimizer = rule.torch_optimizer(params, total_steps=50)
        for step in gradients:
            for p, g in zip(params, step, strict=True):
                p.grad = torch.cat(g.chunk(parts)[owner]).clone()
            optimizer.step()
        return [p.detach() for p in params]

    whole = trained(slice(None), 1)
    shards = [trained(slice(owner, owner + 1), 4) for owner in range(4)]
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(whole, start, strict=True))
    for number, expected in enumerate(whole):
        assert torch.equal(torch.cat([shard[number] for shard in shards]), expected)


@pytest.mark.parametrize("survivors_only", [True, False])
def test_an_evaluation_counts_survivors_batch_by_batch(survivors_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextmanager
    def listening(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield lambda count, text="": told.append(text)

    monkeypatch.setattr(_evaluate, "progress_bar", listening)
    ball = ThreatModel(norm="linf", epsilon=0.04)
    weak = ThreatModel(norm="linf", epsilon=0.015)
    attacks = {name: PGD(threat_model=one, steps=5, loss="margin") for name, one in (("one", weak), ("two", ball))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = mlp([64, 16, 10]).eval(), torch.rand(50, 64)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[3] = (y[3] + 1) % 10
    report = evaluate(
        model, (x, y), threat_model=ball, attacks=attacks, batch_size=8, survivors_only=survivors_only, reliability_checks=False
    )
    after_one = float(((report.broken_by != 0) & (report.clean_predictions == y)).double().mean())
    assert 0 < report.worst_case_accuracy < after_one < 0.98, "otherwise nothing was counted"
    lasts = [[text for text in told if text.startswith(f"{name}: ")][-1] for name in attacks]
    assert lasts == [f"one: {after_one:.3f} robust", f"two: {report.worst_case_accuracy:.3f} robust"]

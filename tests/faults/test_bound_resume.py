"""A sweep of bounds that stops after any radius ends as one that did not, and refuses the file of another sweep."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from metarobust.bounds import RiskBound, _bound, risk_curve
from metarobust.command_line import main

EPSILONS = [0.2, 0.05, 0.3]


class Died(Exception):
    pass


def points() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(3, (40,), generator=draw)
    return torch.rand(40, 3, generator=draw) * 0.6 + 0.2 * y[:, None], y


def sweep(checkpoint: Path | None = None, **changes: Any) -> list[RiskBound]:
    x, y = points()
    arguments: dict[str, Any] = {"x": x, "y": y, "norm": "l2", "epsilons": EPSILONS, "checkpoint": checkpoint}
    return risk_curve(**arguments | changes)


def assert_same(found: list[RiskBound], expected: list[RiskBound]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.as_dict() | {"seconds": 0} == b.as_dict() | {"seconds": 0}
        assert torch.equal(a.potentials, b.potentials)
        assert torch.equal(a.guarantees, b.guarantees)
        assert torch.equal(a.classifier()(points()[0]), b.classifier()(points()[0]))
        assert all(torch.equal(left, right) for left, right in zip(a.attack(), b.attack(), strict=True))


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_sweep_that_died_at_any_radius(method: str, finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, path = sweep(method=method), tmp_path / "bounds.checkpoint"
    calls, real = [], _bound.prove

    def mortal(*arguments: Any) -> Any:
        if len(calls) == finished:
            raise Died
        calls.append(0)
        return real(*arguments)

    monkeypatch.setattr(_bound, "prove", mortal)
    with pytest.raises(Died):
        sweep(path, method=method)
    assert path.exists() == (finished > 0)
    calls[:] = [0] * 10
    assert_same(sweep(path, method=method), expected)
    assert len(calls) == 10 + len(EPSILONS) - finished, "no radius that is finished is solved again"
    assert_same(sweep(path, method=method), expected)
    assert len(calls) == 10 + len(EPSILONS) - finished


def test_what_the_solver_said_is_said_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _bound.prove
    monkeypatch.setattr(_bound, "prove", lambda *a: real(*a)._replace(warnings=["it did not converge"]))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sweep(tmp_path / "bounds.checkpoint")
        assert [str(each.message) for each in said] == 3 * ["it did not converge"]
        assert {each.filename for each in said} == {__file__}, "where the sweep was asked for"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"y": 2 - points()[1]}, "got other data"),
        ({"norm": "linf"}, "got norm l2 there and linf here"),
        ({"order": 2}, "got order auto there and 2 here"),
        ({"method": "sinkhorn"}, "got method exact there and sinkhorn here"),
        ({"epsilons": [0.2, 0.05]}, r"got epsilons \[0.2, 0.05, 0.3\] there and \[0.2, 0.05\] here"),
        ({"closed": False, "most_sets": 7}, "got closed True there and False here, most_sets 5000000 there and 7 here"),
        ({"weights": torch.arange(40.0)}, "got other weights"),
    ],
)
def test_another_sweep_is_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "bounds.checkpoint"
    sweep(path)
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=f"^checkpoint .* must be of this same sweep, {text}; write another path, or delete"):
        sweep(path, **changes)
    assert path.read_bytes() == kept


def test_places_where_no_file_can_stand(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make the folder .*missing first"):
        sweep(tmp_path / "missing" / "bounds.checkpoint")
    with pytest.raises(ValueError, match="checkpoint must be a file, got the folder"):
        sweep(tmp_path)


def test_the_command_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bound", "--data", "digits", "--examples", "60", "--epsilons", "0.5,1", "--device", "cpu", "--out", "out"]
    real = _bound.prove

    def interrupted(*arguments: Any) -> Any:
        if os.path.exists("out/bounds.checkpoint"):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(_bound, "prove", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 130
    assert "the finished radii are kept in out/bounds.checkpoint: run the same command again to go on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words[:-1], "out", "--order", "2"])
    assert "of this same sweep, got order auto there and 2 here" in capsys.readouterr().err
    monkeypatch.setattr(_bound, "prove", real)
    main(words)
    assert capsys.readouterr().out.startswith("going on from out/bounds.checkpoint\n")
    assert sorted(os.listdir("out")) == ["bounds.json", "bounds.md", "bounds.png"]

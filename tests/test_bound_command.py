"""``metarobust bound`` as a user meets it: table, files, figure, model reports on the axes, one-sentence errors."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from metarobust.bounds import plot_curve, risk_curve
from metarobust.bounds._figures import COLOURS, GREY
from metarobust.command_line import main
from metarobust.data import load
from metarobust.evaluation import evaluate
from metarobust.threat_models import ThreatModel

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs the command inside this process; gives exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    np.savez("line.npz", images=np.array([0.0, 0.4, 1.0]).reshape(3, 1, 1), labels=np.array([0, 1, 1]))

    def run(*more: str, keep: bool = False, **flags: Any) -> tuple[int, str, str]:
        if not keep:  # of the run before in the same test
            Path("out/bounds.json").unlink(missing_ok=True)
        chosen = {"data": "line.npz", "epsilons": "0.1,0.2,0.5", "out": "out", "device": "cpu"} | flags
        arguments = [word for name, v in chosen.items() if v is not None for word in ("--" + name.replace("_", "-"), str(v))]
        code = 0
        try:
            main(["bound", *arguments, *more])
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def written() -> dict[str, Any]:
    return json.loads(Path("out/bounds.json").read_text())


def test_known_values_table_and_files(shell: Shell) -> None:
    code, out, err = shell()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "3 points of line.npz; l_2; method exact"
    found = [re.split(r"\s*│\s*", line.strip("│ \n"))[:7] for line in lines if line.startswith("│")]
    assert found == [
        ["0.1", "0.000000", "0.000000", "yes", "2", "0", "0"],
        ["0.2", "0.333333", "0.333333", "yes", "2", "1", "1"],
        ["0.5", "0.333333", "0.333333", "yes", "2", "2", "1"],
    ]
    text = " ".join(out.split())
    expected = "1.0000 at epsilon 0.1, 0.6667 at epsilon 0.2, 0.6667 at epsilon 0.5"
    assert f"Best possible robust accuracy on these points (1 - risk): {expected}." in text
    assert "The bound is for these points (the empirical distribution), not for the population" in text
    assert lines[-1] == "wrote bounds.json, bounds.md and bounds.png to out"
    assert sorted(p.name for p in Path("out").iterdir()) == ["bounds.json", "bounds.md", "bounds.png"]
    content = written()
    told = {"name": "line.npz", "part": None, "classes": None, "examples": 3}
    assert content["data"] == told | {"digest": content["data"]["digest"]}
    assert [bound["lower"] for bound in content["bounds"]] == pytest.approx([0, 1 / 3, 1 / 3])
    assert [bound["best_robust_accuracy"] for bound in content["bounds"]] == pytest.approx([1, 2 / 3, 2 / 3])
    assert "empirical distribution" in content["scope"]
    markdown = Path("out/bounds.md").read_text()
    assert "| 0.2 | 0.333333 | 0.333333 | yes | 2 | 1 | 1 |" in markdown
    assert "empirical distribution" in markdown


def test_bounds_of_other_points_or_settings_are_not_overwritten(shell: Shell) -> None:
    shell()
    first = Path("out/bounds.json").read_text()
    assert shell(keep=True)[0] == 0, "the same again"
    np.savez("other.npz", images=np.array([0.0, 0.3, 1.0]).reshape(3, 1, 1), labels=np.array([0, 1, 1]))
    for flags in ({"norm": "linf"}, {"epsilons": "0.1"}, {"data": "other.npz"}):
        code, out, err = shell(keep=True, **flags)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1] == (
            "metarobust: --out must be a folder without other bounds, got out, whose bounds.json is of other points or settings; "
            "pass another --out, or move it away"
        )
    assert json.loads(Path("out/bounds.json").read_text())["data"] == json.loads(first)["data"]
    assert written()["settings"]["norm"] == "l2"


def test_epsilons_come_in_any_order_and_as_fractions(shell: Shell) -> None:
    assert shell(epsilons="0.5, 1/5,0.5,1/10")[0] == 0
    assert [bound["epsilon"] for bound in written()["bounds"]] == [0.1, 0.2, 0.5]


def test_ties_are_left_out_on_demand(shell: Shell) -> None:
    code, out, _ = shell("--no-closed")
    assert code == 0
    assert [bound["lower"] for bound in written()["bounds"]] == pytest.approx([0, 0, 1 / 3])
    assert [bound["ties"] for bound in written()["bounds"]] == [0, 1, 1]
    assert "not counted as conflicts" in out


def test_a_named_data_set_is_bounded_on_the_part_classes_and_examples_asked_for(shell: Shell) -> None:
    """Digits, against the library on the same rows."""
    for flags, train, classes, count in (
        ({}, False, None, 697),
        ({"part": "train", "examples": 300}, True, None, 300),
        ({"part": "test", "classes": "8, 3", "examples": 100, "norm": "linf"}, False, (3, 8), 100),
    ):
        norm = flags.get("norm", "l2")
        code, out, _ = shell(data="digits", epsilons="0.4,0.9", order="2", **flags)
        assert code == 0
        data = load("digits", train=train)
        kept = torch.arange(len(data)) if classes is None else torch.isin(data.labels, torch.tensor(classes)).nonzero()[:, 0]
        points = data.select(kept[:count])
        assert len(points) == count
        expected = risk_curve(points.images, points.labels, norm=norm, epsilons=[0.4, 0.9], order=2)
        found = written()
        for bound, own in zip(found["bounds"], expected, strict=True):
            del bound["best_robust_accuracy"], bound["seconds"]
            assert bound == {name: value for name, value in own.as_dict().items() if name != "seconds"}
        part = "train" if train else "test"
        told = {"name": "digits", "part": part, "classes": list(classes) if classes else None, "examples": count}
        assert told.items() <= found["data"].items()
        assert out.startswith(f"{count} points of digits, {part} part" + (", classes 3, 8" if classes else "") + "; ")


def test_order_is_passed_on(shell: Shell) -> None:
    images, labels = np.full((3, 1, 1), 0.5), np.arange(3)
    np.savez("same.npz", images=images, labels=labels)
    for order, lower in (("2", 1 / 2), ("3", 2 / 3), ("auto", 2 / 3)):
        code, out, _ = shell(data="same.npz", epsilons="0", order=order)
        assert code == 0
        (bound,) = written()["bounds"]
        assert (bound["lower"], bound["exact"]) == (pytest.approx(lower), order != "2")
        said = " ".join(out.split())
        assert ("between 0.3333 and 0.5000 at epsilon 0" in said) == (order == "2")
        assert ("stays open where sets of more than 2 points were left out" in said) == (order == "2")


def test_remarks_appear_where_there_is_something_to_remark(shell: Shell) -> None:
    rng = np.random.default_rng(0)
    np.savez("crowd.npz", images=rng.random((60, 1, 2)), labels=np.arange(60) % 6)
    open_ = "the search for larger sets reached --most-sets: raise it"
    for most_sets, remark in ((1, True), (5_000_000, False)):
        _, out, _ = shell(data="crowd.npz", norm="linf", epsilons="0.2", most_sets=most_sets)
        assert (open_ in " ".join(out.split())) == remark
        assert "Ties are pairs" not in out
    _, out, _ = shell(data="crowd.npz", classes="3", epsilons="0.2")
    assert "No two points of different classes are close enough" in " ".join(out.split())
    assert written()["bounds"][0]["lower"] == 0


# Model reports beside the bound ---------------------------------------------------------------------------------------


def a_report(name: str, epsilon: float, accuracy: float, **settings: Any) -> str:
    """What of a report counts here, as ``metarobust evaluate --json`` writes it."""
    examples = settings.pop("examples", 3)
    box = {"norm": "l2", "epsilon": epsilon, "lower": 0.0, "upper": 1.0} | settings
    Path(name).write_text(json.dumps({"settings": box, "worst_case_accuracy": accuracy, "examples": examples}))
    return name


def test_reports_are_compared_with_the_bound_that_holds_at_their_epsilon(shell: Shell) -> None:
    names = a_report("a.json", 0.2, 0.5), a_report("b.json", 0.3, 0.25), a_report("c.json", 0.05, 1.0)
    code, out, err = shell(reports=",".join(names))
    assert (code, err) == (0, "")
    third = pytest.approx(1 / 3)
    assert [tuple(row.values()) for row in written()["models"]] == [
        ("a", 0.2, 0.5, 3, None, False, third, 0.2, pytest.approx(1 / 6)),
        ("b", 0.3, 0.75, 3, None, False, third, 0.2, pytest.approx(5 / 12)),
        ("c", 0.05, 0.0, 3, None, False, None, None, None),
    ]
    named = {"name", "epsilon", "risk", "examples", "data", "other_points", "lower_bound", "lower_bound_at", "difference"}
    assert set(written()["models"][0]) == named
    text = " ".join(out.split())
    assert "a: measured robust risk 0.5000 at epsilon 0.2; any classifier's is at least 0.3333 (bound at epsilon 0.2)." in text
    assert "c: measured robust risk 0.0000 at epsilon 0.05; no bound was computed up to there." in text


def test_what_does_not_fit_together_is_said(shell: Shell) -> None:
    names = a_report("weak.json", 0.2, 0.9), a_report("other.json", 0.2, 0.9, examples=10)
    code, out, err = shell(reports=", ".join(names))
    assert code == 0
    assert "at epsilon 0.2; measured on other points than the bound's." in " ".join(out.split())
    assert [row["lower_bound"] for row in written()["models"]] == [pytest.approx(1 / 3), None]
    weak, other = err.splitlines()
    assert weak == (
        "metarobust: weak has a measured robust risk of 0.1000 at epsilon 0.2, below the 0.3333 of every classifier on these "
        "points: its attacks missed examples, or its points are others"
    )
    assert other == (
        "metarobust: other was measured on 10 examples, the bound is for 3 points: they say nothing about each other"
    )
    assert written()["doubts"] == [weak.removeprefix("metarobust: "), other.removeprefix("metarobust: ")]


def test_a_report_of_evaluate_is_read(shell: Shell) -> None:
    x, y = torch.tensor([[[[0.0]]], [[[0.4]]], [[[1.0]]]]), torch.tensor([0, 1, 1])

    def model(v: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.3 - v.flatten(1), v.flatten(1)], 1)

    report = evaluate(model, (x, y), threat_model=ThreatModel(norm="l2", epsilon=0.2), protocol="quick")
    report.to_json("net.json")
    assert shell(reports="net.json")[0] == 0
    (row,) = written()["models"]
    assert (row["name"], row["epsilon"], row["risk"]) == ("net", 0.2, pytest.approx(1 - report.worst_case_accuracy))
    bounded = report.with_distance_to_bound().distance_to_bound
    assert bounded is not None
    assert row["difference"] == pytest.approx(bounded.difference)
    assert not row["other_points"]
    other = evaluate(model, (x, y.flip(0)), threat_model=ThreatModel(norm="l2", epsilon=0.2), protocol="quick")
    other.to_json("other.json")  # as many examples, with other labels
    code, _, err = shell(reports="other.json")
    assert code == 0
    assert "other was measured on other examples than the bound's points: they say nothing about each other" in err
    assert written()["models"][0]["lower_bound"] is None


def test_reports_with_one_name_in_two_folders_stay_apart(shell: Shell) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        a_report(f"{folder}/net.json", 0.2, 0.5)
    assert shell(reports="a/net.json,b/net.json")[0] == 0
    assert [row["name"] for row in written()["models"]] == ["a/net", "b/net"]


# What is wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"epsilons": "0.1,x"}, "--epsilons must be a number such as 0.3 or 8/255, got 'x'"),
        ({"epsilons": ","}, "--epsilons must be at least one number, got ','; write --epsilons 0.5,1"),
        ({"epsilons": "0.1,nan"}, "--epsilons must be finite numbers >= 0, got nan"),
        ({"epsilons": "inf"}, "--epsilons must be finite numbers >= 0, got inf"),
        ({"epsilons": "8", "norm": "linf"}, "--epsilons must be at most 1 for linf, .*, got 8; .* write 8/255"),
        ({"norm": "l1"}, ".*(must be one of|invalid choice:?) .*'l1'.*"),
        ({"order": "1"}, "--order must be auto or an integer >= 2, got '1'"),
        ({"order": "two"}, "--order must be auto or an integer >= 2, got 'two'"),
        ({"examples": 0}, "--examples must be an integer >= 1, got 0"),
        ({"classes": "3,seven"}, "--classes must be class numbers with commas between, got '3,seven'; write --classes 3,7"),
        ({"classes": "1,5"}, "--classes must be among those of the data, 0, 1, got 5"),
        ({"part": "train"}, "--part must be left out for an .npz file, which has no parts, got train"),
        ({"data": "letters"}, "--data letters: name must be one of 'digits', .*, got 'letters'; for data of your own pass .*"),
        ({"data": "none.npz"}, "--data must name a file that exists, got none.npz"),
        ({"data": "empty.npz"}, "--data must have at least one example, got none in empty.npz"),
        ({"device": "tpu"}, "--device must be cpu, or a device that this machine has, got 'tpu'"),
        ({"out": "line.npz"}, r"--out must be a folder that can .*, got line.npz \(File exists\); pass another folder"),
        ({"reports": "none.json"}, "--reports must name files that exist, got none.json"),
        ({"reports": "line.npz"}, r"--reports must be reports that .* wrote, got line.npz, which is none"),
        ({"reports": "list.json"}, r"--reports must be reports that .* wrote, got list.json, which is none"),
        ({"reports": "half.json"}, r"--reports must be reports that .* wrote, got half.json, which is none"),
        ({"reports": "linf.json"}, "--reports must be of the bound's norm, l2, got linf.json, .* of linf; pass --norm linf"),
        ({"reports": "box.json"}, r"--reports must be of inputs in \[0, 1\], .*, got box.json with the box \[-1, 1\]; .*"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_no_file(shell: Shell, flags: dict[str, Any], sentence: str) -> None:
    np.savez("empty.npz", images=np.zeros((0, 1, 1)), labels=np.zeros(0, dtype=np.int64))
    Path("list.json").write_text("[1, 2]")
    Path("half.json").write_text("{}")
    a_report("linf.json", 0.1, 0.5, norm="linf")
    a_report("box.json", 0.1, 0.5, lower=-1.0)
    code, out, err = shell(**flags)
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("metarobust: ")
    assert re.fullmatch(sentence, line.removeprefix("metarobust: ")), line
    assert not Path("out").exists()


def test_part_root_and_download_are_passed_on_and_absence_is_a_sentence(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stand_in(name: str, *, train: bool, root: Path | None, download: bool) -> Any:
        asked.append((name, train, root, download))
        if root is None:
            raise FileNotFoundError("no such root")
        return load("digits", train=False)

    monkeypatch.setattr("metarobust.command_line._points.load", stand_in)
    assert shell("--download", data="mnist", root="/somewhere", part="train", examples=20)[0] == 0
    assert asked == [("mnist", True, Path("/somewhere"), True)]
    code, _, err = shell(data="mnist")
    remedy = "pass --root or set METAROBUST_DATA to a folder that has it, or pass --download"
    assert (code, err) == (2, f"metarobust: --data mnist is not in the data root; {remedy}\n")
    assert asked[1] == ("mnist", False, None, False)


def test_an_interrupt_leaves_no_half_file(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    assert shell(epsilons="0.2")[0] == 0
    before = written()
    monkeypatch.setattr("metarobust.command_line._bound_run.risk_curve", interrupted)
    code, _, err = shell(keep=True, epsilons="0.2")
    assert code == 130
    assert err.startswith("metarobust: interrupted")
    assert written() == before


def test_help_names_the_flags_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom metarobust.command_line import main\n"
        "try:\n    main(['bound', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'scipy', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    for flag in ("--epsilons", "--part", "--classes", "--order", "--method", "--no-closed", "--reports", "--out"):
        assert flag in done.stdout


# The figure ------------------------------------------------------------------------------------------------------------


def pixels_of(path: Path, colour: str) -> int:
    picture = np.asarray(matplotlib.image.imread(path))[..., :3]
    return int((np.abs(picture - np.array(to_rgb(colour))).max(2) < 0.02).sum())


def test_figure_shows_the_steps_and_the_models(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails
    picture = Path("out/bounds.png")
    assert shell()[0] == 0
    assert pixels_of(picture, GREY) > 10_000, "a third of the plane is out of reach"
    assert pixels_of(picture, COLOURS[0]) == 0
    names = a_report("a.json", 0.2, 0.5), a_report("b.json", 0.3, 0.25)
    assert shell(reports=",".join(names))[0] == 0
    assert pixels_of(picture, COLOURS[0]) > 50
    assert pixels_of(picture, COLOURS[1]) > 50
    assert shell(epsilons="0.01")[0] == 0
    assert pixels_of(picture, GREY) < 5000, "no conflict: only the legend's sample is grey"


def test_curve_of_one_radius_open_brackets_and_other_formats(tmp_path: Path) -> None:
    x, y = torch.full((3, 1), 0.5), torch.arange(3)
    curve = risk_curve(x, y, norm="linf", epsilons=[0.0], order=2)
    assert not curve[0].exact
    models = [("net", 0.0, 0.7), ("net", 0.1, 0.9)]
    assert plot_curve(curve, tmp_path / "curve.svg", models=models).read_text().lstrip().startswith("<?xml")
    assert plot_curve(curve, str(tmp_path / "curve.png")).stat().st_size > 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.png", "curve.svg"]


def test_curve_refuses_what_belongs_to_no_one_figure(tmp_path: Path) -> None:
    x, y = torch.tensor([[0.0], [0.4], [1.0]]), torch.tensor([0, 1, 1])
    curve = risk_curve(x, y, norm="l2", epsilons=[0.1, 0.2])
    with pytest.raises(ValueError, match="bounds must be at least one RiskBound, got none"):
        plot_curve([], tmp_path / "curve.png")
    with pytest.raises(ValueError, match="bounds must be of one norm and on the same points"):
        plot_curve(curve + risk_curve(x, y, norm="linf", epsilons=[0.1]), tmp_path / "curve.png")
    with pytest.raises(ValueError, match="bounds must be of one norm and on the same points"):
        plot_curve(curve + risk_curve(x[:2], y[:2], norm="l2", epsilons=[0.3]), tmp_path / "curve.png")
    with pytest.raises(ValueError, match="path must be a file that ends in one of .*write curve.png"):
        plot_curve(curve, tmp_path / "curve.txt")
    assert list(tmp_path.iterdir()) == []

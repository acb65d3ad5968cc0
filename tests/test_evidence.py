"""The page of evidence follows from the files of the benchmarks, and its verdicts from the figures."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks._transfer_runs import joined
from benchmarks.evidence import _claims, _findings, _speed
from benchmarks.evidence._catalogue import CATALOGUE, ROOT, Measured
from benchmarks.evidence._page import anchor, page, put_into, six

MEASURED = ROOT / "benchmarks" / "measured"


def claim(name: str) -> _findings.Claim:
    (found,) = (c for paper in _claims.PAPERS for c in paper.claims if c.name == name)
    return found


def test_the_page_and_the_readme_are_what_the_files_say() -> None:
    measured = Measured(MEASURED)
    remedy = "run: uv run python -m benchmarks --from benchmarks/measured"
    assert (ROOT / "docs" / "evidence.md").read_text() == page(measured), remedy
    assert put_into(ROOT / "README.md", six(measured)) == (ROOT / "README.md").read_text(), remedy


def test_the_readme_has_six_figures_and_each_leads_to_its_place() -> None:
    block = six(Measured(MEASURED))
    links = re.findall(r"docs/evidence\.md#([a-z0-9-]+)", block)
    places = {anchor(line.lstrip("# ")) for line in page(Measured(MEASURED)).splitlines() if line.startswith("#")}
    assert len(links) == 6
    assert set(links) <= places


def test_an_empty_folder_measures_nothing(tmp_path: Path) -> None:
    told = page(Measured(tmp_path))
    claims = sum(len(paper.claims) for paper in _claims.PAPERS)
    assert told.count("Verdict: not measured.") == claims
    assert _speed.bars(Measured(tmp_path)) == []
    assert "0 of 0 bars" in told


def test_every_command_of_the_catalogue_is_one_of_the_repository() -> None:
    for measurement in CATALOGUE.values():
        words = measurement.command.split()
        file = ROOT / (words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0])
        assert file.is_file(), measurement.command
        source = file.read_text()
        for flag in (word for word in words if word.startswith("--")):
            name = flag.removeprefix("--").replace("-", "_")
            assert f'"{flag}"' in source or re.search(rf"\b{name}: ", source), f"{file.name} has no {flag}"


@pytest.mark.parametrize(("gain", "verdict"), [(0.02, _findings.SHOWN), (-0.02, _findings.OPPOSITE)])
def test_the_verdict_on_armor_follows_the_figures(tmp_path: Path, gain: float, verdict: str) -> None:
    folder = tmp_path / "objectives"
    folder.mkdir()
    for data in ("mnist", "cifar10"):
        for name in ("at", "trades", "mart", "udr", "beta"):
            for seed in range(2):
                for with_armor in (False, True):
                    run = {"objective": f"armor-{name}" if with_armor else name, "data": data, "seed": seed, "setting": "cpu"}
                    accuracy = {"standard": 0.5 + (gain if with_armor else 0.0)}
                    text = json.dumps({"run": run, "best": accuracy, "last": accuracy})
                    (folder / f"cpu-{data}-{run['objective']}-{seed}.json").write_text(text)
    finding = claim("ARMOR adds robustness to UDR, TRADES and MART").measured(Measured(tmp_path))
    assert finding is not None
    assert finding.verdict == verdict
    assert f"{100 * gain:+.1f}" in finding.sentences[0]


def test_the_verdict_on_transfer_follows_the_figures(tmp_path: Path) -> None:
    source = [json.loads(line) for line in (MEASURED / "transfer.jsonl").read_text().splitlines()]
    for row in source:
        if row["method"] == "robust-small-v1":
            for report in row["reports"]:
                report["robust"] = 1.0
    (tmp_path / "transfer.jsonl").write_text("\n".join(json.dumps(row) for row in source))
    carried = claim("Robustness is carried to new models and data").measured(Measured(tmp_path))
    needed = claim("No new adversarial examples are needed").measured(Measured(tmp_path))
    assert carried is not None
    assert needed is not None
    assert carried.verdict == needed.verdict == _findings.SHOWN


def test_groups_of_seeds_are_put_together_once() -> None:
    row = {"target": "t", "method": "m", "seeds": 2, "settings": {"steps": 3}, "reports": [1, 2]}
    both = joined([row, row | {"first": 2, "settings": {"steps": 4}, "reports": [3, 4]}])["t"]["m"]
    assert both == {"seeds": 4, "settings": [{"steps": 3}, {"steps": 4}], "reports": [1, 2, 3, 4]}
    with pytest.raises(ValueError, match=r"seeds \[0, 1\] of m on t are there twice; delete one of the lines"):
        joined([row, row])


def test_a_bar_is_met_on_its_own_side() -> None:
    at_most = _speed.Bar("a", "b", 1.5, 1.4, 1.6, 1.4, True, "dual")
    at_least = _speed.Bar("a", "b", 1.5, 1.4, 1.6, 1.4, False, "dual")
    assert not at_most.met
    assert at_least.met
    assert at_most.strain > 1 > at_least.strain


def test_the_readme_keeps_everything_round_its_figures(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    before, after = readme.read_text().split("<!-- evidence", 1)[0], readme.read_text().split("<!-- end of evidence -->", 1)[1]
    renewed = put_into(readme, six(Measured(tmp_path)))
    assert renewed.startswith(before)
    assert renewed.endswith(after)
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="must hold the two lines"):
        put_into(readme, "")

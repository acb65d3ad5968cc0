"""Examples and the README's library example run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from metarobust.attacks import PGD
from metarobust.data import load

ROOT = Path(__file__).parents[1]
NEEDS = {"lightning_meta_optimizer": "lightning"}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example_runs_quickly_and_is_short(example: Path, tmp_path: Path) -> None:
    if (needed := NEEDS.get(example.stem)) and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; write `uv run --group interop pytest tests/test_examples.py`")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example), "--quick"],
        capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "robust" in done.stdout
    for left in tmp_path.iterdir():
        assert f"wrote {left.name}" in done.stdout
        assert left.name in (ROOT / ".gitignore").read_text().split()
    assert len(example.read_text().splitlines()) <= 150


@pytest.mark.parametrize("example", sorted(NEEDS))
def test_an_example_without_its_library_says_so_in_one_sentence(example: str, tmp_path: Path) -> None:
    path = str(ROOT / "examples" / f"{example}.py")
    code = f"import runpy, sys; sys.modules[{NEEDS[example]!r}] = None; runpy.run_path({path!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(rf"this example needs .* write pip install {NEEDS[example]}\n", done.stderr), done.stderr


def test_readme_library_example_prints_what_it_says(tmp_path: Path) -> None:
    """The first python block of the README gives the first text block; seconds are left out, they vary."""
    readme = (ROOT / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    shown = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)[0]
    assert len(code.strip().splitlines()) <= 20
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + code],
        capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = ("clean", "apgd-ce-50", "alternating", "square-300")
    for word in words:
        promised, found = (re.search(rf"│ {word} +│ +[0-9]+ │ +[0-9]+ │ +([0-9.]+)", text) for text in (shown, done.stdout))
        assert promised is not None, word
        assert found is not None, word
        assert float(found.group(1)) == pytest.approx(float(promised.group(1)), abs=0.02), word


def test_readme_bounds_example_prints_what_it_says(tmp_path: Path) -> None:
    """The block about bounds gives the second text block, to the digit: the bounds are exact."""
    readme = (ROOT / "README.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "adversarial_risk_bound" in c]
    shown = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


def test_readme_training_example_runs(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "import fit" in c]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"best epoch [0-9]+, robust ([0-9.]+)\n", done.stdout)
    assert found is not None, done.stdout
    assert float(found.group(1)) > 0.6


def test_no_page_is_left_unfinished() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    assert [page.name for page in pages if re.search(r"\b(TABLE|RESULTS|EXPECTED|TODO|TIME)\b", page.read_text())] == []


def test_readme_training_commands_run(tmp_path: Path) -> None:
    """The block of `metarobust train` trains, and the model that it writes can be evaluated as it says."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [b for b in blocks if "metarobust train" in b]
    program = "import sys; from metarobust.command_line import main; main(sys.argv[1:])"
    for line in block.strip().replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("uv run metarobust "))
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, *words],
            capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "worst case" in done.stdout


def test_readme_learned_optimizer_example_trains_a_robust_network() -> None:
    """The block about the shipped meta-optimizer, as it stands: attacked test digits stay right far beyond clean training."""
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if "robust-small" in c]
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(compile(code, "README.md", "exec"), names)
    attack, test = PGD(threat_model=names["threat_model"], steps=20), load("digits", train=False)
    x_adv = attack(names["model"], test.images, test.labels, generator=torch.Generator().manual_seed(0))
    assert (names["model"](x_adv).argmax(1) == test.labels).float().mean() > 0.55  # Adam on the same images: about 0.45

"""Examples, the README's blocks and those of the how-tos run as they stand."""

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
README = ROOT / "README.md"
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))


def blocks(page: Path, language: str = "python") -> list[str]:
    """The code of a page, block by block."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in a process of its own, warnings as errors; it must succeed."""
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return done


def execute(code: str, page: Path, names: dict[str, Any]) -> None:
    """A block in this process, which has imported the library already; ``names`` go on from block to block."""
    with torch.random.fork_rng():
        exec(compile(code, page.name, "exec"), names)


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
    code, shown = blocks(README)[0], blocks(README, "text")[0]
    assert len(code.strip().splitlines()) <= 20
    printed = run(["-c", "import torch; torch.set_num_threads(1)\n" + code], tmp_path).stdout
    words = ("clean", "apgd-ce-50", "alternating", "square-300")
    for word in words:
        promised, found = (re.search(rf"│ {word} +│ +[0-9]+ │ +[0-9]+ │ +([0-9.]+)", text) for text in (shown, printed))
        assert promised is not None, word
        assert found is not None, word
        assert float(found.group(1)) == pytest.approx(float(promised.group(1)), abs=0.02), word


def test_readme_bounds_example_prints_what_it_says(tmp_path: Path) -> None:
    """The block about bounds gives the second text block, to the digit: the bounds are exact."""
    (code,) = [c for c in blocks(README) if "adversarial_risk_bound" in c]
    assert run(["-c", code], tmp_path).stdout == blocks(README, "text")[1]


def test_readme_training_example_runs(tmp_path: Path) -> None:
    (code,) = [c for c in blocks(README) if "import fit" in c]
    printed = run(["-c", code], tmp_path).stdout
    found = re.fullmatch(r"best epoch [0-9]+, robust ([0-9.]+)\n", printed)
    assert found is not None, printed
    assert float(found.group(1)) > 0.6


@pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")  # Foolbox
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # Lightning
@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_how_to_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every python block of the page, one after the other; a page about a library that is not installed is skipped."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for code in blocks(page):
        try:
            execute(code, page, names)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("metarobust"):
                raise
            pytest.skip(f"{page.name} needs {error.name}")


@pytest.mark.slow
def test_how_to_script_runs_in_two_processes(tmp_path: Path) -> None:
    """The script of the page about several GPUs, as its command starts it; on a CPU the processes talk over gloo."""
    (code,) = blocks(ROOT / "docs" / "how-to" / "several_gpus.md")
    (tmp_path / "train.py").write_text(code)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    lines = run(launcher, tmp_path).stdout.splitlines()
    assert [re.sub(r"[0-9.]+$", "", line) for line in lines] == ["robust on validation: "]
    assert float(lines[0].split()[-1]) > 0.5


def test_no_page_is_left_unfinished() -> None:
    pages = [README, ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    assert [page.name for page in pages if re.search(r"\b(TABLE|RESULTS|EXPECTED|TODO|TIME)\b", page.read_text())] == []


def test_readme_training_commands_run(tmp_path: Path) -> None:
    """The block of `metarobust train` trains, and the model that it writes can be evaluated as it says."""
    (block,) = [b for b in blocks(README, "bash") if "metarobust train" in b]
    program = "import sys; from metarobust.command_line import main; main(sys.argv[1:])"
    printed = ""
    for line in block.strip().replace("\\\n", " ").splitlines():
        printed = run(["-c", program, *shlex.split(line.removeprefix("uv run metarobust "))], tmp_path).stdout
    assert "worst case" in printed


def test_readme_learned_optimizer_example_trains_a_robust_network() -> None:
    """The block about the shipped meta-optimizer, as it stands: attacked test digits stay right far beyond clean training."""
    (code,) = [c for c in blocks(README) if "robust-small" in c]
    names: dict[str, Any] = {}
    execute(code, README, names)
    attack, test = PGD(threat_model=names["threat_model"], steps=20), load("digits", train=False)
    x_adv = attack(names["model"], test.images, test.labels, generator=torch.Generator().manual_seed(0))
    assert (names["model"](x_adv).argmax(1) == test.labels).float().mean() > 0.55  # Adam on the same images: about 0.45

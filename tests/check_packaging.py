"""Builds the wheel, installs it beside nothing but its requirements, and checks it there; prints one line per environment.

    uv run python tests/check_packaging.py                                    # every Python and resolution that is at hand
    uv run python tests/check_packaging.py --python 3.11 --resolution highest

For each Python and each resolution (the newest versions; the lowest that pyproject.toml allows) a fresh environment gets the
wheel without learn2learn, and no source tree is in reach. Checked are: `metarobust --version`; the demo, which must say in one
sentence how to get learn2learn; the import of every module; an evaluation, a bound and the shipped meta-optimizer on the digits;
and a few files of the tests. Once, pyright reads the types of the installed wheel for a project that uses them.
"""

import argparse
import email
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS, RESOLUTIONS = ("3.11", "3.12", "3.13"), ("highest", "lowest-direct")
TESTS = (
    "test_threat_models.py",
    "test_dro.py",
    "test_bounds_parts.py",
    "test_update_rules.py",
    "test_models.py",
    "test_losses.py",
)

USE = """
import importlib, pkgutil
import metarobust
assert ROOT not in metarobust.__file__, metarobust.__file__
for module in pkgutil.walk_packages(metarobust.__path__, "metarobust."):
    importlib.import_module(module.name)
import torch
import torch.nn.functional as F
from metarobust.bounds import adversarial_risk_bound
from metarobust.data import load
from metarobust.evaluation import evaluate
from metarobust.meta_optimizers import load as load_optimizer
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel
torch.set_num_threads(1)
torch.manual_seed(0)
digits, test, ball = load("digits", train=True), load("digits", train=False), ThreatModel(epsilon=0.1)
model = mlp([64, 32, 10])
optimizer = load_optimizer("robust-small-v1").torch_optimizer(model.parameters(), total_steps=30, threat_model=ball)
for _ in range(30):
    optimizer.zero_grad()
    with optimizer.record_factors(model) as recorder:
        recorder.backward(F.cross_entropy(model(digits.images), digits.labels))
    optimizer.step()
report = evaluate(model.eval(), test.select(torch.arange(100)), threat_model=ball, protocol="quick")
assert 0.1 < report.worst_case_accuracy < report.clean_accuracy, report
bound = adversarial_risk_bound(test.images[:60], test.labels[:60], ThreatModel(epsilon=0.5))
assert 0 <= bound.lower <= bound.upper <= 1, bound
"""

GOOD = """
from metarobust.attacks import PGD
from metarobust.evaluation import RobustnessReport, evaluate
from metarobust.threat_models import ThreatModel
from torch import Tensor, nn

def judge(model: nn.Module, x: Tensor, y: Tensor) -> float:
    attack = PGD(threat_model=ThreatModel(norm="l2", epsilon=0.5), steps=10)
    report: RobustnessReport = evaluate(model, (x, y), threat_model=attack.threat_model, attacks={"pgd": attack})
    return report.worst_case_accuracy
"""
BAD = """
from metarobust.attacks import PGD
from metarobust.evaluation import RobustnessReport
from metarobust.threat_models import ThreatModel

def judge(report: RobustnessReport) -> str:
    PGD(threat_model=ThreatModel(norm="l3", epsilon=0.5), steps="ten")
    return report.worst_case_accuracy
"""


class Failed(Exception):
    """A check did not hold; the text says which."""


def run(*command: str, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "METAROBUST_DATA": str(cwd)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    if done.returncode != expect:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-15:]
        raise Failed(f"{' '.join(command)[:120]} ended with {done.returncode}, expected {expect}:\n" + "\n".join(last))
    return done


def build(folder: Path) -> Path:
    """The wheel, with what must be in it and without what must not."""
    run("uv", "build", "--quiet", "--wheel", "--out-dir", str(folder), str(ROOT), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = ("metarobust/py.typed", "metarobust/meta_optimizers/trained/robust-small-v1.safetensors", "licenses/LICENSE")
    missing = [name for name in wanted if not any(held.endswith(name) for held in names)]
    if missing:
        raise Failed(f"the wheel has no {', '.join(missing)}")
    foreign = [name for name in names if not name.startswith(("metarobust/", "metarobust-")) or "test" in Path(name).name]
    if foreign:
        raise Failed(f"the wheel has {', '.join(foreign[:5])}, which does not belong in it")
    return wheel


def requirements(wheel: Path) -> list[str]:
    """What the wheel asks for, without its extras; `lowest-direct` lowers only what is asked for by name."""
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    told = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
    return [line for line in told if "extra ==" not in line]


def check(wheel: Path, python: str, resolution: str, folder: Path) -> str:
    """What a fresh environment says; `Failed` if anything does not hold."""
    environment, work = folder / "environment", folder / "work"
    work.mkdir(parents=True)
    try:
        run("uv", "venv", "--quiet", "--no-project", "--python", python, str(environment), cwd=folder)
    except Failed as failure:
        if "No interpreter found" in str(failure) or "ownload" in str(failure):
            return "not run: no such interpreter here"
        raise
    interpreter = str(environment / "bin" / "python")
    install = ("uv", "pip", "install", "--quiet", "--python", interpreter, "--only-binary", ":all:")
    run(*install, "--resolution", resolution, str(wheel), *requirements(wheel), cwd=work)
    program = str(environment / "bin" / "metarobust")
    told = run(program, "--version", cwd=work).stdout
    said = run(program, "demo", "--quick", "--out", str(work / "demo"), cwd=work, expect=2).stderr.strip()
    if len(said.splitlines()) != 1 or "pip install learn2learn==0.2.0" not in said:
        raise Failed(f"the demo without learn2learn must say in one sentence how to get it, said {said!r}")
    run(interpreter, "-c", f"ROOT = {str(ROOT)!r}\n{USE}", cwd=work)
    run(*install, "pytest>=8.2", "hypothesis>=6.100", cwd=work)
    (work / "tests").mkdir()
    for name in (*TESTS, "conftest.py"):
        shutil.copy(ROOT / "tests" / name, work / "tests")
    shutil.copy(ROOT / "conftest.py", work)
    passed = run(interpreter, "-m", "pytest", "-q", "tests", cwd=work).stdout.strip().splitlines()[-1]
    torch = next(word for word in told.replace(",", " ").split("torch ", 1)[1].split())
    bound = next(line for line in requirements(wheel) if line.startswith("torch>=")).removeprefix("torch>=")
    if resolution == "lowest-direct" and not torch.startswith(bound):
        raise Failed(f"the lowest torch is {bound}, but {torch} was installed")
    return f"passed with torch {torch}: {passed.strip('= ')}"


def check_types(wheel: Path, folder: Path) -> str:
    """pyright finds nothing in a right program and three errors in a wrong one, by the installed wheel alone."""
    environment, work = folder / "environment", folder / "work"
    work.mkdir(parents=True)
    run("uv", "venv", "--quiet", "--no-project", str(environment), cwd=folder)
    run("uv", "pip", "install", "--quiet", "--python", str(environment), str(wheel), cwd=work)
    for name, text in (("good", GOOD), ("bad", BAD)):
        (work / f"{name}.py").write_text(text)
    pyright = (sys.executable, "-m", "pyright", "--pythonpath", str(environment / "bin" / "python"))
    run(*pyright, "good.py", cwd=work)
    found = run(*pyright, "bad.py", cwd=work, expect=1).stdout
    missing = [word for word in ("'l3'", "'ten'", 'return type "str"', "3 errors") if word not in found]
    if missing:
        raise Failed(f"pyright must report {missing} in a wrong program, reported {found}")
    return "passed: 0 errors in a right program, 3 in a wrong one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    parser.add_argument("--resolution", nargs="+", default=RESOLUTIONS, choices=RESOLUTIONS)
    parser.add_argument("--skip-types", action="store_true")
    arguments = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            wheel = build(folder)
        except Failed as failure:
            sys.exit(f"the wheel failed: {failure}")
        print(f"| python | resolution | {wheel.name} |\n|---|---|---|", flush=True)
        rows = [(python, resolution) for python in arguments.python for resolution in arguments.resolution]
        rows += [] if arguments.skip_types else [("types", "highest")]
        tested = 0
        for python, resolution in rows:
            place = folder / f"{python}-{resolution}"
            try:
                outcome = check_types(wheel, place) if python == "types" else check(wheel, python, resolution, place)
                tested += python != "types" and outcome.startswith("passed")
            except Failed as failure:
                failures += 1
                outcome = f"FAILED: {failure}"
            shutil.rmtree(place, ignore_errors=True)
            print(f"| {python} | {resolution} | {outcome} |", flush=True)
    if failures or not tested:
        sys.exit(f"{failures} of {len(rows)} failed, {tested} ran")


if __name__ == "__main__":
    main()

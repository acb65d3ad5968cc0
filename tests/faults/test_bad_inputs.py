"""Every public callable refuses bad input with one sentence: what was expected, what came, what to write instead."""

import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bad_commands
import bad_inputs_attacks
import bad_inputs_data
import bad_inputs_meta
import bad_inputs_numbers
import bad_inputs_training
import pytest
import torch
from bad_inputs import BadInput

import metarobust
from metarobust import data
from metarobust.command_line import main
from metarobust.threat_models import ThreatModel

TABLES = (bad_inputs_numbers, bad_inputs_data, bad_inputs_attacks, bad_inputs_training, bad_inputs_meta)
ROWS: list[BadInput] = [row for table in TABLES for row in table.ROWS]

RESULT = "a result, filled in by the library"
PROTOCOL = "a protocol, which nobody calls"
NOTHING = "takes no argument that could be bad"
WITHOUT_A_ROW = {
    "attacks.CallCounter": RESULT,
    "attacks.TransportSearch": RESULT,
    "attacks.count_calls": NOTHING,
    "command_line.main": "its words have a table of their own, bad_commands.py",
    "data.NoisyLabels": RESULT,
    "data.Pools": RESULT,
    "data.import_learn2learn": NOTHING,
    "data.load_digits": NOTHING,
    "divergences.Divergence": PROTOCOL,
    "divergences.Tilt": RESULT,
    "dro.WorstCase": RESULT,
    "evaluation.ClassErrors": RESULT,
    "evaluation.ClassSummary": RESULT,
    "evaluation.DistanceToBound": RESULT,
    "evaluation.Doubt": RESULT,
    "evaluation.ErrorSummary": RESULT,
    "meta_optimizers.Calibration": RESULT,
    "meta_optimizers.FactorGradients": RESULT,
    "meta_optimizers.Generation": RESULT,
    "meta_optimizers.InterpretableState": RESULT,
    "meta_optimizers.LSTMState": RESULT,
    "meta_optimizers.MetaTraining": RESULT,
    "meta_optimizers.gradients_only": NOTHING,
    "meta_weighters.PerturbationBound": PROTOCOL,
    "meta_weighters.HeldOutErrors": RESULT,
    "meta_weighters.Hypergradient": RESULT,
    "meta_weighters.MetaStep": RESULT,
    "meta_weighters.VirtualUpdate": RESULT,
    "meta_weighters.Weighting": RESULT,
    "objectives.ARMORLoss": RESULT,
    "objectives.BallLoss": PROTOCOL,
    "objectives.PairLoss": PROTOCOL,
    "training.EpochRecord": RESULT,
    "training.initialise_from_environment": "reads the environment that torchrun sets",
    "transport_costs.TransportCost": PROTOCOL,
    "types.Attack": PROTOCOL,
    "types.Batch": "a pair, checked where it is used",
    "types.RobustLoss": PROTOCOL,
    "types.Streams": RESULT,
    "types.Task": PROTOCOL,
}
LIBRARY_INTERNALS = re.compile(r"\b(aten|mat1|unhashable|__init__|not subscriptable|has no attribute)\b")
CAUSE = re.compile(r"\(.*\)")


def public_callables() -> Iterator[str]:
    """Every function and class of every public module, as ``attacks.PGD``."""
    folder = Path(metarobust.__file__).parent
    for path in sorted([*folder.glob("[!_]*.py"), *folder.glob("[!_]*/__init__.py")]):
        module = path.parent.name if path.name == "__init__.py" else path.stem
        found = importlib.import_module(f"metarobust.{module}")
        for name in found.__all__:
            if inspect.isclass(getattr(found, name)) or inspect.isfunction(getattr(found, name)):
                yield f"{module}.{name}"


def test_every_public_callable_has_a_row() -> None:
    covered = {row.of for row in ROWS}
    everything = set(public_callables())
    missing = sorted(everything - covered - WITHOUT_A_ROW.keys())
    assert not missing, f"no bad input is tried on {', '.join(missing)}"
    assert not covered - everything, "rows of names that are not public"
    assert not WITHOUT_A_ROW.keys() - everything, "exceptions of names that are not public"
    assert not WITHOUT_A_ROW.keys() & covered, "exceptions that have a row by now"


def test_rows_are_many_and_distinct() -> None:
    assert len(ROWS) >= 250
    assert len({(row.of, row.case) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.of}: {row.case}" for row in ROWS])
def test_bad_input_is_one_sentence(row: BadInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(row.error) as raised:
        row.call()
    assert type(raised.value) is row.error
    said = str(raised.value.args[0])
    assert re.fullmatch(re.escape(row.sentence).replace(r"\.\.\.", ".*"), said), said
    assert "\n" not in said
    # What another library said may stand in brackets, as the cause; the sentence itself is ours.
    assert not LIBRARY_INTERNALS.search(CAUSE.sub("", said)), said
    assert list(tmp_path.iterdir()) == [], "a refused call left a file"


class Shell(NamedTuple):
    code: Any
    out: str
    err: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    bad_commands.prepare(folder)
    return folder


@pytest.mark.parametrize(("words", "sentence"), bad_commands.ROWS, ids=[words for words, _ in bad_commands.ROWS])
def test_bad_command_is_one_sentence(
    words: str, sentence: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(words))
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err == f"metarobust: {sentence}\n"
    assert "Traceback" not in said.err + said.out
    assert sorted(path for path in files.iterdir() if path.name != "__pycache__") == before, "a refused command left a file"


def test_values_are_looked_at_once_per_attack_and_not_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at values makes a GPU wait: its number must not grow with the steps. Types and shapes cost nothing."""
    from bad_inputs import X, Y, network

    from metarobust.attacks import PGD

    looks = 0
    original = torch.aminmax

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal looks
        looks += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "aminmax", watched)
    found = []
    for steps in (1, 10):
        looks = 0
        PGD(threat_model=ThreatModel(epsilon=0.1), steps=steps)(network(), X, Y)
        found.append(looks)
    assert found[0] == found[1] > 0


@pytest.mark.gpu
def test_tensors_on_two_devices_are_one_sentence() -> None:
    from bad_inputs import X, Y, generator, network, pgd

    where = torch.device("cuda", 0)
    cases = {
        "model must be on the device of x, cpu, got cuda:0; write model.to('cpu'), or x.to('cuda:0') and y.to('cuda:0')": (
            lambda: pgd()(network().to(where), X, Y)
        ),
        "y must be on the device of x, cuda:0, got cpu; write y.to('cuda:0')": lambda: pgd()(network().to(where), X.to(where), Y),
        (
            "generator must be a torch.Generator on the CPU, got one on cuda; write torch.Generator().manual_seed(seed), "
            "which serves data on every device"
        ): lambda: data.minibatch(bad_inputs_data.labelled(), 2, generator=torch.Generator("cuda")),
    }
    for sentence, call in cases.items():
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call()
    assert pgd()(network(), X, Y, generator=generator()).shape == X.shape

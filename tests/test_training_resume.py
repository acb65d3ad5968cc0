"""Checkpoints of a training run: whenever it dies, it ends with the bits of a run that did not."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import training_killed
from safetensors.torch import load_file
from torch import Tensor, nn
from training_setting import (
    NOISY,
    PLAIN,
    THREAT_MODEL,
    Recorded,
    Scalar,
    assert_equal_states,
    data,
    network,
    sgd,
    train,
    without_seconds,
)

from metarobust._tensor_files import read_tensors, write_tensors
from metarobust.attacks import PGD
from metarobust.meta_optimizers import LSTMOptimizer
from metarobust.objectives import TRADES
from metarobust.training import TrainingResult, cosine
from metarobust.training import _checkpoint as checkpoint_module
from metarobust.training._checkpoint import Checkpoint


class Died(Exception):
    pass


def mortal(objective: Any, dies_at: int | None) -> Any:
    """An objective that raises at one of its calls, and otherwise is the one inside."""
    calls: list[int] = []

    class Mortal:
        def __repr__(self) -> str:
            return repr(objective)

        def __call__(self, *batch: Any, **more: Any) -> Any:
            if len(calls) == dies_at:
                raise Died
            calls.append(0)
            return objective(*batch, **more)

    return Mortal()


def learned(parameters: Any) -> torch.optim.Optimizer:
    torch.manual_seed(5)
    return LSTMOptimizer(gradient_source="gradient", hidden_size=3).torch_optimizer(parameters, total_steps=9)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    "learned": learned,
}


def resumable(optimizer: str, path: Path | None, dies_at: int | None = None, start: int = 0, **changes: Any) -> TrainingResult:
    model = network(full=True, seed=start)
    arguments: dict[str, Any] = {
        "epochs": 3, "optimizer": OPTIMIZERS[optimizer](model.parameters()), "schedule": cosine, "clip_norm": 1.0,
        "validation": data(9, 1), "validation_attack": NOISY.attack, "checkpoint": path, "checkpoint_seconds": 0.0,
        "augment": lambda x, generator: (x + 0.01 * torch.rand(x.shape, generator=generator)).clamp(0, 1),
    }  # fmt: skip
    objective = mortal(changes.pop("objective", NOISY), dies_at)
    return train(model, objective, **(arguments | changes))


def assert_same_outcome(found: TrainingResult, expected: TrainingResult) -> None:
    assert without_seconds(found) == without_seconds(expected)
    assert found.best_epoch == expected.best_epoch
    assert_equal_states(found.last, expected.last)
    assert_equal_states(found.best or {}, expected.best or {})


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step, whatever the clock says."""
    monkeypatch.setattr(Checkpoint, "save_sometimes", Checkpoint.save)


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_died_at_any_step_ends_with_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    expected = resumable(optimizer, None)
    for dies_at in range(9) if optimizer == "sgd" else (1, 4):
        path = tmp_path / f"{dies_at}.safetensors"
        with pytest.raises(Died):
            resumable(optimizer, path, dies_at)
        # Another network, whose parameters the file must replace; and no step that is done is done again.
        assert_same_outcome(resumable(optimizer, path, start=1 if dies_at else 0), expected)
        assert_same_outcome(resumable(optimizer, path, dies_at=0), expected)


@pytest.mark.usefixtures("every_step")
def test_the_state_of_an_optimizer_keeps_its_own_precision(tmp_path: Path) -> None:
    """A learned rule computes in float32 for a model in float64, and load_state_dict of torch would cast its state."""

    def run(objective: Any, path: Path | None) -> TrainingResult:
        model = network().double()
        return train(model, objective, data(dtype=torch.float64), optimizer=learned(model.parameters()), checkpoint=path)

    with pytest.raises(Died):
        run(mortal(NOISY, 4), tmp_path / "run.safetensors")
    assert_same_outcome(run(NOISY, tmp_path / "run.safetensors"), run(NOISY, None))


def with_diagnostics(model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Scalar:
    losses = NOISY(model, x, y, generator=generator)
    return Scalar(losses.mean(), {"largest": losses.max().item()})


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("amp", [False, "bfloat16"])
def test_a_run_that_dies_at_every_step_and_after_every_epoch(amp: Any, tmp_path: Path) -> None:
    more = {"amp": amp, "objective": with_diagnostics}
    expected, path = resumable("adam", None, **more), tmp_path / "run.safetensors"
    assert expected.history[0].diagnostics["largest"] > expected.history[0].loss
    seen: list[int] = []

    def dying(record: Any) -> None:
        seen.append(record.epoch)
        raise Died

    found, begin = None, time.perf_counter()
    for attempt in range(30):
        try:
            found = resumable("adam", path, dies_at=1, start=attempt, on_epoch=dying, **more)
            break
        except Died:
            pass
    assert found is not None
    assert_same_outcome(found, expected)
    assert 0 < sum(record.seconds for record in found.history) < time.perf_counter() - begin
    assert seen == [1, 2, 3], "each epoch is told once"
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("dies_at", range(3))
def test_a_run_that_died_while_it_was_validated(dies_at: int, tmp_path: Path) -> None:
    """Then no step of the epoch is left, and the epoch is still to be put into the history."""
    expected, path = resumable("sgd", None), tmp_path / "run.safetensors"
    with pytest.raises(Died):
        resumable("sgd", path, validation_attack=mortal(NOISY.attack, dies_at))
    assert_same_outcome(resumable("sgd", path), expected)


def test_a_run_without_a_checkpoint_within_the_epoch_repeats_it(tmp_path: Path) -> None:
    expected, path = resumable("sgd", None), tmp_path / "run.safetensors"
    with pytest.raises(Died):
        resumable("sgd", path, dies_at=5, checkpoint_seconds=1e9)
    calls = Recorded(NOISY)
    assert_same_outcome(resumable("sgd", path, checkpoint_seconds=1e9, objective=calls), expected)
    assert len(calls.x) == 6, "the second epoch from its start, and the third"


def test_how_often_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = checkpoint_module.write_tensors
    monkeypatch.setattr(checkpoint_module, "write_tensors", lambda *a: (written.append(a[2]["step"]), real(*a)))
    resumable("sgd", tmp_path / "run.safetensors", checkpoint_seconds=1e9)
    assert written == [1, 0, 0, 0], "after the first step, and after each epoch"
    first = resumable("sgd", tmp_path / "run.safetensors")
    second = resumable("sgd", tmp_path / "run.safetensors")
    assert len(written) == 4, "a finished run writes nothing"
    assert [r.seconds for r in first.history] == [r.seconds for r in second.history]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Real processes, real SIGKILL: see tests/training_killed.py."""
    command = [sys.executable, "-W", "error", training_killed.__file__, str(tmp_path), "0"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert int(outcome.stdout) >= 3, "otherwise the test tests nothing"
    expected = training_killed.train(None)
    assert_equal_states(load_file(tmp_path / "result" / "last.safetensors"), expected.last)
    assert_equal_states(load_file(tmp_path / "result" / "best.safetensors"), expected.best or {})
    told = json.loads((tmp_path / "result" / "history.json").read_text())
    assert [record | {"seconds": None} for record in told["history"]] == without_seconds(expected)
    assert told["best_epoch"] == expected.best_epoch


OTHER_RUNS = {
    "epochs": ({"epochs": 4}, "epochs 3 there and 4 here"),
    "seed": ({"seed": 7}, "seed 0 there and 7 here"),
    "batch_size": ({"batch_size": 9}, "batch_size 8 there and 9 here"),
    "clip_norm": ({"clip_norm": None}, "clip_norm 1.0 there and None here"),
    "amp": ({"amp": "bfloat16"}, "amp None there and bfloat16 here"),
    "schedule": ({"schedule": None}, "another schedule"),
    "augment": ({"augment": None}, "augment <function .* there and None here"),
    "validation": ({"validation": data(9, 2)}, "another validation"),
    "validation_attack": ({"validation_attack": PLAIN.attack}, "validation_attack PGD\\(thr.* there and FGSM\\("),
    "steps": ({"validation_attack": PGD(threat_model=THREAT_MODEL, steps=3)}, "validation_attack steps=2 there and steps=3 here"),
}


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    resumable("sgd", path)
    kept = path.read_bytes()
    for change, text in OTHER_RUNS.values():
        with pytest.raises(ValueError, match=f"checkpoint .* must be of this same training run, got {text}.*; write another"):
            resumable("sgd", path, **change)
    x, y = data()
    arguments = {"epochs": 3, "checkpoint": path}
    for examples in ((x, 2 - y), (x.flip(0), y)):
        model = network(full=True)
        with pytest.raises(ValueError, match="other data"):
            train(model, NOISY, examples, **arguments)
    for model, optimizer, text in (
        (network(), torch.optim.SGD, "another model"),
        (nn.Sequential(*network(full=True), nn.Identity()), torch.optim.SGD, "another model"),
        (network(full=True), torch.optim.Adam, "optimizer SGD there and Adam here"),
    ):
        with pytest.raises(ValueError, match=text):
            train(model, NOISY, optimizer=optimizer(model.parameters(), lr=0.1), **arguments)
    model = network(full=True)
    with pytest.raises(ValueError, match=r"optimizer.lr 0.1 there and 0.2 here, optimizer.momentum 0.9 there and 0.8 here"):
        train(model, NOISY, optimizer=sgd(model, lr=0.2, momentum=0.8, nesterov=True), **arguments)
    with pytest.raises(ValueError, match=r"objective AdversarialTraining\(.* there and TRADES"):
        train(model, TRADES(threat_model=THREAT_MODEL), **arguments)
    assert path.read_bytes() == kept


def test_the_same_function_is_told_alike_wherever_it_stands() -> None:
    """Not by the order of a set, which the hash seed decides, nor by the line it is written in; but by all that it computes."""
    text = "def f(x, g):\n    return [row.flip(0) if 'a' in {'a', 'b', 'c', 'd'} else row for row in x]"
    script = (
        "from metarobust.training._checkpoint import _told_function\n"
        "import sys\nspace = {}\nexec(compile(sys.argv[1], sys.argv[2], 'exec'), space)\nprint(_told_function(space['f']))"
    )
    told = []
    for seed, source in (("1", text), ("2", text), ("3", "# a comment\n\n" + text), ("4", text.replace("flip", "roll"))):
        command = [sys.executable, "-c", script, source, f"{seed}.py"]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        told.append(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert told[0] == told[1] == told[2] != told[3]

    def again(n: int) -> int:
        return n and again(n - 1)

    def others(n: int) -> int:
        return n and others(n - 2)

    assert checkpoint_module._told_function(again).split()[-1] != checkpoint_module._told_function(others).split()[-1]


def test_a_damaged_file_is_refused_and_executes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    resumable("sgd", path)
    whole = path.read_bytes()
    for broken in (whole[:-40], b"", b"\x80\x04cos\nsystem\n."):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="must be a safetensors file, got one that cannot be read"):
            resumable("sgd", path)
    path.write_bytes(whole.replace(b'"model.0.weight"', b'"model.9.weight"'))
    with pytest.raises(ValueError, match="checkpoint .* must be whole, got content that does not fit its checksum"):
        resumable("sgd", path)
    path.write_bytes(whole)
    tensors, header = read_tensors(path, expected=checkpoint_module.FORMAT)
    tensors["model.9.weight"] = tensors.pop("model.0.weight")
    write_tensors(path, tensors, header)
    with pytest.raises(ValueError, match="checkpoint .* must be whole, got parts that do not fit"):
        resumable("sgd", path)
    network_result = tmp_path / "other.safetensors"
    train(network()).save(tmp_path / "result")
    (tmp_path / "result" / "last.safetensors").rename(network_result)
    with pytest.raises(ValueError, match="must be a 'metarobust training run 1' file, got a 'metarobust weights 1' file"):
        resumable("sgd", network_result)


def test_a_state_that_is_no_tensor_or_number_is_refused(tmp_path: Path) -> None:
    class Listing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["past"] = [1, 2]
            return super().step(closure)

    model = network()
    with pytest.raises(
        TypeError, match="optimizer must be one whose state holds tensors and numbers only, got a list under 'past'"
    ):
        train(model, optimizer=Listing(model.parameters(), lr=0.1), checkpoint=tmp_path / "run.safetensors")


# On a GPU ------------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, "bfloat16", "float16"])
def test_gpu_runs_follow_the_cpu_and_resume(amp: Any, tmp_path: Path) -> None:
    def run(device: str, **more: Any) -> TrainingResult:
        model = network(full=True).to(device)
        model[3].p = 0.0
        return train(model, epochs=4, validation=data(9, 1), validation_attack=PLAIN.attack, **more)

    expected, found = run("cpu"), run("cuda", amp=amp)
    for mine, theirs in zip(found.history, expected.history, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4 if amp is False else 0.05)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Died):
        run("cuda", amp=amp, objective=mortal(PLAIN, 6), checkpoint=path)
    torch.testing.assert_close(run("cuda", amp=amp, checkpoint=path).last, found.last)


@gpu
@pytest.mark.gpu
def test_gpu_float16_skips_steps_that_overflow_and_at_last_refuses() -> None:
    model = network().cuda()
    start = copy.deepcopy(model.state_dict())
    calls: list[int] = []

    def objective(model: Any, x: Tensor, y: Tensor, *, generator: Any) -> Tensor:
        calls.append(0)
        losses = PLAIN(model, x, y, generator=generator)
        return losses + (0 * losses).sqrt() if len(calls) > 3 else losses

    train(model, objective, epochs=2, amp="float16")
    assert not torch.equal(model[0].weight, start["0.weight"])
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(FloatingPointError, match="a gradient of norm nan"):
        train(model, objective, epochs=40, amp="float16")

"""Checkpoints of an evaluation: an interrupted run ends bit-identical, a stored example is believed only after a look."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from metarobust._tensor_files import read_tensors, write_tensors
from metarobust.attacks import PGD
from metarobust.evaluation import RobustnessReport, evaluate
from metarobust.evaluation._resume import FORMAT, Checkpoint
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.08)
ARGUMENTS: dict[str, Any] = {"threat_model": THREAT_MODEL, "batch_size": 4, "reliability_checks": False}


@dataclasses.dataclass(repr=False)
class Counted:
    """PGD that counts its calls over all attacks of one evaluation, and dies at one of them."""

    name: str
    calls: list[str]
    dies_at: int | None = None
    last_words: Callable[[], None] = lambda: None
    steps: int = 3

    def __repr__(self) -> str:
        return f"Counted(name={self.name!r}, steps={self.steps})"

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        if len(self.calls) == self.dies_at:
            self.last_words()
            raise KeyboardInterrupt
        self.calls.append(f"{self.name} on {len(x)}")
        return PGD(threat_model=THREAT_MODEL, steps=self.steps, loss="margin")(model, x, y, generator=generator)


def attacks(calls: list[str], dies_at: int | None = None, **more: Any) -> dict[str, Counted]:
    return {name: Counted(name, calls, dies_at, **more) for name in ("first", "second", "third")}


def setting() -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, x = mlp([64, 16, 10]).eval(), torch.rand(18, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[3] = (y[3] + 1) % 10  # one example is wrong to begin with
    return model, (x, y)


def tensors_of(report: RobustnessReport) -> dict[str, Tensor]:
    named = ((f.name, getattr(report, f.name)) for f in dataclasses.fields(report))
    return {name: value for name, value in named if isinstance(value, Tensor)}


def assert_identical(report: RobustnessReport, expected: RobustnessReport) -> None:
    assert report == expected
    for name, value in tensors_of(report).items():
        assert torch.equal(value, tensors_of(expected)[name]), name


@pytest.mark.parametrize("survivors_only", [True, False])
def test_a_run_interrupted_anywhere_ends_as_an_uninterrupted_one(survivors_only: bool, tmp_path: Path) -> None:
    model, data = setting()
    arguments = ARGUMENTS | {"survivors_only": survivors_only, "reliability_checks": survivors_only}
    whole_calls: list[str] = []
    expected = evaluate(model, data, attacks=attacks(whole_calls), **arguments)
    assert len(set(whole_calls)) > 2
    assert 0 < expected.broken["first"] < expected.attacked["first"] == 17
    assert expected.broken["second"] > 0
    for dies_at in range(len(whole_calls)):
        path, calls = tmp_path / f"{dies_at}.safetensors", []
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, data, attacks=attacks(calls, dies_at), checkpoint=path, **arguments)
        assert calls == whole_calls[:dies_at]
        report = evaluate(model, data, attacks=attacks(calls), checkpoint=path, **arguments)
        assert calls == whole_calls, "every batch once: nothing repeated, nothing left out"
        assert_identical(report, expected)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"] * len(whole_calls), "no temporary files stay"


def test_many_interruptions_and_seconds_over_all_runs(tmp_path: Path) -> None:
    model, data = setting()
    expected = evaluate(model, data, attacks=attacks([]), **ARGUMENTS)
    calls: list[str] = []
    report, so_far = None, 0.0
    while report is None:
        try:
            report = evaluate(
                model, data, attacks=attacks(calls, len(calls) + 1), checkpoint=tmp_path / "run.safetensors", **ARGUMENTS
            )
        except KeyboardInterrupt:
            with safe_open(tmp_path / "run.safetensors", framework="pt") as file:
                seconds = json.loads(file.metadata()["metarobust_header"])["seconds"]
            assert sum(seconds[name] for name in ("first", "second", "third")) > so_far
            so_far = sum(seconds[name] for name in ("first", "second", "third"))
    assert_identical(report, expected)
    assert sum(report.seconds[name] for name in ("first", "second", "third")) > so_far


def test_a_finished_checkpoint_gives_the_report_without_an_attack(tmp_path: Path) -> None:
    model, data = setting()
    path = tmp_path / "run.safetensors"
    expected = evaluate(model, data, attacks=attacks([]), checkpoint=path, **ARGUMENTS)
    calls: list[str] = []
    report = evaluate(model, data, attacks=attacks(calls), checkpoint=str(path), **ARGUMENTS)
    assert calls == []
    assert_identical(report, expected)
    assert {k: report.seconds[k] for k in expected.attacks} == {k: expected.seconds[k] for k in expected.attacks}


def test_work_is_on_disk_before_an_end_without_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed cannot write anything more: only the batch that was running is lost."""
    model, data = setting()
    path, calls = tmp_path / "run.safetensors", []
    monkeypatch.setattr(Checkpoint, "save_sometimes", Checkpoint.save)
    with monkeypatch.context() as patch:
        killed = attacks(calls, 6, last_words=lambda: patch.setattr(Checkpoint, "save", lambda *_: None))
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, data, attacks=killed, checkpoint=path, **ARGUMENTS)
    evaluate(model, data, attacks=attacks(calls), checkpoint=path, **ARGUMENTS)
    whole_calls: list[str] = []
    evaluate(model, data, attacks=attacks(whole_calls), **ARGUMENTS)
    assert calls == whole_calls


def test_writing_is_rare_while_batches_are_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = setting()
    writes, save = [], Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, state: (writes.append(1), save(self, state)))
    evaluate(model, data, attacks=attacks([]), checkpoint=tmp_path / "run.safetensors", **ARGUMENTS)
    assert len(writes) == 2, "at the start and at the end"


# Trust: what stands in a file is checked ------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """A file that is whole in itself, with another content."""
    tensors, header = read_tensors(path, expected=FORMAT)
    change(tensors)
    write_tensors(path, tensors, header)


def test_stored_examples_that_do_not_verify_are_attacked_again(tmp_path: Path) -> None:
    """One that fools nobody and one outside the ball: both become survivors, are broken again, and the report says so."""
    model, data = setting()
    path = tmp_path / "run.safetensors"
    expected = evaluate(model, data, attacks=attacks([]), checkpoint=path, **ARGUMENTS)

    def change(tensors: dict[str, Tensor]) -> None:
        rows = tensors["rows"]
        tensors["adversarial"][0] = data[0][rows[0]]
        fooling = next(i for i in range(18) if expected.clean_predictions[i] != data[1][rows[1]])
        tensors["adversarial"][1] = data[0][fooling]

    rewrite(path, change)
    calls: list[str] = []
    report = evaluate(model, data, attacks=attacks(calls), checkpoint=path, **ARGUMENTS)
    assert 1 <= len(calls) <= 2 * 3
    assert all(call.endswith(("on 1", "on 2")) for call in calls), "only the two rows"
    (doubt,) = [doubt for doubt in report.warnings if doubt.check == "checkpoint"]
    assert f"2 of {sum(expected.broken.values())} adversarial examples in the checkpoint" in str(doubt)
    moved = (report.adversarial_examples - data[0]).abs().flatten(1).amax(1)
    assert (moved <= THREAT_MODEL.epsilon + 1e-6).all()
    with torch.no_grad():
        wrong = model(report.adversarial_examples).argmax(1) != data[1]
    assert torch.equal(wrong, report.broken_by != -1)
    again = evaluate(model, data, attacks=attacks(calls), checkpoint=path, **ARGUMENTS)
    assert [doubt for doubt in again.warnings if doubt.check == "checkpoint"] == [], "the repaired file is whole"


def test_examples_within_rounding_of_the_boundary_stay_broken(tmp_path: Path) -> None:
    """Matrix products round differently in batches of other sizes: wrong by a hair may come back as right by a hair."""

    def model(hair: float) -> Callable[[Tensor], Tensor]:
        return lambda x: x + torch.tensor([hair, 0.0])

    def touch(model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        calls.append(len(x))
        return torch.full_like(x, 0.5)

    calls: list[int] = []
    data = (torch.tensor([[0.55, 0.45], [0.53, 0.47]]), torch.tensor([0, 0]))
    arguments: dict[str, Any] = {"threat_model": THREAT_MODEL, "attacks": {"touch": touch}, "checkpoint": tmp_path / "run"}
    expected = evaluate(model(-1e-7), data, **arguments)
    assert expected.broken_by.tolist() == [0, 0]
    report = evaluate(model(1e-7), data, **arguments)
    assert calls == [2], "nothing was attacked again"
    assert report == expected


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 1}, "seed 0 there and 1 here"),
        ({"batch_size": 5}, "batch_size 4 there and 5 here"),
        ({"survivors_only": False}, "survivors_only True there and False here"),
        (
            {"threat_model": ThreatModel(norm="linf", epsilon=0.09)},
            r"threat_model ThreatModel\(.*epsilon=0.08.* there and ThreatModel\(.*epsilon=0.09.* here",
        ),
        ({"attacks": attacks([], steps=4)}, r"attacks first: Counted\(name='first', steps=3\) there and .* steps=4\) here"),
        ({"attacks": {"first": Counted("first", [])}}, "attacks first, second, third there and first here"),
    ],
)
def test_checkpoint_of_other_settings_is_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    model, data = setting()
    path = tmp_path / "run.safetensors"
    evaluate(model, data, checkpoint=path, **({"attacks": attacks([])} | ARGUMENTS))
    before = path.read_bytes()
    expected = f"must be of this same evaluation, got {text}; write another path, or delete the file to start again$"
    with pytest.raises(ValueError, match=expected):
        evaluate(model, data, checkpoint=path, **({"attacks": attacks([])} | ARGUMENTS | change))
    assert path.read_bytes() == before


def test_refusals_of_long_attacks_are_short(tmp_path: Path) -> None:
    model, data = setting()
    path = tmp_path / "run.safetensors"
    common: dict[str, Any] = {"checkpoint": path, "reliability_checks": False}
    evaluate(model, data, threat_model=THREAT_MODEL, protocol="quick", **common)
    other = ThreatModel(norm="linf", epsilon=0.09)
    with pytest.raises(ValueError, match=r"epsilon=0.09, lower=0.0, upper=1.0\) here, attacks .* here; write another") as error:
        evaluate(model, data, threat_model=other, protocol="standard", **common)
    assert len(str(error.value).replace(str(path), "")) < 400
    with pytest.raises(ValueError, match=r"epsilon=0.09, lower=0.0, upper=1.0\) here; write another") as error:
        evaluate(model, data, threat_model=other, protocol="quick", **common)
    path.unlink()
    evaluate(model, data, threat_model=THREAT_MODEL, attacks={"pgd": PGD(threat_model=THREAT_MODEL, steps=2)}, **common)
    with pytest.raises(ValueError, match="got attacks pgd: steps=2 there and steps=3 here; write another"):
        evaluate(model, data, threat_model=THREAT_MODEL, attacks={"pgd": PGD(threat_model=THREAT_MODEL, steps=3)}, **common)


def test_other_data_and_other_models_are_refused_but_rounding_is_not(tmp_path: Path) -> None:
    model, (x, y) = setting()
    path = tmp_path / "run.safetensors"
    arguments: dict[str, Any] = {"attacks": attacks([]), "checkpoint": path} | ARGUMENTS
    expected = evaluate(model, (x, y), **arguments)
    with pytest.raises(ValueError, match=r"got other data; write another path.*a DataLoader that shuffles .* shuffle=False$"):
        evaluate(model, (x.flip(0), y.flip(0)), **arguments)
    with pytest.raises(ValueError, match="got other data"):
        evaluate(model, (x, (y + (torch.arange(18) == 9)) % 10), **arguments)
    with pytest.raises(ValueError, match="got other logits on the clean data, from another model or one with random output"):
        evaluate(lambda v: model(v) * 1.001, (x, y), **arguments)
    assert evaluate(lambda v: model(v) * (1 + 1e-6), (x, y), **arguments).broken == expected.broken


def test_functions_in_an_attack_do_not_make_it_another_attack(tmp_path: Path) -> None:
    """The repr of a loss function holds its address, which is another one in the next process."""
    model, data = setting()
    path = tmp_path / "run.safetensors"

    def report() -> RobustnessReport:
        attack = PGD(threat_model=THREAT_MODEL, steps=2, loss=lambda logits, y: -logits.gather(1, y[:, None])[:, 0])
        assert " at 0x" in repr(attack)
        return evaluate(model, data, attacks={"pgd": attack}, checkpoint=path, **ARGUMENTS)

    assert_identical(report(), report())


# Files that are not what they should be -------------------------------------------------------------------------------


class Payload:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("loading a checkpoint executed code",))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\x00" * 100,
        lambda content: pickle.dumps(Payload()),
        lambda content: content.replace(b'{\\"', b"[[[", 1),
    ],
)
def test_a_damaged_file_is_one_sentence_and_is_kept(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    model, data = setting()
    path = tmp_path / "run.safetensors"
    evaluate(model, data, attacks=attacks([]), checkpoint=path, **ARGUMENTS)
    content = damage(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^checkpoint .*run.safetensors must be a safetensors file, got .*delete the file to start"
    ) as error:
        evaluate(model, data, attacks=attacks([]), checkpoint=path, **ARGUMENTS)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("outcomes"),
        lambda tensors: tensors.update(rows=tensors["rows"][1:]),
        lambda tensors: tensors.update(rows=tensors["rows"] + 100),
        lambda tensors: tensors.update(adversarial=tensors["adversarial"].double()),
        lambda tensors: tensors.update(predictions=tensors["predictions"][1:]),
        lambda tensors: tensors["outcomes"].clamp_(max=1),
        lambda tensors: tensors["outcomes"].add_(2),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    model, data = setting()
    path = tmp_path / "run.safetensors"
    evaluate(model, data, attacks=attacks([]), checkpoint=path, **ARGUMENTS)
    rewrite(path, change)
    with pytest.raises(ValueError, match="must be whole, got parts that do not fit together; write another path, or delete"):
        evaluate(model, data, attacks=attacks([]), checkpoint=path, **ARGUMENTS)


def test_a_claim_that_no_model_could_verify_is_under_the_checksum(tmp_path: Path) -> None:
    """That an attack failed, for an example that it never ran on."""
    model, data = setting()
    path = tmp_path / "run.safetensors"
    evaluate(model, data, attacks=attacks([]), checkpoint=path, **ARGUMENTS)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    assert (tensors["outcomes"][0] == 0).any()
    tensors["outcomes"][0].masked_fill_(tensors["outcomes"][0] == 0, 1)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="must be whole, got content that does not fit its checksum; write another path, or"):
        evaluate(model, data, attacks=attacks([]), checkpoint=path, **ARGUMENTS)


def test_a_safetensors_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    model, data = setting()
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match="must be a 'metarobust evaluation 1' file, got a safetensors file of another program"):
        evaluate(model, data, attacks=attacks([]), checkpoint=path, **ARGUMENTS)


def test_places_where_no_file_can_stand_are_refused_before_any_work(tmp_path: Path) -> None:
    _, data = setting()
    calls: list[int] = []

    def model(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.flatten(1)[:, :10]

    with pytest.raises(FileNotFoundError, match="make the folder .*missing first"):
        evaluate(model, data, attacks=attacks([]), checkpoint=tmp_path / "missing" / "run.safetensors", **ARGUMENTS)
    with pytest.raises(ValueError, match="checkpoint must be a file, got the folder"):
        evaluate(model, data, attacks=attacks([]), checkpoint=tmp_path, **ARGUMENTS)
    assert calls == []


def test_half_precision_examples_survive_the_file(tmp_path: Path) -> None:
    model, (x, y) = setting()
    model = model.to(torch.bfloat16)
    path, calls = tmp_path / "run.safetensors", []
    expected = evaluate(model, (x, y), attacks=attacks([]), **ARGUMENTS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, (x, y), attacks=attacks(calls, 7), checkpoint=path, **ARGUMENTS)
    assert_identical(evaluate(model, (x, y), attacks=attacks(calls), checkpoint=path, **ARGUMENTS), expected)
    assert load_file(path)["adversarial"].dtype == torch.float32

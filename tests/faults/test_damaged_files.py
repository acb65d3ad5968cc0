"""Every kind of file that the library reads, damaged in a thousand ways: the same content as before, or one sentence."""

import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from metarobust import _files
from metarobust._tensor_files import WEIGHTS, read_tensors, write_tensors
from metarobust.attacks import FGSM
from metarobust.bounds import risk_curve
from metarobust.command_line import main
from metarobust.command_line._bound_reports import read_reports
from metarobust.command_line._evaluate_run import load_weights
from metarobust.command_line._train import Train
from metarobust.command_line._train_files import ResultFiles
from metarobust.data import LabelledImages, load_npz
from metarobust.evaluation import evaluate
from metarobust.meta_optimizers import ClassificationTask, LSTMOptimizer, load, meta_train, save
from metarobust.objectives import AdversarialTraining
from metarobust.threat_models import ThreatModel
from metarobust.training import fit

BALL = ThreatModel(norm="linf", epsilon=0.1)
SENTENCES = (ValueError, TypeError, FileNotFoundError, KeyError)
"""What may be raised: with one sentence, and nothing else."""
QUICK, LONG = 12, 100
"""Generated cases per kind of file, in the default suite and in the slow one."""
SECONDS = 60
"""A reader that takes longer hangs; on an idle machine the slowest takes a tenth of a second."""
MEMORY = 500 * 2**20
"""Bytes that all hostile files of one kind together may cost."""


def points(count: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    return x, (2 * x[:, 0, 0, 0]).long()


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def state_of(model: nn.Module) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in model.state_dict().items()}


def training(path: Path) -> Any:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    objective = AdversarialTraining(attack=FGSM(threat_model=BALL))
    done = fit(model, objective, points(), optimizer=optimizer, epochs=2, batch_size=20, checkpoint=path, silent=True)
    return {name: value.tolist() for name, value in done.last.items()}, [record.loss for record in done.history]


def meta_training(path: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = LSTMOptimizer(hidden_size=3, gradient_source="gradient")

    def sample(generator: torch.Generator) -> ClassificationTask:
        pool = LabelledImages(*points(), num_classes=2)
        subsets = torch.randperm(40, generator=generator)[None, :20]
        return ClassificationTask(build=network, dataset=pool, subsets=subsets, threat_model=None, batch_size=5)

    done = meta_train(rule, sample, iterations=2, total_steps=2, unroll=1, slots=2, checkpoint=path, silent=True)
    return state_of(rule), done.losses


def meta_optimizer(path: Path) -> Any:
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save(LSTMOptimizer(hidden_size=3), path)
    rule = load(path)
    return state_of(rule), rule.settings, rule.record


def weights(path: Path) -> Any:
    if not path.exists():
        write_tensors(path, network().state_dict(), {"format": WEIGHTS})
    model = network()
    load_weights(model, path, "build")
    return state_of(model)


def torch_weights(path: Path) -> Any:
    if not path.exists():
        torch.save(network().state_dict(), path)
    return weights(path)


def evaluation(path: Path) -> Any:
    attacks = {"fgsm": FGSM(threat_model=BALL)}
    more: dict[str, Any] = {"threat_model": BALL, "attacks": attacks, "reliability_checks": False}
    report = evaluate(network(), points(), checkpoint=path, **more)
    return report.broken, report.adversarial_examples.tolist(), report.adversarial_predictions.tolist()


def report(path: Path) -> Any:
    if not path.exists():
        attacks = {"fgsm": FGSM(threat_model=BALL)}
        evaluate(network(), points(), threat_model=BALL, attacks=attacks, reliability_checks=False).to_json(path)
    return read_reports(str(path), "linf")


def record(path: Path) -> Any:
    """Of a training that was interrupted: another one is refused, and so is what nobody can tell from a stranger's file."""
    flags, files = Train(data="digits", epsilon="0.1", out=path.with_suffix(".safetensors")), ResultFiles(path.with_suffix(".x"))
    if not path.exists():
        files.write_record(flags, finished=False)
    return files.stage_to_begin(flags, None)


def bounds(path: Path) -> Any:
    x, y = points()
    curve = risk_curve(x, y, norm="l2", epsilons=[0.1, 0.3], checkpoint=path)
    return [(bound.lower, bound.upper, bound.guarantees.tolist(), bound.potentials.tolist()) for bound in curve]


def data(path: Path) -> Any:
    if not path.exists():
        x, y = points()
        images = (255 * x).byte().numpy().reshape(-1, 2, 3)
        np.savez_compressed(path, images=images, labels=y.numpy())
    found = load_npz(path)
    return found.images.tolist(), found.labels.tolist(), found.num_classes


@dataclass(frozen=True)
class Kind:
    """How a kind of file is written where it is missing and read where it is not, and whether a checksum covers it."""

    use: Callable[[Path], Any]
    name: str
    covered: bool = True


KINDS = {
    "training checkpoint": Kind(training, "run.safetensors"),
    "meta-training checkpoint": Kind(meta_training, "run.safetensors"),
    "meta-optimizer": Kind(meta_optimizer, "rule.safetensors"),
    "weights": Kind(weights, "net.safetensors"),
    "weights of torch.save": Kind(torch_weights, "net.pt", covered=False),
    "evaluation checkpoint": Kind(evaluation, "run.safetensors"),
    "report": Kind(report, "report.json", covered=False),
    "record of a training": Kind(record, "net.json", covered=False),
    "bounds checkpoint": Kind(bounds, "bounds.checkpoint"),
    "data": Kind(data, "data.npz"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, Any]]:
    """The bytes of a whole file of each kind, and what it says when it is read."""
    found = {}
    for kind, how in KINDS.items():
        path = tmp_path_factory.mktemp("whole") / how.name
        first = how.use(path)
        found[kind] = path.read_bytes(), how.use(path)
        assert found[kind][1] == first, "the file gives what was there without it"
    return found


# A thousand damages -----------------------------------------------------------------------------------------------------


def damaged(content: bytes, others: list[bytes], draw: random.Random) -> tuple[str, bytes]:
    """The content after one accident, and its name."""
    place, length = draw.randrange(len(content)), draw.randint(1, 200)
    end = min(len(content), place + length)
    flipped = bytearray(content)
    flipped[place] ^= 1 << draw.randrange(8)
    several = bytearray(content)
    for _ in range(draw.randint(2, 20)):
        several[draw.randrange(len(content))] = draw.randrange(256)
    accidents = {
        "a flipped bit": bytes(flipped),
        "several wrong bytes": bytes(several),
        "cut off": content[:place],
        "a block of zeros": content[:place] + bytes(end - place) + content[end:],
        "a block lost": content[:place] + content[end:],
        "a block twice": content[:end] + content[place:],
        "bytes appended": content + draw.randbytes(length),
        "bytes inserted": content[:place] + draw.randbytes(length) + content[place:],
        "noise": draw.randbytes(draw.randint(0, 2 * len(content))),
        "another kind": draw.choice(others),
    }
    name = draw.choice([*accidents, *["a flipped bit"] * 3])
    return name, accidents[name]


def outcome(how: Kind, path: Path, expected: Any) -> str:
    """``same``, ``sentence`` or ``another content``; anything else that is raised goes through."""

    def hangs(*_: Any) -> None:
        pytest.fail(f"reading took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        return "same" if how.use(path) == expected else "another content"
    except SENTENCES as error:
        said = error.args
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    (text,) = said
    assert "\n" not in text
    assert " must " in text or text.startswith(("no file at", "no meta-optimizer at")), text
    assert len(text) < 1000
    return "sentence"


def run_cases(kind: str, originals: dict[str, tuple[bytes, Any]], folder: Path, cases: range) -> Counter[str]:
    content, expected = originals[kind]
    others = [bytes_ for name, (bytes_, _) in originals.items() if name != kind]
    found: Counter[str] = Counter()
    for case in cases:
        accident, broken = damaged(content, others, random.Random(f"{kind} {case}"))
        path = folder / KINDS[kind].name
        path.write_bytes(broken)
        result = outcome(KINDS[kind], path, expected)
        if result == "same":
            assert broken == content or accident not in ("noise", "another kind", "cut off"), accident
        if KINDS[kind].covered:
            assert result != "another content", f"case {case}, {accident}: read as if nothing had happened"
        found[result] += 1
    return found


@each_kind
def test_damaged_files(kind: str, originals: dict[str, tuple[bytes, Any]], tmp_path: Path) -> None:
    found = run_cases(kind, originals, tmp_path, range(QUICK))
    assert found["sentence"] >= QUICK / 3, found


@pytest.mark.slow
@each_kind
def test_a_hundred_damages_each(
    kind: str, originals: dict[str, tuple[bytes, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_cases(kind, originals, tmp_path, range(LONG))
    with capsys.disabled():
        print(f"\n{kind}: {dict(found)}")
    assert found["sentence"] >= LONG / 3, found


@pytest.mark.parametrize("kind", [kind for kind, how in KINDS.items() if how.covered and how.name != "data.npz"])
def test_a_bit_in_a_number_is_noticed(kind: str, originals: dict[str, tuple[bytes, Any]], tmp_path: Path) -> None:
    """The last byte is always of a tensor: no structure is broken, the checksum alone can tell."""
    content, expected = originals[kind]
    path = tmp_path / KINDS[kind].name
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="must be whole, got content that does not fit its checksum; "):
        KINDS[kind].use(path)
    path.write_bytes(content)
    assert KINDS[kind].use(path) == expected


def test_files_without_a_checksum_are_read(tmp_path: Path, originals: dict[str, tuple[bytes, Any]]) -> None:
    """As those of earlier versions, and weights of other programs."""
    for kind in ("meta-optimizer", "weights"):
        content, expected = originals[kind]
        size = struct.unpack("<Q", content[:8])[0]
        head = json.loads(content[8 : 8 + size])
        header = json.loads(head["__metadata__"]["metarobust_header"])
        assert len(header.pop("checksum")) == 64
        head["__metadata__"]["metarobust_header"] = json.dumps(header)
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        path = tmp_path / KINDS[kind].name
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
        assert KINDS[kind].use(path) == expected


# Hostile files ----------------------------------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def npy(shape: str, descr: str = "|u1") -> bytes:
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head


def zipped(**members: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return held.getvalue()


def claiming(content: bytes, size: int) -> bytes:
    """A zip archive whose directory says that its members are so large."""
    place = content.index(b"PK\x01\x02")
    return content[: place + 24] + struct.pack("<I", size) + content[place + 28 :]


def tensors_with(head: dict[str, Any]) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text


DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "nothing": lambda mark: b"",
    "a pickle that runs code": lambda mark: pickle.dumps(Payload(mark)),
    "an archive with such a pickle": lambda mark: zipped(images=npy("(1,)", "|O") + pickle.dumps(Payload(mark)), labels=b""),
    "JSON nested 100,000 deep": lambda mark: DEEP.encode(),
    "a deep header": lambda mark: struct.pack("<Q", len(DEEP)) + DEEP.encode(),
    "a deep header of ours": lambda mark: safetensors_bytes({"a": torch.zeros(1)}, {"metarobust_header": DEEP}),
    "a header of 2^63 bytes": lambda mark: struct.pack("<Q", 2**63) + b"{}",
    "tensors of 10 TB": lambda mark: tensors_with({"a": {"dtype": "F32", "shape": [2500, 10**9], "data_offsets": [0, 10**13]}}),
    "a shape beyond 64 bits": lambda mark: tensors_with({"a": {"dtype": "F32", "shape": [2**63, 8], "data_offsets": [0, 0]}}),
    "arrays of 10 TB": lambda mark: zipped(images=npy(f"({10**13}, 1, 1)"), labels=npy("(1,)")),
    "members of 4 GB that are not": lambda mark: claiming(zipped(images=npy("(1, 1, 1)") + b"0", labels=npy("(1,)")), 2**32 - 2),
    "arrays of a deep shape": lambda mark: zipped(images=npy("(" * 3000 + ")" * 3000), labels=npy("(1,)")),
    "NaN": lambda mark: (
        b'{"settings": {"norm": "linf", "epsilon": NaN, "lower": 0, "upper": 1}, "worst_case_accuracy": NaN, '
        b'"examples": 40, "format": "metarobust train 1"}'
    ),
    "infinity": lambda mark: (
        b'{"settings": {"norm": "linf", "epsilon": 0.1, "lower": 0, "upper": 1}, "worst_case_accuracy": 0, "examples": 1e999}'
    ),
    "a number of 10,000 digits": lambda mark: b'{"examples": ' + b"9" * 10_000 + b"}",
    "another encoding": lambda mark: '{"settings": 1}'.encode("utf-16"),
}


@pytest.fixture
def little_memory_more() -> Iterator[None]:
    """Fails if the peak memory rises by much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    risen = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert risen < MEMORY, f"{risen / 2**20:.0f} MiB"


@pytest.mark.usefixtures("little_memory_more")
@each_kind
def test_hostile_files(kind: str, originals: dict[str, tuple[bytes, Any]], tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / KINDS[kind].name
    for name, build in HOSTILE.items():
        path.write_bytes(build(mark))
        assert outcome(KINDS[kind], path, originals[kind][1]) == "sentence", name
        assert not mark.exists(), f"{name}: code was executed"


@each_kind
def test_what_is_no_file(kind: str, originals: dict[str, tuple[bytes, Any]], tmp_path: Path) -> None:
    """A folder, a pipe that nobody writes to, a file of 10 TB that is a hole."""
    path, expected = tmp_path / KINDS[kind].name, originals[kind][1]
    path.mkdir()
    assert outcome(KINDS[kind], path, expected) == "sentence"
    path.rmdir()
    os.mkfifo(path)
    assert outcome(KINDS[kind], path, expected) == "sentence"
    path.unlink()
    path.write_bytes(originals[kind][0])
    os.truncate(path, 10**13)
    assert outcome(KINDS[kind], path, expected) == "sentence"


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 MB of zeros in 0.3 MB, on a machine that has, as far as the library is told, 100 MiB."""
    monkeypatch.setattr(_files.os, "sysconf", lambda name: 2**20 if name == "SC_PAGE_SIZE" else 100)
    path = tmp_path / "data.npz"
    path.write_bytes(zipped(images=npy("(300000, 1, 1000)") + bytes(300_000_000), labels=npy("(1,)")))
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match="must be no larger than this machine's memory, 0.1 GiB, got 0.3 GiB; it may be damaged"):
        load_npz(path)


def test_settings_that_claim_more_than_the_file_holds(tmp_path: Path) -> None:
    """An LSTM of a million units would take 16 TB; the file has tensors for 3."""
    save(LSTMOptimizer(hidden_size=3), tmp_path / "rule.safetensors")
    tensors, header = read_tensors(tmp_path / "rule.safetensors", expected=None)
    header["settings"]["hidden_size"] = 10**6
    write_tensors(tmp_path / "rule.safetensors", tensors, header)
    with pytest.raises(ValueError, match=r"must fit metarobust .*of shape \[.*000000.*, got \["):
        load(tmp_path / "rule.safetensors")


@pytest.mark.parametrize(
    ("words", "name", "content"),
    [
        ("bound --data digits --examples 5 --epsilons 0.1 --norm linf --reports FILE", "report.json", DEEP.encode()),
        ("bound --data FILE --epsilons 0.1", "data.npz", zipped(images=npy(f"({10**13}, 1, 1)"), labels=npy("(1,)"))),
        ("train --data digits --epsilon 0.1 --update FILE", "rule.safetensors", struct.pack("<Q", 2**63)),
        ("transfer --data digits --epsilon 0.1 --optimizer FILE", "rule.safetensors", b""),
    ],
)
def test_the_command_line_says_one_sentence(
    words: str, name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(words.replace("FILE", name).split())
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("metarobust: ")
    assert said.count("\n") == 1
    assert name in said

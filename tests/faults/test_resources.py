"""No room on the disk, a download that breaks off, no GPU, no memory left: survived or explained, and nothing lost."""

import errno
import functools
import gzip
import hashlib
import http.server
import json
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import datasets

from metarobust import _files
from metarobust._files import write_atomically
from metarobust._tensor_files import read_tensors, write_tensors
from metarobust.attacks import FGSM
from metarobust.attacks._memory import halving_on_out_of_memory
from metarobust.bounds import risk_curve
from metarobust.command_line import main
from metarobust.data import load
from metarobust.evaluation import evaluate
from metarobust.objectives import AdversarialTraining
from metarobust.threat_models import ThreatModel
from metarobust.training import fit

BALL = ThreatModel(norm="linf", epsilon=0.1)
NO_ROOM = "must be in a folder that can be written to, got 'No space left on device'; make room or pass another path; what was "


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval()


def points(count: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    return x, (2 * x[:, 0, 0, 0]).long()


def train(path: Path | None, objective: Any = None, epochs: int = 3) -> Any:
    model = network()
    return fit(
        model,
        objective or AdversarialTraining(attack=FGSM(threat_model=BALL)),
        points(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        epochs=epochs,
        batch_size=20,
        checkpoint=path,
        checkpoint_seconds=0.0,
        silent=True,
    )


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# A full disk ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While its entry is True, flushing a file fails as on a full disk, after half of it was written."""
    state = [False]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if state[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(_files.os, "fsync", fsync)
    return state


def test_a_full_disk_stops_a_training_with_a_sentence_and_keeps_its_checkpoint(tmp_path: Path, full: list[bool]) -> None:
    path, calls = tmp_path / "run.safetensors", []
    plain = AdversarialTraining(attack=FGSM(threat_model=BALL))

    class Filling:
        def __repr__(self) -> str:
            return repr(plain)

        def __call__(self, *batch: Any, **more: Any) -> Tensor:
            calls.append(0)
            full[0] = len(calls) > 3
            return plain(*batch, **more)

    with pytest.raises(OSError, match=NO_ROOM) as error:
        train(path, Filling())
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["run.safetensors"], "no temporary file takes the last room"
    full[0], calls[:] = False, [-9] * 0
    assert read_tensors(path, expected=None)[1]["history"], "the first epoch is there"
    assert equal(train(path, plain).last, train(None, plain).last)


def test_a_full_disk_stops_a_sweep_of_bounds_and_keeps_the_finished_radii(
    tmp_path: Path, full: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    from metarobust.bounds import _bound

    path, real, proved = tmp_path / "bounds.checkpoint", _bound.prove, []

    def prove(*arguments: Any) -> Any:
        full[0] = len(proved) == 2
        proved.append(0)
        return real(*arguments)

    monkeypatch.setattr(_bound, "prove", prove)
    sweep = functools.partial(risk_curve, *points(), norm="l2", epsilons=[0.1, 0.2, 0.3, 0.4])
    with pytest.raises(OSError, match=NO_ROOM):
        sweep(checkpoint=path)
    full[0], proved[:] = False, [0] * 10
    found = sweep(checkpoint=path)
    assert len(proved) == 12, "two of four radii were there"
    expected = sweep()
    assert [(b.lower, b.upper) for b in found] == [(b.lower, b.upper) for b in expected]
    assert all(torch.equal(a.guarantees, b.guarantees) for a, b in zip(found, expected, strict=True))


def test_files_larger_than_the_limit(tmp_path: Path) -> None:
    """``ulimit -f``: the system itself refuses, in the writers of Python and of safetensors alike."""
    script = """
import resource, sys
from pathlib import Path
import torch
from metarobust._files import write_atomically
from metarobust._tensor_files import write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in (lambda: write_tensors("net.safetensors", {"a": torch.zeros(10_000)}, {}),
              lambda: write_atomically("table.json", lambda path: path.write_text("0" * 40_000))):
    try:
        write()
    except OSError as error:
        print(error.errno, error)
"""
    for name in ("net.safetensors", "table.json"):
        (tmp_path / name).write_text("before")
    done = subprocess.run([os.sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    for line, name in zip(lines, ("net.safetensors", "table.json"), strict=True):
        assert line.startswith(f"{errno.EFBIG} {name} must be in a folder that can be written to, got 'File too large'; "), line
        assert (tmp_path / name).read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["net.safetensors", "table.json"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, check=False)
    if not made or made.returncode:
        pytest.skip("file systems cannot be mounted here; the tests beside this one stand in")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    path = small_disk / "net.safetensors"
    write_tensors(path, {"a": torch.arange(30_000)[:15_000].clone()}, {})
    kept = path.read_bytes()
    with pytest.raises(OSError, match=NO_ROOM):
        write_tensors(path, {"a": torch.zeros(60_000)}, {})
    with pytest.raises(OSError, match=NO_ROOM):
        write_atomically(small_disk / "table.json", lambda temporary: temporary.write_text("0" * 400_000))
    assert os.listdir(small_disk) == ["net.safetensors"]
    assert path.read_bytes() == kept
    write_tensors(path, {"a": torch.zeros(100)}, {})


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    left = tmp_path / ".run.partial-abcd1234.json"
    left.write_text("half")
    others = [tmp_path / ".run.partial-notes.json", tmp_path / ".run2.partial-abcd1234.json", tmp_path / "run.partial-x.json"]
    for other in others:
        other.write_text("another's")

    def writing(temporary: Path) -> None:
        temporary.write_text("first")
        write_atomically(tmp_path / "run.json", lambda second: second.write_text("second"))
        assert temporary.read_text() == "first", "a process that writes the same file takes nothing away"

    write_atomically(tmp_path / "run.json", writing)
    assert (tmp_path / "run.json").read_text() == "first"
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "run.json"])


# A download that breaks off ---------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


class Server(http.server.ThreadingHTTPServer):
    files: dict[str, bytes]
    cut: set[str]
    """Files of which half is sent before the connection ends."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        whole = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[: len(whole) // 2] if name in self.server.cut else whole)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def mnist_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Torchvision's MNIST, from a server on this machine, with four examples."""
    draw = np.random.default_rng(0)
    arrays = {
        f"{part}-{what}": idx(draw.integers(0, 10, shape, dtype=np.uint8))
        for part in ("train", "t10k")
        for what, shape in (("images-idx3-ubyte", (4, 28, 28)), ("labels-idx1-ubyte", (4,)))
    }
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.cut = {f"{name}.gz": gzip.compress(content) for name, content in arrays.items()}, set()
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in server.files.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_that_breaks_off_is_explained_and_made_good_by_the_next(tmp_path: Path, mnist_server: Server) -> None:
    mnist_server.cut.add("t10k-images-idx3-ubyte.gz")
    with pytest.raises(OSError, match=r"^mnist must be fetched into .*, got .*; repeat the command to go on") as error:
        load("mnist", train=False, root=tmp_path, download=True)
    assert "\n" not in str(error.value)
    assert (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte.gz").exists(), "half of it"
    mnist_server.cut.clear()
    assert len(load("mnist", train=False, root=tmp_path, download=True)) == 4


@pytest.mark.parametrize("download", [True, False])
def test_an_unpacking_that_was_killed_is_made_good(download: bool, tmp_path: Path, mnist_server: Server) -> None:
    """Torchvision takes a file that is there for a whole one."""
    expected = load("mnist", train=False, root=tmp_path, download=True)
    unpacked = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    for size in (0, 10, 1000):
        os.truncate(unpacked, size)
        found = load("mnist", train=False, root=tmp_path, download=download)
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)


def test_no_network_is_one_sentence(
    tmp_path: Path, mnist_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["bound", "--data", "mnist", "--epsilons", "1", "--root", str(tmp_path), "--download"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert "mnist must be fetched into" in said


# No GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "evaluate --model nets.py:build --data digits --epsilon 0.1",
        "train --data digits --epsilon 0.1",
        "bound --data digits --epsilons 0.5",
    ],
)
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "gpu"])
@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="has the devices")
def test_a_device_that_is_not_there(
    words: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text("from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--device", device])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (f"metarobust: --device must be cpu, or a device that this machine has, got '{device}'\n")
    assert os.listdir() == ["nets.py"]


# No memory left ---------------------------------------------------------------------------------------------------------

FAILURES: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nOf the allocated memory ..."),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    "python": MemoryError,
}


class Full(nn.Module):
    """A network that fits into memory a number of times, counted in forward passes of more than two rows."""

    def __init__(self, fits: float, failure: Callable[[], Exception]) -> None:
        super().__init__()
        self.inside, self.left, self.failure = network(), fits, failure
        self.eval()

    def __repr__(self) -> str:
        return "Full"

    def forward(self, x: Tensor) -> Tensor:
        self.left -= len(x) > 2
        if self.left < 0:
            raise self.failure()
        return self.inside(x)


@pytest.mark.parametrize("failure", FAILURES)
def test_an_evaluation_without_memory_says_what_to_lower_and_keeps_what_it_has(failure: str, tmp_path: Path) -> None:
    """It does not split the batch: each batch has noise of its own, and parts of it would give another result."""
    attacks = {"fgsm": FGSM(threat_model=BALL)}
    arguments: dict[str, Any] = {"threat_model": BALL, "attacks": attacks, "reliability_checks": False, "batch_size": 8}
    path = tmp_path / "run.safetensors"
    sentence = (
        "^batch_size must be small enough for the memory that is free, got 8; pass a smaller one, with another checkpoint; "
        f"{path} keeps what was finished with this one$"
    )
    with pytest.raises(torch.OutOfMemoryError, match=sentence):
        evaluate(Full(7, FAILURES[failure]), points(), checkpoint=path, **arguments)
    kept = read_tensors(path, expected=None)[0]["outcomes"]
    assert int((kept > 0).sum()) == 8, "one batch of two"
    found = evaluate(Full(float("inf"), MemoryError), points(), checkpoint=path, **arguments)
    expected = evaluate(Full(float("inf"), MemoryError), points(), **arguments)
    assert found.broken == expected.broken
    assert torch.equal(found.adversarial_examples, expected.adversarial_examples)
    with pytest.raises(torch.OutOfMemoryError, match="^batch_size must be .* got 8; pass a smaller one$"):
        evaluate(Full(1, FAILURES[failure]), points(), **arguments)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_training_without_memory_says_what_to_lower_and_goes_on(failure: str, tmp_path: Path) -> None:
    plain, path = AdversarialTraining(attack=FGSM(threat_model=BALL)), tmp_path / "run.safetensors"
    calls: list[int] = []

    class Filling:
        def __repr__(self) -> str:
            return repr(plain)

        def __call__(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
            calls.append(0)
            if len(calls) == 4:
                model(x)  # moves the statistics of the normalisation, which the failed step must not
                raise FAILURES[failure]()
            return plain(model, x, y, generator=generator)

    sentence = r"^batch_size must be small enough .*, got 20 \(epoch 2, step 2.*\); pass a smaller one, with another checkpoint"
    with pytest.raises(torch.OutOfMemoryError, match=sentence):
        train(path, Filling())
    assert equal(train(path, Filling()).last, train(None, plain).last)


@pytest.mark.parametrize("failure", FAILURES)
def test_searches_halve_what_does_not_fit(failure: str) -> None:
    done: list[int] = []

    def work(part: slice) -> None:
        if part.stop - part.start > 3:
            raise FAILURES[failure]()
        done.extend(range(part.start, part.stop))

    halving_on_out_of_memory(work, 10, 8)
    assert done == list(range(10))


def test_the_command_line_keeps_an_evaluation_without_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n        if len(x) > 32:\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory')\n        return super().forward(x.flatten(1))\n"
        "def build():\n    torch.manual_seed(0)\n    return Net(64, 10)\n"
    )
    words = "evaluate --model nets.py:build --data digits --examples 40 --epsilon 0.1 --protocol quick --device cpu"
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--checkpoint", "run.safetensors", "--batch-size", "40"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "metarobust: batch_size must be small enough for the memory that is free, got 40; pass a smaller one\n"
    )
    main([*words.split(), "--batch-size", "32", "--json", "report.json"])
    assert json.loads(Path("report.json").read_text())["examples"] == 40

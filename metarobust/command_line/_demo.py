"""``metarobust demo``: meta-train, freeze, transfer to unseen architectures, compare, report."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Meta-train an LSTM meta-optimizer on small digit classifiers and transfer it, frozen, to unseen architectures.

    Trains on clean examples of scikit-learn's handwritten digits, without a single attack call on the targets, compares with
    six other ways of training, and writes report.json, robust_accuracy.png and meta_optimizer.safetensors.
    """

    out: Path = Path("metarobust-demo")
    """Folder for the results; made if missing."""
    quick: bool = False
    """Same pipeline with smaller numbers, marked as quick in the report: a smoke test, not evidence."""
    seed: int = 0
    """Seed of all randomness."""

    def run(self) -> None:
        """Run the demo and write its files."""
        if self.seed < 0:
            raise ValueError(f"--seed must be an integer >= 0, got {self.seed}")
        out = writable_folder(self.out)
        from metarobust.command_line._demo_run import run_demo

        run_demo(out, quick=self.quick, seed=self.seed)


def writable_folder(path: Path) -> Path:
    """The folder, made if missing; raises one sentence before any work is done when nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writable-", dir=path)
        os.close(handle)
        Path(name).unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"--out must be a folder that can be written to, got {path} ({reason}); pass another folder") from error
    return path

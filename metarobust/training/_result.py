"""What a training run leaves: the last and the best parameters, and one record per epoch."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from metarobust._checks import message
from metarobust._files import json_text, write_atomically
from metarobust._tensor_files import WEIGHTS, write_tensors
from metarobust.training._figure import draw_history


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch: training loss, and accuracies on the validation data at its end (None without validation).

    Attributes:
        epoch: counted from 1.
        loss: mean of the objective over the epoch's examples, each at the step that used it.
        learning_rate: of the first parameter group, in the epoch's last step.
        clean_accuracy: fraction of the validation examples that are classified correctly.
        robust_accuracy: fraction that still are after ``validation_attack``.
        seconds: duration, validation included, time between an interruption and the last checkpoint before it excluded.
        diagnostics: epoch means of the objective's diagnostics, weighted by the number of examples, over the steps that had one.
    """

    epoch: int
    loss: float
    learning_rate: float
    clean_accuracy: float | None
    robust_accuracy: float | None
    seconds: float
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingResult:
    """The outcome of ``fit``.

    Attributes:
        last: the state dict after the last epoch, on the CPU; the model has it too.
        best: the state dict after ``best_epoch``, on the CPU; None without validation.
        best_epoch: the epoch of the highest robust validation accuracy, the earliest of several.
        history: one record per epoch.
    """

    last: dict[str, Tensor] = field(repr=False)
    best: dict[str, Tensor] | None = field(repr=False)
    best_epoch: int | None
    history: tuple[EpochRecord, ...] = field(repr=False)

    @property
    def overfitting_gap(self) -> float | None:
        """Robust validation accuracy of the best epoch minus that of the last (Rice et al., 2020, arXiv 2002.11569)."""
        if self.best_epoch is None:
            return None
        best, last = (self.history[epoch - 1].robust_accuracy for epoch in (self.best_epoch, len(self.history)))
        assert best is not None
        assert last is not None
        return best - last

    def plot(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Draw loss and validation accuracies against the epoch; the suffix of ``path`` chooses the format.

        Args:
            path: the figure.
            title: above it, such as the data and the norm.
        """
        return draw_history(self, Path(path), title)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``last.safetensors``, ``best.safetensors`` (with validation) and ``history.json`` into ``folder``.

        Both state dicts are plain safetensors files: ``model.load_state_dict(safetensors.torch.load_file(path))``, or
        ``metarobust evaluate --weights best.safetensors``. The folder is made; the one above it must exist.
        """
        folder = Path(folder)
        if not folder.parent.is_dir():
            raise FileNotFoundError(message("folder", "inside an existing folder", folder, f"make {folder.parent} first"))
        folder.mkdir(exist_ok=True)
        for name, state in (("last", self.last), ("best", self.best)):
            if state is not None:
                write_tensors(folder / f"{name}.safetensors", state, {"format": WEIGHTS})
        text = json_text({"best_epoch": self.best_epoch, "history": [asdict(record) for record in self.history]}, indent=1)
        write_atomically(folder / "history.json", lambda temporary: temporary.write_text(text))
        return folder

"""``metarobust evaluate``: the robust accuracy of a trained model, from the shell."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FIGURES = (".png", ".jpg", ".pdf", ".svg")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure the robust accuracy of a model: clean and worst-case accuracy, an interval, and reasons to doubt them.

    Example: metarobust evaluate --model nets.py:build --weights net.pt --data mnist --epsilon 0.3 --checkpoint run.safetensors
    """

    model: str
    """FILE.py:FUNCTION, without arguments, returns an nn.Module from pixels to logits. This runs FILE.py: trust it first."""
    data: str
    """mnist, fashion-mnist, cifar10, cifar100 or digits (the test part of each), or an .npz file with images and labels."""
    epsilon: str
    """Radius of the ball in input units, pixels in [0, 1]: 0.3, or a fraction such as 8/255."""
    weights: Path | None = None
    """State dictionary for the model: .safetensors, or what torch.save wrote. No code in it is executed."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the ball."""
    protocol: Literal["quick", "standard", "strong"] = "standard"
    """Which attacks: a glance, the usual, or a judgement."""
    examples: int | None = None
    """Only the first so many examples. Default: all."""
    root: Path | None = None
    """Folder that holds the data sets, as torchvision lays them out. Default: METAROBUST_DATA, else ~/.cache/metarobust."""
    download: bool = False
    """Fetch the data set into the root if it is missing."""
    seed: int = 0
    """Seed of all noise."""
    batch_size: int = 512
    """Examples that an attack is given at once."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    checkpoint: Path | None = None
    """File to keep the work in; the same command goes on from it after an interrupt."""
    json: Path | None = None
    """Write the report to this file."""
    plot: Path | None = None
    """Write a figure (.png, .pdf, .svg): accuracy against epsilon, and the most perturbed examples."""

    def run(self) -> None:
        """Evaluate, print the report and write the files."""
        for name, least in (("seed", 0), ("batch_size", 1), ("examples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be an integer >= {least}, got {value}")
        epsilon = parse_number("--epsilon", self.epsilon)
        for name in ("checkpoint", "json", "plot"):
            _check_place(f"--{name}", getattr(self, name))
        self._check_apart()
        if self.plot is not None and self.plot.suffix.lower() not in FIGURES:
            raise ValueError(f"--plot must end in {', '.join(FIGURES[:-1])} or {FIGURES[-1]}, got {self.plot}")
        from metarobust.command_line._evaluate_run import run_evaluation

        run_evaluation(self, epsilon)

    def _check_apart(self) -> None:
        """No file that is written may be one that is read, or another one that is written."""
        model = Path(self.model.rpartition(":")[0] or self.model)
        taken = {"--model": model, "--weights": self.weights, "--data": Path(self.data) if self.data.endswith(".npz") else None}
        for name in ("checkpoint", "json", "plot"):
            path = getattr(self, name)
            for flag, other in taken.items():
                if path is not None and other is not None and path.resolve() == other.resolve():
                    raise ValueError(f"--{name} must be another file than {flag}, got {path} for both; pass another path")
            taken[f"--{name}"] = path

    def interrupted(self) -> str:
        """What to tell whoever pressed Ctrl-C."""
        if self.checkpoint is None:
            return "interrupted; nothing was kept: with --checkpoint FILE the same command would go on from where it stopped"
        if not self.checkpoint.exists():
            return f"interrupted before the first attack; nothing was kept in {self.checkpoint} yet"
        return f"interrupted; the work is kept in {self.checkpoint}: run the same command again to go on"


def parse_number(flag: str, text: str) -> float:
    """A number, or a fraction of two: ``8/255``."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{flag} must be a number such as 0.3 or 8/255, got {text!r}") from error


def _check_place(flag: str, path: Path | None) -> None:
    """Before hours of work: the folder of an output file must be there."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        got = f"the folder {path}" if path.is_dir() else f"{path}, whose folder does not exist"
        raise ValueError(f"{flag} must be a file in an existing folder, got {got}; pass another path")

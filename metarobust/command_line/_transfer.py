"""``metarobust transfer``: train one network with a learned meta-optimizer on clean examples, and compare, from the shell."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metarobust.command_line._evaluate import _check_place, parse_number
from metarobust.command_line._train_checks import written

LEAST = {"steps": 1, "batch_size": 1, "examples": 2, "judge_examples": 1, "seed": 0}
"""Smallest values of the flags that count something."""
BASELINES = ("adam", "adamw", "sgd", "fgsm", "pgd")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Train a network with a learned meta-optimizer, on clean examples and without any attack, and compare it with baselines.

    All methods train on the same examples, from the same initial weights. Baselines choose their learning rate by PGD-20 accuracy
    on held-out training examples; the meta-optimizer has nothing to choose. Test data is for judging alone. Writes
    NAME.safetensors (weights that the meta-optimizer found), NAME.json and, for a network by name, NAME.py.

    Example: metarobust transfer --model cnn:8,16 --data digits --epsilon 0.1 --baselines adam,pgd --out cnn.safetensors
    """

    data: str
    """mnist, fashion-mnist, cifar10, cifar100 or digits, or an .npz file with images and labels, of which 0.3 are held back for
    judging. Of digits the pool of 400 that no meta-training sees, robust-small-v1's included, is trained on."""
    epsilon: str
    """Radius of the ball in input units, pixels in [0, 1]: 0.1, or a fraction such as 8/255."""
    optimizer: str = "robust-small-v1"
    """The meta-optimizer: robust-small-v1, which comes with this package, or a file that metarobust meta-train wrote."""
    model: str | None = None
    """mlp, cnn or residual, perhaps with widths (mlp:256,256, cnn:32,64, residual:8,16,32; multiples of 4 for the last), or
    FILE.py:FUNCTION as for metarobust evaluate. Default: mlp:128 for images of up to 8 x 8 pixels or not square, otherwise
    cnn:32,64."""
    out: Path = Path("metarobust-transfer.safetensors")
    """File for the weights, NAME.safetensors; the other files stand beside it."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball."""
    examples: int | None = None
    """Training examples, of each class its share; those of --validation are among them. Default: all."""
    steps: int = 400
    """Steps of every method."""
    batch_size: int = 64
    """Training examples per step."""
    baselines: str = "adam,pgd"
    """What to compare with, with commas between: adam, adamw, sgd (clean examples), fgsm, pgd (adversarial training with one step
    and with five, by Adam); or none."""
    validation: float = 0.2
    """Share of the training examples that is held out to choose learning rates by; with --baselines none, nothing is."""
    protocol: Literal["quick", "standard", "strong"] = "standard"
    """Which attacks judge, as for metarobust evaluate."""
    judge_examples: int | None = None
    """Only the first so many test examples. Default: all."""
    root: Path | None = None
    """Folder that holds the data sets, as torchvision lays them out. Default: METAROBUST_DATA, else ~/.cache/metarobust."""
    download: bool = False
    """Fetch the data set into the root if it is missing."""
    seed: int = 0
    """Seed of all randomness: initial weights, examples, order, attacks."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""

    def run(self) -> None:
        """Train, judge, print the table and write the files."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{written(name)} must be an integer >= {least}, got {value}")
        epsilon = parse_number("--epsilon", self.epsilon)
        if not 0 < self.validation < 1:
            raise ValueError(f"--validation must be a share between 0 and 1, got {self.validation}")
        baselines = parse_baselines(self.baselines)
        if self.out.suffix != ".safetensors":
            raise ValueError(f"--out must end in .safetensors, got {self.out}; write {self.out.with_suffix('.safetensors')}")
        _check_place("--out", self.out)
        from metarobust.command_line._transfer_run import run_transfer

        run_transfer(self, epsilon, baselines)


def parse_baselines(text: str) -> list[str]:
    """Names of baselines, each once, in the order given."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if found == ["none"]:
        return []
    unknown = [name for name in found if name not in BASELINES]
    if unknown:
        raise ValueError(f"--baselines must be among {', '.join(BASELINES)} with commas between, or none, got {text!r}")
    return found

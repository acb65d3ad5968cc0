"""``metarobust meta-train``: an update rule that learns from the training of many small networks, from the shell."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metarobust.command_line._evaluate import _check_place, parse_number
from metarobust.command_line._train_checks import written

LEAST = {
    "iterations": 1,
    "copies": 1,
    "batch_size": 1,
    "unroll": 1,
    "recompute_every": 1,
    "tasks_per_step": 1,
    "population": 2,
    "seed": 0,
}
"""Smallest values of the flags that count something."""
OF_META_UPDATES = ("unroll", "recompute_every", "learning_rate", "tasks_per_step")
"""Flags that the search does not read."""
ACCURACIES = ("pgd", "clean")
"""Meta-losses that are a way to judge accuracy too, which is what the search scores."""


@dataclass(frozen=True, kw_only=True)
class MetaTrain:
    """Learn a meta-optimizer: an update rule that trains networks it has not seen, from clean examples alone.

    Trains many small networks on small parts of the data, and moves the rule to where they end robust. Writes NAME.safetensors
    and NAME.json (settings and history). A command that was interrupted goes on when it is repeated. Under torchrun several
    processes share the work. The result is judged by metarobust transfer --optimizer NAME.safetensors.

    Example: metarobust meta-train --data digits --architectures "mlp:48;cnn:4,8" --out rule.safetensors
    """

    data: str
    """Data sets to draw tasks from, with commas between: digits, mnist, fashion-mnist, cifar10, cifar100 (the training part of
    each) or .npz files with images and labels. Of digits only the pool that neither transfer nor any test sees."""
    out: Path = Path("metarobust-optimizer.safetensors")
    """File for the meta-optimizer, NAME.safetensors; NAME.json stands beside it."""
    architectures: str | None = None
    """Networks to draw from, with semicolons between: mlp, cnn or residual, perhaps with widths, "mlp:48;cnn:4,8;residual:8,16".
    Default: these three, without the cnn where images are not square."""
    examples: str = "100,200"
    """Training examples of a task: a number, or a range to draw from."""
    epsilon: str = "0.05,0.15"
    """Radius of the ball in input units, pixels in [0, 1]: a number such as 8/255, or a range to draw from."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball."""
    rule: Literal["interpretable", "lstm"] = "interpretable"
    """What learns: some dozen named coefficients, or a small recurrent network for each coordinate."""
    gradient_source: Literal[
        "gradient", "gradient+perturbed_factors", "gradient+adversarial_estimate", "gradient+adversarial_tangent"
    ] = "gradient+adversarial_tangent"
    """What the rule reads: the gradient alone, or beside it a second stream, from the same clean pass or (tangent, which is
    better) with a third of a pass more."""
    estimator: Literal["search", "second-order", "first-order", "pes"] = "search"
    """How the rule is moved: a search that trains whole runs (interpretable only), back-propagation through windows of the
    training (second-order, or first-order, which is cheaper and worse), or persistent evolution strategies."""
    meta_loss: Literal["pgd", "trades", "beta", "armor", "clean"] = "pgd"
    """What the trained networks are judged by: examples that PGD-5 moved, a robust loss with an attack of 5 steps (armor: KL,
    radius 0.1, around adversarial training; beta: needs --copies 1), or clean examples. search: pgd and clean."""
    iterations: int | None = None
    """Meta-updates, or generations of the search. Default: 300, or 10 for search."""
    total_steps: str | None = None
    """Steps of a training run: a number, or a range to draw from; use the rule for about as many. Default: 200; 150,450 for
    search."""
    copies: int | None = None
    """Networks per task, trained side by side. Default: 4, but 1 for --meta-loss beta."""
    batch_size: int = 64
    """Training examples per step and network."""
    population: int | None = None
    """search: settings that are tried in a generation. Default: 16."""
    unroll: int | None = None
    """Not for search: steps between two cuts of the graph. Default: 20."""
    recompute_every: int | None = None
    """Not for search and pes: steps whose graph is in memory at a time; steps are taken again on the way back. Default: all."""
    learning_rate: float | None = None
    """Not for search: of the meta-level Adam, which decays to 0. Default: 0.005."""
    tasks_per_step: int | None = None
    """Not for search: tasks whose gradients are averaged in a meta-update. Default: one for each process of torchrun."""
    checkpoint: Path | None = None
    """File to keep the work in; removed at the end. Default: NAME.checkpoint."""
    root: Path | None = None
    """Folder that holds the data sets, as torchvision lays them out. Default: METAROBUST_DATA, else ~/.cache/metarobust."""
    download: bool = False
    """Fetch the data set into the root if it is missing."""
    seed: int = 0
    """Seed of all randomness."""

    def run(self) -> None:
        """Learn, print the coefficients and write the files."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{written(name)} must be an integer >= {least}, got {value}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate must be a finite number > 0, got {self.learning_rate}")
        self._check_choices()
        _ = self.examples_range, self.epsilon_range, self.steps_range, self.names
        if self.out.suffix != ".safetensors":
            raise ValueError(f"--out must end in .safetensors, got {self.out}; write {self.out.with_suffix('.safetensors')}")
        _check_place("--out", self.out)
        _check_place("--checkpoint", self.checkpoint)
        if self.kept in (self.out, self.record):
            raise ValueError(f"--checkpoint must be another file than those of --out, got {self.kept}; leave it out")
        from metarobust.command_line._meta_train_run import run_meta_training

        run_meta_training(self)

    @property
    def searches(self) -> bool:
        """Whether whole runs are scored, without gradients."""
        return self.estimator == "search"

    @property
    def kept(self) -> Path:
        """The checkpoint."""
        return self.out.with_suffix(".checkpoint") if self.checkpoint is None else self.checkpoint

    @property
    def record(self) -> Path:
        """Settings, history and versions; of a run that is not finished, the settings."""
        return self.out.with_suffix(".json")

    @property
    def rounds(self) -> int:
        """Meta-updates or generations."""
        return self.iterations or (10 if self.searches else 300)

    @property
    def examples_range(self) -> tuple[int, int]:
        """Least and most training examples of a task."""
        return parse_counts("--examples", self.examples)

    @property
    def steps_range(self) -> tuple[int, int]:
        """Least and most steps of a run."""
        return parse_counts("--total-steps", self.total_steps or ("150,450" if self.searches else "200"))

    @property
    def epsilon_range(self) -> tuple[float, float]:
        """Least and largest radius."""
        low, high = parse_range("--epsilon", self.epsilon)
        if not (low > 0 and high < math.inf):
            raise ValueError(f"--epsilon must be finite and > 0, got {self.epsilon!r}; write 0.05,0.15")
        return low, high

    @property
    def names(self) -> list[str] | None:
        """The architectures that were asked for; None for the default ones."""
        if self.architectures is None:
            return None
        found = [name.strip() for name in self.architectures.split(";") if name.strip()]
        if not found:
            remedy = 'write --architectures "mlp:48;cnn:4,8"'
            raise ValueError(f"--architectures must name at least one network, got {self.architectures!r}; {remedy}")
        return found

    def interrupted(self) -> str:
        """What to tell whoever pressed Ctrl-C."""
        if not self.kept.exists():
            return f"interrupted; nothing was kept in {self.kept} yet"
        return f"interrupted; the work is kept in {self.kept}: run the same command again to go on"

    def _check_choices(self) -> None:
        """Refuse choices that do not go together, and flags that nothing would read."""
        others = "second-order, first-order or pes"
        if self.searches and self.rule != "interpretable":
            reason = f"search moves the named coefficients of an interpretable rule, got --rule {self.rule}"
            raise ValueError(f"--estimator must be {others} for it, {reason}; write --estimator second-order")
        if self.searches and self.meta_loss not in ACCURACIES:
            reason = f"which scores accuracies and no loss, got {self.meta_loss}"
            raise ValueError(f"--meta-loss must be pgd or clean for --estimator search, {reason}; write --estimator second-order")
        if self.recompute_every is not None and self.estimator == "pes":
            raise ValueError("--recompute-every must be left out with --estimator pes, which keeps no graph")
        for name in OF_META_UPDATES if self.searches else ("population",):
            if getattr(self, name) is not None:
                readers = {"recompute_every": "second-order or first-order", "population": "search"}.get(name, others)
                raise ValueError(f"{written(name)} is read by --estimator {readers} only, not by {self.estimator}; leave it out")
        if self.meta_loss == "beta" and (self.copies or 1) > 1:
            reason = "whose attack follows single examples, and those of several copies cannot be told apart then"
            raise ValueError(f"--copies must be 1 for --meta-loss beta, {reason}, got {self.copies}; leave it out")


def parse_range(flag: str, text: str) -> tuple[float, float]:
    """``least,largest``, or one number for both; each may be a fraction."""
    parts = text.split(",")
    if len(parts) > 2:
        raise ValueError(f"{flag} must be one number or a range of two, got {text!r}; write least,largest")
    low, high = parse_number(flag, parts[0]), parse_number(flag, parts[-1])
    if low > high:
        raise ValueError(f"{flag} must be a range from the least to the largest, got {text!r}; write {parts[1]},{parts[0]}")
    return low, high


def parse_counts(flag: str, text: str) -> tuple[int, int]:
    """The same for whole numbers of at least 1."""
    if not re.fullmatch(r"\s*[0-9]+\s*(,\s*[0-9]+\s*)?", text):
        raise ValueError(f"{flag} must be an integer or a range of two, got {text!r}; write 100 or 100,200")
    low, high = parse_range(flag, text)
    if low < 1:
        raise ValueError(f"{flag} must be at least 1, got {text!r}")
    return int(low), int(high)

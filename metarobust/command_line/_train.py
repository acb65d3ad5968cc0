"""``metarobust train``: a robust classifier from the shell, with checkpoints, validation and the command that judges it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metarobust.command_line._evaluate import _check_place, parse_number
from metarobust.command_line._train_axes import along_the_axes
from metarobust.command_line._train_checks import check_numbers, check_read


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a classifier on a robust objective, and keep the parameters of the best epoch on held-out training data.

    Writes NAME.safetensors (best epoch), NAME-last.safetensors, NAME.json, NAME.png and, for named networks, NAME.py. A command
    that was interrupted goes on when it is repeated. Test data is not touched: the last line says how to judge the model on it.

    Example: metarobust train --objective armor-trades --radius 0.1 --data mnist --epsilon 0.3 --warm-up 5 --out armor.safetensors

    Any transport, weighting and update go together: metarobust train --data digits --epsilon 0.1 --transport beta
    --weighting renyi --update robust-small-v1
    """

    data: str
    """mnist, fashion-mnist, cifar10, cifar100 or digits (the training part of each), or an .npz file with images and labels."""
    epsilon: str
    """Radius of the ball in input units, pixels in [0, 1]: 0.3, or a fraction such as 8/255."""
    objective: Literal[
        "at", "trades", "mart", "udr", "beta", "smoothed-beta", "caat", "meta-weight-net", "frl",
        "armor-at", "armor-trades", "armor-mart", "armor-udr", "armor-beta", "armor-smoothed-beta",
        "armor-caat", "armor-meta-weight-net", "armor-frl",
    ] = "at"  # fmt: skip
    """Adversarial training, TRADES, MART, UDR, BETA training, its smoothed form; CAAT and Meta-Weight-Net, which learn weights of
    examples; FRL, which moves those of classes; armor- in front reweights the examples for the worst case."""
    transport: Literal["pgd", "fgsm", "apgd", "beta", "none"] | None = None
    """at, mart: how examples are moved, by default by PGD; none leaves them. Other objectives have a way of their own."""
    weighting: Literal["mean", "kl", "alpha", "renyi", "caat", "meta-weight-net", "balanced", "logit-adjusted"] | None = None
    """How much each example counts: another way to write armor- with --divergence (by default with --radius 0.1 and --order 2),
    caat and meta-weight-net with --base, or --class-weights, on top of --objective at, trades, mart, udr, beta, smoothed-beta."""
    out: Path = Path("metarobust-model.safetensors")
    """File for the best parameters, NAME.safetensors; the other files stand beside it."""
    model: str | None = None
    """mlp, cnn or residual, perhaps with widths (mlp:256,256, cnn:32,64, residual:8,16,32; multiples of 4 for the last), or
    FILE.py:FUNCTION as for metarobust evaluate. Default: mlp:128 for images of up to 8 x 8 pixels or not square, otherwise
    cnn:32,64."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the ball."""
    steps: int | None = None
    """Steps of the attack in training, not with --transport fgsm or none. Default: 10. Validation takes PGD with 20."""
    beta: float | None = None
    """trades, mart, frl, --base: weight of the KL term. Default: 6, but 1.5 for the trades of caat."""
    mu: float | None = None
    """smoothed-beta: sharpness of the weights of the wrong classes, in 1 / logit."""
    hypergradient: Literal["none", "unrolled", "implicit"] | None = None
    """beta: what becomes of the gradient through the attack. Default: none."""
    divergence: Literal["kl", "alpha", "renyi"] | None = None
    """armor-*: which divergence the weights may move by. Default: kl."""
    order: float | None = None
    """Order of the alpha or Renyi divergence."""
    radius: float | None = None
    """armor-*: how far, in units of the divergence, at least 0."""
    kappa: float | None = None
    """armor-*: price of the budget, in units of the loss. Default: 0."""
    natural_weight: float | None = None
    """armor-*: share of the natural loss, from 0 to 1. Default: 0."""
    robust_classes: str | None = None
    """armor-*: only these classes are attacked and reweighted, with commas between: 1,3. Default: all."""
    base: Literal["trades", "mart", "at"] | None = None
    """caat, meta-weight-net: the robust loss that is weighed. Default: trades for caat, at for meta-weight-net."""
    meta_every: int | None = None
    """caat, meta-weight-net: steps from one meta-step to the next. Default: 5 for caat, 1 for meta-weight-net."""
    routing: Literal["hard", "soft"] | None = None
    """caat: one branch for each example, or all of them with weights, at twice the cost and more. Default: soft."""
    anti_factor: float | None = None
    """caat: how many times as far anti-adversaries may move as adversaries. Default: 4."""
    bound: Literal["fixed", "gradient", "remargin", "learned"] | None = None
    """caat: radius of an example: epsilon, by the length of its gradient, by errors of its class, or learned. Default: fixed."""
    meta_per_class: int | None = None
    """Examples per class of a clean, balanced meta set, split off before --imbalance and --noise. Default for caat,
    meta-weight-net and frl, which learn from it: 20, at most a quarter of the rarest class; others only hold it back."""
    class_weights: Literal["none", "balanced", "logit-adjusted"] = "none"
    """Equal shares of the loss for all classes, or logits that carry the class frequencies (not for caat and meta-weight-net)."""
    imbalance: float | None = None
    """Long tail: class sizes fall geometrically, the largest so many times the smallest. Of the training part only."""
    noise: Literal["uniform", "flip1", "flip2", "pair"] | None = None
    """Wrong labels: any class, one or two others for each class, or the next one. In the training part only."""
    noise_rate: float | None = None
    """How many labels are drawn anew, a share from 0 to 1; of uniform noise some of them come out right."""
    epochs: int = 20
    """Passes over the training data, besides the warm-up."""
    warm_up: int = 0
    """Epochs before the others in which epsilon rises in equal steps; needed where a large one ends in constant predictions."""
    batch_size: int = 128
    """Largest number of examples of a step, over all processes together."""
    update: str = "adam"
    """How the parameters move: sgd, adam or adamw; or robust-small-v1 or a file of metarobust meta-train, with --objective at or
    armor-at if it reads a second stream."""
    learning_rate: float | None = None
    """Initial learning rate. Default: 0.1 for sgd, 0.001 for adam and adamw; a factor on the updates of a learned one, 1."""
    momentum: float | None = None
    """sgd: momentum. Default: 0.9."""
    weight_decay: float | None = None
    """Weight decay. Default: 0.0005 for sgd, 0 for adam, 0.01 for adamw."""
    schedule: str | None = None
    """constant, cosine, piecewise, or progress:factor pairs: 0.5:0.1,0.75:0.01, which is what piecewise stands for. Default:
    piecewise, but constant for a learned update, which has a schedule of its own."""
    clip_norm: float | None = None
    """Largest Euclidean norm of a gradient. Default: no limit."""
    amp: Literal["bfloat16", "float16"] | None = None
    """Lower precision for objective and attack; float16 needs a GPU. Default: full precision."""
    validation: str = "0.1"
    """Part of the training data that is held out, class by class, to choose the best epoch: a share, or a number such as 500."""
    examples: int | None = None
    """Only the first so many examples, before the split. Default: all."""
    root: Path | None = None
    """Folder that holds the data sets, as torchvision lays them out. Default: METAROBUST_DATA, else ~/.cache/metarobust."""
    download: bool = False
    """Fetch the data set into the root if it is missing."""
    seed: int = 0
    """Seed of all randomness: initial parameters, split, order, attacks."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one. Under torchrun each process takes its own."""

    def run(self) -> None:
        """Train, print the table and write the files."""
        along_the_axes(self)._run()

    def _run(self) -> None:
        check_numbers(self)
        epsilon = parse_number("--epsilon", self.epsilon)
        check_read(self)
        if self.out.suffix != ".safetensors":
            raise ValueError(f"--out must end in .safetensors, got {self.out}; write {self.out.with_suffix('.safetensors')}")
        _check_place("--out", self.out)
        parse_schedule(self.rates)
        parse_held_out(self.validation)
        parse_robust_classes(self.robust_classes)
        from metarobust.command_line._train_run import run_training

        run_training(self, epsilon)

    @property
    def part(self) -> str | None:
        """The part of a named data set that is read."""
        return None if self.data.endswith(".npz") else "train"

    @property
    def loss(self) -> str:
        """The objective without armor- in front."""
        return self.objective.removeprefix("armor-")

    @property
    def base_loss(self) -> str:
        """The robust loss that is attacked: the objective itself, or what it weighs."""
        return self.base or {"caat": "trades", "meta-weight-net": "at"}.get(self.loss, self.loss)

    @property
    def attack_steps(self) -> int:
        """Steps of the attack, where it takes any number of them."""
        return 10 if self.steps is None else self.steps

    @property
    def learned_update(self) -> bool:
        """Whether a meta-optimizer moves the parameters."""
        return self.update not in ("sgd", "adam", "adamw")

    @property
    def rates(self) -> str:
        """The schedule, or the default of the update."""
        return self.schedule or ("constant" if self.learned_update else "piecewise")

    def interrupted(self) -> str:
        """What to tell whoever pressed Ctrl-C."""
        from metarobust.command_line._train_files import ResultFiles

        kept = ResultFiles(self.out).checkpoints(self.warm_up)
        if not kept:
            return "interrupted before the first step was done; nothing was kept"
        return f"interrupted; the work is kept in {kept[-1]}: run the same command again to go on"


def parse_schedule(text: str) -> str | dict[float, float]:
    """``"constant"``, ``"cosine"``, or the factor from each progress on."""
    if text in ("constant", "cosine"):
        return text
    if text == "piecewise":
        return {0.5: 0.1, 0.75: 0.01}
    factors = {}
    for pair in text.split(","):
        progress, colon, factor = pair.partition(":")
        try:
            factors[float(progress)] = float(factor)
        except ValueError:
            colon = ""
        if not colon:
            expected = "constant, cosine, piecewise, or pairs such as 0.5:0.1,0.75:0.01"
            raise ValueError(f"--schedule must be {expected}, got {text!r}")
    return factors


def parse_held_out(text: str) -> int | float:
    """A number of examples, or a share below 1."""
    number = parse_number("--validation", text)
    if 0 < number < 1:
        return number
    if number < 1 or not math.isfinite(number) or number != int(number):
        raise ValueError(f"--validation must be a share between 0 and 1 or a number of examples >= 1, got {text}")
    return int(number)


def parse_robust_classes(text: str | None) -> tuple[int, ...] | None:
    """Class numbers, rising and each once."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--robust-classes must be class numbers with commas between, got {text!r}; write --robust-classes 1,3")
    return tuple(sorted({int(part) for part in parts}))

"""Which flags of ``metarobust train`` are read, which are missing, and which values no data could make right."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metarobust.command_line._train import Train

OF_ARMOR = ("divergence", "order", "radius", "kappa", "natural_weight", "robust_classes")
"""Flags that only armor-* objectives read."""
META_STEPS = ("caat", "meta-weight-net")
"""Objectives that learn the weights of examples by meta-steps."""
META_SET = (*META_STEPS, "frl")
"""Objectives that need a clean, balanced part of the training data."""
OF_LOSSES = {
    "beta": ("trades", "mart", "frl", *META_STEPS), "mu": ("smoothed-beta",), "hypergradient": ("beta",), "base": META_STEPS,
    "meta_every": META_STEPS, "anti_factor": ("caat",), "bound": ("caat",), "routing": ("caat",),
}  # fmt: skip
"""Flags that only these objectives read, with and without armor- in front."""
LEAST = {"epochs": 1, "batch_size": 1, "steps": 1, "examples": 1, "warm_up": 0, "seed": 0, "meta_every": 1, "meta_per_class": 1}
"""Smallest values of the flags that count something."""


def check_numbers(flags: "Train") -> None:
    """Refuse numbers that are out of range whatever the data are."""
    for name, bound in LEAST.items():
        value = getattr(flags, name)
        if value is not None and value < bound:
            raise ValueError(f"{written(name)} must be an integer >= {bound}, got {value}")
    if flags.imbalance is not None and not 1 <= flags.imbalance < math.inf:
        meaning = "how many times as many examples the largest class has as the smallest"
        raise ValueError(f"--imbalance must be a finite number >= 1, {meaning}, got {flags.imbalance}")
    if flags.noise_rate is not None and not 0 <= flags.noise_rate <= 1:
        raise ValueError(f"--noise-rate must be a share from 0 to 1, got {flags.noise_rate}; for a percentage divide it by 100")


def check_read(flags: "Train") -> None:
    """Refuse flags that were given and that nothing would read, and say what is missing."""
    armor, loss = flags.objective.startswith("armor-"), flags.loss
    for name in OF_ARMOR:
        if getattr(flags, name) is not None and not armor:
            remedy = f"leave it out, or write --objective armor-{loss}"
            raise ValueError(f"{written(name)} is read by armor-* objectives only, not by {flags.objective}; {remedy}")
    for name, losses in OF_LOSSES.items():
        if getattr(flags, name) is not None and loss not in losses:
            readers = " and ".join(filter(None, (", ".join(losses[:-1]), losses[-1])))
            reason = f"is read by {readers} only, with or without armor-, not by {flags.objective}"
            raise ValueError(f"{written(name)} {reason}; leave it out")
    if flags.beta is not None and flags.base_loss == "at":
        reason = f"not by at, which {flags.objective} weighs here"
        raise ValueError(f"--beta is read by --base trades and mart, {reason}; leave it out")
    divergence = flags.divergence or "kl"
    if flags.order is not None and divergence == "kl":
        raise ValueError("--order is read by --divergence alpha and renyi only, not by kl; leave it out")
    if flags.momentum is not None and flags.update != "sgd":
        raise ValueError(f"--momentum is read by --update sgd only, not by {flags.update}; leave it out")
    for name in ("root", "download"):
        if getattr(flags, name) and (flags.data == "digits" or flags.data.endswith(".npz")):
            raise ValueError(f"--{name} is read for data that torchvision loads, not for {flags.data}; leave it out")
    if flags.noise_rate is not None and flags.noise is None:
        raise ValueError("--noise-rate is read with --noise only; leave it out, or write --noise uniform")
    if loss == "udr" and flags.norm != "linf":
        raise ValueError(f"--norm must be linf for {flags.objective}, got {flags.norm}")
    if loss in META_STEPS and flags.class_weights == "logit-adjusted":
        reason = "whose meta-data are balanced already, so that adjusted logits would be adjusted twice"
        raise ValueError(f"--class-weights must be none or balanced for {flags.objective}, {reason}, got logit-adjusted")
    needed = {"radius": armor, "order": armor and divergence != "kl", "mu": loss == "smoothed-beta"}
    needed["noise_rate"] = flags.noise is not None
    readers = {"order": f"--divergence {divergence}", "noise_rate": f"--noise {flags.noise}"}
    for name in needed:
        if needed[name] and getattr(flags, name) is None:
            reader = readers.get(name, flags.objective)
            reason = "which has no default for it; see metarobust train --help"
            raise ValueError(f"{written(name)} must be given for {reader}, {reason}")


def written(name: str) -> str:
    """A field as it is written on the command line."""
    return "--" + name.replace("_", "-")

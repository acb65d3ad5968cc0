"""The three axes of ``metarobust train``: --transport, --weighting and --update, written as one objective and one update."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarobust.command_line._train import Train

DIVERGENCES = ("kl", "alpha", "renyi")
RADIUS, ORDER = 0.1, 2.0
"""Of a divergence that --weighting names: weights move by factors up to 4 or so."""
LOOKING_AHEAD = ("caat", "meta-weight-net")
"""Learned weights."""
WEIGHED = ("at", "trades", "mart")
"""What learned weights can weigh."""
PLAIN = (*WEIGHED, "udr", "beta", "smoothed-beta")
"""Objectives that say nothing about weights."""
MOVED = ("at", "mart")
"""Objectives whose attack can be chosen."""
WITH_STEPS, WITHOUT_STEPS = ("pgd", "apgd", "beta"), ("fgsm", "none")
"""Attacks that take a number of steps, and those that do not."""


def along_the_axes(flags: "Train") -> "Train":
    """The same command without --weighting, which becomes objective, divergence or class weights.

    Raises:
        ValueError: a combination that makes no sense, or two flags for one thing.
    """
    kind = flags.weighting
    if kind is not None:
        if flags.objective not in PLAIN:
            both = f"--objective {flags.objective} says how examples are weighed already"
            raise ValueError(f"{both}, and so does --weighting {kind}; leave one out, or write --objective at")
        given: dict[str, Any] = {"weighting": None}
        if kind in DIVERGENCES:
            _once(flags, "divergence", kind)
            given |= {"objective": f"armor-{flags.objective}", "divergence": kind}
            given |= {"radius": RADIUS if flags.radius is None else flags.radius}
            if kind != "kl" and flags.order is None:
                given["order"] = ORDER
        elif kind in LOOKING_AHEAD:
            _once(flags, "base", kind)
            if flags.objective not in WEIGHED:
                raise ValueError(f"--weighting {kind} weighs --objective {', '.join(WEIGHED)}, got {flags.objective}")
            given |= {"objective": kind, "base": flags.objective}
        elif kind in ("balanced", "logit-adjusted"):
            if flags.class_weights != "none":
                raise ValueError(f"--class-weights and --weighting {kind} are two flags for one thing; leave one out")
            given |= {"class_weights": kind}
        flags = replace(flags, **given)
    if flags.transport is not None and flags.base_loss not in MOVED:
        reason = f"not by {flags.base_loss}, which moves examples in its own way"
        raise ValueError(f"--transport is read by {' and '.join(MOVED)}, {reason}; leave it out")
    if flags.transport not in (None, "pgd") and flags.loss in LOOKING_AHEAD:
        reason = f"for {flags.loss}, which finds adversaries and anti-adversaries in one ascent"
        raise ValueError(f"--transport must be pgd {reason}, got {flags.transport}; leave it out")
    if flags.steps is not None and flags.transport in WITHOUT_STEPS:
        reason = f"is read by --transport {', '.join(WITH_STEPS[:-1])} and {WITH_STEPS[-1]} only, not by {flags.transport}"
        raise ValueError(f"--steps {reason}; leave it out")
    if flags.transport == "apgd" and flags.attack_steps < 2:
        raise ValueError(f"--steps must be an integer >= 2 for --transport apgd, got {flags.steps}")
    return flags


def check_learned_update(flags: "Train", *, two_streams: bool, reads_logits: bool) -> None:
    """Refuse what a meta-optimizer does not read, and objectives that it cannot follow."""
    for name in ("momentum", "weight_decay"):
        if getattr(flags, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is read by --update sgd, adam and adamw only, not by {flags.update}; leave it out")
    if flags.loss in LOOKING_AHEAD:
        reason = "whose meta-steps look ahead along a step of it"
        raise ValueError(f"--update must be sgd, adam or adamw for {flags.loss}, {reason}, got {flags.update}")
    mixed = flags.natural_weight or flags.robust_classes
    if two_streams and (flags.loss not in ("at", "udr") or flags.objective == "armor-udr" or mixed):
        what = "--natural-weight and --robust-classes, which add clean examples" if mixed else f"--objective {flags.objective}"
        reason = "whose second stream belongs to the cross-entropy of one pass"
        raise ValueError(f"--update {flags.update}, {reason}, does not go with {what}; write --objective at, or --update adam")
    if reads_logits and flags.class_weights == "logit-adjusted":
        reason = "which reads the model's own logits"
        raise ValueError(f"--class-weights must be none or balanced for --update {flags.update}, {reason}, got logit-adjusted")


def _once(flags: "Train", name: str, kind: str) -> None:
    if getattr(flags, name) is not None:
        raise ValueError(f"--{name} and --weighting {kind} are two flags for one thing; leave one out")

"""What ``metarobust train`` learns beside the model: the objectives that weigh examples or classes, and what came of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from metarobust._randomness import generator_for
from metarobust._tensors import seeded
from metarobust.command_line._train_checks import META_STEPS
from metarobust.command_line._train_data import Parts
from metarobust.data import LabelledImages
from metarobust.meta_weighters import CAAT, FRL, GradientBound, MetaWeightNet, ReMargin, WeightingNetwork
from metarobust.objectives import ClassWeighted
from metarobust.threat_models import ThreatModel
from metarobust.training._objective_call import stateful_part
from metarobust.types import RobustLoss

if TYPE_CHECKING:
    from metarobust.command_line._train import Train

LEARNED_RANGE = (0.5, 2.0)
"""Factors of epsilon that --bound learned chooses between: those of GradientBound."""
AT_ONCE = 512
"""Examples that are weighed at once."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What an objective must know besides the flags if it weighs examples or classes."""

    parts: Parts
    optimizer: torch.optim.Optimizer
    device: torch.device

    @property
    def meta(self) -> LabelledImages:
        """The meta set, where the model is."""
        assert self.parts.meta is not None
        return self.parts.meta.to(self.device)


def weighed(flags: "Train", threat_model: ThreatModel, loss: RobustLoss, known: Known) -> RobustLoss:
    """The robust loss with the weights that the flags ask for, or as it is; the network's first parameters are from the seed."""
    with seeded(generator_for(flags.seed, "weighting network", 0)):
        found = _learner(flags, threat_model, loss, known)
    if isinstance(found, nn.Module):
        found.to(known.device)
    if flags.class_weights == "balanced":
        return ClassWeighted.balanced(robust_loss=found, class_counts=counts_of_all(known.parts))
    return found


def _learner(flags: "Train", threat_model: ThreatModel, loss: RobustLoss, known: Known) -> RobustLoss:
    if flags.loss == "frl":
        balance = ReMargin(classes=known.parts.train.num_classes)
        beta: dict[str, Any] = {} if flags.beta is None else {"beta": flags.beta}
        return FRL(threat_model=threat_model, held_out=known.meta, steps=flags.attack_steps, balance=balance, **beta)
    if flags.loss not in META_STEPS:
        return loss
    given = {"meta_every": flags.meta_every, "anti_factor": flags.anti_factor, "routing": flags.routing}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings |= {"threat_model": threat_model, "robust_loss": loss, "steps": flags.attack_steps}
    settings |= {"meta_data": known.meta, "optimizer": known.optimizer, "class_counts": known.parts.labelled_counts}
    if flags.loss == "meta-weight-net":
        return MetaWeightNet(**settings)
    if flags.bound == "gradient":
        settings["bound"] = GradientBound()
    elif flags.bound == "remargin":
        settings["bound"] = ReMargin(classes=known.parts.train.num_classes)
    elif flags.bound == "learned":
        settings["network"] = WeightingNetwork(bound_range=LEARNED_RANGE)
    return CAAT(**settings)


def counts_of_all(parts: Parts) -> list[int]:
    """Examples of each class as labelled, if there is one of each: class weights divide by them."""
    counts = parts.labelled_counts
    if min(counts) == 0:
        missing = counts.index(0)
        raise ValueError(
            f"--class-weights must meet an example of every class to train on, got none that is labelled {missing}; "
            "take more examples, or leave it out"
        )
    return counts


def hand_over(before: Any, after: Any) -> None:
    """Give the objective of the next stage what that of the last one has learned."""
    source, target = stateful_part(before), stateful_part(after)
    if target is not None:
        assert source is not None
        target.load_state_dict(source.state_dict())


@torch.no_grad()
def what_was_learned(objective: Any, model: nn.Module, parts: Parts, device: torch.device) -> dict[str, Any] | None:
    """How `CAAT` sees the data to train on, by the last parameters; None for another objective.

    ``shares`` are of the examples that each branch gets, with soft routing of the weights. ``auroc`` is that of the weight of
    the anti-adversary as a sign of a wrong label: 0.5 for a weight that knows nothing of them, None where all labels are right,
    or all wrong. After few ``meta_steps`` the network is about what it was drawn as, and both say little.
    """
    caat = stateful_part(objective)
    if not isinstance(caat, CAAT) or caat.reads_loss:
        return None
    train = parts.train
    batches = [train.select(rows).to(device) for rows in torch.arange(len(train)).split(AT_ONCE)]
    weights = torch.cat([caat.weigh(model, batch.images, batch.labels).weights.cpu() for batch in batches])
    names = caat.network.branches
    routed = weights if caat.routing == "soft" else nn.functional.one_hot(weights.argmax(1), len(names))
    shares = dict(zip(names, routed.double().mean(0).tolist(), strict=True))
    wrong, auroc = parts.wrong.cpu(), None
    if bool(wrong.any()) and not bool(wrong.all()):
        from sklearn.metrics import roc_auc_score

        auroc = float(roc_auc_score(wrong.numpy(), weights[:, names.index("anti_adversary")].numpy()))
    meta_steps = 0 if caat.meta_every is None else -(-int(caat.calls) // caat.meta_every)
    return {"routing": caat.routing, "meta_steps": meta_steps, "shares": shares, "auroc": auroc}


def told_of(learned: dict[str, Any]) -> list[str]:
    """The same in words."""
    shares = ", ".join(f"{name.replace('_', '-')} {share:.1%}" for name, share in learned["shares"].items())
    what, count = "mean weights" if learned["routing"] == "soft" else "branches", learned["meta_steps"]
    lines = [f"{what} of the examples to train on, after {count:,} meta-step{'s' if count != 1 else ''}: {shares}"]
    if learned["auroc"] is not None:
        lines.append(f"weight of the anti-adversary as a sign of a wrong label: AUROC {learned['auroc']:.3f}")
    return lines

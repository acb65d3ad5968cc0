"""Robust accuracy of a model: per-example worst case over several attacks."""

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust import __version__
from metarobust._checks import images, integer, labels, message, require
from metarobust._progress import progress_bar
from metarobust.data import LabelledImages
from metarobust.evaluation._protocols import protocol_attacks
from metarobust.evaluation._report import RobustnessReport, wilson_interval
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack, Model


def evaluate(
    model: Model,
    data: LabelledImages | tuple[Tensor, Tensor] | Iterable[Any],
    *,
    threat_model: ThreatModel,
    attacks: Mapping[str, Attack] | None = None,
    protocol: str = "standard",
    batch_size: int = 1000,
    survivors_only: bool = True,
    seed: int = 0,
) -> RobustnessReport:
    """Measure clean and robust accuracy; an example counts as robust only if no attack changed its correct prediction.

    Every adversarial example is checked against ball and box before it counts.

    Args:
        model: any callable from inputs to logits; an ``nn.Module`` must be in evaluation mode.
        data: ``(x, y)`` tensors, a ``LabelledImages``, or a DataLoader of such pairs; x in input units.
        threat_model: ball and box.
        attacks: named attacks, run in order; default: those of ``protocol``.
        protocol: ``"quick"``, ``"standard"`` or ``"strong"``.
        batch_size: rows per model call.
        survivors_only: run each attack on the examples that withstood those before (as AutoAttack does); False runs every
            attack on every correctly classified example, so that each has its own accuracy.
        seed: of the attacks' random starts.

    Raises:
        ValueError: the model is in training mode, x is outside the box, labels are outside the classes, there is no example.
        TypeError: x is not floating point or y not int64.

    Example:
        >>> x, y = torch.tensor([[0.9, 0.1], [0.55, 0.45]]), torch.tensor([0, 0])
        >>> report = evaluate(lambda x: x, (x, y), threat_model=ThreatModel(epsilon=0.1), protocol="quick")
        >>> report.clean_accuracy, report.worst_case_accuracy
        (1.0, 0.5)
    """
    if isinstance(model, nn.Module) and any(m.training for m in model.modules()):
        raise ValueError(message("model", "in evaluation mode", "a model in training mode", "write model.eval()"))
    integer("batch_size", batch_size, least=1)
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel", repr(threat_model)))
    if attacks is not None and not isinstance(attacks, Mapping):
        raise TypeError(message("attacks", "a mapping from names to attacks", type(attacks).__name__, "write {'pgd': attack}"))
    x, y = _as_tensors(data)
    images(x, lower=threat_model.lower, upper=threat_model.upper)
    labels(y, examples=len(x))
    require(len(x) > 0, "data", "at least one example", "none")
    chosen = dict(protocol_attacks(protocol, threat_model) if attacks is None else attacks)
    device = next((p.device for p in model.parameters()), x.device) if isinstance(model, nn.Module) else x.device
    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    correct, classes = _clean(model, x, y, device, batch_size)
    seconds["clean"] = time.perf_counter() - begin
    survivors, robust, generator = correct.clone(), {}, torch.Generator().manual_seed(seed)
    with progress_bar("evaluating", len(chosen) * len(x)) as advance:
        for name, attack in chosen.items():
            begin = time.perf_counter()
            targets = survivors if survivors_only else correct
            withstood = targets.clone()
            for rows in targets.nonzero().squeeze(1).split(batch_size):
                withstood[rows] = _withstands(model, attack, threat_model, x[rows], y[rows], device, generator)
                advance(len(rows), name)
            survivors &= withstood
            robust[name] = withstood.float().mean().item()
            seconds[name] = time.perf_counter() - begin
    worst = int(survivors.sum())
    return RobustnessReport(
        clean_accuracy=correct.float().mean().item(),
        robust_accuracy=robust,
        worst_case_accuracy=worst / len(x),
        worst_case_interval=wilson_interval(worst, len(x)),
        per_class_clean=_per_class(correct, y, classes),
        per_class_robust=_per_class(survivors, y, classes),
        examples=len(x),
        threat_model=repr(threat_model),
        attacks={name: repr(attack) for name, attack in chosen.items()},
        seconds=seconds,
        warnings=_doubts(model, x[:batch_size].to(device), y[:batch_size].to(device)),
        versions={"metarobust": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
    )


def _as_tensors(data: Any) -> tuple[Tensor, Tensor]:
    if isinstance(data, LabelledImages):
        return data.images, data.labels
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return cast("tuple[Tensor, Tensor]", tuple(data))
    remedy = "for arrays write torch.from_numpy; for a data set write DataLoader(dataset, batch_size=1000)"
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(message("data", "a pair (x, y) of tensors or a DataLoader", type(data).__name__, remedy))
    batches = [(batch[0], batch[1]) for batch in data if isinstance(batch, (tuple, list)) and len(batch) >= 2]
    if any(not isinstance(part, Tensor) or part.dim() == 0 for batch in batches for part in batch):
        raise TypeError(message("data", "a pair (x, y) of tensors or a DataLoader", "batches of something else", remedy))
    require(len(batches) > 0, "data", "at least one batch", "none")
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _doubts(model: Model, x: Tensor, y: Tensor) -> tuple[str, ...]:
    """Reasons why gradient attacks may mislead: examples whose cross-entropy has no input gradient at all."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        loss = F.cross_entropy(model(leaf), y, reduction="sum")
        gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    silent = 1.0 if gradient is None else (gradient.flatten(1).abs().amax(1) == 0).float().mean().item()
    if silent <= 0.01:
        return ()
    return (
        f"{silent:.0%} of the examples have a cross-entropy without any input gradient, so attacks on it stand still there; "
        "trust the margin attacks of protocol='strong', or divide the logits by a constant",
    )


@torch.no_grad()
def _clean(model: Model, x: Tensor, y: Tensor, device: torch.device, batch_size: int) -> tuple[Tensor, int]:
    correct, classes = [], 0
    for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
        logits = model(inputs.to(device))
        require(
            logits.dim() == 2 and len(logits) == len(inputs),
            "model",
            "a callable from inputs [batch, ...] to logits [batch, classes]",
            f"an output of shape {list(logits.shape)} for {len(inputs)} inputs",
        )
        classes = logits.shape[1]
        labels(targets, examples=len(inputs), classes=classes)
        require(bool(logits.isfinite().all()), "model", "such that its logits are finite", "NaN or infinite logits")
        correct.append((logits.argmax(1) == targets.to(device)).cpu())
    return torch.cat(correct), classes


def _withstands(
    model: Model,
    attack: Attack,
    threat_model: ThreatModel,
    x: Tensor,
    y: Tensor,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    x, y = x.to(device), y.to(device)
    x_adv = attack(model, x, y, generator=generator)
    outside = int((~threat_model.contains(x_adv, x)).sum())
    require(
        outside == 0,
        "attacks",
        f"such that every result lies inside {threat_model!r}",
        f"{outside} examples outside from {attack!r}",
        "give the attack the same threat model",
    )
    with torch.no_grad():
        return (model(x_adv).argmax(1) == y).cpu()


def _per_class(right: Tensor, y: Tensor, classes: int) -> tuple[float, ...]:
    y = y.cpu()
    count = torch.bincount(y, minlength=classes).float()
    return tuple((torch.bincount(y, weights=right.float(), minlength=classes) / count).tolist())

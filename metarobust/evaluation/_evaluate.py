"""Robust accuracy of a model: per-example worst case over several attacks."""

import os
import platform
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metarobust import __version__, _checks
from metarobust._checks import choice, explained_memory, images, integer, labels, message, require
from metarobust._files import check_writable
from metarobust._progress import progress_bar
from metarobust._randomness import generator_for
from metarobust.attacks import Square
from metarobust.data import LabelledImages
from metarobust.evaluation._inputs import as_pixels, as_tensors, behind_door, data_digest
from metarobust.evaluation._protocols import PROTOCOLS, protocol_attacks
from metarobust.evaluation._reliability import Doubt, spread_rows
from metarobust.evaluation._reliability_model import model_doubts
from metarobust.evaluation._reliability_results import epsilon_curve, result_doubts, step_losses
from metarobust.evaluation._report import RobustnessReport, wilson_interval
from metarobust.evaluation._resume import Checkpoint, fingerprint, without_addresses
from metarobust.evaluation._run import EvaluationRun, per_class
from metarobust.evaluation._state import BROKEN, UNKNOWN, EvaluationState
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack, Model

CHECKS = "reliability checks"
Curve: TypeAlias = tuple[tuple[float, float], ...]


@torch.inference_mode(False)
def evaluate(
    model: Model,
    data: LabelledImages | tuple[Tensor, Tensor] | Iterable[Any],
    *,
    threat_model: ThreatModel,
    attacks: Mapping[str, Attack] | None = None,
    protocol: str = "standard",
    batch_size: int = 512,
    survivors_only: bool = True,
    seed: int = 0,
    reliability_checks: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> RobustnessReport:
    r"""Measure clean and robust accuracy; an example counts as robust only if no attack changed its correct prediction.

    With attacks :math:`a_1, \dots, a_m` the worst-case accuracy is the fraction of examples with
    :math:`\arg\max f(x) = y` and :math:`\arg\max f(a_k(x)) = y` for every k: an upper bound of the accuracy under the threat
    model. Every adversarial example is checked against ball and box before it counts.

    Pixels stay in float32 (float64 where the data is); a model in half precision gets its inputs cast at its door. The noise
    of a batch depends only on the seed and on the positions of its attack and of the batch.

    Args:
        model: any callable from inputs ``[batch, ...]`` to logits ``[batch, classes]``; an ``nn.Module`` must be in evaluation
            mode. Data is moved to its device.
        data: ``(x, y)`` tensors, a ``LabelledImages``, or a DataLoader of such pairs; x in input units.
        threat_model: ball and box.
        attacks: named attacks, run in order; default: those of ``protocol``.
        protocol: ``"quick"``, ``"standard"`` or ``"strong"``.
        batch_size: rows that an attack is given at once, at least 1: the grain of progress and of checkpoints. The library's
            searches split it to fit memory; for PGD and FGSM on large inputs lower it.
        survivors_only: run each attack on the examples that withstood those before (as AutoAttack does); False runs every
            attack on every correctly classified example, so that each has its own accuracy.
        seed: of all noise, at least 0.
        reliability_checks: look for reasons to doubt the result, and draw the epsilon curve, on at most 100 examples (32 under
            ``"quick"``): the work of some 200 attack steps on them. False, for evaluations in a loop, leaves ``warnings`` empty.
        checkpoint: a file that keeps survivors and adversarial examples while the attacks run. If it is there already, the
            evaluation verifies every example in it and goes on where it stopped; the report is that of an uninterrupted run.
            Its folder must exist. Loading it executes no code.

    Raises:
        ValueError: the model is in training mode, x is outside the box, labels are outside the classes, there is no example,
            an attack leaves the ball, the checkpoint is damaged or of another evaluation.
        TypeError: x is not floating point or y not int64, the model cannot be called.
        FileNotFoundError: the folder of ``checkpoint`` is missing.

    Example:
        >>> x, y = torch.tensor([[0.9, 0.1], [0.55, 0.45]]), torch.tensor([0, 0])
        >>> report = evaluate(lambda x: x, (x, y), threat_model=ThreatModel(epsilon=0.1), protocol="quick")
        >>> report.clean_accuracy, report.worst_case_accuracy, report.broken_by.tolist()
        (1.0, 0.5, [-1, 0])
    """
    _checks.model(model)
    if isinstance(model, nn.Module) and any(m.training for m in model.modules()):
        raise ValueError(message("model", "in evaluation mode", "a model in training mode", "write model.eval()"))
    integer("batch_size", batch_size, least=1)
    integer("seed", seed, least=0)
    if not isinstance(threat_model, ThreatModel):
        raise TypeError(message("threat_model", "a ThreatModel", repr(threat_model)))
    if attacks is not None and not isinstance(attacks, Mapping):
        raise TypeError(message("attacks", "a mapping from names to attacks", type(attacks).__name__, "write {'pgd': attack}"))
    require(
        attacks is None or len(attacks) > 0, "attacks", "at least one attack", "none", "write attacks=None for the protocol's"
    )
    for name, attack in (attacks or {}).items():
        if isinstance(attack, type) or not callable(attack):
            got = f"{attack!r} under {name!r}"
            raise TypeError(message("attacks", "a mapping from names to attacks", got, "write {'pgd': PGD(threat_model=...)}"))
    taken = sorted({"clean", CHECKS} & set(attacks or ()))
    require(not taken, "attacks", f"named otherwise than 'clean' and {CHECKS!r}", taken)
    choice("protocol", protocol, PROTOCOLS)
    if checkpoint is not None:
        check_writable(Path(checkpoint), "evaluation.safetensors")
    x, y = as_tensors(data)
    images(x, lower=threat_model.lower, upper=threat_model.upper)
    labels(y, examples=len(x))
    require(len(x) > 0, "data", "at least one example", "none")

    begin = time.perf_counter()
    x, y = as_pixels(x), y.cpu()
    model, device, dtype = behind_door(model, x)
    run = EvaluationRun(model=model, x=x, y=y, threat_model=threat_model, device=device, dtype=dtype, batch_size=batch_size)
    predictions, logits, classes = run.clean()
    correct = predictions == y
    chosen = dict(protocol_attacks(protocol, threat_model, classes) if attacks is None else attacks)
    state = EvaluationState(x, predictions, len(chosen))
    clean_seconds = time.perf_counter() - begin

    begin = time.perf_counter()
    own = {"seed": seed, "batch_size": batch_size, "survivors_only": survivors_only}
    doubts: list[Doubt] = []
    file = None
    if checkpoint is not None:
        marks = fingerprint(x, y, threat_model=threat_model, attacks=chosen, **own)
        file = Checkpoint(Path(checkpoint), marks, logits, run.rounding)
        failed, stored = run.resume(state, file, predictions)
        doubts += [_stale(failed, stored)] if failed else []
    state.seconds = {"clean": clean_seconds} | {name: state.seconds.get(name, 0.0) for name in chosen}
    rows, few_labels = spread_rows(torch.arange(len(x)), y, 32 if attacks is None and protocol == "quick" else 100)
    few, few_labels = x[rows.to(x.device)].to(device), few_labels.to(device)
    around = {"threat_model": threat_model, "generator": generator_for(seed, CHECKS, 0)}
    remedy = "use a device with more, or write reliability_checks=False"
    roomy = partial(explained_memory, "the reliability checks' rows", f"{len(few)} at once", remedy)
    if reliability_checks:
        with roomy():
            doubts += model_doubts(model, few, few_labels, attacks=chosen, **around)
    check_seconds = time.perf_counter() - begin

    curve: Curve = ()
    with progress_bar("evaluating", len(chosen) * len(x)) as advance:
        run.attack(state, chosen, correct, advance, survivors_only=survivors_only, seed=seed, checkpoint=file)
        broken_by = state.broken_by(correct)
        begin = time.perf_counter()
        if reliability_checks:
            advance(0, CHECKS)
            losses = {}
            if _follows_gradients(model, few):
                with roomy():
                    curve = epsilon_curve(model, few, few_labels, **around)
                    losses = step_losses(model, few, few_labels, **around)
            doubts += result_doubts(
                threat_model=threat_model,
                correct=correct,
                predicted=predictions,
                classes=classes,
                broken_by={name: broken_by == position for position, name in enumerate(chosen)},
                gradient_free=[name for name, attack in chosen.items() if isinstance(attack, Square)],
                curve=curve,
                curve_examples=len(few),
                losses=losses,
            )
        state.seconds[CHECKS] = check_seconds + time.perf_counter() - begin
    survivors = correct & (broken_by < 0)
    worst = int(survivors.sum())
    return RobustnessReport(
        clean_accuracy=correct.double().mean().item(),
        robust_accuracy=state.accuracies(correct, list(chosen), survivors_only=survivors_only),
        worst_case_accuracy=worst / len(x),
        worst_case_interval=wilson_interval(worst, len(x)),
        per_class_clean=per_class(correct, y, classes),
        per_class_robust=per_class(survivors, y, classes),
        examples=len(x),
        attacked={name: int((state.outcomes[k] != UNKNOWN).sum()) for k, name in enumerate(chosen)},
        broken={name: int((state.outcomes[k] == BROKEN).sum()) for k, name in enumerate(chosen)},
        epsilon_curve=curve,
        threat_model=repr(threat_model),
        attacks={name: without_addresses(repr(attack)) for name, attack in chosen.items()},
        settings={
            "protocol": protocol if attacks is None else None,
            "norm": threat_model.norm,
            "epsilon": threat_model.epsilon,
            "lower": threat_model.lower,
            "upper": threat_model.upper,
            **own,
            "data": data_digest(x, y),
            "checked_examples": len(few) if reliability_checks else 0,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        seconds=state.seconds,
        warnings=tuple(doubts),
        versions={"metarobust": __version__, "torch": torch.__version__, "python": platform.python_version()},
        inputs=x.cpu(),
        labels=y,
        clean_predictions=predictions,
        adversarial_examples=state.adversarial,
        adversarial_predictions=state.predictions,
        broken_by=broken_by,
    )


def _follows_gradients(model: Model, x: Tensor) -> bool:
    """Whether autograd can follow the model at all; where it cannot, the gradient attacks of the checks would only refuse."""
    with torch.enable_grad():
        return model(x[:1].clone().requires_grad_()).requires_grad


def _stale(failed: int, stored: int) -> Doubt:
    return Doubt(
        check="checkpoint",
        reason=f"{failed} of {stored} adversarial examples in the checkpoint fooled the model no longer, and were attacked again",
        remedy="the file or the model has changed, or its output is random: delete the file and evaluate from the start",
    )

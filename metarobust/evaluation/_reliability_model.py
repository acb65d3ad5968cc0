"""Reasons to doubt an evaluation that the model and its inputs show before any attack runs."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metarobust._tensors import flat, norms, per_example
from metarobust.evaluation._reliability import Doubt, left_alone, percent, spread_rows
from metarobust.losses import cross_entropy, targeted_margin
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack, Model

SILENT = 0.01
FEWEST_FOR_BATCHNORM = 16
SHORT, MIDDLE, LONG = 1 / 64, 1 / 16, 1 / 8
"""Steps in epsilons: PGD-40 takes steps of 1/16, PGD-20 of 1/8; 1/64 is where APGD ends."""


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    """Input gradients of cross-entropy and margin at ``x``; the margin is taken to ``rival``, the best wrong class at x."""

    x: Tensor
    logits: Tensor
    rival: Tensor
    cross_entropy: Tensor
    margin: Tensor


@torch.inference_mode(False)
def model_doubts(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    generator: torch.Generator,
    attacks: Mapping[str, Attack] | None = None,
) -> tuple[Doubt, ...]:
    """Reasons to doubt what attacks on this model will say, by 13 passes over at most 100 examples.

    Touches no mode, no buffer, no ``.grad`` and no global random state.

    Args:
        model: any callable from inputs to logits.
        x: examples in the box, on the model's device, ``[n, ...]``; of more than 100, 100 are taken evenly.
        y: labels, int64 ``[n]``.
        threat_model: ball and box.
        generator: of the noise that moves examples off their place.
        attacks: those to come, by name, for what they ask of the number of classes.

    Example:
        >>> x, y = torch.rand(8, 3), torch.arange(8) % 3
        >>> threat_model, generator = ThreatModel(epsilon=0.1), torch.Generator().manual_seed(0)
        >>> [d.check for d in model_doubts(lambda x: x.softmax(1), x, y, threat_model=threat_model, generator=generator)]
        ['softmax_outputs']
    """
    if len(x) == 0:
        return ()
    x, y = spread_rows(x, y)
    with left_alone(model, x) as modules:
        here = _gradients(model, x, y)
        nearby = dataclasses.replace(threat_model, epsilon=threat_model.epsilon * MIDDLE)
        beside = _gradients(model, nearby.sample(x, generator=generator), y)
        with torch.no_grad():
            jitter = (model(x) - here.logits).abs().amax(1).double()
            found = [
                *_training_mode(modules),
                *_normalised_inputs(x, threat_model),
                *_large_epsilon(x, y, threat_model),
                *_softmax_outputs(here, beside),
                *_randomised_output(model, here, jitter),
                *_batchnorm_gap(model, modules, here, y),
                *_zero_gradients(here, beside, y),
                *_shattered_gradients(model, beside, y, threat_model, jitter),
            ]
    return (*found, *class_doubts(here.logits.shape[1], attacks or {}))


def _gradients(model: Model, x: Tensor, y: Tensor) -> _Gradients:
    """Two forward-backward passes; a model that autograd cannot follow has gradients of zero.

    Not one forward pass for both: a compiled model may refuse a second backward pass through the same graph.
    """
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        rival = logits.detach().scatter(1, y[:, None], float("-inf")).argmax(1)
        by_cross_entropy = _slope(cross_entropy(logits, y), leaf)
        by_margin = _slope(targeted_margin(model(leaf), y, rival), leaf)
    return _Gradients(x=x, logits=logits.detach(), rival=rival, cross_entropy=by_cross_entropy, margin=by_margin)


def _slope(losses: Tensor, leaf: Tensor) -> Tensor:
    gradient = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0] if losses.requires_grad else None
    return torch.zeros_like(leaf) if gradient is None else gradient


def _resolution(logits: Tensor) -> float:
    """Relative rounding of the arithmetic behind the logits: half precision shows through a cast, TF32 is supposed on a GPU."""
    coarse = next((d for d in (torch.bfloat16, torch.float16) if torch.equal(logits.to(d).to(logits.dtype), logits)), None)
    finest = torch.finfo(logits.dtype).eps if coarse is None else torch.finfo(coarse).eps
    return max(finest, 2**-11) if logits.is_cuda and logits.dtype != torch.float64 else finest


def _training_mode(modules: list[nn.Module]) -> Iterator[Doubt]:
    training = [type(module).__name__ for module in modules if module.training]
    if training:
        yield Doubt(
            check="training_mode",
            reason=f"{len(training)} of {len(modules)} modules inside the model are in training mode (first: {training[0]})",
            remedy="write module.eval() before the evaluation",
        )


def _normalised_inputs(x: Tensor, threat_model: ThreatModel) -> Iterator[Doubt]:
    lower, upper = threat_model.lower, threat_model.upper
    width = upper - lower
    values = x.float()
    low, high = (v.item() for v in torch.aminmax(values))
    box = f"the box [{lower:g}, {upper:g}]"
    # Below a few dozen numbers a narrow range proves nothing.
    if high - low < width / 10 and x.numel() >= 64:
        yield Doubt(
            check="normalised_inputs",
            reason=f"the inputs lie in [{low:.3g}, {high:.3g}], {percent((high - low) / width)} of {box}",
            remedy="check that they were not divided by 255 twice, and give the box the range of valid inputs",
        )
    elif x.dim() == 4 and lower < 0 and max(low - lower, upper - high) > 0.02 * width:
        mean, std = values.mean().item(), values.std().item()
        if abs(mean) < 0.35 and 0.7 < std < 1.4:
            yield Doubt(
                check="normalised_inputs",
                reason=f"the images have mean {mean:.2f} and standard deviation {std:.2f} and do not reach the ends of {box}: "
                "they look normalised, so epsilon and the box are not in pixels",
                remedy="put normalisation inside the model (metarobust.models.Normalize) and pass images in [0, 1]",
            )


def _large_epsilon(x: Tensor, y: Tensor, threat_model: ThreatModel) -> Iterator[Doubt]:
    few, labels = spread_rows(x, y, 64)
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[threat_model.norm]
    points = flat(few).float()
    # Not by the matrix product: its cancellation is as large as a small epsilon.
    distances = torch.cdist(points, points, p=order, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.masked_fill(labels[:, None] == labels, float("inf")).amin(1)
    reached = (nearest <= threat_model.epsilon).double().mean().item()
    if reached > 0.5:
        yield Doubt(
            check="large_epsilon",
            reason=f"for {percent(reached)} of the examples an example of another class lies within epsilon = "
            f"{threat_model.epsilon:g}: no classifier can be right about both",
            remedy="check the unit of epsilon (8-bit images in [0, 1]: 8 / 255) and the scale of the inputs",
        )


def _softmax_outputs(here: _Gradients, beside: _Gradients) -> Iterator[Doubt]:
    tolerance = max(1e-5, 4 * _resolution(here.logits))
    for logits in (here.logits.double(), beside.logits.double()):
        # Log-probabilities need no word: cross-entropy, margin and DLR are the same for them as for the logits.
        if logits.shape[1] < 2 or logits.amin() < 0 or (logits.sum(1) - 1).abs().amax() > tolerance:
            return
    yield Doubt(
        check="softmax_outputs",
        reason="the outputs are probabilities (not negative, each row sums to 1), so every loss loses its slope where the model "
        "is sure, and the DLR loss its meaning",
        remedy="return the logits: remove the last softmax",
    )


def _randomised_output(model: Model, here: _Gradients, jitter: Tensor) -> Iterator[Doubt]:
    resolution = _resolution(here.logits)
    scale = here.logits.abs().amax().double().clamp(min=torch.finfo(torch.float32).tiny)
    noise = (jitter.amax() / scale).item()
    if noise > max(1e-4, 2 * resolution):
        yield Doubt(
            check="randomised_output",
            reason=f"two passes over the same inputs differ by up to {noise:.2g} of the largest logit",
            remedy="average gradients over random passes (eot_samples=20), run several seeds, or fix the model's noise",
        )
    elif len(here.x) > 1:
        halves = torch.cat([model(half) for half in here.x.flip(0).chunk(2)]).flip(0)
        moved = ((halves - here.logits).abs().amax(1).double() / scale).median().item()
        if moved > max(1e-2, 16 * resolution):
            yield Doubt(
                check="batch_dependent_output",
                reason=f"the same inputs in other batches give logits that differ by {moved:.2g} of the largest",
                remedy="the model lets examples see each other (BatchNorm in training mode, noise by position): "
                "make each row's output depend on that row alone",
            )


def _batchnorm_gap(model: Model, modules: list[nn.Module], here: _Gradients, y: Tensor) -> Iterator[Doubt]:
    layers = [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None and not m.training]
    if not layers or len(y) < FEWEST_FOR_BATCHNORM:
        return

    def with_batch_statistics(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.batch_norm(inputs[0], None, None, layer.weight, layer.bias, training=True, eps=layer.eps)

    # By hooks and not in training mode: dropout stays off, nothing is written, and closures are served too.
    hooks = [layer.register_forward_hook(with_batch_statistics) for layer in layers]
    try:
        logits = getattr(model, "_orig_mod", model)(here.x)
    finally:
        for hook in hooks:
            hook.remove()
    running, batch = here.logits.argmax(1) == y, logits.argmax(1) == y
    gained, lost = int((batch & ~running).sum()), int((running & ~batch).sum())
    # Three standard deviations of a paired comparison. Only a gain counts: with few classes in the batch, its statistics are
    # the wrong ones, and an accuracy that they lower says nothing.
    if gained - lost > max(0.05 * len(y), 3 * (gained + lost) ** 0.5):
        yield Doubt(
            check="batchnorm_gap",
            reason=f"accuracy is {percent(running.double().mean().item())} with BatchNorm's running statistics and "
            f"{percent(batch.double().mean().item())} with those of the batch",
            remedy="estimate the running statistics again (training data through model.train() under torch.no_grad(), then "
            "model.eval()), or scale the inputs as in training",
        )


def _zero_gradients(here: _Gradients, beside: _Gradients, y: Tensor) -> Iterator[Doubt]:
    right = here.logits.argmax(1) == y
    if not right.any():
        return

    def silent(name: str) -> float:
        """Share of examples without a usable gradient, neither at their place nor beside it, where attacks start."""
        largest = torch.stack([norms(getattr(place, name).double(), "linf") for place in (here, beside)])
        return ((largest == 0) | ~largest.isfinite()).all(0)[right].double().mean().item()

    by_cross_entropy, by_margin = silent("cross_entropy"), silent("margin")
    if max(by_cross_entropy, by_margin) <= SILENT:
        return
    if by_margin <= SILENT:
        yield Doubt(
            check="zero_gradients",
            reason=f"{percent(by_cross_entropy)} of the examples have a cross-entropy without any input gradient, so attacks on "
            "it stand still there",
            remedy="trust the attacks on the margin, or divide the logits by a constant",
        )
        return
    yield Doubt(
        check="zero_gradients",
        reason=f"{percent(by_margin)} of the examples have a margin, and {percent(by_cross_entropy)} a cross-entropy, without "
        "any input gradient (0, NaN or infinite), so gradient attacks stand still there",
        remedy="look for round(), argmax(), detach() or saturated activations in the model, attack a differentiable stand-in, "
        "and trust a gradient-free attack (Square)",
    )


def _shattered_gradients(
    model: Model, start: _Gradients, y: Tensor, threat_model: ThreatModel, jitter: Tensor
) -> Iterator[Doubt]:
    slope = start.margin
    if threat_model.epsilon == 0 or not slope.isfinite().all():
        return
    steepest = slope.sign()
    if threat_model.norm != "linf":  # in l1 too along the gradient: one pixel alone would judge one pixel alone
        length = norms(slope.double(), threat_model.norm).clamp(min=torch.finfo(torch.float32).tiny)
        steepest = (slope.double() / per_example(length, slope)).to(slope.dtype)
    rounding = 4 * _resolution(start.logits) * start.logits.abs().amax(1).double() + 2 * jitter
    off: dict[float, Tensor] = {}
    for size in (SHORT, MIDDLE, LONG):
        step = size * threat_model.epsilon * steepest
        ahead, behind = ((start.x + s * step).clamp(threat_model.lower, threat_model.upper) for s in (1, -1))
        seen = _margin(model, ahead, y, start.rival) - _margin(model, behind, y, start.rival)
        foretold = (flat(slope).double() * flat(ahead.double() - behind.double())).sum(1)
        larger = torch.maximum(seen.abs(), foretold.abs())
        judged = larger > 4 * rounding
        if 4 * int(judged.sum()) >= len(y):  # else the change drowns in rounding
            off[size] = (seen - foretold)[judged].abs() / larger[judged]
    near = [size for size in (SHORT, MIDDLE) if size in off] or list(off)
    wrong = min(((_share(off[size], 0.5), size) for size in near), default=(0.0, LONG))
    useless = _share(off[LONG], 0.8) if LONG in off else 0.0
    if wrong[0] > 0.25 or useless > 0.5:
        share, size, factor = (*wrong, 2) if wrong[0] > 0.25 else (useless, LONG, 5)
        yield Doubt(
            check="shattered_gradients",
            reason=f"for {percent(share)} of the examples a step of epsilon / {round(1 / size)} along the gradient changes the "
            f"margin {factor} times more or less than the gradient says, or the other way",
            remedy="look for rounding, steep or periodic layers or a replaced backward pass in the model, attack a smooth "
            "stand-in, and trust a gradient-free attack (Square)",
        )


def _margin(model: Model, x: Tensor, y: Tensor, rival: Tensor) -> Tensor:
    return targeted_margin(model(x).double(), y, rival)


def _share(errors: Tensor, limit: float) -> float:
    return (errors > limit).double().mean().item()


def class_doubts(classes: int, attacks: Mapping[str, Attack]) -> tuple[Doubt, ...]:
    """What the attacks ask for that a model of so many classes does not have.

    Example:
        >>> from metarobust.attacks import APGD
        >>> print(*class_doubts(2, {"apgd-dlr": APGD(threat_model=ThreatModel(), loss="dlr")}))
        apgd-dlr climbs DLR, which needs 3 classes, and the model has 2; write loss='margin', which has the same sign and needs 2
    """
    found: list[Doubt] = []
    for name, attack in attacks.items():
        fields: Any = attack
        for position, part in enumerate(getattr(fields, "attacks", ())):
            found += class_doubts(classes, {f"{name}[{position}]": part})
        targets = getattr(fields, "targets", None)
        count = targets if isinstance(targets, int) else getattr(fields, "target_count", None)
        needed = 3 if targets is None else 4
        if getattr(fields, "loss", None) == "dlr" and classes < needed:
            found.append(
                Doubt(
                    check="fewer_classes_than_targets",
                    reason=f"{name} climbs {'' if targets is None else 'targeted '}DLR, which needs {needed} classes, and the "
                    f"model has {classes}",
                    remedy="write loss='margin', which has the same sign and needs 2",
                )
            )
        elif count is not None and count > classes - 1:
            found.append(
                Doubt(
                    check="fewer_classes_than_targets",
                    reason=f"{name} asks for {count} wrong classes, and the model has {classes - 1}",
                    remedy=f"nothing is lost, all of them are attacked: write {classes - 1} to say so",
                )
            )
    return tuple(found)

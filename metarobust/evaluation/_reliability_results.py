"""Reasons to doubt an evaluation that its results show: what a sound attack must achieve, and a gradient-free one must not."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from metarobust._tensors import norms
from metarobust.attacks import APGD, PGD
from metarobust.evaluation._reliability import Doubt, left_alone, percent, spread_rows
from metarobust.losses import margin
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack, Model

FRACTIONS = (0.25, 0.5, 1.0, 2.0, 4.0)
STEPS = (5, 20)
ALLOWED_GRADIENT_FREE = 0.002
FEW_EXAMPLES = 100
FEWEST_FOR_CHANCE, ABOVE_CHANCE = 20, 0.1


def short_attack(threat_model: ThreatModel, steps: int) -> Attack:
    """The attack behind curve and steps: PGD on the margin; in l1, where PGD moves one coordinate per step, APGD."""
    if threat_model.norm == "l1":
        return APGD(threat_model=threat_model, steps=steps, loss="margin", survivors_only=True)
    return PGD(threat_model=threat_model, steps=steps, loss="margin")


def covering_radius(x: Tensor, threat_model: ThreatModel) -> float:
    """The radius at which the ball round every example contains the box, input units; in l_inf the width of the box.

    Example:
        >>> covering_radius(torch.tensor([[0.0, 0.5]]), ThreatModel(norm="l1", epsilon=0.1))
        1.5
    """
    if threat_model.norm == "linf" or len(x) == 0:
        return threat_model.upper - threat_model.lower
    farthest = torch.maximum(x - threat_model.lower, threat_model.upper - x)
    return norms(farthest.double(), threat_model.norm).amax().item()


@torch.inference_mode(False)
def epsilon_curve(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    fractions: Sequence[float] = FRACTIONS,
    generator: torch.Generator,
) -> tuple[tuple[float, float], ...]:
    """Accuracy under a short attack at growing radii: clean first, then fractions of epsilon, then the whole box.

    Each radius is attacked afresh, not from the results of a smaller one, so that a failing attack shows as a rise. An example
    counts as broken if 5 or else 20 steps break it.

    Args:
        model: any callable from inputs to logits.
        x: examples in the box, on the model's device, ``[n, ...]``; of more than 100, 100 are taken evenly.
        y: labels, int64 ``[n]``.
        threat_model: ball and box.
        fractions: radii, in epsilons; those beyond the box are left out.
        generator: of the random starts.

    Returns:
        Pairs (radius in input units, accuracy), in the order of the radii; none without examples.

    Example:
        >>> x, y, threat_model = torch.tensor([[0.9, 0.1]]), torch.tensor([0]), ThreatModel(epsilon=0.3)
        >>> epsilon_curve(lambda x: x, x, y, threat_model=threat_model, fractions=(1, 2), generator=torch.Generator())
        ((0.0, 1.0), (0.3, 1.0), (0.6, 0.0), (1.0, 0.0))
    """
    if len(x) == 0:
        return ()
    x, y = spread_rows(x, y)
    whole = covering_radius(x, threat_model)
    radii = sorted({f * threat_model.epsilon for f in fractions if 0 < f * threat_model.epsilon < whole})
    balls = [dataclasses.replace(threat_model, epsilon=radius) for radius in radii]
    # The whole box is one set in every norm, and l_inf the norm in which attacks cross it in few steps.
    box = dataclasses.replace(threat_model, norm="linf", epsilon=threat_model.upper - threat_model.lower)
    with left_alone(model, x), torch.no_grad():
        right = model(x).argmax(1) == y
        points = [(0.0, right.double().mean().item())]
        for radius, ball in zip([*radii, whole], [*balls, box], strict=True):
            standing = right.clone()
            for steps in STEPS:
                rows = standing.nonzero().squeeze(1)
                if len(rows):
                    moved = short_attack(ball, steps)(model, x[rows], y[rows], generator=generator)
                    standing[rows] = model(moved).argmax(1) == y[rows]
            points.append((radius, standing.double().mean().item()))
    return tuple(points)


@torch.inference_mode(False)
def step_losses(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat_model: ThreatModel,
    generator: torch.Generator,
    steps: Sequence[int] = STEPS,
) -> dict[int, Tensor]:
    """Margin of each example after short attacks of so many steps from one random start; entry 0 holds the clean margins.

    Returns:
        Float64 ``[n]`` on the CPU per number of steps; of more than 100 examples, 100 are taken evenly.

    Example:
        >>> x, y, threat_model = torch.tensor([[0.9, 0.1]]), torch.tensor([0]), ThreatModel(epsilon=0.1)
        >>> found = step_losses(lambda x: x, x, y, threat_model=threat_model, generator=torch.Generator())
        >>> {steps: round(margins.item(), 3) for steps, margins in found.items()}
        {0: -0.8, 5: -0.6, 20: -0.6}
    """
    x, y = spread_rows(x, y)
    start = generator.get_state()
    found = {}
    with left_alone(model, x), torch.no_grad():
        for count in (0, *steps):
            moved = x
            if count:
                generator.set_state(start)
                moved = short_attack(threat_model, count)(model, x, y, generator=generator)
            found[count] = margin(model(moved).double(), y).cpu()
    return found


def result_doubts(
    *,
    threat_model: ThreatModel,
    correct: Tensor,
    predicted: Tensor,
    broken_by: Mapping[str, Tensor],
    gradient_free: Collection[str] = (),
    curve: Sequence[tuple[float, float]] = (),
    curve_examples: int = 100,
    losses: Mapping[int, Tensor] | None = None,
    classes: int | None = None,
) -> tuple[Doubt, ...]:
    """Reasons to doubt a finished evaluation.

    Args:
        threat_model: ball and box.
        correct: whether each clean example is classified correctly, bool ``[n]``.
        predicted: the clean predictions, int64 ``[n]``.
        broken_by: for each attack, in the order of running, the examples that it was the first to break, bool ``[n]``.
        gradient_free: names of the attacks that use no gradient; they should run last.
        curve: the result of :func:`epsilon_curve`.
        curve_examples: on how many examples.
        losses: the result of :func:`step_losses`.
        classes: number of logits; None leaves out the comparison with guessing.

    Example:
        >>> everyone = torch.ones(100, dtype=torch.bool)
        >>> results = dict(correct=everyone, predicted=torch.arange(100) % 10, broken_by={"pgd": ~everyone, "square": everyone})
        >>> [d.check for d in result_doubts(threat_model=ThreatModel(), gradient_free={"square"}, **results)]
        ['gradient_free_wins']
    """
    return (
        *_no_better_than_chance(correct, classes),
        *_gradient_free_wins(broken_by, gradient_free, len(correct)),
        *_steps_do_not_help(losses or {}, threat_model),
        *_larger_epsilon_does_not_help(curve, curve_examples),
        *_not_zero_at_full_epsilon(curve, curve_examples, predicted),
        *_few_examples(correct, broken_by),
    )


def _no_better_than_chance(correct: Tensor, classes: int | None) -> Iterator[Doubt]:
    if classes is None or classes < 2 or len(correct) < FEWEST_FOR_CHANCE:
        return
    # Untrained networks mostly answer one class, and features that happen to fit lift them a few points above 1 / classes: a
    # tenth of the way from guessing to always right, which any trained model has left behind, leaves room for that.
    accuracy, guessing = correct.double().mean().item(), 1 / classes
    if accuracy <= guessing + ABOVE_CHANCE * (1 - guessing):
        yield Doubt(
            check="no_better_than_chance",
            reason=f"the clean accuracy is {percent(accuracy)}, where guessing among {classes} classes gives {percent(guessing)}",
            remedy="load the weights (in a shell: pass --weights); check the label encoding, and the normalisation in the model",
        )


def _gradient_free_wins(broken_by: Mapping[str, Tensor], gradient_free: Collection[str], examples: int) -> Iterator[Doubt]:
    from scipy.special import bdtrc

    names = list(broken_by)
    led = [name for name in names if name not in gradient_free]
    # Before the first gradient attack nothing is left standing by one.
    late = [name for name in names[names.index(led[0]) :] if name in gradient_free] if led else []
    won = sum(int(broken_by[name].sum()) for name in late)
    # How likely so many wins are at a rate of 0.2 %: on 100 examples two are too many, on 10,000 twenty-nine.
    if won and bdtrc(won - 1, examples, ALLOWED_GRADIENT_FREE) < 0.05:
        yield Doubt(
            check="gradient_free_wins",
            reason=f"{', '.join(late)} broke {won} of {examples} examples ({percent(won / examples)}) that the gradient attacks "
            "left standing, without a gradient",
            remedy="the gradients mislead: look for their cause in the other warnings, attack with more steps and restarts, on "
            "a smooth stand-in, and with more queries",
        )


def _steps_do_not_help(losses: Mapping[int, Tensor], threat_model: ThreatModel) -> Iterator[Doubt]:
    counts = sorted(losses)
    if len(counts) < 3 or threat_model.epsilon == 0:
        return
    few, many = counts[1], counts[-1]
    right = losses[0] < 0
    clean, after_few, after_many = (losses[count][right] for count in (0, few, many))
    if len(clean) == 0:
        return
    tie = 0.01 * torch.maximum((after_few - clean).abs(), (after_many - clean).abs())
    worse, better = (int((sign * (after_few - after_many) > tie).sum()) for sign in (1, -1))
    stuck = (after_many <= clean).double().mean().item()
    remedy = (
        "the steps do not follow the loss: pass inputs in float32 (half precision swallows small steps), set step_size, look "
        "for shattered gradients, and trust a gradient-free attack (Square)"
    )
    if stuck > 0.5:
        reason = f"{many} gradient steps do not raise the margin of {percent(stuck)} of the examples above its clean value"
        yield Doubt(check="steps_do_not_help", reason=reason, remedy=remedy)
    elif worse - better > 3 * (worse + better) ** 0.5:  # three standard deviations of a sign test
        reason = f"of {len(clean)} examples, {worse} have a lower margin after {many} gradient steps than after {few}, {better} "
        yield Doubt(check="steps_do_not_help", reason=reason + "a higher one", remedy=remedy)


def _larger_epsilon_does_not_help(curve: Sequence[tuple[float, float]], examples: int) -> Iterator[Doubt]:
    # The first point is the clean accuracy. One example in twenty may change sides by the luck of the start; three standard
    # deviations on top.
    luck = 0.05 + 3 * (0.05 / max(1, examples)) ** 0.5
    for (small, before), (large, after) in combinations(curve[1:], 2):
        rises = after - before > luck
        # An attack that broke 5 % of the examples finds more at four times the radius, unless it stops following the loss.
        broken = curve[0][1] - before
        stays = large >= 3.9 * small and broken >= max(0.05, 5 / examples) and before >= 0.2 and after >= before
        if rises or stays:
            yield Doubt(
                check="larger_epsilon_does_not_help",
                reason=f"accuracy under a short attack is {percent(before)} at epsilon = {small:.4g} and {percent(after)} at "
                f"{large:.4g}, though the larger ball contains the smaller",
                remedy="the attack loses its way: more steps and restarts, a smaller step_size, a gradient-free attack (Square)",
            )
            return


def _not_zero_at_full_epsilon(curve: Sequence[tuple[float, float]], examples: int, predicted: Tensor) -> Iterator[Doubt]:
    # A model that predicts one class everywhere cannot be moved; of two, each is reachable from the other.
    if not curve or len(predicted.unique()) < 2:
        return
    radius, accuracy = curve[-1]
    if accuracy * examples > max(1.5, 0.02 * examples):
        yield Doubt(
            check="not_zero_at_full_epsilon",
            reason=f"accuracy is still {percent(accuracy)} at epsilon = {radius:.4g}, where any input may take the place of "
            "any other, and must be 0 %",
            remedy="the attack fails: look for zero or shattered gradients and for inputs that the model ignores, and trust a "
            "gradient-free attack (Square)",
        )


def _few_examples(correct: Tensor, broken_by: Mapping[str, Tensor]) -> Iterator[Doubt]:
    examples = len(correct)
    if not 0 < examples < FEW_EXAMPLES:
        return
    standing = correct.clone()
    for broken in broken_by.values():
        standing &= ~broken
    share, z = standing.double().mean().item(), 1.959964
    width = z * (4 * examples * share * (1 - share) + z * z) ** 0.5 / (examples + z * z)  # Wilson's interval
    yield Doubt(
        check="few_examples",
        reason=f"on {examples} examples the 95 % interval of the robust accuracy is {percent(width)} wide",
        remedy="evaluate on 1000 examples or more, or quote the interval",
    )

"""Robey et al. (2024), arXiv 2306.11035: maximise margins, class by class, not the cross-entropy.

Claim: for three classes or more the maximum of the cross-entropy may be a point that is classified correctly, while an
adversarial example exists; the largest margin over all wrong classes finds it. Two demonstrations:

1. An affine classifier of one number for which exact cross-entropy ascent walks away from the only adversarial examples.
2. An adversarially trained digit classifier, attacked with the same number of backward passes per example.

Command:   uv run python examples/robey2024_beta_attack.py [--figure counterexample.png] [--quick]
Time:      20 seconds on 2 cores; --quick a few seconds, with smaller numbers.
Expected:  part 1: PGD ends at t = -1 (correct), BETA at t = +1 (misclassified), for every number of classes above 2;
           part 2 (seed 0), robust accuracy at 90 backward passes: PGD-90 0.669, PGD-10 with 9 restarts 0.644, APGD-90 0.654,
           BETA-10 0.643 with RMSprop and 0.644 with APGD's steps.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from metarobust.attacks import APGD, BETA, PGD
from metarobust.data import digits_pools
from metarobust.losses import cross_entropy, margin
from metarobust.models import mlp
from metarobust.threat_models import ThreatModel


def counterexample(t: Tensor, classes: int) -> Tensor:
    """Logits ``[batch, classes]`` of a number in [-1, 1]; the label is 0, and its rival 1 wins for t > 0.5."""
    t = t.flatten()
    label = 0.1 + 2 * (1 + t)
    rival = label + 0.2 * t - 0.1
    return torch.stack([label, rival, *[torch.zeros_like(t)] * (classes - 2)], 1)


def part_one() -> None:
    threat_model = ThreatModel(norm="linf", epsilon=1.0, lower=-1.0, upper=1.0)
    attacks = {
        "PGD on cross-entropy": PGD(threat_model=threat_model, steps=50, random_start=False),
        "BETA": BETA(threat_model=threat_model, steps=50, random_start=False),
    }
    x, y = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    for classes in (2, 3, 4, 10):
        for name, attack in attacks.items():
            end = attack(lambda t, classes=classes: counterexample(t, classes), x, y)
            logits = counterexample(end, classes)
            loss, lead = cross_entropy(logits, y).item(), margin(logits, y).item()
            verdict = "misclassified" if lead > 0 else "correct"
            found = f"cross-entropy {loss:.3f}, margin {lead:+.1f}, {verdict}"
            print(f"{classes:2} classes, {name:21} ends at t = {end.item():+.0f}: {found}")


def part_two(*, quick: bool) -> None:
    torch.manual_seed(0)
    pools = digits_pools(0)
    threat_model = ThreatModel(norm="linf", epsilon=0.15)
    model = mlp([64, 128, 128, 10])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    teacher = PGD(threat_model=threat_model, steps=5)
    for _ in range(20 if quick else 300):
        x_adv = teacher(model, pools.meta_train.images, pools.meta_train.labels)
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), pools.meta_train.labels).backward()
        optimizer.step()
    model.eval()
    data = pools.test.select(torch.arange(100 if quick else 697))
    passes = 9 if quick else 90
    attacks = {
        f"PGD-{passes} on cross-entropy": PGD(threat_model=threat_model, steps=passes),
        f"PGD-{passes // 9}, 9 restarts": PGD(threat_model=threat_model, steps=passes // 9, restarts=9),
        f"APGD-{passes} on cross-entropy": APGD(threat_model=threat_model, steps=passes),
        f"BETA-{passes // 9} (RMSprop)": BETA(threat_model=threat_model, steps=passes // 9),
        f"BETA-{passes // 9} (APGD steps)": BETA(threat_model=threat_model, steps=passes // 9, step_rule="apgd"),
    }
    clean = (model(data.images).argmax(1) == data.labels).float().mean().item()
    print(
        f"digit classifier, l_inf {threat_model.epsilon}: clean accuracy {clean:.3f}; {passes} backward passes per example each:"
    )
    for name, attack in attacks.items():
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            logits = model(attack(model, data.images, data.labels, generator=generator))
        print(f"  {name:26} robust accuracy {(logits.argmax(1) == data.labels).float().mean():.3f}")


def draw(path: str, classes: int = 10) -> None:
    """Cross-entropy and margin along the interval, with the points where the two attacks end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    t = torch.linspace(-1, 1, 401)
    logits, y = counterexample(t, classes), torch.zeros(401, dtype=torch.int64)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    curves = {
        "cross-entropy": (cross_entropy(logits, y), -1.0, "PGD ends here"),
        "margin": (margin(logits, y), 1.0, "BETA ends here"),
    }
    for axes, (name, (values, end, label)) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        axes.plot(t, values, color="black")
        axes.axvspan(0.5, 1, color="tab:red", alpha=0.15, label="misclassified")
        at = 0 if end < 0 else 400
        axes.plot([end], [values[at]], "o", color="tab:blue" if end < 0 else "tab:red", label=label, clip_on=False)
        axes.plot([0], [values[200]], "o", color="white", markeredgecolor="black", label="clean point")
        axes.set(xlabel="input t", ylabel=name, title=f"{name}, {classes} classes")
        axes.legend(loc="upper right" if end < 0 else "lower right")
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", metavar="PNG", help="draw the counterexample")
    parser.add_argument("--quick", action="store_true", help="smaller numbers, as a smoke test")
    arguments = parser.parse_args()
    part_one()
    part_two(quick=arguments.quick)
    if arguments.figure:
        draw(arguments.figure)

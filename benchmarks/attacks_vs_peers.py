"""Attacks against their limit and against AutoAttack: ``uv run --group peers python -m benchmarks.attacks_vs_peers``.

Three parts, each on every classifier of ``--models`` (see benchmarks/_classifiers.py), printed and written to
``results/attacks_vs_peers_<parts>_<names>.json``:

1. ``speed``: wall time of PGD and BETA over their passes alone, forward-backward count times one pass of the same rows.
2. ``quality``: robust accuracy of PGD, APGD and BETA at the same number of backward passes per example.
3. ``autoattack``: ``evaluate(protocol="standard")`` beside the port of AutoAttack in torchattacks, in one process, stage by
   stage: robust accuracy, backward and forward passes per example, seconds, ratio.
"""

import contextlib
import importlib
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from benchmarks._classifiers import CLASSIFIERS, Classifier, first_test_images
from benchmarks._common import interleaved, ratio, write
from metarobust.attacks import APGD, BETA, PGD
from metarobust.attacks._memory import rows_within
from metarobust.evaluation import evaluate
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack


class Counted(nn.Module):
    """A model that counts the rows that pass forward, and backward to the input."""

    def __init__(self, model: nn.Module, *, contiguous: bool = False) -> None:
        super().__init__()
        self.model, self.contiguous = model, contiguous
        self.forwards = self.backwards = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            # The port calls .view on gradients; a contiguous copy on the way back keeps it from failing on some networks.
            x.register_hook(self._seen)
        return self.model(x)

    def _seen(self, gradient: Tensor) -> Tensor:
        self.backwards += len(gradient)
        return gradient.contiguous() if self.contiguous else gradient


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(250)]).eq(y).float().mean().item()


def speed(classifier: Classifier, model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """Wall time of PGD-40 and BETA-30 over the time of their forward-backward passes, rounds interleaved."""
    threat_model, steps = ThreatModel(epsilon=classifier.epsilon), {"pgd": 40, "beta": 30}
    attacks: dict[str, Attack] = {
        "pgd": PGD(threat_model=threat_model, steps=steps["pgd"]),
        "beta": BETA(threat_model=threat_model, steps=steps["beta"]),
    }
    found: dict[str, Any] = {}
    for name, attack in attacks.items():
        few, labels = x[:100], y[:100]
        at_once = 100 if name == "pgd" else 9 * max(1, rows_within(None, model, few) // 9)
        rows = few if name == "pgd" else few.repeat_interleave(9, 0)
        row_labels = labels if name == "pgd" else labels.repeat_interleave(9)

        def passes(
            rows: Tensor = rows, row_labels: Tensor = row_labels, at_once: int = at_once, count: int = steps[name]
        ) -> None:
            for part, part_labels in zip(rows.split(at_once), row_labels.split(at_once), strict=True):
                for _ in range(count):
                    leaf = part.clone().requires_grad_()
                    torch.autograd.grad(F.cross_entropy(model(leaf), part_labels, reduction="sum"), leaf)

        def run(attack: Attack = attack, few: Tensor = few, labels: Tensor = labels) -> None:
            attack(model, few, labels, generator=torch.Generator().manual_seed(0))

        seconds = interleaved({"attack": run, "passes": passes}, rounds=rounds)
        found[name] = ratio(seconds["attack"], seconds["passes"]) | {"passes": statistics.median(seconds["passes"])}
        print(
            f"  {name:5} {found[name]['median']:.3f} x its {steps[name]} passes of {at_once} rows "
            f"({found[name]['lowest']:.3f} to {found[name]['highest']:.3f})",
            flush=True,
        )
    return found


def quality(classifier: Classifier, model: nn.Module, x: Tensor, y: Tensor, seeds: int) -> dict[str, Any]:
    """Robust accuracy at 90 and 270 backward passes per example; mean and spread over seeds."""
    threat_model = ThreatModel(epsilon=classifier.epsilon)
    found: dict[str, Any] = {}
    for budget in (90, 270):
        attacks: dict[str, Attack] = {
            f"PGD-{budget}": PGD(threat_model=threat_model, steps=budget),
            f"PGD-{budget // 9} x 9 restarts": PGD(threat_model=threat_model, steps=budget // 9, restarts=9),
            f"PGD-{budget} on the margin": PGD(threat_model=threat_model, steps=budget, loss="margin"),
            f"APGD-{budget}": APGD(threat_model=threat_model, steps=budget),
            f"APGD-{budget} on the margin": APGD(threat_model=threat_model, steps=budget, loss="margin"),
            f"BETA-{budget // 9} (RMSprop)": BETA(threat_model=threat_model, steps=budget // 9),
            f"BETA-{budget // 9} (APGD steps)": BETA(threat_model=threat_model, steps=budget // 9, step_rule="apgd"),
        }
        for name, attack in attacks.items():
            robust = []
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(seed)
                moved = torch.cat(
                    [
                        attack(model, part, labels, generator=generator)
                        for part, labels in zip(x.split(100), y.split(100), strict=True)
                    ]
                )
                robust.append(accuracy(model, moved, y))
            found[f"{budget} passes: {name}"] = robust
            print(
                f"  {budget:3} passes  {name:28} {statistics.mean(robust):.4f}  seeds {[round(r, 4) for r in robust]}", flush=True
            )
    return found


def against_autoattack(
    classifier: Classifier, model: nn.Module, x: Tensor, y: Tensor, *, seed: int, peer_steps: int
) -> dict[str, Any]:
    """Our standard protocol and AutoAttack's on the same points; each runs its attacks on the survivors of those before."""
    threat_model = ThreatModel(epsilon=classifier.epsilon)
    ours = Counted(model)
    begin = time.perf_counter()
    report = evaluate(ours, (x, y), threat_model=threat_model, protocol="standard", seed=seed)
    our_seconds = time.perf_counter() - begin
    stages = [(name, report.robust_accuracy[name], report.seconds[name]) for name in report.attacks]
    for name, robust, seconds in [("clean", report.clean_accuracy, report.seconds["clean"]), *stages]:
        print(f"  ours        {name:24} {robust:.4f}  {seconds:7.1f} s", flush=True)
    rest = our_seconds - sum(seconds for _, _, seconds in stages)
    print(
        f"  ours        clean pass and checks            {rest:7.1f} s; doubts: {[d.check for d in report.warnings]}", flush=True
    )

    theirs = Counted(model, contiguous=True)
    peer = _autoattack_stages(theirs, classifier.epsilon, seed, peer_steps)
    their_stages, standing, total = [], torch.arange(len(x)), 0.0
    begin = time.perf_counter()
    with torch.no_grad():
        standing = standing[theirs(x).argmax(1) == y]
    total += time.perf_counter() - begin
    for name, attack in peer.items():
        begin = time.perf_counter()
        broken = []
        for rows in standing.split(250):  # AutoAttack's batch size
            with contextlib.redirect_stdout(io.StringIO()):
                moved = attack(x[rows], y[rows])
            inside = threat_model.contains(moved, x[rows])
            with torch.no_grad():
                broken.append((theirs(moved).argmax(1) != y[rows]) & inside)
        if len(standing):
            standing = standing[~torch.cat(broken)]
        seconds = time.perf_counter() - begin
        total += seconds
        their_stages.append((name, len(standing) / len(x), seconds))
        print(f"  AutoAttack  {name:24} {len(standing) / len(x):.4f}  {seconds:7.1f} s", flush=True)
    result = {
        "ours": report.worst_case_accuracy,
        "autoattack": len(standing) / len(x),
        "our_seconds": our_seconds,
        "their_seconds": total,
        "ratio": total / our_seconds,
        "our_backwards_per_example": ours.backwards / len(x),
        "their_backwards_per_example": theirs.backwards / len(x),
        "our_forwards_per_example": ours.forwards / len(x),
        "their_forwards_per_example": theirs.forwards / len(x),
        "our_stages": stages,
        "their_stages": their_stages,
        "doubts": [str(doubt) for doubt in report.warnings],
    }
    print(
        f"  robust: ours {result['ours']:.4f}, AutoAttack {result['autoattack']:.4f}; seconds {our_seconds:.1f} and {total:.1f}, "
        f"ratio {result['ratio']:.2f}; backward passes per example {result['our_backwards_per_example']:.0f} and "
        f"{result['their_backwards_per_example']:.0f}, forward {result['our_forwards_per_example']:.0f} and "
        f"{result['their_forwards_per_example']:.0f}",
        flush=True,
    )
    return result


def _autoattack_stages(model: nn.Module, epsilon: float, seed: int, steps: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    try:
        torchattacks = importlib.import_module("torchattacks")
    except ImportError as error:
        remedy = "run with: uv run --group peers python -m benchmarks.attacks_vs_peers"
        raise SystemExit(f"torchattacks is missing; {remedy}") from error
    common = {"eps": epsilon, "norm": "Linf", "seed": seed}
    return {
        f"APGD-CE-{steps}": torchattacks.APGD(model, loss="ce", steps=steps, n_restarts=1, **common),
        f"APGD-T-{steps}": torchattacks.APGDT(model, steps=steps, n_classes=10, n_restarts=1, **common),
        f"FAB-T-{steps}": torchattacks.FAB(model, steps=steps, n_classes=10, multi_targeted=True, n_restarts=1, **common),
        "Square-5000": torchattacks.Square(model, n_queries=5000, n_restarts=1, **common),
    }


def main(
    models: str,
    data: str | None = None,
    parts: tuple[str, ...] = ("speed", "quality", "autoattack"),
    names: tuple[str, ...] = tuple(CLASSIFIERS),
    examples: int = 500,
    quality_examples: int = 100,
    seeds: int = 2,
    seed: int = 0,
    peer_steps: int = 100,
    rounds: int = 7,
    out: str = "results",
) -> None:
    """Measure the attacks on published classifiers.

    Args:
        models: folder with the classifiers' files.
        data: data root; default: METAROBUST_DATA.
        parts: any of speed, quality, autoattack.
        names: which classifiers.
        examples: how many of the first test images.
        quality_examples: how many of these the quality part uses.
        seeds: random starts of the quality part.
        seed: of the AutoAttack part.
        peer_steps: steps of AutoAttack's APGD and FAB. Its paper and its own code say 100; the port's class takes 10.
        rounds: of the speed part.
        out: folder of the JSON file.
    """
    torch.set_num_threads(2)
    results: dict[str, Any] = {}
    for name in names:
        classifier = CLASSIFIERS[name]
        model = classifier.load(models)
        chosen = first_test_images(classifier.data, data, examples)
        x, y = chosen.images, chosen.labels
        print(f"{name}, l_inf {classifier.epsilon:.4g}, {len(x)} test images", flush=True)
        results[name] = {}
        if "speed" in parts:
            results[name]["speed"] = speed(classifier, model, x, y, rounds)
        if "quality" in parts:
            results[name]["quality"] = quality(classifier, model, x[:quality_examples], y[:quality_examples], seeds)
        if "autoattack" in parts:
            results[name]["autoattack"] = against_autoattack(classifier, model, x, y, seed=seed, peer_steps=peer_steps)
    write(
        "attacks_vs_peers_" + "_".join((*parts, *names)),
        {"examples": examples, "seed": seed, "seeds": seeds, "peer_steps": peer_steps, "results": results},
        out,
    )


if __name__ == "__main__":
    tyro.cli(main)

"""Does a meta-optimizer that was trained on digits train other networks on other data robustly, without adversarial examples?

    uv run python -m benchmarks.transfer [--targets digits] [--seeds 6] [--out results]
    METAROBUST_DATA=... uv run python -m benchmarks.transfer --targets mnist fashion-mnist cifar10 --seeds 3 [--first 3]
    uv run python -m benchmarks.transfer --summary --out benchmarks/measured

Every target is a network and a number of training images. Each method trains one copy of it per seed, on that seed's own
images; its settings are chosen by robust accuracy on validation images (PGD-20 on cross-entropy and on the margin), and the
chosen one is judged once, on test images, by the standard protocol of `evaluate`. Four methods have nothing to choose: the
shipped meta-optimizer and the three rules set by hand. A pass is one forward and one backward pass of one batch: a third each for
the forward pass, for the gradients of activations and for those of weights; a rule that follows g + c h takes one pass per step,
with the combined gradient of `record_factors`, and 4/3 with tangents. All of these, FGSM training and free training get the same
number of passes. Runs end up in transfer.jsonl, one line each; what is there already is not run again. Seeds may be run in
groups (``--first 3``: seeds 3 to 5), each of which chooses its settings by itself; the tables join them.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import environment
from benchmarks._transfer_baselines import AT_EQUAL_PASSES, CLEAN, Candidate, baselines, hand_set
from benchmarks._transfer_runs import joined, read
from metarobust.attacks import PGD
from metarobust.data import LabelledImages, LowDataTasks, digits_pools, load, load_npz, split
from metarobust.evaluation import evaluate
from metarobust.meta_optimizers import (
    ClassificationTask,
    LSTMOptimizer,
    MetaTrainingSettings,
    meta_train,
    save,
    train_optimizees,
)
from metarobust.meta_optimizers import load as load_optimizer
from metarobust.meta_optimizers._transformation import reading_streams
from metarobust.models import cnn, mlp, residual_network
from metarobust.threat_models import ThreatModel

ESTIMATE, TANGENT = "gradient+adversarial_estimate", "gradient+adversarial_tangent"
BY_HAND = ("tangents, by hand", "estimate, by hand", "scaled factors, by hand")
SHIPPED = "robust-small-v1"
ONE_PASS = (4 / 3,)
"""Steps, as a share of the target's, of a rule that takes one pass per step."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A network, its training images, and the steps of PGD training; the learned rule gets 4/3 as many passes."""

    data: str
    build: Callable[[], nn.Module]
    examples: int
    epsilon: float = 0.1
    steps: int = 400
    batch_size: int = 64
    bar: float | None = None
    short_grid: bool = True
    """Fewer settings of each baseline, where a run takes minutes."""


def digits(build: Callable[[], nn.Module], bar: float) -> dict[int, Target]:
    return {n: Target(data="digits", build=build, examples=n, bar=bar, short_grid=False) for n in (100, 200)}


TARGETS: dict[str, Target] = {
    **{f"MLP 64-128-10, digits, {n}": t for n, t in digits(partial(mlp, [64, 128, 10]), 0.9).items()},
    **{f"MLP 64-64-64-10, digits, {n}": t for n, t in digits(partial(mlp, [64, 64, 64, 10]), 0.9).items()},
    **{f"CNN 8-16, digits, {n}": t for n, t in digits(partial(cnn, [8, 16]), 0.75).items()},
    **{f"CNN 16-32, digits, {n}": t for n, t in digits(partial(cnn, [16, 32]), 0.75).items()},
    "MLP 784-128-10, MNIST, 500": Target(
        data="mnist", build=partial(mlp, [784, 128, 10]), examples=500, bar=0.75, short_grid=False
    ),
    "CNN 8-16, MNIST, 500": Target(data="mnist", build=partial(cnn, [8, 16], image_size=28), examples=500, bar=0.6),
    "CNN 8-16, MNIST, 10000": Target(
        data="mnist", build=partial(cnn, [8, 16], image_size=28), examples=10_000, steps=800, bar=0.6
    ),
    "residual network 8-16-32, Fashion-MNIST, 2000": Target(
        data="fashion-mnist", build=partial(residual_network, (8, 16, 32)), examples=2000, batch_size=100, bar=0.6
    ),
    "residual network 8-16-32, CIFAR-10 subset, 4000": Target(
        data="cifar10-subset",
        build=partial(residual_network, (8, 16, 32), image_channels=3),
        examples=4000,
        epsilon=8 / 255,
        batch_size=100,
    ),
}
JUDGING = {"digits": (400, 400), "mnist": (500, 300), "fashion-mnist": (500, 300), "cifar10-subset": (500, 300)}
"""Validation and test images."""


@cache
def parts(data: str) -> tuple[LabelledImages, LabelledImages | None, LabelledImages]:
    """Training pool, validation images (None: the part of the pool that a copy does not train on), test images.

    Of the digits, the meta-training of the shipped optimizer has seen a third pool, disjoint from these.
    """
    validation, test = JUDGING[data]
    if data == "digits":
        pools = digits_pools(0)
        return pools.target, None, pools.test.select(torch.arange(test))
    if data == "cifar10-subset":
        folder = Path(os.environ["METAROBUST_DATA"]) / "cifar10-exact-subset"
        files = ("cifar10_train_exact.npz", "cifar10_test_exact_first1000.npz")
        train, judging = (load_npz(folder / file, num_classes=10) for file in files)
    else:
        train, judging = (load(data, train=part) for part in (True, False))
    draw = torch.Generator().manual_seed(0)
    pool, choosing = split(train, (len(train) - validation, validation), generator=draw)
    (judging,) = split(judging, (test,), generator=draw)
    return pool, choosing, judging


def learned(name: str, *, longer: float = 1.0) -> list[Candidate]:
    """A meta-optimizer that came with the package or lies in a file: nothing to choose; ``longer``: that many times the steps."""
    rule = load_optimizer(name)
    options = {"gradient_source": rule.gradient_source} if rule.two_streams else {}
    shares = ONE_PASS if rule.passes_per_step == 1.0 else (1.0,)
    shares = tuple(longer * share for share in shares)
    return [Candidate({}, lambda steps: reading_streams(rule, total_steps=steps), shares, rule.passes_per_step, options=options)]


def train_paper_code(path: Path) -> None:
    """Network, features, losses and schedule of the code of Serban et al. (2020), on digits, for 15 runs of 480 steps."""
    pool, attack = digits_pools(0).meta_train, PGD(threat_model=ThreatModel(epsilon=0.1), steps=5)

    def sample(generator: torch.Generator) -> ClassificationTask:
        subset = LowDataTasks(dataset=pool, examples=500).sample_indices(generator)
        return ClassificationTask(
            build=partial(mlp, [64, 20, 10]), dataset=pool, subsets=subset[None], threat_model=None,
            training_attack=attack, meta_attack=attack, batch_size=128, meta_batch_size=128,
        )  # fmt: skip

    torch.manual_seed(0)
    settings = MetaTrainingSettings.serban2020(iterations=360)
    rule = meta_train(LSTMOptimizer.serban2020(), sample, **asdict(settings)).meta_optimizer
    print(f"wrote {save(rule, path)}")


def candidates(target: Target, extra: dict[str, str]) -> dict[str, list[Candidate]]:
    """Every method with the settings it may choose from, at least one."""
    tangents, estimated, scaled = (
        {"gradient_source": TANGENT},
        {"gradient_source": ESTIMATE},
        {"gradient_source": "gradient+perturbed_factors"},
    )
    threat_model = ThreatModel(epsilon=target.epsilon)
    return {
        SHIPPED: learned(SHIPPED),
        **({} if target.short_grid else {f"{SHIPPED}, 3 times the steps": learned(SHIPPED, longer=3.0)}),
        **{name: learned(file) for name, file in extra.items()},
        "tangents, by hand": [Candidate({}, hand_set(1.2, 1.2, falling=True, rate=4e-3), (1.0,), 4 / 3, options=tangents)],
        "estimate, by hand": [Candidate({}, hand_set(1.4, 1.4, falling=True), ONE_PASS, options=estimated)],
        "scaled factors, by hand": [Candidate({}, hand_set(1.5, 0.15, falling=False), ONE_PASS, options=scaled)],
        **baselines(threat_model, small=target.short_grid),
    }


def task_for(target: Target, candidate: Candidate, seeds: range) -> ClassificationTask:
    """One copy of the network per seed, each on its own images."""
    pool, _, _ = parts(target.data)
    threat_model = ThreatModel(epsilon=target.epsilon)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    subsets = [LowDataTasks(dataset=pool, examples=target.examples).sample_indices(draw) for draw in draws]
    two_streams = "source" in candidate.options
    return candidate.kind(
        build=target.build,
        dataset=pool,
        subsets=torch.stack(subsets),
        threat_model=threat_model if two_streams else None,
        batch_size=target.batch_size,
        **candidate.options,
    )


def robust(task: ClassificationTask, parameters: tuple[Tensor, ...], target: Target) -> float:
    """Mean accuracy of the copies on validation images under PGD-20 on two losses."""
    _, choosing, _ = parts(target.data)
    if choosing is None:
        rows = task.held_out.flatten()
        x, y = task.dataset.images[rows], task.dataset.labels[rows]
    else:
        x, y = choosing.images.repeat(task.optimizees, 1, 1, 1), choosing.labels.repeat(task.optimizees)
    model, right = task.model(parameters), torch.ones(len(x), dtype=torch.bool)
    for loss in ("cross_entropy", "margin"):
        attack = PGD(threat_model=ThreatModel(epsilon=target.epsilon), steps=20, loss=loss)
        moved = attack(model, x, y, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            right &= model(moved).argmax(1) == y
    return right.double().mean().item()


def train(target: Target, choices: Iterable[Candidate], seeds: range) -> tuple[dict[str, Any], ClassificationTask, Any]:
    """Train with every setting, keep the one that is best on validation images."""
    choices, best = list(choices), None
    for candidate in choices:
        task = task_for(target, candidate, seeds)
        keep = sorted({max(1, round(share * target.steps)) for share in candidate.steps})
        found = train_optimizees(
            task, candidate.rule(keep[-1]), total_steps=keep[-1], generator=torch.Generator().manual_seed(seeds.stop), keep=keep
        )
        for steps in keep:
            score = robust(task, found[steps], target) if len(choices) * len(keep) > 1 else 0.0
            if best is None or score > best[0]:
                settings = candidate.settings | {"steps": steps, "passes": round(steps * candidate.passes)}
                best = (score, settings, task, found[steps])
    assert best is not None
    return best[1], best[2], best[3]


def judged(target: Target, task: ClassificationTask, parameters: tuple[Tensor, ...], *, checks: bool) -> list[dict[str, Any]]:
    """Clean accuracy, worst-case accuracy and warnings of each copy on the test images."""
    _, _, test = parts(target.data)
    reports = []
    for copy in range(task.optimizees):
        model = target.build()
        with torch.no_grad():
            for p, values in zip(model.parameters(), parameters, strict=True):
                p.copy_(values[copy])
        report = evaluate(
            model.eval(), (test.images, test.labels), threat_model=ThreatModel(epsilon=target.epsilon), reliability_checks=checks
        )
        doubts = [doubt.check for doubt in report.warnings]
        reports.append({"clean": report.clean_accuracy, "robust": report.worst_case_accuracy, "doubts": doubts})
    return reports


def run(name: str, out: Path, seeds: range, only: list[str] | None, extra: dict[str, str]) -> None:
    """Train and judge all methods on one target; append a line per method."""
    target, done = TARGETS[name], {(row["target"], row["method"], row.get("first", 0), row["seeds"]) for row in read(out)}
    for method, choices in candidates(target, extra).items():
        if (name, method, seeds.start, len(seeds)) in done or (only and method not in only):
            continue
        begin = time.perf_counter()
        settings, task, parameters = train(target, choices, seeds)
        trained = time.perf_counter()
        reports = judged(target, task, parameters, checks=method == SHIPPED)
        row = {
            "target": name,
            "method": method,
            "first": seeds.start,
            "seeds": len(seeds),
            "settings": settings,
            "reports": reports,
        }
        row |= {
            "training_seconds": trained - begin,
            "judging_seconds": time.perf_counter() - trained,
            "environment": environment(),
        }
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        told = statistics.mean(r["clean"] for r in reports), statistics.mean(r["robust"] for r in reports)
        print(
            f"{name} | {method} | clean {told[0]:.3f} | robust {told[1]:.3f} | {settings} | {trained - begin:.0f} s", flush=True
        )


def bars(out: Path) -> str:
    """One line per target that is complete: what the shipped optimizer reaches, between what and what, and its bar."""
    shown = (SHIPPED, *BY_HAND, *AT_EQUAL_PASSES, "PGD-5 training")
    lines = ["| target | best clean baseline | " + " | ".join(shown) + " | share (bar) |", "|---" * (3 + len(shown)) + "|"]
    everything = joined(read(out))
    for name, target in TARGETS.items():
        here = {method: row["reports"] for method, row in everything.get(name, {}).items()}
        if not {*CLEAN, *shown} <= here.keys():
            continue
        means = {m: (statistics.mean(r["clean"] for r in v), statistics.mean(r["robust"] for r in v)) for m, v in here.items()}
        best = max(CLEAN, key=lambda method: means[method][1])
        low, top = means[best][1], means["PGD-5 training"][1]
        share = (means[SHIPPED][1] - low) / (top - low)
        cells = [f"{means[method][0]:.3f} / {means[method][1]:.3f}" for method in (best, *shown)]
        bar = "open" if target.bar is None else f"{target.bar:g}"
        lines.append(f"| {name} | {best} {' | '.join(cells)} | {share:.2f} ({bar}) |")
    return "\n".join(lines)


def summary(out: Path) -> str:
    """One table per target: each method, and its share of the way from the best clean baseline to PGD training."""
    everything, lines = joined(read(out)), []
    for name, target in TARGETS.items():
        here = everything.get(name, {})
        if not here:
            continue
        lines += [f"\n**{name}** (l_inf {target.epsilon:.3g}, {next(iter(here.values()))['seeds']} seeds)\n"]
        lines += ["| method | settings | passes | clean | robust (lowest to highest) | share of the gap |", "|---" * 6 + "|"]
        means = {method: statistics.mean(r["robust"] for r in row["reports"]) for method, row in here.items()}
        clean = [means[method] for method in CLEAN if method in means]
        top = means.get("PGD-5 training")
        for method, row in here.items():
            robust = [r["robust"] for r in row["reports"]]
            share = f"{(means[method] - max(clean)) / (top - max(clean)):.2f}" if clean and top else ""
            told = "; ".join(", ".join(f"{k} {v}" for k, v in one.items() if k != "passes") for one in row["settings"])
            passes = ", ".join(dict.fromkeys(str(one["passes"]) for one in row["settings"]))
            spread = f"{means[method]:.3f} ({min(robust):.3f} to {max(robust):.3f})"
            clean_mean = statistics.mean(r["clean"] for r in row["reports"])
            lines.append(f"| {method} | {told} | {passes} | {clean_mean:.3f} | {spread} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=["digits"], help="parts of names of targets, or names of data sets")
    parser.add_argument("--only", nargs="*", help="methods to run; default: all")
    parser.add_argument("--seeds", type=int, default=6, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--out", default="results", help="folder of transfer.jsonl")
    parser.add_argument("--extra", nargs="*", default=[], metavar="NAME=FILE", help="further meta-optimizers, as controls")
    parser.add_argument("--paper-code", metavar="FILE", help="meta-train the paper's own setting to FILE, for --extra, and stop")
    parser.add_argument("--summary", action="store_true", help="print the tables of what is in --out, and run nothing")
    arguments = parser.parse_args()
    out = Path(arguments.out) / "transfer.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.paper_code:
        torch.set_num_threads(1)
        return train_paper_code(Path(arguments.paper_code))
    if not arguments.summary:
        torch.set_num_threads(1)
        for name, target in TARGETS.items():
            if any(part in name or part == target.data for part in arguments.targets):
                seeds = range(arguments.first, arguments.first + arguments.seeds)
                run(name, out, seeds, arguments.only, dict(pair.split("=", 1) for pair in arguments.extra))
    print(summary(out))
    print(f"\nclean / robust accuracy, means over seeds\n\n{bars(out)}")
    return None


if __name__ == "__main__":
    main()

"""Learned weights of adversaries and anti-adversaries against fixed ones: long tails and noisy labels, class by class.

    METAROBUST_DATA=... uv run python -m benchmarks.fairness [--data digits fashion-mnist] [--out results/fairness]

Every method sees the same training images, the same 20 clean, balanced meta-images per class, the same optimizer, schedule and
number of epochs. The meta-images are what `CAAT`, `MetaWeightNet` and `FRL` learn from; "TRADES, meta-data too" trains on them
instead, so that a gain of learning from them can be told from a gain of having them. Scenarios: the longest tail has 1/10 or
1/50 of the head's examples; 20 % or 40 % of the labels are drawn anew (uniform) or moved to the next class (pair). The settings
of CAAT were chosen on digits, by validation errors, with other seeds (``--choose`` prints that table); test images are seen once,
by the attacks of the standard protocol. Noise: the area under the ROC curve (AUROC) of the anti-adversary weight against the true
flag. Each run is a file in ``--out``, so that the benchmark goes on where it was stopped; ``--table`` prints what is there.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._common import environment
from metarobust._files import write_atomically
from metarobust.attacks import PGD
from metarobust.data import LabelledImages, load, load_digits, long_tail, noise_matrix, split, split_meta, with_label_noise
from metarobust.evaluation import evaluate, protocol_attacks
from metarobust.meta_weighters import CAAT, FRL, GradientBound, MetaWeightNet, ReMargin, WeightingNetwork
from metarobust.models import mlp
from metarobust.objectives import TRADES, AdversarialTraining, ClassWeighted, LogitAdjusted
from metarobust.threat_models import ThreatModel
from metarobust.training import fit, piecewise

BALLS = {"digits": ThreatModel(norm="linf", epsilon=0.1), "fashion-mnist": ThreatModel(norm="linf", epsilon=0.05)}
BETA = 6.0  # of every TRADES in the table, as its authors' default
CLASSES, PER_CLASS = 10, 20
SCENARIOS = ("tail-10", "tail-50", "uniform-20", "uniform-40", "pair-20", "pair-40")
SPLITS = {"digits": (1050, 300, 447), "fashion-mnist": (3200, 1000, 500)}
EPOCHS = {"digits": 60, "fashion-mnist": 20}


class Data(NamedTuple):
    """One scenario of one data set; ``flipped [n]`` marks wrong labels of the training part."""

    train: LabelledImages
    meta: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    flipped: Tensor
    ball: ThreatModel


def parts(data: str, scenario: str, seed: int) -> Data:
    """Everything of the seed but the test images of Fashion-MNIST, which are the same 500 for all."""
    draw = torch.Generator().manual_seed(seed)
    if data == "digits":
        train, validation, test = split(load_digits(), SPLITS[data], generator=draw)
    else:
        train, validation = split(load("fashion-mnist", train=True), SPLITS[data][:2], generator=draw)
        (test,) = split(load("fashion-mnist", train=False), SPLITS[data][2:], generator=torch.Generator().manual_seed(0))
    train, meta = split_meta(train, PER_CLASS, generator=draw)
    kind, _, number = scenario.partition("-")
    if kind == "tail":
        train = long_tail(train, factor=float(number), generator=draw)
        return Data(train, meta, validation, test, torch.zeros(len(train), dtype=torch.bool), BALLS[data])
    noisy = with_label_noise(train, noise_matrix(kind, int(number) / 100, CLASSES), generator=draw)
    return Data(noisy.data, meta, validation, test, noisy.flipped, BALLS[data])


def network(data: str, seed: int) -> nn.Module:
    """A two-layer MLP."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp([64 if data == "digits" else 784, 128, CLASSES])


def learned(seed: int, **changes: Any) -> Callable[..., CAAT]:
    """A `CAAT` with the settings of the table, changed."""

    def make(found: Data, optimizer: torch.optim.Optimizer, counts: list[int]) -> CAAT:
        branches = changes.get("branches", ("adversary", "anti_adversary"))
        weigher = WeightingNetwork(branches=branches, generator=torch.Generator().manual_seed(seed))
        trades = TRADES(threat_model=found.ball, beta=BETA)
        defaults: dict[str, Any] = {"robust_loss": trades, "meta_every": 2, "learning_rate": 3e-3, "anti_factor": 1.0}
        defaults |= {"routing": "hard", "temperature": (1.0, 0.1)}
        return CAAT(
            threat_model=found.ball,
            meta_data=found.meta,
            optimizer=optimizer,
            class_counts=counts,
            network=weigher,
            **{**defaults, **{name: value for name, value in changes.items() if name not in ("branches", "bound")}},
            bound=changes["bound"]() if "bound" in changes else None,
        )

    return make


def methods(seed: int, ball: ThreatModel = BALLS["digits"]) -> dict[str, Callable[..., Any]]:
    """Every row of the table: ``(data, optimizer, class counts) -> objective``."""
    trades = TRADES(threat_model=ball, beta=BETA)
    shared: dict[str, Any] = {"threat_model": ball}
    return {
        "PGD-AT": lambda *_: AdversarialTraining(attack=PGD(threat_model=ball)),
        "TRADES": lambda *_: trades,
        "TRADES, meta-data too": lambda *_: trades,
        "class weights + TRADES": lambda _, __, counts: ClassWeighted.balanced(robust_loss=trades, class_counts=counts),
        "logit adjustment + TRADES": lambda _, __, counts: LogitAdjusted(robust_loss=trades, class_counts=counts),
        "FRL": lambda found, _, __: FRL(held_out=found.meta, beta=BETA, **shared),
        "Meta-Weight-Net + TRADES": lambda found, optimizer, counts: MetaWeightNet(
            meta_data=found.meta, optimizer=optimizer, class_counts=counts, robust_loss=trades, meta_every=2, **shared
        ),
        "CAAT (ReMargin)": learned(seed, bound=partial(ReMargin, classes=CLASSES)),
        "CAAT (gradient)": learned(seed, bound=GradientBound),
        "CAAT (fixed bound)": learned(seed),
        "CAAT, anti-adversaries x 4": learned(seed, anti_factor=4.0),
        "CAAT x 4, soft": learned(seed, anti_factor=4.0, routing="soft"),
        "CAAT x 4, no anti": learned(seed, branches=("natural", "adversary")),
        "CAAT x 4, random routing": learned(seed, anti_factor=4.0, routing="random"),
        "CAAT x 4 on logit adjustment": lambda found, optimizer, counts: learned(
            seed, anti_factor=4.0, robust_loss=LogitAdjusted(robust_loss=trades, class_counts=counts), meta_loss=trades
        )(found, optimizer, counts),
    }


def auroc(weights: Tensor, flags: Tensor) -> float | None:
    """Area under the ROC curve; None where all flags are equal."""
    from sklearn.metrics import roc_auc_score

    return None if bool(flags.all()) or not bool(flags.any()) else float(roc_auc_score(flags.numpy(), weights.numpy()))


def train(
    make: Callable[..., Any], data: str, scenario: str, seed: int, *, meta_too: bool = False
) -> tuple[nn.Module, Any, Data]:
    """One run: the trained network, its objective, its data. ``meta_too``: train on the meta-data as well."""
    found = parts(data, scenario, seed)
    images = found.train
    if meta_too:
        pixels, labels = (torch.cat(pair) for pair in ((images.images, found.meta.images), (images.labels, found.meta.labels)))
        images = LabelledImages(pixels, labels, CLASSES)
    model = network(data, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if data == "digits" else 0.05, momentum=0.9)
    objective = make(found, optimizer, images.labels.bincount(minlength=CLASSES).tolist())
    schedule = piecewise({0.6: 0.1, 0.85: 0.01})
    epochs = EPOCHS[data]
    fit(model, objective, images, optimizer=optimizer, epochs=epochs, batch_size=64, schedule=schedule, seed=seed, silent=True)
    return model, objective, found


def measured(model: nn.Module, objective: Any, found: Data, *, on_test: bool) -> dict[str, Any]:
    """Errors by class, how well wrong labels were told, and which examples went to anti-adversaries."""
    images = found.test if on_test else found.validation
    attacks = protocol_attacks("standard", found.ball) if on_test else {"pgd": PGD(threat_model=found.ball, steps=20)}
    report = evaluate(model, images, threat_model=found.ball, attacks=attacks, reliability_checks=False)
    content: dict[str, Any] = {"errors": {name: error._asdict() for name, error in report.errors._asdict().items()}}
    content |= {"auroc": None, "anti_right": None, "anti_wrong": None, "train": len(found.train)}
    if isinstance(objective, CAAT) and not objective.reads_loss and "anti_adversary" in objective.network.branches:
        weights = objective.weigh(model, found.train.images, found.train.labels).weights[:, -1]
        content["auroc"] = auroc(weights, found.flipped)
        given = weights if objective.routing == "soft" else (weights > 0.5).to(weights)
        for key, rows in (("anti_right", ~found.flipped), ("anti_wrong", found.flipped)):
            content[key] = float(given[rows].mean()) if bool(rows.any()) else None
    return content


def one_run(name: str, data: str, scenario: str, seed: int, out: str) -> None:
    """Train, measure, and write one file; nothing if it is there already."""
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    path = Path(out) / f"{data}-{scenario}-{slug}-{seed}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    run = {"method": name, "data": data, "scenario": scenario, "seed": seed}
    trained = train(methods(seed, BALLS[data])[name], data, scenario, seed, meta_too=name == "TRADES, meta-data too")
    content = {"run": run, **measured(*trained, on_test=True), "environment": environment()}
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"wrote {path}", flush=True)


def collected(out: str) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """The runs of a folder, or of a file that ``--pack`` wrote, by data set, scenario and method, in the order of their seeds."""
    place = Path(out)
    texts = place.read_text().splitlines() if place.is_file() else [path.read_text() for path in sorted(place.glob("*.json"))]
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for content in sorted((json.loads(text) for text in texts), key=lambda content: content["run"]["seed"]):
        run = content["run"]
        found.setdefault((run["data"], run["scenario"], run["method"]), []).append(content)
    return found


def pack(out: str, into: str) -> None:
    """Put the runs of a folder into one file, a line each."""
    lines = [json.dumps(content, separators=(",", ":")) for runs in collected(out).values() for content in runs]
    write_atomically(Path(into), lambda temporary: temporary.write_text("\n".join(lines) + "\n"))
    print(f"wrote {into}")


def table(out: str) -> None:
    """Mean and range over the seeds of what is there."""
    found = collected(out)
    for data in SPLITS:
        for scenario in SCENARIOS:
            rows = {name: found[data, scenario, name] for name in methods(0) if (data, scenario, name) in found}
            if rows:
                print_rows(f"{data}, {scenario}: errors in %, mean over seeds (lowest to highest)", rows)


def summary(out: str) -> None:
    """Robust errors of all scenarios side by side, and what each method has less of than TRADES with the same seed."""
    found = collected(out)
    for data in SPLITS:
        if not any(key[0] == data for key in found):
            continue
        for part, title in (("average", "robust error"), ("worst", "robust error of the worst class")):
            print(f"\n{data}: {title} in %, mean over seeds (points below TRADES, lowest to highest over seeds)\n")
            print("| method | " + " | ".join(SCENARIOS) + " |\n" + "|---" * (1 + len(SCENARIOS)) + "|")
            for name in methods(0):
                cells = []
                for scenario in SCENARIOS:
                    runs = found.get((data, scenario, name), [])
                    errors, base = (
                        {run["run"]["seed"]: 100 * run["errors"]["robust"][part] for run in group}
                        for group in (runs, found.get((data, scenario, "TRADES"), []))
                    )
                    below = [base[seed] - error for seed, error in errors.items() if seed in base]
                    gained = f" ({min(below):+.1f} to {max(below):+.1f})" if below and name != "TRADES" else ""
                    cells.append(f"{statistics.mean(errors.values()):.1f}{gained}" if errors else "")
                print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nWorst class at least 5 points below TRADES, average at most 1 point above, means over seeds:\n")
    for (data, scenario, name), runs in sorted(found.items()):
        base = found.get((data, scenario, "TRADES"), [])
        if base and name != "TRADES":
            worst, average = (_mean_robust(base, part) - _mean_robust(runs, part) for part in ("worst", "average"))
            known = [run["auroc"] for run in runs if run["auroc"] is not None]
            area = f", AUROC {statistics.mean(known):.3f}" if known else ""
            if worst >= 5 and average >= -1:
                print(f"{data}, {scenario}: {name}, worst class {-worst:+.1f}, average {-average:+.1f}{area}")


def _mean_robust(runs: list[dict[str, Any]], part: str) -> float:
    return statistics.mean(100 * run["errors"]["robust"][part] for run in runs)


def print_rows(title: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """A table in Markdown: errors, and of the learned weights the AUROC and the shares of examples given to anti-adversaries."""
    print(f"\n{title}\n\n| method | seeds | natural | robust | worst class, natural | worst class, robust", end="")
    print(" | AUROC | anti, right labels | anti, wrong labels |\n" + "|---" * 9 + "|")
    for name, runs in rows.items():
        cells = [name, str(len(runs))]
        for part in ("average", "worst"):
            for kind in ("natural", "robust"):
                cells.append(_spread([100 * run["errors"][kind][part] for run in runs], 1))
        for key, digits in (("auroc", 3), ("anti_right", 2), ("anti_wrong", 2)):
            cells.append(_spread([run[key] for run in runs if run[key] is not None], digits))
        print("| " + " | ".join(cells) + " |", flush=True)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def choose() -> None:
    """What the settings of CAAT were chosen by: validation errors on digits, three other seeds."""
    for scenario in ("tail-10", "uniform-40", "uniform-20"):
        rows: dict[str, list[dict[str, Any]]] = {}
        for label, changes in CANDIDATES.items():
            for seed in (100, 101, 102):
                make = methods(seed)["TRADES"] if changes is None else learned(seed, **changes)
                rows.setdefault(label, []).append(measured(*train(make, "digits", scenario, seed), on_test=False))
        print_rows(f"{scenario}: validation errors in %, mean over seeds (lowest to highest)", rows)


CANDIDATES: dict[str, dict[str, Any] | None] = {
    "TRADES": None,
    "CAAT": {},
    "radius of anti-adversaries x 2": {"anti_factor": 2.0},
    "x 4": {"anti_factor": 4.0},
    "x 4, soft": {"anti_factor": 4.0, "routing": "soft"},
    "x 4, learning rate 0.01": {"anti_factor": 4.0, "learning_rate": 1e-2},
    "x 4, learning rate 0.001": {"anti_factor": 4.0, "learning_rate": 1e-3},
    "x 4, a meta-step in every call": {"anti_factor": 4.0, "meta_every": 1},
    "x 4, temperature 1": {"anti_factor": 4.0, "temperature": None},
    "x 4, soft, temperature 1": {"anti_factor": 4.0, "routing": "soft", "temperature": None},
    "x 4, gradient-based bound": {"anti_factor": 4.0, "bound": GradientBound},
    "x 4, ReMargin": {"anti_factor": 4.0, "bound": partial(ReMargin, classes=CLASSES)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", choices=SPLITS, default=["digits"])
    parser.add_argument("--scenarios", nargs="*", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--only", nargs="*", choices=methods(0), default=list(methods(0)), help="a part of the methods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--choose", action="store_true", help="print the table that settings were chosen by, and stop")
    parser.add_argument("--table", action="store_true", help="print what is there, and stop")
    parser.add_argument("--summary", action="store_true", help="print what is there in short, and stop")
    parser.add_argument("--pack", help="put the runs that are there into this one file, and stop")
    parser.add_argument("--out", default="results/fairness", help="folder of the runs; to print, also a packed file")
    arguments = parser.parse_args()
    if arguments.choose:
        choose()
        return
    if arguments.summary:
        summary(arguments.out)
        return
    if arguments.pack:
        pack(arguments.out, arguments.pack)
        return
    if not arguments.table:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        jobs = [
            (name, data, scenario, seed, arguments.out)
            for seed in range(arguments.seeds)
            for data in arguments.data
            for scenario in arguments.scenarios
            for name in arguments.only
        ]
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            pool.starmap(one_run, jobs, chunksize=1)
    table(arguments.out)


if __name__ == "__main__":
    main()

"""Robust objectives against each other: clean, PGD and standard-protocol accuracy, best and last epoch, with and without ARMOR.

    METAROBUST_DATA=... uv run python -m benchmarks.objectives --cifar10 FOLDER [--processes 2] [--out results/objectives]

Every run starts at one warm-up network per data set and seed: adversarial training whose epsilon rises over four epochs (in
trials from a random start, training at full epsilon stayed at constant predictions, on both data sets). From there each
objective trains with the same optimizer, schedule, batches and number of epochs; no setting was tuned per objective. Best is the
epoch of the highest PGD-20 accuracy on 1,000 validation images; the test images are seen once, at the end, by stronger attacks
than any used in training.
``--cifar10`` names the folder of an .npz pair (see `README`); without it only MNIST runs. Each run is a file in ``--out``, so
that the benchmark goes on where it was stopped; ``--table`` prints what is there. ``--setting gpu`` is the longer one.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks._common import environment
from metarobust._files import write_atomically
from metarobust.attacks import PGD
from metarobust.data import LabelledImages, load, load_npz, split
from metarobust.divergences import KL
from metarobust.evaluation import evaluate, protocol_attacks
from metarobust.models import Normalize
from metarobust.objectives import ARMOR, MART, TRADES, UDR, AdversarialTraining, BETATraining, SmoothedBETATraining
from metarobust.threat_models import ThreatModel
from metarobust.training import fit, piecewise

NAMES = {"mnist": "MNIST, 10,000 training images, l_inf 0.3", "cifar10": "CIFAR-10 subset, 7,292 training images, l_inf 8/255"}
EPSILONS = {"mnist": 0.3, "cifar10": 8 / 255}
VALIDATION, WARM_UP, RADIUS = 1000, 4, 0.1
OBJECTIVES = ("at", "trades", "mart", "udr", "beta", "smoothed-beta")
RUNS = [name for objective in OBJECTIVES for name in (objective, f"armor-{objective}") if name != "armor-smoothed-beta"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How long and how wide."""

    width: int
    epochs: int
    beta_steps: int
    test_images: int
    train_images: int | None
    device: str


SETTINGS = {
    "cpu": Setting(width=8, epochs=20, beta_steps=5, test_images=500, train_images=10_000, device="cpu"),
    "gpu": Setting(width=64, epochs=100, beta_steps=10, test_images=10_000, train_images=None, device="cuda"),
    "smoke": Setting(width=2, epochs=1, beta_steps=1, test_images=20, train_images=1_300, device="cpu"),
}


def network(data: str, width: int) -> nn.Sequential:
    """Two 4x4 convolutions of stride 2 and two linear layers; `Normalize` in front for colour images."""
    channels, size = (1, 28) if data == "mnist" else (3, 32)
    hidden = 8 * width
    layers = [
        nn.Conv2d(channels, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (size // 4) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    ]
    return nn.Sequential(*([] if data == "mnist" else [Normalize((0.5,) * 3, (0.25,) * 3)]), *layers)


def objective(name: str, data: str, setting: Setting) -> Any:
    """An objective by its name in the table. TRADES' beta on MNIST is that of its authors' MNIST script, 1."""
    threat_model = ThreatModel(norm="linf", epsilon=EPSILONS[data])
    if name.startswith("armor-"):
        return ARMOR(robust_loss=objective(name.removeprefix("armor-"), data, setting), divergence=KL(), radius=RADIUS)
    pgd = PGD(threat_model=threat_model, steps=10)
    return {
        "at": AdversarialTraining(attack=pgd),
        "trades": TRADES(threat_model=threat_model, beta=1.0 if data == "mnist" else 6.0),
        "mart": MART(attack=pgd, beta=5.0),
        "udr": UDR(threat_model=threat_model),
        "beta": BETATraining(threat_model=threat_model, steps=setting.beta_steps),
        "smoothed-beta": SmoothedBETATraining(threat_model=threat_model, steps=setting.beta_steps, mu=5.0),
    }[name]


def parts(data: str, cifar10: str | None, setting: Setting, seed: int) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Training, validation and test images; the split depends on the seed, the test images do not."""
    if data == "mnist":
        train, test = load("mnist", train=True), load("mnist", train=False)
    else:
        folder = Path(cifar10 or ".")
        train = load_npz(folder / "cifar10_train_exact.npz", num_classes=10)
        test = load_npz(folder / "cifar10_test_exact_first1000.npz", num_classes=10)
    size = min(setting.train_images or len(train), len(train)) - VALIDATION
    training, validation = split(train, (size, VALIDATION), generator=torch.Generator().manual_seed(seed))
    count = min(setting.test_images, len(test))
    (chosen,) = split(test, (count,), generator=torch.Generator().manual_seed(0))
    return training, validation, chosen


def checkpoint(folder: Path, setting: Setting, data: str, name: str, seed: int) -> Path:
    """Where a run is kept until it is done."""
    return folder / f"{setting.device}-{setting.epochs}-{data}-{name}-{seed}.safetensors"


def train(
    name: str,
    data: str,
    setting: Setting,
    seed: int,
    model: nn.Module,
    images: tuple[LabelledImages, LabelledImages],
    folder: Path,
) -> Any:
    """One run from the warm-up network, resumable."""
    threat_model = ThreatModel(norm="linf", epsilon=EPSILONS[data])
    return fit(
        model,
        objective(name, data, setting),
        images[0],
        validation=images[1],
        validation_attack=PGD(threat_model=threat_model, steps=20),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        schedule=piecewise({0.7: 0.1}),
        epochs=setting.epochs,
        seed=seed,
        checkpoint=checkpoint(folder, setting, data, name, seed),
        silent=True,
    )


def warm_up(data: str, setting: Setting, seed: int, images: LabelledImages, file: Path) -> nn.Module:
    """Adversarial training at 0, 1/4, 2/4, 3/4 of epsilon, an epoch each; the same for every objective, and kept in a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(data, setting.width).to(setting.device)
    if file.exists():
        model.load_state_dict(load_file(file, device=setting.device))
        return model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(WARM_UP):
        threat_model = ThreatModel(norm="linf", epsilon=EPSILONS[data] * epoch / WARM_UP)
        plain = AdversarialTraining(attack=PGD(threat_model=threat_model, steps=10))
        fit(model, plain, images, optimizer=optimizer, epochs=1, seed=1000 + seed * WARM_UP + epoch, silent=True)
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    write_atomically(file, lambda temporary: save_file(state, temporary))
    return model


def measure(model: nn.Module, state: dict[str, Tensor], test: LabelledImages, threat_model: ThreatModel) -> dict[str, float]:
    """Clean, PGD-50 and worst-case accuracy under PGD-50 and the attacks of the standard protocol."""
    model.load_state_dict(state)
    model.eval()
    attacks = {"pgd-50": PGD(threat_model=threat_model, steps=50)} | protocol_attacks("standard", threat_model)
    report = evaluate(model, test, threat_model=threat_model, attacks=attacks, reliability_checks=False)
    return {
        "clean": report.clean_accuracy,
        "pgd": report.robust_accuracy["pgd-50"],
        "standard": report.worst_case_accuracy,
    }


def one_run(name: str, data: str, seed: int, setting_name: str, cifar10: str | None, out: str) -> None:
    """Train, measure, and write one file; nothing if it is there already."""
    setting, folder = SETTINGS[setting_name], Path(out)
    path = folder / f"{setting_name}-{data}-{name}-{seed}.json"
    if path.exists():
        return
    if setting.device == "cpu":
        torch.set_num_threads(1)
    training, validation, test = (part.to(setting.device) for part in parts(data, cifar10, setting, seed))
    working = folder / "unfinished"
    working.mkdir(parents=True, exist_ok=True)
    model = warm_up(data, setting, seed, training, working / f"{setting_name}-{data}-warm-{seed}.safetensors")
    result = train(name, data, setting, seed, model, (training, validation), working)
    threat_model = ThreatModel(norm="linf", epsilon=EPSILONS[data])
    content = {
        "run": {"objective": name, "data": data, "seed": seed, "setting": setting_name},
        "objective": repr(objective(name, data, setting)),
        "best": measure(model, result.best, test, threat_model),
        "last": measure(model, result.last, test, threat_model),
        "best_epoch": result.best_epoch,
        "history": [asdict(record) for record in result.history],
        "environment": environment(),
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    checkpoint(working, setting, data, name, seed).unlink(missing_ok=True)
    print(f"wrote {path}", flush=True)


def table(out: str, setting: str) -> None:
    """Mean and spread over seeds of what is there."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(Path(out).glob(f"{setting}-*.json")):
        content = json.loads(path.read_text())
        found.setdefault((content["run"]["data"], content["run"]["objective"]), []).append(content)
    for data in NAMES:
        if not any(key[0] == data for key in found):
            continue
        print(f"\n{NAMES[data]}; %, mean over seeds (lowest to highest)\n")
        print("| objective | seeds | clean, best | PGD-50, best | standard, best | standard, last | best - last |")
        print("|---|---|---|---|---|---|---|")
        for name in RUNS:
            runs = found.get((data, name), [])
            if not runs:
                continue
            cells = [name, str(len(runs))]
            for part, column in (("best", "clean"), ("best", "pgd"), ("best", "standard"), ("last", "standard")):
                cells.append(_spread([run[part][column] for run in runs]))
            cells.append(_spread([run["best"]["standard"] - run["last"]["standard"] for run in runs], signed=True))
            print("| " + " | ".join(cells) + " |")


def _spread(values: list[float], *, signed: bool = False) -> str:
    form = "+.1f" if signed else ".1f"
    mean, low, high = (100 * value for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", help="folder of cifar10_train_exact.npz and cifar10_test_exact_first1000.npz")
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=RUNS, choices=RUNS, help="a part of the objectives")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    parser.add_argument("--out", default="results/objectives")
    arguments = parser.parse_args()
    if not arguments.table:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        sets = [data for data in NAMES if data == "mnist" or arguments.cifar10]
        jobs = [
            (name, data, seed, arguments.setting, arguments.cifar10, arguments.out)
            for seed in range(arguments.seeds)
            for data in sets
            for name in arguments.only
        ]
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            pool.starmap(one_run, jobs, chunksize=1)
    table(arguments.out, arguments.setting)


if __name__ == "__main__":
    main()

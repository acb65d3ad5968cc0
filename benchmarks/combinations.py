"""Transport x weighting x update: what every combination gives on digits, and where the five papers stand among them.

    uv run python -m benchmarks.combinations [--seeds 2] [--out results] [--figure combinations.png]

An MLP 64-128-10 on 200 digits, l_inf 0.1, 400 steps of 64 examples, attacks of ten steps. Updates: Adam at 0.003 and the shipped
meta-optimizer, which reads the second stream of whatever the objective charges. Weightings: the mean, the worst case within a
divergence of 0.1 (KL, alpha and Renyi of order 2), and CAAT, which learns from 100 more digits, clean and balanced, finds its
adversaries itself and needs an update that it can look ahead along. Nothing is chosen: the settings are the defaults. Robust
accuracy is that under PGD-20 on cross-entropy and on the margin, worst of both, on 400 test digits; means over seeds, each with
its own images and initial weights.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import write
from benchmarks._judging import clean_and_robust
from metarobust.attacks import APGD, BETA, FGSM, PGD
from metarobust.data import LowDataTasks, digits_pools
from metarobust.divergences import KL, Alpha, Renyi
from metarobust.meta_optimizers import load
from metarobust.meta_weighters import CAAT
from metarobust.models import mlp
from metarobust.objectives import ARMOR, AdversarialTraining
from metarobust.threat_models import ThreatModel
from metarobust.training import fit
from metarobust.types import Attack, Model

BALL = ThreatModel(norm="linf", epsilon=0.1)
EXAMPLES, BATCH, STEPS = 200, 64, 400


def unmoved(model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    return x


TRANSPORTS: dict[str, Attack] = {
    "none": unmoved,
    "FGSM": FGSM(threat_model=BALL),
    "PGD": PGD(threat_model=BALL),
    "APGD": APGD(threat_model=BALL, steps=10),
    "BETA": BETA(threat_model=BALL, steps=10),
}
DIVERGENCES = {"KL": KL(), "alpha": Alpha(order=2.0), "Renyi": Renyi(order=2.0)}
WEIGHTINGS = ("mean", *DIVERGENCES, "CAAT")
UPDATES: dict[str, Callable[[nn.Module, int], torch.optim.Optimizer]] = {
    "Adam": lambda model, steps: torch.optim.Adam(model.parameters(), lr=3e-3),
    "robust-small-v1": lambda model, steps: load("robust-small-v1").torch_optimizer(
        model.parameters(), total_steps=steps, threat_model=BALL
    ),
}
PAPERS = {
    ("BETA", "mean", "Adam"): "BETA",
    ("PGD", "KL", "Adam"): "ARMOR",
    ("PGD", "alpha", "Adam"): "ARMOR",
    ("PGD", "Renyi", "Adam"): "ARMOR",
    ("PGD", "CAAT", "Adam"): "CAAT",
    ("none", "mean", "robust-small-v1"): "learned\noptimizer",
}
"""Where four of the papers stand; the fifth bounds what any of them can reach, and trains nothing."""


def runs(transport: str, weighting: str, update: str) -> bool:
    """Whether the combination makes sense."""
    return weighting != "CAAT" or (transport == "PGD" and update == "Adam")


def accuracies(transport: str, weighting: str, update: str, seed: int) -> tuple[float, float]:
    """Clean and robust accuracy on test digits."""
    pools = digits_pools(0)
    data = LowDataTasks(dataset=pools.target, examples=EXAMPLES).sample(torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    model = mlp([64, 128, 10])
    per_epoch = -(-EXAMPLES // BATCH)
    optimizer = UPDATES[update](model, STEPS)
    objective: Any = AdversarialTraining(attack=TRANSPORTS[transport])
    if weighting in DIVERGENCES:
        objective = ARMOR(robust_loss=objective, divergence=DIVERGENCES[weighting], radius=0.1)
    elif weighting == "CAAT":
        meta = LowDataTasks(dataset=pools.meta_train, examples=100).sample(torch.Generator().manual_seed(seed))
        counts = data.labels.bincount(minlength=10)
        objective = CAAT(
            threat_model=BALL, meta_data=meta, optimizer=optimizer, class_counts=counts, robust_loss=objective
        )  # fmt: skip
    fit(model, objective, data, optimizer=optimizer, epochs=STEPS // per_epoch, batch_size=BATCH, seed=seed, silent=True)
    return clean_and_robust(model, pools.test.select(torch.arange(400)), BALL, steps=20)


def draw(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """A panel per update: transports across, weightings down, robust accuracy in colour, and the names of the papers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    means = {name: statistics.mean(robust for _, robust in values) for name, values in found.items()}
    low, high = min(means.values()), max(means.values())
    figure, panels = plt.subplots(1, len(UPDATES), figsize=(11, 4.6), sharey=True, layout="constrained")
    image: Any = None
    for panel, update in zip(panels, UPDATES, strict=True):
        table = [[means.get(f"{t}, {w}, {update}", float("nan")) for t in TRANSPORTS] for w in WEIGHTINGS]
        image = panel.imshow(table, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        panel.set_title(f"update: {update}")
        panel.set_xticks(range(len(TRANSPORTS)), list(TRANSPORTS))
        panel.set_yticks(range(len(WEIGHTINGS)), list(WEIGHTINGS))
        panel.set_xlabel("transport")
        for row, weighting in enumerate(WEIGHTINGS):
            for column, transport in enumerate(TRANSPORTS):
                value = table[row][column]
                if value != value:
                    panel.text(column, row, "no sense", ha="center", va="center", color="grey", fontsize=8)
                    continue
                paper = PAPERS.get((transport, weighting, update))
                told = f"{value:.3f}" + (f"\n{paper}" if paper else "")
                bright = value > low + 0.6 * (high - low)
                weight = "bold" if paper else "normal"
                panel.text(
                    column, row, told, ha="center", va="center", color="black" if bright else "white", fontsize=8, weight=weight
                )
    panels[0].set_ylabel("weighting")
    figure.colorbar(image, ax=panels, label="robust accuracy, digits, l_inf 0.1")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", default="results", help="folder for combinations.json")
    parser.add_argument("--figure", type=Path, help="picture to draw")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| transport | weighting | update | clean | robust (lowest to highest) |\n|---|---|---|---|---|")
    found: dict[str, list[tuple[float, float]]] = {}
    for update in UPDATES:
        for weighting in WEIGHTINGS:
            for transport in TRANSPORTS:
                if not runs(transport, weighting, update):
                    continue
                values = [accuracies(transport, weighting, update, seed) for seed in range(arguments.seeds)]
                found[f"{transport}, {weighting}, {update}"] = values
                clean, robust = zip(*values, strict=True)
                spread = f"{statistics.mean(robust):.3f} ({min(robust):.3f} to {max(robust):.3f})"
                print(f"| {transport} | {weighting} | {update} | {statistics.mean(clean):.3f} | {spread} |", flush=True)
    write("combinations", {"seeds": arguments.seeds, "clean, robust": found}, arguments.out)
    if arguments.figure is not None:
        draw(found, arguments.figure)
        print(f"wrote {arguments.figure}")


if __name__ == "__main__":
    main()

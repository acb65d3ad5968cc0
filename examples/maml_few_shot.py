"""Robust few-shot adaptation: robust objectives inside learn2learn's MAML, on classes that meta-training never saw.

    uv run python examples/maml_few_shot.py                                   # digits, no download, a few minutes
    uv run python examples/maml_few_shot.py --data fashion-mnist --download
    uv run python examples/maml_few_shot.py --quick                            # seconds, smoke test

A task has three classes with five labelled images each and asks for those of fifteen more. Meta-training draws tasks from
classes 0 to 6, judging from classes 7 to 9; labels are shuffled, so that nothing but the images tells them apart. An objective
is called on the adapted learner as on any model. Three ways to meta-train: clean, robust on the query images alone (adversarial
querying, Goldblum et al., 2020), robust in adaptation and on the query. Every way adapts at the end as it did in meta-training.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metarobust.attacks import PGD
from metarobust.data import LabelledImages, import_learn2learn, load
from metarobust.models import cnn
from metarobust.objectives import AdversarialTraining
from metarobust.threat_models import ThreatModel

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)
WAYS, SHOTS, QUERIES, INNER_RATE = 3, 5, 15, 0.4
SEEN, UNSEEN = tuple(range(7)), (7, 8, 9)
Objective = Callable[..., Tensor]


def clean(model: torch.nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def task(data: LabelledImages, classes: tuple[int, ...], draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Support images and labels, query images and labels."""
    chosen = torch.tensor(classes)[torch.randperm(len(classes), generator=draw)[:WAYS]]
    rows = []
    for label in chosen:
        own = (data.labels == label).nonzero().squeeze(1)
        rows.append(own[torch.randperm(len(own), generator=draw)[: SHOTS + QUERIES]])
    images = data.images[torch.stack(rows)]
    labels = torch.arange(WAYS)[:, None].expand(WAYS, SHOTS + QUERIES)
    parts = (images[:, :SHOTS], labels[:, :SHOTS], images[:, SHOTS:], labels[:, SHOTS:])
    x, y, query, asked = (part.flatten(0, 1) for part in parts)
    return x, y, query, asked


def meta_train(
    data: LabelledImages, inner: Objective, outer: Objective, *, iterations: int, steps: int, seed: int
) -> torch.nn.Module:
    """MAML of second order: four tasks per meta-update, Adam."""

    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    maml = import_learn2learn().algorithms.MAML(cnn([16, 32], image_size=data.images.shape[-1], classes=WAYS), lr=INNER_RATE)
    optimizer = torch.optim.Adam(maml.parameters(), lr=3e-3)
    for _ in range(iterations):
        optimizer.zero_grad()
        for _ in range(4):
            x, y, query, asked = task(data, SEEN, draw)
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(inner(learner, x, y, generator=draw).mean())
            (outer(learner, query, asked, generator=draw).mean() / 4).backward()
        optimizer.step()
    return maml


def judge(maml: Any, data: LabelledImages, inner: Objective, *, tasks: int, steps: int) -> tuple[float, float]:
    """Clean accuracy and accuracy under PGD-20 on query images of unseen classes, means over tasks."""
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(tasks):
        x, y, query, asked = task(data, UNSEEN, draw)
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(inner(learner, x, y, generator=draw).mean())
        moved = PGD(threat_model=THREAT_MODEL, steps=20)(learner, query, asked, generator=draw)
        with torch.no_grad():
            right = learner(query).argmax(1) == asked
            found.append((right.float().mean().item(), (right & (learner(moved).argmax(1) == asked)).float().mean().item()))
    return statistics.mean(c for c, _ in found), statistics.mean(r for _, r in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist", "fashion-mnist"), default="digits")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    data = load(arguments.data, train=True, download=arguments.download)
    robust = AdversarialTraining(attack=PGD(threat_model=THREAT_MODEL, steps=3))
    ways: dict[str, tuple[Objective, Objective]] = {
        "clean": (clean, clean), "robust query": (clean, robust), "robust throughout": (robust, robust),
    }  # fmt: skip
    iterations, tasks = (2, 3) if arguments.quick else (300, 100)
    print(f"{WAYS} unseen classes, {SHOTS} images each, {arguments.data}, l_inf {THREAT_MODEL.epsilon}")
    for name, (inner, outer) in ways.items():
        results = []
        for seed in range(1 if arguments.quick else arguments.seeds):
            maml = meta_train(data, inner, outer, iterations=iterations, steps=2, seed=seed)
            results.append(judge(maml, data, inner, tasks=tasks, steps=2))
        told = ", ".join(f"{c:.3f} / {r:.3f}" for c, r in results)
        print(f"{name + ':':18} clean / robust accuracy by seed: {told}", flush=True)


if __name__ == "__main__":
    main()

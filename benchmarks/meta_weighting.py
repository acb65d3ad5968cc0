"""What learned weights cost: the meta-step against one written on ``torchopt.MetaSGD``, a routed step against one of TRADES.

    uv run python -m benchmarks.meta_weighting [--rounds 9] [--threads 1] [--device cuda] [--out results]

Meta-step, attacks excluded: 128 images of 28 x 28 pixels (random, as their adversaries and anti-adversaries), a CNN with and
without BatchNorm, TRADES' loss; the virtual SGD step with momentum and weight decay, the loss on 128 meta-images and their
adversaries, a step of the weighting network, then the actual weighted step. The peer does the same with ``torchopt.MetaSGD``, and
asks autograd for the network's gradient alone. Memory is the peak during the virtual step and the meta-gradient above what was
there before: of a process of its own on a CPU, of the allocator on a GPU. Bars: the default mode at
most 1.0 times the peer's time, the JVP at most 0.75 times its memory.

Routed step: `CAAT` with ten attack steps and hard routing against `TRADES` with ten, forward, backward and SGD. Bar: at most 1.15
times. Soft routing, the default, beside it. (``--routed`` for this part alone.)
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchopt
from torch import Tensor, nn

from benchmarks._common import interleaved, ratio, write
from metarobust.losses import cross_entropy, kl_divergence
from metarobust.meta_weighters import CAAT, HYPERGRADIENTS, ClassStatistics, WeightingNetwork, training_characteristics
from metarobust.meta_weighters._batch_step import meta_step_on_batch
from metarobust.meta_weighters._branches import Branches, Points, rows_independent
from metarobust.models import cnn
from metarobust.objectives import TRADES
from metarobust.threat_models import ThreatModel
from metarobust.types import Batch

BATCH, CLASSES, BETA = 128, 10, 1.5
THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


def network(normalised: bool, device: str) -> nn.Module:
    """The CNN of the timings, in training mode."""
    torch.manual_seed(0)
    if not normalised:
        return cnn([16, 32], image_size=28).to(device)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 14 * 14, CLASSES),
    ).to(device)


class Setting:
    """Random data and points, shared by all competitors."""

    def __init__(self, normalised: bool, device: str) -> None:
        draw = torch.Generator().manual_seed(0)
        images = [torch.rand(BATCH, 1, 28, 28, generator=draw).to(device) for _ in range(5)]
        labels = [torch.randint(CLASSES, (BATCH,), generator=draw).to(device) for _ in range(2)]
        self.x, self.against, self.in_favour, self.meta_x, self.meta_against = images
        self.y, self.meta_y = labels
        self.normalised, self.device = normalised, device
        self.statistics = ClassStatistics([100] * CLASSES).to(device)

    def meta_charge(self, model: Any, x: Tensor, y: Tensor, **_: Any) -> Tensor:
        """TRADES' loss on the meta-data at the given points."""
        clean, moved = (model(torch.cat([x, self.meta_against])) if not self.normalised else None), None
        if clean is None:
            clean, moved = model(x), model(self.meta_against)
        else:
            clean, moved = clean.chunk(2)
        return cross_entropy(clean, y) + BETA * kl_divergence(clean, moved)

    def charges(self, model: Any) -> Tensor:
        """Losses of both branches, ``[batch, 2]``, in one pass where rows are independent."""
        parts = (self.x, self.against, self.in_favour)
        clean, moved, anti = model(torch.cat(parts)).chunk(3) if not self.normalised else tuple(model(part) for part in parts)
        robust = cross_entropy(clean, self.y) + BETA * kl_divergence(clean, moved)
        return torch.stack([robust, cross_entropy(anti, self.y)], 1)


def ours(setting: Setting, method: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The whole step and the meta-step alone, of the library."""
    model, weigher = network(setting.normalised, setting.device), WeightingNetwork().to(setting.device)
    optimizer, meta_optimizer = torch.optim.SGD(model.parameters(), **SGD), torch.optim.Adam(weigher.parameters(), lr=1e-3)
    branches = Branches(
        names=weigher.branches,
        robust_loss=TRADES(threat_model=THREAT_MODEL, beta=BETA),
        threat_model=THREAT_MODEL,
        steps=10,
        step_size=None,
    )
    points = Points(adversary=setting.against, anti_adversary=setting.in_favour)

    def meta() -> Tensor:
        with torch.no_grad():
            known = training_characteristics(model(setting.x), setting.y, setting.statistics)
        weigher.observe(known)
        meta_step_on_batch(
            weigher,
            meta_optimizer,
            branches,
            model,
            Batch(setting.x, setting.y),
            known,
            points,
            meta_batch=Batch(setting.meta_x, setting.meta_y),
            meta_loss=setting.meta_charge,
            optimizer=optimizer,
            method=method,
            steps=1,
            hard=False,
            clip_norm=None,
            generator=torch.Generator().manual_seed(0),
        )
        return known

    def step() -> None:
        known = meta()
        with torch.no_grad():
            weights = weigher(known).weights
        losses = branches.losses(model, setting.x, setting.y, points, joint=rows_independent(model), seed=0)
        optimizer.zero_grad()
        (weights * losses).sum(1).mean().backward()
        optimizer.step()

    return step, meta


def peer(setting: Setting) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same on torchopt.MetaSGD: step on a graph, then parameters and optimizer put back."""
    model, weigher = network(setting.normalised, setting.device), WeightingNetwork().to(setting.device)
    optimizer, meta_optimizer = torch.optim.SGD(model.parameters(), **SGD), torch.optim.Adam(weigher.parameters(), lr=1e-3)
    virtual = torchopt.MetaSGD(model, **SGD)

    def meta() -> Tensor:
        with torch.no_grad():
            known = training_characteristics(model(setting.x), setting.y, setting.statistics)
        weigher.observe(known)
        before = torchopt.extract_state_dict(model, by="reference"), torchopt.extract_state_dict(virtual, by="reference")
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        weights = weigher(known).weights
        virtual.step((weights * setting.charges(model)).sum(1).mean())
        model.eval()
        loss = setting.meta_charge(model, setting.meta_x, setting.meta_y).mean()
        gradients = torch.autograd.grad(loss, list(weigher.parameters()))
        torchopt.recover_state_dict(model, before[0])
        torchopt.recover_state_dict(virtual, before[1])
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
        model.train()
        for p, gradient in zip(weigher.parameters(), gradients, strict=True):
            p.grad = gradient
        meta_optimizer.step()
        meta_optimizer.zero_grad()
        return known

    def step() -> None:
        known = meta()
        with torch.no_grad():
            weights = weigher(known).weights
        optimizer.zero_grad()
        (weights * setting.charges(model)).sum(1).mean().backward()
        optimizer.step()

    return step, meta


def peak_memory(name: str, normalised: bool, device: str) -> float:
    """Mebibytes that a meta-step needs at its peak, beyond what is there before; NaN where the system does not tell.

    On a CPU in a process of its own, whose allocator gives every larger block back at once, so that resident memory is memory
    in use.
    """
    if device == "cuda":
        return measured_memory(name, normalised, device)
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "benchmarks.meta_weighting", "--memory", name, "--threads", "1"]
    command += ["--normalised"] if normalised else []
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | settings)
    return float(told.stdout.split()[-1])


def measured_memory(name: str, normalised: bool, device: str) -> float:
    """The same, measured in this process."""
    setting = Setting(normalised, device)
    _, function = peer(setting) if name == "torchopt.MetaSGD" else ours(setting, name)
    function()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kibibytes(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    try:
        reset.write_text("5")
        before = kibibytes("VmRSS")
    except OSError:
        return float("nan")
    function()
    return (kibibytes("VmHWM") - before) / 2**10


def routed(device: str, rounds: int) -> dict[str, Any]:
    """Steps with hard and soft routing, without and with a meta-step every five calls, against TRADES' step."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(BATCH, 1, 28, 28, generator=draw).to(device), torch.randint(CLASSES, (BATCH,), generator=draw).to(device)
    steps: dict[str, Callable[[], object]] = {}
    rows = (
        ("TRADES", "", None), ("CAAT, routed", "hard", None), ("CAAT, routed, meta-step every 5", "hard", 5),
        ("CAAT, soft", "soft", None), ("CAAT, soft, meta-step every 5", "soft", 5),
    )  # fmt: skip
    for name, routing, meta_every in rows:
        model = network(False, device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        trades = TRADES(threat_model=THREAT_MODEL, beta=BETA, steps=10)
        objective: Any = trades
        if name != "TRADES":
            weigher = WeightingNetwork(favoured=0.6, generator=torch.Generator().manual_seed(1))
            objective = CAAT(
                threat_model=THREAT_MODEL,
                meta_data=(x, y),
                optimizer=optimizer,
                class_counts=[100] * CLASSES,
                network=weigher,
                robust_loss=trades,
                routing=routing,
                meta_every=meta_every,
                learning_rate=1e-6,
            )

        def step(objective: Any = objective, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            objective(model, x, y, generator=torch.Generator().manual_seed(0)).mean().backward()
            optimizer.step()

        steps[name] = step
    seconds = interleaved(steps, rounds=rounds, repeats=10)
    found = {name: ratio(seconds[name], seconds["TRADES"]) for name in steps if name != "TRADES"}
    return {"seconds": {name: statistics.median(values) for name, values in seconds.items()}, "ratio": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: torch's own choice")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", default="results")
    parser.add_argument("--routed", action="store_true", help="measure the routed steps alone")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--normalised", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(measured_memory(arguments.memory, arguments.normalised, "cpu"))
        return
    content: dict[str, Any] = {"device": arguments.device, "rounds": arguments.rounds, "meta-step": {}}
    if not arguments.routed:
        print(
            f"meta-step on {arguments.device}, median of {arguments.rounds} rounds (lowest to highest), against torchopt.MetaSGD"
        )
    for normalised in () if arguments.routed else (False, True):
        setting = Setting(normalised, arguments.device)
        made = {"torchopt.MetaSGD": peer(setting), **{method: ours(setting, method) for method in HYPERGRADIENTS}}
        seconds = interleaved({name: step for name, (step, _) in made.items()}, rounds=arguments.rounds)
        memory = {name: statistics.median(peak_memory(name, normalised, arguments.device) for _ in range(3)) for name in made}
        where = "CNN with BatchNorm" if normalised else "CNN"
        rows = {}
        for name in made:
            against = ratio(seconds[name], seconds["torchopt.MetaSGD"])
            share = memory[name] / memory["torchopt.MetaSGD"]
            rows[name] = {
                "seconds": statistics.median(seconds[name]),
                "ratio": against,
                "mebibytes": memory[name],
                "memory": share,
            }
            spread = f"{against['median']:.2f} ({against['lowest']:.2f} to {against['highest']:.2f})"
            print(
                f"{where:20s} {name:20s} {1e3 * rows[name]['seconds']:7.1f} ms  {spread:24s} {memory[name]:7.1f} MiB  {share:.2f}"
            )
        content["meta-step"][where] = rows
    content["routed step"] = routed(arguments.device, arguments.rounds)
    for name, against in content["routed step"]["ratio"].items():
        print(f"{name:34s} {against['median']:.2f} ({against['lowest']:.2f} to {against['highest']:.2f}) of a step of TRADES")
    write("meta_weighting_routed" if arguments.routed else "meta_weighting", content, arguments.out)


if __name__ == "__main__":
    main()

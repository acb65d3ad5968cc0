"""Train a network that the shipped meta-optimizer never saw, on data it never saw, without a single adversarial example.

    uv run python examples/transfer_meta_optimizer.py                       # digits that it was not learned on, no download
    uv run python examples/transfer_meta_optimizer.py --data mnist --download
    uv run python examples/transfer_meta_optimizer.py --quick               # a few seconds, smoke test

The comparison is Adam on the same clean examples, and adversarial training with PGD-5, which takes more than three times the
passes. All three are judged by the standard protocol on test images. docs/transfer.md has the same over seeds, with tuned
baselines.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from metarobust.attacks import PGD, count_calls
from metarobust.data import LabelledImages, LowDataTasks, digits_pools, load, minibatch
from metarobust.evaluation import evaluate
from metarobust.meta_optimizers import load as load_optimizer
from metarobust.models import cnn
from metarobust.threat_models import ThreatModel

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)


def train(method: str, model: nn.Module, data: LabelledImages, steps: int) -> int:
    """Train the model in place; returns how many attacks were called."""
    attack, generator = PGD(threat_model=THREAT_MODEL, steps=5), torch.Generator().manual_seed(1)
    learned = load_optimizer("robust-small-v1").torch_optimizer(model.parameters(), total_steps=steps)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    with count_calls() as attacks:
        for _ in range(steps):
            batch = minibatch(data, 64, generator=generator)
            x, y = batch.images, batch.labels
            if method == "meta-optimizer":
                learned.zero_grad()
                with learned.record_factors(model, threat_model=THREAT_MODEL) as recorder:
                    recorder.backward(F.cross_entropy(model(x), y))
                learned.step()
                continue
            if method == "PGD-5 training":
                x = attack(model, x, y, generator=generator)
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()
    return attacks.calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist", "fashion-mnist"), default="digits")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.data == "digits":
        pool, test = digits_pools(0).target, digits_pools(0).test
    else:
        pool, test = (load(arguments.data, train=part, download=arguments.download) for part in (True, False))
    test = test.select(torch.arange(100 if arguments.quick else 500))
    data = LowDataTasks(dataset=pool, examples=arguments.examples).sample(torch.Generator().manual_seed(0))
    steps = 40 if arguments.quick else 400
    for method in ("meta-optimizer", "Adam, clean", "PGD-5 training"):
        torch.manual_seed(0)
        model = cnn([8, 16], image_size=pool.images.shape[-1])
        attacks = train(method, model, data, steps)
        protocol = "quick" if arguments.quick else "standard"
        report = evaluate(model.eval(), test, threat_model=THREAT_MODEL, protocol=protocol)
        accuracies = f"clean {report.clean_accuracy:.3f}, robust {report.worst_case_accuracy:.3f}"
        print(f"{method + ':':15} {accuracies}, {attacks} attacks in training, doubts: {len(report.warnings)}", flush=True)


if __name__ == "__main__":
    main()

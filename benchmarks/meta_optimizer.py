"""Which parts of the meta-optimizer matter: ablations on a split of the digits of their own (seeds from 100 on).

    uv run python -m benchmarks.meta_optimizer [--iterations 300] [--meta-seeds 2] [--out results]

Rows: the full recipe; without calibration; with first-order meta-gradients; with one stream; with a clean meta-loss; the
hand-set factor rule. Accuracy under two PGD-20 attacks of the two unseen demo architectures after 200 steps on 100 examples,
on the part of that split's target pool that was not trained on; mean and spread over target seeds, per meta-seed.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks._common import write
from metarobust.command_line import _demo_experiment as experiment
from metarobust.meta_optimizers import train_optimizees

ROWS = ("lstm", *experiment.ABLATIONS, "lstm_one_stream", "control", "factor_rule")


def main() -> None:
    """Train each row, print its accuracies, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300, help="meta-updates per row")
    parser.add_argument("--meta-seeds", type=int, default=2, help="independent meta-trainings per row")
    parser.add_argument("--out", default="results", help="folder for meta_optimizer.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for row in ROWS:
        for seed in range(arguments.meta_seeds if row != "factor_rule" else 1):
            settings = replace(experiment.demo_settings(quick=False, seed=seed + 100), iterations=arguments.iterations, seeds=8)
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "optimizer.safetensors"
                if row != "factor_rule":
                    experiment.meta_train_variant(settings, row, path, lambda iteration, loss: None)
                seconds = time.perf_counter() - begin
                robust = {}
                for target in experiment.TARGETS:
                    task = experiment.target_task(settings, target)
                    rule = experiment.update_rule(settings, row, experiment.LEARNING_RATES.get(row, (None,))[0], path)
                    final = train_optimizees(
                        task, rule, total_steps=settings.total_steps, generator=torch.Generator().manual_seed(seed)
                    )[settings.total_steps]
                    rows = task.held_out.flatten()
                    x, y = task.dataset.images[rows], task.dataset.labels[rows]
                    robust[target] = experiment.stacked_robust_accuracy(task, final, x, y).tolist()
            results.append({"row": row, "meta_seed": seed, "robust": robust, "meta_training_seconds": seconds})
            shown = ", ".join(f"{t} {statistics.mean(v):.3f} (sd {statistics.stdev(v):.3f})" for t, v in robust.items())
            print(f"{row:16} meta-seed {seed}: {shown}; {seconds:.0f} s", flush=True)
    write("meta_optimizer", {"settings": vars(arguments), "results": results}, arguments.out)


if __name__ == "__main__":
    main()

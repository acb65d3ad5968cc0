"""How the shipped meta-optimizer robust-small-v1 was learned: whole training runs of small networks on a part of the digits.

    uv run python examples/robust_small_v1.py [--quick] [--variant robust] [--seed 0]
    uv run torchrun --nproc-per-node 2 examples/robust_small_v1.py     # the settings of a generation shared by two processes

Seven numbers of an `InterpretableOptimizer` are searched: learning rate, the power by which it falls, its power of the fan-in,
the coefficients of the adversarial gradient, estimated by tangents, in first, inner and last layers, and a factor on these in
networks with normalisation. A generation trains five networks with sixteen settings each. Two controls learn alike: "clean" is
judged on clean examples, "one-stream" reads the gradient alone.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from metarobust.attacks import PGD
from metarobust.data import digits_pools
from metarobust.meta_optimizers import Generation, InterpretableOptimizer, TaskDistribution, meta_search, save
from metarobust.models import cnn, mlp, residual_network
from metarobust.threat_models import ThreatModel

ARCHITECTURES = {
    "mlp 64-96-10": partial(mlp, [64, 96, 10]),
    "mlp 64-48-48-10": partial(mlp, [64, 48, 48, 10]),
    "cnn 6-12": partial(cnn, [6, 12]),
    "cnn 4-8-8": partial(cnn, [4, 8, 8]),
    "residual network 8-16": partial(residual_network, (8, 16)),
}

KNOBS = {
    "learning rate": 0.25,
    "learning rate, fall": 0.3,
    "learning rate, fan-in": 0.15,
    "factor, first": 0.2,
    "factor, inner": 0.2,
    "factor, last": 0.2,
    "factor, networks with normalisation": 0.3,
}


def margin_attack(threat_model: ThreatModel, *, steps: int = 10) -> PGD:
    """The attack that judges a run in the search."""
    return PGD(threat_model=threat_model, steps=steps, loss="margin")


def starting_point(source: str) -> InterpretableOptimizer:
    """Adam with a rate that falls to zero, on g + h in weights and on g elsewhere, by hand."""
    rule = InterpretableOptimizer(gradient_source=source, initial_learning_rate=4e-3)
    rule.turn({"learning rate, fall": 1.0})
    if rule.two_streams:
        rule.turn({f"factor, {layers}": 1.2 for layers in ("first", "inner", "last")})
        rule.turn({"factor, networks with normalisation": math.log(0.6)})
    return rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small generations: to see it run, not to use the result")
    parser.add_argument("--variant", choices=("robust", "clean", "one-stream"), default="robust")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: robust_small_v1.safetensors, or robust_small_v1_quick.safetensors")
    arguments = parser.parse_args()
    if arguments.out is None:
        arguments.out = Path("robust_small_v1_quick.safetensors" if arguments.quick else "robust_small_v1.safetensors")
    torch.set_num_threads(1)
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    source = "gradient" if arguments.variant == "one-stream" else "gradient+adversarial_tangent"
    tasks = TaskDistribution(
        architectures=ARCHITECTURES if not arguments.quick else {"mlp 64-96-10": ARCHITECTURES["mlp 64-96-10"]},
        datasets={"digits": digits_pools(0).meta_train},
        examples=(100, 300),
        epsilon=(0.05, 0.15),
        gradient_source=source,
        attack=None if arguments.variant == "clean" else margin_attack,
        copies=2 if arguments.quick else 6,
    )

    def report(generation: int, found: Generation) -> None:
        if first:
            told = f"best {found.best:.3f}, at the mean {found.mean:.3f}, median {found.median:.3f}"
            print(f"generation {generation}, robust plus a quarter of clean accuracy: {told}", flush=True)

    rule = starting_point(source)
    meta_search(
        rule,
        tasks.one_of_each,
        knobs={name: spread for name, spread in KNOBS.items() if name in rule.knobs()},
        generations=2 if arguments.quick else 7,
        population=4 if arguments.quick else 16,
        elite=2 if arguments.quick else 5,
        total_steps=(20, 40) if arguments.quick else (150, 400),
        clean_weight=0.25,
        final_draws=1 if arguments.quick else 4,
        seed=arguments.seed,
        checkpoint=None if arguments.quick else arguments.out.with_suffix(".search"),
        silent=True,
        on_generation=report,
    )
    if first:
        print(rule.table())
        print(f"on tasks that the search did not see: {rule.record['final_scores']}, kept: {rule.record['kept']}")
        print(f"wrote {save(rule, arguments.out)}")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()

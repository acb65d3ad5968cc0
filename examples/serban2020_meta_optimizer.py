"""Learning to learn from mistakes (Serban, Poll, Visser 2020, arXiv 2008.05247): meta-train, save, transfer.

Claim of the paper: a meta-optimizer trained on adversarial examples carries adversarial knowledge to new models, in low-data
regimes, without generating new adversarial examples. In this library the knowledge travels in a second gradient stream, the
perturbed-factor gradient of clean examples; gradients alone carry only a regulariser (see docs/papers/meta_optimizer.md).

    uv run python examples/serban2020_meta_optimizer.py            # about 3 minutes on 2 cores
    uv run python examples/serban2020_meta_optimizer.py --quick    # a few seconds, smoke test

Expected without --quick, seed 0 (one target, one seed: expect a spread of about 0.03):
    learned optimizer: clean 0.917, robust 0.597, 0 attacks
    Adam, lr 1e-3:     clean 0.908, robust 0.459, 0 attacks
"""

import sys

import torch
import torch.nn.functional as F

from metarobust.attacks import PGD, count_calls
from metarobust.data import LowDataTasks, digits_pools, minibatch
from metarobust.evaluation import evaluate
from metarobust.meta_optimizers import ClassificationTask, LSTMOptimizer, load, meta_train, record_factors, save
from metarobust.models import cnn, mlp
from metarobust.threat_models import ThreatModel

quick = "--quick" in sys.argv
steps, threat_model, pools = 200, ThreatModel(norm="linf", epsilon=0.1), digits_pools(seed=0)


def sample_task(generator: torch.Generator) -> ClassificationTask:
    """Four copies of a small network, each with its own 100 examples; judged on PGD examples of fresh digits."""
    builders = (lambda: mlp([64, 16, 10]), lambda: mlp([64, 48, 10]), lambda: cnn([4, 8]))
    tasks = LowDataTasks(dataset=pools.meta_train, examples=100)
    return ClassificationTask(
        build=builders[int(torch.randint(3, (), generator=generator))],
        dataset=pools.meta_train,
        subsets=torch.stack([tasks.sample_indices(generator) for _ in range(4)]),
        threat_model=threat_model,
        meta_attack=PGD(threat_model=threat_model, steps=5),
    )


# 1. Meta-train on small networks, and save.
torch.manual_seed(0)
iterations = 5 if quick else 300
trained = meta_train(LSTMOptimizer(), sample_task, iterations=iterations, total_steps=steps)
path = save(trained.meta_optimizer, "serban2020_meta_optimizer.safetensors")
print(f"meta-loss: first 20 iterations {sum(trained.losses[:20]) / len(trained.losses[:20]):.2f}, last {trained.losses[-1]:.2f}")
print(f"wrote {path}")

# 2. Transfer: an unseen, wider network, 100 clean examples, an ordinary PyTorch loop, no attack.
target_data = LowDataTasks(dataset=pools.target, examples=100).sample(torch.Generator().manual_seed(1))
for name in ("learned optimizer", "Adam, lr 1e-3"):
    torch.manual_seed(1)
    model, generator = mlp([64, 128, 10]), torch.Generator().manual_seed(2)
    if name == "learned optimizer":
        optimizer = load(path).torch_optimizer(model.parameters(), total_steps=steps)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with count_calls() as attacks:
        for _ in range(steps):
            batch = minibatch(target_data, 64, generator=generator)
            optimizer.zero_grad()
            with record_factors(model, threat_model=threat_model) as recorder:
                recorder.backward(F.cross_entropy(model(batch.images), batch.labels))
            optimizer.step()
    judges = {
        loss: PGD(threat_model=threat_model, steps=20 if quick else 100, restarts=3, loss=loss)
        for loss in ("cross_entropy", "margin")
    }
    report = evaluate(model.eval(), pools.test, threat_model=threat_model, attacks=judges)
    print(f"{name + ':':18} clean {report.clean_accuracy:.3f}, robust {report.worst_case_accuracy:.3f}, {attacks.calls} attacks")

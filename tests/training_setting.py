"""What the tests of the training loop share: data, networks, objectives, and comparisons to the bit."""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust.attacks import FGSM, PGD
from metarobust.objectives import AdversarialTraining
from metarobust.threat_models import ThreatModel
from metarobust.training import TrainingResult, fit

THREAT_MODEL = ThreatModel(norm="linf", epsilon=0.1)
NOISY = AdversarialTraining(attack=PGD(threat_model=THREAT_MODEL, steps=2))
PLAIN = AdversarialTraining(attack=FGSM(threat_model=THREAT_MODEL))


def data(count: int = 22, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, (3 * x[:, 0]).long().clamp(max=2)


def network(*, full: bool = False, seed: int = 0) -> nn.Module:
    """A small network; the full one has BatchNorm and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4)] if full else [nn.Tanh()]
        return nn.Sequential(nn.Linear(5, 8), *middle, nn.Linear(8, 3))


def sgd(model: nn.Module, lr: float = 0.1, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **more)


def train(model: nn.Module, objective: Any = PLAIN, examples: Any = None, **changes: Any) -> TrainingResult:
    arguments: dict[str, Any] = {"epochs": 2, "batch_size": 8, "silent": True} | changes
    arguments.setdefault("optimizer", sgd(model))
    return fit(model, objective, data() if examples is None else examples, **arguments)


def cross_entropy(model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The natural loss, as an objective."""
    return F.cross_entropy(model(x), y, reduction="none")


class Recorded:
    """An objective that keeps what it is called with."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.x, self.y, self.seeds, self.states = objective, [], [], [], []

    def __repr__(self) -> str:
        return repr(self.objective)

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Any:
        self.x.append(x.clone())
        self.y.append(y.clone())
        self.seeds.append(generator.initial_seed())
        self.states.append(copy.deepcopy(model.state_dict()))
        return self.objective(model, x, y, generator=generator)


def rows_of(batch: Tensor, x: Tensor) -> list[int]:
    return [int((x == row).flatten(1).all(1).nonzero()) for row in batch]


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def without_seconds(result: TrainingResult) -> list[dict[str, Any]]:
    return [vars(record) | {"seconds": None} for record in result.history]


class Scalar(NamedTuple):
    loss: Tensor
    diagnostics: dict[str, float]

"""A distribution over meta-training tasks: architectures, sizes of training sets, radii."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from metarobust._checks import choice, finite, integer, message, pair, require
from metarobust.attacks import PGD
from metarobust.data import LabelledImages, LowDataTasks
from metarobust.meta_optimizers._factor_gradients import GRADIENT_SOURCES
from metarobust.meta_optimizers._tasks import ClassificationTask
from metarobust.threat_models import Norm, ThreatModel
from metarobust.types import Attack, RobustLoss


def pgd_5(threat_model: ThreatModel) -> Attack:
    """Five steps of projected gradient ascent: the attack that judges a task unless told otherwise."""
    return PGD(threat_model=threat_model, steps=5)


@dataclass(frozen=True, kw_only=True)
class TaskDistribution:
    """What ``meta_train`` and ``meta_search`` draw tasks from; a function from a generator to a :class:`ClassificationTask`.

    Each task draws an architecture and a data set uniformly, a number of training examples uniformly, and epsilon
    log-uniformly; its copies differ in their examples and in their initial weights.

    Args:
        architectures: name and builder of a fresh model.
        datasets: name and pool of each data set; the architectures must fit all of them.
        examples: least and most training examples of a task.
        epsilon: least and largest radius, in input units.
        norm: of the threat model.
        box: smallest and largest valid input value.
        gradient_source: that of the meta-optimizer, see ``record_factors``; ``"gradient"`` for tasks without a second stream.
        attack: makes the attack that judges a task from its threat model; None judges on clean examples.
        meta_objective: makes the meta-loss from the task's threat model, any of :mod:`metarobust.objectives`; None for
            cross-entropy under ``attack``.
        copies: models per task.
        batch_size: training examples per step and copy.

    Raises:
        ValueError: nothing to draw from, or a range that is empty.

    Example:
        >>> from metarobust.data import digits_pools
        >>> from metarobust.models import mlp
        >>> tasks = TaskDistribution(
        ...     architectures={"small": lambda: mlp([64, 16, 10])},
        ...     datasets={"digits": digits_pools().meta_train},
        ...     examples=(50, 100),
        ... )
        >>> task = tasks(torch.Generator().manual_seed(0))
        >>> task.optimizees, 50 <= task.examples <= 100
        (4, True)
    """

    architectures: Mapping[str, Callable[[], nn.Module]]
    datasets: Mapping[str, LabelledImages]
    examples: tuple[int, int] = (100, 200)
    epsilon: tuple[float, float] = (0.05, 0.15)
    norm: Norm = "linf"
    box: tuple[float, float] = (0.0, 1.0)
    gradient_source: str = "gradient+perturbed_factors"
    attack: Callable[[ThreatModel], Attack] | None = pgd_5
    meta_objective: Callable[[ThreatModel], RobustLoss] | None = None
    copies: int = 4
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("architectures", "datasets"):
            if not isinstance(getattr(self, name), Mapping):
                got = type(getattr(self, name)).__name__
                raise TypeError(message(name, "a mapping from names", got, f"write {name}={{'small': ...}}"))
        for name, example in (("examples", "(100, 200)"), ("epsilon", "(0.05, 0.15)"), ("box", "(0.0, 1.0)")):
            pair(name, getattr(self, name), example)
        require(len(self.architectures) > 0, "architectures", "at least one architecture", "none")
        require(len(self.datasets) > 0, "datasets", "at least one data set", "none")
        for count in self.examples:
            integer("examples", count, least=1)
        require(self.examples[1] >= self.examples[0], "examples", "a pair (least, most)", self.examples)
        for radius in self.epsilon:
            finite("epsilon", radius, above=0.0)
        require(self.epsilon[1] >= self.epsilon[0], "epsilon", "a pair (least, largest)", self.epsilon)
        choice("gradient_source", self.gradient_source, GRADIENT_SOURCES)
        integer("copies", self.copies, least=1)
        _ = ThreatModel(norm=self.norm, epsilon=self.epsilon[1], lower=self.box[0], upper=self.box[1])

    def __call__(self, generator: torch.Generator) -> ClassificationTask:
        """A task with everything drawn from ``generator``, a CPU generator."""
        names = list(self.architectures)
        share = float(torch.rand((), generator=generator))
        return self.task(names[_below(len(names), generator)], share, generator)

    def one_of_each(self, generator: torch.Generator) -> list[ClassificationTask]:
        """One task per architecture, from ``generator``, radii spread evenly over the range: less noise for the same work."""
        names, count = list(self.architectures), len(self.architectures)
        order = torch.randperm(count, generator=generator).tolist()
        return [
            self.task(name, (place + float(torch.rand((), generator=generator))) / count, generator)
            for name, place in zip(names, order, strict=True)
        ]

    def task(self, architecture: str, share: float, generator: torch.Generator) -> ClassificationTask:
        """A task of ``architecture``, its radius at ``share`` in [0, 1] of the range on a log scale, else from ``generator``."""
        pools = list(self.datasets.values())
        pool = pools[_below(len(pools), generator)]
        low, high = self.epsilon
        epsilon = low * math.exp(share * math.log(high / low))
        ball = ThreatModel(norm=self.norm, epsilon=epsilon, lower=self.box[0], upper=self.box[1])
        examples = self.examples[0] + _below(self.examples[1] - self.examples[0] + 1, generator)
        tasks = LowDataTasks(dataset=pool, examples=examples)
        return ClassificationTask(
            build=self.architectures[architecture],
            dataset=pool,
            subsets=torch.stack([tasks.sample_indices(generator) for _ in range(self.copies)]),
            threat_model=None if self.gradient_source == "gradient" else ball,
            gradient_source=self.gradient_source,
            meta_attack=None if self.attack is None else self.attack(ball),
            meta_objective=None if self.meta_objective is None else self.meta_objective(ball),
            batch_size=self.batch_size,
        )


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))

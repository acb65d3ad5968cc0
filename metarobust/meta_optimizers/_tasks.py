"""The task a meta-optimizer is trained on: classify a small subset, and be judged on fresh, possibly attacked examples."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from metarobust._checks import choice, integer, message, require
from metarobust._tensors import seeded
from metarobust.data import LabelledImages
from metarobust.data._labelled_images import check_dataset
from metarobust.meta_optimizers._factor_gradients import GRADIENT_SOURCES, record_factors
from metarobust.models import stack
from metarobust.threat_models import ThreatModel
from metarobust.types import Attack, Batch, Model, RobustLoss, Streams


class ClassificationTask:
    """Copies of one architecture, each trained on its own subset and judged on examples outside of it.

    Args:
        build: makes one freshly initialised model; it runs in evaluation mode (no dropout).
        dataset: the pool that subsets and judging examples come from.
        subsets: indices of each copy's training examples, ``[optimizees, examples]``.
        threat_model: perturbation of the second stream's factors, see ``factor_gradients``.
        meta_attack: moves the judging examples; None judges on clean ones.
        meta_objective: in place of the cross-entropy on examples that ``meta_attack`` moved, any robust objective of
            :mod:`metarobust.objectives` as the meta-loss; accuracies are still judged under ``meta_attack``. ARMOR, which weighs
            examples against each other, weighs those of all copies together, and its one number counts for each copy.
        gradient_source: that of the meta-optimizer, see ``record_factors``; ``"gradient"`` leaves the second stream out
            (zeros, at no cost), and so does a ``threat_model`` of None.
        training_attack: moves the training examples too: adversarial training, or the paper's own regime.
        batch_size: training examples per step and copy, drawn without replacement; at most the subset's size.
        meta_batch_size: judging examples per evaluation and copy.

    Raises:
        ValueError: ``subsets`` is not a matrix, or leaves no example to judge on.
    """

    def __init__(
        self,
        *,
        build: Callable[[], nn.Module],
        dataset: LabelledImages,
        subsets: Tensor,
        threat_model: ThreatModel | None,
        gradient_source: str = "gradient+perturbed_factors",
        meta_attack: Attack | None = None,
        meta_objective: RobustLoss | None = None,
        training_attack: Attack | None = None,
        batch_size: int = 64,
        meta_batch_size: int = 64,
    ) -> None:
        if threat_model is not None and not isinstance(threat_model, ThreatModel):
            raise TypeError(message("threat_model", "a ThreatModel or None", repr(threat_model)))
        check_dataset(dataset)
        if isinstance(build, nn.Module) or not callable(build):
            remedy = "write lambda: mlp([64, 32, 10])"
            raise TypeError(message("build", "a function that makes a fresh model", type(build).__name__, remedy))
        if not isinstance(subsets, Tensor) or subsets.dtype != torch.int64:
            raise TypeError(message("subsets", "an int64 tensor of shape [optimizees, examples]", type(subsets).__name__))
        require(subsets.dim() == 2, "subsets", "of shape [optimizees, examples]", list(subsets.shape))
        integer("batch_size", batch_size, least=1)
        integer("meta_batch_size", meta_batch_size, least=1)
        self.optimizees, self.examples = subsets.shape
        require(subsets.numel() > 0, "subsets", "of at least one copy and one example", list(subsets.shape))
        remaining = len(dataset) - self.examples
        require(
            bool((subsets >= 0).all()) and bool((subsets < len(dataset)).all()),
            "subsets",
            f"indices in [0, {len(dataset)}), rows of the data set",
            f"indices from {int(subsets.min())} to {int(subsets.max())}",
        )
        distinct = all(len(row.unique()) == len(row) for row in subsets)
        require(distinct, "subsets", "such that a copy's examples are distinct", "repeated indices")
        require(remaining > 0, "subsets", f"smaller than the data set (={len(dataset)} examples)", self.examples)
        choice("gradient_source", gradient_source, GRADIENT_SOURCES)
        self.build, self.dataset, self.subsets, self.threat_model = build, dataset, subsets, threat_model
        self.gradient_source = "gradient" if threat_model is None else gradient_source
        self.meta_attack, self.meta_objective, self.training_attack = meta_attack, meta_objective, training_attack
        self.batch_size = min(batch_size, self.examples)
        self.meta_batch_size = min(meta_batch_size, remaining)
        inside = torch.zeros(self.optimizees, len(dataset), dtype=torch.bool).scatter_(1, subsets, True)
        self.held_out = (~inside).nonzero()[:, 1].reshape(self.optimizees, remaining)
        with seeded(torch.Generator().manual_seed(0)):
            self._template = stack([build()] * self.optimizees).eval()
        self._names = [name for name, _ in self._template.named_parameters()]

    def model(self, parameters: tuple[Tensor, ...]) -> Model:
        """The stacked model at ``parameters``, ``[optimizees, ...]`` each: a callable on ``[optimizees * batch, ...]``."""
        named = dict(zip(self._names, parameters, strict=True))
        return lambda x: functional_call(self._template, named, (x,))

    def initial_parameters(self, *, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Parameters of fresh models, each tensor with a leading axis of length ``optimizees``."""
        with seeded(generator):
            fresh = stack([self.build() for _ in range(self.optimizees)])
        return tuple(p.detach() for p in fresh.parameters())

    @torch.enable_grad()
    def streams(
        self, parameters: tuple[Tensor, ...], *, generator: torch.Generator, create_graph: bool = False
    ) -> tuple[Tensor, Streams]:
        """Training losses ``[optimizees]`` on one minibatch and both gradient streams, from one forward-backward pass."""
        x, y = self._draw(self.subsets, self.batch_size, generator)
        if not create_graph:
            parameters = tuple(p.detach().requires_grad_() for p in parameters)
        model = self.model(parameters)
        if self.training_attack is not None:
            x = self.training_attack(model, x, y, generator=generator)
        if self.gradient_source == "gradient" or self.threat_model is None:
            losses = self._losses(model, x, y)
            found = torch.autograd.grad(losses.sum(), parameters, create_graph=create_graph, allow_unused=True)
            gradients = tuple(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
            return losses.detach(), Streams(gradients, tuple(torch.zeros_like(g) for g in gradients))
        watched = record_factors(
            self._template, threat_model=self.threat_model, gradient_source=self.gradient_source, generator=generator
        )
        with watched as recorder:
            losses = self._losses(model, x, y)
            found = recorder.gradients(losses.sum(), parameters, create_graph=create_graph)
        return losses.detach(), Streams(found.gradients, found.second_gradients)

    def meta_loss(self, parameters: tuple[Tensor, ...], *, generator: torch.Generator) -> Tensor:
        """Loss ``[optimizees]`` on fresh examples: ``meta_objective``, or cross-entropy after ``meta_attack``."""
        if self.meta_objective is not None:
            x, y = self._draw(self.held_out, self.meta_batch_size, generator)
            values = self.meta_objective(self.model(parameters), x, y, generator=generator)
            if isinstance(values, Tensor):
                return self._by_copy(values)
            return cast("Any", values).loss.expand(self.optimizees)  # ARMOR: one number for the joint batch
        x, y = self._judging_batch(parameters, self.meta_batch_size, generator)
        return self._losses(self.model(parameters), x, y)

    def meta_accuracy(self, parameters: tuple[Tensor, ...], *, generator: torch.Generator) -> Tensor:
        """Accuracy ``[optimizees]`` at ``parameters`` on all judging examples, under ``meta_attack`` (noise: ``generator``)."""
        x, y = self._judging_batch(parameters, self.held_out.shape[1], generator)
        return self._accuracy(parameters, x, y)

    def clean_accuracy(self, parameters: tuple[Tensor, ...]) -> Tensor:
        """Accuracy ``[optimizees]`` at ``parameters`` on all judging examples as they are."""
        return self._accuracy(parameters, *self._rows(self.held_out))

    @torch.no_grad()
    def _accuracy(self, parameters: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        return self._by_copy((self.model(parameters)(x).argmax(1) == y).float())

    def _judging_batch(self, parameters: tuple[Tensor, ...], size: int, generator: torch.Generator) -> Batch:
        x, y = self._draw(self.held_out, size, generator)
        if self.meta_attack is not None:
            frozen = tuple(p.detach() for p in parameters)
            x = self.meta_attack(self.model(frozen), x, y, generator=generator)
        return Batch(x, y)

    def _losses(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        return self._by_copy(F.cross_entropy(model(x), y, reduction="none"))

    def _by_copy(self, values: Tensor) -> Tensor:
        """The mean of each copy's rows."""
        return rearrange(values, "(copies batch) -> copies batch", copies=self.optimizees).mean(1)

    def _draw(self, candidates: Tensor, size: int, generator: torch.Generator) -> Batch:
        order = torch.rand(candidates.shape, generator=generator).topk(size, dim=1).indices
        return self._rows(candidates.gather(1, order))

    def _rows(self, chosen: Tensor) -> Batch:
        rows = chosen.flatten()
        return Batch(self.dataset.images[rows], self.dataset.labels[rows])

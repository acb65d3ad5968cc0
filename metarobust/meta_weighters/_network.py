"""The network that turns characteristics into weights."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarobust._checks import choice, finite, integer, message, require, sequence
from metarobust._tensors import seeded
from metarobust.meta_weighters._characteristics import CHARACTERISTICS
from metarobust.meta_weighters._joint import joint_mean

BRANCHES = ("natural", "adversary", "anti_adversary")
"""Where an example can be charged: where it is, moved against the model, or moved in its favour."""
LARGEST = 10.0
"""Standard deviations beyond which a characteristic is cut off: one broken example must not saturate the network."""


class Weighting(NamedTuple):
    """What a `WeightingNetwork` says about a batch.

    Attributes:
        weights: ``[batch, branches]``, at least 0, in the order of the network's branches.
        bound: factor of each example's epsilon ``[batch]``; None from a network without this output.
    """

    weights: Tensor
    bound: Tensor | None


class WeightingNetwork(nn.Module):
    r"""Characteristics of an example to the weights of its branches (Zhou et al., 2023, arXiv 2304.12550; Shu et al., 2019).

    Standardisation, a hidden layer of ReLU, then :math:`softmax(z / T)` over the branches, which sums to 1, or a sigmoid of
    :math:`z / T` if there is one branch only, as in Meta-Weight-Net. The standardisation is frozen: it uses running averages that
    `observe` alone moves, so the weight of an example does not depend on its batch, as it does in the published code
    (BatchNorm in training mode). A characteristic that does not vary counts as 0.

    The published temperature is 0.001: nearly every example then gets one branch whole, and only those within about 0.02 of a tie
    pass a gradient on. Start warm, and anneal (`CAAT` does, by its ``temperature``).

    Args:
        branches: a part of ``("natural", "adversary", "anti_adversary")``, in this order.
        inputs: number of characteristics.
        hidden: width of the hidden layers, one or several.
        temperature: T > 0; can be set later, ``network.temperature = 0.1``.
        favoured: initial weight of the branch ``"adversary"`` (of one branch: its weight), in (0, 1), for an average example and
            nearly for all; the others share the rest equally. At the default, a new network that is routed hard leaves every
            example to the adversary.
        bound_range: ``(lowest, highest)`` factors of epsilon for one more output per example, the bound multiplier, by a
            sigmoid between these two, at first 1 for an average example, which they must enclose; None for none.
        memory: examples over which the standardisation averages.
        generator: CPU generator of the initial weights.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> network = WeightingNetwork(generator=torch.Generator().manual_seed(0))
        >>> network.observe(torch.rand(32, 6))
        >>> weights = network(torch.rand(4, 6)).weights
        >>> weights.shape, torch.allclose(weights.sum(1), torch.ones(4))
        (torch.Size([4, 2]), True)
    """

    mean: Tensor
    square: Tensor
    seen: Tensor

    def __init__(
        self,
        *,
        branches: Sequence[str] = ("adversary", "anti_adversary"),
        inputs: int = len(CHARACTERISTICS),
        hidden: int | Sequence[int] = 100,
        temperature: float = 1.0,
        favoured: float = 0.75,
        bound_range: tuple[float, float] | None = None,
        memory: int = 10_000,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sequence("branches", branches, "('adversary', 'anti_adversary')")
        for branch in branches:
            choice("branches", branch, BRANCHES)
        self.branches = tuple(branch for branch in BRANCHES if branch in branches)
        require(self.branches == tuple(branches), "branches", f"a part of {BRANCHES} in this order", tuple(branches))
        require("adversary" in branches, "branches", "such that 'adversary' is among them", tuple(branches))
        integer("inputs", inputs, least=1)
        integer("memory", memory, least=1)
        widths = [hidden] if isinstance(hidden, int) else list(hidden)
        for width in widths:
            integer("hidden", width, least=1)
        finite("favoured", favoured, above=0.0)
        require(favoured < 1, "favoured", "< 1", favoured)
        self.temperature, self.memory = temperature, memory
        if bound_range is not None:
            low, high = bound_range
            valid = 0 < low < 1 < high
            require(valid, "bound_range", "two factors with 0 < lowest < 1 < highest", bound_range, "write (0.5, 2.0)")
        self.bound_range = bound_range
        outputs = len(self.branches) + (bound_range is not None)
        layers: list[nn.Module] = []
        with nullcontext() if generator is None else seeded(generator):
            for number, (width_in, width_out) in enumerate(pairwise([inputs, *widths, outputs])):
                layers += [nn.ReLU()] if number else []
                layers.append(nn.Linear(width_in, width_out))
        self.layers = nn.Sequential(*layers)
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(0.1)  # at first about one weight for all
            last.weight[: len(self.branches)] *= temperature  # at any temperature
            wanted = torch.zeros_like(last.bias)
            others = max(1, len(self.branches) - 1)
            wanted[self.branches.index("adversary")] = temperature * _logit(favoured, (1 - favoured) / others)
            if bound_range is not None:
                wanted[-1] = _logit(1 - bound_range[0], bound_range[1] - 1)
            last.bias.zero_()
            last.bias.copy_(wanted - self.layers(torch.zeros(1, inputs))[0])  # an average example gets exactly what is wanted
        self.register_buffer("mean", torch.zeros(inputs, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(inputs, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    @property
    def temperature(self) -> float:
        """T, > 0: towards 0 every example gets one branch whole."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        finite("temperature", value, above=0.0)
        self._temperature = float(value)

    @torch.no_grad()
    def observe(self, characteristics: Tensor) -> None:
        """Take ``characteristics [batch, inputs]``, of all processes together, into the averages that standardise."""
        values = self._checked(characteristics).to(self.mean.dtype)
        (mean, size), (square, _) = joint_mean(values), joint_mean(values.square())
        if size == 0:
            return
        self.seen.copy_((self.seen + size).clamp(max=float(max(self.memory, size))))
        self.mean.lerp_(mean, size / self.seen)
        self.square.lerp_(square, size / self.seen)

    def standardised(self, characteristics: Tensor) -> Tensor:
        """``characteristics [batch, inputs]`` less their averages, in standard deviations; 0 where there is no variation."""
        values = self._checked(characteristics)
        deviation = (self.square - self.mean.square()).clamp(min=0).sqrt()
        varies = deviation > 1e-6 * self.square.sqrt()
        scale = torch.where(varies, 1 / deviation.clamp(min=1e-300), 0)
        found = (values - self.mean.to(values.dtype)) * scale.to(values.dtype)
        return found.clamp(-LARGEST, LARGEST).to(next(self.layers.parameters()).dtype)

    def forward(self, characteristics: Tensor) -> Weighting:
        """The weights of each example; ``characteristics [batch, inputs]`` get no gradient."""
        outputs = self.layers(self.standardised(characteristics).detach())
        scores = outputs[:, : len(self.branches)] / self.temperature
        weights = scores.sigmoid() if len(self.branches) == 1 else scores.softmax(1)
        if self.bound_range is None:
            return Weighting(weights, None)
        low, high = self.bound_range
        return Weighting(weights, low + (high - low) * outputs[:, -1].sigmoid())

    def extra_repr(self) -> str:
        return f"branches={self.branches}, temperature={self.temperature:g}, bound_range={self.bound_range}, memory={self.memory}"

    def _checked(self, characteristics: Tensor) -> Tensor:
        inputs = len(self.mean)
        if not isinstance(characteristics, Tensor) or characteristics.dim() != 2 or characteristics.shape[1] != inputs:
            got = list(characteristics.shape) if isinstance(characteristics, Tensor) else repr(characteristics)
            remedy = "write training_characteristics(logits, y, statistics)"
            raise ValueError(message("characteristics", f"a tensor [batch, {inputs}]", got, remedy))
        return characteristics


def check_network(network: object) -> None:
    """Check that ``network`` is a `WeightingNetwork`."""
    if not isinstance(network, WeightingNetwork):
        raise TypeError(message("network", "a WeightingNetwork", type(network).__name__, "write WeightingNetwork(inputs=6)"))


def _logit(for_it: float, against: float) -> float:
    """The logarithm of odds."""
    return math.log(for_it / against)

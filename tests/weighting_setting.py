"""Small models, data and watchers that the tests of the meta-weighters share."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarobust.threat_models import NORMS, ThreatModel

every_norm = pytest.mark.parametrize("norm", NORMS)
EPSILON = {"linf": 0.1, "l2": 0.3, "l1": 0.6}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def classifier(*, normalised: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Six inputs, four classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(8)] if normalised else []
        return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def batch(size: int = 9, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return rand(size, 6, seed=seed).to(dtype) * 0.8 + 0.1, torch.arange(size) % 4


def threat(norm: str = "linf") -> ThreatModel:
    return ThreatModel(norm=norm, epsilon=EPSILON[norm])


def copied_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(module: nn.Module, state: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], value) for name, value in state.items())


class Watched(nn.Module):
    """A model that keeps what it is called with."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.inputs, self.modes = inner, [], []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach().clone())
        self.modes.append(self.training)
        return self.inner(x)

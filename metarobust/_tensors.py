"""Per-example arithmetic, tree arithmetic, and randomness that is the same on every device."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torchopt import pytree

from metarobust._checks import generator as check_generator


def per_example(values: Tensor, x: Tensor) -> Tensor:
    """Reshape ``values [batch]`` so that it broadcasts against ``x [batch, ...]``."""
    return values.reshape(values.shape + (1,) * (x.dim() - values.dim()))


def flat(x: Tensor) -> Tensor:
    """``[batch, ...] -> [batch, dimensions]``, also for an empty batch."""
    return x.reshape(x.shape[0], x[0].numel() if x.shape[0] else max(1, x.shape[1:].numel()))


def norms(x: Tensor, norm: str) -> Tensor:
    """Norm of each example, shape ``[batch]``; ``norm`` is ``"linf"``, ``"l2"`` or ``"l1"``."""
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
    return torch.linalg.vector_norm(flat(x), ord=order, dim=1)


def uniform(shape: torch.Size | tuple[int, ...], *, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform noise in [0, 1), drawn on the CPU in float32 and moved: one seed, one noise, on every device."""
    check_generator("generator", generator)
    return torch.rand(shape, generator=generator).to(device=like.device, dtype=like.dtype)


def normal(shape: torch.Size | tuple[int, ...], *, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise, drawn on the CPU in float32 and moved."""
    check_generator("generator", generator)
    return torch.randn(shape, generator=generator).to(device=like.device, dtype=like.dtype)


def digest(*tensors: Tensor) -> str:
    """The first 16 hexadecimal digits of SHA-256 over the numbers of the tensors; the same on every device."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(as_bytes(tensor))
    return found.hexdigest()[:16]


def as_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory, in the order of its elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tree_detach(tree: Any) -> Any:
    """The same tree with every tensor cut from the graph; non-tensor leaves pass through."""
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, cast("Any", tree))


def tree_finite(tree: Any) -> bool:
    """Whether every tensor leaf of the tree is finite."""
    leaves = [leaf for leaf in pytree.tree_leaves(cast("Any", tree)) if isinstance(leaf, Tensor)]
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Run code that draws from torch's global CPU generator (layer initialisation) as if it drew from ``generator``.

    The global state is put back at the end.
    """
    check_generator("generator", generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

"""Lend the global random generators to code that uses no others, and give them back unchanged."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def global_randomness_from(generator: torch.Generator) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU) from `generator`, and give them back as they were."""
    seed = int(torch.randint(2**32, (), generator=generator))
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is meant
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed every GPU, whose states are not saved here.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002

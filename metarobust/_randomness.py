"""Generators that are a function of a seed and a place, so that no run depends on where another one stopped."""

import hashlib

import torch

LARGEST_SEED = 2**64 - 1
"""Of ``torch.Generator.manual_seed``."""


def generator_for(seed: int, stage: str | int, batch: int) -> torch.Generator:
    """A generator for one batch of one stage: a function of these three alone, so that interruptions leave no trace in it."""
    return torch.Generator().manual_seed(_digest(f"{seed} {stage} {batch}"))


def torch_seed(number: int) -> int:
    """What to seed torch with for any integer >= 0: the number itself where torch takes it, otherwise a digest of it.

    Example:
        >>> torch_seed(7), torch_seed(10**30) <= LARGEST_SEED
        (7, True)
    """
    return number if number <= LARGEST_SEED else _digest(f"{number}")


def _digest(text: str) -> int:
    """63 bits that stand for the text."""
    digest = hashlib.sha256(f"metarobust evaluation {text}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

"""Generators that are a function of a seed and a place, so that no run depends on where another one stopped."""

import hashlib

import torch


def generator_for(seed: int, stage: str | int, batch: int) -> torch.Generator:
    """A generator for one batch of one stage: a function of these three alone, so that interruptions leave no trace in it."""
    digest = hashlib.sha256(f"metarobust evaluation {seed} {stage} {batch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

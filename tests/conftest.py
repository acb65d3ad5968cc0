"""Fixtures that several files share."""

import os
from typing import Any

import pytest
import torch

from metarobust.meta_optimizers import _adversarial_tangent as tangent

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # with `-n`: the processes share the cores, and so do those that tests start
    THREADS = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    torch.set_num_threads(THREADS)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tangent.Tangents]:
    """The tangents that the recorder takes."""
    taken: list[tangent.Tangents] = []
    original = tangent.SecondForward.tangents

    def watch(self: tangent.SecondForward, *args: Any) -> tangent.Tangents:
        taken.append(original(self, *args))
        return taken[-1]

    monkeypatch.setattr(tangent.SecondForward, "tangents", watch)
    return taken

"""Fixtures that several files share."""

from typing import Any

import pytest

from metarobust.meta_optimizers import _adversarial_tangent as tangent


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

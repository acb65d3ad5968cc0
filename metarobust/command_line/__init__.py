"""The ``metarobust`` command: one file per verb."""

from metarobust.command_line._main import main

__all__ = ["main"]

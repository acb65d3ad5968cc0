"""Sentences beside the results, which alone go to standard output."""

import sys


def say(sentence: str) -> None:
    """A note on standard error."""
    print(f"metarobust: {sentence}", file=sys.stderr)

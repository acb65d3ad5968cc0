"""Parse the command line, run the verb, turn expected failures into one sentence and exit code 2."""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from metarobust import __version__
from metarobust.command_line._demo import Demo

Verbs = Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[None, tyro.conf.subcommand("version")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Meta-learning robust classifiers through higher-order gradients."""
    verb = tyro.extras.subcommand_cli_from_dict(
        {"demo": Demo, "version": _version},
        prog="metarobust",
        description=main.__doc__,
        args=None if arguments is None else list(arguments),
    )
    if not isinstance(verb, Demo):
        return
    try:
        verb.run()
    except (OSError, ValueError, TypeError, ImportError, FloatingPointError) as error:
        print(f"metarobust: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("metarobust: interrupted; nothing was written to --out after the last finished file", file=sys.stderr)
        sys.exit(130)


def _version() -> None:
    """Print the version."""
    print(__version__)

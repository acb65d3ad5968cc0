"""Parse the command line, run the verb, turn expected failures into one sentence and exit code 2."""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

import tyro

from metarobust import __version__
from metarobust.command_line._bound import Bound
from metarobust.command_line._demo import Demo
from metarobust.command_line._evaluate import Evaluate


def main(arguments: Sequence[str] | None = None) -> None:
    """Meta-learning robust classifiers through higher-order gradients."""
    verb = _parse(arguments)
    if not isinstance(verb, (Demo, Evaluate, Bound)):
        return
    try:
        verb.run()
    except (OSError, ValueError, TypeError, ImportError, FloatingPointError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        kept = "interrupted; files that were complete stay, nothing was half-written"
        print("metarobust: " + (verb.interrupted() if isinstance(verb, Evaluate) else kept), file=sys.stderr)
        sys.exit(130)


def _parse(arguments: Sequence[str] | None) -> object:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                {"demo": Demo, "evaluate": Evaluate, "bound": Bound, "version": _version},
                prog="metarobust",
                description=main.__doc__,
                args=None if arguments is None else list(arguments),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        _fail(_first_sentence(said.getvalue()) + "; run metarobust --help, or metarobust VERB --help")


def _first_sentence(box: str) -> str:
    """The first paragraph of tyro's boxed message, on one line."""
    lines = [line.strip("│ \n") for line in box.splitlines() if line.startswith("│")]
    paragraph = []
    for line in lines:
        if line.startswith("──"):
            break
        paragraph.append(line)
    return " ".join(paragraph).rstrip(".") or box.strip()


def _fail(sentence: str) -> NoReturn:
    print("metarobust: " + " ".join(sentence.split()), file=sys.stderr)
    sys.exit(2)


def _version() -> None:
    """Print the version."""
    print(__version__)

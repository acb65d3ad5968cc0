"""Parse the command line, run the verb, turn expected failures into one sentence and exit code 2."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import tyro

from metarobust.command_line._bound import Bound
from metarobust.command_line._demo import Demo
from metarobust.command_line._evaluate import Evaluate
from metarobust.command_line._meta_train import MetaTrain
from metarobust.command_line._train import Train
from metarobust.command_line._transfer import Transfer
from metarobust.command_line._version import print_version

VERBS: dict[str, type] = {
    "demo": Demo, "train": Train, "evaluate": Evaluate, "bound": Bound, "meta-train": MetaTrain, "transfer": Transfer,
}  # fmt: skip
OUT_OF_MEMORY = "must be small enough for the memory that is free"
"""Of the sentences that say themselves what to lower."""
VALUES = (
    (
        r"Error parsing (?P<flag>--[a-z0-9-]+): (no type matching .*INT could|invalid literal for int)"
        r".*?'(?P<got>[^']*)'\]?(\.| Got|$)",
        "{flag} must be an integer, got '{got}'",
    ),
    (
        r"Error parsing (?P<flag>--[a-z0-9-]+): (no type matching .*FLOAT could|could not convert string to float)"
        r".*?'(?P<got>[^']*)'\]?(\.| Got|$)",
        "{flag} must be a number, got '{got}'",
    ),
    (
        r"invalid choice (?P<got>'[^']*') for argument '(?P<flag>--[a-z0-9-]+)'. Expected one of \((?P<known>[^)]*)\)",
        "{flag} must be one of {known}, got {got}",
    ),
)
"""What tyro says of a value that it cannot read, and what is said in place of it."""
RENAMED = {("train", "--optimizer"): "--update"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Meta-learning robust classifiers through higher-order gradients.

    Args:
        arguments: the words after ``metarobust``; by default those of the process.
    """
    try:
        try:
            _run(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has stopped, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _run(words: list[str]) -> None:
    if words[:1] == ["--version"]:
        return print_version()
    verb = _parse(words)
    if not isinstance(verb, (Demo, Train, Evaluate, Bound, MetaTrain, Transfer)):
        return None
    try:
        verb.run()
    except BrokenPipeError:
        raise
    except (OSError, ValueError, TypeError, ImportError, FloatingPointError) as error:
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
            raise
        said = str(error)
        unsaid = f"{words[0]} must fit into the memory that is free, it does not ({said}); pass smaller numbers"
        _fail(said if OUT_OF_MEMORY in said else unsaid)
    except KeyboardInterrupt:
        kept = "interrupted; files that were complete stay, nothing was half-written"
        _end(verb.interrupted() if isinstance(verb, (Bound, Train, Evaluate, MetaTrain)) else kept, 130)


def _parse(words: list[str]) -> object:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                VERBS | {"version": print_version},
                prog="metarobust",
                description=str(main.__doc__).splitlines()[0],
                args=words,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        verb = words[0] if words and words[0] in VERBS else ""
        sentence = _sentence(said.getvalue(), verb)
        if words and words[0] not in (*VERBS, "version"):
            sentence = f"the first word must be one of {', '.join(VERBS)}, version, got {words[0]!r}"
        _fail(f"{sentence}; run metarobust {verb + ' ' if verb else ''}--help")


def _sentence(box: str, verb: str) -> str:
    """What tyro's boxed message says, on one line: its first paragraph, or the flags that lack and those that nobody knows."""
    framed = "│" in box
    paragraphs: list[list[str]] = [[]]
    for line in (line[1:].rstrip("│ ") for line in box.splitlines() if not framed or line.startswith("│")):
        if line and set(line.strip()) in ({"─"}, {"-"}):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    if not framed:  # where the terminal is not UTF-8, tyro draws no frame, and the title is a paragraph
        paragraphs = paragraphs[1:] or paragraphs
    first = " ".join(line.strip() for line in paragraphs[0]).rstrip(".")
    if not verb:
        return first or box.strip()
    for pattern, expected in VALUES:
        if found := re.match(pattern, first):
            return expected.format(**found.groupdict())
    told = [" ".join(part) for part in paragraphs if part and part[0].strip().startswith("Unrecognized")]
    unknown = [word.strip(",") for part in told for word in part.partition("options:")[2].split() if word.startswith("-")]
    missing = []
    if first.startswith("Missing from "):  # a flag stands four columns in, its help text deeper
        missing = [found[1] for line in paragraphs[0] if (found := re.match(r" {5}(--[a-z0-9-]+)", line))]
    if told and not (unknown or missing):  # words that follow no flag, such as the second of 0.8 0.9
        loose = told[0].partition("options:")[2].strip().rstrip(".")
        return f"{verb} has no place for {loose}; write the values of one flag in one word, with commas: 0.8,0.9"
    if not (unknown or missing):
        return first or box.strip()
    parts = [f"does not know {', '.join(word + _meant(word, verb) for word in unknown)}"] if unknown else []
    parts += [f"needs {', '.join(missing)}"] if missing else []
    return f"{verb} {' and '.join(parts)}"


def _meant(word: str, verb: str) -> str:
    word = word.partition("=")[0]
    if (verb, word) in RENAMED:
        return f" (it is {RENAMED[verb, word]} now)"
    flags = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(VERBS[verb])]
    close = [flag for flag in flags if flag.startswith(word)] or difflib.get_close_matches(word, flags, 1, cutoff=0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def _fail(sentence: str) -> NoReturn:
    _end(" ".join(sentence.split()), 2)


def _end(sentence: str, code: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one speaks
        print("metarobust: " + sentence, file=sys.stderr)
    sys.exit(code)

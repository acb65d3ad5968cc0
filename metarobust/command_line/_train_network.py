"""The network that ``metarobust train`` trains: one of the package's by name, or what a function of the user's returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from metarobust.command_line._evaluate_run import build_model
from metarobust.data import LabelledImages
from metarobust.models import cnn, mlp

WIDTHS = {"mlp": [128], "cnn": [32, 64]}
KINDS = "mlp or cnn, perhaps with widths (mlp:256,256 or cnn:32,64), or FILE.py:FUNCTION"


@dataclass(frozen=True, kw_only=True)
class Network:
    """An architecture with a name, and how Python writes it if it is one of this package.

    Attributes:
        name: as ``--model`` takes it.
        build: makes the module, with initial parameters from torch's global generator.
        source: a file with a function ``build`` that makes the same, in evaluation mode; None for a user's own file.
    """

    name: str
    build: Callable[[], nn.Module]
    source: str | None


def chosen_network(text: str | None, data: LabelledImages) -> Network:
    """The network that ``--model`` names, with inputs and logits for the data; without it, one that suits the images."""
    channels, height, width = data.images.shape[1:]
    if text is None:
        text = "mlp" if height != width or height <= 8 else "cnn"
    kind, colon, rest = text.partition(":")
    if kind not in WIDTHS:
        if not colon:
            raise ValueError(f"--model must be {KINDS}, got {text!r}")
        return Network(name=text, build=lambda: build_model(text), source=None)
    widths = _widths(text, rest) if colon else WIDTHS[kind]
    name = f"{kind}:{','.join(map(str, widths))}"
    if kind == "mlp":
        sizes = [channels * height * width, *widths, data.num_classes]
        return Network(name=name, build=lambda: mlp(sizes), source=_source(name, "mlp", [repr(sizes)]))
    if height != width:
        raise ValueError(f"--model cnn takes square images, got {height} x {width} pixels; write --model mlp or FILE.py:FUNCTION")
    shapes: dict[str, Any] = {"image_size": height, "image_channels": channels, "classes": data.num_classes}
    arguments = [repr(widths), *(f"{name}={value}" for name, value in shapes.items())]
    return Network(name=name, build=lambda: cnn(widths, **shapes), source=_source(name, "cnn", arguments))


def _widths(text: str, rest: str) -> list[int]:
    parts = [part.strip() for part in rest.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"--model must be {KINDS}, got {text!r}")
    return [int(part) for part in parts]


def _source(name: str, function: str, arguments: list[str]) -> str:
    return (
        f'"""The network {name}, written by metarobust train; the weights stand beside this file."""\n\n'
        f"from metarobust.models import {function}\n\n\n"
        f"def build():\n    return {function}({', '.join(arguments)}).eval()\n"
    )

"""The network that ``metarobust train`` trains: one of the package's by name, or what a function of the user's returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from metarobust.command_line._evaluate_run import build_model, model_file
from metarobust.data import LabelledImages
from metarobust.models import cnn, mlp, residual_network

WIDTHS = {"mlp": [128], "cnn": [32, 64], "residual": [16, 32, 64]}
KINDS = "mlp or cnn, or residual, each perhaps with widths (mlp:256,256, cnn:32,64, residual:8,16,32), or FILE.py:FUNCTION"
GROUPS = 4
"""Of the normalisations of a residual network, whose widths are multiples of it."""


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


def check_network(text: str | None, *, flag: str = "--model") -> None:
    """Refuse what no data could make a network, before any are read."""
    if text is None or text.partition(":")[0] in WIDTHS:
        return
    if ":" not in text:
        raise ValueError(f"{flag} must be {KINDS}, got {text!r}")
    model_file(text)


def chosen_network(text: str | None, data: LabelledImages, *, flag: str = "--model") -> Network:
    """The network that ``flag`` names, with inputs and logits for the data; without a name, one that suits the images."""
    channels, height, width = data.images.shape[1:]
    if text is None:
        text = "mlp" if height != width or height <= 8 else "cnn"
    check_network(text, flag=flag)
    kind, colon, rest = text.partition(":")
    if kind not in WIDTHS:
        return Network(name=text, build=lambda: build_model(text), source=None)
    widths = _widths(text, rest, flag) if colon else WIDTHS[kind]
    name = f"{kind}:{','.join(map(str, widths))}"
    if kind == "mlp":
        sizes = [channels * height * width, *widths, data.num_classes]
        return Network(name=name, build=lambda: mlp(sizes), source=_source(name, "mlp", [repr(sizes)]))
    shapes: dict[str, Any] = {"image_channels": channels, "classes": data.num_classes}
    build, function = residual_network, "residual_network"
    if kind == "cnn":
        if height != width:
            remedy = f"write {flag} mlp, residual or FILE.py:FUNCTION"
            raise ValueError(f"{flag} cnn takes square images, got {height} x {width} pixels; {remedy}")
        shapes = {"image_size": height} | shapes
        build, function = cnn, "cnn"
    elif any(size % GROUPS for size in widths):
        raise ValueError(f"{flag} residual takes widths that are multiples of {GROUPS}, got {text!r}; write residual:8,16,32")
    arguments = [repr(widths), *(f"{key}={value}" for key, value in shapes.items())]
    return Network(name=name, build=lambda: build(widths, **shapes), source=_source(name, function, arguments))


def _widths(text: str, rest: str, flag: str) -> list[int]:
    parts = [part.strip() for part in rest.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"{flag} must be {KINDS}, got {text!r}")
    return [int(part) for part in parts]


def _source(name: str, function: str, arguments: list[str]) -> str:
    return (
        f'"""The network {name}, written by metarobust; the weights stand beside this file."""\n\n'
        f"from metarobust.models import {function}\n\n\n"
        f"def build():\n    return {function}({', '.join(arguments)}).eval()\n"
    )

"""Argument checks with one message form: what was expected, what came, what to write instead."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MODEL = "a callable from inputs [batch, ...] to logits [batch, classes]"


def message(name: str, expected: str, got: Any, remedy: str = "") -> str:
    """One sentence for a bad argument: ``<name> must be <expected>, got <got>; <remedy>``."""
    return f"{name} must be {expected}, got {got}" + (f"; {remedy}" if remedy else "")


def require(condition: bool, name: str, expected: str, got: Any, remedy: str = "") -> None:
    """Raise ``ValueError`` in the message form unless ``condition`` holds."""
    if not condition:
        raise ValueError(message(name, expected, got, remedy))


def integer(name: str, value: Any, *, least: int) -> None:
    """Check that ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message(name, f"an integer >= {least}", repr(value)))
    require(value >= least, name, f"an integer >= {least}", value)


def finite(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> None:
    """Check that ``value`` is a finite real number, at least ``least`` and strictly greater than ``above``."""
    expected = "a finite number"
    if least is not None:
        expected += f" >= {least:g}"
    if above is not None:
        expected += f" > {above:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message(name, expected, repr(value)))
    inside = math.isfinite(value) and (least is None or value >= least) and (above is None or value > above)
    require(inside, name, expected, value)


def choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Check that ``value`` is one of the ``allowed`` names; the sentence knows other spellings, as ``"L_2"`` or ``"Linf"``."""
    meant = next((a for a in allowed if isinstance(value, str) and _letters(a) == _letters(value)), None)
    remedy = "" if meant is None else f"write {meant!r}"
    require(value in allowed, name, "one of " + ", ".join(repr(a) for a in allowed), repr(value), remedy)


def _letters(word: str) -> str:
    return "".join(letter for letter in word.lower() if letter.isalnum())


def kind(value: Any) -> str:
    """What a value is, for ``got``: the dtype of a tensor, otherwise its class."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def tensor_of(name: str, value: Any) -> str:
    """What to write to get a tensor out of something that is none.

    Example:
        >>> tensor_of("x", [0.5, 1.0])
        'write torch.tensor(x)'
    """
    # NumPy is recognised by its name: an argument check is no reason to import it.
    return f"write torch.{'from_numpy' if type(value).__module__ == 'numpy' else 'tensor'}({name})"


def model(value: Any) -> None:
    """Check that ``value`` can be called, as a model is."""
    if not callable(value):
        remedy = "build the network and load its weights into it" if isinstance(value, str) else "pass an nn.Module or a function"
        raise TypeError(message("model", MODEL, repr(value), remedy))


def logits(value: Any, *, examples: int) -> Tensor:
    """What a model returned, if it is one row of logits per example.

    Raises:
        ValueError: it is no tensor ``[examples, classes]``.
    """
    if isinstance(value, Tensor) and value.dim() == 2 and len(value) == examples:
        return value
    got = f"an output of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    remedy = "wrap it: lambda x: model(x)[0]" if isinstance(value, (tuple, list)) else ""
    raise ValueError(message("model", MODEL, f"{got} for {examples} inputs", remedy))


def images(x: Tensor, *, lower: float, upper: float, tolerance: float = 1e-6) -> None:
    """Check that ``x`` is a floating, finite tensor inside the box ``[lower, upper]``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: a value is NaN or infinite, or lies outside the box.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        remedy = "for 8-bit images write x.float() / 255" if isinstance(x, Tensor) else tensor_of("x", x)
        raise TypeError(message("x", "a floating-point tensor", kind(x), remedy))
    if x.numel() == 0:
        return
    low, high = (v.item() for v in torch.aminmax(x.detach()))
    require(
        math.isfinite(low) and math.isfinite(high),
        "x",
        "finite",
        "NaN or infinite values",
        "find them with x.isfinite().logical_not().nonzero()",
    )
    if low < lower - tolerance or high > upper + tolerance:
        if low >= 0 and high > 2 and upper == 1:
            remedy = "8-bit images belong in [0, 1]: write x / 255"
        else:
            remedy = "put normalisation inside the model (metarobust.models.Normalize) and pass x in input units"
        raise ValueError(message("x", f"in the box [{lower:g}, {upper:g}]", f"values in [{low:.4g}, {high:.4g}]", remedy))


def labels(y: Tensor, *, examples: int, classes: int | None = None) -> None:
    """Check that ``y`` holds one int64 label per example, inside ``[0, classes)`` when ``classes`` is given.

    Raises:
        TypeError: the labels are not int64.
        ValueError: wrong shape, or a label outside the classes.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        remedy = "write y.long()" if isinstance(y, Tensor) else tensor_of("y", y) + ".long()"
        raise TypeError(message("y", "class indices of dtype torch.int64", kind(y), remedy))
    require(y.shape == (examples,), "y", f"of shape [{examples}], one label per example", list(y.shape))
    if classes is not None and y.numel():
        low, high = (int(v) for v in torch.aminmax(y))
        require(
            low >= 0 and high < classes,
            "y",
            f"in [0, {classes}), the classes that the model has logits for",
            f"labels from {low} to {high}",
            "check the label encoding or the model's last layer",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    words = ("out of memory", "not enough memory", "can't allocate memory")  # of CUDA and of the allocators of CPUs
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


@contextmanager
def explained_memory(name: str, got: Any, remedy: str) -> Iterator[None]:
    """Where memory runs out inside, raise ``torch.OutOfMemoryError`` in the message form: ``name`` is what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or " must be " in str(error):
            raise
        raise torch.OutOfMemoryError(message(name, "small enough for the memory that is free", got, remedy)) from error

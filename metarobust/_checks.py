"""Argument checks with one message form: what was expected, what came, what to write instead."""

import inspect
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

MODEL = "a callable from inputs [batch, ...] to logits [batch, classes]"
LONGEST = 600
"""Characters of what came, in a sentence; the start of a large object tells it as well as all of it."""


def message(name: str, expected: str, got: Any, remedy: str = "") -> str:
    """One sentence on one line for a bad argument: ``<name> must be <expected>, got <got>; <remedy>``."""
    if "\n" in str(got) or len(str(got)) > LONGEST:
        got = shorten(str(got), 120 if "\n" in str(got) else LONGEST, placeholder=" ...")
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
    known = isinstance(value, str) and value in allowed
    require(known, name, "one of " + ", ".join(repr(a) for a in allowed), repr(value), remedy)


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


def generator(name: str, value: Any, *, needed: bool = False) -> None:
    """Check that ``value`` is a CPU generator, whose noise is the same on every device, or None unless one is ``needed``."""
    if value is None and not needed:
        return
    expected = "a torch.Generator on the CPU" + ("" if needed else " or None")
    remedy = "write torch.Generator().manual_seed(seed)"
    if not isinstance(value, torch.Generator):
        raise TypeError(message(name, expected, repr(value), remedy))
    remedy += ", which serves data on every device"
    require(value.device.type == "cpu", name, expected, f"one on {value.device}", remedy)


def takes(name: str, function: Callable[..., Any], arguments: str) -> None:
    """Check that a function can be called with the ``arguments``, names with commas between, as far as its signature tells."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        told = f"{getattr(function, '__name__', type(function).__name__)}{signature}"
        raise TypeError(message(name, f"a function of ({arguments})", told)) from error


def losses(value: Any, *, examples: int, name: str = "loss") -> Tensor:
    """What a loss function returned, if it is one loss per example.

    Raises:
        ValueError: it is no tensor ``[examples]``.
    """
    if isinstance(value, Tensor) and value.shape == (examples,):
        return value
    got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        message(name, f"a function that returns one loss per example, [{examples}]", got, "drop the mean: reduction='none'")
    )


def model(value: Any, x: Any = None) -> None:
    """Check that ``value`` can be called, as a model is, and that some of its parameters are where ``x`` is."""
    if not callable(value):
        weights = isinstance(value, (str, dict))
        remedy = "build the network and load its weights into it" if weights else "pass an nn.Module or a function"
        raise TypeError(message("model", MODEL, "a dict" if isinstance(value, dict) else repr(value), remedy))
    if isinstance(value, type):
        raise TypeError(message("model", MODEL, f"the class {value.__name__}", f"build it: {value.__name__}(...)"))
    if isinstance(value, nn.Module) and (first := next(value.parameters(), None)) is not None:
        remedy = "load its weights: model.load_state_dict(weights, assign=True)"
        require(not first.is_meta, "model", "one with weights", "parameters on the meta device, which have no values", remedy)
        together = not isinstance(x, Tensor) or any(p.device == x.device for p in value.parameters())
        if not together:
            remedy = f"write model.to({str(x.device)!r}), or x.to({str(first.device)!r}) and y.to({str(first.device)!r})"
            raise ValueError(message("model", f"on the device of x, {x.device}", first.device, remedy))


def called(model: Callable[[Tensor], Any], x: Tensor) -> Any:
    """``model(x)`` for the first time: a failure becomes a sentence that tells what the model was given.

    Raises:
        ValueError: the model does not take such inputs; its own error is the cause.
    """
    try:
        return model(x)
    except RuntimeError as error:
        if is_out_of_memory(error) or "CUDA error" in str(error):
            raise
        first = next(model.parameters(), x) if isinstance(model, nn.Module) else x
        remedy = f"write x.to({first.dtype}), or model.to({x.dtype})" if first.dtype != x.dtype else "check the shape of x"
        got = f"one that fails on {x.dtype} {list(x.shape)} ({' '.join(str(error).split())})"
        raise ValueError(message("model", MODEL, got, remedy)) from error


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
        ValueError: a value is NaN or infinite, or lies outside the box; a scalar, or a tensor without values.
    """
    floating("x", x)
    require(x.dim() >= 1, "x", "of shape [batch, ...]", "a scalar", "for one example write x[None]")
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


def floating(name: str, value: Any) -> None:
    """Check that ``value`` is a dense floating-point tensor that holds values.

    Raises:
        TypeError: another dtype or layout, or no tensor.
        ValueError: a tensor on the meta device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(message(name, "a floating-point tensor", kind(value), tensor_of(name, value)))
    if not value.is_floating_point():
        remedy = f"for 8-bit images write {name}.float() / 255" if name == "x" else f"write {name}.float()"
        remedy = f"write {name}.abs() or {name}.real" if value.is_complex() else remedy
        raise TypeError(message(name, "a floating-point tensor", kind(value), remedy))
    if value.layout != torch.strided:
        raise TypeError(message(name, "a dense tensor", f"the layout {value.layout}", f"write {name}.to_dense()"))
    has_values(name, value)


def moved(x_adv: Any, x: Any) -> None:
    """Check that both are floating-point tensors of one shape on one device, one example against many included.

    No device is waited for.
    """
    for name, value in (("x_adv", x_adv), ("x", x)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            floating(name, value)
    alike = x_adv.shape[1:] == x.shape[1:] and (len(x_adv) == len(x) or 1 in (len(x_adv), len(x)))
    require(alike, "x_adv", f"of the shape of x, {list(x.shape)}", list(x_adv.shape))
    require(x_adv.device == x.device, "x_adv", f"on the device of x, {x.device}", x_adv.device, "write x_adv.to(x.device)")


def sequence(name: str, value: Any, example: str) -> None:
    """Check that ``value`` is a list, a tuple or a range, as in the ``example``."""
    if not isinstance(value, (list, tuple, range)):
        raise TypeError(message(name, "a list", repr(value), f"write {name}={example}"))


def pair(name: str, value: Any, example: str) -> None:
    """Check that ``value`` is two of something, as in the ``example``."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(message(name, "a pair", repr(value), f"write {name}={example}"))


def has_values(name: str, value: Tensor) -> None:
    """Check that a tensor is not one of the meta device, which knows shapes only."""
    remedy = "build or load it on the device of the model"
    require(not value.is_meta, name, "a tensor with values", "one on the meta device, which has none", remedy)


def labels(y: Tensor, *, examples: int, classes: int | None = None, device: torch.device | None = None) -> None:
    """Check that ``y`` holds one int64 label per example, inside ``[0, classes)`` when ``classes`` is given.

    With a ``device``, that of x, it must be there.

    Raises:
        TypeError: the labels are not int64.
        ValueError: wrong shape, or a label outside the classes.
    """
    rows = ""
    if isinstance(y, Tensor) and y.ndim == 2:
        rows = "for one-hot rows write y.argmax(dim=1)" if y.shape[1] > 1 else "write y.flatten()"
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        remedy = "write y.long()" if isinstance(y, Tensor) else tensor_of("y", y) + ".long()"
        raise TypeError(message("y", "class indices of dtype torch.int64", kind(y), rows or remedy))
    require(y.shape == (examples,), "y", f"of shape [{examples}], one label per example", list(y.shape), rows)
    if device is not None:
        require(y.device == device, "y", f"on the device of x, {device}", y.device, f"write y.to({str(device)!r})")
    has_values("y", y)
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

"""What ``metarobust evaluate`` does once its flags are read: model, weights, data, evaluation, files."""

import importlib.util
import itertools
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metarobust._files import require_room
from metarobust._tensor_files import WEIGHTS, read_tensors
from metarobust.command_line._points import read_points
from metarobust.evaluation import evaluate
from metarobust.threat_models import ThreatModel

if TYPE_CHECKING:
    from metarobust.command_line._evaluate import Evaluate

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


def run_evaluation(flags: "Evaluate", epsilon: float) -> None:
    """Build the model, read weights and data, evaluate, print, write."""
    threat_model = ThreatModel(norm=flags.norm, epsilon=epsilon)
    device = _device(flags.device)
    model = build_model(flags.model)
    if flags.weights is not None:
        load_weights(model, flags.weights, flags.model.rpartition(":")[2])
    data = read_points(flags.data, part=None, root=flags.root, download=flags.download, examples=flags.examples)
    model = model.eval().requires_grad_(False).to(device)
    _probe(model, data.images[:1].to(device))
    report = evaluate(
        model,
        data,
        threat_model=threat_model,
        protocol=flags.protocol,
        batch_size=flags.batch_size,
        seed=flags.seed,
        checkpoint=flags.checkpoint,
    )
    report.print()
    if flags.json is not None:
        report.to_json(flags.json)
    if flags.plot is not None:
        report.plot(flags.plot)
    written = [str(path) for path in (flags.json, flags.plot) if path is not None]
    if written:
        print("wrote " + " and ".join(written))


def model_file(place: str) -> tuple[Path, str]:
    """The file and the function of ``FILE.py:FUNCTION``; the file is there."""
    name, _, function = place.rpartition(":")
    path = Path(name)
    if not name or not function.isidentifier():
        raise ValueError(f"--model must be FILE.py:FUNCTION, got {place!r}; write nets.py:build")
    if not path.is_file():
        remedy = f"; write {path}.py:{function}" if path.with_name(f"{path.name}.py").is_file() else ""
        raise FileNotFoundError(f"--model must name a file that exists, got {path}{remedy}")
    return path, function


def build_model(place: str) -> nn.Module:
    """The module that the function at ``FILE.py:FUNCTION`` returns; runs the file."""
    path, function = model_file(place)
    module = _own_code(path, lambda: _import(path))
    build = getattr(module, function, None)
    if not callable(build):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        offered = ", ".join(known[:8]) or "no function"
        raise ValueError(f"--model must name a function of {path}, got {function!r}; the file has {offered}")
    model = _own_code(path, build)
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model must name a function that returns an nn.Module, {function} returned a {type(model).__name__}")
    return model


def _import(path: Path) -> ModuleType:
    name = f"metarobust_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--model must name a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    sys.path.insert(0, str(path.absolute().parent))  # as if the file were run: it may import its neighbours
    spec.loader.exec_module(module)
    return module


def _own_code(path: Path, call: Any) -> Any:
    """Run code of the user's; its failure becomes a sentence that says where."""
    try:
        return call()
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path or f.filename == str(path)]
        line = f", line {frames[-1].lineno}" if frames else ""
        if isinstance(error, SyntaxError):
            line = f", line {error.lineno}"
        raise ValueError(f"--model must run without errors, got {type(error).__name__} in {path}{line}: {error}") from error


def load_weights(model: nn.Module, path: Path, build: str) -> None:
    """Copy a state dictionary into the model that ``build`` made; unwraps the usual wrappings, executes nothing."""
    state = _read_weights(path)
    for _ in WRAPPERS:
        inner = next((state[k] for k in WRAPPERS if isinstance(state.get(k), dict)), None)
        state = state if inner is None else inner
    expected = model.state_dict()
    if state.keys() != expected.keys():
        for prefix in PREFIXES * 2:
            if state and all(str(name).startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
    missing = [name for name in expected if name not in state]
    unexpected = [str(name) for name in state if name not in expected]
    if missing or unexpected:
        part = _part_that_fits(model, {str(name) for name in state})
        if part is not None:
            raise ValueError(
                f"--weights must fit the model, got {path}, which fits its part {part!r} alone; load the weights inside "
                f"{build}(), before the network is wrapped (as behind a Normalize), and leave out --weights"
            )
        parts = [f"{_few(names)} {what}" for names, what in ((missing, "missing"), (unexpected, "unexpected")) if names]
        raise ValueError(f"--weights must fit the model, got {path} with {' and '.join(parts)}; build the model they belong to")
    for name, own in expected.items():
        value = state[name]
        if not isinstance(value, Tensor) or value.shape != own.shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"--weights must fit the model, got {name} of shape {got} in {path}; it needs {list(own.shape)}")
    model.load_state_dict(state)


def _part_that_fits(model: nn.Module, names: set[str]) -> str | None:
    """The submodule that weights of these names belong to."""
    for part, module in model.named_modules():
        own = module.state_dict().keys()
        if part and names <= own and all(name.endswith("num_batches_tracked") for name in own - names):
            return part  # files of old torch versions do not count batches
    return None


def _read_weights(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--weights must name a file that exists, got {'the folder ' if path.is_dir() else ''}{path}")
    if path.suffix == ".safetensors":
        state, header = read_tensors(path, expected=None, name="--weights", remedy="save it again")
        if header.get("format") not in (None, WEIGHTS):
            raise ValueError(f"--weights must be weights of a network, got {path}, a {header['format']!r} file")
        return state
    require_room(f"--weights {path}", path.stat().st_size)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"--weights must be a whole file of weights, got {path} ({error})") from error
    except Exception as error:  # torch.load raises a dozen kinds of errors for files that are no weights
        raise ValueError(
            f"--weights must be a state dictionary that loads without executing code, got {path} "
            f"({type(error).__name__}); write it with torch.save(model.state_dict(), path)"
        ) from error
    if not isinstance(state, dict):
        raise TypeError(f"--weights must be a state dictionary, got a {type(state).__name__} in {path}")
    return state


def _few(names: list[str], most: int = 3) -> str:
    shown = ", ".join(itertools.islice(names, most))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta makes tensors without values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be cpu, or a device that this machine has, got {name!r}") from error
    return device


@torch.no_grad()
def _probe(model: nn.Module, x: Tensor) -> None:
    """One example through the model, so that a model for other images fails with a sentence."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    try:
        model(x.to(dtype))
    except Exception as error:  # the model is the user's: anything may go wrong in it
        reason = " ".join(str(error).splitlines()[:1])
        raise ValueError(
            f"--model must take images of the data, {list(x.shape)}, got {type(error).__name__}: {reason}"
        ) from error

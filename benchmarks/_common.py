"""Timing in interleaved rounds, and a JSON file that says what machine and which versions gave the numbers."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from metarobust._files import write_atomically


def interleaved(functions: Mapping[str, Callable[[], object]], *, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds per call of each function, one entry per round; the functions take turns, so that drift hits all alike."""
    for function in functions.values():
        function()
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            _synchronise()
            begin = time.perf_counter()
            for _ in range(repeats):
                function()
            _synchronise()
            seconds[name].append((time.perf_counter() - begin) / repeats)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median over rounds of ``slow / fast``, with the lowest and highest round."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def environment() -> dict[str, Any]:
    """Hardware, threads and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("metarobust", "torch", "torchopt")},
    }


def write(name: str, content: dict[str, Any], folder: str) -> None:
    """Write ``results/<name>.json``."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content | {"environment": environment()}, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"wrote {path}")

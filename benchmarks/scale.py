"""Time and memory of each part as a function of its size, with the exponents fitted to them (docs/scale.md).

    METAROBUST_DATA=... OMP_NUM_THREADS=1 uv run python -m benchmarks.scale [--only PGD edges] [--first 2] [--out results]
    uv run python -m benchmarks.scale --summary --out benchmarks/measured --figure docs/scale.png

Each point is measured in a process of its own, forked from one that has only imported what is needed, with one thread. Time is
the CPU time of the process, system calls included, because the machine may be shared; wall time is kept beside it. A repetition
makes as many calls as fill 0.05 s; there are 3, and 7 where they are short. Memory: the peak of the resident set in the first
call above that before it (see benchmarks/_scale_measure.py). Points end up in scale.jsonl, one line each, with hardware and
versions; what is there already is not measured again. Series that need MNIST are left out without METAROBUST_DATA.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks._common import environment
from benchmarks._scale_series import SERIES, point
from benchmarks._scale_show import draw, table
from metarobust._files import write_atomically


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(name: str, size: int) -> dict[str, Any]:
    """One line of the file: the point, measured by as many fresh processes as the series says."""
    series = SERIES[name]
    context = multiprocessing.get_context("forkserver")
    # The first optimizer imports torch._dynamo, which takes seconds: here once, and not in every process.
    context.set_forkserver_preload(["torch._dynamo", "benchmarks._scale_series"])
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(series.processes, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        ranks = range(series.processes)
        found = [pool.submit(point, name, size, rank, f"{folder}/store") for rank in ranks]
        first, *others = [one.result() for one in found]
    if others:  # each process pays for its own step, and the slowest holds up all
        together = zip(first["seconds"], *(one["seconds"] for one in others), strict=True)
        first["seconds"] = [max(values) for values in together]
        first["memory_bytes"] = max(one["memory_bytes"] for one in (first, *others))
    return {"series": name, "asked": size} | first


def run(names: Sequence[str], path: Path, *, first: int | None = None) -> None:
    """Measure what the file lacks, and write after each point."""
    lines = read(path)
    known = {(line["series"], line["asked"]) for line in lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        for size in SERIES[name].sizes[:first]:
            if (name, size) in known:
                continue
            begin = time.perf_counter()
            lines.append(measure(name, size) | {"environment": environment() | {"threads": 1}})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
            seconds, memory = lines[-1]["seconds"], lines[-1]["memory_bytes"] / 2**20
            told = f"{name} {lines[-1]['size']:,}: {sorted(seconds)[len(seconds) // 2]:.4g} s, {memory:.1f} MiB"
            print(f"{told} ({time.perf_counter() - begin:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of series, in the order of measurement")
    parser.add_argument("--first", type=int, default=None, help="measure only so many sizes of each series, the smallest")
    parser.add_argument("--out", default="results", help="folder of scale.jsonl")
    parser.add_argument("--summary", action="store_true", help="print the table and draw the figure from the file alone")
    parser.add_argument("--figure", default=None, help="where the figure goes; default: scale.png beside the file")
    arguments = parser.parse_args()
    path = Path(arguments.out) / "scale.jsonl"
    if not arguments.summary:
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the libraries of the processes to come
        chosen = list(dict.fromkeys(name for begin in arguments.only for name in SERIES if name.startswith(begin)))
        if "METAROBUST_DATA" not in os.environ:
            chosen = [name for name in chosen if not SERIES[name].mnist]
            print("METAROBUST_DATA is not set: the series on MNIST are left out")
        run(chosen, path, first=arguments.first)
    lines = read(path)
    print("\n".join(table(lines)))
    draw(lines, Path(arguments.figure) if arguments.figure else path.with_suffix(".png"))


if __name__ == "__main__":
    main()

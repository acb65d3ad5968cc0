"""The runs of the transfer benchmark: a file of lines, and groups of seeds put together."""

import json
from pathlib import Path
from typing import Any


def read(out: Path) -> list[dict[str, Any]]:
    """The runs so far."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def joined(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By target and method, the groups of seeds put together: ``seeds``, ``settings`` (one per group), ``reports``."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    taken: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        seeds = {row.get("first", 0) + i for i in range(row["seeds"])}
        before = taken.setdefault((row["target"], row["method"]), set())
        if before & seeds:
            raise ValueError(
                f"seeds {sorted(before & seeds)} of {row['method']} on {row['target']} are there twice; delete one of the lines"
            )
        before |= seeds
        here = found.setdefault(row["target"], {}).setdefault(row["method"], {"seeds": 0, "settings": [], "reports": []})
        here["seeds"] += row["seeds"]
        here["settings"] += [row["settings"]] if row["settings"] not in here["settings"] else []
        here["reports"] += row["reports"]
    return found

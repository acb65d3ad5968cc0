"""Reading the data set that a flag names."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from metarobust.command_line._notes import say
from metarobust.data import LabelledImages, load, load_npz


def read_points(
    data: str,
    *,
    part: str | None,
    root: Path | None,
    download: bool,
    classes: list[int] | None = None,
    examples: int | None = None,
) -> LabelledImages:
    """The "train" or test part of a data set, or the .npz file, cut to the classes and then to the first ``examples``."""
    packed = data.endswith(".npz")
    try:
        points = load_npz(data) if packed else load(data, train=part == "train", root=root, download=download)
    except FileNotFoundError as error:
        if packed:
            raise FileNotFoundError(f"--data must name a file that exists, got {data}") from error
        remedy = "pass --root or set METAROBUST_DATA to a folder that has it, or pass --download"
        raise FileNotFoundError(f"--data {data} is not in the data root; {remedy}") from error
    except (KeyError, ValueError, TypeError) as error:
        remedy = "" if packed else "; for data of your own pass a file that ends in .npz"
        raise ValueError(f"--data {data}: {error.args[0]}{remedy}") from error
    kept = torch.arange(len(points))
    if classes is not None:
        known = sorted(set(points.labels.tolist()))
        missing = [label for label in classes if label not in known]
        if missing:
            raise ValueError(f"--classes must be among those of the data, {listed(known)}, got {listed(missing)}")
        kept = torch.isin(points.labels, torch.tensor(classes)).nonzero().squeeze(1)
    if len(kept) == 0:
        raise ValueError(f"--data must have at least one example, got none in {data}")
    if packed and int(points.labels.min()) == 1 and os.environ.get("RANK", "0") == "0":  # one process of many says it
        say(f"no example of {data} has the label 0; where classes were counted from 1, store labels - 1")
    return points.select(kept[:examples])


def listed(labels: Sequence[int]) -> str:
    """Labels, with commas."""
    return ", ".join(map(str, labels))

"""``metarobust bound``: the robust accuracy that no classifier can exceed on given points, from the shell."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metarobust.command_line._evaluate import parse_number


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Bracket the lowest adversarial risk that any classifier can have on the given points, without a model.

    The bound is for these points (the empirical distribution), not for the population that they come from.

    Writes bounds.json, bounds.md and bounds.png. A command that was interrupted goes on after its last radius when repeated.

    Example: metarobust bound --data mnist --norm l2 --epsilons 2,2.5,3 --reports net.json --out mnist-bounds
    """

    data: str
    """mnist, fashion-mnist, cifar10, cifar100 or digits, or an .npz file with images and labels."""
    epsilons: str
    """Radii in input units, pixels in [0, 1], with commas between: 2,2.5,3 or 4/255,8/255. Close pairs are found once for all."""
    norm: Literal["l2", "linf"] = "l2"
    """Norm of the balls."""
    out: Path = Path("metarobust-bound")
    """Folder for the results; made if missing."""
    part: Literal["train", "test"] | None = None
    """Which part of a named data set. Default: test, as for metarobust evaluate, so that model and bound see the same points."""
    classes: str | None = None
    """Only points of these classes, with commas between: 3,7. Default: all."""
    examples: int | None = None
    """Only the first so many points (of the classes chosen). Default: all."""
    order: str = "auto"
    """Largest sets of points that count: 2 (fastest), 3 or more, or auto: as large as the certificate of exactness needs."""
    method: Literal["exact", "sinkhorn"] = "exact"
    """Flow and linear programs, or the entropic algorithm of Garcia Trillos et al. (2024)."""
    most_sets: int = 5_000_000
    """Candidate sets that one search for broken constraints may look at; beyond it the bracket may stay open."""
    closed: bool = True
    """Balls with their boundary: two points exactly 2 epsilon apart conflict. --no-closed leaves out such ties."""
    reports: str | None = None
    """Reports of metarobust evaluate --json on the same points, with commas between: drawn beside the bound, and compared."""
    root: Path | None = None
    """Folder that holds the data sets, as torchvision lays them out. Default: METAROBUST_DATA, else ~/.cache/metarobust."""
    download: bool = False
    """Fetch the data set into the root if it is missing."""
    device: str = "auto"
    """Where close pairs are looked for: cpu, cuda, cuda:1, ...; auto is cuda where there is one."""

    def run(self) -> None:
        """Compute the bounds, print the table and write the files."""
        for name in ("examples", "most_sets"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be an integer >= 1, got {value}")
        if self.part is not None and self.data.endswith(".npz"):
            raise ValueError(f"--part must be left out for an .npz file, which has no parts, got {self.part}")
        epsilons = parse_epsilons(self.epsilons, self.norm)
        order, classes = parse_order(self.order), parse_classes(self.classes)
        from metarobust.command_line._bound_reports import read_reports

        reports = read_reports(self.reports, self.norm)
        from metarobust.command_line._bound_run import run_bound

        run_bound(self, epsilons=epsilons, order=order, classes=classes, reports=reports)

    @property
    def kept(self) -> Path:
        """The radii that are finished; removed at the end."""
        return self.out / "bounds.checkpoint"

    def interrupted(self) -> str:
        """What to tell whoever pressed Ctrl-C."""
        if not self.kept.exists():
            return "interrupted before the first radius was finished; nothing was kept"
        return f"interrupted; the finished radii are kept in {self.kept}: run the same command again to go on"


def parse_epsilons(text: str, norm: str) -> list[float]:
    """Radii, rising and each once."""
    parts = [part for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"--epsilons must be at least one number, got {text!r}; write --epsilons 0.5,1")
    epsilons = sorted({parse_number("--epsilons", part) for part in parts})
    for epsilon in (epsilons[0], epsilons[-1]):
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"--epsilons must be finite numbers >= 0, got {epsilon:g}")
    if norm == "linf" and epsilons[-1] > 1:
        remedy = f"for 8-bit images in [0, 1] write {epsilons[-1]:g}/255"
        raise ValueError(f"--epsilons must be at most 1 for linf, where pixels lie in [0, 1], got {epsilons[-1]:g}; {remedy}")
    return epsilons


def parse_order(text: str) -> int | str:
    """``"auto"``, or an integer from 2."""
    if text != "auto" and not (text.isdecimal() and int(text) >= 2):
        raise ValueError(f"--order must be auto or an integer >= 2, got {text!r}")
    return text if text == "auto" else int(text)


def parse_classes(text: str | None) -> list[int] | None:
    """Class numbers, rising and each once."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--classes must be class numbers with commas between, got {text!r}; write --classes 3,7")
    return sorted({int(part) for part in parts})

"""The documentation: everything public is described, names and links lead somewhere, the site builds without a warning."""

import dataclasses
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [p for p in sorted(DOCS.rglob("*.md"))]

spec = importlib.util.spec_from_file_location("documented", DOCS / "_site" / "documented.py")
assert spec is not None
assert spec.loader is not None
documented = importlib.util.module_from_spec(spec)
spec.loader.exec_module(documented)

HOLES = '''
"""A module with holes."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = ["TOLD", "UNTOLD", "Base", "Found", "Ladder", "Mover", "Settings", "Walker", "half", "silent", "told"]

TOLD = 1
"""One."""
UNTOLD = 2

def silent(x): ...

def half(x, y):
    """Half of it.

    Args:
        x: told.
    """

def told(x, y):
    """Of ``x`` and ``y [n]``."""

@dataclass
class Settings:
    """Settings.

    Args:
        first: told.
    """

    first: int
    second: int

    @property
    def bare(self): return 0

    def method(self, z):
        """Does something with another thing."""

class Found(NamedTuple):
    value: int

class Mover(Protocol):
    """Moves."""

    def __call__(self, model, x):
        """Move.

        Args:
            model: told.
            x: told.
        """

class Walker:
    """Walks, as a Mover.

    Args:
        pace: told.
    """

    def __init__(self, pace, stride): ...

    def __call__(self, model, x): ...

class Base:
    """Has a documented method."""

    def climb(self, height):
        """Climb to ``height``."""

class Ladder(Base):
    """Climbs without saying so again."""

    def climb(self, height): ...
'''

SENTENCES = [
    "holes.half does not say what y is",
    "holes.silent has no docstring",
    "holes.Found has no docstring",
    "holes.Settings does not say what second is",
    "holes.Settings.bare has no docstring",
    "holes.Settings.method does not say what z is",
    "holes.UNTOLD has no string under its assignment",
    "holes.Walker does not say what stride is",
]


def test_everything_public_is_documented() -> None:
    assert documented.all_gaps() == []


def test_each_hole_is_found_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: one sentence for each deliberate hole, none for what is told, inherited or fills a protocol."""
    (tmp_path / "holed").mkdir()
    (tmp_path / "holed" / "__init__.py").write_text("")
    (tmp_path / "holed" / "holes.py").write_text(HOLES)
    (tmp_path / "holed" / "_private.py").write_text("def silent(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    assert sorted(documented.all_gaps("holed")) == sorted(f"holed.{sentence}" for sentence in SENTENCES)
    (tmp_path / "holed" / "mute.py").write_text("__all__ = []")
    assert "holed.mute has no docstring" in documented.all_gaps("holed")


def glossary_names() -> Iterator[str]:
    for line in (DOCS / "glossary.md").read_text().splitlines():
        cells = line.split(" | ")
        if line.startswith("| ") and len(cells) == 4:
            yield from re.findall(r"`([^`]+)`", cells[1])


def exists(name: str) -> bool:
    """Whether ``Thing.attribute`` or ``Thing(argument)`` is found in the public modules, the module named or not."""
    path, _, argument = name.rstrip(")").partition("(")
    parts = path.split(".")
    modules = {module.split(".")[1]: importlib.import_module(module) for module in documented.public_modules()}
    if parts[0] in modules and len(parts) > 1:
        found: list[Any] = [modules[parts.pop(0)]]
    else:
        found = [module for module in modules.values() if parts[0] in module.__all__]
    for part in parts:
        fields = [f.name for thing in found if dataclasses.is_dataclass(thing) for f in dataclasses.fields(thing)]
        notes = [note for thing in found for note in getattr(thing, "__annotations__", {})]
        if part == parts[-1] and part in (*fields, *notes):
            return not argument
        found = [getattr(thing, part) for thing in found if hasattr(thing, part)]
    return any(not argument or argument in inspect.signature(thing).parameters for thing in found)


def test_names_of_the_glossary_exist() -> None:
    names = list(glossary_names())
    assert len(names) > 60
    assert [name for name in names if not exists(name)] == []
    wrong = ["PGD(stops)", "dro.WorstCase.weight", "losses.nothing", "Nothing", "dro.PGD", "ThreatModel.epsilon.value(x)"]
    assert [name for name in wrong if exists(name)] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Files beside the page, or pages that the build writes; the strict build checks headings too."""
    modules = [module.split(".")[1] for module in documented.public_modules()]
    written = {DOCS / "changelog.md", *(DOCS / "api" / f"{module}.md" for module in modules)}
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    paths = [(page.parent / target).resolve() for target in targets if target]
    assert [str(path) for path in paths if not path.exists() and path not in written] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    written = {"changelog.md", *(f"api/{module.split('.')[1]}.md" for module in documented.public_modules())}
    pages = {str(page.relative_to(DOCS)) for page in PAGES} | written
    assert sorted(listed) == sorted(pages), "list each page of docs/ once under nav in mkdocs.yml"


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the documentation needs {package}: uv sync --group docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES) + len(documented.public_modules())
    fetched = re.compile(r'<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)="(?:https?:)?//[^"]*"[^>]*>')
    for page in pages:
        assert fetched.findall(page.read_text()) == [], page
    assert "https://" not in " ".join(re.findall(r"(?:url\(|@import)[^;]*", (tmp_path / "site" / "extra.css").read_text()))
    reference = (tmp_path / "site" / "api" / "attacks.html").read_text()
    assert 'id="metarobust.attacks.PGD"' in reference
    assert "<math" in reference

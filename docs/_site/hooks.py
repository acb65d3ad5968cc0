"""What MkDocs is told beyond mkdocs.yml: generated pages, the README as the home page, formulas without a script.

The build ends with one sentence per gap when something public is undocumented (see documented.py).
"""

import html
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # this checkout, whatever is installed

import documented  # noqa: E402

OPENING, SECTIONS = "<!-- the README's opening -->", "<!-- the README's sections -->"
PAGE = """# metarobust.{name}

::: {path}
    options:
      members: false
      show_root_heading: false
      show_root_toc_entry: false
"""
MEMBER = """
::: {path}.{name}
"""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
GLUED = re.compile(r"<p>(?:(?!</p>).)*\n(?:- |1\. )([^\n<]*)", re.DOTALL)
CODE = re.compile(r"(<a [^>]*>|<h\d[^>]*>)?<code>(\w+(?:\.\w+)*(?:\(\w+\))?)</code>")
MENTION = re.compile(r"\bdocs/([\w/-]+\.md)\b")


def on_pre_build(**_: Any) -> None:
    """Refuse to build a reference with holes."""
    gaps = documented.all_gaps()
    if gaps:
        raise PluginError("the public surface is not documented:\n" + "\n".join(gaps))


def on_files(files: Files, config: Any) -> Files:
    """Add one page per public module, and the changelog."""
    for path in documented.public_modules():
        name, module = path.split(".", 1)[1], importlib.import_module(path)
        content = PAGE.format(name=name, path=path) + "".join(MEMBER.format(path=path, name=n) for n in module.__all__)
        files.append(File.generated(config, f"api/{name}.md", content=content))
    files.append(File.generated(config, "changelog.md", content=_from_root("CHANGELOG.md")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the README, without its title, where the home page asks for it."""
    opening, sections = _from_root("README.md").split("\n", 1)[1].split("\n## ", 1)
    return markdown.replace(OPENING, opening).replace(SECTIONS, "## " + sections)


def on_page_content(content: str, page: Any, files: Files, **_: Any) -> str:
    """Formulas become MathML; public names, and the pages that docstrings mention, become links."""
    content = FORMULA.sub(_mathml, content)
    here = page.file.src_uri
    if glued := GLUED.search(content):
        raise PluginError(f"{here}: the list that begins with {glued[1]!r} needs an empty line before it")

    def page_link(mention: re.Match[str]) -> str:
        target = files.get_file_from_path(mention[1])
        if target is None:
            raise PluginError(f"{here}: a docstring mentions {mention[0]}, which does not exist")
        return f'<a href="{get_relative_url(target.url, page.url)}">{mention[0]}</a>'

    def name_link(code: re.Match[str]) -> str:
        if code[1] or not (target := _target(code[2])):
            return code[0]
        url = get_relative_url(f"api/{target.split('.')[1]}.html", page.url)
        return f'<a href="{url}#{target}">{code[0]}</a>'

    return MENTION.sub(page_link, content) if here.startswith("api/") else CODE.sub(name_link, content)


def _target(name: str) -> str | None:
    """The anchor of ``Name``, ``Name.attribute`` or ``Name(argument)``."""
    if re.fullmatch("[a-z]+", name):  # an argument as likely as a function, as `margin`
        return None
    parts, targets = re.split(r"[.(]", name.rstrip(")")), documented.link_targets()
    return next((targets[path] for n in (3, 2, 1) if (path := ".".join(parts[:n])) in targets and len(parts) >= n), None)


def _from_root(name: str) -> str:
    """A Markdown file from the repository's root, its links as seen from docs/."""
    text = (ROOT / name).read_text()
    return re.sub(r"\]\((?:docs/)([^)]+)\)", r"](\1)", text).replace("](CHANGELOG.md)", "](changelog.md)")


def _mathml(formula: re.Match[str]) -> str:
    tex = html.unescape(formula[2]).strip().replace(r"\arg", r"\operatorname{arg}")  # the one command it lacks
    converted = convert(tex, display="block" if formula[1] == "div" else "inline")
    if unknown := re.findall(r">(\\[^<]*)<", converted):
        raise PluginError(f"latex2mathml does not know {unknown[0]} in {formula[2]}; write it otherwise")
    return converted

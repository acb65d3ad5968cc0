"""How the generated pages read docstrings: roles and formulas of reStructuredText, examples, names that become links."""

import re
from typing import Any

import griffe
from documented import link_targets

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?\.?([^`]+)`")
INLINE_FORMULA = re.compile(r":math:`([^`]+)`", re.DOTALL)
DISPLAY_FORMULA = re.compile(r"^( *)\.\. math::((?:.*\n)(?:\1 +.*(?:\n|\Z))*)", re.MULTILINE)
SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {8}.*)*)", re.MULTILINE)
NAME = re.compile(r"(?<![`\[])`([A-Za-z_][\w.]*)`(?!`)")


class Docstrings(griffe.Extension):
    """Rewrite each docstring into Markdown before it is parsed."""

    def __init__(self) -> None:
        self.targets = link_targets()

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object of the package."""
        if obj.docstring is not None:
            obj.docstring.value = self.rewritten(obj.docstring.value + "\n", obj).rstrip()

    def rewritten(self, text: str, obj: griffe.Object) -> str:
        text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
        text = SEVERAL.sub(lambda m: "\n".join(f"    {name}: {m[2]}" for name in m[1].split(", ")), text)
        text = DISPLAY_FORMULA.sub(lambda m: f"{m[1]}$$\n{m[1]}{' '.join(m[2].split())}\n{m[1]}$$\n", text)
        text = INLINE_FORMULA.sub(lambda m: f"${' '.join(m[1].split())}$", text)
        text = ROLE.sub(r"`\1`", text)
        prose, heading, examples = text.partition("Examples:\n")
        return NAME.sub(lambda m: self._link(m[1], obj), prose) + heading + examples

    def _link(self, name: str, obj: griffe.Object) -> str:
        target = self.targets.get(name)
        own = target is not None and target.rsplit(".", 1)[1] == obj.name
        return f"`{name}`" if target is None or own else f"[`{name}`][{target}]"

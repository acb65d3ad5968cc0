"""What the public surface leaves undocumented: the check behind the generated pages, run by the build and by the tests.

``python docs/_site/documented.py`` prints one sentence per gap and ends with 1 when there is one. Public is what a module or
subpackage without an underscore lists in ``__all__``, with the public methods and properties of its classes. An argument or a
field is documented by an entry of its own under Args or Attributes; a docstring without these may name it between double
backticks instead. A method that fills a documented protocol of the package, or overrides a method, shares its documentation.
"""

import ast
import dataclasses
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

HEADING = re.compile(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n|\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*):", re.MULTILINE)
CALLS = ("__call__", "forward")
SELF = "the method itself"


def public_modules(package: str = "metarobust") -> list[str]:
    """The modules and subpackages without an underscore."""
    path = importlib.import_module(package).__path__
    return [f"{package}.{module.name}" for module in pkgutil.iter_modules(path) if not module.name.startswith("_")]


def link_targets(package: str = "metarobust") -> dict[str, str]:
    """Public names in full, by every way to write them that means one thing: alone, after their module, in full."""
    full = [f"{path}.{name}" for path in public_modules(package) for name in importlib.import_module(path).__all__]
    count = Counter(path.rsplit(".", 1)[1] for path in full)
    found = {}
    for path in full:
        _, module, name = path.split(".")
        found |= {path: path, f"{module}.{name}": path} | ({name: path} if count[name] == 1 else {})
    return found


def all_gaps(package: str = "metarobust") -> list[str]:
    """One sentence for each undocumented thing in the public modules of the package."""
    modules = [importlib.import_module(name) for name in public_modules(package)]
    protocols = [thing for module in modules for thing in vars(module).values() if getattr(thing, "_is_protocol", False)]
    return [gap for module in modules for gap in gaps(module, protocols)]


def gaps(module: ModuleType, protocols: list[type] | None = None) -> list[str]:
    """The same for one module; ``protocols`` are the ones whose methods document those that fill them."""
    found = [] if module.__doc__ else [f"{module.__name__} has no docstring"]
    constants = _described_constants(module)
    for name in module.__all__:
        thing, path = getattr(module, name), f"{module.__name__}.{name}"
        if inspect.isclass(thing):
            found += _gaps_of_class(path, thing, protocols or [])
        elif inspect.isfunction(thing):
            found += _gaps_of_function(path, thing)
        elif name not in constants:
            found.append(f"{path} has no string under its assignment")
    return found


def _gaps_of_class(path: str, cls: type, protocols: list[type]) -> Iterator[str]:
    text = cls.__dict__.get("__doc__")
    if not text or text.startswith(f"{cls.__name__}("):  # dataclasses and named tuples get their signature as one
        yield f"{path} has no docstring"
        return
    told = _told(text)
    for field in _fields(cls):
        if field not in told:
            yield f"{path} does not say what {field} is"
    for name, value in _members(cls):
        here, shared = f"{path}.{name}", _shared(cls, name, value, protocols)
        if name == "__init__":
            yield from _untold(path, value, told)
        elif not value.__doc__ and SELF not in shared:
            yield f"{here} has no docstring"
        elif inspect.isfunction(value):
            calls = [base.__doc__ or "" for base in _own_bases(cls)] if name in CALLS else []
            yield from _untold(here, value, _told(value.__doc__ or "") | shared | _quoted("\n".join(calls)))


def _gaps_of_function(path: str, function: Callable[..., Any]) -> Iterator[str]:
    if function.__doc__:
        yield from _untold(path, function, _told(function.__doc__))
    else:
        yield f"{path} has no docstring"


def _untold(path: str, function: Callable[..., Any], told: set[str]) -> Iterator[str]:
    for name in _parameters(function):
        if name not in ("self", "cls") and not name.startswith("_") and name not in told:
            yield f"{path} does not say what {name} is"


def _fields(cls: type) -> list[str]:
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")]
    return list(getattr(cls, "_fields", ())) if issubclass(cls, tuple) else []


def _own_bases(cls: type) -> list[type]:
    """The class and those of its bases that belong to the same package."""
    return [base for base in cls.__mro__ if base.__module__.split(".")[0] == cls.__module__.split(".")[0]]


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, calls and constructors, that the class or a base of the same package writes."""
    generated = dataclasses.is_dataclass(cls) or issubclass(cls, tuple) or getattr(cls, "_is_protocol", False)
    seen = {*_fields(cls), *(["__init__"] if generated else [])}
    for base in _own_bases(cls):
        for name, value in vars(base).items():
            value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if name in seen or (name.startswith("_") and name not in ("__call__", "__init__")):
                continue
            if isinstance(value, property) or inspect.isfunction(value):
                seen.add(name)
                yield name, value


def _shared(cls: type, name: str, own: Any, protocols: list[type]) -> set[str]:
    """What documented methods that this one overrides or fills tell, with `SELF` if there is one."""
    found: set[str] = set()
    for base in (*cls.__mro__[1:], *protocols):
        method = vars(base).get(name)
        if base is object or method is None or method is own or not method.__doc__:
            continue
        inherited = base in cls.__mro__
        if inherited and base not in _own_bases(cls):
            found |= {SELF, *_parameters(own)}  # documented by its library, as nn.Module.state_dict
        elif inherited or set(_parameters(method)) <= set(_parameters(own)):
            found |= {SELF} | _told(method.__doc__)
    return found


def _parameters(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters) if inspect.isfunction(method) else []


def _told(docstring: str) -> set[str]:
    """The names with an entry under Args and Attributes; without such a heading, the words between double backticks."""
    text = inspect.cleandoc(docstring) + "\n"
    bodies = HEADING.findall(text)
    entries = [entry for body in bodies for entry in ENTRY.findall(body)]
    return {name.strip("* ") for entry in entries for name in entry.split(",")} if bodies else _quoted(text)


def _quoted(text: str) -> set[str]:
    return {word for quoted in re.findall(r"``(.+?)``", text, re.DOTALL) for word in re.findall(r"\w+", quoted)}


def _described_constants(module: ModuleType) -> set[str]:
    """Names that the module, or a file of it, assigns with a string right below."""
    found: set[str] = set()
    for file in [module, *(sys.modules[name] for name in list(sys.modules) if name.startswith(module.__name__ + "."))]:
        statements = ast.parse(inspect.getsource(file)).body
        for statement, below in itertools.pairwise(statements):
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


if __name__ == "__main__":
    lines = all_gaps()
    print("\n".join(lines) or "everything public is documented")
    sys.exit(bool(lines))

"""The architecture, read from the syntax trees: imports point down, optional libraries load late, files stay short."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "metarobust"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 350

LAYERS = [
    ("types", "_checks", "_progress", "_processes", "_randomness"),
    ("threat_models", "losses", "divergences", "models", "data"),
    ("attacks", "dro", "bounds"),
    ("objectives", "meta_optimizers", "evaluation"),
    ("training",),
    ("command_line",),
]
LAYER_OF: dict[str, float] = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}
LAYER_OF["_files"] = 0.5  # tells in the sentences of _checks where no file can stand
LAYER_OF["_tensors"] = 0.5  # checks the generators that it draws from
LAYER_OF["_tensor_files"] = 0.75  # made of both
LAYER_OF["meta_weighters"] = 3.5  # weighs what objectives charge
LAYER_OF["transport_costs"] = 1.5  # made of threat models, and attacks are made with it
LATE = {"torchvision", "learn2learn", "ot", "matplotlib", "sklearn", "tyro"}


def module_name(path):
    """``metarobust/attacks/_common.py`` -> ``metarobust.attacks._common``; a package's ``__init__`` bears its name."""
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(node, module, is_package):
    """Absolute dotted names that one import statement asks for, ``from a import b`` as ``a.b``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        above = module.split(".") + ([""] if is_package else [])
        base = ".".join([*above[: len(above) - node.level], *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def import_statements(tree):
    """Every import of a file with whether it waits inside a function, in the order of the file."""

    def walk(node, late):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                yield child, late
            else:
                inside_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, late or inside_function)

    return list(walk(tree, False))


def layer_violations(source, module, is_package=False):
    """One sentence for each import that does not point strictly down or into the file's own package."""
    root, *rest = module.split(".")
    own = rest[0] if rest else ""
    if own and own not in LAYER_OF:
        return [f"{module} belongs to no layer: add '{own}' to LAYERS in this test and to the design."]
    sentences = []
    for node, _ in import_statements(ast.parse(source)):
        for name in imported_names(node, module, is_package):
            if name.split(".")[0] != root:
                continue
            part = [*name.split("."), ""][1]
            where = f"{module}, line {node.lineno}"
            if not own:
                sentences.append(f"{where}: the top package imports nothing of the library, but it imports {name}.")
            elif part in ("", "__version__") or part == own:
                continue
            elif part not in LAYER_OF:
                sentences.append(f"{where}: {name} belongs to no layer.")
            elif LAYER_OF[part] >= LAYER_OF[own]:
                sentences.append(
                    f"{where}: '{own}' (layer {LAYER_OF[own]}) imports {name} (layer {LAYER_OF[part]}); "
                    "a file imports only from a strictly lower layer or from its own package."
                )
    return sentences


def early_imports(source, module):
    """One sentence for each optional or slow library that is imported while the file is being imported."""
    names = [
        (node.lineno, name.split(".")[0])
        for node, late in import_statements(ast.parse(source))
        if not late
        for name in imported_names(node, module, False)
    ]
    return [
        f"{module}, line {line}: {name} is imported at the top; import it inside the function that uses it."
        for line, name in names
        if name in LATE
    ]


def init_violations(source, module):
    """One sentence for each statement of an ``__init__`` that is no docstring, import or ``__all__`` (or version)."""
    allowed = [["__all__"], ["__version__"]] if module == PACKAGE.name else [["__all__"]]
    body = ast.parse(source).body
    sentences = [] if ast.get_docstring(ast.parse(source)) else [f"{module} has no docstring."]
    assigned = set()
    for node in body[1:] if len(sentences) == 0 else body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        targets = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        assigned.update(targets)
        if targets not in allowed:
            sentences.append(f"{module}, line {node.lineno}: an __init__ holds a docstring, imports and __all__ only.")
    return sentences if "__all__" in assigned else [*sentences, f"{module} has no __all__."]


def report(sentences):
    assert not sentences, "\n" + "\n".join(sentences)


def test_there_is_something_to_check():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_to_lower_layers_or_the_own_package(path):
    report(layer_violations(path.read_text(), module_name(path), path.name == "__init__.py"))


@pytest.mark.parametrize("path", [p for p in FILES if "command_line" not in p.parts], ids=module_name)
def test_optional_libraries_are_imported_where_they_are_used(path):
    report(early_imports(path.read_text(), module_name(path)))


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=module_name)
def test_a_package_init_is_a_docstring_imports_and_all(path):
    report(init_violations(path.read_text(), module_name(path)))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{module_name(path)} has {lines} lines, at most {LONGEST_FILE} are allowed: split it."


# The checks themselves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "text"),
    [
        ("metarobust.losses", "from metarobust.attacks import PGD", "imports metarobust.attacks.PGD (layer 2)"),
        ("metarobust.losses", "from metarobust import attacks", "(layer 1) imports metarobust.attacks (layer 2)"),
        ("metarobust.losses", "import metarobust.training.loop as loop", "imports metarobust.training.loop (layer 4)"),
        ("metarobust.losses", "from .attacks import PGD", "imports metarobust.attacks.PGD (layer 2)"),
        ("metarobust.losses", "from . import attacks", "imports metarobust.attacks (layer 2)"),
        ("metarobust.attacks._square", "from ..dro import solve", "'attacks' (layer 2) imports metarobust.dro.solve"),
        ("metarobust.losses", "def f():\n    from metarobust.attacks import PGD", "metarobust.losses, line 2: "),
        ("metarobust.losses", "class A:\n    def f(self):\n        import metarobust.data", "losses, line 3: "),
        ("metarobust.losses", "if TYPE_CHECKING:\n    from metarobust.data import Pools", "losses, line 2: "),
        ("metarobust._checks", "from metarobust.types import Model", "strictly lower layer or from its own package"),
        ("metarobust.losses", "from metarobust.plots import curve", "metarobust.plots.curve belongs to no layer"),
        ("metarobust.plots", "import torch", "add 'plots' to LAYERS"),
        ("metarobust", "from metarobust.types import Model", "the top package imports nothing of the library"),
    ],
)  # fmt: skip
def test_a_planted_import_against_the_layers_is_found(module, source, text):
    (sentence,) = layer_violations(source, module)
    assert text in sentence


def test_imports_that_point_down_pass():
    source = "import torch\nfrom metarobust import __version__, _checks\nfrom metarobust.types import Model"
    assert layer_violations(source, "metarobust.losses") == []
    assert layer_violations("from metarobust.attacks._common import checked", "metarobust.attacks._square") == []
    assert layer_violations("from . import _common\nfrom ..types import Model", "metarobust.attacks._square") == []
    assert layer_violations("from ._common import checked", "metarobust.attacks", is_package=True) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torchvision",
        "from matplotlib import pyplot as plt",
        "try:\n    import ot\nexcept ImportError:\n    ot = None",
        "class A:\n    import sklearn.datasets",
    ],
)
def test_a_planted_early_import_is_found(source):
    (sentence,) = early_imports(source, "metarobust.losses")
    assert "is imported at the top; import it inside the function that uses it" in sentence
    assert early_imports("def f():\n" + "\n".join(f"    {line}" for line in source.splitlines()), "metarobust.losses") == []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import torch\n__all__ = []", "metarobust.models has no docstring."),
        ('"""Models."""\nimport torch', "metarobust.models has no __all__."),
        ('"""Models."""\n__all__ = []\ndef f(): ...', "metarobust.models, line 3: an __init__ holds a docstring"),
        ('"""Models."""\n__all__ = []\nCACHE = {}', "metarobust.models, line 3: an __init__ holds a docstring"),
        ('"""Models."""\n__version__ = "1"\n__all__ = []', "metarobust.models, line 2: an __init__ holds a docstring"),
    ],
)
def test_a_planted_statement_in_an_init_is_found(source, text):
    assert text in " ".join(init_violations(source, "metarobust.models"))

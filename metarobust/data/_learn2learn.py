"""Import learn2learn without gym, which its reinforcement-learning part asks for and this library never uses."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

# Build isolation stays on: pip then fetches setuptools, wheel and Cython for the build by itself. The option makes the
# build run Cython anew, because the C files in the archive do not compile on recent versions of Python.
INSTALL_LINE = (
    'pip install requests tqdm && pip install learn2learn==0.2.0 --no-deps --config-settings="--build-option=build_ext"'
)


def import_learn2learn() -> ModuleType:
    """Import learn2learn 0.2.0, with stand-ins for gym during the import if gym is not installed.

    ``import learn2learn`` imports its subpackage ``learn2learn.gym``, which names a few things of gym at import time.
    The stand-ins let that subpackage load and are gone from `sys.modules` afterwards; its environments do not work
    then. A gym that is installed is used as it is.

    Returns:
        The module learn2learn; ``import_learn2learn().algorithms.MAML`` adapts to a robust objective as to any loss
        (examples/maml_few_shot.py).

    Raises:
        ImportError: learn2learn, or something it needs, is not installed; the text holds the line that installs it.
    """
    try:
        # The warnings come from code of 2021 on newer interpreters; nobody who reads them here can act on them.
        with _stand_ins_for_gym(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("learn2learn")
    except ModuleNotFoundError as error:
        # requests and tqdm stand in the line because --no-deps, which keeps gym and qpth out, leaves them out too.
        raise ImportError(
            f"this needs learn2learn 0.2.0, but the module {error.name!r} is missing; with a C compiler at "
            f"hand, write {INSTALL_LINE}",
            name=error.name,
        ) from error


@contextmanager
def _stand_ins_for_gym() -> Iterator[None]:
    """Put the four gym modules that learn2learn 0.2.0 imports in `sys.modules`, and take just these out at the end."""
    if "gym" in sys.modules or importlib.util.find_spec("gym") is not None:
        yield
        return
    stand_ins = {name: ModuleType(name) for name in ("gym", "gym.core", "gym.envs", "gym.envs.registration")}
    environment = type("Env", (), {})
    stand_ins["gym"].__dict__.update(Env=environment)
    stand_ins["gym.core"].__dict__.update(Env=environment)
    stand_ins["gym.envs.registration"].__dict__.update(register=_register_nothing)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _register_nothing(*_arguments: object, **_options: object) -> None:
    """Stands in for gym's register, which learn2learn calls once per environment."""

"""``metarobust --version``: what a bug report needs."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from metarobust import __version__

PACKAGES = ("torch", "torchvision", "torchopt", "learn2learn", "pot", "numpy", "scipy", "scikit-learn", "highspy", "safetensors")


def print_version() -> None:
    """Print the version."""
    print(f"metarobust {__version__}\n" + "\n".join(f"{name}: {told}" for name, told in surroundings().items()))


def surroundings() -> dict[str, str]:
    """Python, system, packages and devices, each in words."""
    import torch

    packages = [f"{name} {_version_of(name)}" for name in PACKAGES]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "python": f"{sys.version.split()[0]} ({platform.python_implementation()})",
        "system": platform.platform(),
        "packages": ", ".join(packages),
        "processors": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "GPUs": ", ".join(gpus) or "none that torch can use",
    }


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

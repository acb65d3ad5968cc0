"""Trained classifiers by others, rebuilt from their published state dictionaries: the targets of the attack benchmarks.

The weights are not part of the project. Put them into one folder (``--models``) under the names below:

- ``mnist_trades_smallcnn.pt``: TRADES (Zhang et al., 2019), MIT
- ``mnist_provable_cnn4.pth``: Wong and Kolter (2018), MIT
- ``cifar10_resnet2b.pth``: alpha-beta-CROWN's benchmark network, adversarially trained, BSD-3-Clause
- ``cifar10_resnet20_clean.th``: akamaster's ResNet-20, trained without attacks, BSD-2-Clause
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarobust.data import LabelledImages, load, load_npz
from metarobust.models import Normalize


class _SmallCNN(nn.Module):
    """Four unpadded 3x3 convolutions and three linear layers; the attribute names are those of the state dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 32, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, 3),
                relu2=nn.ReLU(),
                maxpool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32, 64, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, 3),
                relu4=nn.ReLU(),
                maxpool2=nn.MaxPool2d(2),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(1024, 200),
                relu1=nn.ReLU(),
                drop=nn.Dropout(0.5),
                fc2=nn.Linear(200, 200),
                relu2=nn.ReLU(),
                fc3=nn.Linear(200, 10),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.feature_extractor(x).flatten(1))


class _Residual(nn.Module):
    """Two 3x3 convolutions round a shortcut; ``normalised`` adds BatchNorm after each convolution."""

    def __init__(self, channels: tuple[int, int], stride: int, shortcut: nn.Module, *, normalised: bool) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(first, second, 3, stride=stride, padding=1, bias=not normalised)
        self.bn1 = nn.BatchNorm2d(second) if normalised else nn.Identity()
        self.conv2 = nn.Conv2d(second, second, 3, padding=1, bias=not normalised)
        self.bn2 = nn.BatchNorm2d(second) if normalised else nn.Identity()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class _ResNet2B(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        shrink = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2))
        self.layer1 = nn.Sequential(
            _Residual((8, 16), 2, shrink, normalised=False),
            _Residual((16, 16), 1, nn.Sequential(), normalised=False),
        )
        self.linear1 = nn.Linear(1024, 100)
        self.linear2 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(self.layer1(F.relu(self.conv1(x))).flatten(1))))


class _PaddedShortcut(nn.Module):
    """Option A of He et al. (2016): every second pixel, and zeros for the new channels."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))


class _ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = self._stage(16, 16), self._stage(16, 32), self._stage(32, 64)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(before: int, width: int) -> nn.Sequential:
        shrink = nn.Sequential() if before == width else _PaddedShortcut(width - before)
        first = _Residual((before, width), 1 if before == width else 2, shrink, normalised=True)
        return nn.Sequential(first, *(_Residual((width, width), 1, nn.Sequential(), normalised=True) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _provable_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A published classifier: its file, its data, the l_inf radius it is judged at, and how to rebuild it."""

    file: str
    data: str
    epsilon: float
    build: Callable[[], nn.Module]
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def load(self, folder: str | Path) -> nn.Module:
        """The network in evaluation mode, parameters frozen; inputs in [0, 1]."""
        content: Any = torch.load(Path(folder) / self.file, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content)
        model = self.build()
        model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
        if self.statistics is not None:
            mean, std = self.statistics
            model = nn.Sequential(Normalize(mean, std), model)
        return model.eval().requires_grad_(False)


CLASSIFIERS = {
    "mnist-trades": Classifier(file="mnist_trades_smallcnn.pt", data="mnist", epsilon=0.3, build=_SmallCNN),
    "mnist-provable": Classifier(file="mnist_provable_cnn4.pth", data="mnist", epsilon=0.1, build=_provable_cnn),
    "cifar10-resnet2b": Classifier(
        file="cifar10_resnet2b.pth", data="cifar10", epsilon=2 / 255, build=_ResNet2B, statistics=CIFAR10_STATISTICS
    ),
    "cifar10-resnet20-clean": Classifier(
        file="cifar10_resnet20_clean.th", data="cifar10", epsilon=8 / 255, build=_ResNet20, statistics=IMAGENET_STATISTICS
    ),
}


def first_test_images(name: str, root: str | Path | None, examples: int) -> LabelledImages:
    """The first test images of ``"mnist"`` or ``"cifar10"``; the CIFAR-10 subset, when the root holds it instead."""
    root = root or os.environ.get("METAROBUST_DATA") or "."
    subset = Path(root) / "cifar10-exact-subset" / "cifar10_test_exact_first1000.npz"
    whole = load_npz(subset) if name == "cifar10" and subset.exists() else load(name, train=False, root=root)
    return whole.select(torch.arange(min(examples, len(whole))))

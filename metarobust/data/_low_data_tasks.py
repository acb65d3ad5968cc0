"""Low-data tasks: small, class-balanced training sets drawn from a larger pool through learn2learn's task sampling."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metarobust._checks import message, require
from metarobust.data._global_randomness import global_randomness_from
from metarobust.data._labelled_images import LabelledImages, check_dataset
from metarobust.data._learn2learn import import_learn2learn
from metarobust.data._splits import check_cpu_generator


@dataclass(frozen=True, kw_only=True)
class LowDataTasks:
    """A distribution over small training sets: exactly `examples` rows of a pool, class-balanced, without replacement.

    learn2learn draws ``ceil(examples / num_classes)`` rows of every class. When that is more than `examples` in all,
    the surplus is dropped at random, at most one row per class: the class counts of a task differ by at most one. The
    rows come in random order. learn2learn draws with Python's `random`, here seeded from the caller's generator, so one
    seed means one task for as long as Python keeps its sampling algorithm.

    Args:
        dataset: the pool.
        examples: rows per task, at least 1; or an inclusive range ``(low, high)`` from which each task draws its size
            uniformly.

    Raises:
        TypeError: `examples` is neither an integer nor a pair of integers.
        ValueError: `examples` is below 1, or a range that is empty, or more than the rarest class can serve.

    Example:
        >>> data = LabelledImages(torch.rand(60, 1, 8, 8), torch.arange(60) % 10, num_classes=10)
        >>> task = LowDataTasks(dataset=data, examples=20).sample(torch.Generator().manual_seed(0))
        >>> task.labels.bincount().tolist()
        [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """

    dataset: LabelledImages
    examples: int | tuple[int, int]
    _tasksets: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_dataset(self.dataset)
        bounds = self._size_range
        expected, remedy = "an integer >= 1 or a range (low, high)", "write examples=100 or examples=(50, 200)"
        if len(bounds) != 2 or any(isinstance(bound, bool) or not isinstance(bound, int) for bound in bounds):
            raise TypeError(message("examples", expected, repr(self.examples), remedy))
        low, high = bounds
        require(1 <= low <= high, "examples", expected + " with 1 <= low <= high", self.examples, remedy)
        counts = self.dataset.labels.bincount(minlength=self.dataset.num_classes)
        rarest = int(counts.argmin())
        available, needed = int(counts[rarest]), self._rows_per_class(high)
        require(
            needed <= available,
            "examples",
            f"at most {available * self.dataset.num_classes} here, where class {rarest} has {available} rows",
            f"{self.examples}, which takes {needed} rows of every class",
            "write a smaller number, or pass a data set with more rows of that class",
        )

    def sample(self, generator: torch.Generator) -> LabelledImages:
        """Draw one task.

        Args:
            generator: CPU generator, the only source of randomness; it moves on, so the next call draws another task.

        Returns:
            The rows of the task, on the device of the data set, with the `num_classes` of the data set.

        Raises:
            ImportError: learn2learn is not installed.
            ValueError: the generator is not on the CPU.
        """
        return self.dataset.select(self.sample_indices(generator))

    def sample_indices(self, generator: torch.Generator) -> Tensor:
        """Draw one task as row numbers of the data set; `sample` with the same generator state holds these rows.

        Args:
            generator: as for `sample`.

        Returns:
            int64 [examples] on the CPU, distinct, in [0, len(dataset)).

        Raises:
            ImportError: learn2learn is not installed.
            ValueError: the generator is not on the CPU.
        """
        check_cpu_generator(generator)
        low, high = self._size_range
        size = int(torch.randint(low, high + 1, (), generator=generator))
        rows_per_class = self._rows_per_class(size)
        taskset = self._taskset(rows_per_class)
        with global_randomness_from(generator):
            indices, labels = taskset.sample()
        by_class = indices[labels.argsort(stable=True)].view(self.dataset.num_classes, rows_per_class)
        keep = torch.ones_like(by_class, dtype=torch.bool)
        keep[torch.randperm(len(by_class), generator=generator)[: by_class.numel() - size], 0] = False
        kept = by_class[keep]
        return kept[torch.randperm(len(kept), generator=generator)]

    @property
    def _size_range(self) -> tuple[int, int]:
        return self.examples if isinstance(self.examples, tuple) else (self.examples, self.examples)

    def _rows_per_class(self, size: int) -> int:
        return -(-size // self.dataset.num_classes)

    @cached_property
    def _meta_dataset(self) -> Any:
        rows_of_class: dict[int, list[int]] = {label: [] for label in range(self.dataset.num_classes)}
        rows = _NumberedRows(self.dataset.labels.tolist())
        for row, label in enumerate(rows.labels):
            rows_of_class[label].append(row)
        return import_learn2learn().data.MetaDataset(rows, labels_to_indices=rows_of_class)

    def _taskset(self, rows_per_class: int) -> Any:
        if rows_per_class not in self._tasksets:
            data, meta_dataset = import_learn2learn().data, self._meta_dataset
            # The fused transform is NWays, then KShots, without a pass over the whole pool for each task.
            choose = data.transforms.FusedNWaysKShots(meta_dataset, n=self.dataset.num_classes, k=rows_per_class)
            load = data.transforms.LoadData(meta_dataset)
            self._tasksets[rows_per_class] = data.Taskset(meta_dataset, [choose, load])
        return self._tasksets[rows_per_class]


class _NumberedRows(torch.utils.data.Dataset[tuple[int, int]]):
    """Row number and label instead of pixels: learn2learn chooses rows, and the images are then indexed once."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)

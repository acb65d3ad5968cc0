"""The parts of the data that ``metarobust train`` works with: to train on, to learn weights on, to choose the best epoch by."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metarobust._randomness import generator_for
from metarobust.command_line._points import read_points
from metarobust.command_line._train import parse_held_out, parse_robust_classes
from metarobust.command_line._train_checks import META_SET
from metarobust.data import LabelledImages, long_tail, noise_matrix, split, split_meta, with_label_noise

if TYPE_CHECKING:
    from metarobust.command_line._train import Train

META_PER_CLASS = 20
"""Examples of each class in the meta set where the data are large enough."""
META_SHARE = 4
"""Of so many examples of the rarest class, one goes into the meta set at most, unless the flags say otherwise."""
SHOWN = 10
"""Classes whose sizes are printed one by one."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Disjoint parts of the training data.

    Attributes:
        train: thinned out and mislabelled as the flags say.
        true_labels: of ``train``, int64 ``[n]``, before the noise; no objective sees them.
        held_out: clean, with the class shares of the data.
        meta: clean, each class equally often; None for an objective that needs none, unless the flags hold one back.
    """

    train: LabelledImages
    true_labels: Tensor
    held_out: LabelledImages
    meta: LabelledImages | None

    @property
    def wrong(self) -> Tensor:
        """Which labels of ``train`` are not the true ones, bool ``[n]``."""
        return self.train.labels != self.true_labels

    @property
    def labelled_counts(self) -> list[int]:
        """Examples of each class in ``train``, as they are labelled."""
        return self.train.labels.bincount(minlength=self.train.num_classes).tolist()

    @property
    def class_counts(self) -> list[int]:
        """Examples of each class in ``train`` in truth."""
        return self.true_labels.bincount(minlength=self.train.num_classes).tolist()

    def sizes(self) -> str:
        """How many examples there are of each kind, in words."""
        told = f"{len(self.train):,} examples to train on"
        if self.meta is not None:
            told += f", {len(self.meta):,} meta-examples ({len(self.meta) // self.meta.num_classes} of each class)"
        return f"{told}, {len(self.held_out):,} held out"

    def scenario(self, flags: "Train") -> list[str]:
        """A line each for the long tail and for the noise, if there is one."""
        lines, sizes = [], [f"{count:,}" for count in sorted(self.class_counts, reverse=True)]
        if flags.imbalance is not None:
            if len(sizes) > SHOWN:
                sizes[SHOWN // 2 : -SHOWN // 2] = ["..."]
            lines.append(f"examples of a class from head to tail: {', '.join(sizes)}")
        if flags.noise is not None:
            share = float(self.wrong.double().mean())
            lines.append(f"wrong labels among those to train on: {share:.1%} ({flags.noise} noise of rate {flags.noise_rate:g})")
        return lines

    def record(self) -> dict[str, Any]:
        """The same for the file of the run."""
        return {
            "train": len(self.train),
            "meta": None if self.meta is None else len(self.meta),
            "held_out": len(self.held_out),
            "class_counts": self.class_counts,
            "labelled_counts": self.labelled_counts,
            "wrong_labels": int(self.wrong.sum()),
        }


def read_training_data(flags: "Train") -> LabelledImages:
    """The training part of the named data set or the .npz file, cut to the first ``--examples``."""
    data = read_points(flags.data, part=flags.part, root=flags.root, download=flags.download, examples=flags.examples)
    classes = parse_robust_classes(flags.robust_classes) or ()
    missing = sorted(set(classes) - set(data.labels.tolist()))
    if missing:
        known = ", ".join(map(str, sorted(set(data.labels.tolist()))))
        raise ValueError(f"--robust-classes must be among those of the data, {known}, got {', '.join(map(str, missing))}")
    return data


def divided(flags: "Train", data: LabelledImages) -> Parts:
    """The parts, each a function of the seed: first what is held out, then the meta set, and the rest is changed at last.

    So what is held out is the same for all scenarios and objectives, and clean, and so is the meta set.
    """
    held_out = parse_held_out(flags.validation)
    count = max(1, round(held_out * len(data))) if isinstance(held_out, float) else held_out
    if count >= len(data):
        raise ValueError(f"--validation must leave examples to train on, got {flags.validation} of {len(data)}")
    train, validation = split(data, (len(data) - count, count), generator=generator_for(flags.seed, "validation split", 0))
    meta = None
    if flags.loss in META_SET or flags.meta_per_class is not None:
        train, meta = split_meta(train, _meta_per_class(flags, train), generator=generator_for(flags.seed, "meta set", 0))
    if flags.imbalance is not None:
        try:
            train = long_tail(train, factor=flags.imbalance, generator=generator_for(flags.seed, "long tail", 0))
        except ValueError as error:
            raise ValueError(f"--imbalance: {error}") from error
    true_labels = train.labels
    if flags.noise is not None:
        train = _mislabelled(flags, train)
    return Parts(train=train, true_labels=true_labels, held_out=validation, meta=meta)


def _meta_per_class(flags: "Train", train: LabelledImages) -> int:
    """As given, or as the data allow: every class keeps an example to train on."""
    counts = train.labels.bincount(minlength=train.num_classes)
    rarest = int(counts.argmin())
    most = int(counts[rarest]) - 1
    if most < 1:
        expected = f"have two examples of every class for {flags.objective}, one for its meta set and one to train on"
        got = f"{most + 1} of class {rarest} beside those that --validation holds out"
        raise ValueError(f"--data must {expected}, got {got}; take more examples, or a smaller --validation")
    found = flags.meta_per_class
    if found is None:
        return min(META_PER_CLASS, max(1, (most + 1) // META_SHARE))
    if found > most:
        expected = f"at most {most} here, so that one of the {most + 1} examples of class {rarest} stays to train on"
        raise ValueError(f"--meta-per-class must be {expected}, got {found}; pass a smaller one, or take more examples")
    return found


def _mislabelled(flags: "Train", train: LabelledImages) -> LabelledImages:
    """The same images with the labels that the noise gives them."""
    assert flags.noise is not None
    assert flags.noise_rate is not None
    classes = generator_for(flags.seed, "confused classes", 0)
    try:
        matrix = noise_matrix(flags.noise, flags.noise_rate, train.num_classes, generator=classes)
    except ValueError as error:
        raise ValueError(f"--noise: {error}") from error
    return with_label_noise(train, matrix, generator=generator_for(flags.seed, "label noise", 0)).data

"""Data: labelled images in [0, 1], the pools they are split into, and the low-data tasks that are sampled from them.

Every loader returns a `LabelledImages`: float32 images [n, channels, height, width] with pixel values in [0, 1] and
int64 labels [n]. Nothing here normalises; statistics live inside the model. Every random choice comes from a seed or a
generator that the caller gives, and no global random state changes.
"""

from metarobust.data._arrays import load_npz
from metarobust.data._batches import minibatch
from metarobust.data._digits import Pools, digits_pools, load_digits
from metarobust.data._label_noise import NoisyLabels, noise_matrix, with_label_noise
from metarobust.data._labelled_images import LabelledImages
from metarobust.data._learn2learn import import_learn2learn
from metarobust.data._long_tail import long_tail
from metarobust.data._low_data_tasks import LowDataTasks
from metarobust.data._meta_set import split_meta
from metarobust.data._splits import split
from metarobust.data._torchvision import load

__all__ = [
    "LabelledImages",
    "LowDataTasks",
    "NoisyLabels",
    "Pools",
    "digits_pools",
    "import_learn2learn",
    "load",
    "load_digits",
    "load_npz",
    "long_tail",
    "minibatch",
    "noise_matrix",
    "split",
    "split_meta",
    "with_label_noise",
]

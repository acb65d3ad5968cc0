"""Data: containers and their checks, pools, loaders, low-data tasks, minibatches, and no disturbed global state."""

import ast
import gzip
import hashlib
import importlib
import importlib.util
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metarobust import data
from metarobust.data import LabelledImages, LowDataTasks
from metarobust.data._learn2learn import INSTALL_LINE, _stand_ins_for_gym

MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(n=60, classes=10):
    """Row i carries its own number in its pixels, so a row can be recognised wherever it goes."""
    images = (torch.arange(n) / n).reshape(n, 1, 1, 1).expand(n, 1, 2, 2).clone()
    return LabelledImages(images, torch.arange(n) % classes, num_classes=classes)


def row_numbers(rows, n):
    return (rows.images[:, 0, 0, 0] * n).round().long()


@pytest.fixture
def untouched_global_randomness():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


# LabelledImages ------------------------------------------------------------------------------------------------------


def test_select_takes_rows_in_the_order_asked_for():
    rows = toy().select(torch.tensor([7, 3, 3]))
    assert len(rows) == 3
    assert row_numbers(rows, 60).tolist() == [7, 3, 3]
    assert rows.labels.tolist() == [7, 3, 3]
    assert rows.num_classes == 10


def test_to_moves_both_tensors():
    moved = toy().to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"


def test_repr_is_one_line_for_a_log():
    assert repr(toy()) == "LabelledImages(images=float32 [60, 1, 2, 2] on cpu, num_classes=10)"


def test_an_empty_data_set_is_one():
    assert len(LabelledImages(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), 10)) == 0


ZEROS = torch.zeros(2, 1, 4, 4)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "error", "text"),
    [
        (ZEROS.byte(), LABELS, 2, TypeError, r"got dtype uint8; for 8-bit images write images.float\(\) / 255"),
        (ZEROS.numpy(), LABELS, 2, TypeError, r"images must be a tensor, .* got ndarray; write torch.from_numpy\(images\)$"),
        (ZEROS.tolist(), LABELS, 2, TypeError, r"got list; write torch.tensor\(images\)$"),
        (ZEROS, LABELS.numpy(), 2, TypeError, r"labels must be .* got ndarray; write torch.from_numpy\(labels\).long\(\)$"),
        (ZEROS[:, 0], LABELS, 2, ValueError, r"got \[2, 4, 4\]; .*images.unsqueeze\(1\)"),
        (ZEROS + 2, LABELS, 2, ValueError, r"in \[0, 1\], got values from 2 to 2; write images / 255"),
        (ZEROS - 1, LABELS, 2, ValueError, r"got values from -1 to -1"),
        (ZEROS * float("nan"), LABELS, 2, ValueError, r"finite and in \[0, 1\], got values from nan"),
        (ZEROS + float("inf"), LABELS, 2, ValueError, r"got values from inf"),
        (
            ZEROS,
            LABELS.float(),
            10,
            TypeError,
            r"labels must be integers \(torch.int64\) in \[0, 10\), got dtype float32; write labels.long\(\)",
        ),
        (ZEROS, LABELS[:1], 2, ValueError, r"one label per image, got \[1\]"),
        (ZEROS, LABELS, 1, ValueError, r"in \[0, 1\), got values from 0 to 1"),
        (ZEROS, LABELS - 1, 2, ValueError, r"got values from -1 to 0; number the classes from 0"),
        (ZEROS, LABELS.to("meta"), 2, ValueError, r"on the device of the images, cpu, got meta"),
        (ZEROS, LABELS, 0, ValueError, r"num_classes must be an integer >= 1, got 0"),
        (ZEROS, LABELS, 2.0, TypeError, r"num_classes must be an integer >= 1, got 2.0"),
    ],
)
def test_bad_images_and_labels_are_refused_with_a_remedy(images, labels, num_classes, error, text):
    with pytest.raises(error, match=text):
        LabelledImages(images, labels, num_classes)


def test_a_mask_is_refused_as_indices():
    with pytest.raises(TypeError, match=r"got dtype bool and shape \[60\]; for a mask write mask.nonzero"):
        toy().select(toy().labels == 3)


# digits and splits ---------------------------------------------------------------------------------------------------


def test_digits_are_the_sixteen_levels_of_scikit_learn():
    digits = data.load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.float32
    assert torch.equal(digits.images * 16, (digits.images * 16).round())
    assert digits.images.max() == 1
    assert digits.labels[:10].tolist() == list(range(10))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pools_are_disjoint_exact_and_stratified(seed, untouched_global_randomness):
    digits, pools = data.load_digits(), data.digits_pools(seed)
    assert [len(pool) for pool in pools] == [700, 400, 697]
    # No two digits are the same image, so equal multisets of images mean disjoint pools that cover everything.
    found = torch.cat([pool.images for pool in pools]).flatten(1).unique(dim=0)
    assert torch.equal(found, digits.images.flatten(1).unique(dim=0))
    assert len(found) == 1797
    for pool in pools:
        share = digits.labels.bincount() * len(pool) / 1797
        assert (pool.labels.bincount() - share).abs().max() <= 2


def test_a_seed_fixes_the_pools_and_another_changes_them():
    assert torch.equal(data.digits_pools(3).target.images, data.digits_pools(3).target.images)
    assert not torch.equal(data.digits_pools(3).target.images, data.digits_pools(4).target.images)


def test_digits_by_name_share_the_test_pool():
    pools = data.digits_pools(0)
    assert torch.equal(data.load("digits", train=False).images, pools.test.images)
    training = data.load("digits", train=True)
    assert torch.equal(training.images, torch.cat([pools.meta_train.images, pools.target.images]))


def test_split_keeps_pixels_and_labels_together():
    parts = data.split(toy(), (30, 20), generator=seeded())
    numbers = torch.cat([row_numbers(part, 60) for part in parts])
    assert len(numbers.unique()) == 50
    assert torch.equal(numbers % 10, torch.cat([part.labels for part in parts]))
    assert parts[0].labels.bincount().tolist() == [3] * 10


def test_split_serves_a_long_tail():
    labels = torch.cat([torch.zeros(90, dtype=torch.int64), torch.ones(10, dtype=torch.int64)])
    dataset = LabelledImages(torch.zeros(100, 1, 2, 2), labels, num_classes=3)
    half, rest = data.split(dataset, (50, 50), generator=seeded())
    assert half.labels.bincount(minlength=3).tolist() == rest.labels.bincount(minlength=3).tolist() == [45, 5, 0]


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((50, 11), r"sizes must be of a sum of at most 60.*write smaller sizes"),
        ((-1, 5), r"each of sizes must be an integer >= 0, got -1"),
    ],
)
def test_impossible_sizes_are_refused(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.split(toy(), sizes, generator=seeded())


# minibatches ---------------------------------------------------------------------------------------------------------


def test_minibatch_draws_distinct_rows_from_its_generator(untouched_global_randomness):
    generator = seeded()
    first, second = (row_numbers(data.minibatch(toy(), 16, generator=generator), 60) for _ in range(2))
    assert len(first.unique()) == 16
    assert not torch.equal(first, second)
    assert torch.equal(first, row_numbers(data.minibatch(toy(), 16, generator=seeded()), 60))


@pytest.mark.parametrize("size", [60, 1000])
def test_a_minibatch_at_least_as_large_as_the_data_is_a_permutation(size):
    numbers = row_numbers(data.minibatch(toy(), size, generator=seeded()), 60)
    assert numbers.sort().values.tolist() == list(range(60))
    assert numbers.tolist() != list(range(60))


def test_minibatch_refuses_size_zero():
    with pytest.raises(ValueError, match="size must be an integer >= 1, got 0"):
        data.minibatch(toy(), 0, generator=seeded())


# learn2learn ---------------------------------------------------------------------------------------------------------


def test_stand_ins_for_gym_come_and_go():
    if importlib.util.find_spec("gym") is not None:
        pytest.skip("gym is installed here, so no stand-ins are made")
    with _stand_ins_for_gym():
        assert hasattr(importlib.import_module("gym.core"), "Env")
    assert not [name for name in sys.modules if name.partition(".")[0] == "gym"]


def test_an_installed_gym_is_not_shadowed(tmp_path, monkeypatch):
    if "gym" in sys.modules:
        pytest.skip("gym is loaded already, which no stand-in can replace")
    (tmp_path / "gym").mkdir()
    (tmp_path / "gym" / "__init__.py").write_text("genuine = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with _stand_ins_for_gym():
            assert importlib.import_module("gym").genuine
        assert "gym" in sys.modules
    finally:
        # Not monkeypatch.delitem, which would put the module back at the end.
        sys.modules.pop("gym", None)


def test_a_missing_learn2learn_is_one_sentence_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    with pytest.raises(ImportError, match="the module 'learn2learn' is missing") as caught:
        data.import_learn2learn()
    assert INSTALL_LINE in str(caught.value)
    assert "learn2learn==0.2.0 --no-deps" in INSTALL_LINE
    assert "\n" not in str(caught.value)


def test_torchvision_and_learn2learn_are_imported_only_where_they_are_used():
    for file in Path(data.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                lazy = {"torchvision", "learn2learn", "sklearn"} & set(ast.unparse(node).replace(".", " ").split())
                assert not lazy, f"{file.name}: write `{ast.unparse(node)}` inside the function that needs it"


needs_learn2learn = pytest.mark.skipif(importlib.util.find_spec("learn2learn") is None, reason="learn2learn is not installed")


@needs_learn2learn
def test_import_leaves_no_stand_in_and_no_randomness_behind(untouched_global_randomness):
    real_gym = importlib.util.find_spec("gym") is not None
    module = data.import_learn2learn()
    assert hasattr(module.data, "Taskset")
    assert data.import_learn2learn() is module
    assert real_gym or not [name for name in sys.modules if name.partition(".")[0] == "gym"]


@needs_learn2learn
@pytest.mark.parametrize("examples", [1, 7, 10, 20, 25, 59, 60])
def test_a_task_has_exactly_its_size_and_balanced_classes(examples):
    tasks = LowDataTasks(dataset=toy(), examples=examples)
    generator = seeded()
    for _ in range(5):
        task = tasks.sample(generator)
        counts = task.labels.bincount(minlength=10)
        assert len(task) == len(row_numbers(task, 60).unique()) == examples
        assert counts.max() - counts.min() <= 1
        assert torch.equal(row_numbers(task, 60) % 10, task.labels)


@needs_learn2learn
def test_a_task_depends_on_the_generator_alone(untouched_global_randomness):
    tasks = LowDataTasks(dataset=toy(), examples=25)
    generator = seeded(5)
    first, second = tasks.sample_indices(generator), tasks.sample_indices(generator)
    again = LowDataTasks(dataset=toy(), examples=25)
    assert torch.equal(first, again.sample_indices(seeded(5)))
    assert torch.equal(first, row_numbers(again.sample(seeded(5)), 60))
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64


@needs_learn2learn
def test_global_seeds_do_not_change_a_task():
    tasks, states = LowDataTasks(dataset=toy(), examples=25), (random.getstate(), torch.get_rng_state())
    try:
        random.seed(1)
        one = tasks.sample_indices(seeded())
        random.seed(2)
        assert torch.equal(one, tasks.sample_indices(seeded()))
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])


def test_global_states_come_back_after_an_error(untouched_global_randomness):
    from metarobust.data._global_randomness import global_randomness_from

    def use_and_fail():
        with global_randomness_from(seeded()):
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use_and_fail()


@needs_learn2learn
def test_a_range_reaches_both_ends_and_every_row():
    tasks, generator = LowDataTasks(dataset=toy(), examples=(9, 12)), seeded()
    drawn = [tasks.sample_indices(generator) for _ in range(80)]
    assert {len(task) for task in drawn} == {9, 10, 11, 12}
    assert len(torch.cat(drawn).unique()) == 60


@needs_learn2learn
def test_the_dropped_surplus_is_spread_over_the_classes():
    tasks, generator = LowDataTasks(dataset=toy(), examples=9), seeded()
    absent = [set(range(10)) - set(tasks.sample(generator).labels.tolist()) for _ in range(80)]
    assert all(len(classes) == 1 for classes in absent)
    assert set.union(*absent) == set(range(10))


@pytest.mark.parametrize(
    ("examples", "error", "text"),
    [
        (0, ValueError, r"examples must be an integer >= 1 or a range .* got 0; write examples=100"),
        ((20, 10), ValueError, r"1 <= low <= high, got \(20, 10\)"),
        (61, ValueError, r"at most 60 here, where class 0 has 6 rows, got 61, which takes 7 rows of every class"),
        ((10, 70), ValueError, r"at most 60 here"),
        (10.0, TypeError, r"got 10.0; write examples=100"),
        ((10,), TypeError, r"got \(10,\)"),
        (True, TypeError, r"got True"),
    ],
)
def test_impossible_tasks_are_refused_before_the_first_draw(examples, error, text):
    with pytest.raises(error, match=text):
        LowDataTasks(dataset=toy(), examples=examples)


def test_the_repr_of_tasks_is_a_log_entry():
    assert repr(LowDataTasks(dataset=toy(), examples=(9, 12))) == f"LowDataTasks(dataset={toy()!r}, examples=(9, 12))"


# .npz ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 1), (4, 5, 6, 3)])
def test_bytes_survive_the_round_trip_through_npz(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([2, 0, 1, 2], dtype=np.uint8), index=np.arange(4))
    loaded = data.load_npz(tmp_path / "a.npz")
    assert loaded.num_classes == 3
    assert loaded.labels.tolist() == [2, 0, 1, 2]
    assert loaded.images.dtype == torch.float32
    assert loaded.images.shape == (4, *(shape[3:] or (1,)), 5, 6)
    back = (loaded.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back.reshape(shape), images)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_floats_in_the_unit_interval_are_taken_as_they_are(tmp_path, dtype):
    np.savez(tmp_path / "a.npz", images=np.full((2, 3, 3), 0.25, dtype=dtype), labels=np.array([0, 1]))
    loaded = data.load_npz(str(tmp_path / "a.npz"), num_classes=5)
    assert loaded.num_classes == 5
    assert torch.equal(loaded.images, torch.full((2, 1, 3, 3), 0.25))


GREY = np.zeros((2, 3, 3), dtype=np.uint8)
TWO = np.array([0, 1])


@pytest.mark.parametrize(
    ("arrays", "error", "text"),
    [
        ({"x": GREY, "y": TWO}, KeyError, r"named 'images' and 'labels', got \['x', 'y'\]"),
        ({"images": GREY + 0.5, "labels": TWO * 1.0}, TypeError, r"labels must be integers, got dtype float64"),
        ({"images": GREY.astype(int), "labels": TWO}, TypeError, r"got dtype int64 in .*images.astype\(numpy.uint8\)"),
        ({"images": GREY + 1.5, "labels": TWO}, ValueError, r"in \[0, 1\], got values from 1.5 to 1.5"),
        ({"images": GREY + 1e300, "labels": TWO}, ValueError, r"got values from inf"),
        ({"images": GREY * np.nan, "labels": TWO}, ValueError, r"finite and in \[0, 1\], got values from nan"),
        ({"images": GREY, "labels": TWO + 1}, ValueError, r"in \[0, 2\), got values from 1 to 2"),
        ({"images": GREY, "labels": TWO - 1}, ValueError, r"got values from -1 to 0"),
        ({"images": GREY, "labels": TWO[:1]}, ValueError, r"one label per image, got \[1\]"),
        ({"images": np.zeros((2, 3, 8, 8)), "labels": TWO}, ValueError, r"images.transpose\(0, 2, 3, 1\)"),
        ({"images": np.array([GREY, None], dtype=object), "labels": TWO}, ValueError, r"plain numeric arrays"),
    ],
)
def test_bad_archives_are_refused_with_a_remedy(tmp_path, arrays, error, text):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(error, match=text):
        data.load_npz(tmp_path / "a.npz", num_classes=2)


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.npz, which does not exist; write it with numpy.savez"):
        data.load_npz(tmp_path / "none.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps({"images": 1}))
    with pytest.raises(ValueError, match=r"b.npz, which is of another kind"):
        data.load_npz(tmp_path / "b.npz")


# torchvision ---------------------------------------------------------------------------------------------------------


def idx_file(array):
    """The bytes of the format that MNIST is kept in: element type, number of axes, big-endian lengths, elements."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()


@pytest.fixture
def small_mnist(monkeypatch):
    """Four files in the format of MNIST, with eight training and five test images, known to torchvision by checksum."""
    from torchvision import datasets

    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, shape, dtype=np.uint8) if len(shape) > 1 else np.arange(shape[0], dtype=np.uint8)
        for shape in [(8, 28, 28), (8,), (5, 28, 28), (5,)]
    ]
    files = dict(zip(MNIST_FILES, arrays, strict=True))
    archives = {f"{name}.gz": gzip.compress(idx_file(array)) for name, array in files.items()}
    sums = [(name, hashlib.md5(archive).hexdigest()) for name, archive in archives.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["unreachable:/"])
    return files, archives


def write_all(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_from_a_root_and_leaves_it_as_it_was(tmp_path, monkeypatch, small_mnist, packed):
    files, archives = small_mnist
    raw = tmp_path / "MNIST" / "raw"
    write_all(raw, archives if packed else {name: idx_file(array) for name, array in files.items()})
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("METAROBUST_DATA", str(tmp_path))
    training, test = data.load("mnist", train=True), data.load("mnist", train=False, root=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert np.array_equal((training.images[:, 0] * 255).round().byte().numpy(), files[MNIST_FILES[0]])
    assert np.array_equal((test.images[:, 0] * 255).round().byte().numpy(), files[MNIST_FILES[2]])
    assert test.labels.tolist() == [0, 1, 2, 3, 4]
    assert test.num_classes == 10


def test_a_damaged_archive_counts_as_missing(tmp_path, small_mnist):
    _, archives = small_mnist
    write_all(tmp_path / "MNIST" / "raw", archives | {f"{MNIST_FILES[3]}.gz": b"damaged"})
    with pytest.raises(FileNotFoundError, match="has no intact copy of it"):
        data.load("mnist", train=False, root=tmp_path)


@pytest.mark.parametrize(("name", "label_key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_becomes_channels_first(tmp_path, monkeypatch, name, label_key):
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    batch = pickle.dumps({"data": pixels, label_key: [1, 0, 2]}, protocol=2)
    names = pickle.dumps({kind.meta["key"]: ["a", "b", "c"]}, protocol=2)
    write_all(tmp_path / kind.base_folder, {"train": batch, "test": batch, "names": names})
    for attribute, file in (("train_list", "train"), ("test_list", "test")):
        monkeypatch.setattr(kind, attribute, [[file, hashlib.md5(batch).hexdigest()]])
    meta = {"filename": "names", "key": kind.meta["key"], "md5": hashlib.md5(names).hexdigest()}
    monkeypatch.setattr(kind, "meta", meta)
    loaded = data.load(name, train=False, root=tmp_path)
    assert np.array_equal((loaded.images * 255).round().byte().numpy(), pixels.reshape(3, 3, 32, 32))
    assert loaded.labels.tolist() == [1, 0, 2]
    assert loaded.num_classes == 3


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_missing_data_says_what_to_write(tmp_path, monkeypatch, name):
    monkeypatch.setenv("METAROBUST_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"holds {name}, got .*write download=True .* METAROBUST_DATA"):
        data.load(name, train=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"name must be one of 'digits', 'mnist', .* got 'imagenet'"):
        data.load("imagenet", train=True)


def original_bytes(folder, file, header):
    """Elements of an original MNIST file under METAROBUST_DATA, packed or not; skips where there is none."""
    root = os.environ.get("METAROBUST_DATA")
    if not root:
        pytest.skip("METAROBUST_DATA names no data root")
    path = Path(root) / folder / "raw" / file
    if path.is_file():
        content = path.read_bytes()
    elif path.with_name(f"{file}.gz").is_file():
        content = gzip.decompress(path.with_name(f"{file}.gz").read_bytes())
    else:
        pytest.skip(f"METAROBUST_DATA holds no {folder}")
    return np.frombuffer(content, dtype=np.uint8, offset=header)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_original_files_are_loaded_byte_by_byte(name, folder):
    pixels, labels = original_bytes(folder, MNIST_FILES[2], 16), original_bytes(folder, MNIST_FILES[3], 8)
    test = data.load(name, train=False)
    assert len(test) == 10_000
    assert np.array_equal((test.images * 255).round().byte().numpy().ravel(), pixels)
    assert np.array_equal(test.labels.numpy(), labels)


def test_download_unpacks_the_archives_that_are_there(tmp_path):
    original_bytes("MNIST", MNIST_FILES[3], 8)
    raw = Path(os.environ["METAROBUST_DATA"], "MNIST", "raw")
    if not all((raw / f"{file}.gz").is_file() for file in MNIST_FILES):
        pytest.skip("METAROBUST_DATA holds MNIST without its archives")
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for file in MNIST_FILES:
        shutil.copyfile(raw / f"{file}.gz", tmp_path / "MNIST" / "raw" / f"{file}.gz")
    training = data.load("mnist", train=True, root=tmp_path, download=True)
    assert training.images.shape == (60_000, 1, 28, 28)
    assert (tmp_path / "MNIST" / "raw" / MNIST_FILES[0]).is_file()

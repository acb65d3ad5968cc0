"""Data scenarios: counts of a long tail, matrices and draws of label noise, clean and balanced meta sets."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metarobust import data
from metarobust.data import LabelledImages

KINDS = ("uniform", "flip1", "flip2", "pair")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(n=600, classes=10):
    """Row i carries its own number in its pixels, so a row can be recognised wherever it goes; classes take turns."""
    return of_labels(torch.arange(n) % classes, classes)


def of_labels(labels, classes):
    n = len(labels)
    images = (torch.arange(n) / max(n, 1)).reshape(n, 1, 1, 1)
    return LabelledImages(images, labels, num_classes=classes)


def of_counts(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return of_labels(labels[torch.randperm(len(labels), generator=seeded(99))], len(counts))


def row_numbers(rows, n):
    return (rows.images[:, 0, 0, 0].double() * n).round().long()


def counts_of(rows):
    return rows.labels.bincount(minlength=rows.num_classes).tolist()


def assert_rows_of(rows, dataset):
    """The rows are rows of the data set: each image comes once, with its own label."""
    numbers = row_numbers(rows, len(dataset))
    assert len(numbers.unique()) == len(numbers)
    assert torch.equal(dataset.labels[numbers], rows.labels)
    assert torch.equal(dataset.images[numbers], rows.images)
    assert rows.num_classes == dataset.num_classes


@pytest.fixture
def untouched_global_randomness():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


# long_tail -----------------------------------------------------------------------------------------------------------

# By hand: 60 * factor ** (-r / 9), rounded down, for the ranks r = 0, ..., 9.
SIXTY = {
    1: [60, 60, 60, 60, 60, 60, 60, 60, 60, 60],
    10: [60, 46, 35, 27, 21, 16, 12, 10, 7, 6],
    50: [60, 38, 25, 16, 10, 6, 4, 2, 1, 1],
}


def exact_counts(head, factor, classes):
    """The formula without rounding, in integers: the largest k with k ** (C - 1) * factor ** r <= head ** (C - 1)."""
    counts = []
    for rank in range(classes):
        k = max(math.floor(head / factor ** (rank / (classes - 1))) - 2, 0)
        while (k + 1) ** (classes - 1) * Fraction(factor) ** rank <= head ** (classes - 1):
            k += 1
        counts.append(max(k, 1))
    return counts


@pytest.mark.parametrize("factor", SIXTY)
def test_the_counts_are_those_of_the_formula(factor, untouched_global_randomness):
    dataset, order = toy(), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    tail = data.long_tail(dataset, factor=factor, order=order, generator=seeded())
    assert [counts_of(tail)[label] for label in order] == SIXTY[factor] == exact_counts(60, factor, 10)
    assert_rows_of(tail, dataset)
    drawn = data.long_tail(dataset, factor=factor, generator=seeded())
    assert sorted(counts_of(drawn), reverse=True) == SIXTY[factor]
    assert_rows_of(drawn, dataset)


@pytest.mark.parametrize(
    ("head", "factor", "classes"), [(512, 32, 6), (243, 243, 6), (1024, 1024, 6), (512, 512, 10), (100, 2.5, 4), (7, 100, 3)]
)
def test_a_rounded_power_costs_no_example(head, factor, classes):
    tail = data.long_tail(toy(head * classes, classes), factor=factor, order=range(classes), generator=seeded())
    assert counts_of(tail) == exact_counts(head, factor, classes)


@given(head=st.integers(1, 60), factor=st.floats(1, 1000), classes=st.integers(2, 7), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_class_sizes_fall_from_head_to_tail(head, factor, classes, seed):
    dataset = toy(60 * classes, classes)
    tail = data.long_tail(dataset, factor=factor, head=head, generator=seeded(seed))
    sizes = sorted(counts_of(tail), reverse=True)
    assert sizes[0] == head
    assert sizes[-1] == max(1, math.floor(head / factor * (1 + 1e-12)))
    for rank, size in enumerate(sizes):
        ideal = head * factor ** (-rank / (classes - 1))
        assert size == 1 or ideal - 1 - 1e-6 < size < ideal + 1e-6
    assert_rows_of(tail, dataset)


def test_the_smallest_class_is_the_head_by_default():
    dataset = of_counts([90, 40, 70])
    assert counts_of(data.long_tail(dataset, factor=4, order=(0, 1, 2), generator=seeded())) == [40, 20, 10]
    assert counts_of(data.long_tail(dataset, factor=1, generator=seeded())) == [40, 40, 40]


def test_a_given_head_may_exceed_the_smallest_class():
    dataset = of_counts([90, 40, 70])
    tail = data.long_tail(dataset, factor=9, head=90, order=(0, 1, 2), generator=seeded())
    assert counts_of(tail) == [90, 30, 10]
    assert_rows_of(tail, dataset)
    # Each class may give all that it has.
    assert counts_of(data.long_tail(dataset, factor=2.25, head=90, order=(0, 2, 1), generator=seeded())) == [90, 40, 60]


def test_kept_rows_stay_in_their_order():
    numbers = row_numbers(data.long_tail(toy(), factor=10, generator=seeded()), 600)
    assert torch.equal(numbers, numbers.sort().values)


def test_any_class_can_be_the_head_and_any_example_can_stay():
    tails = [data.long_tail(toy(60), factor=6, generator=seeded(seed)) for seed in range(60)]
    assert {int(tail.labels.bincount().argmax()) for tail in tails} == set(range(10))
    assert len(torch.cat([row_numbers(tail, 60) for tail in tails[:20]]).unique()) == 60
    # The order is one permutation of all classes, not a rotation or a reversal of them.
    runs = {tuple(torch.tensor(counts_of(tail)).argsort(descending=True, stable=True)[:3].tolist()) for tail in tails}
    assert len(runs) > 40


def test_the_generator_decides_and_another_seed_differs():
    one, same, other = (data.long_tail(toy(), factor=10, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.images, same.images)
    assert counts_of(one) != counts_of(other)
    first, second = (data.long_tail(toy(), factor=10, order=range(10), generator=seeded(seed)) for seed in (1, 2))
    assert counts_of(first) == counts_of(second)
    assert not torch.equal(first.images, second.images)


def test_one_generator_state_nests_the_tails():
    generator = seeded()
    first = data.long_tail(toy(), factor=10, generator=generator)
    assert not torch.equal(first.images, data.long_tail(toy(), factor=10, generator=generator).images)
    sets = [
        set(row_numbers(data.long_tail(toy(), factor=factor, head=head, generator=seeded()), 600).tolist())
        for factor, head in [(1, 60), (10, 60), (10, 40), (50, 40)]
    ]
    assert sets[0] > sets[1] > sets[2] > sets[3]


def test_a_given_order_keeps_the_rows_that_the_same_drawn_order_keeps():
    drawn = data.long_tail(toy(), factor=4, generator=seeded())
    order = torch.tensor(counts_of(drawn)).argsort(descending=True).tolist()
    assert torch.equal(drawn.images, data.long_tail(toy(), factor=4, order=order, generator=seeded()).images)


@pytest.mark.parametrize(
    ("counts", "options", "error", "text"),
    [
        ([5, 5], {"factor": 0.5}, ValueError, r"factor must be a finite number >= 1, got 0.5"),
        ([5, 5], {"factor": math.inf}, ValueError, r"factor must be a finite number >= 1, got inf"),
        ([5, 5], {"factor": "10"}, TypeError, r"factor must be a finite number >= 1, got '10'"),
        ([5, 5], {"factor": 2, "head": 0}, ValueError, r"head must be an integer >= 1, got 0"),
        ([5, 5], {"factor": 2, "head": 4.0}, TypeError, r"head must be an integer >= 1, got 4.0"),
        ([5], {"factor": 2}, ValueError, r"dataset must be of at least two classes, got 1"),
        (
            [5, 0, 5],
            {"factor": 2},
            ValueError,
            r"dataset must be one with examples of every class, got none of class 1; "
            r"number the classes that occur 0, 1, 2, ... without gaps",
        ),
        (
            [5, 0, 5],
            {"factor": 2, "head": 5},
            ValueError,
            r"dataset must be one with examples of every class, got none of class 1; number the classes .*",
        ),
        (
            [5, 5, 5],
            {"factor": 2, "order": [0, 1, 1]},
            ValueError,
            r"order must be a permutation of 0, ..., 2, got \[0, 1, 1\]; name every class once, from head to tail",
        ),
        ([5, 5, 5], {"factor": 2, "order": (0, 1)}, ValueError, r"order must be a permutation of 0, ..., 2, got \[0, 1\]; .*"),
        ([5, 5], {"factor": 2, "order": (1, 2)}, ValueError, r"order must be a permutation of 0, ..., 1, got \[1, 2\]; .*"),
        (
            [50, 24, 50],
            {"factor": 4, "head": 50, "order": (0, 1, 2)},
            ValueError,
            r"head must be small enough for the examples of every class, got 50, of which class 1 is to keep 25 but has 24; "
            r"write a smaller head, or an order with that class nearer to the tail",
        ),
        (
            [5, 5],
            {"factor": 1, "head": 6, "order": (1, 0)},
            ValueError,
            r"head must be small enough .*, got 6, of which class 1 is to keep 6 but has 5; .*",
        ),
    ],
)
def test_impossible_tails_are_refused_in_one_sentence(counts, options, error, text):
    with pytest.raises(error, match=rf"^{text}$"):
        data.long_tail(of_counts(counts), generator=seeded(), **options)


# noise_matrix --------------------------------------------------------------------------------------------------------


def test_uniform_noise_by_hand():
    expected = torch.full((4, 4), 0.1, dtype=torch.float64)
    expected.fill_diagonal_(0.7)
    assert (data.noise_matrix("uniform", 0.4, 4) - expected).abs().max() < 1e-15
    # The true label can be drawn again: of rho = 0.4, only 0.4 * 3 / 4 is wrong.
    assert 1 - float(data.noise_matrix("uniform", 0.4, 4)[2, 2]) == pytest.approx(0.3)


def test_pair_noise_by_hand():
    expected = [[0.75, 0.25, 0, 0], [0, 0.75, 0.25, 0], [0, 0, 0.75, 0.25], [0.25, 0, 0, 0.75]]
    assert data.noise_matrix("pair", 0.25, 4).tolist() == expected
    assert data.noise_matrix("pair", 0.25, 2).tolist() == [[0.75, 0.25], [0.25, 0.75]]


@pytest.mark.parametrize(("kind", "others"), [("flip1", 1), ("flip2", 2)])
def test_flip_noise_has_its_entries_in_each_row(kind, others):
    matrix = data.noise_matrix(kind, 0.25, 5, generator=seeded())
    assert matrix.diagonal().tolist() == [0.75] * 5
    off_diagonal = matrix - torch.diag(matrix.diagonal())
    assert off_diagonal.sort(dim=1).values.tolist() == [[0.0] * (5 - others) + [0.25 / others] * others] * 5


def test_small_flips_have_one_matrix_only():
    assert data.noise_matrix("flip1", 0.25, 2, generator=seeded()).tolist() == [[0.75, 0.25], [0.25, 0.75]]
    expected = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
    assert data.noise_matrix("flip2", 0.5, 3, generator=seeded()).tolist() == expected


@pytest.mark.parametrize("kind", ["flip1", "flip2"])
def test_every_other_class_can_be_the_flipped_one(kind, untouched_global_randomness):
    matrices = torch.stack([data.noise_matrix(kind, 1.0, 4, generator=seeded(seed)) for seed in range(400)])
    others = 1 - torch.eye(4, dtype=torch.float64)
    # Uniform over the three others, each row on its own: the mean of 400 entries in [0, 1] stays near 1 / 3.
    assert (matrices.mean(dim=0) - others / 3).abs().max() < 4 * math.sqrt(1 / 3 * 2 / 3 / 400)
    first, second = matrices[:, 0, 1] > 0, matrices[:, 1, 2] > 0
    assert 0 < (first & second).sum() < first.sum()


@pytest.mark.parametrize("kind", ["flip1", "flip2"])
def test_the_generator_decides_the_flips(kind):
    one, same, other = (data.noise_matrix(kind, 0.2, 10, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    generator = seeded()
    first, second = (data.noise_matrix(kind, 0.2, 10, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)


@given(kind=st.sampled_from(KINDS), rate=st.floats(0, 1), classes=st.integers(3, 12), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_rows_are_distributions_and_no_rate_is_no_noise(kind, rate, classes, seed):
    matrix = data.noise_matrix(kind, rate, classes, generator=seeded(seed))
    assert matrix.dtype == torch.float64
    assert matrix.shape == (classes, classes)
    assert 0 <= matrix.min() <= matrix.max() <= 1
    assert (matrix.sum(dim=1) - 1).abs().max() < 1e-12
    wrong = rate * (1 - 1 / classes) if kind == "uniform" else rate
    assert (1 - matrix.diagonal() - wrong).abs().max() < 1e-12
    assert torch.equal(data.noise_matrix(kind, 0, classes, generator=seeded(seed)), torch.eye(classes, dtype=torch.float64))


@given(kind=st.sampled_from(KINDS), rate=st.floats(0, 1), classes=st.integers(3, 12), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_every_matrix_can_be_drawn_from(kind, rate, classes, seed):
    dataset = toy(5 * classes, classes)
    matrix = data.noise_matrix(kind, rate, classes, generator=seeded(seed))
    noisy = data.with_label_noise(dataset, matrix, generator=seeded(seed))
    assert (matrix[noisy.true_labels, noisy.data.labels] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("pairs", 0.2, 10), ValueError, r"kind must be one of 'uniform', 'flip1', 'flip2', 'pair', got 'pairs'"),
        (("Flip-2", 0.2, 10), ValueError, r"kind must be one of .*, got 'Flip-2'; write 'flip2'"),
        (("pair", -0.1, 10), ValueError, r"rate must be a finite number >= 0, got -0.1"),
        (("pair", math.nan, 10), ValueError, r"rate must be a finite number >= 0, got nan"),
        (("pair", "0.2", 10), TypeError, r"rate must be a finite number >= 0, got '0.2'"),
        (("pair", 20, 10), ValueError, r"rate must be a probability in \[0, 1\], got 20; for a percentage write rate / 100"),
        (("pair", 0.2, 10.0), TypeError, r"num_classes must be an integer >= 2, got 10.0"),
        (("uniform", 0.2, 1), ValueError, r"num_classes must be an integer >= 2, got 1"),
        (("flip1", 0.2, 1), ValueError, r"num_classes must be an integer >= 2, got 1"),
        (("flip2", 0.2, 2), ValueError, r"num_classes must be at least 3 for 'flip2', got 2; write 'flip1'"),
        (
            ("flip1", 0.2, 10),
            ValueError,
            r"generator must be given for 'flip1', whose classes are random, got None; "
            r"write torch.Generator\(\).manual_seed\(seed\)",
        ),
        (("flip2", 0.2, 10), ValueError, r"generator must be given for 'flip2', whose classes are random, got None; .*"),
    ],
)
def test_impossible_matrices_are_refused_in_one_sentence(arguments, error, text):
    with pytest.raises(error, match=rf"^{text}$"):
        data.noise_matrix(*arguments)


# with_label_noise ----------------------------------------------------------------------------------------------------

UNEVEN = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.6, 0.0, 0.4], [0.25, 0.25, 0.25, 0.25], [0.01, 0.0, 0.0, 0.99]]).double()
UNEVEN = UNEVEN / UNEVEN.sum(dim=1, keepdim=True)
MATRICES = {kind: data.noise_matrix(kind, 0.4, 4, generator=seeded(3)) for kind in KINDS} | {"uneven": UNEVEN}


@pytest.mark.parametrize("name", MATRICES)
def test_flips_are_as_frequent_as_the_matrix_says(name, untouched_global_randomness):
    """Each count within five standard deviations of its binomial mean, a class without probability never."""
    matrix, dataset = MATRICES[name], of_counts([8000, 6000, 4000, 2000])
    noisy = data.with_label_noise(dataset, matrix, generator=seeded(11))
    found = torch.zeros(4, 4, dtype=torch.float64)
    found.index_put_((noisy.true_labels, noisy.data.labels), torch.ones(20_000, dtype=torch.float64), accumulate=True)
    n = torch.tensor([8000.0, 6000.0, 4000.0, 2000.0]).double()[:, None]
    assert ((found - n * matrix).abs() <= 5 * (n * matrix * (1 - matrix)).clamp(min=0).sqrt()).all()
    assert (found[matrix == 0] == 0).all()


@pytest.mark.parametrize("name", MATRICES)
def test_the_record_of_the_truth_is_right(name):
    dataset = of_counts([8, 60, 40, 20])
    noisy = data.with_label_noise(dataset, MATRICES[name], generator=seeded())
    assert torch.equal(noisy.true_labels, dataset.labels)
    assert torch.equal(noisy.data.images, dataset.images)
    assert noisy.data.images.data_ptr() == dataset.images.data_ptr()
    assert noisy.data.num_classes == 4
    assert noisy.data.labels.dtype == noisy.true_labels.dtype == torch.int64
    assert noisy.flipped.dtype == torch.bool
    assert noisy.flipped.tolist() == [o != t for o, t in zip(noisy.data.labels.tolist(), dataset.labels.tolist(), strict=True)]
    assert 0 < noisy.flipped.sum() < len(dataset)
    data_, true_labels, flipped = noisy
    assert data_ is noisy.data
    assert true_labels is noisy.true_labels
    assert flipped is noisy.flipped


def test_certain_rows_are_followed_exactly():
    turned = torch.eye(5).double().roll(2, dims=1)
    dataset = toy(500, 5)
    noisy = data.with_label_noise(dataset, turned, generator=seeded())
    assert torch.equal(noisy.data.labels, (dataset.labels + 2) % 5)
    assert noisy.flipped.all()
    clean = data.with_label_noise(dataset, torch.eye(5), generator=seeded())
    assert torch.equal(clean.data.labels, dataset.labels)
    assert not clean.flipped.any()


def test_the_draw_is_the_inverse_of_the_cumulative_sum():
    """One float64 uniform per row in the order of the rows, and the first class whose cumulative sum exceeds it."""
    dataset = of_counts([8, 60, 40, 20])
    noisy = data.with_label_noise(dataset, UNEVEN, generator=seeded(4))
    draws = torch.rand(128, dtype=torch.float64, generator=seeded(4))
    for label, draw, observed in zip(dataset.labels.tolist(), draws.tolist(), noisy.data.labels.tolist(), strict=True):
        total, expected = 0.0, -1
        while total <= draw:
            expected += 1
            total += float(UNEVEN[label, expected])
        assert observed == expected


def test_a_sum_a_little_off_one_leaves_no_gap(monkeypatch):
    """The largest uniform below 1 and the smallest, 0, with rows whose sums miss 1 and whose ends are impossible."""
    matrix = torch.tensor([[0.0, 0.5, 0.5 - 9e-10, 0.0], [0.0, 0.5, 0.5 + 9e-10, 0.0]] * 2, dtype=torch.float64)
    assert (matrix.sum(dim=1) < 1).tolist() == [True, False, True, False]
    dataset = toy(40, 4)
    for draw, expected in ((1 - 2**-53, 2), (0.0, 1)):
        monkeypatch.setattr(torch, "rand", lambda n, draw=draw, **_: torch.full((n,), draw, dtype=torch.float64))
        noisy = data.with_label_noise(dataset, matrix, generator=seeded())
        assert noisy.data.labels.tolist() == [expected] * 40


def test_the_generator_decides_the_labels():
    matrix = data.noise_matrix("uniform", 0.5, 10)
    one, same, other = (data.with_label_noise(toy(), matrix, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.data.labels, same.data.labels)
    assert not torch.equal(one.data.labels, other.data.labels)
    generator = seeded()
    first, second = (data.with_label_noise(toy(), matrix, generator=generator) for _ in range(2))
    assert not torch.equal(first.data.labels, second.data.labels)


def test_an_empty_data_set_and_absent_classes_pass():
    empty = data.with_label_noise(of_counts([0, 0, 0]), torch.eye(3), generator=seeded())
    assert len(empty.data) == len(empty.true_labels) == len(empty.flipped) == 0
    gap = data.with_label_noise(of_counts([5, 0, 5]), data.noise_matrix("pair", 1, 3), generator=seeded())
    assert counts_of(gap.data) == [5, 5, 0]


THIRDS = torch.full((3, 3), 1 / 3)


@pytest.mark.parametrize(
    ("matrix", "error", "text"),
    [
        (
            np.eye(3),
            TypeError,
            r"matrix must be a floating-point tensor \[3, 3\], row = true class, got ndarray; write torch.from_numpy\(matrix\)",
        ),
        ([[1.0]], TypeError, r"matrix must be a floating-point tensor .*, got list; write torch.tensor\(matrix\)"),
        (torch.eye(3).long(), TypeError, r"matrix must be .*, got torch.int64; write matrix.double\(\)"),
        (
            torch.eye(4),
            ValueError,
            r"matrix must be a floating-point tensor \[3, 3\], row = true class, got \[4, 4\]; "
            r"pass num_classes=dataset.num_classes to noise_matrix",
        ),
        (torch.eye(3)[:2], ValueError, r"matrix must be .*, got \[2, 3\]; .*"),
        (torch.eye(3)[0], ValueError, r"matrix must be .*, got \[3\]; .*"),
        (
            torch.tensor([[1.5, -0.5, 0], [0, 1, 0], [0, 0, 1]]),
            ValueError,
            r"matrix must be of probabilities in \[0, 1\], got values from -0.5 to 1.5",
        ),
        (torch.eye(3) * 1.5, ValueError, r"matrix must be of probabilities in \[0, 1\], got values from 0 to 1.5"),
        (-torch.ones(3, 3), ValueError, r"matrix must be of probabilities in \[0, 1\], got values from -1 to -1"),
        (torch.eye(3) / 0, ValueError, r"matrix must be of probabilities in \[0, 1\], got values from nan to nan"),
        (
            torch.diag(torch.tensor([1, 0.5, 0.75])),
            ValueError,
            r"matrix must be one whose rows sum to 1 \(to within 1e-9\), got the sum 0.5 in row 1; "
            r"write matrix.double\(\) / matrix.double\(\).sum\(1, keepdim=True\)",
        ),
        # A column of a transposed matrix sums to 1, its rows do not.
        (torch.tensor([[1, 0.5, 0.0], [0, 0.5, 0], [0, 0, 1]]), ValueError, r"matrix must be .*, got the sum 1.5 in row 0; .*"),
        (THIRDS, ValueError, r"matrix must be one whose rows sum to 1 .*, got the sum 1.00000003 in row 0; .*"),
        (
            torch.eye(3).double() * (1 - 2e-9),
            ValueError,
            r"matrix must be one whose rows .* got the sum 0.999999998 in row 0; .*",
        ),
    ],
)
def test_what_is_no_matrix_of_probabilities_is_refused_in_one_sentence(matrix, error, text):
    with pytest.raises(error, match=rf"^{text}$"):
        data.with_label_noise(toy(9, 3), matrix, generator=seeded())


def test_the_remedy_for_rows_that_do_not_sum_to_one_works():
    matrix = THIRDS.double() / THIRDS.double().sum(1, keepdim=True)
    assert len(data.with_label_noise(toy(9, 3), matrix, generator=seeded()).data) == 9


# split_meta ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [1, 7, 40])
def test_the_meta_set_is_balanced_and_the_rest_is_the_rest(per_class, untouched_global_randomness):
    dataset = of_counts([90, 40, 70])
    rest, meta = data.split_meta(dataset, per_class, generator=seeded())
    assert counts_of(meta) == [per_class] * 3
    assert counts_of(rest) == [90 - per_class, 40 - per_class, 70 - per_class]
    for part in (rest, meta):
        assert_rows_of(part, dataset)
    found = torch.cat([row_numbers(rest, 200), row_numbers(meta, 200)])
    assert found.sort().values.tolist() == list(range(200))
    assert torch.equal(row_numbers(rest, 200), row_numbers(rest, 200).sort().values)


@given(size=st.integers(1, 60), start=st.integers(0, 119), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_every_slice_of_the_meta_set_is_balanced(size, start, seed):
    _, meta = data.split_meta(of_counts([90, 40, 70]), 40, generator=seeded(seed))
    counts = meta.labels[start : start + size].bincount(minlength=3)
    assert counts.max() - counts.min() <= 1


def test_the_meta_set_is_a_random_choice_in_random_order():
    metas = [row_numbers(data.split_meta(toy(60), 2, generator=seeded(seed))[1], 60) for seed in range(40)]
    assert len(torch.cat(metas).unique()) == 60
    assert len(torch.stack(metas)[:, 0].unique()) > 20
    # Neither the rows of a class nor the classes keep their order.
    everything = row_numbers(data.split_meta(toy(60), 6, generator=seeded())[1], 60)
    assert everything.tolist() != list(range(60))
    of_class_0 = everything[everything % 10 == 0]
    assert of_class_0.tolist() != of_class_0.sort().values.tolist()


def test_the_generator_decides_the_meta_set():
    one, same, other = (data.split_meta(toy(), 5, generator=seeded(seed)) for seed in (1, 1, 2))
    for part in (0, 1):
        assert torch.equal(one[part].images, same[part].images)
        assert not torch.equal(one[part].images, other[part].images)


@pytest.mark.parametrize(
    ("counts", "per_class", "error", "text"),
    [
        (
            [9, 4, 7],
            5,
            ValueError,
            r"per_class must be at most 4 here, the number of examples of class 1, got 5; "
            r"write a smaller number, or pass a data set with more examples of that class",
        ),
        ([9, 4, 0], 1, ValueError, r"per_class must be at most 0 here, the number of examples of class 2, got 1; .*"),
        ([9, 4], 0, ValueError, r"per_class must be an integer >= 1, got 0"),
        ([9, 4], 2.0, TypeError, r"per_class must be an integer >= 1, got 2.0"),
        ([9, 4], True, TypeError, r"per_class must be an integer >= 1, got True"),
    ],
)
def test_impossible_meta_sets_are_refused_in_one_sentence(counts, per_class, error, text):
    with pytest.raises(error, match=rf"^{text}$"):
        data.split_meta(of_counts(counts), per_class, generator=seeded())


# all of them ---------------------------------------------------------------------------------------------------------


class OnGPU(torch.Generator):
    """Stands in for a generator of a GPU, which a machine without one cannot make."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    "call",
    [
        lambda generator: data.long_tail(toy(), factor=10, generator=generator),
        lambda generator: data.noise_matrix("flip1", 0.2, 10, generator=generator),
        lambda generator: data.noise_matrix("flip2", 0.2, 10, generator=generator),
        lambda generator: data.with_label_noise(toy(), torch.eye(10), generator=generator),
        lambda generator: data.split_meta(toy(), 5, generator=generator),
    ],
)
def test_a_generator_of_another_device_is_refused(call):
    with pytest.raises(
        ValueError, match=r"^generator must be a torch.Generator on the CPU, got one on cuda; write torch.Generator\(\)[^;]*$"
    ):
        call(OnGPU())


def test_the_three_steps_in_a_row_leave_the_meta_set_clean_and_balanced(untouched_global_randomness):
    dataset, generator = toy(), seeded()
    rest, meta = data.split_meta(dataset, 10, generator=generator)
    tail = data.long_tail(rest, factor=10, generator=generator)
    noisy = data.with_label_noise(tail, data.noise_matrix("flip2", 0.2, 10, generator=generator), generator=generator)
    assert counts_of(meta) == [10] * 10
    assert torch.equal(row_numbers(meta, 600) % 10, meta.labels)
    numbers = row_numbers(noisy.data, 600)
    assert torch.equal(numbers % 10, noisy.true_labels)
    assert not set(numbers.tolist()) & set(row_numbers(meta, 600).tolist())
    assert sorted(noisy.true_labels.bincount().tolist(), reverse=True) == exact_counts(50, 10, 10)
    assert 0 < noisy.flipped.sum() < len(numbers) / 2

"""Losses per example: values, signs, gradients against central differences, and the lookup by name."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metarobust.losses import LOSSES, boosted_cross_entropy, cross_entropy, kl_divergence, loss_function, margin

LOGITS = torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, -1.0], [1.0, 1.0, 0.5]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1])

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def central_difference(function, point, step=1e-6):
    """Gradient of a scalar function in float64, one coordinate at a time."""
    gradient = torch.zeros_like(point)
    for index in range(point.numel()):
        shift = torch.zeros_like(point)
        shift.view(-1)[index] = step
        gradient.view(-1)[index] = (function(point + shift) - function(point - shift)) / (2 * step)
    return gradient


@every_loss
def test_one_value_per_example_of_the_logits_dtype(loss):
    for dtype in (torch.float32, torch.float64):
        values = loss(LOGITS.to(dtype), LABELS)
        assert values.shape == (3,)
        assert values.dtype == dtype
    assert loss(LOGITS[:0], LABELS[:0]).shape == (0,)


@every_loss
def test_rows_do_not_see_each_other(loss):
    together = loss(LOGITS, LABELS)
    alone = torch.cat([loss(LOGITS[i : i + 1], LABELS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_cross_entropy_is_the_negative_log_probability_of_the_label():
    values = cross_entropy(LOGITS, LABELS)
    for row, label, value in zip(LOGITS.tolist(), LABELS.tolist(), values.tolist(), strict=True):
        assert value == pytest.approx(math.log(sum(math.exp(z) for z in row)) - row[label])
    assert cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item() == pytest.approx(math.log(4))


def test_cross_entropy_is_finite_for_extreme_logits():
    values = cross_entropy(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]), torch.tensor([0, 0]))
    torch.testing.assert_close(values, torch.tensor([0.0, 2e4]))


def test_margin_is_the_best_wrong_logit_minus_the_labels_own():
    assert margin(LOGITS, LABELS).tolist() == [-1.0, 5.0, 0.0]


def test_a_constant_classifier_has_margin_zero():
    assert (margin(torch.full((2, 5), 3.0), torch.tensor([0, 4])) == 0).all()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6, unique=True), st.integers(0, 5))
def test_margin_is_positive_exactly_when_the_example_is_misclassified(row, label):
    logits = torch.tensor([row], dtype=torch.float64)
    y = torch.tensor([label % len(row)])
    assert (margin(logits, y) > 0).item() == (logits.argmax(1) != y).item()


@every_loss
def test_gradients_equal_central_differences(loss):
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 4, 2, 2])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    def total(z):
        return (weights * loss(z, y)).sum()

    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(gradient, central_difference(total, logits), rtol=1e-7, atol=1e-8)


def test_margin_gradient_touches_two_logits():
    logits = LOGITS.clone().requires_grad_()
    margin(logits, LABELS)[:2].sum().backward()
    assert logits.grad.tolist() == [[-1.0, 0.0, 1.0], [0.0, 1.0, -1.0], [0.0, 0.0, 0.0]]


def test_margin_leaves_the_logits_as_they_were():
    logits = LOGITS.clone()
    margin(logits, LABELS)
    assert torch.equal(logits, LOGITS)


def test_a_loss_is_found_by_name_or_passed_through():
    assert loss_function("cross_entropy") is cross_entropy
    assert loss_function("margin") is margin

    def own(logits, y):
        return logits.sum(1)

    assert loss_function(own) is own


def test_an_unknown_loss_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="loss must be one of 'cross_entropy', 'margin', 'dlr', got 'hinge'"):
        loss_function("hinge")


# KL divergence and boosted cross-entropy -------------------------------------------------------------------------------

OTHERS = torch.tensor([[0.5, 1.0, -2.0], [3.0, 0.0, 0.0], [1.0, 1.0, 0.5]], dtype=torch.float64)


def test_kl_divergence_is_the_sum_over_the_classes():
    p, q = LOGITS.softmax(1), OTHERS.softmax(1)
    torch.testing.assert_close(kl_divergence(LOGITS, OTHERS), (p * (p / q).log()).sum(1))
    torch.testing.assert_close(kl_divergence(OTHERS, LOGITS), (q * (q / p).log()).sum(1))
    assert (kl_divergence(LOGITS, LOGITS) == 0).all()
    assert kl_divergence(LOGITS[:0], OTHERS[:0]).shape == (0,)


def test_boosted_cross_entropy_is_the_published_formula():
    p = LOGITS.softmax(1)
    own, rival = p[range(3), LABELS], torch.stack([p[0, 2], p[1, 1], p[2, 0]])
    torch.testing.assert_close(boosted_cross_entropy(LOGITS, LABELS), -own.log() - (1.0001 - rival).log(), rtol=1e-12, atol=0)
    exact = boosted_cross_entropy(LOGITS, LABELS, offset=0.0)
    torch.testing.assert_close(exact, -own.log() - (1 - rival).log(), rtol=1e-12, atol=0)
    assert boosted_cross_entropy(LOGITS[:0], LABELS[:0]).shape == (0,)


def test_boosted_cross_entropy_of_two_classes_is_twice_the_cross_entropy():
    logits, y = LOGITS[:, :2], torch.tensor([0, 1, 1])
    torch.testing.assert_close(boosted_cross_entropy(logits, y, offset=0.0), 2 * cross_entropy(logits, y))


@pytest.mark.parametrize("offset", [0.0, 1e-4])
def test_kl_divergence_and_boosted_cross_entropy_are_finite_for_extreme_logits(offset):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0])
    boosted = boosted_cross_entropy(logits, y, offset=offset)
    torch.testing.assert_close(boosted, torch.tensor([0.0, 3e4 if offset == 0 else 2e4 - math.log(offset)]), atol=2e-4, rtol=1e-6)
    divergence = kl_divergence(logits, -logits)
    torch.testing.assert_close(divergence, torch.tensor([2e4, 2e4]))
    assert torch.autograd.grad((boosted + divergence).sum(), logits)[0].isfinite().all()


def test_gradients_of_kl_divergence_and_boosted_cross_entropy_equal_central_differences():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others, y = logits.flip(0) / 2, torch.tensor([0, 4, 2, 2])
    for total in (
        lambda z: kl_divergence(z, others).sum(),
        lambda z: kl_divergence(others, z).sum(),
        lambda z: boosted_cross_entropy(z, y).sum(),
        lambda z: boosted_cross_entropy(z, y, offset=0.0).sum(),
    ):
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(total(leaf), leaf)
        torch.testing.assert_close(gradient, central_difference(total, logits), rtol=1e-7, atol=1e-8)


def test_boosted_cross_entropy_needs_two_classes_and_an_offset_of_at_least_0():
    with pytest.raises(ValueError, match="logits must be of at least 2 classes for the boosted cross-entropy, got 1"):
        boosted_cross_entropy(torch.zeros(1, 1), torch.tensor([0]))
    with pytest.raises(ValueError, match="offset must be a finite number >= 0, got -1"):
        boosted_cross_entropy(LOGITS, LABELS, offset=-1.0)

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from journeyman.student import losses

LOGITS = np.random.default_rng(0).normal(size=(6, 4)) * 3
TEACHER = log_softmax(np.random.default_rng(1).normal(size=(6, 4)) * 2, axis=1)
GOLD = np.array([0, 3, -1, 2, -1, 1])


def reference(logits: np.ndarray, temperature: float) -> np.ndarray:
    p, q = softmax(TEACHER / temperature, axis=1), log_softmax(logits / temperature, axis=1)
    return temperature**2 * (p * (np.log(p) - q)).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_divergence_is_the_scaled_kl(temperature: float) -> None:
    got = losses.soft_divergence(torch.tensor(LOGITS), torch.tensor(TEACHER), temperature)
    np.testing.assert_allclose(got.numpy(), reference(LOGITS, temperature), rtol=1e-12)


def test_soft_divergence_of_the_teacher_itself_is_zero() -> None:
    got = losses.soft_divergence(torch.tensor(TEACHER) + 7, torch.tensor(TEACHER), 2.0)
    np.testing.assert_allclose(got.numpy(), 0, atol=1e-14)


def test_a_class_the_teacher_rules_out_adds_nothing() -> None:
    teacher = torch.tensor([[np.log(0.25), np.log(0.75), -np.inf]])
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    loss = losses.soft_divergence(logits, teacher, 1.0)
    loss.sum().backward()
    expected = 0.25 * np.log(0.25 * 3) + 0.75 * np.log(0.75 * 3)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)
    np.testing.assert_allclose(logits.grad, [[1 / 3 - 0.25, 1 / 3 - 0.75, 1 / 3]], rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_is_that_of_soft_cross_entropy(temperature: float) -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    losses.soft_divergence(logits, torch.tensor(TEACHER), temperature).sum().backward()
    # Hinton et al. 2015, equation 2, times T²: d/dz = T (softmax(z / T) - softmax(v / T)).
    expected = temperature * (
        softmax(LOGITS / temperature, axis=1) - softmax(TEACHER / temperature, axis=1)
    )
    np.testing.assert_allclose(logits.grad, expected, rtol=1e-10, atol=1e-14)


def test_gold_cross_entropy_skips_rows_without_gold() -> None:
    got = losses.gold_cross_entropy(torch.tensor(LOGITS), torch.tensor(GOLD))
    expected = np.where(GOLD >= 0, -log_softmax(LOGITS, axis=1)[np.arange(6), GOLD], 0)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("gold_weight", [0.0, 0.3, 1.0])
def test_rows_without_gold_learn_from_the_teacher_alone(gold_weight: float) -> None:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return losses.distillation(
            logits,
            torch.tensor(TEACHER),
            torch.tensor(GOLD),
            temperature=2.0,
            gold_weight=gold_weight,
        )

    cross_entropy = -log_softmax(LOGITS, axis=1)[np.arange(6), GOLD]
    mixed = (1 - gold_weight) * reference(LOGITS, 2.0) + gold_weight * cross_entropy
    expected = np.where(GOLD >= 0, mixed, reference(LOGITS, 2.0))
    logits = torch.tensor(LOGITS, requires_grad=True)
    np.testing.assert_allclose(loss(logits).detach().numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(loss, (logits,))


WEIGHTS = np.array([0.5, 3.0, 1.0, 1.7])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_class_weights_are_those_of_torchs_cross_entropy(temperature: float) -> None:
    """With soft labels up to the loss of a perfect student, which has no gradient."""
    weights = torch.tensor(WEIGHTS)
    ours = torch.tensor(LOGITS, requires_grad=True)
    loss = losses.soft_divergence(ours, torch.tensor(TEACHER), temperature, weights)
    (loss * torch.arange(1, 7)).sum().backward()
    theirs = torch.tensor(LOGITS, requires_grad=True)
    target = torch.tensor(softmax(TEACHER / temperature, axis=1))
    each = torch.nn.functional.cross_entropy(
        theirs / temperature, target, weight=weights, reduction="none"
    )
    (temperature**2 * each * torch.arange(1, 7)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    best = target * weights
    best = best / best.sum(-1, keepdim=True)
    least = torch.nn.functional.cross_entropy(best.log(), target, weight=weights, reduction="none")
    np.testing.assert_allclose(
        loss.detach().numpy(), temperature**2 * (each - least).detach().numpy(), rtol=1e-10
    )
    assert (loss > 0).all()


def test_class_weights_of_gold_and_mixture() -> None:
    found = losses.distillation(
        torch.tensor(LOGITS),
        torch.tensor(TEACHER),
        torch.tensor(GOLD),
        temperature=1.0,
        gold_weight=1.0,
        class_weights=torch.tensor(WEIGHTS),
    )
    with_gold = GOLD >= 0
    expected = -WEIGHTS[GOLD] * log_softmax(LOGITS, axis=1)[np.arange(6), GOLD]
    np.testing.assert_allclose(found.numpy()[with_gold], expected[with_gold], rtol=1e-12)


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    rows = np.array([0, 0, 0, 1, 2, 2, 3])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=rows)
    np.testing.assert_allclose(losses.balanced(np.bincount(rows)), expected, rtol=1e-12)
    soft = np.exp(TEACHER)
    weights = losses.balanced(soft.sum(axis=0))
    np.testing.assert_allclose(weights, 6 / (4 * soft.sum(axis=0)), rtol=1e-12)
    # All classes have the same part in the loss.
    np.testing.assert_allclose((weights * soft).sum(axis=0), 6 / 4, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_label_smoothing_is_torchs(smoothing: float, weights: np.ndarray | None) -> None:
    """Of hard labels, where torch takes an index: the same gradient; and of gold the same loss."""
    of_classes = None if weights is None else torch.tensor(weights)
    chosen = TEACHER.argmax(axis=1)
    ours, theirs = (torch.tensor(LOGITS, requires_grad=True) for _ in range(2))
    hard = torch.tensor(losses.certain(chosen, 4)).double()
    losses.soft_divergence(ours, hard, 1.0, of_classes, smoothing).sum().backward()
    expected = torch.nn.functional.cross_entropy(
        theirs, torch.tensor(chosen), weight=of_classes, label_smoothing=smoothing, reduction="none"
    )
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    found = losses.distillation(
        ours, hard, torch.tensor(chosen), temperature=1.0, gold_weight=1.0,
        class_weights=of_classes, label_smoothing=smoothing,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_hard_labels_are_cross_entropy_of_the_teachers_first_choice() -> None:
    hard = losses.certain(np.array([0, 1]), 3)
    np.testing.assert_array_equal(np.exp(hard), [[1, 0, 0], [0, 1, 0]])
    chosen = torch.tensor(losses.certain(TEACHER.argmax(axis=1), 4)).double()
    found = losses.soft_divergence(torch.tensor(LOGITS), chosen, 1.0)
    expected = -log_softmax(LOGITS, axis=1)[np.arange(6), TEACHER.argmax(axis=1)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)

"""The weight of two opinions, against a search over a grid."""

import numpy as np
import pytest

from journeyman.certify.mixture import Mixture, fit_mixture


def opinions(n: int, skills: tuple[float, float], seed: int = 0):
    """Student's and teacher's probabilities float64[n, 5] of a truth int64[n], errors apart."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 5, n)
    logits = [skill * np.eye(5)[gold] + rng.normal(size=(n, 5)) for skill in skills]
    student, teacher = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in logits)
    return student, teacher, gold


def cross_entropy(p: np.ndarray, gold: np.ndarray) -> float:
    return -float(np.log(p[np.arange(len(gold)), gold]).mean())


def test_no_weight_on_a_grid_fits_gold_better():
    student, teacher, gold = opinions(2000, (1.5, 2.0))
    got = fit_mixture(student, teacher, gold)
    best = min(
        cross_entropy(got.model_copy(update={"student_weight": w}).of(student, teacher), gold)
        for w in np.linspace(0, 1, 201)
    )
    mixed = got.of(student, teacher)
    assert cross_entropy(mixed, gold) <= best + 1e-7
    assert 0 < got.student_weight < 0.5  # the weaker of the two
    right = [(p.argmax(axis=1) == gold).mean() for p in (student, teacher, mixed)]
    assert right[2] > max(right[:2])


def test_an_opinion_that_says_nothing_weighs_nothing():
    student, teacher, gold = opinions(500, (2.0, 2.0))
    nothing = np.full_like(student, 0.2)
    assert fit_mixture(nothing, teacher, gold).student_weight == pytest.approx(0, abs=0.02)
    assert fit_mixture(student, nothing, gold).student_weight == pytest.approx(1, abs=0.02)


def test_temperatures_make_an_overconfident_opinion_honest():
    student, teacher, gold = opinions(3000, (1.5, 1.5))
    sharp = teacher**3 / (teacher**3).sum(axis=1, keepdims=True)
    got, honest = fit_mixture(student, sharp, gold), fit_mixture(student, teacher, gold)
    assert got.teacher_temperature == pytest.approx(3 * honest.teacher_temperature, rel=1e-3)
    np.testing.assert_allclose(got.of(student, sharp), honest.of(student, teacher), atol=1e-4)


def test_a_row_is_mixed_alone_as_in_a_batch_and_zeros_are_fine():
    mixture = Mixture(student_weight=0.4, student_temperature=1.3, teacher_temperature=0.7)
    student = np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    teacher = np.array([[0.0, 0.0, 1.0], [0.5, 0.25, 0.25]])
    both = mixture.of(student, teacher)
    assert (both[:1] == mixture.of(student[:1], teacher[:1])).all()
    np.testing.assert_allclose(both.sum(axis=1), 1)
    np.testing.assert_allclose(both[0], [0.4, 0, 0.6], atol=1e-8)

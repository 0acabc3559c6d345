"""Each metric against scikit-learn, SciPy or a loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from journeyman.certify import metrics
from journeyman.errors import DataError


def sample(n_rows: int = 400, n_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    probabilities = softmax(rng.normal(0, 2, (n_rows, n_classes)), axis=1)
    return probabilities, rng.integers(0, n_classes, n_rows)


def test_accuracy_and_agreement_match_scikit_learn():
    probabilities, targets = sample()
    predicted = probabilities.argmax(axis=1)
    assert metrics.accuracy(predicted, targets) == accuracy_score(targets, predicted)
    assert metrics.agreement(predicted, targets) == accuracy_score(targets, predicted)
    assert metrics.agreement(["a", "b"], ["a", "c"]) == 0.5


def test_negative_log_likelihood_matches_scikit_learn():
    probabilities, targets = sample()
    expected = log_loss(targets, probabilities, labels=range(4))
    assert metrics.negative_log_likelihood(probabilities, targets) == pytest.approx(expected)


def test_brier_matches_scikit_learn():
    probabilities, targets = sample()
    expected = brier_score_loss(targets, probabilities, labels=range(4), scale_by_half=False)
    assert metrics.brier(probabilities, targets) == pytest.approx(expected)


def test_kl_divergence_matches_scipy():
    teacher, _ = sample()
    student = softmax(np.random.default_rng(2).normal(0, 1, teacher.shape), axis=1)
    expected = np.mean([entropy(p, q) for p, q in zip(teacher, student, strict=True)])
    assert metrics.kl_divergence(teacher, student) == pytest.approx(expected)
    assert metrics.kl_divergence(teacher, teacher) == 0


def test_impossible_rows_leave_divergence_and_likelihood_finite():
    certain, opposite = [[1.0, 0.0]], [[0.0, 1.0]]
    assert 700 < metrics.kl_divergence(certain, opposite) < 750
    assert 700 < metrics.negative_log_likelihood(opposite, [0]) < 750
    assert metrics.kl_divergence(certain, certain) == 0


def test_area_under_risk_coverage_matches_a_loop():
    rng = np.random.default_rng(3)
    scores, losses = rng.normal(size=100), rng.random(100) < 0.3
    ranked = losses[np.argsort(-scores)]
    expected = np.mean([ranked[:k].mean() for k in range(1, 101)])
    assert metrics.area_under_risk_coverage(scores, losses) == pytest.approx(expected)


def test_area_under_risk_coverage_takes_the_mean_over_the_orders_of_a_tie():
    scores = np.array([3, 2, 2, 2, 1], dtype=float)
    losses = np.array([0, 1, 0, 0, 1], dtype=float)
    orders = [[0, 1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 2, 3, 1, 4]]
    expected = np.mean([[losses[o][:k].mean() for k in range(1, 6)] for o in orders])
    assert metrics.area_under_risk_coverage(scores, losses) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_area_under_risk_coverage_ignores_the_order_of_rows(rows, random):
    shuffled = random.sample(rows, len(rows))
    one, other = (
        metrics.area_under_risk_coverage([s for s, _ in r], [x for _, x in r])
        for r in (rows, shuffled)
    )
    assert one == pytest.approx(other)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.accuracy([], []),
        lambda: metrics.agreement([1, 2], [1]),
        lambda: metrics.brier([[0.5, 0.5]], [2]),
        lambda: metrics.brier([[0.5, 0.5]], [-1]),
        lambda: metrics.negative_log_likelihood([[0.5, 0.5]], [0.0]),
        lambda: metrics.kl_divergence([[0.5, 0.5]], [[0.2, 0.3, 0.5]]),
        lambda: metrics.area_under_risk_coverage([], []),
    ],
)
def test_rows_that_do_not_fit_are_refused(call):
    with pytest.raises(DataError):
        call()

"""Calibration against a loop."""

import numpy as np
import pytest
from scipy.special import softmax

from journeyman.errors import DataError
from journeyman.probabilities import expected_calibration_error, reliability_bins


def calibration_error_by_loop(probabilities, targets, n_bins):
    n = len(targets)
    total = 0.0
    for b in range(n_bins):
        rows = [i for i in range(n) if b / n_bins < probabilities[i].max() <= (b + 1) / n_bins]
        if rows:
            confidence = np.mean([probabilities[i].max() for i in rows])
            right = np.mean([probabilities[i].argmax() == targets[i] for i in rows])
            total += len(rows) / n * abs(confidence - right)
    return total


@pytest.mark.parametrize("n_bins", [1, 7, 15])
def test_expected_calibration_error_matches_a_loop(n_bins):
    rng = np.random.default_rng(1)
    probabilities = softmax(rng.normal(0, 2, (400, 4)), axis=1)
    targets = rng.integers(0, 4, 400)
    expected = calibration_error_by_loop(probabilities, targets, n_bins)
    got = expected_calibration_error(probabilities, targets, n_bins)
    assert got == pytest.approx(expected)


def test_reliability_bins_hold_every_row_certain_ones_too():
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25]])
    bins = reliability_bins(probabilities, [0, 1, 1], n_bins=4)
    assert bins.count.tolist() == [0, 1, 1, 1]
    assert np.isnan(bins.accuracy[0])
    assert bins.accuracy[1:].tolist() == [0.0, 0.0, 1.0]
    assert bins.mean_confidence[1:].tolist() == [0.5, 0.75, 1.0]
    assert (bins.lower[0], bins.upper[-1]) == (0.0, 1.0)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="at least one"):
        expected_calibration_error(np.empty((0, 2)), np.empty(0, dtype=int))

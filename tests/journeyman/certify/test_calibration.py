"""Temperature scaling against a grid search, and where there is little to fit on."""

import numpy as np
import pytest
from scipy.special import softmax

from journeyman.certify.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Calibrator,
    fit_temperature,
)
from journeyman.certify.metrics import negative_log_likelihood
from journeyman.errors import DataError
from journeyman.probabilities import expected_calibration_error


def overconfident(n_rows: int = 4000, true_temperature: float = 2.5):
    """Logits whose labels were drawn from softmax(logits / true_temperature)."""
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 4, (n_rows, 5))
    probabilities = softmax(logits / true_temperature, axis=1)
    labels = (probabilities.cumsum(axis=1) < rng.random((n_rows, 1))).sum(axis=1)
    return logits, labels, probabilities


def test_fit_finds_the_temperature_that_made_the_labels():
    logits, labels, probabilities = overconfident()
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)
    assert fit_temperature(logits, probabilities) == pytest.approx(2.5, rel=1e-4)


def test_fit_is_as_good_as_a_fine_grid():
    logits, labels, _ = overconfident(300)
    grid = np.exp(np.linspace(np.log(0.5), np.log(10), 600))
    losses = [negative_log_likelihood(softmax(logits / t, axis=1), labels) for t in grid]
    calibrated = Calibrator(temperature=fit_temperature(logits, labels)).probabilities(logits)
    assert negative_log_likelihood(calibrated, labels) <= min(losses) + 1e-9


def test_calibrating_lowers_the_calibration_error_and_changes_no_answer():
    logits, labels, _ = overconfident()
    before = Calibrator().probabilities(logits)
    after = Calibrator(temperature=fit_temperature(logits, labels)).probabilities(logits)
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all()
    errors = [expected_calibration_error(p, labels) for p in (before, after)]
    assert errors[1] < errors[0] / 3


def test_student_that_is_always_right_gets_a_bounded_temperature():
    logits = np.eye(3)[[0, 1, 2, 0]] * 2.0
    temperature = fit_temperature(logits, np.array([0, 1, 2, 0]))
    assert MIN_TEMPERATURE <= temperature < 0.1
    assert np.isfinite(Calibrator(temperature=temperature).probabilities(logits)).all()


def test_student_that_is_always_wrong_gets_a_bounded_temperature():
    logits = np.eye(3)[[0, 1, 2, 0]] * 2.0
    temperature = fit_temperature(logits, np.array([1, 2, 0, 1]))
    assert temperature == pytest.approx(MAX_TEMPERATURE, rel=1e-4)
    Calibrator(temperature=temperature)


def test_targets_of_one_class_only_still_give_a_temperature():
    rng = np.random.default_rng(5)
    temperature = fit_temperature(rng.normal(size=(50, 3)), np.zeros(50, dtype=int))
    assert MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE


def test_logits_that_say_nothing_leave_the_temperature_at_one():
    assert fit_temperature(np.zeros((10, 3)), np.arange(10) % 3) == 1.0


@pytest.mark.parametrize(
    ("logits", "targets", "complaint"),
    [
        (np.empty((0, 3)), np.empty(0, dtype=int), "Give the `calibrate` split some rows"),
        (np.zeros((4, 1)), np.zeros(4, dtype=int), "at least two classes"),
        (np.zeros((2, 3)), np.array([0, 3]), "but there are 3 classes"),
        (np.zeros((2, 3)), np.array([0, 1, 2]), "expected \\(2,\\) whole numbers"),
        (np.zeros((2, 3)), np.log(np.full((2, 3), 1 / 3)), "not log-probabilities"),
        (np.array([[0.0, 1.0], [np.inf, 0.0]]), np.array([0, 1]), "Row 1 of the logits"),
    ],
)
def test_rows_that_cannot_be_fitted_are_refused(logits, targets, complaint):
    with pytest.raises(DataError, match=complaint):
        fit_temperature(logits, targets)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e9, float("nan")])
def test_calibrator_refuses_a_temperature_that_no_fit_gives(temperature):
    with pytest.raises(DataError, match="Fit it with fit_temperature"):
        Calibrator(temperature=temperature)

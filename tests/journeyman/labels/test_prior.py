"""The prior that is taken out, against a general optimiser."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from journeyman.labels.prior import corrected, fit_log_prior

ROWS = scipy.special.log_softmax(
    np.random.default_rng(0).normal((6, 0, -3), 8, size=(500, 3)), axis=1
)


def test_without_shares_it_is_batch_calibration():
    np.testing.assert_allclose(fit_log_prior(ROWS), np.log(np.exp(ROWS).mean(axis=0)))


@pytest.mark.parametrize("shares", [(0.87, 0.1, 0.03), (1 / 3, 1 / 3, 1 / 3), (0.02, 0.18, 0.8)])
def test_known_shares_are_what_the_corrected_probabilities_come_to(shares):
    wanted = np.array(shares)
    log_prior = fit_log_prior(ROWS, wanted)
    np.testing.assert_allclose(np.exp(corrected(ROWS, log_prior)).mean(axis=0), wanted, atol=1e-6)

    def dual(bias):  # convex; its gradient is the mean probabilities less the shares
        return scipy.special.logsumexp(ROWS + bias, axis=1).mean() - wanted @ bias

    best = scipy.optimize.minimize(dual, np.zeros(3)).x
    np.testing.assert_allclose(-log_prior, best - best.mean(), atol=1e-3)


def test_shares_far_from_what_the_teacher_is_sure_of_are_reached():
    sure = scipy.special.log_softmax(np.array([[60.0, 0.0]] * 99 + [[0.0, 40.0]]), axis=1)
    log_prior = fit_log_prior(sure, np.array([0.5, 0.5]))
    np.testing.assert_allclose(np.exp(corrected(sure, log_prior)).mean(axis=0), 0.5, atol=1e-3)

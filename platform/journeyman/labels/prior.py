"""Prior correction: what the teacher says of any text at all is taken out of what it says of one.

Batch Calibration (Zhou et al. 2024, "Batch Calibration: Rethinking Calibration for In-Context
Learning and Prompt Engineering"): log p'(y | x) = log p(y | x) - log mean_x p(y | x), normalised.
Where the classes are known not to be equally frequent, what is taken out is such that the mean of
the corrected probabilities is the shares given, instead of about equal.
Fitted on train rows, stored in the manifest, applied alike when labels are read and served.
"""

from __future__ import annotations

import numpy as np

_STEPS, _CLOSE = 10_000, 1e-6


def fit_log_prior(class_logprobs: np.ndarray, shares: np.ndarray | None = None) -> np.ndarray:
    """float64[c]: log of the mean class probability over rows; class_logprobs: float[n, c].

    shares: float64[c], adding up to 1: the means that the corrected probabilities are to have. Each
    step multiplies a class by what it lacks, as in iterative proportional fitting; the fixed point
    is the minimum of a convex function (the mean log-normaliser less the shares' part).
    """
    logprobs = np.asarray(class_logprobs, dtype=np.float64)
    if shares is None:
        return _log_mean(logprobs)
    log_prior, wanted = np.zeros(len(shares)), np.log(shares)
    for _ in range(_STEPS):
        excess = _log_mean(corrected(logprobs, log_prior)) - wanted
        log_prior += excess
        if np.abs(excess).max() < _CLOSE:
            break
    return log_prior - log_prior.mean()


def _log_mean(logprobs: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(logprobs, axis=0) - np.log(len(logprobs))


def corrected(class_logprobs: np.ndarray, log_prior: np.ndarray | None) -> np.ndarray:
    """float64[..., c], normalised; without a prior the log-probabilities as they are."""
    logprobs = np.asarray(class_logprobs, dtype=np.float64)
    if log_prior is not None:
        logprobs = logprobs - log_prior
    return logprobs - np.logaddexp.reduce(logprobs, axis=-1, keepdims=True)

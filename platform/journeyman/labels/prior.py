"""Prior correction: what the teacher says of any text at all is taken out of what it says of one.

Batch Calibration (Zhou et al. 2024, "Batch Calibration: Rethinking Calibration for In-Context
Learning and Prompt Engineering"): log p'(y | x) = log p(y | x) - log mean_x p(y | x), normalised.
Fitted on train rows, stored in the manifest, applied alike when labels are read and served.
"""

from __future__ import annotations

import numpy as np


def fit_log_prior(class_logprobs: np.ndarray) -> np.ndarray:
    """float64[c]: log of the mean class probability over rows; class_logprobs: float[n, c]."""
    logprobs = np.asarray(class_logprobs, dtype=np.float64)
    return np.logaddexp.reduce(logprobs, axis=0) - np.log(len(logprobs))


def corrected(class_logprobs: np.ndarray, log_prior: np.ndarray | None) -> np.ndarray:
    """float64[..., c], normalised; without a prior the log-probabilities as they are."""
    logprobs = np.asarray(class_logprobs, dtype=np.float64)
    if log_prior is not None:
        logprobs = logprobs - log_prior
    return logprobs - np.logaddexp.reduce(logprobs, axis=-1, keepdims=True)

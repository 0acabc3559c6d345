"""Temperature scaling of a student's logits (Guo et al. 2017), fitted on `calibrate` rows.

A temperature changes no answer, only how sure the student says it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from journeyman.errors import DataError
from journeyman.probabilities import FloatArray

# Where every row is right, no temperature is small enough; where the logits say nothing, none is
# large enough. The bounds keep both finite, well outside what networks need (0.5 to 5).
MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrator:
    """Turns logits into calibrated probabilities.

    Attributes:
        temperature: what logits are divided by; above 1 makes the student less sure.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise DataError(
                f"The calibrator's temperature is {self.temperature}, outside "
                f"{MIN_TEMPERATURE} to {MAX_TEMPERATURE}. Fit it with fit_temperature."
            )

    def probabilities(self, logits: npt.ArrayLike) -> FloatArray:
        """softmax(logits[n, c] / temperature): float64[n, c]."""
        return np.asarray(softmax(_checked_logits(logits) / self.temperature, axis=1))


def fit_temperature(logits: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """The temperature with the least cross-entropy to the targets.

    The cross-entropy is convex in 1/temperature, so it has one minimum in its logarithm too, and
    a bounded search on that line finds it. Where nothing beats temperature 1, it stays at 1.

    Args:
        logits: float[n, c].
        targets: int[n], the right class of each row, or float[n, c], the distribution to match
            (such as the teacher's).
    """
    checked = _checked_logits(logits)
    distribution = _target_distribution(targets, checked.shape)

    def cross_entropy(log_temperature: float) -> float:
        log_probabilities = log_softmax(checked / np.exp(log_temperature), axis=1)
        return float(-(distribution * log_probabilities).sum(axis=1).mean())

    found = minimize_scalar(
        cross_entropy,
        bounds=(np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-7},
    )
    if cross_entropy(0.0) <= found.fun + 1e-12:
        return 1.0
    return float(np.clip(np.exp(found.x), MIN_TEMPERATURE, MAX_TEMPERATURE))


def _checked_logits(values: npt.ArrayLike) -> FloatArray:
    logits = np.ascontiguousarray(values, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise DataError(
            f"Logits have shape {logits.shape}, expected [rows, classes] with at least two "
            "classes: one class leaves nothing to be unsure about. Check the label names."
        )
    if not np.isfinite(logits).all():
        raise DataError(
            f"Row {int(np.argmin(np.isfinite(logits).all(axis=1)))} of the logits is not finite. "
            "The student has diverged or its checkpoint is damaged: train it again."
        )
    return logits


def _target_distribution(targets: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    values = np.asarray(targets)
    n_rows, n_classes = shape
    if not n_rows:
        raise DataError(
            "There are no rows to fit a temperature on. Give the `calibrate` split some rows."
        )
    if values.shape == shape:
        distribution = values.astype(np.float64)
        if (distribution >= 0).all() and np.allclose(distribution.sum(axis=1), 1, atol=1e-3):
            return distribution
        raise DataError(
            "Targets of the logits' shape must be distributions: rows that sum to 1, none "
            "negative. Pass probabilities, not log-probabilities."
        )
    if values.shape == (n_rows,) and values.dtype.kind in "iu":
        if values.min() >= 0 and values.max() < n_classes:
            return np.asarray(np.eye(n_classes)[values])
        raise DataError(
            f"Targets run from {values.min()} to {values.max()}, but there are {n_classes} "
            "classes. Number them from 0 in the order of the label names."
        )
    raise DataError(
        f"Targets have shape {values.shape} and type {values.dtype}, expected ({n_rows},) whole "
        f"numbers or {shape} probabilities."
    )

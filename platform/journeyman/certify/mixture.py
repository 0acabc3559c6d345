"""Two opinions on an escalated request: a mixture of the student's and the teacher's distribution.

The student's is paid for before the teacher is asked. A linear opinion pool (Stone, The opinion
pool, 1961) of the two, each with a temperature of its own, fitted on `calibrate` rows with gold.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import minimize_scalar

from journeyman.certify.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, fit_temperature
from journeyman.errors import DataError
from journeyman.probabilities import FloatArray, IntArray

_LEAST_PROBABILITY = 1e-12


class Mixture(BaseModel):
    """student_weight · student + (1 - student_weight) · teacher, each at its temperature.

    Attributes:
        student_temperature: on top of the bundle's, which fits the teacher's answers, not gold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    student_weight: float = Field(ge=0, le=1)
    student_temperature: float = Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    teacher_temperature: float = Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)

    def of(self, student: FloatArray, teacher: FloatArray) -> FloatArray:
        """float64[n, c], of the student's calibrated probabilities[n, c] and the teacher's[n, c],
        prior corrected. Depends on each row alone."""
        own = _tempered(student, self.student_temperature)
        theirs = _tempered(teacher, self.teacher_temperature)
        return self.student_weight * own + (1 - self.student_weight) * theirs


def fit_mixture(student: FloatArray, teacher: FloatArray, gold: IntArray) -> Mixture:
    """The mixture with the least cross-entropy to gold: first each one's temperature, then the
    weight, in which the cross-entropy is convex.

    Args:
        student, teacher: float64[n, c], as `Mixture.of` takes them.
        gold: int64[n]; rows with -1 are left out. Raises DataError where all are.
    """
    known = gold >= 0
    if not known.any():
        raise DataError(
            "cascade.combine: mixture is fitted on calibrate rows with gold labels, and none has "
            "one; give that split some, or set cascade.combine: teacher."
        )
    student, teacher, gold = student[known], teacher[known], gold[known]
    of_student = fit_temperature(_logs(student), gold)
    of_teacher = fit_temperature(_logs(teacher), gold)
    rows = np.arange(len(gold))
    own = _tempered(student, of_student)[rows, gold]
    theirs = _tempered(teacher, of_teacher)[rows, gold]

    def cross_entropy(weight: float) -> float:
        mixed = weight * own + (1 - weight) * theirs
        return -float(np.log(np.maximum(mixed, _LEAST_PROBABILITY)).mean())

    inside = minimize_scalar(cross_entropy, bounds=(0, 1), method="bounded").x
    return Mixture(
        student_weight=min((0.0, 1.0, float(inside)), key=cross_entropy),
        student_temperature=of_student,
        teacher_temperature=of_teacher,
    )


def _logs(probabilities: FloatArray) -> FloatArray:
    return np.log(np.maximum(probabilities, _LEAST_PROBABILITY))


def _tempered(probabilities: FloatArray, temperature: float) -> FloatArray:
    raised = np.exp(_logs(probabilities) / temperature)
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))

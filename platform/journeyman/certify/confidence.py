"""From a student's logits to the number that a threshold is compared with.

One function for certification, report and serving, so that what is served is what was certified.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from journeyman.certify.calibration import Calibrator
from journeyman.certify.deferral_head import DeferralHead, class_features
from journeyman.certify.scores import ScoreName, refined, score
from journeyman.errors import RecipeError
from journeyman.probabilities import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Confidence:
    """How a bundle scores a row.

    Attributes:
        calibrator: turns logits into probabilities.
        score: which function of them is the confidence.
        head: the learned one, if that is `deferral_head`.
        class_thresholds: float64[c], subtracted from the score by the student's answer, so that
            one threshold of 0 stands for one of each answer's own; None if there is but one. The
            difference of two doubles has the exact sign, so nothing is lost by it.
        threshold: of one of several students, subtracted likewise.
    """

    calibrator: Calibrator
    score: ScoreName
    head: DeferralHead | None = None
    class_thresholds: FloatArray | None = None
    threshold: float = 0.0

    def of(self, logits: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Calibrated probabilities, float64[n, c], and confidence, float64[n], of logits[n, c]."""
        probabilities = self.calibrator.probabilities(logits)
        return probabilities, self.of_probabilities(probabilities)

    def of_probabilities(self, probabilities: FloatArray) -> FloatArray:
        """Confidence, float64[n], of calibrated probabilities[n, c]."""
        if self.score != "deferral_head":
            values = score(probabilities, self.score)
        elif self.head is None:
            raise RecipeError("The score deferral_head needs a fitted head: certify again.")
        else:
            values = refined(self.head.may_answer(class_features(probabilities)), probabilities)
        if self.class_thresholds is None:
            return np.asarray(values - self.threshold)
        return np.asarray(values - self.class_thresholds[probabilities.argmax(axis=1)])

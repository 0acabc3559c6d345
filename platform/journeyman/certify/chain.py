"""Students that are asked in turn: which of them a row goes to, and how sure that one is.

To everything behind it a chain is one student. A row's answer, and its confidence, are those of the
first student that is confident enough, or of the last one where none is: its score less its own
threshold, so that 0 is the threshold of them all. A stricter one sends to the teacher what any
student answers with less to spare, without asking the next: what is answered only ever shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from journeyman.certify.confidence import Confidence
from journeyman.probabilities import FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """n rows behind s students.

    probabilities: float64[n, c], calibrated, of the student that a row goes to; confidence:
    float64[n], of that one; stage: int64[n], which one, from 0.
    """

    probabilities: FloatArray
    confidence: FloatArray
    stage: IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """confidences: of each student in turn; of several each less its threshold."""

    confidences: tuple[Confidence, ...]

    def of(self, logits: Sequence[npt.ArrayLike]) -> Routed:
        """logits: float[n, c] of each student, on the same rows."""
        scored = [c.of(own) for c, own in zip(self.confidences, logits, strict=True)]
        confidences = np.stack([confidence for _, confidence in scored])
        goes_on = np.stack([self.goes_on(own, i) for i, own in enumerate(confidences)])
        stage = goes_on.argmin(axis=0)  # the first that does not pass it on
        rows = np.arange(len(stage))
        return Routed(
            probabilities=np.stack([p for p, _ in scored])[stage, rows],
            confidence=confidences[stage, rows],
            stage=stage,
        )

    def goes_on(self, confidence: FloatArray | float, stage: int) -> npt.NDArray[np.bool_]:
        """Whether a row with this confidence goes from one student to the next."""
        is_last = stage == len(self.confidences) - 1
        return np.asarray((np.asarray(confidence) <= 0) & (not is_last))

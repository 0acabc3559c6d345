"""What a threshold is: a row is accepted if its score is strictly above it.

Owns the two extremes, every distinct threshold that some rows allow, and the written form.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator

from journeyman.errors import DataError
from journeyman.probabilities import FloatArray

IntArray = npt.NDArray[np.int64]

ESCALATE_EVERYTHING = math.inf
ANSWER_EVERYTHING = -math.inf
# Stands for the infinities where a threshold is subtracted from a score: scores lie within +-17.
_ABOVE_EVERY_SCORE = 64.0


def written_threshold(threshold: object) -> object:
    """The form that goes into JSON, which has no infinities.

    Escalate everything is null, answer everything the lowest finite number; all else is as it is.
    """
    if threshold == ESCALATE_EVERYTHING:
        return None
    if threshold == ANSWER_EVERYTHING:
        return -sys.float_info.max
    return threshold


def read_threshold(written: float | None) -> float:
    """A written threshold as a number to compare with: null is +inf, so nothing is above it."""
    return ESCALATE_EVERYTHING if written is None else written


def subtractable(threshold: float) -> float:
    """A threshold of ``scores``, finite: what is left of a score is above 0 just where the score is
    above the threshold, since the difference of two doubles has the exact sign."""
    return min(max(threshold, -_ABOVE_EVERY_SCORE), _ABOVE_EVERY_SCORE)


# A threshold in a file; takes +inf and -inf as they come from a certificate.
WrittenThreshold = Annotated[float | None, BeforeValidator(written_threshold)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdTable:
    """Every acceptance set that a threshold can make of some rows, strictest first.

    Attributes:
        threshold: float64[m], falling from +inf (no row accepted) to -inf (all accepted).
        n_accepted: int64[m], rows strictly above each threshold; strictly rising.
        n_errors: int64[m], how many of those differ.
        order: int64[n], the rows from most to least confident.
        ranked_scores: float64[n], their scores in that order.
    """

    threshold: FloatArray
    n_accepted: IntArray
    n_errors: IntArray
    order: IntArray
    ranked_scores: FloatArray

    @property
    def n(self) -> int:
        """Rows in all."""
        return len(self.order)

    def accepted_sum(self, values: npt.ArrayLike) -> FloatArray:
        """Sum of values[n] over the rows accepted at each threshold: float64[m]."""
        return _sums_at(self.n_accepted, np.asarray(values, dtype=np.float64)[self.order])

    def index_at(self, threshold: float) -> int:
        """Index of the entry that accepts the same rows as `threshold`."""
        n_above = np.searchsorted(-self.ranked_scores, -threshold, side="left")
        return int(np.searchsorted(self.n_accepted, n_above))


def threshold_table(scores: npt.ArrayLike, differs: npt.ArrayLike) -> ThresholdTable:
    """Tabulate every distinct threshold over scores[n] and differs[n] (bool).

    Tied rows are accepted or escalated together, so they share one entry.
    """
    score_of_row = np.asarray(scores, dtype=np.float64)
    differs_of_row = np.asarray(differs)
    if score_of_row.ndim != 1 or score_of_row.shape != differs_of_row.shape:
        raise DataError(
            f"Scores have shape {score_of_row.shape}, `differs` {differs_of_row.shape}. "
            "Pass one of each for every row."
        )
    if differs_of_row.dtype != np.bool_ or not np.isfinite(score_of_row).all():
        raise DataError(
            f"`differs` has type {differs_of_row.dtype}, expected bool, and "
            f"{int((~np.isfinite(score_of_row)).sum())} scores are not finite, expected none. "
            "Compare the answers of student and teacher; take scores from certify.scores."
        )
    order = np.argsort(-score_of_row, kind="stable")
    ranked = score_of_row[order]
    # A prefix can be cut off where the next score is strictly lower.
    cuts = np.flatnonzero(ranked[:-1] > ranked[1:]) + 1
    n_accepted = np.unique(np.concatenate(([0], cuts, [len(ranked)]))).astype(np.int64)
    thresholds = np.concatenate(([ESCALATE_EVERYTHING], ranked[cuts], [ANSWER_EVERYTHING]))
    return ThresholdTable(
        # No rows leave one way to accept them, not two.
        threshold=thresholds[: len(n_accepted)],
        n_accepted=n_accepted,
        n_errors=_sums_at(n_accepted, differs_of_row[order].astype(np.float64)).astype(np.int64),
        order=order,
        ranked_scores=ranked,
    )


def _sums_at(n_accepted: IntArray, ordered: FloatArray) -> FloatArray:
    return np.concatenate(([0.0], np.cumsum(ordered)))[n_accepted]

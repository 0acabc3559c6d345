"""The cost-quality curve: what each threshold costs and gives, from no answer to every answer.

Point estimates on the rows at hand. The certificate, not the curve, says what is promised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from journeyman.certify.thresholds import ThresholdTable, WrittenThreshold, threshold_table
from journeyman.errors import DataError
from journeyman.probabilities import FloatArray


class CurvePoint(BaseModel):
    """One threshold of the curve, as it is written into a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    threshold: WrittenThreshold
    coverage: float
    system_disagreement: float
    selective_disagreement: float | None
    cascade_accuracy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CostQualityCurve:
    """Arrays over every distinct threshold, from escalate everything to answer everything.

    Attributes:
        table: the thresholds, and what each accepts.
        coverage: float64[m], share of rows that the student answers, 0 to 1; the teacher's cost is
            the rest.
        system_disagreement: float64[m], share of all rows that the student answers otherwise than
            the teacher.
        selective_disagreement: float64[m], the same as a share of the answered rows; NaN where
            there are none.
        cascade_accuracy: float64[m] against gold, the student's answer where accepted and the
            teacher's elsewhere; None without gold.
        student_accuracy: of the student alone; None without gold.
        teacher_accuracy: of the teacher alone; None without gold.
    """

    table: ThresholdTable
    coverage: FloatArray
    system_disagreement: FloatArray
    selective_disagreement: FloatArray
    cascade_accuracy: FloatArray | None
    student_accuracy: float | None
    teacher_accuracy: float | None

    @property
    def threshold(self) -> FloatArray:
        """float64[m], falling from +inf to -inf; a row is accepted strictly above it."""
        return self.table.threshold

    def at(self, threshold: float) -> CurvePoint:
        """The point of any threshold, on the curve or between two of its points."""
        return self._point(self.table.index_at(threshold), threshold)

    def to_points(self, max_points: int = 200, keep: float | None = None) -> tuple[CurvePoint, ...]:
        """Points for a bundle or a plot, thinned evenly along the coverage.

        Args:
            max_points: at most so many, not counting `keep`; at least 2.
            keep: the chosen threshold, always among the points, besides both ends.
        """
        if max_points < 2:
            raise DataError(f"max_points is {max_points}, expected at least 2 for both ends.")
        last = len(self.coverage) - 1
        wanted = np.linspace(0.0, 1.0, max_points)
        if last < max_points:
            indices = np.arange(last + 1)
        else:
            indices = np.unique(np.searchsorted(self.coverage, wanted).clip(0, last))
        points = {float(self.threshold[i]): self._point(int(i)) for i in indices}
        if keep is not None:
            points[keep] = self.at(keep)
        return tuple(points[threshold] for threshold in sorted(points, reverse=True))

    def _point(self, index: int, threshold: float | None = None) -> CurvePoint:
        selective = float(self.selective_disagreement[index])
        return CurvePoint(
            threshold=float(self.threshold[index]) if threshold is None else threshold,
            coverage=float(self.coverage[index]),
            system_disagreement=float(self.system_disagreement[index]),
            selective_disagreement=None if np.isnan(selective) else selective,
            cascade_accuracy=(
                None if self.cascade_accuracy is None else float(self.cascade_accuracy[index])
            ),
        )


def cost_quality_curve(
    scores: npt.ArrayLike,
    differs: npt.ArrayLike,
    student_right: npt.ArrayLike | None = None,
    teacher_right: npt.ArrayLike | None = None,
) -> CostQualityCurve:
    """Compute the curve of some rows.

    Args:
        scores: float[n], higher is more confident.
        differs: bool[n], the student's answer is not the teacher's.
        student_right: bool[n] against gold, or None without gold.
        teacher_right: bool[n] against gold, or None without gold.
    """
    table = threshold_table(scores, differs)
    if not table.n:
        raise DataError("There are no rows to draw a cost-quality curve from. Label some.")
    with np.errstate(invalid="ignore"):
        selective = table.n_errors / table.n_accepted
    cascade = student_accuracy = teacher_accuracy = None
    if student_right is not None and teacher_right is not None:
        student, teacher = _right_rows(student_right, table.n), _right_rows(teacher_right, table.n)
        student_accuracy, teacher_accuracy = float(student.mean()), float(teacher.mean())
        cascade = (teacher.sum() + table.accepted_sum(student - teacher)) / table.n
    elif student_right is not None or teacher_right is not None:
        raise DataError("Accuracy needs gold for both: pass student_right and teacher_right.")
    return CostQualityCurve(
        table=table,
        coverage=table.n_accepted / table.n,
        system_disagreement=table.n_errors / table.n,
        selective_disagreement=selective,
        cascade_accuracy=cascade,
        student_accuracy=student_accuracy,
        teacher_accuracy=teacher_accuracy,
    )


def _right_rows(right: npt.ArrayLike, n: int) -> FloatArray:
    values = np.asarray(right)
    if values.shape != (n,) or values.dtype != np.bool_:
        raise DataError(
            f"Rows that are right have shape {values.shape} and type {values.dtype}, expected "
            f"({n},) bool. Compare each answer with gold."
        )
    return values.astype(np.float64)

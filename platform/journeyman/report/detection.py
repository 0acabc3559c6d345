"""How well one label is found: precision and recall of teacher, student and cascade, by gold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from journeyman.probabilities import area_under_roc, balanced_accuracy
from journeyman.report.data import TestRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """Rows with gold, by who answers.

    Attributes:
        who: teacher, student or cascade.
        found: rows of the label that are answered so.
        said: rows that are answered so.
        there: rows of the label.
        balanced_accuracy: mean over the labels that gold has of the share answered right.
        auc: P(a row of the label is given a higher probability of it than another row); whatever
            share of rows is answered so. None for the cascade, which has no probabilities of its
            own, and where gold is of one kind.
        at_median: balanced accuracy where the half of the rows with the higher probability is
            answered so, and the other half not: as the AUC, whatever prior the model believes in.
    """

    who: str
    found: int
    said: int
    there: int
    balanced_accuracy: float
    auc: float | None
    at_median: float | None

    @property
    def precision(self) -> float:
        """0 where nothing is said to be of the label."""
        return self.found / max(self.said, 1)

    @property
    def recall(self) -> float:
        """0 where no row is of the label."""
        return self.found / max(self.there, 1)


def detections(rows: TestRows, positive: int) -> tuple[Detection, ...]:
    """Of the label with this number; none where no test row has gold."""
    known = rows.has_gold
    if not known.any():
        return ()
    cascade = np.where(rows.accepted, rows.student_answer, rows.escalated_answer)
    answers = {"teacher": rows.teacher_answer, "student": rows.student_answer, "cascade": cascade}
    probabilities = {"teacher": rows.teacher, "student": rows.student}
    is_there = (rows.gold == positive) & known

    def at_median(who: str) -> float | None:
        if who not in probabilities:
            return None
        of_label = probabilities[who][known, positive]
        above = of_label > np.median(of_label)
        return balanced_accuracy(above.astype(np.int64), is_there[known].astype(np.int64))

    return tuple(
        Detection(
            who=who,
            found=int(((answer == positive) & is_there).sum()),
            said=int(((answer == positive) & known).sum()),
            there=int(is_there.sum()),
            balanced_accuracy=balanced_accuracy(answer[known], rows.gold[known]),
            auc=area_under_roc(probabilities[who][known, positive], is_there[known])
            if who in probabilities
            else None,
            at_median=at_median(who),
        )
        for who, answer in answers.items()
    )

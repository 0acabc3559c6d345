"""What the test rows show, and two tests that keep chance from sounding like news.

Numbers only; `verdict` puts them into words.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.special import bdtrc

from journeyman.certify import paired
from journeyman.certify.certificate import GuaranteeKind
from journeyman.report.data import BoolArray, TestRows

# Realised risk is doubted only here: by the draw of rows alone, an honest promise is exceeded on
# `test` in more than one run of ten.
BROKEN = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstGold:
    """Right answers among the n test rows that have gold.

    Attributes:
        n: rows with gold.
        teacher, student, cascade: how many of them each gets right.
        escalated: how many are right if all are escalated: the teacher's, or the mixture's.
        only_student, only_teacher: rows that just one of the two gets right.
        answered_only_student, answered_only_escalated: rows that the student answers, and that
            just one is right on: it, or what the row would be answered with if it were escalated.
    """

    n: int
    teacher: int
    student: int
    cascade: int
    escalated: int
    only_student: int
    only_teacher: int
    answered_only_student: int
    answered_only_escalated: int

    @property
    def chance(self) -> float:
        """How often they are at least so far apart where each is as likely to be the right one."""
        return paired.sign_test(self.only_student, self.only_teacher)

    @property
    def student_is_better(self) -> bool:
        """The student gets more right, and chance does not explain it."""
        return paired.is_better(self.only_student, self.only_teacher)

    @property
    def teacher_is_better(self) -> bool:
        """The teacher gets more right, and chance does not explain it."""
        return paired.is_better(self.only_teacher, self.only_student)

    @property
    def lead(self) -> float:
        """The student's share of right answers less its teacher's."""
        return (self.student - self.teacher) / self.n

    @property
    def lead_interval(self) -> tuple[float, float]:
        """95%, of answers that are paired row by row."""
        return paired.difference_interval(self.only_student, self.only_teacher, self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfAnswer:
    """Test rows on which the student says one label.

    Attributes:
        n: all of them.
        n_accepted: those that it answers.
        n_differs: answered, and otherwise than they are answered if escalated.
    """

    n: int
    n_accepted: int
    n_differs: int

    def risk(self, kind: GuaranteeKind) -> tuple[int, int]:
        """What a promise for this answer bounds: how many rows of how many."""
        return self.n_differs, self.n if kind == "system_agreement" else self.n_accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What happened on the n test rows at the bundle's threshold.

    Attributes:
        n: test rows.
        n_accepted: rows that the student answers.
        n_differs: rows, answered or not, that the student answers otherwise than they are answered
            if escalated.
        n_accepted_differs: those of them that the student answers.
        by_answer: by label, the rows on which the student says it.
        gold: None where no test row has gold.
    """

    n: int
    n_accepted: int
    n_differs: int
    n_accepted_differs: int
    by_answer: tuple[OfAnswer, ...]
    gold: AgainstGold | None


def measure(rows: TestRows) -> Measured:
    """Count what the page reports."""
    return Measured(
        n=len(rows),
        n_accepted=int(rows.accepted.sum()),
        n_differs=int(rows.differs.sum()),
        n_accepted_differs=int((rows.differs & rows.accepted).sum()),
        by_answer=tuple(_of_answer(rows, label) for label in range(rows.student.shape[1])),
        gold=_against_gold(rows),
    )


def chance_of_as_many(errors: int, n: int, alpha: float) -> float:
    """P(at least `errors` of n rows differ) if the risk were exactly alpha: one-sided binomial."""
    return 1.0 if errors == 0 else float(bdtrc(errors - 1, n, alpha))


def chance_of_drop(gold: AgainstGold, alpha: float) -> float:
    """About P(a drop at least like this one) if the drop in accuracy were exactly alpha.

    Binomial, given how many answered rows just one of the two gets right.
    """
    worse, better = gold.answered_only_escalated, gold.answered_only_student
    either = worse + better
    expected = min(0.5 + alpha * gold.n / (2 * either), 1.0) if either else 1.0
    return 1.0 if worse == 0 else float(bdtrc(worse - 1, either, expected))


def _of_answer(rows: TestRows, label: int) -> OfAnswer:
    said = rows.student_answer == label
    answered = said & rows.accepted
    return OfAnswer(
        n=int(said.sum()),
        n_accepted=int(answered.sum()),
        n_differs=int((answered & rows.differs).sum()),
    )


def _against_gold(rows: TestRows) -> AgainstGold | None:
    known = rows.has_gold
    if not known.any():
        return None
    teacher_right = (rows.teacher_answer == rows.gold)[known]
    student_right = (rows.student_answer == rows.gold)[known]
    escalated_right = (rows.escalated_answer == rows.gold)[known]
    return against_gold(student_right, teacher_right, escalated_right, rows.accepted[known])


def against_gold(
    student_right: BoolArray,
    teacher_right: BoolArray,
    escalated_right: BoolArray,
    accepted: BoolArray,
) -> AgainstGold:
    """bool[n] each, of the rows with gold."""
    return AgainstGold(
        n=len(accepted),
        teacher=int(teacher_right.sum()),
        student=int(student_right.sum()),
        cascade=int((student_right & accepted).sum() + (escalated_right & ~accepted).sum()),
        escalated=int(escalated_right.sum()),
        only_student=int((student_right & ~teacher_right).sum()),
        only_teacher=int((teacher_right & ~student_right).sum()),
        answered_only_student=int((student_right & ~escalated_right & accepted).sum()),
        answered_only_escalated=int((escalated_right & ~student_right & accepted).sum()),
    )

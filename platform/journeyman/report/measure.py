"""What the test rows show, and two tests that keep chance from sounding like news.

Numbers only; `verdict` puts them into words.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.special import bdtr, bdtrc

from journeyman.report.data import TestRows

# Student and teacher are told apart at this one-sided level, as in `certify.recommendation`.
CLEAR = 0.05
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
        chance: one-sided sign test of the better one: how often a lead like this comes about
            where each is as likely to be the one that is right.
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
    chance: float

    @property
    def student_is_better(self) -> bool:
        """The student gets more right, and chance does not explain it."""
        return self.only_student > self.only_teacher and self.chance <= CLEAR

    @property
    def teacher_is_better(self) -> bool:
        """The teacher gets more right, and chance does not explain it."""
        return self.only_teacher > self.only_student and self.chance <= CLEAR


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What happened on the n test rows at the bundle's threshold.

    Attributes:
        n: test rows.
        n_accepted: rows that the student answers.
        n_differs: rows, answered or not, that the student answers otherwise than they are answered
            if escalated.
        n_accepted_differs: those of them that the student answers.
        gold: None where no test row has gold.
    """

    n: int
    n_accepted: int
    n_differs: int
    n_accepted_differs: int
    gold: AgainstGold | None


def measure(rows: TestRows) -> Measured:
    """Count what the page reports."""
    return Measured(
        n=len(rows),
        n_accepted=int(rows.accepted.sum()),
        n_differs=int(rows.differs.sum()),
        n_accepted_differs=int((rows.differs & rows.accepted).sum()),
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


def _against_gold(rows: TestRows) -> AgainstGold | None:
    known = rows.has_gold
    if not known.any():
        return None
    teacher_right = (rows.teacher_answer == rows.gold)[known]
    student_right = (rows.student_answer == rows.gold)[known]
    escalated_right = (rows.escalated_answer == rows.gold)[known]
    accepted = rows.accepted[known]
    only_student = int((student_right & ~teacher_right).sum())
    only_teacher = int((teacher_right & ~student_right).sum())
    return AgainstGold(
        n=int(known.sum()),
        teacher=int(teacher_right.sum()),
        student=int(student_right.sum()),
        cascade=int((student_right & accepted).sum() + (escalated_right & ~accepted).sum()),
        escalated=int(escalated_right.sum()),
        only_student=only_student,
        only_teacher=only_teacher,
        answered_only_student=int((student_right & ~escalated_right & accepted).sum()),
        answered_only_escalated=int((escalated_right & ~student_right & accepted).sum()),
        chance=_sign_test(only_student, only_teacher),
    )


def _sign_test(one: int, other: int) -> float:
    """P(a fair coin splits one + other at least so unevenly, towards a given side)."""
    return float(bdtr(min(one, other), one + other, 0.5))

"""Why a request gets no answer. Each message is a sentence for the client, free of its texts.

The HTTP edge turns them into codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from journeyman.cascade.policy import Decision, Escalation


class Refusal(Exception):  # noqa: N818 - an outcome of a request, no mistake of the program's
    """Base of all reasons. retry_after_s: when the same request may fare better, where known."""

    def __init__(self, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s
        # What the student made of the texts, where it was asked; and what the teacher did all the
        # same.
        self.decided: Sequence[Decision | Escalation] = ()
        self.teacher_prompt_tokens = self.teacher_output_tokens = 0


class Overloaded(Refusal):
    """As many texts wait for the teacher as may."""


class StudentOverloaded(Overloaded):
    """As many texts wait for the student as may."""


_LONGEST_S = 60.0  # that a client is sent away for


def keeps_up(wait_s: float, request_timeout_s: float) -> bool:
    """Whether a student may be asked for which what waits takes so long. A queue as long as the
    deadline would leave no request the time to be answered: all the student's work would be for
    some that have just passed it."""
    return wait_s <= request_timeout_s / 2


def student_behind(wait_s: float) -> StudentOverloaded:
    """Of one that does not keep up."""
    return StudentOverloaded(
        f"what waits for the student takes about {wait_s:.0f} s, more than the half of a "
        "request's deadline; send this request again a little later.",
        min(wait_s, _LONGEST_S),
    )


class StudentUnavailable(Refusal):
    """The student, a deployment of its own, is starting, starting again, or gone."""


class NoClasses(Refusal):
    """A text is to be classified by a cascade that writes."""


class TeacherUnavailable(Refusal):
    """The teacher is starting, starting again, or gone. replica: of it that failed, where known;
    had_texts: whether it may have begun, so that a text may be why."""

    def __init__(
        self,
        sentence: str,
        retry_after_s: float | None = None,
        replica: str | None = None,
        had_texts: bool = True,
    ) -> None:
        super().__init__(sentence, retry_after_s)
        self.replica, self.had_texts = replica, had_texts


class TeacherStarting(TeacherUnavailable):
    """It sleeps and was woken, which is no failure of its."""


class TeacherAway(TeacherUnavailable):
    """It is known to be starting or gone, and was not asked."""


class DeadlinePassed(Refusal):
    """The request was not answered in time."""


class ColumnsRefused(Refusal):
    """A request lacks a column that the bundle needs, or has others."""


class TextRefused(Refusal):
    """The teacher can never answer this text, however often it is sent; place: in its request.

    unlabeled: places of all such texts of it, where the teacher was asked.
    """

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(f"text {place}: {reason}")
        self.place = place
        self.reason = reason
        self.unlabeled: frozenset[int] = frozenset()

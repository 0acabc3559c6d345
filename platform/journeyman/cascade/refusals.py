"""Why a request gets no answer. Each message is a sentence for the client, free of its texts.

The HTTP edge turns them into codes.
"""

from __future__ import annotations


class Refusal(Exception):  # noqa: N818 - an outcome of a request, no mistake of the program's
    """Base of all reasons. retry_after_s: when the same request may fare better, where known."""

    def __init__(self, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class Overloaded(Refusal):
    """As many texts wait for the teacher as may."""


class TeacherUnavailable(Refusal):
    """The teacher is starting, starting again, or gone."""


class TeacherStarting(TeacherUnavailable):
    """It sleeps and was woken, which is no failure of its."""


class DeadlinePassed(Refusal):
    """The request was not answered in time."""


class ColumnsRefused(Refusal):
    """A request lacks a column that the bundle needs, or has others."""


class TextRefused(Refusal):
    """The teacher can never answer this text, however often it is sent; place: in its request."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(f"text {place}: {reason}")
        self.place = place
        self.reason = reason

"""Why a request gets no answer. Each message is a sentence for the client, free of its texts.

The HTTP edge turns them into codes.
"""

from __future__ import annotations


class Refusal(Exception):  # noqa: N818 - an outcome of a request, no mistake of the program's
    """Base of all reasons."""


class Overloaded(Refusal):
    """As many texts wait for the teacher as may."""


class TeacherUnavailable(Refusal):
    """The teacher is starting, starting again, or gone."""


class DeadlinePassed(Refusal):
    """The request was not answered in time."""


class TextRefused(Refusal):
    """The teacher can never answer this text, however often it is sent."""

"""One request, from its texts to its answers: student first, teacher for what it may not answer.

Owns the order, the deadline, and what becomes of a request when the teacher fails. Asks both
models through small interfaces and knows nothing of Ray or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, Protocol

from journeyman.cascade.breaker import Breaker
from journeyman.cascade.policy import Decision, Escalation, Written, student_answers
from journeyman.cascade.refusals import (
    DeadlinePassed,
    Overloaded,
    StudentOverloaded,
    StudentUnavailable,
    TeacherAway,
    TeacherStarting,
    TeacherUnavailable,
    TextRefused,
    keeps_up,
    student_behind,
)
from journeyman.cascade.waiting import WaitingRoom
from journeyman.recipe import Cascade as Settings
from journeyman.teacher.answers import ClassLabels

Asked = Literal["cascade", "student", "teacher"]

_ASK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlabeled:
    """A text that the teacher can never answer, and why; is_garbage: its answer was no numbers,
    which may be the teacher's fault as well as the text's."""

    reason: str
    is_garbage: bool = False


Said = ClassLabels | Written | Unlabeled
Hear = Callable[[Written], None]

# Set for a request of one text whose answer is sent as it is written: told of the teacher's as far
# as it is there. One that the teacher begins again, after it failed, is told from its beginning.
listening: ContextVar[Callable[[Decision], None] | None] = ContextVar("listening", default=None)


class StudentDecisions(Protocol):
    """The student behind the policy."""

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        """One for each text; raises StudentUnavailable."""
        ...


class EscalationRule(Protocol):
    """What becomes of the teacher's answers: see ``policy.Policy``."""

    def is_answer(self, said: ClassLabels | Written) -> bool: ...
    def escalated(self, said: ClassLabels | Written, student: Decision | None) -> Decision: ...
    def same(self, one: str, other: str, /) -> bool: ...


class TeacherLabels(Protocol):
    """The teacher. Stops working on a request when the awaiting task is cancelled."""

    async def labels(self, texts: Sequence[str]) -> Sequence[Said]:
        """One for each text; raises TeacherUnavailable."""
        ...


class HeardLabels(TeacherLabels, Protocol):
    """A teacher that can be heard as it writes."""

    async def labels(self, texts: Sequence[str], hear: Hear | None = None) -> Sequence[Said]:
        """hear: told of the answer to the one text as far as it is written."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One decision for each text, in order, and what the teacher read and wrote for them.

    void: texts that the student answered in place of a failing teacher; nothing is promised.
    remembered: texts that nobody was asked about, since they had been answered before.
    """

    decisions: tuple[Decision, ...]
    teacher_prompt_tokens: int = 0
    teacher_output_tokens: int = 0
    void: frozenset[int] = frozenset()
    remembered: frozenset[int] = frozenset()


class Cascade:
    """Answers requests by a policy. Use it from one event loop."""

    def __init__(
        self,
        policy: EscalationRule,
        student: StudentDecisions,
        teacher: HeardLabels,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        student_wait_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """student_wait_s: until what waits for the student is decided; 0 where nobody knows."""
        self._policy = policy
        self._student = student
        self._teacher = teacher
        self._settings = settings
        self._clock, self._student_wait_s = clock, student_wait_s
        self.waiting = WaitingRoom(settings.max_queued_requests, clock)
        self.for_student = WaitingRoom(
            settings.max_student_queue, clock, "student", StudentOverloaded
        )
        self.breaker = Breaker(settings.breaker)

    async def answer(self, texts: Sequence[str], asked: Asked = "cascade") -> Answers:
        """Answer all texts or none; raises Refusal."""
        deadline = self._clock() + self._settings.request_timeout_s
        if asked == "teacher":
            return await self._with_teacher(texts, dict.fromkeys(range(len(texts))), {}, deadline)
        decisions = await self._decided(texts, asked, deadline)
        if asked == "student":
            return Answers(decisions=_students_own(decisions))
        escalated = {i: d.student for i, d in enumerate(decisions) if isinstance(d, Escalation)}
        accepted = {i: d for i, d in enumerate(decisions) if isinstance(d, Decision)}
        if not escalated:
            return Answers(decisions=tuple(accepted[i] for i in range(len(texts))))
        try:
            return await self._with_teacher(texts, dict(escalated), accepted, deadline)
        except (Overloaded, TeacherUnavailable, DeadlinePassed) as refusal:
            if self._settings.when_teacher_fails != "degrade" or None in escalated.values():
                refusal.decided = decisions
                raise
            return Answers(decisions=_students_own(decisions), void=frozenset(escalated))
        except TextRefused as refusal:
            refusal.decided = decisions
            raise

    async def _decided(
        self, texts: Sequence[str], asked: Asked, deadline: float
    ) -> list[Decision | Escalation]:
        """By the student; where it is away, its teacher answers everything."""
        wait_s = self._student_wait_s()
        if not keeps_up(wait_s, self._settings.request_timeout_s):
            raise student_behind(wait_s)
        with self.for_student.places(len(texts)):
            try:
                async with self._before(deadline):
                    return await self._student.submit(texts)
            except StudentUnavailable:
                if asked == "student":
                    raise
                return [Escalation(student=None) for _ in texts]

    async def _with_teacher(
        self,
        texts: Sequence[str],
        escalated: dict[int, Decision | None],
        accepted: dict[int, Decision],
        deadline: float,
    ) -> Answers:
        """Fill in what the student did not answer; escalated: a text's index to what the student
        would have said, None where it was not asked."""
        with self.waiting.places(len(escalated)):
            asked = [texts[i] for i in escalated]
            labels = await self._labels(asked, deadline, self._hear([*escalated.values()]))
        decisions = dict(accepted)
        labeled = [label for label in labels if not isinstance(label, Unlabeled)]
        read = sum(label.n_prompt_tokens for label in labeled)
        written = sum(label.n_output_tokens for label in labeled)
        unlabeled = {
            i: label.reason
            for i, label in zip(escalated, labels, strict=True)
            if isinstance(label, Unlabeled)
        }
        if unlabeled:
            refusal = TextRefused(*next(iter(unlabeled.items())))
            refusal.unlabeled = frozenset(unlabeled)
            refusal.teacher_prompt_tokens, refusal.teacher_output_tokens = read, written
            raise refusal
        for (i, student), label in zip(escalated.items(), labeled, strict=True):
            decisions[i] = self._policy.escalated(label, student)
        return Answers(
            decisions=tuple(decisions[i] for i in range(len(texts))),
            teacher_prompt_tokens=read,
            teacher_output_tokens=written,
        )

    def _hear(self, students: Sequence[Decision | None]) -> Hear | None:
        """Of the one text, if somebody listens."""
        listener = listening.get()
        if listener is None or len(students) != 1:
            return None
        return lambda written: listener(self._policy.escalated(written, students[0]))

    async def _labels(
        self, texts: Sequence[str], deadline: float, hear: Hear | None
    ) -> Sequence[Said]:
        """The teacher's; where the recipe says so, asked again until the deadline."""
        while True:
            try:
                return await self._ask(texts, deadline, hear)
            except (TeacherUnavailable, DeadlinePassed) as refusal:  # the teacher's own deadline
                pause_s = min(refusal.retry_after_s or _ASK_AGAIN_S, _ASK_AGAIN_S)
                too_late = self._clock() + pause_s >= deadline
                if self._settings.when_teacher_fails != "wait" or too_late:
                    raise
            await asyncio.sleep(pause_s)

    async def _ask(
        self, texts: Sequence[str], deadline: float, hear: Hear | None
    ) -> Sequence[Said]:
        """Once, and tell the breaker how it went."""
        if not self.breaker.admit(self._clock()):
            wait_s = self.breaker.opens_in_s(self._clock()) or _ASK_AGAIN_S
            raise TeacherUnavailable(
                "the teacher failed several times in a row and is left alone for a while; texts "
                "that the student may answer are answered meanwhile.",
                wait_s,
            )
        began = self._clock()
        try:
            async with self._before(deadline), self._before_teachers_own():
                asked = self._teacher.labels
                labels = await (asked(texts, hear) if hear else asked(texts))
            self._check(labels, len(texts))
            # An audit leaves such a text out, as the certificate has left out such a row.
            if _any_garbage(labels):
                raise _garbage()
        except (TeacherStarting, TeacherAway):
            self.breaker.abandoned()
            raise
        except DeadlinePassed:
            # What the student's queue left of a request's time may have been too little.
            if self._clock() - began >= self._fair_s:
                self.breaker.failed(self._clock())
            else:
                self.breaker.abandoned()
            raise
        except TeacherUnavailable as refusal:
            self.breaker.failed(self._clock(), refusal.replica, began)
            raise
        except BaseException:  # the caller went away, most likely: nothing is known
            self.breaker.abandoned()
            raise
        self.breaker.succeeded()
        return labels

    async def labels(self, texts: Sequence[str]) -> Sequence[Said]:
        """The teacher's for an audit: such as could answer a request, and not while the teacher is
        left alone. After that one may be let through, since where the student answers everything
        nobody else would ever find the teacher well again. Raises TeacherUnavailable, TeacherAway
        where it need not be asked."""
        is_probe = not self.breaker.is_closed
        if not self.breaker.admit(self._clock()):
            raise TeacherAway("the teacher is left alone for a while.")
        began = self._clock()
        try:
            labels = await self._teacher.labels(texts)
            self._check(labels, len(texts))
            if is_probe and _any_garbage(labels):
                raise _garbage()
        except BaseException as error:
            if is_probe:
                self._probed(error, began)
            raise
        if is_probe:
            self.breaker.succeeded()
        return labels

    def _probed(self, error: BaseException, began: float) -> None:
        """An audit that was let through, and failed."""
        if isinstance(error, TeacherUnavailable) and not isinstance(
            error, TeacherStarting | TeacherAway
        ):
            self.breaker.failed(self._clock(), error.replica, began)
        else:
            self.breaker.abandoned()

    def _check(self, labels: Sequence[Said], n_texts: int) -> None:
        """Raises TeacherUnavailable if these cannot be answers to the texts."""
        if len(labels) != n_texts or not all(
            isinstance(label, Unlabeled) or self._policy.is_answer(label) for label in labels
        ):
            raise _garbage()

    @property
    def _fair_s(self) -> float:
        """Seconds in which a teacher that is well has answered."""
        half = self._settings.request_timeout_s / 2
        return min(half, self._settings.teacher_timeout_s or half) * 0.99

    def _before(self, deadline: float) -> contextlib.AbstractAsyncContextManager[None]:
        seconds = max(0.0, deadline - self._clock())
        return _within(seconds, self._settings.request_timeout_s, "a request")

    def _before_teachers_own(self) -> contextlib.AbstractAsyncContextManager[None]:
        seconds = self._settings.teacher_timeout_s
        return _within(seconds, seconds, "the teacher") if seconds else contextlib.nullcontext()


def _any_garbage(labels: Sequence[Said]) -> bool:
    return any(isinstance(label, Unlabeled) and label.is_garbage for label in labels)


def _garbage() -> TeacherUnavailable:
    return TeacherUnavailable(
        "the teacher's answer is none (no distribution over the labels, say); send this request "
        "again.",
        _ASK_AGAIN_S,
    )


def _students_own(decisions: Sequence[Decision | Escalation]) -> tuple[Decision, ...]:
    """Raises TextRefused where the student has no answer to a text."""
    answers = []
    for place, answer in enumerate(student_answers(decisions)):
        if answer is None:
            raise TextRefused(
                place, "the student has no answer to it: too long for it, or it wrote nothing."
            )
        answers.append(answer)
    return tuple(answers)


@contextlib.asynccontextmanager
async def _within(seconds: float, of_s: float, whose: str) -> AsyncIterator[None]:
    """Raises DeadlinePassed; of_s: the whole of it, for the sentence."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise DeadlinePassed(f"no answer within {of_s:g} s, the deadline of {whose}.") from error

"""One request, from its texts to its answers: student first, teacher for what it may not answer.

Owns the order, the bound on what waits for the teacher, and the deadline. Asks both models
through small interfaces and knows nothing of Ray or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from journeyman.cascade.policy import Decision, Escalation, Policy, student_answers
from journeyman.cascade.refusals import DeadlinePassed, Overloaded, TextRefused
from journeyman.teacher.answers import ClassLabels

Asked = Literal["cascade", "student", "teacher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlabeled:
    """A text that the teacher can never answer, and why."""

    reason: str


class StudentDecisions(Protocol):
    """The student behind the policy: see ``batcher.Batcher``."""

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]: ...


class TeacherLabels(Protocol):
    """The teacher. Stops working on a request when the awaiting task is cancelled."""

    async def labels(self, texts: Sequence[str]) -> Sequence[ClassLabels | Unlabeled]:
        """One for each text; raises TeacherUnavailable."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One decision for each text, in order, and what the teacher read and wrote for them."""

    decisions: tuple[Decision, ...]
    teacher_prompt_tokens: int
    teacher_output_tokens: int


class WaitingRoom:
    """Counts the texts that wait for the teacher, and turns away those that are too many."""

    def __init__(self, places: int) -> None:
        self._places = places
        self.n_waiting = 0

    @contextlib.contextmanager
    def places(self, n: int) -> Iterator[None]:
        """Hold n places; raises Overloaded. Where nobody waits, a request of any size may."""
        if self.n_waiting and self.n_waiting + n > self._places:
            raise Overloaded(
                f"{self.n_waiting} texts wait for the teacher and at most {self._places} may; "
                "send this request again a little later."
            )
        self.n_waiting += n
        try:
            yield
        finally:
            self.n_waiting -= n


class Cascade:
    """Answers requests by a policy. Use it from one event loop."""

    def __init__(
        self,
        policy: Policy,
        student: StudentDecisions,
        teacher: TeacherLabels,
        *,
        max_waiting: int,
        timeout_s: float,
    ) -> None:
        """max_waiting: texts that may wait for the teacher; timeout_s: deadline of a request."""
        self._policy = policy
        self._student = student
        self._teacher = teacher
        self._timeout_s = timeout_s
        self.waiting = WaitingRoom(max_waiting)

    async def answer(self, texts: Sequence[str], asked: Asked = "cascade") -> Answers:
        """Answer all texts or none; raises Refusal."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._answer(texts, asked)
        except TimeoutError as error:
            raise DeadlinePassed(
                f"no answer within {self._timeout_s:g} s, the deadline of a request."
            ) from error

    async def _answer(self, texts: Sequence[str], asked: Asked) -> Answers:
        if asked == "teacher":
            return await self._with_teacher(texts, dict.fromkeys(range(len(texts))), {})
        decisions = await self._student.submit(texts)
        if asked == "student":
            return _answers(student_answers(decisions))
        escalated = {
            i: decision.student.confidence
            for i, decision in enumerate(decisions)
            if isinstance(decision, Escalation)
        }
        accepted = {i: d for i, d in enumerate(decisions) if isinstance(d, Decision)}
        if not escalated:
            return _answers([accepted[i] for i in range(len(texts))])
        return await self._with_teacher(texts, escalated, accepted)

    async def _with_teacher(
        self,
        texts: Sequence[str],
        escalated: dict[int, float | None],
        accepted: dict[int, Decision],
    ) -> Answers:
        """Fill in what the student did not answer; escalated: a text's index to its confidence."""
        with self.waiting.places(len(escalated)):
            labels = await self._teacher.labels([texts[i] for i in escalated])
        decisions = dict(accepted)
        tokens = [0, 0]
        for (i, confidence), label in zip(escalated.items(), labels, strict=True):
            if isinstance(label, Unlabeled):
                raise TextRefused(f"text {i}: {label.reason}")
            decisions[i] = self._policy.teacher_decision(label.class_logprobs, confidence)
            tokens[0] += label.n_prompt_tokens
            tokens[1] += label.n_output_tokens
        return _answers([decisions[i] for i in range(len(texts))], *tokens)


def _answers(
    decisions: Sequence[Decision], prompt_tokens: int = 0, output_tokens: int = 0
) -> Answers:
    return Answers(
        decisions=tuple(decisions),
        teacher_prompt_tokens=prompt_tokens,
        teacher_output_tokens=output_tokens,
    )

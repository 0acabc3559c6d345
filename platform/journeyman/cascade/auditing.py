"""What the teacher says of audited answers of the student, asked when it has nothing else to do.

An audit never delays a request: it is queued, and asked for while no text waits for the teacher;
so is a judge, where the certificate asked one about answers that are worded differently.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from journeyman.cascade.answering import (
    EscalationRule,
    Said,
    StudentDecisions,
    TeacherLabels,
    Unlabeled,
)
from journeyman.cascade.drift import Audit
from journeyman.cascade.policy import Decision, Escalation
from journeyman.cascade.refusals import StudentUnavailable, TeacherAway, TeacherStarting
from journeyman.cascade.watching import LOST, UNANSWERED

_MOST_WAITING = 100_000  # texts: a night without a teacher, at one audit a second
_MOST_CHARACTERS = 64_000_000  # of them and their answers
_LOOK_AGAIN_S = 0.2
_AGAIN_S = 10.0  # after a failure, and twice that after the next one: most have passed by then
_TIMEOUT_S = 60.0
_MOST_FAILURES = 3  # on one text, to answer within its time among them


class AnswerJudge(Protocol):
    """Who says of answers that are worded differently whether they mean the same."""

    async def same(self, text: str, one: str, other: str) -> bool:
        """Of two answers to a text; raises TeacherUnavailable."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiting:
    """decision: the student's, None where it is not known yet; by_teacher: its answer, where that
    is there, worded differently, and waits for the judge."""

    text: str
    decision: Decision | None
    by_teacher: str | None = None

    @property
    def n_characters(self) -> int:
        said = self.decision.label if self.decision else ""
        return len(self.text) + len(said) + len(self.by_teacher or "")

    @property
    def failed(self) -> Audit:
        """What it counts as where it cannot be finished. A pair on which the judge fails has no
        verdict and so differs, as for the certificate; of another one nothing is known."""
        if self.decision is None or self.by_teacher is None:
            return LOST
        return _audit(self.decision, same=False)


class Auditor:
    """Compares audited answers with the teacher's. Use it from one event loop.

    Outcomes leave in the order in which their requests came: those that are known at once would
    come first otherwise, and a run of those that had to wait, behind them, looks like a change.

    A text that the teacher can never answer is left out, as certification left such rows out: the
    promise is about the others. Whether it is one is a matter of the text alone, not of what the
    student said, so the audits that remain are a fair sample of those others.
    """

    def __init__(
        self,
        policy: EscalationRule,
        teacher: TeacherLabels,
        student: StudentDecisions,
        busy: Callable[[], bool],
        patience_s: float = _TIMEOUT_S,
        judge: AnswerJudge | None = None,
    ) -> None:
        """busy: whether requests wait for the teacher; patience_s: that a request has with it, and
        so an audit, which waits a minute at least; judge: of answers that the policy does not find
        the same, where the certificate asked one."""
        self._judge = judge
        self._policy, self._teacher, self._student, self._busy = policy, teacher, student, busy
        self._patience_s = max(patience_s, _TIMEOUT_S)
        self._queue: deque[_Waiting | Audit] = deque()  # not an Audit at its head
        self._outcomes: list[Audit] = []
        self._failures = 0  # of the one at the head
        self._n_characters = 0  # of those that wait
        self.n_pending = 0  # audits without an outcome so far
        self.n_lost = 0  # whose outcome nobody will know: each counts as an error
        self.n_left_out = 0  # of texts that the teacher cannot answer
        self.n_judged = 0  # that the judge was asked about

    def add(self, text: str, decision: Decision) -> None:
        """decision: what the request was answered with, or would have been."""
        if decision.answered_by == "teacher":
            return self.escalated(decision)
        self._wait(_Waiting(text=text, decision=replace(decision, written=None)))

    def undecided(self, text: str) -> None:
        """One whose request ended before its student had decided: it is asked again, as what it
        says depends on the text alone."""
        self._wait(_Waiting(text=text, decision=None))

    def escalated(self, decision: Decision | None) -> None:
        """One that the student did not answer, so that its outcome is known; None: it has no answer
        to it at all, or was away."""
        self._push(_unaccepted(decision))

    def unlabeled(self) -> None:
        """One that the teacher was asked for, and cannot answer."""
        self.n_left_out += 1

    @property
    def n_found(self) -> int:
        """Outcomes that nobody has asked for yet."""
        return len(self._outcomes)

    @property
    def n_unkept(self) -> int:
        """Audits that vanish with this process: those that wait, and the outcomes behind them."""
        return len(self._queue) + len(self._outcomes)

    def outcomes(self) -> list[Audit]:
        """What has come out since this was last asked."""
        found, self._outcomes = self._outcomes, []
        return found

    async def run(self) -> None:
        """Work through what waits, as long as the cascade serves."""
        while True:
            if not self._queue or self._busy():
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            head = self._queue[0]  # it is pending until its outcome is there
            assert not isinstance(head, Audit)
            try:
                async with asyncio.timeout(self._patience_s):
                    outcome = await self._step(head)
            except (TeacherAway, TeacherStarting, StudentUnavailable):  # they will be back
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            except Exception:  # at this text, for all anyone knows: too slow, no answer, a bug
                self._failures += 1
                if self._failures < _MOST_FAILURES:
                    await asyncio.sleep(_AGAIN_S * self._failures)
                    continue
                outcome = head.failed
            if self._queue and self._queue[0] is head:
                if isinstance(outcome, _Waiting):
                    self._goes_on(outcome)
                else:
                    self._settle(outcome)

    async def _step(self, audited: _Waiting) -> Audit | _Waiting | None:
        """Its outcome, None where it is to be left out; or itself as it waits for the judge, who
        is asked when nothing else waits, as the teacher was."""
        decision = audited.decision
        if decision is None:
            decided = (await self._student.submit([audited.text]))[0]
            if isinstance(decided, Escalation):
                return _unaccepted(decided.student)
            decision = decided
        if audited.by_teacher is not None:
            return await self._judged(audited.text, decision, audited.by_teacher)
        label = (await self._teacher.labels([audited.text]))[0]
        return self._compared(audited.text, decision, label)

    def _compared(self, text: str, decision: Decision, label: Said) -> Audit | _Waiting | None:
        if isinstance(label, Unlabeled):
            return None
        by_teacher = self._policy.escalated(label, decision).label
        same = self._policy.same(decision.label, by_teacher)
        if same or self._judge is None:
            return _audit(decision, same=same)
        return _Waiting(text=text, decision=replace(decision, written=None), by_teacher=by_teacher)

    async def _judged(self, text: str, decision: Decision, by_teacher: str) -> Audit:
        assert self._judge is not None
        same = await self._judge.same(text, decision.label, by_teacher)
        self.n_judged += 1
        return _audit(decision, same=same)

    def _wait(self, one: _Waiting) -> None:
        self.n_pending += 1
        self._n_characters += one.n_characters
        self._push(one)

    def _push(self, one: _Waiting | Audit) -> None:
        self._queue.append(one)
        self._release()
        self._make_room()

    def _goes_on(self, one: _Waiting) -> None:
        """In place of itself at the head."""
        head = self._queue[0]
        assert isinstance(head, _Waiting)
        self._queue[0] = one
        self._n_characters += one.n_characters - head.n_characters
        self._failures = 0
        self._make_room()

    def _make_room(self) -> None:
        while len(self._queue) > _MOST_WAITING or self._n_characters > _MOST_CHARACTERS:
            self._settle(LOST)

    def _settle(self, outcome: Audit | None) -> None:
        """Of the one at the head, which waits."""
        head = self._queue.popleft()
        assert isinstance(head, _Waiting)
        self.n_pending -= 1
        self._n_characters -= head.n_characters
        self._failures = 0
        self.n_lost += outcome is LOST
        if outcome is None:
            self.unlabeled()
        else:
            self._outcomes.append(outcome)
        self._release()

    def _release(self) -> None:
        while self._queue and isinstance(head := self._queue[0], Audit):
            self._outcomes.append(head)
            self._queue.popleft()


def _audit(decision: Decision, *, same: bool) -> Audit:
    """Of an answer of the student's."""
    assert decision.confidence is not None
    return Audit(score=decision.confidence, loss=int(not same))


def _unaccepted(student: Decision | None) -> Audit:
    score = None if student is None else student.confidence
    return UNANSWERED if score is None else Audit(score=score, loss=0)

"""What the teacher says of audited answers of the student, asked when it has nothing else to do.

An audit never delays a request: it is queued, and asked for while no text waits for the teacher.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from journeyman.cascade.answering import EscalationRule, Said, TeacherLabels, Unlabeled
from journeyman.cascade.drift import Audit
from journeyman.cascade.policy import Decision
from journeyman.cascade.refusals import TeacherUnavailable
from journeyman.cascade.watching import LOST, UNANSWERED

_MOST_WAITING = 100_000  # texts: a night without a teacher, at one audit a second
_LOOK_AGAIN_S = 0.2
_TIMEOUT_S = 60.0
_MOST_FAILURES = 3  # of the teacher on one text


class Auditor:
    """Compares audited answers with the teacher's. Use it from one event loop.

    Outcomes leave in the order in which their requests came: those that are known at once would
    come first otherwise, and a run of those that had to wait, behind them, looks like a change.
    """

    def __init__(
        self, policy: EscalationRule, teacher: TeacherLabels, busy: Callable[[], bool]
    ) -> None:
        """busy: whether requests wait for the teacher."""
        self._policy, self._teacher, self._busy = policy, teacher, busy
        self._queue: deque[tuple[str, Decision] | Audit] = deque()  # not an Audit at its head
        self._outcomes: list[Audit] = []
        self._failures = 0  # of the one at the head
        self.n_pending = 0  # audits without an outcome so far

    def add(self, text: str, decision: Decision) -> None:
        """decision: what the request was answered with, or would have been."""
        if decision.answered_by == "teacher":
            return self.escalated(decision)
        self.n_pending += 1
        self._push((text, decision))

    def escalated(self, decision: Decision | None) -> None:
        """One that the student did not answer, so that its outcome is known; None: it has no answer
        to it at all, or was away."""
        score = None if decision is None else decision.confidence
        self._push(UNANSWERED if score is None else Audit(score=score, loss=0))

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
            text, decision = head
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    label = (await self._teacher.labels([text]))[0]
                outcome = self._compared(decision, label)
            except (TeacherUnavailable, TimeoutError):
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            except Exception:
                self._failures += 1
                if self._failures < _MOST_FAILURES:
                    await asyncio.sleep(_LOOK_AGAIN_S)
                    continue
                outcome = LOST
            if self._queue and self._queue[0] is head:
                self._settle(outcome)

    def _push(self, one: tuple[str, Decision] | Audit) -> None:
        self._queue.append(one)
        if len(self._queue) > _MOST_WAITING and not isinstance(self._queue[0], Audit):
            self._settle(LOST)
        self._release()

    def _settle(self, outcome: Audit) -> None:
        """Of the one at the head."""
        self._queue[0] = outcome
        self.n_pending -= 1
        self._failures = 0
        self._release()

    def _release(self) -> None:
        while self._queue and isinstance(head := self._queue[0], Audit):
            self._outcomes.append(head)
            self._queue.popleft()

    def _compared(self, decision: Decision, label: Said) -> Audit:
        assert decision.confidence is not None
        if isinstance(label, Unlabeled):  # nobody will ever know
            return Audit(score=decision.confidence, loss=1)
        same = self._policy.same(decision.label, self._policy.escalated(label, decision).label)
        return Audit(score=decision.confidence, loss=int(not same))

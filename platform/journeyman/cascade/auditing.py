"""What the teacher says of audited answers of the student, asked when it has nothing else to do.

An audit never delays a request: it is queued, and asked for while no text waits for the teacher.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from journeyman.cascade.answering import TeacherLabels, Unlabeled
from journeyman.cascade.drift import Audit
from journeyman.cascade.policy import Decision, Policy
from journeyman.cascade.refusals import TeacherUnavailable
from journeyman.cascade.watching import LOST
from journeyman.teacher.answers import ClassLabels

_MOST_WAITING = 100_000  # texts: a night without a teacher, at one audit a second
_LOOK_AGAIN_S = 0.2
_TIMEOUT_S = 60.0


class Auditor:
    """Compares audited answers with the teacher's. Use it from one event loop."""

    def __init__(self, policy: Policy, teacher: TeacherLabels, busy: Callable[[], bool]) -> None:
        """busy: whether requests wait for the teacher."""
        self._policy, self._teacher, self._busy = policy, teacher, busy
        self._waiting: deque[tuple[str, Decision]] = deque()
        self._outcomes: list[Audit] = []

    @property
    def n_pending(self) -> int:
        """Audits without an outcome so far."""
        return len(self._waiting)

    def add(self, text: str, decision: Decision) -> None:
        """decision: what the request was answered with; by the teacher, its outcome is known: the
        student did not answer."""
        if decision.confidence is None:
            return
        if decision.answered_by == "teacher":
            self._outcomes.append(Audit(score=decision.confidence, loss=0))
        elif len(self._waiting) < _MOST_WAITING:
            self._waiting.append((text, decision))
        else:
            self._outcomes.append(LOST)

    def outcomes(self) -> list[Audit]:
        """What has come out since this was last asked."""
        found, self._outcomes = self._outcomes, []
        return found

    async def run(self) -> None:
        """Work through what waits, as long as the cascade serves."""
        while True:
            if not self._waiting or self._busy():
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            text, decision = self._waiting[0]  # it is pending until its outcome is there
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    label = (await self._teacher.labels([text]))[0]
            except (TeacherUnavailable, TimeoutError):
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            self._waiting.popleft()
            self._outcomes.append(self._compared(decision, label))

    def _compared(self, decision: Decision, label: ClassLabels | Unlabeled) -> Audit:
        assert decision.confidence is not None
        if isinstance(label, Unlabeled):  # nobody will ever know
            return Audit(score=decision.confidence, loss=1)
        escalated = self._policy.teacher_decision(label.class_logprobs, decision)
        return Audit(score=decision.confidence, loss=int(escalated.label != decision.label))

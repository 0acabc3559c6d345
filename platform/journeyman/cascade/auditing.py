"""What the teacher says of audited answers of the student, asked beside its other work.

An audit never delays the request that it is of: it is queued, and asked for while no text waits for
the teacher, or once it has waited some seconds itself: a cascade may never be idle, and one text
more in the teacher is felt by nobody. So is a judge, where the certificate asked one about answers
that are worded differently.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from journeyman.cascade.answering import (
    EscalationRule,
    Said,
    StudentDecisions,
    TeacherLabels,
    Unlabeled,
)
from journeyman.cascade.drift import Audit
from journeyman.cascade.policy import Decision, Escalation
from journeyman.cascade.refusals import (
    StudentUnavailable,
    TeacherAway,
    TeacherStarting,
    TeacherUnavailable,
)
from journeyman.cascade.spooling import Entry, LeftOut, Spool, Waiting
from journeyman.cascade.watching import LOST, UNANSWERED, Outcome

_MOST_WAITING = 10_000  # outcomes and texts: three hours without a teacher, at one a second
_MOST_CHARACTERS = 64_000_000  # of texts and answers
_LOOK_AGAIN_S = 0.2
_HURRIES_AFTER_S = 5.0  # whatever else the teacher has to do
_WAKES_AFTER_S = 1800.0  # a teacher that sleeps, or is left alone
_LONGEST_AWAY_S = 10.0  # between two looks at a model that is away, which cost nothing
_AGAIN_S = 10.0  # after a failure, and twice that after the next one: most have passed by then
_LONGEST_AGAIN_S = 600.0
_TIMEOUT_S = 60.0
_MOST_FAILURES = 3  # on one text, to answer within its time among them

_CameOfIt = Literal["answered", "failed", "away"]


class AnswerJudge(Protocol):
    """Who says of answers that are worded differently whether they mean the same."""

    async def same(self, text: str, one: str, other: str) -> bool:
        """Of two answers to a text; raises TeacherUnavailable."""
        ...


@dataclass(slots=True)
class _Failures:
    """Of the teacher's on one text. just_now: the last, so that others are to be tried;
    answers_others: whether it has answered one since the first; n_others: texts that it has failed
    on, too; fails_on_all: whether nothing else is known since it was last tried on others."""

    n: int = 0
    just_now: bool = False
    answers_others: bool = False
    n_others: int = 0
    fails_on_all: bool = False

    def another(self) -> None:
        self.n += 1
        self.just_now = True

    def other_failed(self) -> None:
        self.n_others += 1
        self.fails_on_all = True

    def other_answered(self) -> None:
        if not self.answers_others:  # it may have come back just now, so one more is to follow
            self.n = min(self.n, _MOST_FAILURES - 1)
        self.just_now, self.answers_others, self.fails_on_all = False, True, False


class Auditor:
    """Compares audited answers with the teacher's. Use it from one event loop.

    Outcomes leave in the order in which their requests came: those that are known at once would
    come first otherwise, and a run of those that had to wait, behind them, looks like a change.

    What may be missing among them. The watch is valid as long as whether an audit is in it is
    settled before anything of its text is known, as then its risk, given all that came before, is
    the traffic's. So one that comes while too many wait is not drawn at all (``has_room``, asked
    with the coin): how many wait depends on texts that came before. To drop one that waits would be
    another matter: it waits since the student answered it, so those that are left would be too
    good. It is kept until its outcome is there, whether the teacher is busy, asleep, or away for a
    day, which is no evidence of errors; only where the teacher fails on its text again and again
    and answers others meanwhile it is given up, and is an error.

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
        rests: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        spool: Spool | None = None,
        turn: asyncio.Lock | None = None,
    ) -> None:
        """busy: whether requests wait for the teacher; patience_s: that a request has with it, and
        so an audit, which waits a minute at least; judge: of answers that the policy does not find
        the same, where the certificate asked one; rests: whether the teacher sleeps, or is left
        alone; clock: seconds; spool: where those that wait outlive this process; turn: held while
        one is asked about, by all that share a teacher's spare time."""
        self._judge, self._clock, self._rests = judge, clock, rests
        self._policy, self._teacher, self._student, self._busy = policy, teacher, student, busy
        self._patience_s = max(patience_s, _TIMEOUT_S)
        self._spool, self._turn = spool, turn or asyncio.Lock()
        self._n_numbers = 0  # given so far
        self._queue: deque[Waiting | Outcome] = deque()  # not an Outcome at its head
        self._outcomes: list[Outcome] = []
        self._catches_up = False  # until nothing waits any more
        self._failures = _Failures()  # on the head
        self._n_characters = 0  # of those that wait
        self.n_pending = 0  # audits without an outcome so far
        self.n_lost = 0  # whose outcome nobody will know: each counts as an error
        self.n_left_out = 0  # of texts that the teacher cannot answer
        self.n_not_drawn = 0  # as too many waited
        self.n_judged = 0  # that the judge was asked about

    @property
    def has_room(self) -> bool:
        """Whether a text may be drawn, to be asked before it is looked at."""
        return self.n_unkept < _MOST_WAITING and self._n_characters < _MOST_CHARACTERS

    def not_drawn(self, n_texts: int) -> None:
        """That the coin chose, and there was no room for."""
        self.n_not_drawn += n_texts

    def add(self, text: str, decision: Decision) -> None:
        """decision: what the request was answered with, or would have been."""
        if decision.answered_by == "teacher":
            return self.escalated(decision)
        self._wait(text, replace(decision, written=None))

    def undecided(self, text: str) -> None:
        """One whose request ended before its student had decided: it is asked again, as what it
        says depends on the text alone."""
        self._wait(text, None)

    def escalated(self, decision: Decision | None) -> None:
        """One that the student did not answer, so that its outcome is known; None: it has no answer
        to it at all, or was away."""
        self._keep(Outcome(self._number(), _unaccepted(decision)))
        self._release()

    def take_up(self, entries: Sequence[Waiting | Outcome]) -> None:
        """What another member left, in its order, before anything else has come."""
        for one in entries:
            if isinstance(one, Waiting):
                one = replace(one, since=self._clock())
                self.n_pending += 1
                self._n_characters += one.n_characters
            else:
                self.n_lost += one.audit is LOST
            self._queue.append(one)
            self._n_numbers = one.number
        self._release()

    def unlabeled(self) -> None:
        """One that the teacher was asked for, and cannot answer."""
        self.n_left_out += 1

    @property
    def n_found(self) -> int:
        """Outcomes that nobody has asked for yet."""
        return len(self._outcomes)

    @property
    def n_unkept(self) -> int:
        """Audits that nobody else knows: those that wait, and the outcomes behind them."""
        return len(self._queue) + len(self._outcomes)

    @property
    def unkept(self) -> list[Waiting | Outcome]:
        """These, in their order."""
        return [*self._outcomes, *self._queue]

    def outcomes(self) -> list[Outcome]:
        """What has come out since this was last asked."""
        found, self._outcomes = self._outcomes, []
        return found

    async def run(self) -> None:
        """Work through what waits, one text at a time, as long as the cascade serves."""
        first_pauses = {"failed": _AGAIN_S, "away": _LOOK_AGAIN_S}
        longest = {"failed": _LONGEST_AGAIN_S, "away": _LONGEST_AWAY_S}
        pauses = dict(first_pauses)
        while True:
            if not self._may_ask():
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            async with self._turn:
                came_of_it = await self._work()
            if came_of_it == "answered":
                pauses = dict(first_pauses)
                continue
            await asyncio.sleep(pauses[came_of_it])
            pauses[came_of_it] = min(2 * pauses[came_of_it], longest[came_of_it])

    def _may_ask(self) -> bool:
        """A teacher that was woken for an audit is asked for all that wait, so that they wake it
        once."""
        if not self._queue:
            self._catches_up = False
            return False
        head = self._queue[0]
        assert isinstance(head, Waiting)
        waited_s = self._clock() - head.since
        self._catches_up |= waited_s >= _WAKES_AFTER_S
        if self._rests() and not self._catches_up:
            return False
        return waited_s >= _HURRIES_AFTER_S or not self._busy()

    async def _work(self) -> _CameOfIt:
        """Ask about the head. Where that failed, it may be the teacher that fails on all: then
        about others, until it answers one, before anything is held against the text."""
        if self._failures.just_now:
            if (place := self._another()) is not None:
                came_of_it = await self._ask(place)
                if came_of_it == "failed":
                    self._failures.other_failed()
                elif came_of_it == "answered":
                    self._failures.other_answered()
                return came_of_it
            if self._failures.fails_on_all:
                self._failures = _Failures()
        if self._failures.n >= _MOST_FAILURES and self._failures.answers_others:
            self._give_up()
            return "answered"
        came_of_it = await self._ask(0)
        if came_of_it == "failed":
            self._failures.another()
        return came_of_it

    def _another(self) -> int | None:
        """The place of the next one that the teacher would be asked about, behind those that it
        has failed on."""
        waiting = (
            place
            for place, one in enumerate(self._queue)
            if place and isinstance(one, Waiting) and one.decision is not None
        )
        return next(itertools.islice(waiting, self._failures.n_others, None), None)

    async def _ask(self, place: int) -> _CameOfIt:
        """About one that stays where it is until its outcome is there."""
        one = self._queue[place]
        assert isinstance(one, Waiting)
        try:
            # It waits for requests in the engine, too: longer each time that it took too long.
            tries = min(self._failures.n, _MOST_FAILURES - 1)
            async with asyncio.timeout(self._patience_s * 2**tries):
                outcome = await self._step(one)
        except (TeacherAway, TeacherStarting, StudentUnavailable):  # they will be back
            return "away"
        except TeacherUnavailable as refusal:
            return "failed" if refusal.had_texts else "away"
        except Exception:  # at this text, for all anyone knows: too slow, no answer, a bug
            return "failed"
        if isinstance(outcome, Waiting):
            self._goes_on(outcome, place)
        else:
            self._settle(outcome, place)
        return "answered"

    async def _step(self, audited: Waiting) -> Audit | Waiting | None:
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
        return self._compared(audited, decision, label)

    def _compared(
        self, audited: Waiting, decision: Decision, label: Said
    ) -> Audit | Waiting | None:
        if isinstance(label, Unlabeled):
            return None
        by_teacher = self._policy.escalated(label, decision).label
        same = self._policy.same(decision.label, by_teacher)
        if same or self._judge is None:
            return _audit(decision, same=same)
        return replace(audited, decision=replace(decision, written=None), by_teacher=by_teacher)

    async def _judged(self, text: str, decision: Decision, by_teacher: str) -> Audit:
        assert self._judge is not None
        same = await self._judge.same(text, decision.label, by_teacher)
        self.n_judged += 1
        return _audit(decision, same=same)

    def _wait(self, text: str, decision: Decision | None) -> None:
        now = self._clock()
        one = Waiting(number=self._number(), text=text, since=now, decision=decision)
        self.n_pending += 1
        self._n_characters += one.n_characters
        self._keep(one)

    def _number(self) -> int:
        self._n_numbers += 1
        return self._n_numbers

    def _keep(self, one: Waiting | Outcome) -> None:
        """As the last in the queue."""
        self._write(one)
        self._queue.append(one)

    def _write(self, one: Entry) -> None:
        if self._spool:
            self._spool.write(one)

    def _goes_on(self, one: Waiting, place: int) -> None:
        """In place of itself."""
        before = self._queue[place]
        assert isinstance(before, Waiting)
        self._write(one)
        self._queue[place] = one
        self._n_characters += one.n_characters - before.n_characters
        if place == 0:
            self._failures = _Failures()

    def _give_up(self) -> None:
        """The head."""
        head = self._queue[0]
        assert isinstance(head, Waiting)
        failed = _failed(head)
        self.n_lost += failed is LOST
        self._settle(failed)

    def _settle(self, outcome: Audit | None, place: int = 0) -> None:
        """Of one that waits; None: it is left out."""
        one = self._queue[place]
        assert isinstance(one, Waiting)
        self.n_pending -= 1
        self._n_characters -= one.n_characters
        if outcome is None:
            self._write(LeftOut(one.number))
            del self._queue[place]
            self.unlabeled()
        else:
            self._queue[place] = settled = Outcome(one.number, outcome)
            self._write(settled)
        if place == 0:
            self._failures = _Failures()
        self._release()

    def _release(self) -> None:
        while self._queue and isinstance(head := self._queue[0], Outcome):
            self._outcomes.append(head)
            self._queue.popleft()


def _failed(one: Waiting) -> Audit:
    """What one counts as that cannot be finished. A pair on which the judge fails has no verdict
    and so differs, as for the certificate; of another one nothing is known."""
    if one.decision is None or one.by_teacher is None:
        return LOST
    return _audit(one.decision, same=False)


def _audit(decision: Decision, *, same: bool) -> Audit:
    """Of an answer of the student's."""
    assert decision.confidence is not None
    return Audit(score=decision.confidence, loss=int(not same))


def _unaccepted(student: Decision | None) -> Audit:
    score = None if student is None else student.confidence
    return UNANSWERED if score is None else Audit(score=score, loss=0)

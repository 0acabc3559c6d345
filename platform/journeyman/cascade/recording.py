"""A cascade whose escalations and audits are kept."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from journeyman.cascade.answering import Answers, Asked
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.feedback import Journal, unanswered, worth_keeping
from journeyman.cascade.policy import Decision, Escalation
from journeyman.cascade.refusals import Refusal, TextRefused


class Answering(Protocol):
    """See ``answering.Cascade``."""

    async def answer(self, texts: Sequence[str], asked: Asked = "cascade") -> Answers: ...


class Recording:
    """Answers as ``cascade`` does, and hands to the journal what is worth keeping.

    auditor: learns of audited answers at once, where the promise is watched.
    """

    def __init__(
        self,
        cascade: Answering,
        journal: Journal,
        audit_rate: float,
        bundle: str,
        coin: random.Random | None = None,
        auditor: Auditor | None = None,
        is_outside: Callable[[str], bool] = lambda _: False,
        how_asked: str | None = None,
        is_held: Callable[[], bool] = lambda: False,
    ) -> None:
        """is_outside: whether a text is outside of what was certified, which is known of the text
        alone: the watch over the promise has nothing to learn from it, whoever answers; how_asked:
        the teacher is, for ``Seen.asked``; is_held: the student may answer nothing for now, and
        nobody sees whether it would have been right."""
        self._cascade = cascade
        self._journal = journal
        self._audit_rate = audit_rate
        self._bundle = bundle
        self._auditor = auditor
        self._coin = coin or random.Random()
        self._is_outside, self._how_asked, self._is_held = is_outside, how_asked, is_held

    async def answer(self, texts: Sequence[str], asked: Asked = "cascade") -> Answers:
        """Raises Refusal. Only what was asked of the cascade as a whole is traffic."""
        if asked != "cascade":
            return await self._cascade.answer(texts, asked)
        audited = [self._coin.random() < self._audit_rate for _ in texts]  # before all else
        auditor = self._with_room(sum(audited))
        try:
            answers = await self._cascade.answer(texts, asked)
        except Refusal as refusal:
            self._unanswered(texts, audited, auditor, refusal)
            raise
        except BaseException:  # the client went away, most likely from a long answer; or we failed
            self._unanswered(texts, audited, auditor, None)
            raise
        for i, text in enumerate(texts):
            decision = answers.decisions[i]
            if audited[i] and auditor:
                void = i in answers.void
                self._audit(auditor, text, Escalation(student=decision) if void else decision)
        by_teacher = {
            i for i, decision in enumerate(answers.decisions)
            if decision.answered_by == "teacher" and i not in answers.remembered
        }  # fmt: skip
        self._journal.add(
            worth_keeping(
                texts,
                answers.decisions,
                answers.void | by_teacher,
                audited,
                self._audit_rate,
                self._bundle,
                time.time(),
                self._how_asked,
            )
        )
        return answers

    def _with_room(self, n_texts: int) -> Auditor | None:
        """Who learns of so many texts; nobody where too many wait already, or the student is held,
        which is settled here, before anything is known of these."""
        if self._auditor is None or (self._auditor.has_room and not self._is_held()):
            return self._auditor
        self._auditor.not_drawn(n_texts)
        return None

    def _unanswered(
        self,
        texts: Sequence[str],
        audited: Sequence[bool],
        auditor: Auditor | None,
        refusal: Refusal | None,
    ) -> None:
        """What is worth keeping of a request without an answer is kept all the same.

        Audits, as certification assumes that no text is missing for what became of it: without
        those of bad times, or of clients that did not wait for a long answer, the sample were fair
        no more."""
        unlabeled = refusal.unlabeled if isinstance(refusal, TextRefused) else frozenset()
        decided = refusal.decided if refusal else ()
        for i, text in enumerate(texts):
            if audited[i] and auditor:
                if i in unlabeled:
                    auditor.unlabeled()
                else:
                    self._audit(auditor, text, decided[i] if decided else None)
        now = time.time()
        self._journal.add(
            unanswered(texts, decided, unlabeled, audited, self._audit_rate, self._bundle, now)
        )

    def _audit(self, auditor: Auditor, text: str, decision: Decision | Escalation | None) -> None:
        """decision: answered or not; None: the request ended before there was one."""
        if self._is_outside(text):
            auditor.unlabeled()
        elif decision is None:
            auditor.undecided(text)
        elif isinstance(decision, Escalation):
            auditor.escalated(decision.student)
        else:
            auditor.add(text, decision)

"""A cascade whose escalations and audits are kept."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
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
    ) -> None:
        self._cascade = cascade
        self._journal = journal
        self._audit_rate = audit_rate
        self._bundle = bundle
        self._auditor = auditor
        self._coin = coin or random.Random()

    async def answer(self, texts: Sequence[str], asked: Asked = "cascade") -> Answers:
        """Raises Refusal. Only what was asked of the cascade as a whole is traffic."""
        if asked != "cascade":
            return await self._cascade.answer(texts, asked)
        audited = [self._coin.random() < self._audit_rate for _ in texts]  # before all else
        try:
            answers = await self._cascade.answer(texts, asked)
        except Refusal as refusal:
            self._unanswered(texts, audited, refusal)
            raise
        except BaseException:  # the client went away, most likely from a long answer; or we failed
            self._unanswered(texts, audited, None)
            raise
        for i, text in enumerate(texts):
            decision = answers.decisions[i]
            void = i in answers.void
            self._audit(audited[i], text, Escalation(student=decision) if void else decision)
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
            )
        )
        return answers

    def _unanswered(
        self, texts: Sequence[str], audited: Sequence[bool], refusal: Refusal | None
    ) -> None:
        """Audits of a request without an answer are kept all the same, as certification assumes
        that no text is missing for what became of it: without those of bad times, or of clients
        that did not wait for a long answer, the sample were fair no more."""
        unlabeled = refusal.unlabeled if isinstance(refusal, TextRefused) else frozenset()
        decided = refusal.decided if refusal else ()
        for i, text in enumerate(texts):
            if i not in unlabeled:
                self._audit(audited[i], text, decided[i] if decided else None)
            elif audited[i] and self._auditor:
                self._auditor.unlabeled()
        now = time.time()
        self._journal.add(unanswered(texts, audited, self._audit_rate, self._bundle, now))

    def _audit(self, audited: bool, text: str, decision: Decision | Escalation | None) -> None:
        """decision: answered or not; None: the request ended before there was one."""
        if not (audited and self._auditor):
            return
        if decision is None:
            self._auditor.undecided(text)
        elif isinstance(decision, Escalation):
            self._auditor.escalated(decision.student)
        else:
            self._auditor.add(text, decision)

"""What a cascade's replica counts: Ray metrics for Prometheus, and the last minutes for the page.

No text, and nothing made of one, is in any of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from journeyman.cascade.answering import Answers, Asked, Cascade
from journeyman.cascade.budgets import Purse, paying
from journeyman.cascade.feedback import Journal
from journeyman.cascade.policy import Decision, Escalation
from journeyman.cascade.recording import Answering
from journeyman.cascade.refusals import Refusal
from journeyman.cascade.stability import Stability
from journeyman.certify.thresholds import written_threshold
from journeyman.recipe import Price
from journeyman.teacher.progress import Spent
from serve import tracing
from serve.accounts import Account, account
from serve.agreement import Agreed
from serve.failures import without_words
from serve.members import Member
from serve.tallies import Tally, together

if TYPE_CHECKING:
    from ray.util import metrics

_WINDOW_S = 60.0
_GAUGE_INTERVAL_S = 1.0
# void: the student for a failing teacher; remembered: nobody, it had been answered before.
_WITHOUT_OUTCOME = ("lost", "left_out", "not_drawn", "stopped")  # audits
_AUDITS = ("pending", *_WITHOUT_OUTCOME, "judged")
_KINDS = ("student", "teacher", "void", "remembered", "refused")
_LATENCIES_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]


@dataclass(frozen=True, slots=True)
class Health:
    """Of what runs beside a bundle's answers: the watch over its promise, and its feedback."""

    member: Member
    purse: Purse
    stability: Stability
    journal: Journal | None

    @property
    def audits(self) -> Counter[str]:
        """This replica's, by what became of them."""
        counts = self.member.counts
        return Counter({name: getattr(counts, name) for name in _AUDITS})

    @property
    def others(self) -> Tally:
        """What the other replicas have counted, as they were heard last; nothing while they are
        out of reach."""
        return self._agreed.others if self._agreed else Tally()

    @property
    def _agreed(self) -> Agreed | None:
        return None if self.member.failure else self.member.last

    def figures(self, audits: Counter[str]) -> dict[str, Any]:
        """watch: None where none is kept; rung: steps by which the audits have tightened the
        threshold, None where all is escalated; failures, what is lost and the stability of scores:
        this replica's."""
        agreed = self.member.last
        return {
            "replicas": self._agreed.n_replicas if self._agreed else 1,
            "watch": None
            if agreed is None or agreed.accept_above is None or self.member.auditor is None
            else {
                "audits": agreed.n_audits,
                **{name: audits[name] for name in _AUDITS},
                "rung": agreed.rung,
                "accept_above": written_threshold(agreed.accept_above),
            },
            "population_stability": self.stability.index(),
            "agreement_failure": self.member.failure,
            "feedback_failure": self.journal and (self.journal.failure or self.member.unspooled),
            "feedback_lost": self.journal.n_lost if self.journal else 0,
        }


@dataclass(slots=True)
class Savings:
    """What the student saves, where the teacher has answered enough to say: dollars. Texts that the
    student answers are easier, and may be shorter, than those of the teacher: an estimate. Audits
    are there for the student's sake, so what they cost is taken off."""

    paid: float = 0.0  # for answers; not for requests that were given up
    for_audits: float = 0.0
    saved: float = 0.0  # below zero while audits cost more
    _said: float = 0.0  # of what is saved, which as a counter cannot fall
    _n_paid: int = 0
    _n_unpriced: int = 0  # answered by the student before the teacher first answered

    def more(self, by_student: int, by_teacher: int, paid: float) -> float:
        """Texts of a request; returns by how much what is saved has risen beyond what it was at
        most so far."""
        self._n_unpriced += by_student
        if by_teacher:
            self.paid += paid
            self._n_paid += by_teacher
        if not self._n_paid:
            return 0.0
        self.saved += self._n_unpriced * self.paid / self._n_paid
        self._n_unpriced = 0
        rise = max(0.0, self.saved - self._said)
        self._said += rise
        return rise

    def audited(self, paid: float) -> None:
        self.for_audits += paid
        self.saved -= paid


class Measured:
    """Answers as ``inner`` does, and counts."""

    def __init__(
        self,
        inner: Answering,
        cascade: Cascade,
        bundle: str,
        price: Price,
        health: Health,
        ingress: str = "",
    ) -> None:
        """cascade: whose queue and breaker are watched; price: of the teacher's tokens; ingress:
        the replica that this is in."""
        from ray.util import metrics

        self._inner, self._cascade, self._price = inner, cascade, price
        self._health = health
        self._tags = {"bundle": bundle}
        self._ingress = ingress
        self._recent: deque[tuple[float, Counter[str]]] = deque()
        self._minute: Counter[str] = Counter()  # their sum
        self._totals: Counter[str] = Counter()

        def counter(name: str, what: str, *tags: str) -> metrics.Counter:
            return metrics.Counter(f"journeyman_cascade_{name}", what, tag_keys=("bundle", *tags))

        def gauge(name: str, what: str) -> metrics.Gauge:
            return metrics.Gauge(f"journeyman_cascade_{name}", what, tag_keys=("bundle",))

        self._texts = counter(
            "texts",
            "Texts answered, by who answered, and of several students by which one.",
            "answered_by",
            "stage",
        )
        self._stages: Counter[int] = Counter()
        self._refused = counter("refusals", "Requests refused, by reason.", "reason")
        self._tokens = counter("teacher_tokens", "Tokens the teacher read and wrote.", "direction")
        self._dollars = counter("teacher_dollars", "Price of the teacher's tokens.")
        self._saved_dollars = counter(
            "saved_dollars",
            "Estimate of what the teacher would have cost for texts that the student answered, "
            "each at the mean of those that the teacher has answered, less what audits cost.",
        )
        self._audit_tokens = counter(
            "audit_tokens", "Tokens the teacher read and wrote for audits.", "direction"
        )
        self._audit_dollars = counter("audit_dollars", "Price of those; no key's bill has them.")
        self._savings = Savings()
        self._unknown = counter(
            "audits_unknown",
            "Audits without an outcome, by why: lost (each counts as an error), left out (the "
            "teacher can never answer the text), not_drawn (too many waited as it came, or the "
            "watch could not be read yet), or stopped (it waited as its replica went, and no other "
            "one could take it up).",
            "why",
        )
        self._said_unknown: Counter[str] = Counter()
        self._seconds = metrics.Histogram(
            "journeyman_cascade_latency_seconds",
            "Seconds from a request to its answer, by who answered.",
            boundaries=_LATENCIES_S,
            tag_keys=("bundle", "answered_by"),
        )
        self._gauges = {
            "waiting": gauge("waiting_texts", "Texts that wait for the teacher."),
            "waiting_for_student": gauge("student_waiting_texts", "Texts with the student."),
            "breaker_open": gauge("breaker_open", "1 while a failing teacher is left alone."),
            "escalation_rate": gauge("escalation_rate", "Escalated share of the last minute."),
            "tightened": gauge(
                "tightened", "Steps by which audits tightened the threshold; -1: all is escalated."
            ),
            "population_stability": gauge(
                "population_stability",
                "Index of the last 1,000 texts' scores against the certify rows'; for people.",
            ),
            "audits_pending": gauge("audits_pending", "Audited answers that wait for the teacher."),
        }

    async def answer(self, texts: Sequence[str], asked: Asked = "cascade") -> Answers:
        """Raises Refusal, or Failed."""
        started = time.perf_counter()
        key = paying.get()
        account.set(Account(ingress=self._ingress, bundle=self._tags["bundle"], key=key))
        try:
            with tracing.answering(self._tags["bundle"], len(texts), asked) as span:
                answers = await without_words(self._inner.answer(texts, asked), Refusal)
                span.answered(answers)
        except Refusal as refusal:
            self._refused.inc(tags=self._tags | {"reason": type(refusal).__name__})
            self._count(Counter(refused=1))
            self._paid(refusal.teacher_prompt_tokens, refusal.teacher_output_tokens, key)
            raise
        self._answered(answers, asked, time.perf_counter() - started)
        self._paid(answers.teacher_prompt_tokens, answers.teacher_output_tokens, key)
        return answers

    def given_up(self, key: str | None, spent: Spent) -> None:
        """What the teacher did for a request that ended before its answer; key: whose it was."""
        self._paid(spent.n_prompt_tokens, spent.n_output_tokens, key)

    def audited(self, spent: Spent) -> None:
        """What the teacher did for an audit, its judge's verdict, or one that was given up."""
        self._savings.audited(
            self._counted(
                self._audit_tokens,
                self._audit_dollars,
                spent.n_prompt_tokens,
                spent.n_output_tokens,
            )
        )

    def stopped(self) -> None:
        """What was not counted yet when a replica stops, or its bundle leaves."""
        if self._health.member.auditor:
            self._count_unknown(self._health.audits)

    def shadowed(self, decisions: Sequence[Decision | Escalation]) -> None:
        """Texts that another bundle answered: who would have, by this one."""
        answered = [decision for decision in decisions if isinstance(decision, Decision)]
        self._stages.update(d.stage for d in answered if d.stage is not None)
        n_escalated = len(decisions) - len(answered)
        self._count(Counter(student=len(decisions) - n_escalated, teacher=n_escalated))

    def tally(self) -> Tally:
        """Of this replica since its start, and of the last minute."""
        self._forget()
        saved = self._savings
        return Tally(
            totals=Counter({kind: self._totals[kind] for kind in _KINDS}),
            last_minute=Counter({kind: self._minute[kind] for kind in _KINDS}),
            by_stage=Counter({str(stage): n for stage, n in self._stages.items()}),
            dollars={"teacher": saved.paid, "audit": saved.for_audits, "saved": saved.saved},
            audits=self._health.audits,
            waiting=Counter(
                teacher=self._cascade.waiting.n_waiting, student=self._cascade.for_student.n_waiting
            ),
        )

    def figures(self) -> dict[str, Any]:
        """Of all replicas that run, the others' a second or two old: totals since each of them
        started, of several students by which one answered, and the last minute."""
        return self._figures(together([self.tally(), self._health.others]))

    def _figures(self, tally: Tally) -> dict[str, Any]:
        return {
            "totals": dict(tally.totals),
            "by_stage": dict(sorted(tally.by_stage.items())),
            "last_minute": dict(tally.last_minute),
            "escalation_rate": tally.escalation_rate,
            "waiting": tally.waiting["teacher"],
            "waiting_for_student": tally.waiting["student"],
            "breaker_open": not self._cascade.breaker.is_closed,
            **{f"{what}_dollars": paid for what, paid in tally.dollars.items()},
            **self._health.figures(tally.audits),
        }

    async def watch(self) -> None:
        """Keep the gauges true, as long as the replica lives."""
        while True:
            figures = self._figures(self.tally())  # its own: Prometheus adds up
            if watch := figures["watch"]:
                rung = watch["rung"]
                figures["tightened"] = -1 if rung is None else rung
                figures["audits_pending"] = watch["pending"]
                self._count_unknown(self._health.audits)
            for name, gauge in self._gauges.items():
                gauge.set(float(figures.get(name) or 0.0), tags=self._tags)
            await asyncio.sleep(_GAUGE_INTERVAL_S)

    def _answered(self, answers: Answers, asked: Asked, seconds: float) -> None:
        who_and_stage = Counter(
            ("void" if i in answers.void
             else "remembered" if i in answers.remembered
             else decision.answered_by, decision.stage)
            for i, decision in enumerate(answers.decisions)
        )  # fmt: skip
        by: Counter[str] = Counter()
        for (who, stage), n in who_and_stage.items():
            by[who] += n
            place = "" if stage is None else str(stage)
            self._texts.inc(n, tags=self._tags | {"answered_by": who, "stage": place})
            if stage is not None and who == "student" and asked == "cascade":
                self._stages[stage] += n
        if asked == "cascade":
            paid = self._price_of(answers.teacher_prompt_tokens, answers.teacher_output_tokens)
            if saved := self._savings.more(by["student"], by["teacher"], paid):
                self._saved_dollars.inc(saved, tags=self._tags)
        slowest = "teacher" if by["teacher"] else "student"
        self._seconds.observe(seconds, tags=self._tags | {"answered_by": slowest})
        if asked == "cascade":
            self._count(by)
            self._health.stability.add(
                d.confidence for d in answers.decisions if d.confidence is not None
            )

    def _paid(self, read: int, written: int, key: str | None) -> None:
        """The teacher's tokens; key: whose request it was."""
        if dollars := self._counted(self._tokens, self._dollars, read, written):
            self._health.purse.pay(key, dollars)

    def _counted(
        self, tokens: metrics.Counter, dollars: metrics.Counter, read: int, written: int
    ) -> float:
        """Their price."""
        for direction, n in (("read", read), ("written", written)):
            if n:
                tokens.inc(n, tags=self._tags | {"direction": direction})
        if price := self._price_of(read, written):
            dollars.inc(price, tags=self._tags)
        return price

    def _price_of(self, read: int, written: int) -> float:
        """Dollars, for tokens of the teacher."""
        price = self._price
        return (
            read * price.per_million_prompt_tokens + written * price.per_million_output_tokens
        ) / 1e6

    def _count_unknown(self, audits: Counter[str]) -> None:
        """audits: by why, and others, since the start."""
        unknown = Counter({why: audits[why] for why in _WITHOUT_OUTCOME})
        for why, n in (unknown - self._said_unknown).items():
            self._unknown.inc(n, tags=self._tags | {"why": why})
        self._said_unknown = unknown

    def _count(self, more: Counter[str]) -> None:
        self._totals.update(more)
        self._minute.update(more)
        self._recent.append((time.monotonic(), more))
        self._forget()

    def _forget(self) -> None:
        since = time.monotonic() - _WINDOW_S
        while self._recent and self._recent[0][0] < since:
            self._minute.subtract(self._recent.popleft()[1])

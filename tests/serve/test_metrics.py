"""What a cascade counts and bills. No Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest

from journeyman.cascade.answering import Answers
from journeyman.cascade.budgets import Purse, paying
from journeyman.cascade.policy import Decision
from journeyman.cascade.stability import Stability
from journeyman.recipe import Price
from journeyman.teacher.progress import Spent
from serve.accounts import Account, GivenUp, account
from serve.agreement import Agreed
from serve.billing import GONE_AFTER_S
from serve.members import Counts
from serve.metrics import Health, Measured, Savings
from serve.tallies import Tallies, Tally

NONE = Counts(pending=0, lost=0, left_out=0, not_drawn=0, judged=0, stopped=0)
PRICE = Price(per_million_prompt_tokens=1e6, per_million_output_tokens=2e6)


def a_member(counts: Counts = NONE, last: Agreed | None = None) -> MagicMock:
    return MagicMock(counts=counts, last=last, failure=None)


def test_a_request_that_was_given_up_is_billed_to_the_key_that_asked():
    class Left:
        async def answer(self, texts: Sequence[str], asked: str = "cascade") -> Answers:
            whose = account.get()
            teachers.add(whose, Spent(n_prompt_tokens=5, n_output_tokens=1))
            teachers.add(whose, Spent(n_prompt_tokens=1, n_output_tokens=1))
            raise asyncio.CancelledError

    teachers, purse = GivenUp(), Purse({"k": 100.0})
    health = Health(None, purse, Stability((), 1), None)  # type: ignore[arg-type]
    measured = Measured(Left(), None, "b", PRICE, health, "i")  # type: ignore[arg-type]

    async def ask() -> None:
        paying.set("k")
        with pytest.raises(asyncio.CancelledError):
            await measured.answer(["x"])

    asyncio.run(ask())
    assert teachers.take("another") == {} and purse.bill() == {}
    for whose, spent in teachers.take("i").items():
        assert whose == Account(ingress="i", bundle="b", key="k")
        measured.given_up(whose.key, spent)
    assert purse.bill() == {"k": 6 + 2 * 2} and teachers.take("i") == {}


def test_what_the_student_saves_is_at_the_teachers_mean_price():
    savings = Savings()
    assert savings.more(by_student=4, by_teacher=0, paid=0.0) == 0.0  # nobody knows a price yet
    assert savings.more(by_student=1, by_teacher=2, paid=6.0) == 5 * 3.0
    assert savings.more(by_student=0, by_teacher=1, paid=0.0) == 0.0  # a remembered answer, say
    assert savings.more(by_student=3, by_teacher=0, paid=0.0) == 3 * 2.0
    assert (savings.paid, savings.saved) == (6.0, 21.0)


def test_audits_are_taken_off_what_is_saved_and_a_counter_waits_until_that_is_made_up_for():
    savings = Savings()
    savings.audited(4.0)
    assert savings.more(by_student=1, by_teacher=1, paid=3.0) == 0.0
    assert savings.saved == 3.0 - 4.0
    assert savings.more(by_student=2, by_teacher=0, paid=0.0) == 5.0
    assert (savings.paid, savings.for_audits, savings.saved) == (3.0, 4.0, 5.0)


def test_audits_are_counted_apart_and_on_no_bill():
    purse = Purse({"k": 100.0})
    health = Health(a_member(), purse, Stability((), 1), None)
    measured = Measured(MagicMock(), MagicMock(), "b", PRICE, health)
    paying.set("k")
    measured.audited(Spent(n_prompt_tokens=5, n_output_tokens=1))
    measured.audited(Spent(n_prompt_tokens=1))
    figures = measured.figures()
    assert (figures["audit_dollars"], figures["teacher_dollars"]) == (6 + 2, 0.0)
    assert figures["saved_dollars"] == -8.0 and purse.bill() == {}


def test_audits_without_an_outcome_are_counted_once():
    counts = replace(NONE, pending=5, stopped=2)
    member = a_member(counts=counts)
    health = Health(member, Purse({}), Stability((), 1), None)
    measured = Measured(MagicMock(), MagicMock(), "b", PRICE, health)
    measured._unknown = counted = MagicMock()
    measured.stopped()
    measured.stopped()
    counted.inc.assert_called_once_with(2, tags={"bundle": "b", "why": "stopped"})
    member.counts = replace(counts, not_drawn=3)
    measured.stopped()
    counted.inc.assert_called_with(3, tags={"bundle": "b", "why": "not_drawn"})


def test_answers_from_memory_are_no_escalations():
    def decision(by: str) -> Decision:
        return Decision(answered_by=by, label="a", confidence=0.5, probabilities=np.ones(1))  # type: ignore[arg-type]

    class Inner:
        async def answer(self, texts: Sequence[str], asked: str = "cascade") -> Answers:
            by = [decision("student"), decision("teacher"), decision("teacher")]
            return Answers(decisions=tuple(by), remembered=frozenset({1}))

    health = Health(a_member(), Purse({}), Stability((), 1), None)
    measured = Measured(Inner(), MagicMock(), "b", PRICE, health)
    asyncio.run(measured.answer(["x", "y", "z"]))
    figures = measured.figures()
    assert figures["escalation_rate"] == 1 / 2
    assert figures["totals"] == {"student": 1, "teacher": 1, "void": 0, "remembered": 1,
                                 "refused": 0}  # fmt: skip


def test_figures_are_of_all_replicas_and_gauges_of_each():
    class Inner:
        async def answer(self, texts: Sequence[str], asked: str = "cascade") -> Answers:
            decision = Decision(
                answered_by="student", label="a", confidence=0.5, probabilities=np.ones(1)
            )
            return Answers(decisions=(decision,) * len(texts))

    others = Tally(
        totals=Counter(student=5, teacher=2, refused=1),
        last_minute=Counter(student=1, teacher=2),
        by_stage=Counter({"2": 4}),
        dollars={"teacher": 2.0, "audit": 0.0, "saved": -1.0},
        audits=Counter(pending=3, lost=1),
        waiting=Counter(teacher=4, student=6),
    )
    agreed = Agreed(
        breaker=MagicMock(), n_teachers=1, n_replicas=3, others=others, accept_above=0.5
    )
    cascade = MagicMock()
    cascade.waiting.n_waiting, cascade.for_student.n_waiting = 1, 2
    health = Health(a_member(replace(NONE, pending=2), agreed), Purse({}), Stability((), 1), None)
    measured = Measured(Inner(), cascade, "b", PRICE, health)
    gauge = measured._gauges["waiting_for_student"] = MagicMock()

    async def scenario() -> None:
        await measured.answer(["x", "y", "z"])
        watching = asyncio.get_running_loop().create_task(measured.watch())
        await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(scenario())
    figures = measured.figures()
    assert figures["replicas"] == 3
    assert figures["totals"] == {"student": 8, "teacher": 2, "void": 0, "remembered": 0,
                                 "refused": 1}  # fmt: skip
    assert figures["escalation_rate"] == 2 / 6 and figures["by_stage"] == {"2": 4}
    assert (figures["waiting"], figures["waiting_for_student"]) == (5, 8)
    assert (figures["teacher_dollars"], figures["saved_dollars"]) == (2.0, -1.0)
    assert (figures["watch"]["pending"], figures["watch"]["lost"]) == (5, 1)
    gauge.set.assert_called_once_with(2.0, tags={"bundle": "b"})
    health.member.failure = "away"  # type: ignore[misc]
    alone = measured.figures()
    assert (alone["replicas"], alone["totals"]["student"], alone["waiting"]) == (1, 3, 1)


def test_of_others_those_that_are_gone_count_no_more():
    tallies = Tallies()

    def others(member: str, n: int | None, at: float, bundle: str = "b") -> int:
        """What it hears, having reported n itself."""
        own = None if n is None else Tally(totals=Counter(student=n))
        return tallies.others(bundle, member, own, at).totals["student"]

    assert [others("1", 10, at=0), others("2", 5, at=0.5), others("1", 11, at=1)] == [0, 10, 5]
    assert others("3", 7, at=1, bundle="c") == 0
    assert others("3", 1, at=2) == 11 + 5
    assert others("1", 12, at=GONE_AFTER_S + 1) == 1  # 2 was killed
    assert others("3", None, at=GONE_AFTER_S + 1.5) == 12  # it stops in order
    assert others("1", 12, at=GONE_AFTER_S + 2) == 0


def test_of_a_replica_that_is_not_heard_what_it_has_in_work_counts_no_more():
    tallies = Tallies()
    minute = Counter(teacher=2)
    busy = Tally(totals=minute, last_minute=minute, waiting=Counter(teacher=4))
    tallies.others("b", "1", busy, 0.0)
    assert tallies.others("b", "2", Tally(), 5.0) == busy
    later = tallies.others("b", "2", Tally(), 30.0)
    assert later.totals == minute and later.escalation_rate is None
    assert later.waiting["teacher"] == 0

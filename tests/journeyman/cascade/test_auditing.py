"""Audited answers and what the teacher says of them, when it has nothing else to do."""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from journeyman import recipe
from journeyman.cascade import auditing
from journeyman.cascade.answering import Unlabeled
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.drift import Audit
from journeyman.cascade.policy import Decision, Escalation, Policy, Written
from journeyman.cascade.refusals import StudentUnavailable, TeacherAway, TeacherUnavailable
from journeyman.cascade.watching import LOST
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify import written
from journeyman.certify.calibration import Calibrator
from journeyman.certify.confidence import Confidence
from journeyman.certify.mixture import Mixture
from journeyman.certify.sequence_scores import WrittenConfidence
from journeyman.teacher.answers import ClassLabels

POLICY = Policy(
    label_names=("no", "yes"),
    confidence=Confidence(calibrator=Calibrator(temperature=1.0), score="margin"),
    accept_above=0.5,
    teacher_log_prior=None,
)


class Teacher:
    """Says yes to what has a y in it, cannot read an x, and is away while told to be."""

    def __init__(self, away: bool = False) -> None:
        self.asked: list[str] = []
        self.away = away

    async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
        if self.away:
            raise TeacherAway("away", 1.0)
        self.asked += texts
        return [
            Unlabeled(reason="x")
            if "x" in text
            else ClassLabels(
                class_logprobs=np.log([0.1, 0.9] if "y" in text else [0.9, 0.1]),
                label_mass=None,
                n_prompt_tokens=1,
                n_output_tokens=0,
            )
            for text in texts
        ]


class Student:
    """Is sure of a y, is not of a b, has no answer to a 0, and is away while told to be."""

    def __init__(self, away: bool = False) -> None:
        self.away = away

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        if self.away:
            raise StudentUnavailable("away")
        return [
            answer() if "y" in text
            else Escalation(student=answer(confidence=0.3) if "b" in text else None)
            for text in items
        ]  # fmt: skip


def answer(label: str = "yes", by: str = "student", confidence: float | None = 0.8) -> Decision:
    return Decision(
        answered_by=by,  # type: ignore[arg-type]
        label=label,
        confidence=confidence,
        probabilities=np.array([0.1, 0.9]),
    )


async def worked(auditor: Auditor, until) -> None:
    task = asyncio.create_task(auditor.run())
    async with asyncio.timeout(5):
        while not until():
            await asyncio.sleep(0.01)
    task.cancel()


def found(auditor: Auditor) -> list[Audit]:
    """What has come out since this was last asked."""
    return [one.audit for one in auditor.outcomes()]


def test_students_answers_are_compared_with_the_teachers():
    teacher = Teacher()
    auditor = Auditor(POLICY, teacher, Student(), busy=lambda: False)
    auditor.add("y", answer("yes"))
    auditor.add("n", answer("yes"))
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert [(a.score, a.loss) for a in found(auditor)] == [(0.8, 0), (0.8, 1)]
    assert found(auditor) == []


def test_texts_that_the_teacher_cannot_answer_are_left_out_as_they_were_for_the_certificate():
    """And counted: neither an error nor a good audit, wherever they stand."""
    auditor = Auditor(POLICY, Teacher(), Student(), busy=lambda: False)
    for text in ("x", "y", "x", "n", "x"):
        auditor.add(text, answer("yes"))
    auditor.unlabeled()  # of a request that was refused for it
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert [audit.loss for audit in found(auditor)] == [0, 1]
    assert (auditor.n_left_out, auditor.n_lost) == (4, 0)


def test_an_audit_whose_request_ended_before_its_student_had_decided_is_decided_later():
    """With the outcome and in the place that it would have had."""
    student = Student(away=True)
    auditor = Auditor(POLICY, Teacher(), student, busy=lambda: False)
    for text in ("y", "b", "0"):
        auditor.undecided(text)
    auditor.escalated(answer(confidence=0.2))

    async def scenario() -> None:
        task = asyncio.create_task(auditor.run())
        await asyncio.sleep(0.05)
        assert auditor.n_pending == 3 and found(auditor) == []
        student.away = False
        async with asyncio.timeout(5):
            while auditor.n_pending:
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(scenario())
    scores = [(audit.score, audit.loss) for audit in found(auditor)]
    assert scores == [(0.8, 0), (0.3, 0), (-np.inf, 0), (0.2, 0)]


def test_where_the_bundle_mixes_an_audit_compares_with_both_opinions():
    """The student's .9 for yes outweighs the teacher's .9 for no at three quarters."""
    mixture = Mixture(student_weight=0.75, student_temperature=1.0, teacher_temperature=1.0)
    auditor = Auditor(replace(POLICY, mixture=mixture), Teacher(), Student(), busy=lambda: False)
    auditor.add("n", answer("yes"))
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert [a.loss for a in found(auditor)] == [0]


def test_written_answers_are_compared_as_they_were_for_the_certificate():
    """Here by the number that they end with: the teacher ends with 42 whatever it is asked."""

    class Writing(Teacher):
        async def labels(self, texts: Sequence[str]) -> list[Written]:  # type: ignore[override]
            return [wrote("six times seven is 42")] * len(texts)

    labels = {"kind": "generate", "prompt": "{{ text }}", "max_tokens": 8}
    certify = {"match": "parsed", "answer_pattern": r"(?P<answer>\d+)$"}
    settings = {"name": "a", "corpus": {"sources": ["a.jsonl"]}, "teacher": {"model": "m"},
                "student": {"model": "s", "kind": "causal"}, "labels": labels,
                "certify": certify}  # fmt: skip
    policy = WrittenPolicy(
        confidence=WrittenConfidence(score="mean_logprob"),
        accept_above=-1.0,
        same=written.comparison(recipe.parse(settings)),
    )
    said = ["it is 42", "it is 43", "no number"]
    auditor = Auditor(policy, Writing(), Student(), busy=lambda: False)
    for decision in policy.decide_batch([wrote(text) for text in said]):
        assert isinstance(decision, Decision)
        auditor.add("how much?", decision)
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert [a.loss for a in found(auditor)] == [0, 1, 1]


class Judge:
    """Finds the same what begins alike; notes what it is asked, and fails as it is told to."""

    def __init__(self, *fails: Exception) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.fails = [*fails]

    async def same(self, text: str, one: str, other: str) -> bool:
        self.asked.append((text, one, other))
        if self.fails:
            raise self.fails.pop(0)
        return one[0] == other[0]


def judged(teacher: Teacher, judge: Judge, busy: list[bool] | None = None) -> Auditor:
    busy = [False] if busy is None else busy
    return Auditor(POLICY, teacher, Student(), busy=lambda: busy[0], judge=judge)


def test_a_judge_is_asked_of_answers_that_are_worded_differently_and_its_verdict_is_watched():
    teacher, judge = Teacher(), Judge()
    auditor = judged(teacher, judge)
    for said in ("yes", "yeah", "no"):  # the teacher says yes to each
        auditor.add("y", answer(said))
    auditor.add("x", answer("yes"))  # it cannot answer
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert [(a.score, a.loss) for a in found(auditor)] == [(0.8, 0), (0.8, 0), (0.8, 1)]
    assert judge.asked == [("y", "yeah", "yes"), ("y", "no", "yes")]
    assert (auditor.n_judged, auditor.n_left_out, auditor.n_lost) == (2, 1, 0)


def test_a_judge_is_asked_while_no_request_waits_and_the_teacher_not_again(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(auditing, "_LOOK_AGAIN_S", 0.01)
    busy = [False]

    class Once(Teacher):
        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            busy[0] = True  # requests have come meanwhile
            return await super().labels(texts)

    teacher, judge = Once(), Judge(TeacherAway("away", 1.0))
    auditor = judged(teacher, judge, busy)
    auditor.add("y", answer("yeah"))

    async def scenario() -> None:
        task = asyncio.create_task(auditor.run())
        await asyncio.sleep(0.1)
        assert teacher.asked == ["y"] and judge.asked == [] and auditor.n_pending == 1
        busy[0] = False
        async with asyncio.timeout(5):
            while auditor.n_pending:
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(scenario())
    assert teacher.asked == ["y"] and len(judge.asked) == 2
    assert found(auditor) == [Audit(score=0.8, loss=0)]


def test_answers_that_a_judge_fails_on_again_and_again_differ_and_are_not_lost(
    monkeypatch: pytest.MonkeyPatch,
):
    """As a pair without a verdict does in the certificate: on the rungs that accept it."""
    monkeypatch.setattr(auditing, "_AGAIN_S", 0.01)

    class FailsOnOne(Judge):
        async def same(self, text: str, one: str, other: str) -> bool:
            same = await super().same(text, one, other)
            if text == "yy":
                raise TypeError("a bug")
            return same

    teacher, judge = Teacher(), FailsOnOne()
    auditor = judged(teacher, judge)
    auditor.add("yy", answer("yeah"))
    auditor.add("y", answer("yeah"))
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert found(auditor) == [Audit(score=0.8, loss=1), Audit(score=0.8, loss=0)]
    assert len(judge.asked) == 4 and teacher.asked == ["yy", "y"]
    assert (auditor.n_lost, auditor.n_judged) == (0, 1)


def test_what_waits_for_a_judge_counts_with_both_answers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(auditing, "_MOST_CHARACTERS", 7)
    auditor = judged(Teacher(), Judge(*[TeacherAway("away", 1.0)] * 3))
    auditor.add("y", answer("yeah"))
    assert auditor.has_room
    asyncio.run(worked(auditor, lambda: not auditor.has_room))  # with the teacher's `yes`
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert auditor.has_room and found(auditor) == [Audit(score=0.8, loss=0)]


def wrote(text: str) -> Written:
    return Written(text=text, tokens=(), logprobs=np.array([-0.5, -0.1]), finish_reason="stop",
                   n_prompt_tokens=3, n_output_tokens=2)  # fmt: skip


def test_what_the_teacher_answered_is_no_loss_and_asks_nobody():
    teacher = Teacher()
    auditor = Auditor(POLICY, teacher, Student(), busy=lambda: False)
    auditor.add("n", answer("no", by="teacher", confidence=0.2))
    auditor.add("n", answer("no", by="teacher", confidence=None))  # the student has no answer
    auditor.escalated(None)  # nor here, and the teacher was away
    outcomes = [(a.score, a.loss) for a in found(auditor)]
    assert outcomes == [(0.2, 0), (-np.inf, 0), (-np.inf, 0)]
    assert teacher.asked == [] and auditor.n_pending == 0


def test_audits_wait_while_requests_do():
    teacher, busy = Teacher(), [True]
    auditor = Auditor(POLICY, teacher, Student(), busy=lambda: busy[0])
    auditor.add("y", answer())

    async def scenario() -> None:
        task = asyncio.create_task(auditor.run())
        await asyncio.sleep(0.5)
        assert teacher.asked == [] and auditor.n_pending == 1
        task.cancel()
        busy[0] = False
        await worked(auditor, lambda: auditor.n_pending == 0)

    asyncio.run(scenario())
    assert teacher.asked == ["y"]


def test_audits_outlast_a_teacher_that_is_away():
    teacher = Teacher()
    teacher.away = True
    auditor = Auditor(POLICY, teacher, Student(), busy=lambda: False)
    auditor.add("n", answer("no"))

    async def scenario() -> None:
        task = asyncio.create_task(auditor.run())
        await asyncio.sleep(0.3)
        assert auditor.n_pending == 1 and found(auditor) == []
        teacher.away = False
        async with asyncio.timeout(5):
            while auditor.n_pending:
                await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(scenario())
    assert [audit.loss for audit in found(auditor)] == [0]


def test_audits_go_beside_requests_that_never_end_and_one_at_a_time():
    """A cascade of ordinary load is never without an escalation under way; what waits behind the
    first audits, and their outcomes, would be kept for ever."""
    now, under_way, most = [0.0], [0], [0]

    class Slow(Teacher):
        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            await asyncio.sleep(0.01)
            under_way[0] -= 1
            return await super().labels(texts)

    auditor = Auditor(POLICY, Slow(), Student(), busy=lambda: True, clock=lambda: now[0])
    for _ in range(20):
        auditor.add("y", answer())
        auditor.escalated(answer(confidence=0.2))

    async def scenario() -> None:
        task = asyncio.create_task(auditor.run())
        await asyncio.sleep(0.3)
        assert auditor.n_pending == 20 and not found(auditor)
        now[0] = 6.0
        async with asyncio.timeout(5):
            while auditor.n_pending:
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(scenario())
    assert len(found(auditor)) == 40 and auditor.n_lost == 0 and most[0] == 1


def test_a_teacher_that_sleeps_is_woken_for_audits_once_in_half_an_hour(
    monkeypatch: pytest.MonkeyPatch,
):
    """As the student of a bundle may answer everything. Then all that wait are asked, also those
    that came a moment ago, so that each does not wake it anew."""
    monkeypatch.setattr(auditing, "_LOOK_AGAIN_S", 0.01)
    now, teacher = [0.0], Teacher()
    auditor = Auditor(
        POLICY, teacher, Student(), busy=lambda: False, rests=lambda: True, clock=lambda: now[0]
    )

    async def scenario() -> None:
        task = asyncio.create_task(auditor.run())
        for at, expected in ((0.0, 0), (1700.0, 0), (1801.0, 3), (3000.0, 3), (4900.0, 5)):
            now[0] = at
            auditor.add("y", answer())
            await asyncio.sleep(0.1)
            assert len(teacher.asked) == expected, at
        task.cancel()

    asyncio.run(scenario())


def test_of_too_many_further_ones_are_not_drawn_and_none_that_waits_is_lost(
    monkeypatch: pytest.MonkeyPatch,
):
    """Whatever they would have been: those that the student did not answer are known at once."""
    monkeypatch.setattr(auditing, "_MOST_WAITING", 2)
    auditor = Auditor(POLICY, Teacher(), Student(), busy=lambda: False)
    for _ in range(3):  # the last is of a request that began before
        auditor.add("y", answer())
    assert not auditor.has_room and auditor.n_pending == 3
    auditor.not_drawn(5)
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert [a.loss for a in found(auditor)] == [0, 0, 0] and auditor.has_room
    assert (auditor.n_not_drawn, auditor.n_lost) == (5, 0)


def test_audits_that_wait_hold_little_memory(monkeypatch: pytest.MonkeyPatch):
    """Nothing of an answer but its text, and of all texts together no more than may be."""
    monkeypatch.setattr(auditing, "_MOST_CHARACTERS", 20)
    auditor = Auditor(POLICY, Teacher(), Student(), busy=lambda: True)
    said = replace(answer("a text"), written=wrote("a text"))
    auditor.add("text", said)
    assert sys.getrefcount(said) == 2  # it alone holds its tokens
    assert auditor.has_room
    auditor.add("text", answer("a text"))
    assert not auditor.has_room


def test_outcomes_leave_in_the_order_of_their_requests():
    """Those known at once would come first, and the others in one run behind them."""
    auditor = Auditor(POLICY, Teacher(), Student(), busy=lambda: False)
    auditor.add("n", answer("yes"))
    auditor.add("a", answer("no", by="teacher", confidence=0.2))
    auditor.escalated(answer("no", confidence=0.3))
    auditor.add("y", answer("yes", confidence=0.9))
    assert found(auditor) == [] and auditor.n_pending == 2
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    scores = [(audit.score, audit.loss) for audit in found(auditor)]
    assert scores == [(0.8, 1), (0.2, 0), (0.3, 0), (0.9, 0)]


@pytest.mark.parametrize("n_audits", [1, 10])
@pytest.mark.parametrize(
    "fails", [TeacherUnavailable("its answer is none"), TypeError("a bug"), None]
)
def test_a_teacher_that_fails_on_all_for_long_is_no_evidence_against_any_text(
    fails: Exception | None, n_audits: int, monkeypatch: pytest.MonkeyPatch
):
    """None: it does not answer in time."""
    monkeypatch.setattr(auditing, "_AGAIN_S", 0.001)
    monkeypatch.setattr(auditing, "_LONGEST_AGAIN_S", 0.002)
    monkeypatch.setattr(auditing, "_TIMEOUT_S", 0.002)
    n_tries = 0

    class Failing(Teacher):
        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            nonlocal n_tries
            n_tries += 1
            if n_tries < 40:
                if fails:
                    raise fails
                await asyncio.sleep(60)
            return await super().labels(texts)

    auditor = Auditor(POLICY, Failing(), Student(), busy=lambda: False, patience_s=0.0)
    for _ in range(n_audits):
        auditor.add("y", answer())
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert found(auditor) == [Audit(score=0.8, loss=0)] * n_audits
    assert auditor.n_lost == 0


def test_a_text_that_ends_the_teachers_engine_does_so_three_times(monkeypatch: pytest.MonkeyPatch):
    """Though each time the teacher is away for a while, and can say nothing of others. Then it
    says itself that it is, where nobody else knows it (of one that may sleep)."""
    monkeypatch.setattr(auditing, "_AGAIN_S", 0.01)
    monkeypatch.setattr(auditing, "_LOOK_AGAIN_S", 0.001)
    tries = []

    class Ended(Teacher):
        away_for = 0

        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            if self.away_for:
                self.away_for -= 1
                raise TeacherUnavailable("is starting again", had_texts=False)
            if texts == ["b"]:
                tries.append(texts)
                self.away_for = 7
                raise TeacherUnavailable("its engine died")
            return await super().labels(texts)

    auditor = Auditor(POLICY, Ended(), Student(), busy=lambda: False)
    auditor.add("b", answer())
    for _ in range(4):
        auditor.add("y", answer())
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert found(auditor) == [LOST, *[Audit(score=0.8, loss=0)] * 4]
    assert len(tries) == 3


@pytest.mark.parametrize("fails", ["raises", "has no answer", "takes too long"])
def test_a_text_that_the_teacher_fails_on_again_and_again_is_lost_and_holds_up_no_other(
    fails: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(auditing, "_AGAIN_S", 0.01)
    monkeypatch.setattr(auditing, "_TIMEOUT_S", 0.05)
    tries = []

    class Failing(Teacher):
        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            if texts != ["b"]:
                return await super().labels(texts)
            tries.append(fails)
            if fails == "has no answer":
                raise TeacherUnavailable("its answer is none")
            if fails == "takes too long":
                await asyncio.sleep(60)
            raise TypeError("a bug")

    auditor = Auditor(POLICY, Failing(), Student(), busy=lambda: False, patience_s=0.0)
    auditor.add("b", answer())
    auditor.add("y", answer())
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert found(auditor) == [LOST, Audit(score=0.8, loss=0)]
    assert len(tries) == 3 and auditor.n_lost == 1


def test_texts_that_the_teacher_fails_on_one_behind_the_other_hold_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
):
    """Such as one that was sent, and audited, twice."""
    monkeypatch.setattr(auditing, "_AGAIN_S", 0.001)

    class Failing(Teacher):
        async def labels(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
            if texts[0].startswith("b"):
                raise TypeError("a bug")
            return await super().labels(texts)

    auditor = Auditor(POLICY, Failing(), Student(), busy=lambda: False)
    for text in ("b", "bb", "bbb", "y"):
        auditor.add(text, answer())
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 2))
    assert found(auditor) == [LOST]
    for text in ("y", "y"):
        auditor.add(text, answer())
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 1))
    assert found(auditor) == [LOST], "the last one has nothing to be compared with"
    auditor.add("y", answer())
    asyncio.run(worked(auditor, lambda: auditor.n_pending == 0))
    assert found(auditor) == [LOST, *[Audit(score=0.8, loss=0)] * 4]


def test_outcomes_that_nobody_fetches_take_room():
    """As where the store is away that they are written to."""
    auditor = Auditor(POLICY, Teacher(), Student(), busy=lambda: False)
    while auditor.has_room:
        auditor.escalated(None)
    assert auditor.n_found == 10_000
    assert len(found(auditor)) == 10_000
    assert auditor.has_room

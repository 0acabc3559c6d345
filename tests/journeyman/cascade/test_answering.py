"""One request through student, policy and teacher: who is asked for what, and what stops it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from journeyman.cascade.answering import Answers, Cascade, Unlabeled
from journeyman.cascade.policy import Decision, Escalation, Policy, beyond
from journeyman.cascade.refusals import (
    DeadlinePassed,
    Overloaded,
    StudentOverloaded,
    StudentUnavailable,
    TeacherAway,
    TeacherUnavailable,
    TextRefused,
)
from journeyman.certify.calibration import Calibrator
from journeyman.certify.confidence import Confidence
from journeyman.certify.mixture import Mixture
from journeyman.recipe import Cascade as Settings
from journeyman.teacher.answers import ClassLabels

POLICY = Policy(
    label_names=("no", "yes"),
    confidence=Confidence(calibrator=Calibrator(), score="max_probability"),
    accept_above=0.9,
    teacher_log_prior=None,
)


class Student:
    """Says yes; sure of texts that say so."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        self.asked += items
        return POLICY.decide_batch([[0.0, 5.0 if "sure" in text else 1.0] for text in items])


class Teacher:
    """Says no, as soon as it may."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.cancelled = 0
        self.may_answer = asyncio.Event()
        self.away = False
        self.garbage: list[ClassLabels] | None = None

    async def labels(self, texts: Sequence[str]) -> Sequence[ClassLabels | Unlabeled]:
        self.asked.append(list(texts))
        if self.away:
            raise TeacherUnavailable("the teacher is away")
        if self.garbage is not None:
            return self.garbage
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [
            Unlabeled(reason="too long")
            if "long" in text
            else ClassLabels(
                class_logprobs=np.log(np.array([0.7, 0.3], np.float32)),
                label_mass=None,
                n_prompt_tokens=10,
                n_output_tokens=2,
            )
            for text in texts
        ]


class Asked:
    """A cascade over the two, whose teacher answers at once unless told otherwise."""

    def __init__(self, *, max_waiting: int = 4, timeout_s: float = 5.0, **settings: object) -> None:
        self.student, self.teacher = Student(), Teacher()
        self.teacher.may_answer.set()
        of_recipe = Settings.model_validate(
            {"max_queued_requests": max_waiting, "request_timeout_s": timeout_s, **settings}
        )
        self.cascade = Cascade(POLICY, self.student, self.teacher, of_recipe)


def who(answers: Answers) -> list[str]:
    return [decision.answered_by for decision in answers.decisions]


def test_the_teacher_is_asked_once_and_only_for_what_the_student_may_not_answer():
    async def test() -> None:
        asked = Asked()
        answers = await asked.cascade.answer(["sure 1", "hm 2", "sure 3", "hm 4"])
        assert who(answers) == ["student", "teacher", "student", "teacher"]
        assert [d.label for d in answers.decisions] == ["yes", "no", "yes", "no"]
        assert asked.teacher.asked == [["hm 2", "hm 4"]]
        assert (answers.teacher_prompt_tokens, answers.teacher_output_tokens) == (20, 4)
        assert all(0.5 < d.confidence < 1 for d in answers.decisions)
        assert asked.cascade.waiting.n_waiting == 0

    asyncio.run(test())


def test_an_escalated_text_is_answered_with_both_opinions_where_the_bundle_mixes():
    async def test() -> None:
        asked = Asked()
        mixture = Mixture(student_weight=0.9, student_temperature=1.0, teacher_temperature=1.0)
        mixing = replace(POLICY, mixture=mixture)
        cascade = Cascade(mixing, asked.student, asked.teacher, Settings())
        [both] = (await cascade.answer(["hm"])).decisions
        yes = 1 / (1 + np.exp(-1.0))
        np.testing.assert_allclose(both.probabilities[1], 0.9 * yes + 0.1 * 0.3, rtol=1e-6)
        assert (both.label, both.answered_by) == ("yes", "teacher")
        [alone] = (await cascade.answer(["hm"], "teacher")).decisions
        assert alone.label == "no"
        [student] = await asked.student.submit(["sure"])
        said = (await asked.teacher.labels(["sure"]))[0]
        outside = mixing.escalated(said, beyond(student).student)
        assert outside.label == "no" and outside.confidence is None

    asyncio.run(test())


def test_a_model_that_was_not_asked_for_is_not_asked():
    async def test() -> None:
        asked = Asked()
        answers = await asked.cascade.answer(["sure", "hm"], "student")
        assert who(answers) == ["student", "student"] and not asked.teacher.asked
        asked = Asked()
        answers = await asked.cascade.answer(["sure", "hm"], "teacher")
        assert who(answers) == ["teacher", "teacher"] and not asked.student.asked
        assert [d.confidence for d in answers.decisions] == [None, None]

    asyncio.run(test())


def test_when_too_many_wait_others_are_turned_away_and_accepted_ones_are_not():
    async def test() -> None:
        asked = Asked(max_waiting=4)
        asked.teacher.may_answer.clear()
        waiting = asyncio.create_task(asked.cascade.answer(["hm 1", "hm 2", "hm 3"]))
        await asyncio.sleep(0)
        while asked.cascade.waiting.n_waiting < 3:
            await asyncio.sleep(0.001)
        with pytest.raises(Overloaded, match="3 texts wait for the teacher and at most 4 may"):
            await asked.cascade.answer(["hm", "hm"])
        assert who(await asked.cascade.answer(["sure"] * 5)) == ["student"] * 5
        asked.teacher.may_answer.set()
        assert who(await waiting) == ["teacher"] * 3
        assert asked.cascade.waiting.n_waiting == 0

    asyncio.run(test())


def test_a_request_larger_than_the_bound_is_served_when_nobody_waits():
    async def test() -> None:
        answers = await Asked(max_waiting=2).cascade.answer(["hm"] * 5)
        assert who(answers) == ["teacher"] * 5

    asyncio.run(test())


def test_a_deadline_cancels_the_teachers_work_and_frees_the_places():
    async def test() -> None:
        asked = Asked(timeout_s=0.05)
        asked.teacher.may_answer.clear()
        with pytest.raises(DeadlinePassed, match=r"no answer within 0\.05 s"):
            await asked.cascade.answer(["hm"])
        assert asked.teacher.cancelled == 1
        assert asked.cascade.waiting.n_waiting == 0

    asyncio.run(test())


def test_without_a_teacher_the_student_goes_on():
    async def test() -> None:
        asked = Asked()
        asked.teacher.away = True
        with pytest.raises(TeacherUnavailable, match="the teacher is away"):
            await asked.cascade.answer(["sure", "hm"])
        assert who(await asked.cascade.answer(["sure"])) == ["student"]
        assert asked.cascade.waiting.n_waiting == 0

    asyncio.run(test())


def test_a_refused_text_is_named_by_its_place_in_the_request():
    async def test() -> None:
        with pytest.raises(TextRefused, match="text 2: too long"):
            await Asked().cascade.answer(["sure", "hm", "long hm"])

    asyncio.run(test())


def labels(*logprobs: float) -> ClassLabels:
    return ClassLabels(
        class_logprobs=np.array(logprobs, np.float32),
        label_mass=None,
        n_prompt_tokens=1,
        n_output_tokens=1,
    )


@pytest.mark.parametrize("how", ["away", "hung", "garbage"])
def test_degrade_gives_the_students_answer_and_says_that_it_is_void(how: str):
    async def test() -> None:
        asked = Asked(when_teacher_fails="degrade", teacher_timeout_s=0.05)
        match how:
            case "away":
                asked.teacher.away = True
            case "hung":
                asked.teacher.may_answer.clear()
            case "garbage":
                asked.teacher.garbage = [labels(float("nan"), 0.0)]
        answers = await asked.cascade.answer(["hm", "sure"])
        assert who(answers) == ["student", "student"]
        assert answers.void == {0}  # the other one was the student's to answer
        assert answers.decisions[0].confidence < POLICY.accept_above
        assert asked.cascade.waiting.n_waiting == 0
        assert asked.teacher.cancelled == (how == "hung")

    asyncio.run(test())


def test_degrade_is_for_the_cascade_who_asks_the_teacher_gets_an_error():
    async def test() -> None:
        asked = Asked(when_teacher_fails="degrade")
        asked.teacher.away = True
        with pytest.raises(TeacherUnavailable):
            await asked.cascade.answer(["hm"], "teacher")

    asyncio.run(test())


@pytest.mark.parametrize(
    "garbage",
    [
        [],
        [labels(-0.5, float("inf"))],
        [labels(-0.5)],
        [labels(-0.7, -0.7), labels(-0.7, -0.7)],
        [Unlabeled(reason="its log-probabilities are no numbers", is_garbage=True)],
    ],
    ids=["none", "infinite", "one class", "one text too many", "no numbers"],
)
def test_an_answer_that_is_none_is_a_failure_of_the_teacher(garbage: list[ClassLabels]):
    async def test() -> None:
        asked = Asked()
        asked.teacher.garbage = garbage
        with pytest.raises(TeacherUnavailable, match="the teacher's answer is none"):
            await asked.cascade.answer(["hm"])

    asyncio.run(test())


def test_wait_holds_a_request_until_the_teacher_is_back():
    async def test() -> None:
        asked = Asked(when_teacher_fails="wait", breaker={"failures": 1, "pause_s": 0.05})
        asked.teacher.away = True
        waiting = asyncio.create_task(asked.cascade.answer(["hm"]))
        while not asked.teacher.asked:
            await asyncio.sleep(0.01)
        assert asked.cascade.waiting.n_waiting == 1
        asked.teacher.away = False
        assert who(await waiting) == ["teacher"]

    asyncio.run(test())


def test_wait_asks_again_where_the_teacher_hangs_beyond_its_own_deadline():
    async def test() -> None:
        asked = Asked(when_teacher_fails="wait", teacher_timeout_s=0.05)
        asked.teacher.may_answer.clear()
        waiting = asyncio.create_task(asked.cascade.answer(["hm"]))
        while not asked.teacher.cancelled:
            await asyncio.sleep(0.01)
        asked.teacher.may_answer.set()
        assert who(await waiting) == ["teacher"]

    asyncio.run(test())


def test_wait_ends_at_the_deadline_with_the_teachers_reason():
    async def test() -> None:
        asked = Asked(when_teacher_fails="wait", timeout_s=0.3)
        asked.teacher.away = True
        with pytest.raises(TeacherUnavailable, match="the teacher is away"):
            await asked.cascade.answer(["hm"])

    asyncio.run(test())


def test_a_teacher_that_hangs_is_left_alone_after_some_failures_and_asked_again_later():
    async def test() -> None:
        asked = Asked(timeout_s=0.05, breaker={"failures": 2, "pause_s": 0.2})
        asked.teacher.may_answer.clear()
        for _ in range(2):
            with pytest.raises(DeadlinePassed):
                await asked.cascade.answer(["hm"])
        with pytest.raises(TeacherUnavailable, match="left alone for a while") as refused:
            await asked.cascade.answer(["hm"])
        assert 0 < refused.value.retry_after_s <= 0.2
        assert len(asked.teacher.asked) == 2
        assert who(await asked.cascade.answer(["sure"])) == ["student"]
        asked.teacher.may_answer.set()
        await asyncio.sleep(0.21)
        assert who(await asked.cascade.answer(["hm"])) == ["teacher"]
        assert asked.cascade.breaker.is_closed

    asyncio.run(test())


def test_clients_that_go_away_do_not_count_against_the_teacher():
    async def test() -> None:
        asked = Asked(breaker={"failures": 1})
        asked.teacher.may_answer.clear()
        for _ in range(3):
            gone = asyncio.create_task(asked.cascade.answer(["hm"]))
            while asked.cascade.waiting.n_waiting == 0:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
        asked.teacher.may_answer.set()
        assert who(await asked.cascade.answer(["hm"])) == ["teacher"]

    asyncio.run(test())


class Away:
    """A student whose deployment is away, or that has no answer to anything."""

    def __init__(self, speechless: bool = False) -> None:
        self._speechless = speechless

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        if not self._speechless:
            raise StudentUnavailable("the student is away", 5.0)
        return [Escalation(student=None) for _ in items]


@pytest.mark.parametrize("speechless", [False, True])
def test_the_teacher_answers_what_the_student_has_no_answer_to(speechless: bool):
    async def run() -> None:
        teacher = Teacher()
        teacher.may_answer.set()
        cascade = Cascade(POLICY, Away(speechless), teacher, Settings())
        answers = await cascade.answer(["a", "b"])
        assert [d.answered_by for d in answers.decisions] == ["teacher", "teacher"]
        assert [d.confidence for d in answers.decisions] == [None, None]
        with pytest.raises(TextRefused if speechless else StudentUnavailable):
            await cascade.answer(["a"], "student")

    asyncio.run(run())


def test_nothing_stands_in_for_a_teacher_where_the_student_has_no_answer():
    async def run() -> None:
        teacher = Teacher()
        teacher.away = True
        settings = Settings(when_teacher_fails="degrade")
        cascade = Cascade(POLICY, Away(speechless=True), teacher, settings)
        with pytest.raises(TeacherUnavailable):
            await cascade.answer(["a"])

    asyncio.run(run())


def test_where_the_students_queue_takes_half_of_a_deadline_requests_are_refused_at_once():
    """Or the student would only ever work on texts whose deadline has just come."""

    async def test() -> None:
        asked, wait_s = Asked(), 9.9
        settings = Settings(request_timeout_s=20)
        cascade = Cascade(
            POLICY, asked.student, asked.teacher, settings, student_wait_s=lambda: wait_s
        )
        assert who(await cascade.answer(["sure"])) == ["student"]
        wait_s = 12.3
        with pytest.raises(StudentOverloaded, match="takes about 12 s") as refused:
            await cascade.answer(["sure"])
        assert refused.value.retry_after_s == 12.3
        assert who(await cascade.answer(["hm"], "teacher")) == ["teacher"]
        assert asked.student.asked == ["sure"]

    asyncio.run(test())


def test_an_audit_finds_a_teacher_well_again_that_no_request_asks():
    """As none does where the student answers everything: its breaker would be open for ever."""

    async def test() -> None:
        asked = Asked(breaker={"failures": 1, "pause_s": 0.05})
        asked.teacher.away = True
        with pytest.raises(TeacherUnavailable):
            await asked.cascade.answer(["hm"])
        with pytest.raises(TeacherAway):
            await asked.cascade.labels(["an audit"])
        assert len(asked.teacher.asked) == 1, "it is left alone"
        await asyncio.sleep(0.06)
        with pytest.raises(TeacherUnavailable):
            await asked.cascade.labels(["an audit"])
        assert asked.cascade.breaker.opens_in_s(time.monotonic()) > 0.05, "twice as long"
        asked.teacher.away = False
        await asyncio.sleep(0.11)
        asked.teacher.garbage = [Unlabeled(reason="no numbers", is_garbage=True)]
        with pytest.raises(TeacherUnavailable):
            await asked.cascade.labels(["an audit"])
        assert not asked.cascade.breaker.is_closed
        asked.teacher.garbage = None
        await asyncio.sleep(0.21)
        assert len(await asked.cascade.labels(["an audit"])) == 1
        assert asked.cascade.breaker.is_closed

    asyncio.run(test())

"""One request through student, policy and teacher: who is asked for what, and what stops it."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from journeyman.cascade.answering import Answers, Cascade, Unlabeled
from journeyman.cascade.policy import Decision, Escalation, Policy
from journeyman.cascade.refusals import (
    DeadlinePassed,
    Overloaded,
    TeacherUnavailable,
    TextRefused,
)
from journeyman.certify.calibration import Calibrator
from journeyman.teacher.answers import ClassLabels

POLICY = Policy(
    label_names=("no", "yes"),
    calibrator=Calibrator(),
    score="max_probability",
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

    async def labels(self, texts: Sequence[str]) -> Sequence[ClassLabels | Unlabeled]:
        self.asked.append(list(texts))
        if self.away:
            raise TeacherUnavailable("the teacher is away")
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

    def __init__(self, *, max_waiting: int = 4, timeout_s: float = 5.0) -> None:
        self.student, self.teacher = Student(), Teacher()
        self.teacher.may_answer.set()
        self.cascade = Cascade(
            POLICY, self.student, self.teacher, max_waiting=max_waiting, timeout_s=timeout_s
        )


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

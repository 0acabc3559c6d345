"""Texts that come again."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from journeyman.cascade.answering import Answers
from journeyman.cascade.policy import Decision, Escalation
from journeyman.cascade.recording import Recording
from journeyman.cascade.refusals import TeacherUnavailable, TextRefused
from journeyman.cascade.remembering import Remembering


class Inner:
    """Answers with the text itself, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.failing = False

    async def answer(self, texts: Sequence[str], asked: str = "cascade") -> Answers:
        self.asked.append(list(texts))
        if "never" in texts:
            raise TextRefused(list(texts).index("never"), "too long")
        return Answers(
            decisions=tuple(
                Decision(
                    answered_by="teacher",
                    label=text,
                    confidence=0.1,
                    probabilities=np.array([1.0]),
                )
                for text in texts
            ),
            teacher_prompt_tokens=10 * len(texts),
            teacher_output_tokens=0,
            void=frozenset(range(len(texts))) if self.failing else frozenset(),
        )


def labels(answers: Answers) -> list[str]:
    return [decision.label for decision in answers.decisions]


def test_only_what_is_new_is_asked_and_answers_keep_their_places():
    async def test() -> None:
        inner = Inner()
        cache = Remembering(inner, size=10)
        await cache.answer(["b", "d"])
        answers = await cache.answer(["a", "b", "c", "d"])
        assert labels(answers) == ["a", "b", "c", "d"]
        assert inner.asked == [["b", "d"], ["a", "c"]]
        assert answers.teacher_prompt_tokens == 20 and answers.remembered == {1, 3}
        again = await cache.answer(["a", "b", "c", "d"])
        assert labels(again) == ["a", "b", "c", "d"] and again.teacher_prompt_tokens == 0
        assert len(inner.asked) == 2 and again.remembered == {0, 1, 2, 3}

    asyncio.run(test())


def test_the_text_that_was_not_asked_for_longest_is_forgotten_first():
    async def test() -> None:
        inner = Inner()
        cache = Remembering(inner, size=2)
        for text in ("a", "b", "a", "c", "a", "b"):
            assert labels(await cache.answer([text])) == [text]
        assert inner.asked == [["a"], ["b"], ["c"], ["b"]]

    asyncio.run(test())


def test_an_answer_for_which_nothing_is_promised_is_not_kept():
    async def test() -> None:
        inner = Inner()
        cache = Remembering(inner, size=9)
        await cache.answer(["b"])
        inner.failing = True
        assert (await cache.answer(["a", "b"])).void == {0}
        inner.failing = False
        assert (await cache.answer(["b", "a"])).void == set()
        assert inner.asked == [["b"], ["a"], ["a"]]

    asyncio.run(test())


def test_one_model_alone_is_always_asked():
    async def test() -> None:
        inner = Inner()
        cache = Remembering(inner, size=9)
        for _ in range(2):
            await cache.answer(["a"])
            await cache.answer(["a"], "teacher")
        assert len(inner.asked) == 3

    asyncio.run(test())


def test_a_refused_text_keeps_its_place_in_the_request():
    async def test() -> None:
        cache = Remembering(Inner(), size=9)
        await cache.answer(["a", "b"])
        with pytest.raises(TextRefused, match="text 3: too long"):
            await cache.answer(["a", "b", "c", "never"])

    asyncio.run(test())


def test_what_an_older_rule_decided_is_not_kept():
    """A request that was under way when the threshold was tightened ends behind that."""

    async def test() -> None:
        inner = Inner()
        cache = Remembering(inner, size=10)
        answer = inner.answer

        async def tightened_meanwhile(texts: Sequence[str], asked: str = "cascade") -> Answers:
            found = await answer(texts, asked)
            cache.forget()
            return found

        inner.answer = tightened_meanwhile  # type: ignore[method-assign]
        await cache.answer(["a"])
        inner.answer = answer  # type: ignore[method-assign]
        await cache.answer(["a"])
        assert inner.asked == [["a"], ["a"]]

    asyncio.run(test())


def test_a_refusal_says_of_every_text_what_was_decided():
    class Refusing(Inner):
        async def answer(self, texts: Sequence[str], asked: str = "cascade") -> Answers:
            found = await super().answer(texts, asked)
            if "hard" in texts:
                refusal = TeacherUnavailable("away")
                refusal.decided = [Escalation(student=d) for d in found.decisions]
                raise refusal
            return found

    async def test() -> None:
        cache = Remembering(Refusing(), size=10)
        await cache.answer(["b"])
        with pytest.raises(TeacherUnavailable) as refused:
            await cache.answer(["hard", "b", "c"])
        hard, b, c = refused.value.decided
        assert isinstance(hard, Escalation) and hard.student.label == "hard"
        assert isinstance(b, Decision) and b.label == "b"
        assert isinstance(c, Escalation) and c.student.label == "c"

    asyncio.run(test())


def test_an_escalation_is_kept_as_feedback_once_however_often_its_text_comes_again():
    kept: list[Any] = []
    journal: Any = SimpleNamespace(add=kept.extend)
    recording = Recording(Remembering(Inner(), size=10), journal, audit_rate=0.0, bundle="b")

    async def test() -> None:
        for _ in range(3):
            await recording.answer(["a", "b"])

    asyncio.run(test())
    assert [seen.text for seen in kept] == ["a", "b"]

"""Targets that many rows ask for are scored once, and by another when the one that asked fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from journeyman.recipe import Classes
from journeyman.teacher.classes import ClassTask
from journeyman.teacher.engine import EngineDied, Scored
from journeyman.teacher.remembered import Prompt, Remembered
from tests.journeyman.teacher import test_odd_rows as odd


class Asked:
    """Answers each prompt with its last token, after a while; dies so often before it does."""

    def __init__(self, deaths: int = 0) -> None:
        self.prompts: list[Prompt] = []
        self.deaths = deaths

    async def __call__(self, prompts: Sequence[Prompt]) -> list[Scored]:
        self.prompts += prompts
        await asyncio.sleep(0.01)
        if self.deaths:
            self.deaths -= 1
            raise EngineDied
        return [
            Scored(logprobs=np.array([-ids[-1]], np.float32), n_cached_tokens=1)
            for ids, _ in prompts
        ]


def said(scores: Sequence[Scored]) -> list[tuple[float, int]]:
    return [(float(score.logprobs[0]), score.n_cached_tokens) for score in scores]


SHARED: Prompt = ([1, 2, 3], 1)


def test_a_prompt_is_scored_once_however_many_rows_ask_for_it() -> None:
    ask, remembered = Asked(), Remembered()

    async def run() -> list[list[Scored]]:
        rows = [[([9, own], 1), SHARED] for own in (4, 5, 6)]
        together = await asyncio.gather(*(remembered.scored(row, ask) for row in rows))
        return [*together, await remembered.scored(rows[0], ask)]

    first, second, third, again = map(said, asyncio.run(run()))
    assert first == [(-4, 1), (-3, 1)]
    assert (second, third) == ([(-5, 1), (-3, 3)], [(-6, 1), (-3, 3)])  # as read from the cache
    assert again == [(-4, 2), (-3, 3)]
    assert sorted(ids[-1] for ids, _ in ask.prompts) == [3, 4, 5, 6]


def test_the_same_tokens_with_the_target_elsewhere_are_another_prompt() -> None:
    ask = Asked()
    asyncio.run(Remembered().scored([([1, 2, 3], 1), ([1, 2, 3], 2)], ask))
    assert len(ask.prompts) == 2


def test_two_labels_of_a_row_with_the_same_prompt_ask_once() -> None:
    ask = Asked()
    scores = asyncio.run(Remembered().scored([SHARED, SHARED], ask))
    assert [value for value, _ in said(scores)] == [-3, -3]
    assert ask.prompts == [SHARED]


def test_rows_that_waited_for_one_that_fails_ask_for_themselves() -> None:
    ask, remembered = Asked(deaths=1), Remembered()

    async def run() -> list[list[Scored] | BaseException]:
        some = (remembered.scored([SHARED], ask) for _ in range(3))
        return await asyncio.gather(*some, return_exceptions=True)

    failed, *others = asyncio.run(run())
    assert isinstance(failed, EngineDied)
    assert [said(scores) for scores in others] == [[(-3, 1)], [(-3, 3)]]  # type: ignore[arg-type]
    assert len(ask.prompts) == 2


def test_rows_that_waited_for_one_that_is_cancelled_ask_for_themselves() -> None:
    ask, remembered = Asked(), Remembered()

    async def run() -> tuple[list[Scored], bool]:
        first = asyncio.create_task(remembered.scored([SHARED], ask))
        second = asyncio.create_task(remembered.scored([SHARED], ask))
        await asyncio.sleep(0)
        first.cancel()
        return await second, first.cancelled()

    scores, was_cancelled = asyncio.run(run())
    assert was_cancelled and said(scores) == [(-3, 1)]


def test_a_row_that_is_cancelled_while_it_waits_leaves_the_others_their_scores() -> None:
    ask, remembered = Asked(), Remembered()

    async def run() -> list[Scored]:
        first = asyncio.create_task(remembered.scored([SHARED], ask))
        second = asyncio.create_task(remembered.scored([SHARED], ask))
        await asyncio.sleep(0.001)
        second.cancel()
        return await first

    assert said(asyncio.run(run())) == [(-3, 1)]
    assert len(ask.prompts) == 1


def test_only_the_last_are_remembered() -> None:
    ask, remembered = Asked(), Remembered(most=2)

    async def run() -> None:
        for own in (1, 2, 3, 3, 1):
            await remembered.scored([([0, own], 1)], ask)

    asyncio.run(run())
    assert [ids[-1] for ids, _ in ask.prompts] == [1, 2, 3, 1]


@pytest.mark.parametrize("remembered", [None, Remembered()], ids=["asked", "remembered"])
def test_candidates_of_one_question_share_what_no_candidate_is_in(remembered) -> None:
    engine = odd.Engine()
    labels = Classes.model_validate(
        {
            "scoring": "channel",
            "classes": {"relevant": "a", "not_relevant": "b"},
            "prompt": "{% if label == 'a' %}{{ passage }}{% else %}long{% endif %}",
            "target": "{{ text }}",
        }
    )
    task = ClassTask(labels, engine, remembered)  # type: ignore[arg-type]

    async def run() -> list:
        rows = [{"text": "w1 w2", "passage": passage} for passage in ("w3", "w4", "w5")]
        return await asyncio.gather(*map(task.run, rows))

    answers = asyncio.run(run())
    assert len(engine.targets) == (4 if remembered else 6)
    for answer in answers:
        np.testing.assert_allclose(answer.class_logprobs, np.log([0.5, 0.5]), rtol=1e-6)
        assert answer.n_prompt_tokens == 6
    cached = [answer.n_cached_tokens for answer in answers]
    assert cached == ([0, 3, 3] if remembered else [0, 0, 0])

"""The teacher as the judge of audited answers, where the certificate had it judge: asked in both
orders, and believed, by the functions that certification asked and believed it by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from journeyman.cascade.answering import Said, Unlabeled
from journeyman.certify import judging, written
from journeyman.columns import unpacked
from journeyman.recipe import Classes, Recipe
from journeyman.teacher.answers import ClassLabels
from journeyman.teacher.classes import prompting


class JudgingTeacher(Protocol):
    """A teacher that can be asked something else than what it answers."""

    async def judged(self, rows: Sequence[Mapping[str, Any]], asked: Classes) -> Sequence[Said]:
        """One for each row; raises TeacherUnavailable."""
        ...


class TeacherAsJudge:
    """Says whether two answers to a text mean the same."""

    def __init__(self, recipe: Recipe, columns: Sequence[str], teacher: JudgingTeacher) -> None:
        """columns: of a text."""
        question = written.question(recipe)
        self._request, self._columns, self._teacher = prompting(question), columns, teacher
        self._asked = judging.asked_of_judge(recipe, question)

    async def same(self, text: str, one: str, other: str) -> bool:
        """Whether both orders say so; raises TeacherUnavailable."""
        rows = judging.both_orders(unpacked(text, self._columns), one, other, self._request)
        said = await self._teacher.judged(rows, self._asked)
        return judging.mean_the_same([self._p_same(verdict) for verdict in said])

    def _p_same(self, said: Said) -> float | None:
        if isinstance(said, Unlabeled):  # too long for it, say
            return None
        assert isinstance(said, ClassLabels)
        return judging.p_same([*self._asked.classes], said.class_logprobs.tolist())

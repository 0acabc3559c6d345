"""The teacher as judge of audited answers: asked and believed as it was for the certificate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from journeyman import recipe
from journeyman.cascade.answering import Said, Unlabeled
from journeyman.cascade.judge import TeacherAsJudge
from journeyman.certify import judging
from journeyman.certify.judging import Pair, Verdicts
from journeyman.recipe import Classes, Recipe
from journeyman.teacher.answers import ClassLabels

from ..labels import synthetic as made

TEXT, ROME, CITY = "the capital of Italy", "Rome", "It is Rome."


def settings(**labels: Any) -> Recipe:
    return recipe.parse(
        {
            "name": "a",
            "corpus": {"sources": ["a.jsonl"]},
            "teacher": {"model": "m"},
            "student": {"model": "s", "kind": "causal"},
            "labels": {"kind": "generate", "prompt": "Name {{ text }}:", "max_tokens": 4} | labels,
            "certify": {"match": "judge"},
        }
    )


class Teacher:
    """Judges with these probabilities of the same, in turn; None: it can give no verdict."""

    def __init__(self, *p_same: float | None) -> None:
        self._p_same = p_same
        self.rows: list[Mapping[str, Any]] = []
        self.asked: Classes | None = None

    async def judged(self, rows: Sequence[Mapping[str, Any]], asked: Classes) -> list[Said]:
        self.rows, self.asked = [*rows], asked
        return [Unlabeled(reason="too long") if p is None else verdict(p) for p in self._p_same]


def verdict(p_same: float) -> ClassLabels:
    return made.classes(p_same, 1 - p_same)


def said(teacher: Teacher, of: Recipe) -> bool:
    return asyncio.run(TeacherAsJudge(of, ("text",), teacher).same(TEXT, CITY, ROME))


@pytest.mark.parametrize("labels", [{}, {"chat": True, "system": "Be brief."}])
def test_it_reads_what_certification_had_it_read(labels: dict[str, Any], tmp_path: Path):
    of, teacher = settings(**labels), Teacher(0.9, 0.9)
    assert said(teacher, of)
    row = made.row(TEXT, "certify")
    made.write_corpus(tmp_path / "corpus", [[row]])
    pair = Pair(row=row["id"], split="certify", one=CITY, other=ROME)
    certified = judging.corpus_rows([pair], tmp_path / "corpus", of.labels)  # type: ignore[arg-type]
    assert teacher.rows == [{**json.loads(one["meta"]), "text": one["text"]} for one in certified]
    assert [(row["first"], row["second"]) for row in teacher.rows] == [(CITY, ROME), (ROME, CITY)]
    assert teacher.asked == judging.asked_of_judge(of, of.labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0.9, 0.51, 0.5, 0.1, None])
@pytest.mark.parametrize("second", [0.9, 0.5, None])
def test_it_is_believed_as_certification_believed_it(first: float | None, second: float | None):
    """Both orders must say so, and one without a verdict does not."""
    ids = [judging._id("r", CITY, ROME), judging._id("r", ROME, CITY)]
    p_same = {i: float(np.float32(p)) for i, p in zip(ids, (first, second), strict=True) if p}
    certified = Verdicts(p_same).same("r", CITY, ROME)
    assert said(Teacher(first, second), settings()) == certified
    assert certified == (min(first or 0, second or 0) > 0.5)

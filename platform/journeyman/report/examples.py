"""A dozen rows to read, chosen by a rule that the page states, not by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from journeyman.report.data import BoolArray, FloatArray, TestRows

ROWS_PER_GROUP = 4
_LONGEST_TEXT = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One model's answer to one row; `right` is None without gold."""

    label: str
    probability: float
    right: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row to read, with its further columns; `gold` is None where it has none."""

    id: str
    text: str
    columns: tuple[tuple[str, str], ...]
    gold: str | None
    teacher: Answer
    student: Answer
    confidence: float
    answered_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleGroup:
    """Rows of one kind: `n` in all, of which the rule picked `examples`."""

    title: str
    rule: str
    n: int
    examples: tuple[Example, ...]


def pick(rows: TestRows, labels: Sequence[str]) -> tuple[ExampleGroup, ...]:
    """Up to four rows of each kind; equal confidence is ordered by id."""
    accepted, differs = rows.accepted, rows.differs
    against_gold = _against_gold(rows, labels) if rows.has_gold.any() else ()
    return (
        _group(
            rows,
            labels,
            "Answered by the student, otherwise than the teacher",
            "the most confident ones, which do most harm if the student is wrong",
            accepted & differs,
            most_confident=True,
        ),
        _group(
            rows,
            labels,
            "Answered by the student, like the teacher",
            "the most confident ones",
            accepted & ~differs,
            most_confident=True,
        ),
        _group(rows, labels, "Escalated", "the least confident ones", ~accepted),
        *against_gold,
    )


def _against_gold(rows: TestRows, labels: Sequence[str]) -> tuple[ExampleGroup, ...]:
    known, escalated = rows.has_gold, ~rows.accepted
    teacher, student = rows.teacher_answer == rows.gold, rows.student_answer == rows.gold
    helped = rows.escalated_answer == rows.gold
    sure = "those of which the student is surest"
    least = "those of which the student is least sure"
    return (
        _group(rows, labels, "The teacher is wrong", sure, known & ~teacher, most_confident=True),
        _group(
            rows,
            labels,
            "The student is wrong, though the teacher is right",
            sure,
            known & teacher & ~student,
            most_confident=True,
        ),
        _group(
            rows,
            labels,
            "Escalated, and it helped: only its answer is right",
            least,
            known & escalated & helped & ~student,
        ),
        _group(
            rows,
            labels,
            "Escalated, and it harmed: only the student was right",
            least,
            known & escalated & ~helped & student,
        ),
    )


def ordered(
    chosen: BoolArray, confidence: FloatArray, ids: Sequence[str], *, most_confident: bool
) -> list[int]:
    """The chosen rows by their confidence, the most or the least confident first; equal ones by
    id. chosen: bool[n]; confidence: float64[n]."""
    sign = -1 if most_confident else 1
    return sorted(np.flatnonzero(chosen).tolist(), key=lambda i: (sign * confidence[i], ids[i]))


def _group(
    rows: TestRows,
    labels: Sequence[str],
    title: str,
    rule: str,
    chosen: BoolArray,
    *,
    most_confident: bool = False,
) -> ExampleGroup:
    index = ordered(chosen, rows.confidence, rows.ids, most_confident=most_confident)
    return ExampleGroup(
        title=title,
        rule=rule,
        n=len(index),
        examples=tuple(_example(rows, labels, i) for i in index[:ROWS_PER_GROUP]),
    )


def _example(rows: TestRows, labels: Sequence[str], i: int) -> Example:
    gold = int(rows.gold[i])

    def answer(probabilities: np.ndarray) -> Answer:
        label = int(probabilities.argmax())
        return Answer(
            label=labels[label],
            probability=float(probabilities[label]),
            right=None if gold < 0 else label == gold,
        )

    return Example(
        id=rows.ids[i],
        text=cut(rows.texts[i]),
        columns=tuple((name, cut(str(value))) for name, value in _meta(rows, i).items()),
        gold=None if gold < 0 else labels[gold],
        teacher=answer(rows.teacher[i]),
        student=answer(rows.student[i]),
        confidence=float(rows.confidence[i]),
        answered_by=_who(rows, i),
    )


def _meta(rows: TestRows, i: int) -> Mapping[str, Any]:
    return rows.metas[i] if rows.metas else {}


def cut(text: str) -> str:
    """Its beginning, where it is long."""
    rest = len(text) - _LONGEST_TEXT
    return text if rest <= 0 else f"{text[:_LONGEST_TEXT]}… ({rest:,} more characters)"


def _who(rows: TestRows, i: int) -> str:
    if not rows.accepted[i]:
        return "teacher"
    return "student" if rows.stage is None else f"student {rows.stage[i] + 1}"

"""The page of a student that writes: what it learned, and where it is certified, what is promised
and what both wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from journeyman.certify.bundle import WrittenBundle
from journeyman.certify.curve import CostQualityCurve, cost_quality_curve
from journeyman.probabilities import FloatArray
from journeyman.report import figures, job_tables, page, tables
from journeyman.report.data import BoolArray, CountedRows, TrainedData
from journeyman.report.examples import ROWS_PER_GROUP, cut, ordered
from journeyman.report.figures import Figure
from journeyman.report.measure import Measured, against_gold
from journeyman.report.slices import slices
from journeyman.report.verdict import verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenTest:
    """The `test` split as teacher and student wrote it: n rows.

    Attributes:
        ids: n row ids.
        texts: n requests.
        gold: n gold answers, None without one.
        teacher, student: n answers each; the student's is None where it wrote nothing.
        differs: bool[n], whether the student's is another answer, as `certify.match` says.
        right: bool[n] against gold, the student's and the teacher's; None unless all rows have
            gold.
        confidence: float64[n], the score that the threshold is compared with.
        accepted: bool[n], answered by the student at the bundle's threshold.
        teacher_logprobs, student_logprobs: n each, of an answer by whoever gave it, in nats; None
            where that is not known.
        metas: n mappings of further columns; empty where there are none.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    gold: Sequence[str | None]
    teacher: Sequence[str]
    student: Sequence[str | None]
    differs: BoolArray
    right: tuple[BoolArray, BoolArray] | None
    confidence: FloatArray
    accepted: BoolArray
    teacher_logprobs: Sequence[float | None] = ()
    student_logprobs: Sequence[float | None] = ()
    metas: Sequence[Mapping[str, Any]] = ()

    @property
    def counted(self) -> CountedRows:
        nothing = np.zeros(len(self.ids), dtype=np.bool_)
        student, teacher = self.right or (nothing, nothing)
        return CountedRows(
            texts=self.texts,
            metas=self.metas,
            same=~self.differs,
            answered=self.accepted,
            has_gold=nothing if self.right is None else ~nothing,
            teacher=teacher,
            student=student,
            cascade=np.where(self.accepted, student, teacher),
        )

    @property
    def curve(self) -> CostQualityCurve:
        """Of these rows; with accuracies where there is gold."""
        return cost_quality_curve(self.confidence, self.differs, *(self.right or ()))

    @property
    def measured(self) -> Measured:
        """What happened at the bundle's threshold."""
        answered = self.accepted
        gold = None
        if self.right is not None:
            student, teacher = self.right
            gold = against_gold(student, teacher, teacher, answered)
        return Measured(
            n=len(self.ids),
            n_accepted=int(answered.sum()),
            n_differs=int(self.differs.sum()),
            n_accepted_differs=int((self.differs & answered).sum()),
            by_answer=(),
            gold=gold,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenData(TrainedData):
    """Everything on the page.

    Attributes:
        learned: what the student's agreement is with, and its loss, in words.
        bundle: the policy bundle; None where the student is not certified.
        test: the rows that nothing was fitted, chosen or certified on; None without a bundle, or
            without such rows.
    """

    learned: str
    bundle: WrittenBundle | None = None
    test: WrittenTest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenExample:
    """A row to read."""

    id: str
    text: str
    gold: str | None
    teacher: str
    student: str
    teacher_probability: str
    student_probability: str
    columns: tuple[tuple[str, str], ...]
    confidence: float
    answered_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenGroup:
    """Rows of one kind: `n` in all, of which the rule picked `examples`."""

    title: str
    rule: str
    n: int
    examples: tuple[WrittenExample, ...]


def write(data: WrittenData, directory: Path) -> Path:
    """Write the report's folder, whole or not at all; returns the path of `index.html`."""
    return page.put(*render(data), directory)


def render(data: WrittenData) -> tuple[str, list[Figure]]:
    """The page's HTML and its figures, in the order in which they stand on it."""
    bundle, test = data.bundle, data.test
    training, comparison = figures.training(data, of="token"), figures.comparison(data)
    promise, cost_quality = None, None
    if bundle is not None and test is not None:
        curve = test.curve
        gold_curve = curve if test.right is not None else None
        cost_quality = figures.cost_quality(bundle, curve, gold_curve)
        promise = {
            "verdict": verdict(test.measured, bundle),
            "accuracies": tables.accuracies(test.measured),
            "guarantees": tables.guarantees(bundle, curve, gold_curve),
            "cost_table": tables.cost_quality(curve, gold_curve, bundle.served),
        }
    html = page.template("written.html.j2").render(
        data=data,
        bundle=bundle,
        summary=page.grouped(data.summary),
        inline=page.inline,
        promise=promise,
        evaluations=tables.evaluations(data.evaluations, of="tokens"),
        students=tables.students(data.compared),
        example_groups=pick(test) if test is not None else (),
        slices=job_tables.by_slice(slices(test.counted)) if test is not None else None,
        escalations=job_tables.escalations(test.counted) if test is not None else None,
        figures={"training": training, "comparison": comparison, "cost_quality": cost_quality},
    )
    return html, [figure for figure in (cost_quality, training, comparison) if figure]


def pick(rows: WrittenTest) -> tuple[WrittenGroup, ...]:
    """Up to four rows of each kind; equal confidence is ordered by id."""
    accepted, differs = rows.accepted, rows.differs
    sure, unsure = "the surest ones", "the least sure ones"
    groups = [
        ("Answered by the student, otherwise than the teacher", sure, accepted & differs),
        ("Answered by the student, like the teacher", sure, accepted & ~differs),
        ("Escalated, though both say the same", unsure, ~accepted & ~differs),
        ("Escalated, and they differ", unsure, ~accepted & differs),
    ]
    if rows.right is not None:
        student, teacher = rows.right
        groups += [
            ("The teacher is wrong", sure, ~teacher),
            ("The student is wrong, though the teacher is right", sure, teacher & ~student),
            ("Escalated, and it helped: only the teacher is right", unsure,
             ~accepted & teacher & ~student),
            ("Escalated, and it harmed: only the student was right", unsure,
             ~accepted & student & ~teacher),
        ]  # fmt: skip
    return tuple(_group(rows, title, rule, chosen, rule == sure) for title, rule, chosen in groups)


def _group(
    rows: WrittenTest, title: str, rule: str, chosen: BoolArray, surest: bool
) -> WrittenGroup:
    index = ordered(chosen, rows.confidence, rows.ids, most_confident=surest)
    return WrittenGroup(
        title=title,
        rule=rule,
        n=len(index),
        examples=tuple(_example(rows, i) for i in index[:ROWS_PER_GROUP]),
    )


def _example(rows: WrittenTest, i: int) -> WrittenExample:
    student, gold = rows.student[i], rows.gold[i]
    meta = rows.metas[i] if rows.metas else {}
    return WrittenExample(
        id=rows.ids[i],
        text=cut(rows.texts[i]),
        gold=None if gold is None else cut(gold),
        teacher=cut(rows.teacher[i]),
        student="(nothing)" if student is None else cut(student),
        teacher_probability=_probability(rows.teacher_logprobs, i),
        student_probability=_probability(rows.student_logprobs, i),
        columns=tuple((name, cut(str(value))) for name, value in meta.items()),
        confidence=float(rows.confidence[i]),
        answered_by="student" if rows.accepted[i] else "teacher",
    )


def _probability(logprobs: Sequence[float | None], i: int) -> str:
    """Of a whole answer; empty where it is not known."""
    logprob = logprobs[i] if logprobs else None
    return "" if logprob is None else f"{np.exp(logprob):.2g}"

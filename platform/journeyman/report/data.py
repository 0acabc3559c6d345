"""What a report is made from: values only, no paths. Whoever runs the step reads the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from journeyman.certify.bundle import PolicyBundle
from journeyman.certify.by_labels import LabelCurve
from journeyman.errors import DataError
from journeyman.report.comparison import ComparedStudent

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
TrainingRecord = Mapping[str, Any]  # a line of training.jsonl, as `student.journal` writes it
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedRows:
    """n test rows, whatever kind of answer they have.

    Attributes:
        texts: n requests.
        metas: n mappings of further columns; empty where there are none.
        same: bool[n], on which student and teacher agree.
        answered: bool[n], by the student.
        has_gold: bool[n].
        teacher, student, cascade: bool[n] each, answered right; False without gold.
    """

    texts: Sequence[str]
    metas: Sequence[Mapping[str, Any]]
    same: BoolArray
    answered: BoolArray
    has_gold: BoolArray
    teacher: BoolArray
    student: BoolArray
    cascade: BoolArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TestRows:
    """The `test` split as teacher and student see it: n rows, c labels.

    Attributes:
        ids: n row ids.
        texts: n requests.
        gold: int64[n], index into the labels; -1 without gold.
        teacher: float64[n, c], the teacher's class probabilities, prior corrected.
        student: float64[n, c], the student's calibrated class probabilities.
        confidence: float64[n], the score that the threshold is compared with.
        accepted: bool[n], answered by the student at the bundle's threshold.
        metas: n mappings of further columns; empty where there are none.
        mixed: float64[n, c], what an escalated row is answered with; None: the teacher's.
        stage: int64[n], of several students which one each row goes to, from 0; None: there is one.
    """

    __test__: ClassVar[bool] = False  # its name is not meant for pytest

    ids: list[str]
    texts: list[str]
    gold: IntArray
    teacher: FloatArray
    student: FloatArray
    confidence: FloatArray
    accepted: BoolArray
    metas: Sequence[Mapping[str, Any]] = ()
    mixed: FloatArray | None = None
    stage: IntArray | None = None

    def column(self, name: str) -> list[Any]:
        """n values; `text` is the request itself."""
        return list(self.texts) if name == "text" else [meta.get(name) for meta in self.metas]

    def __post_init__(self) -> None:
        n = len(self.ids)
        rows = {
            "texts": len(self.texts),
            "gold": len(self.gold),
            "teacher": len(self.teacher),
            "student": len(self.student),
            "confidence": len(self.confidence),
            "accepted": len(self.accepted),
            "metas": len(self.metas) or n,
        }
        if not n or set(rows.values()) != {n}:
            raise DataError(
                f"The report's test rows have {n} ids, but {rows}: expected as many of each, at "
                "least one. Give the `test` split some rows and certify again."
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def teacher_answer(self) -> IntArray:
        """int64[n], the teacher's most probable label."""
        return self.teacher.argmax(axis=1)

    @property
    def student_answer(self) -> IntArray:
        """int64[n], the student's most probable label."""
        return self.student.argmax(axis=1)

    @property
    def escalated_answer(self) -> IntArray:
        """int64[n], what each row is answered with if it is escalated."""
        return self.teacher_answer if self.mixed is None else self.mixed.argmax(axis=1)

    @property
    def differs(self) -> BoolArray:
        """bool[n], whether the student answers otherwise than an escalated row is answered."""
        return self.student_answer != self.escalated_answer

    @property
    def has_gold(self) -> BoolArray:
        """bool[n]."""
        return self.gold >= 0

    @property
    def counted(self) -> CountedRows:
        student, escalated = self.student_answer, self.escalated_answer
        return CountedRows(
            texts=self.texts,
            metas=self.metas,
            same=~self.differs,
            answered=self.accepted,
            has_gold=self.has_gold,
            teacher=self.teacher_answer == self.gold,
            student=student == self.gold,
            cascade=np.where(self.accepted, student, escalated) == self.gold,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """A line of the table that opens the page; lines with the same group stand together."""

    group: str
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedData:
    """What the page of any student has.

    Attributes:
        name: the run's name.
        created: when, as it is to be printed.
        recipe_yaml: the recipe as it ran, defaults filled in.
        summary: the lines of the opening table.
        training: records of training.jsonl, in order: `kind: steps` with `step` and `loss`, and
            `kind: evaluation` with `step` and what `student.learner.Measured` has.
        compared: students of several runs, this one's among them; empty if none were compared.
    """

    name: str
    created: str
    recipe_yaml: str
    summary: Sequence[SummaryRow]
    training: Sequence[TrainingRecord]
    compared: Sequence[ComparedStudent] = ()

    @property
    def steps(self) -> list[TrainingRecord]:
        """The training records of optimizer steps."""
        return [record for record in self.training if record.get("kind") == "steps"]

    @property
    def evaluations(self) -> list[TrainingRecord]:
        """The training records of evaluations on calibrate rows."""
        return [record for record in self.training if record.get("kind") == "evaluation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData(TrainedData):
    """Everything on the page of a classifier.

    Attributes:
        labels: c label names, in the order of the probability columns.
        label_histogram: split to label to rows, by gold, over the corpus; empty without gold.
        teacher_histogram: label to rows, by the teacher's most probable label, over all splits.
        bundle: the policy bundle that the run certified.
        test: the rows that nothing was fitted, chosen or certified on.
        positive: the label that the job is about finding, if any.
        rank_by: the column whose values make lists of candidates, if any.
        by_labels: what fewer labels would have come to, where that was tried.
    """

    labels: tuple[str, ...]
    label_histogram: Mapping[str, Mapping[str, int]]
    teacher_histogram: Mapping[str, int]
    bundle: PolicyBundle
    test: TestRows
    positive: str | None = None
    rank_by: str | None = None
    by_labels: LabelCurve | None = None

    def __post_init__(self) -> None:
        if self.bundle.label_names != self.labels:
            raise DataError(
                f"The report's labels are {self.labels}, the bundle's {self.bundle.label_names}. "
                "Both must be those of the label dataset: certify again."
            )
        above = self.test.confidence > self.bundle.accept_above
        if not np.array_equal(above, self.test.accepted):
            raise DataError(
                f"{int(above.sum())} test rows score above the bundle's threshold, but "
                f"{int(self.test.accepted.sum())} are marked as answered by the student. Score "
                "the test rows with the bundle's own score and temperature."
            )

"""How often student, teacher and both together are right, by the number of labels learned from.

Estimates, and no promise: what is fitted is fitted on `calibrate` rows, what is counted is counted
on `test` rows, and no `certify` row is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from journeyman import files
from journeyman.certify import paired
from journeyman.certify.certificate import GuaranteeKind, clopper_pearson_interval
from journeyman.certify.decisions import (
    ScoredRows,
    fit_calibrator,
    fit_confidence,
    held_out_scores,
    mix,
)
from journeyman.certify.parts import Part
from journeyman.certify.scores import ScoreName
from journeyman.certify.thresholds import ANSWER_EVERYTHING
from journeyman.errors import DataError
from journeyman.probabilities import FloatArray

RECORD = "curve.json"  # in a run's folder for curves

BoolArray = npt.NDArray[np.bool_]
# cascade: the teacher answers what is escalated; mixture: both opinions answer it.
Answerer = Literal["student", "cascade", "mixture"]
Against = Literal["gold", "teacher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which requests are escalated.

    Attributes:
        score: the confidence; a learned one is fitted for each student.
        kind: the guarantee whose costs a learned score learns.
        mixes: whether the costs are those beside the mixture's answers, not the teacher's.
        share: of the calibrate rows, the least confident, that are escalated.
    """

    score: ScoreName
    kind: GuaranteeKind
    mixes: bool
    share: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answered:
    """Test rows as they are answered beside one student.

    Attributes:
        against: who says what is right: gold where some row has it, else the teacher.
        teacher: bool[m], right answers of the teacher alone, on the rows that can be judged.
        right: the same of each answerer; the mixture is there where calibrate rows have gold.
        threshold: what the confidence of a row must be above for the student to answer it.
        escalated: share of all test rows.
        student_weight: in the mixture.
    """

    against: Against
    teacher: BoolArray
    right: Mapping[Answerer, BoolArray]
    threshold: float
    escalated: float
    student_weight: float | None


def answer(calibrate: ScoredRows, test: ScoredRows, rule: Rule) -> Answered:
    """Fit on calibrate rows what a cascade of this student needs, and answer the test rows."""
    parts = {"calibrate": calibrate, "test": test}
    against: Against = "gold" if (test.rows.gold >= 0).any() else "teacher"
    mixture = None
    if against == "gold" and (calibrate.rows.gold >= 0).any():
        mixture, parts = mix(parts)
    learned_from = parts["calibrate"] if rule.mixes else calibrate
    threshold, confidence = _escalating(learned_from, test.logits, rule)
    accepted = confidence > threshold

    target = test.rows.gold if against == "gold" else test.teacher.argmax(axis=1)
    known = target >= 0
    student = test.logits.argmax(axis=1)
    answers: dict[Answerer, npt.NDArray[np.int64]] = {
        "student": student,
        "cascade": np.where(accepted, student, test.escalated),
    }
    if mixture:
        answers["mixture"] = np.where(accepted, student, parts["test"].escalated)
    return Answered(
        against=against,
        teacher=(test.escalated == target)[known],
        right={who: (said == target)[known] for who, said in answers.items()},
        threshold=threshold,
        escalated=float(1 - accepted.mean()),
        student_weight=mixture.student_weight if mixture else None,
    )


def _escalating(
    calibrate: ScoredRows, logits: npt.NDArray[np.float32], rule: Rule
) -> tuple[float, FloatArray]:
    """The threshold that escalates the share of calibrate rows, and the confidence of other rows
    by their logits[n, c]: float64[n]."""
    calibrator = fit_calibrator(calibrate)
    probabilities = calibrator.probabilities(calibrate.logits)
    costs, counted = calibrate.outcomes.to_learn_from(rule.kind)
    fitted = probabilities, costs, counted
    ranked = np.sort(held_out_scores(rule.score, *fitted))
    n_escalated = round(rule.share * len(ranked))
    threshold = float(ranked[n_escalated - 1]) if n_escalated else ANSWER_EVERYTHING
    return threshold, fit_confidence(rule.score, calibrator, *fitted).of(logits)[1]


# --- the curve ---


class Beside(Part):
    """Two answerers on the same rows: how many only the one, only the other gets right; means
    over seeds."""

    more: float = Field(ge=0)
    less: float = Field(ge=0)

    def difference(self, n: int) -> float:
        """The first's share of right answers less the other's."""
        return (self.more - self.less) / n

    def interval(self, n: int) -> tuple[float, float]:
        """95%, of one seed Tango's; of a mean over several it is wider than it need be."""
        return paired.difference_interval(self.more, self.less, n)

    def is_better(self, n: int) -> bool:
        """Beyond what the draw of the test rows explains."""
        return self.interval(n)[0] > 0


class Right(Part):
    """Right answers: the mean over seeds, the fewest and the most."""

    mean: float = Field(ge=0)
    least: int = Field(ge=0)
    most: int = Field(ge=0)

    def interval(self, n: int) -> tuple[float, float]:
        """95% of the share, for the draw of the test rows: exact (Clopper and Pearson) of one seed.

        Of a mean over several it is wider than it need be: their rows vary less than coins do.
        """
        return clopper_pearson_interval(self.mean, n)


class LabelPoint(Part):
    """Students of so many labels.

    Attributes:
        right: by answerer.
        beside_student: cascade and mixture against the student that they are made of.
        later: the student of each larger number of labels against this one.
        escalated: share of the test rows.
        student_weight: in the mixture; None without one.
    """

    n_labels: int = Field(ge=1)
    n_steps: int = Field(ge=1)
    right: dict[Answerer, Right]
    beside_student: dict[Answerer, Beside]
    later: dict[int, Beside]
    escalated: float
    student_weight: float | None


class LabelCurve(Part):
    """The record of a curve.

    Attributes:
        student_digest: weights of the run's own student, of all labels.
        against: who says what is right.
        n: test rows that can be judged.
        n_seeds: students of each number of labels.
        share: of the calibrate rows, that is escalated.
        own_share: of the certify rows, that the run's bundle escalates.
        teacher: right answers of the teacher alone.
        points: by rising number of labels.
    """

    schema_version: Literal[1] = 1
    student_digest: str
    against: Against
    n: int = Field(ge=1)
    n_seeds: int = Field(ge=1)
    share: float
    own_share: float
    teacher: Right
    points: tuple[LabelPoint, ...] = Field(min_length=1)

    @property
    def enough(self) -> LabelPoint:
        """The fewest labels whose student no larger number makes better, beyond chance."""
        return next(
            p for p in self.points if not any(b.is_better(self.n) for b in p.later.values())
        )

    def pays_up_to(self, who: Answerer) -> LabelPoint | None:
        """The most labels at which escalating makes answers better, beyond chance; None: none."""
        pays = [p for p in self.points if p.beside_student[who].is_better(self.n)]
        return pays[-1] if pays else None


def kept(folder: Path, student_digest: str) -> LabelCurve | None:
    """The record in a run's folder for curves, of the student with these weights; None without.

    Raises DataError where it cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        curve = LabelCurve.model_validate(files.read_json(path))
    except ValidationError as error:
        raise DataError(
            f"{path}: not a curve of this version; run journeyman curve again."
        ) from error
    return curve if curve.student_digest == student_digest else None


def points(
    answered: Mapping[int, Sequence[Answered]], n_steps: Mapping[int, int]
) -> tuple[LabelPoint, ...]:
    """answered: by the number of labels, for each seed; n_steps: that each was trained for."""
    sizes = sorted(answered)
    return tuple(
        LabelPoint(
            n_labels=n,
            n_steps=n_steps[n],
            right={who: right([a.right[who] for a in of_seeds]) for who in of_seeds[0].right},
            beside_student={
                who: _beside((a.right[who], a.right["student"]) for a in of_seeds)
                for who in of_seeds[0].right
                if who != "student"
            },
            later={
                larger: _beside(
                    (b.right["student"], a.right["student"])
                    for a, b in zip(of_seeds, answered[larger], strict=True)
                )
                for larger in sizes
                if larger > n
            },
            escalated=float(np.mean([a.escalated for a in of_seeds])),
            student_weight=_mean([a.student_weight for a in of_seeds]),
        )
        for n, of_seeds in ((n, answered[n]) for n in sizes)
    )


def right(of_seeds: Sequence[BoolArray]) -> Right:
    """bool[m] for each seed."""
    counts = [int(one.sum()) for one in of_seeds]
    return Right(mean=float(np.mean(counts)), least=min(counts), most=max(counts))


def _beside(pairs: Iterable[tuple[BoolArray, BoolArray]]) -> Beside:
    counts = [(int((a & ~b).sum()), int((b & ~a).sum())) for a, b in pairs]
    more, less = np.mean(counts, axis=0)
    return Beside(more=float(more), less=float(less))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None

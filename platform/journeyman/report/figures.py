"""The figures with their captions: how to read each, on which split, on how many rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from journeyman.certify.bundle import Bundle
from journeyman.certify.curve import CostQualityCurve, cost_quality_curve
from journeyman.probabilities import expected_calibration_error
from journeyman.report import plots
from journeyman.report.comparison import agreement_notes
from journeyman.report.data import IntArray, ReportData, TestRows, TrainedData
from journeyman.report.verdict import promised_words

_MOST_LABELS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """An inline SVG, the name of its file, and what stands below it."""

    name: str
    svg: str
    caption: str


def labels(data: ReportData) -> Figure:
    """Label histogram over the whole corpus."""
    gold = Counter[str]()
    for counts in data.label_histogram.values():
        gold.update(counts)
    n_gold, n_teacher = sum(gold.values()), sum(data.teacher_histogram.values())
    compared = (
        "Bars of one label that differ in length show what the teacher says too often or too "
        f"seldom. All splits together: {n_teacher:,} rows labeled by the teacher, and {n_gold:,} "
        "rows with gold."
        if n_gold
        else f"All splits together: {n_teacher:,} rows labeled by the teacher; none has gold."
    )
    return Figure(
        name="labels",
        svg=plots.label_histogram(all_labels(data), gold, data.teacher_histogram),
        caption=f"How often each label occurs, as a share of rows. {compared}",
    )


def all_labels(data: ReportData) -> tuple[str, ...]:
    """The recipe's labels, then any others that the corpus has."""
    found = (label for counts in data.label_histogram.values() for label in counts)
    return tuple(dict.fromkeys((*data.labels, *found, *data.teacher_histogram)))


def training(data: TrainedData, of: Literal["row", "token"] = "row") -> Figure | None:
    """Training curves; None without records. of: what a loss is the mean of."""
    if not data.steps:
        return None
    caption = (
        f"The loss over {data.steps[-1]['step']:,} steps on train rows: it should fall and level "
        "out."
    )
    if data.evaluations:
        caption += (
            " The squares, and the curves below, are the student on "
            f"{data.evaluations[-1]['n_rows']:,} calibrate rows at each evaluation: where "
            f"agreement falls and {_divergence(data)} rises while the loss still falls, it learns "
            "by heart."
        )
    return Figure(
        name="training",
        svg=plots.training_curves(data.steps, data.evaluations, of),
        caption=caption,
    )


def _divergence(data: TrainedData) -> str:
    known = data.evaluations[-1].get("kl") is not None
    return "the divergence (KL) from the teacher" if known else "the cross-entropy"


def comparison(data: TrainedData) -> Figure | None:
    """Size against agreement of the students compared; None if none were."""
    if not data.compared:
        return None
    others = len({student.labels_digest for student in data.compared}) > 1
    higher = (
        "its agreement is higher (the table says with what)"
        if agreement_notes(data.compared)
        else "it gives its teacher's first answer more often"
    )
    return Figure(
        name="size-agreement",
        svg=plots.size_agreement(data.compared, data.name),
        caption="Each point is the student of a run: further left it is smaller, further up "
        f"{higher}, on its calibrate rows."
        + " They learned from different labels: compare them with care."
        * others,
    )


def reliability(data: ReportData) -> Figure:
    """Reliability diagram of the calibrated student."""
    rows = data.test
    known = rows.has_gold
    bins = plots.RELIABILITY_BINS
    error = expected_calibration_error(rows.student, rows.teacher_answer, bins)
    errors = f"{error:.3f} against the teacher's answers ({len(rows):,} rows)"
    if known.any():
        of_gold = expected_calibration_error(rows.student[known], rows.gold[known], bins)
        errors += f" and {of_gold:.3f} against gold ({int(known.sum()):,} rows)"
    return Figure(
        name="reliability",
        svg=plots.reliability(rows.student, rows.teacher_answer, rows.gold),
        caption="Above, how often the student is right when it is so sure. On the dotted line it "
        "is as often right as it says; below the line it is too sure of itself. Below, how many "
        f"rows fall into each of {bins} equal bins; bins with fewer than {plots.FEW_ROWS} rows "
        "scatter, and are drawn hollow. Test split; "
        f"expected calibration error {errors}.",
    )


def test_curves(rows: TestRows) -> tuple[CostQualityCurve, CostQualityCurve | None]:
    """The curve of all test rows, and that of the rows with gold, with accuracies."""
    curve = cost_quality_curve(rows.confidence, rows.differs)
    known = rows.has_gold
    if not known.any():
        return curve, None
    return curve, cost_quality_curve(
        rows.confidence[known],
        rows.differs[known],
        (rows.student_answer == rows.gold)[known],
        (rows.escalated_answer == rows.gold)[known],
    )


def cost_quality(
    bundle: Bundle, curve: CostQualityCurve, gold_curve: CostQualityCurve | None
) -> Figure:
    """Cost-quality curves of the test rows, and of those with gold, with the chosen threshold."""
    guarantee = bundle.served
    below = (
        ""
        if gold_curve is None
        else " Below, how often the cascade is right by gold "
        f"({gold_curve.table.n:,} rows): where its curve lies under the student's line, "
        "escalation costs accuracy."
    )
    threshold = (
        "The diamond is the certified threshold"
        if guarantee.feasible
        else "The diamond stands at zero, since no threshold could be certified"
    )
    return Figure(
        name="cost-quality",
        svg=plots.cost_quality(curve, gold_curve, bundle.curve, guarantee),
        caption="From left to right the student answers more and the teacher is paid for less. "
        f"Above, how often the answer differs from the teacher's.{below} {threshold}; the promise "
        f"is that {promised_words(guarantee)}. Test split, {curve.table.n:,} rows; the grey curve "
        f"is of the {guarantee.n:,} certify rows, on which the threshold was chosen.",
    )


def confusion_counts(rows: TestRows, n_labels: int, against: str) -> IntArray:
    """int64[c, c], [answer of "teacher" or "gold", student's answer], over rows that have both."""
    other = rows.gold if against == "gold" else rows.teacher_answer
    known = other >= 0
    counts = np.zeros((n_labels, n_labels), dtype=np.int64)
    np.add.at(counts, (other[known], rows.student_answer[known]), 1)
    return counts


def fold_rare(counts: IntArray, labels: Sequence[str]) -> tuple[IntArray, tuple[str, ...]]:
    """Counts[c, c] with all but the commonest labels added up in one last row and column.

    Beyond some number of labels a matrix has no cell left that can be read; the tables beside it
    name every label.
    """
    if len(labels) <= _MOST_LABELS:
        return counts, tuple(labels)
    frequency = counts.sum(axis=0) + counts.sum(axis=1)
    kept = np.sort(np.argsort(-frequency, kind="stable")[: _MOST_LABELS - 1])
    place = np.full(len(labels), _MOST_LABELS - 1)
    place[kept] = np.arange(len(kept))
    folded = np.zeros((_MOST_LABELS, _MOST_LABELS), dtype=np.int64)
    np.add.at(folded, (place[:, None], place[None, :]), counts)
    return folded, (*(labels[i] for i in kept), "all others")


def confusions(data: ReportData) -> list[Figure]:
    """Confusion matrices of the student against its teacher and, where there is any, gold."""
    against = ["teacher", "gold"] if data.test.has_gold.any() else ["teacher"]
    return [_confusion(data, name) for name in against]


def _confusion(data: ReportData, against: str) -> Figure:
    counts = confusion_counts(data.test, len(data.labels), against)
    drawn, labels = fold_rare(counts, data.labels)
    rows = "gold label" if against == "gold" else "teacher's answer"
    folded = (
        f" The {len(labels) - 1} commonest labels have their own." if drawn is not counts else ""
    )
    return Figure(
        name=f"confusion-{against}",
        svg=plots.confusion(drawn, labels, against),
        caption=f"Each row of the matrix is one {rows}, each column what the student says of it; "
        "numbers count test rows, and the shade is their share of the matrix row. On the diagonal "
        f"both say the same.{folded} Test split, {int(counts.sum()):,} rows, whoever answers them.",
    )

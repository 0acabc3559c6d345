"""The numbers behind each figure, as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from journeyman.certify.bundle import Bundle, Guarantee, PolicyBundle
from journeyman.certify.certificate import clopper_pearson_interval
from journeyman.certify.curve import CostQualityCurve
from journeyman.certify.metrics import brier, negative_log_likelihood
from journeyman.certify.thresholds import read_threshold
from journeyman.probabilities import expected_calibration_error
from journeyman.report.comparison import ComparedStudent, agreement_notes
from journeyman.report.data import IntArray, TestRows, TrainingRecord
from journeyman.report.measure import Measured
from journeyman.report.plots import RELIABILITY_BINS
from journeyman.report.verdict import percent

NOTHING = "–"
_KIND_WORDS = {
    "system_agreement": "system agreement",
    "selective_agreement": "selective agreement",
    "accuracy": "accuracy against gold",
}
_COVERAGES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
_COMMONEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns' names, rows of as many cells, and a caption.

    Row `marked` stands out. The first `n_words` columns hold words, the others numbers.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None
    n_words: int = 1


def accuracies(measured: Measured, *, mixed: bool = False) -> Table | None:
    """Teacher, student and cascade against gold; None without gold. mixed: what is escalated is
    answered with both opinions."""
    gold = measured.gold
    if gold is None:
        return None
    escalated = 1 - measured.n_accepted / measured.n
    low, high = gold.lead_interval
    rows = [
        (name, f"{right / gold.n:.1%}", interval(right, gold.n), f"{calls:.1%}")
        for name, right, calls in (
            ("teacher alone", gold.teacher, 1.0),
            *([("all escalated, both mixed", gold.escalated, 1.0)] if mixed else []),
            ("student alone", gold.student, 0.0),
            ("cascade", gold.cascade, escalated),
        )
    ]
    lead = ("student less teacher", f"{gold.lead:+.1%}", f"{low:+.1%} to {high:+.1%}", NOTHING)
    return Table(
        caption=f"Right by gold, on the {gold.n:,} test rows with gold; 95% intervals: exact, and "
        "of the difference Tango's for paired answers.",
        columns=("who answers", "right", "interval", "calls to the teacher"),
        rows=(*rows, lead),
    )


def guarantees(
    bundle: Bundle, curve: CostQualityCurve, gold_curve: CostQualityCurve | None
) -> Table:
    """Every certificate in the bundle, and what came of it on the test rows of the curves."""
    served = [g.kind for g in bundle.guarantees].index(bundle.served_guarantee)
    return Table(
        caption=f"Certified on certify rows; the last two columns on {curve.table.n:,} test rows. "
        "The marked one sets the threshold. Errors are answered rows that differ from the teacher; "
        "against gold those that only the teacher gets right, with those that only the student "
        "does behind them.",
        columns=(
            "promise",
            "at most",
            "confidence",
            "certify rows",
            "answered",
            "errors",
            "proved",
            "answered on test",
            "realised on test",
        ),
        rows=tuple(_guarantee_row(g, curve, gold_curve) for g in bundle.guarantees),
        marked=served,
    )


def class_guarantees(bundle: PolicyBundle, measured: Measured) -> Table | None:
    """The certificate of each of the student's answers, and what came of it on test rows; None
    where all share one."""
    if bundle.class_guarantees is None:
        return None
    return Table(
        caption="A promise for each answer that the student gives, all of them together at the "
        "confidence above; the last columns on test rows, with exact 95% intervals.",
        columns=("student's answer", "certify rows", "answered", "errors", "proved", "test rows",
                 "answered on test", "realised on test", "interval"),
        rows=tuple(
            (
                label,
                f"{g.n:,}",
                f"{g.n_accepted:,}",
                f"{g.errors:,}",
                f"{g.upper_bound:.2%}" if g.feasible else "escalated",
                f"{seen.n:,}",
                f"{seen.n_accepted:,}",
                *rate_and_interval(*seen.risk(g.kind)),
            )
            for label, g, seen in zip(
                bundle.label_names, bundle.class_guarantees, measured.by_answer, strict=True
            )
        ),
    )  # fmt: skip


def cost_quality(
    curve: CostQualityCurve, gold_curve: CostQualityCurve | None, guarantee: Guarantee
) -> Table:
    """Some thresholds between none and every answer by the student, the certified one marked."""
    chosen = curve.table.index_at(read_threshold(guarantee.threshold))
    wanted = np.searchsorted(curve.coverage, _COVERAGES).clip(max=len(curve.coverage) - 1)
    indices = sorted({int(i) for i in wanted} | {chosen})
    rows = []
    for i in indices:
        selective = curve.selective_disagreement[i]
        row: tuple[str, ...] = (
            f"{curve.coverage[i]:.1%}",
            f"{1 - curve.coverage[i]:.1%}",
            f"{curve.system_disagreement[i]:.1%}",
            NOTHING if np.isnan(selective) else f"{selective:.1%}",
        )
        if gold_curve is not None:
            row += (f"{gold_curve.at(float(curve.threshold[i])).cascade_accuracy:.1%}",)
        rows.append(row)
    gold_columns = () if gold_curve is None else ("right by gold",)
    return Table(
        caption=f"Thresholds tried on {curve.table.n:,} test rows; the certified one is marked.",
        columns=(
            "student answers",
            "calls to the teacher",
            "differs, of all",
            "differs, of answered",
            *gold_columns,
        ),
        rows=tuple(rows),
        marked=indices.index(chosen),
    )


def label_counts(
    labels: Sequence[str], gold: Mapping[str, Mapping[str, int]], teacher: Mapping[str, int]
) -> Table:
    """Rows of each label by gold, a column a split, and by the teacher over all splits."""
    gold = {split: counts for split, counts in gold.items() if any(counts.values())}
    rows = [
        (
            label,
            *(f"{counts.get(label, 0):,}" for counts in gold.values()),
            f"{teacher.get(label, 0):,}",
        )
        for label in labels
    ]
    totals = [*(sum(counts.values()) for counts in gold.values()), sum(teacher.values())]
    return Table(
        caption="Rows of each label: by gold in each split, and by the teacher in all of them."
        if gold
        else "Rows of each label by the teacher, in all splits.",
        columns=("label", *(f"gold, {split}" for split in gold), "teacher, all splits"),
        rows=(*rows, ("all", *(f"{total:,}" for total in totals))),
    )


def evaluations(
    records: Sequence[TrainingRecord], of: Literal["rows", "tokens"] = "rows"
) -> Table | None:
    """The evaluations on the way, one row each, the best marked; None if there were none."""
    if not records:
        return None
    further = {
        "kl": ("KL, nats", ".3f"),
        "cross_entropy": ("cross-entropy, nats", ".3f"),
        "gold_accuracy": ("right by gold", ".1%"),
        "calibration_error": ("calibration error", ".3f"),
        "gold_calibration_error": ("the same by gold", ".3f"),
        "perplexity": ("perplexity", ",.1f"),
        "exact_match": ("written to the letter", ".1%"),
    }
    further = {key: words for key, words in further.items() if records[-1].get(key) is not None}

    def order(i: int) -> tuple[float, float]:
        loss = records[i].get("kl", records[i].get("cross_entropy"))
        return records[i]["agreement"], -(loss or 0.0)

    best = max(range(len(records)), key=order)
    return Table(
        caption=f"The student during training, on calibrate rows; means over {of}, highest "
        "agreement marked.",
        columns=(
            "epoch",
            "step",
            "agreement",
            *(name for name, _ in further.values()),
        ),
        rows=tuple(
            (
                f"{record['epoch']:,}",
                f"{record['step']:,}",
                f"{record['agreement']:.1%}",
                *(format(record[key], form) for key, (_, form) in further.items()),
            )
            for record in records
        ),
        marked=best,
    )


def students(compared: Sequence[ComparedStudent]) -> Table | None:
    """Students of several runs, and what agreement is with where it is not with the teacher's first
    choice; None if none were compared. Figures that no student has are left out."""
    if not compared:
        return None
    forms = {
        "gold_accuracy": ("right by gold", ".1%"),
        "kl": ("KL, nats", ".3f"),
        "cross_entropy": ("cross-entropy, nats", ".3f"),
        "perplexity": ("perplexity", ",.1f"),
        "exact_match": ("written to the letter", ".1%"),
        "rows_per_s": ("rows/s", ",.0f"),
    }
    forms = {
        key: words
        for key, words in forms.items()
        if any(getattr(student, key) is not None for student in compared)
    }
    said = ["Students side by side, each on its calibrate rows.", *agreement_notes(compared)]
    return Table(
        caption=" ".join(said),
        columns=("run", "MB", "agreement", *(name for name, _ in forms.values())),
        rows=tuple(
            (
                student.name,
                f"{student.size_bytes / 1e6:,.0f}",
                f"{student.agreement:.1%}",
                *(_or_nothing(getattr(student, key), form) for key, (_, form) in forms.items()),
            )
            for student in compared
        ),
    )


def _or_nothing(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def calibration(rows: TestRows) -> Table:
    """How far the calibrated probabilities can be believed, against the teacher and gold."""
    against = [("the teacher's answer", rows.teacher_answer)]
    if rows.has_gold.any():
        against.append(("gold", rows.gold))
    lines = []
    for name, target in against:
        known = target >= 0
        p, t = rows.student[known], target[known]
        lines.append(
            (
                name,
                f"{int(known.sum()):,}",
                f"{expected_calibration_error(p, t, RELIABILITY_BINS):.3f}",
                f"{brier(p, t):.3f}",
                f"{negative_log_likelihood(p, t):.3f}",
            )
        )
    return Table(
        caption="Calibration of the student on test rows; lower is better in all three.",
        columns=("against", "rows", "expected calibration error", "Brier", "log loss, nats"),
        rows=tuple(lines),
    )


def per_label(rows: TestRows, labels: Sequence[str]) -> Table:
    """Agreement and answers by the teacher's label; accuracies by gold label."""
    has_gold = bool(rows.has_gold.any())
    lines = []
    for i, label in enumerate(labels):
        of_teacher, of_gold = rows.teacher_answer == i, rows.gold == i
        line: tuple[str, ...] = (
            label,
            f"{int(of_teacher.sum()):,}",
            _share(~rows.differs & of_teacher, of_teacher),
            _share(rows.accepted & of_teacher, of_teacher),
        )
        if has_gold:
            line += (
                f"{int(of_gold.sum()):,}",
                _share((rows.teacher_answer == i) & of_gold, of_gold),
                _share((rows.student_answer == i) & of_gold, of_gold),
            )
        lines.append(line)
    gold_columns = ("gold rows", "teacher right", "student right") if has_gold else ()
    return Table(
        caption=f"Label by label, on {len(rows):,} test rows.",
        columns=("label", "teacher says so", "student agrees", "student answers", *gold_columns),
        rows=tuple(lines),
    )


def commonest_differences(counts: IntArray, labels: Sequence[str], against: str) -> Table | None:
    """The largest cells off the diagonal of counts[c, c]; None if there are none."""
    off = counts * (1 - np.eye(len(labels), dtype=np.int64))
    largest = [i for i in np.argsort(-off, axis=None, kind="stable")[:_COMMONEST] if off.flat[i]]
    if not largest:
        return None
    whose = "gold" if against == "gold" else "its teacher"
    cells = [divmod(int(i), len(labels)) for i in largest]
    return Table(
        caption=f"The student's commonest differences from {whose}, on test rows.",
        columns=(against, "student", "rows"),
        rows=tuple((labels[i], labels[j], f"{off[i, j]:,}") for i, j in cells),
        n_words=2,
    )


def _guarantee_row(
    guarantee: Guarantee, curve: CostQualityCurve, gold_curve: CostQualityCurve | None
) -> tuple[str, ...]:
    against_gold = guarantee.kind == "accuracy"
    realised = _realised(guarantee, curve, gold_curve)
    errors = f"{guarantee.errors:,}"
    return (
        _KIND_WORDS[guarantee.kind],
        percent(guarantee.alpha),
        percent(1 - guarantee.delta),
        f"{guarantee.n:,}",
        f"{guarantee.n_accepted:,}",
        f"{errors} (-{guarantee.gains:,})" if against_gold else errors,
        f"{guarantee.upper_bound:.2%}" if guarantee.feasible else "not feasible",
        f"{curve.at(read_threshold(guarantee.threshold)).coverage:.1%}",
        NOTHING if realised is None else f"{realised:.1%}",
    )


def _realised(
    guarantee: Guarantee, curve: CostQualityCurve, gold_curve: CostQualityCurve | None
) -> float | None:
    """What the guarantee bounds, on the test rows of the curves; None where it says nothing."""
    threshold = read_threshold(guarantee.threshold)
    if guarantee.kind == "system_agreement":
        return curve.at(threshold).system_disagreement
    if guarantee.kind == "selective_agreement":
        return curve.at(threshold).selective_disagreement
    if gold_curve is None or gold_curve.teacher_accuracy is None:
        return None
    accuracy = gold_curve.at(threshold).cascade_accuracy
    return None if accuracy is None else gold_curve.teacher_accuracy - accuracy


def interval(count: int, n: int) -> str:
    """Exact two-sided 95% interval (Clopper and Pearson)."""
    low, high = clopper_pearson_interval(count, n)
    return f"{low:.1%} to {high:.1%}"


def rate_and_interval(count: int, n: int) -> tuple[str, str]:
    return (f"{count / n:.1%}", interval(count, n)) if n else (NOTHING, NOTHING)


def _share(part: np.ndarray, whole: np.ndarray) -> str:
    n = int(whole.sum())
    return f"{int(part.sum()) / n:.1%}" if n else NOTHING

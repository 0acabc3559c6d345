"""The figures, one pure function each: numbers in, an inline `<svg>` out.

What a figure means, and on which rows it was computed, is said by its caption in `page`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from journeyman.certify.bundle import Guarantee
from journeyman.certify.curve import CostQualityCurve, CurvePoint
from journeyman.certify.thresholds import read_threshold
from journeyman.probabilities import reliability_bins
from journeyman.report import style
from journeyman.report.comparison import ComparedStudent, agreement_notes
from journeyman.report.data import FloatArray, IntArray, TrainingRecord

RELIABILITY_BINS = 10
FEW_ROWS = 10  # a bin with fewer says little, and is drawn hollow
_LONGEST_LABEL = 20
_LONGEST_CURVE = 500
FAR_APART = 8  # sizes of which the largest is so many times the smallest: a log scale


def label_histogram(
    labels: Sequence[str], gold: Mapping[str, int], teacher: Mapping[str, int]
) -> str:
    """Share of rows of each label, by gold and by the teacher.

    Args:
        labels: top to bottom.
        gold: label to rows; empty without gold.
        teacher: label to rows.
    """
    sources = [
        (name, counts, color)
        for name, counts, color in (
            ("gold", gold, style.MUTED),
            ("teacher", teacher, style.TEACHER),
        )
        if sum(counts.values())
    ]
    per_label = 0.42 if len(labels) <= 12 else 0.26
    with style.figure("labels", 0.9 + per_label * len(labels)) as fig:
        axes = fig.add_subplot()
        thickness = 0.76 / max(len(sources), 1)
        for i, (name, counts, color) in enumerate(sources):
            total = sum(counts.values())
            axes.barh(
                np.arange(len(labels)) + (i - (len(sources) - 1) / 2) * thickness,
                [counts.get(label, 0) / total for label in labels],
                height=thickness * 0.92,
                color=color,
                label=f"{name}, {total:,} rows",
            )
        axes.set_yticks(np.arange(len(labels)), [_short(label) for label in labels])
        axes.set_ylim(len(labels) - 0.45, -0.55)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("share of rows")
        legend_above(axes)
        return style.to_svg(fig, "labels", "Share of rows of each label, by gold and by teacher")


def training_curves(
    steps: Sequence[TrainingRecord], evaluations: Sequence[TrainingRecord], of: str = "row"
) -> str:
    """Loss by optimizer step; below, what the evaluations on the way saw.

    Args:
        steps: `step` and `loss`, the mean over the steps since the record before.
        evaluations: `step`, `agreement`, `kl` or `cross_entropy` (nats), with gold
            `gold_accuracy`, and of texts `exact_match`.
        of: what a loss is the mean of.
    """
    with style.figure("training", 5.0 if evaluations else 2.8) as fig:
        if evaluations:
            top, bottom = fig.subplots(2, 1, sharex=True)
            _evaluation_panel(bottom, evaluations, of)
        else:
            top = bottom = fig.add_subplot()
        _loss_panel(top, steps, evaluations, of)
        bottom.set_xlabel("optimizer step")
        bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return style.to_svg(fig, "training", "Training loss and evaluations by optimizer step")


def size_agreement(students: Sequence[ComparedStudent], own: str = "") -> str:
    """A point for each student: how large its weights are, how high its agreement is.

    Args:
        own: name of the student whose page this is, drawn in ink.
    """
    sizes = [student.size_bytes / 1e6 for student in students]
    with style.figure("size-agreement", 3.2) as fig:
        axes = fig.add_subplot()
        if max(sizes) > FAR_APART * min(sizes):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())  # its powers of ten are math text
        else:
            axes.set_xlim(0, 1.15 * max(sizes))
        for student, size in zip(students, sizes, strict=True):
            color = style.INK if student.name == own else style.STUDENT
            axes.plot([size], [student.agreement], "o", color=color, markersize=6, clip_on=False)
            left = size > 0.6 * max(sizes)
            axes.annotate(
                _short(student.name),
                (size, student.agreement),
                xytext=(-8 if left else 8, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                color=color,
            )
        axes.margins(y=0.2)
        axes.set_xlabel("weights, MB")
        axes.set_ylabel("agreement" if agreement_notes(students) else "same as teacher")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        return style.to_svg(fig, "size-agreement", "Size of students against their agreement")


def reliability(student: FloatArray, teacher_answer: IntArray, gold: IntArray) -> str:
    """How often the student is right when it says it is so sure; below, how often it says so.

    Args:
        student: float64[n, c], calibrated probabilities.
        teacher_answer: int64[n].
        gold: int64[n], -1 without gold.
    """
    against = [("same as teacher", teacher_answer, style.TEACHER, "o")]
    if (gold >= 0).any():
        against.append(("right by gold", gold, style.SYSTEM, "s"))
    with style.figure("reliability", 4.6) as fig:
        upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 1], [0, 1], color=style.MUTED, linestyle=":", label="as sure as right")
        for name, target, color, marker in against:
            known = target >= 0
            bins = reliability_bins(student[known], target[known], RELIABILITY_BINS)
            x, y = bins.mean_confidence, bins.accuracy
            many, few = bins.count >= FEW_ROWS, (bins.count > 0) & (bins.count < FEW_ROWS)
            points = {"color": color, "marker": marker, "markersize": 4.5, "clip_on": False}
            upper.plot(x[many], y[many], label=name, **points)
            upper.plot(x[few], y[few], linestyle="", markerfacecolor="none", **points)
        counts = reliability_bins(student, teacher_answer, RELIABILITY_BINS)
        lower.bar(
            (counts.lower + counts.upper) / 2,
            counts.count,
            width=0.9 / RELIABILITY_BINS,
            color=style.STUDENT,
        )
        upper.set_ylim(0, 1.02)
        upper.set_ylabel("share of rows")
        lower.set_ylabel("rows")
        lower.set_xlabel("student's highest probability")
        least = float(counts.lower[counts.count > 0].min())
        lower.set_xlim(least, 1)
        for axes in (upper, lower):
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        upper.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        legend_above(upper, columns=3)
        return style.to_svg(fig, "reliability", "Reliability diagram of the calibrated student")


def cost_quality(
    curve: CostQualityCurve,
    gold_curve: CostQualityCurve | None,
    certify_points: Sequence[CurvePoint],
    guarantee: Guarantee,
) -> str:
    """Disagreement, and with gold accuracy, over the share that the student answers.

    Args:
        curve: of all test rows.
        gold_curve: of the test rows with gold, with accuracies; None without gold.
        certify_points: the bundle's curve.
        guarantee: the one that is served; its kind says which disagreement is drawn.
    """
    with style.figure("cost-quality", 3.5 if gold_curve is None else 6.0) as fig:
        if gold_curve is None:
            risk = bottom = fig.add_subplot()
        else:
            risk, bottom = fig.subplots(2, 1, sharex=True)
            _accuracy_panel(bottom, gold_curve, guarantee)
        _risk_panel(risk, curve, certify_points, guarantee)
        bottom.set_xlim(0, 1)
        bottom.set_xlabel("share of requests that the student answers")
        bottom.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return style.to_svg(fig, "cost-quality", "Disagreement and accuracy by share answered")


def confusion(counts: IntArray, labels: Sequence[str], against: str) -> str:
    """Rows by the student's answer (columns) and by another's (rows), shaded by share of its row.

    Args:
        counts: int64[c, c], [other's answer, student's answer].
        labels: c names.
        against: whose answer the rows are: "teacher" or "gold".
    """
    c = len(labels)
    name = f"confusion-{against}"
    side = max(style.WIDTH, 1.7 + 0.27 * c)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    with style.figure(name, side if c > 6 else 0.8 * side, side) as fig:
        axes = fig.add_subplot()
        for row, column in np.argwhere(counts > 0):
            # Shading by opacity, one hue, works on a light and on a dark page.
            color = style.SYSTEM if row == column else style.TEACHER
            cell = Rectangle(
                (column - 0.5, row - 0.5),
                1,
                1,
                color=color,
                alpha=0.08 + 0.57 * shares[row, column],
            )
            cell.set_linewidth(0)
            axes.add_patch(cell)
            size = 8.5 if c <= 12 else 6.5
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", size=size)
        names = [_short(label) for label in labels]
        crowded = c > 8
        axes.set_xticks(
            np.arange(c),
            names,
            rotation=90 if crowded else 30,
            ha="center" if crowded else "right",
            rotation_mode=None if crowded else "anchor",
        )
        axes.set_yticks(np.arange(c), names)
        axes.set_xlim(-0.5, c - 0.5)
        axes.set_ylim(c - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(c + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(c + 1) - 0.5, minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(visible=False)
        axes.grid(which="minor")
        axes.set_xlabel("student answers")
        axes.set_ylabel("gold label" if against == "gold" else "teacher answers")
        return style.to_svg(fig, name, f"Confusion matrix of the student against {against}")


def _loss_panel(
    axes: Axes,
    steps: Sequence[TrainingRecord],
    evaluations: Sequence[TrainingRecord],
    of: str,
) -> None:
    at, loss = _series(steps, "loss")
    keep = _thinned(len(at))
    axes.plot(
        at[keep], loss[keep], color=style.MUTED, alpha=0.4, linewidth=0.8, label="loss, train rows"
    )
    window = max(1, len(loss) // 25)
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    middle = at[window // 2 : window // 2 + len(smooth)]
    keep = _thinned(len(smooth))
    axes.plot(middle[keep], smooth[keep], color=style.STUDENT, label="the same, smoothed")
    for key, name in (("kl", "KL from teacher"), ("cross_entropy", "cross-entropy")):
        at, divergence = _series(evaluations, key)
        if len(at):
            label = f"{name}, calibrate rows"
            axes.plot(at, divergence, color=style.PROMISE, marker="s", markersize=4, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"nats a {of}")
    legend_above(axes)


def _evaluation_panel(axes: Axes, evaluations: Sequence[TrainingRecord], of: str) -> None:
    for key, name, color, marker in (
        ("agreement", "same as teacher" if of == "row" else "agreement", style.TEACHER, "o"),
        ("gold_accuracy", "right by gold", style.SYSTEM, "s"),
        ("exact_match", "rows written to the letter", style.STUDENT, "s"),
    ):
        at, values = _series(evaluations, key)
        if len(at):
            axes.plot(at, values, color=color, marker=marker, markersize=4.5, label=name)
    axes.set_ylabel(f"share of {of}s")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    legend_above(axes)


def _risk_panel(
    axes: Axes, curve: CostQualityCurve, certify_points: Sequence[CurvePoint], guarantee: Guarantee
) -> None:
    if guarantee.kind != "selective_agreement":
        certify = [point.system_disagreement for point in certify_points]
        test = curve.system_disagreement
        axes.set_ylabel("system differs from teacher")
    else:
        certify = [point.selective_disagreement or 0.0 for point in certify_points]
        test = np.nan_to_num(curve.selective_disagreement)
        axes.set_ylabel("answered otherwise than teacher")
    keep = _thinned(len(test))
    axes.plot(
        [point.coverage for point in certify_points],
        certify,
        color=style.MUTED,
        linewidth=1.1,
        label="on certify rows",
    )
    axes.plot(curve.coverage[keep], test[keep], color=style.STUDENT, label="on test rows")
    highest = max(*certify, float(test.max()))
    if guarantee.kind != "accuracy":  # which is drawn among the accuracies
        promised = f"promised: at most {100 * guarantee.alpha:.4g}%"
        axes.axhline(guarantee.alpha, color=style.PROMISE, linestyle="--", label=promised)
        highest = max(highest, guarantee.alpha)
    _mark_threshold(axes, curve, test, guarantee)
    axes.set_ylim(0, 1.12 * highest or 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    legend_above(axes)


def _accuracy_panel(axes: Axes, curve: CostQualityCurve, guarantee: Guarantee) -> None:
    cascade = np.asarray(curve.cascade_accuracy)
    keep = _thinned(len(cascade))
    axes.plot(curve.coverage[keep], cascade[keep], color=style.SYSTEM, label="cascade")
    ends = (("teacher alone", 0, style.TEACHER), ("student alone", -1, style.STUDENT))
    for name, end, color in ends:
        axes.axhline(cascade[end], color=color, linestyle=(0, (5, 2)), linewidth=1.2, label=name)
    least, most = float(cascade.min()), float(cascade.max())
    if guarantee.kind == "accuracy":
        promised = float(cascade[0]) - guarantee.alpha
        label = f"promised: teacher's less {100 * guarantee.alpha:.4g}%"
        axes.axhline(promised, color=style.PROMISE, linestyle="--", label=label)
        least = min(least, promised)
    _mark_threshold(axes, curve, cascade, guarantee)
    room = max(0.15 * (most - least), 0.01)
    axes.set_ylim(least - room, most + room)
    axes.set_ylabel("right by gold")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    legend_above(axes)


def _mark_threshold(
    axes: Axes, curve: CostQualityCurve, values: FloatArray, guarantee: Guarantee
) -> None:
    chosen = curve.table.index_at(read_threshold(guarantee.threshold))
    x = float(curve.coverage[chosen])
    axes.axvline(x, color=style.INK, linewidth=0.9, linestyle=":")
    axes.plot(
        [x],
        [values[chosen]],
        color=style.INK,
        marker="D",
        markersize=5,
        linestyle=":",
        linewidth=0.9,
        clip_on=False,
        zorder=5,
        label=f"certified ({x:.0%} answered)" if guarantee.feasible else "escalates everything",
    )


def _series(records: Sequence[TrainingRecord], key: str) -> tuple[FloatArray, FloatArray]:
    """Steps and values of the records that have a key."""
    pairs = [(float(r["step"]), float(r[key])) for r in records if r.get(key) is not None]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _thinned(n_points: int) -> IntArray:
    """Indices of at most some hundred of n points, ends included: a page, not a data file."""
    return np.unique(np.linspace(0, n_points - 1, min(n_points, _LONGEST_CURVE)).astype(np.int64))


def legend_above(axes: Axes, columns: int = 2) -> None:
    """In rows of so many."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.03), ncols=columns)


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"

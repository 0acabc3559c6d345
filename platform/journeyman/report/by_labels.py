"""When to stop labeling, and when to stop escalating: the curve over numbers of labels as a figure,
a table and words."""

from __future__ import annotations

from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter

from journeyman.certify.by_labels import Answerer, Beside, LabelCurve, LabelPoint
from journeyman.report import style
from journeyman.report.figures import Figure
from journeyman.report.plots import FAR_APART, legend_above
from journeyman.report.tables import NOTHING, Table

_NAME = "label-curve"
_WHO: tuple[tuple[Answerer, str, str, str], ...] = (
    ("student", "student alone", style.STUDENT, "o"),
    ("cascade", "cascade", style.SYSTEM, "s"),
    ("mixture", "cascade, both mixed", style.PROMISE, "^"),
)


def figure(curve: LabelCurve) -> Figure:
    """Right answers over the number of labels."""
    by_gold = curve.against == "gold"
    what = "is right by gold" if by_gold else "gives its teacher's answer"
    return Figure(
        name=_NAME,
        svg=_plot(curve),
        caption=f"How often each {what}, on {curve.n:,} test rows, by the number of labels that "
        "the student learned from. Where the student's line no longer rises out of its band, the "
        "95% interval, more labels gain nothing that these rows can show"
        + ("; where the other lines meet it, escalating gains nothing." if by_gold else ".")
        + f" Escalated: {escalated(curve)}. {_how(curve)}",
    )


def escalated(curve: LabelCurve) -> str:
    """Which requests are, in words."""
    own = "" if curve.share == curve.own_share else f"; the run itself escalates {_own(curve)}"
    return f"the least confident {curve.share:.1%} of calibrate rows{own}"


def table(curve: LabelCurve) -> Table:
    """A row for each number of labels."""
    shown = [(who, name) for who, name, _, _ in _WHO if who in curve.points[0].right]
    columns = [column for _, name in shown for column in (name, "interval")]
    if curve.n_seeds > 1:
        columns.insert(2, "over seeds")
    weight = ("student's weight",) if "mixture" in curve.points[0].right else ()
    low, high = curve.teacher.interval(curve.n)
    teacher = f" The teacher alone: {curve.teacher.mean / curve.n:.1%} ({low:.1%} to {high:.1%})."
    return Table(
        caption=f"{'Right by gold' if curve.against == 'gold' else 'The same as the teacher'}, on "
        f"{curve.n:,} test rows, with exact 95% intervals." + teacher * (curve.against == "gold"),
        columns=("labels", "steps", *columns, "escalated on test", *weight),
        rows=tuple(_row(curve, point, [who for who, _ in shown]) for point in curve.points),
        n_words=0,
    )


def words(curve: LabelCurve) -> list[str]:
    """What one reads off it, sentence by sentence."""
    if curve.against == "teacher":
        return [
            _labels(curve),
            "When to stop escalating it cannot say: an escalated request has the teacher's answer, "
            "and without gold on test rows nothing says which answer is right.",
            _ESTIMATES,
        ]
    return [
        _labels(curve),
        _escalation(curve, "cascade", "Having the teacher answer what is escalated"),
        *(
            [_escalation(curve, "mixture", "Answering it with both opinions, mixed,")]
            if "mixture" in curve.points[0].right
            else []
        ),
        _ESTIMATES,
    ]


_ESTIMATES = (
    "These are estimates on test rows, no promise: that is made by journeyman certify alone."
)


def _labels(curve: LabelCurve) -> str:
    enough, last = curve.enough, curve.points[-1]
    if len(curve.points) == 1:
        return "Students of fewer labels were not trained, so nothing says what labels are worth."
    if enough is last:
        before = curve.points[-2]
        gain = _difference(curve, before.later[last.n_labels])
        return (
            f"More labels still pay: {last.n_labels:,} in place of {before.n_labels:,} gain {gain}."
        )
    return (
        f"From {enough.n_labels:,} labels on, more gain less than these test rows can tell from "
        f"chance: {last.n_labels:,} gain {_difference(curve, enough.later[last.n_labels])}."
    )


def _escalation(curve: LabelCurve, who: Answerer, what: str) -> str:
    last, up_to = curve.points[-1], curve.pays_up_to(who)
    at_the_end = _difference(curve, last.beside_student[who])
    if up_to is None:
        return (
            f"{what} gains nothing beyond chance over the student alone at any of these numbers "
            f"of labels; at {last.n_labels:,}: {at_the_end}."
        )
    gain = _difference(curve, up_to.beside_student[who])
    if up_to is last:
        return f"{what} still pays at {last.n_labels:,} labels: {gain} over the student alone."
    return (
        f"{what} pays up to {up_to.n_labels:,} labels: {gain} over the student alone; with more "
        f"it gains nothing beyond chance, at {last.n_labels:,}: {at_the_end}."
    )


def _difference(curve: LabelCurve, beside: Beside) -> str:
    low, high = beside.interval(curve.n)
    return f"{beside.difference(curve.n):+.1%} (95% interval {low:+.1%} to {high:+.1%})"


def _own(curve: LabelCurve) -> str:
    return {0.0: "nothing", 1.0: "everything"}.get(curve.own_share, f"{curve.own_share:.1%}")


def _how(curve: LabelCurve) -> str:
    seeds = (
        f"Means over {curve.n_seeds} seeds."
        if curve.n_seeds > 1
        else "One student each: what the luck of a subset adds, --seeds 3 would show."
    )
    return (
        "All students were trained for about as many steps, on nested subsets of the train rows. "
        + seeds
    )


def _row(curve: LabelCurve, point: LabelPoint, shown: list[Answerer]) -> tuple[str, ...]:
    cells = []
    for who in shown:
        low, high = point.right[who].interval(curve.n)
        cells += [f"{point.right[who].mean / curve.n:.1%}", f"{low:.1%} to {high:.1%}"]
    if curve.n_seeds > 1:
        student = point.right["student"]
        cells.insert(2, f"{student.least / curve.n:.1%} to {student.most / curve.n:.1%}")
    weight = NOTHING if point.student_weight is None else f"{point.student_weight:.0%}"
    return (
        f"{point.n_labels:,}",
        f"{point.n_steps:,}",
        *cells,
        f"{point.escalated:.1%}",
        *([weight] if "mixture" in point.right else []),
    )


def _plot(curve: LabelCurve) -> str:
    sizes = [point.n_labels for point in curve.points]
    with style.figure(_NAME, 3.4) as fig:
        axes = fig.add_subplot()
        if sizes[-1] >= FAR_APART * sizes[0]:
            axes.set_xscale("log")
        intervals = [point.right["student"].interval(curve.n) for point in curve.points]
        low, high = zip(*intervals, strict=True)
        axes.fill_between(sizes, low, high, color=style.STUDENT, alpha=0.12, linewidth=0)
        for who, name, color, marker in _WHO:
            if who in curve.points[0].right:
                shares = [point.right[who].mean / curve.n for point in curve.points]
                axes.plot(sizes, shares, color=color, marker=marker, markersize=4.5, label=name)
        if curve.against == "gold":
            axes.axhline(
                curve.teacher.mean / curve.n,
                color=style.TEACHER,
                linestyle=(0, (5, 2)),
                linewidth=1.2,
                label="teacher alone",
            )
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("labels that the student learned from")
        axes.set_ylabel("right by gold" if curve.against == "gold" else "same as teacher")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        legend_above(axes)
        return style.to_svg(fig, _NAME, "Right answers by the number of labels")

"""Tables of what a job is about beside accuracy: a label found, lists ranked, slices and more."""

from __future__ import annotations

from collections.abc import Sequence

from journeyman.report.data import CountedRows
from journeyman.report.detection import Detection
from journeyman.report.ranking import Ranking
from journeyman.report.slices import FEWEST_ROWS, MOST_VALUES, Slice, wilson
from journeyman.report.tables import NOTHING, Table, interval, rate_and_interval

_LONGEST = 40  # characters shown of a slice's value


def detection(found: Sequence[Detection], positive: str | None) -> Table | None:
    """Precision and recall of one label; None where the job is about none."""
    if not found or positive is None:
        return None
    return Table(
        caption=f"Finding {positive}, which {found[0].there:,} test rows are by gold; exact 95% "
        "intervals. Balanced accuracy is the mean over labels of the share answered right. AUC is "
        "how often a row of the label is given a higher probability of it than another row; at the "
        "median, balanced accuracy where the half of the rows with the higher probability is "
        "answered so: neither depends on how many rows really are.",
        columns=(
            "who answers",
            "precision",
            "interval",
            "recall",
            "interval",
            "balanced accuracy",
            "at the median",
            "AUC",
        ),
        rows=tuple(
            (
                one.who,
                *rate_and_interval(one.found, one.said),
                *rate_and_interval(one.found, one.there),
                f"{one.balanced_accuracy:.1%}",
                NOTHING if one.at_median is None else f"{one.at_median:.1%}",
                NOTHING if one.auc is None else f"{one.auc:.3f}",
            )
            for one in found
        ),
    )


def ranking(found: Sequence[Ranking], by: str | None, positive: str | None) -> Table | None:
    """How well each ranks the candidates of a list; None where there are no lists."""
    if not found:
        return None
    return Table(
        caption=f"Test rows with the same {by}, ranked by the probability of {positive}: "
        f"{found[0].n_lists:,} lists of up to {found[0].largest} candidates; exact 95% interval.",
        columns=("who ranks", "mean reciprocal rank", "recall at 1", "interval"),
        rows=tuple(
            (
                one.who,
                f"{one.mrr:.3f}",
                f"{one.recall_at_1:.1%}",
                interval(round(one.first), one.n_lists),
            )
            for one in found
        ),
    )


def by_slice(found: Sequence[Slice]) -> Table | None:
    """Slices, worst first; None where there are none."""
    if not found:
        return None
    gold = any(one.n_gold for one in found)
    labeled = any(one.by.endswith(" label") for one in found)
    gold_columns = ("cascade right", "interval", "student right", "teacher right") if gold else ()
    return Table(
        caption=f"Test rows by {'label, by ' * labeled}length and by further columns (of one of "
        "more than "
        f"{MOST_VALUES} values the worst {MOST_VALUES} of those with {FEWEST_ROWS} rows or more, "
        "of one of long texts their length), the surely worst first: by the upper end of the "
        f"interval of {'cascade right' if gold else 'same'}; 95% intervals (Wilson).",
        columns=("by", "rows with", "rows", *gold_columns, "same as teacher", "interval",
                 "student answers"),
        rows=tuple(
            (
                one.by,
                one.value if len(one.value) <= _LONGEST else f"{one.value[:_LONGEST]}…",
                f"{one.n:,}",
                *(_gold_cells(one) if gold else ()),
                f"{one.same / one.n:.1%}",
                _wilson(one.same, one.n),
                f"{one.answered / one.n:.1%}",
            )
            for one in found
        ),
        n_words=2,
    )  # fmt: skip


def escalations(rows: CountedRows) -> Table | None:
    """What became of the escalated rows with gold; None where there are none."""
    sent = ~rows.answered & rows.has_gold
    n = int(sent.sum())
    if not n:
        return None
    escalated, student = rows.cascade, rows.student
    kinds = (
        ("it helped: its answer is right, the student's was not", escalated & ~student),
        ("it harmed: the student was right, its answer is not", ~escalated & student),
        ("for nothing: both are right", escalated & student),
        ("in vain: both are wrong", ~escalated & ~student),
    )
    return Table(
        caption=f"What escalating was worth, of {n:,} escalated test rows with gold; 95% intervals "
        "(Wilson).",
        columns=("what came of it", "rows", "share", "interval"),
        rows=tuple(
            (words, f"{k:,}", f"{k / n:.1%}", _wilson(k, n))
            for words, k in ((words, int((sent & kind).sum())) for words, kind in kinds)
        ),
    )


def _gold_cells(one: Slice) -> tuple[str, ...]:
    if not one.n_gold:
        return (NOTHING,) * 4
    return (
        f"{one.cascade / one.n_gold:.1%}",
        _wilson(one.cascade, one.n_gold),
        f"{one.student / one.n_gold:.1%}",
        f"{one.teacher / one.n_gold:.1%}",
    )


def _wilson(k: int, n: int) -> str:
    low, high = wilson(k, n)
    return f"{low:.1%} to {high:.1%}"

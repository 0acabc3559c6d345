"""Test rows by label, by length and by each further column: where is it worst?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from journeyman.report.data import BoolArray, CountedRows, TestRows

MOST_VALUES = 30  # of a column that are shown
FEWEST_ROWS = 5  # of a value, where a column has more values than that
_LONG = 40  # characters in the mean from which on a column is text, and sliced by its length
_QUARTERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """n test rows that have something in common.

    Attributes:
        by: what they have in common; value: which of it.
        same: rows on which student and teacher agree.
        answered: rows that the student answers.
        n_gold: rows with gold; teacher, student, cascade: of them, answered right.
    """

    by: str
    value: str
    n: int
    same: int
    answered: int
    n_gold: int
    teacher: int
    student: int
    cascade: int

    @property
    def good(self) -> tuple[int, int]:
        """What slices are ordered by, of how many: right by the cascade, without gold agreement."""
        return (self.cascade, self.n_gold) if self.n_gold else (self.same, self.n)


def slices(rows: CountedRows, labels: Sequence[tuple[str, str, BoolArray]] = ()) -> list[Slice]:
    """The surely worst first: by the upper end of the Wilson interval of ``good``.

    Of a column of more than ``MOST_VALUES`` values the worst so many of ``FEWEST_ROWS`` or more.
    labels: what else rows have in common, of which all are kept.
    """
    found = [
        _counted(rows, by, value, members)
        for by, value, members in (*labels, *_kinds(rows))
        if members.any() and not members.all()
    ]
    worst_first = sorted(found, key=lambda one: (wilson(*one.good)[1], one.by, one.value))
    shown: Counter[str] = Counter()
    of_labels = {by for by, _, _ in labels}
    kept = []
    for one in worst_first:
        shown[one.by] += 1
        if shown[one.by] <= MOST_VALUES or one.by in of_labels:
            kept.append(one)
    return kept


def by_label(rows: TestRows, labels: Sequence[str]) -> list[tuple[str, str, BoolArray]]:
    """Members of each label: the gold one, without gold the teacher's."""
    gold = bool(rows.has_gold.any())
    label_of = rows.gold if gold else rows.teacher_answer
    return [
        ("gold label" if gold else "teacher's label", label, label_of == i)
        for i, label in enumerate(labels)
    ]


def wilson(k: int, n: int) -> tuple[float, float]:
    """95% score interval of a share (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _kinds(rows: CountedRows) -> Iterator[tuple[str, str, BoolArray]]:
    yield from _lengths("characters", rows.texts)
    for name in rows.metas[0] if rows.metas else ():
        values = np.array([str(meta.get(name)) for meta in rows.metas], dtype=object)
        counts = Counter(values)
        if len(counts) <= MOST_VALUES:
            yield from ((name, value, values == value) for value in counts)
        elif np.mean([len(value) for value in values]) >= _LONG:
            yield from _lengths(f"characters of {name}", values)
        else:
            often = [value for value, n in counts.items() if n >= FEWEST_ROWS]
            yield from ((name, value, values == value) for value in often)


def _lengths(by: str, texts: Iterable[str]) -> Iterator[tuple[str, str, BoolArray]]:
    """Quarters of the rows, by the length of these texts of theirs."""
    characters = np.array([len(text) for text in texts])
    edges = np.unique(np.quantile(characters, np.linspace(0, 1, _QUARTERS + 1)[1:-1]).round())
    quarter = np.searchsorted(edges, characters, side="left")
    for i in np.unique(quarter):
        members = quarter == i
        low, high = int(characters[members].min()), int(characters[members].max())
        yield by, f"{low:,} to {high:,}", members


def _counted(rows: CountedRows, by: str, value: str, members: BoolArray) -> Slice:
    return Slice(
        by=by,
        value=value,
        n=int(members.sum()),
        same=int((members & rows.same).sum()),
        answered=int((members & rows.answered).sum()),
        n_gold=int((members & rows.has_gold).sum()),
        teacher=int((members & rows.teacher).sum()),
        student=int((members & rows.student).sum()),
        cascade=int((members & rows.cascade).sum()),
    )

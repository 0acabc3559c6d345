"""How well candidates are ranked: those of one question, say, by the probability of one label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from journeyman.report.data import FloatArray, TestRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Of one ranker, over the lists that hold both kinds of candidates.

    Attributes:
        who: teacher or student.
        mrr: mean of 1 / rank of the best relevant candidate; candidates of equal probability share
            their mean rank.
        first: lists whose first candidate is relevant, a tie of t candidates with r relevant ones
            counted r / t.
        n_lists: lists.
        largest: candidates of the longest list.
    """

    who: str
    mrr: float
    first: float
    n_lists: int
    largest: int

    @property
    def recall_at_1(self) -> float:
        return self.first / self.n_lists


def rankings(rows: TestRows, by: Sequence[Hashable], positive: int) -> tuple[Ranking, ...]:
    """Of teacher and student; none where no list has both kinds of candidates by gold.

    by: n keys; rows of the same key are one list.
    """
    lists = _lists(rows, by, positive)
    if not lists:
        return ()
    return tuple(
        _ranking(who, probabilities[:, positive], rows.gold == positive, lists)
        for who, probabilities in (("teacher", rows.teacher), ("student", rows.student))
    )


def _lists(rows: TestRows, by: Sequence[Hashable], positive: int) -> list[np.ndarray]:
    """Row numbers of each list that says anything, int64[k] each."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i in np.flatnonzero(rows.has_gold):
        members[by[i]].append(int(i))
    found = (np.array(indices) for indices in members.values())
    relevant = rows.gold == positive
    return [indices for indices in found if 0 < relevant[indices].sum() < len(indices)]


def _ranking(
    who: str, scores: FloatArray, relevant: np.ndarray, lists: list[np.ndarray]
) -> Ranking:
    reciprocal, first = [], 0.0
    for indices in lists:
        own, is_relevant = scores[indices], relevant[indices]
        best = own[is_relevant].max()
        above, tied = int((own > best).sum()), int((own == best).sum())
        reciprocal.append(1 / (above + (tied + 1) / 2))
        top = own == own.max()
        first += float(is_relevant[top].mean())
    return Ranking(
        who=who,
        mrr=float(np.mean(reciprocal)),
        first=first,
        n_lists=len(lists),
        largest=max(map(len, lists)),
    )

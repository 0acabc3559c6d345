"""Candidate prompts and scorings side by side, on rows of ``train``, before anything is paid for.

Of each candidate: how often it is right, how well it orders the rows, how sure it is and whether
rightly so, and what a row costs. Pure: asking the teacher is ``trying``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from journeyman.labels.cost import dollars
from journeyman.labels.inspect.stats import Share
from journeyman.labels.prior import corrected, fit_log_prior
from journeyman.labels.replica import Counts
from journeyman.probabilities import (
    FloatArray,
    IntArray,
    area_under_roc,
    balanced_accuracy,
    expected_calibration_error,
)
from journeyman.recipe import Classes, Price


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a teacher said when it was asked in one way, of the rows that it could answer.

    place: int64[n], which of the rows; logprobs: float64[n, c], as the teacher gave them;
    label_mass: mean probability on any label word, None with channel scoring. refusal: why this
    way cannot be asked at all, empty if it can.
    """

    place: IntArray
    logprobs: FloatArray
    label_mass: float | None
    counts: Counts
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One candidate in figures; those against gold are None without gold.

    accuracy and auc: after prior correction, which saw the same rows without their gold. auc: of
    ``report.positive``, without one of the first label against the second, or the mean over labels
    of each against the others.
    agreement: mean share of rows with the answer of another candidate.
    """

    name: str
    scoring: str
    n: int
    unanswered: int
    accuracy: Share | None
    balanced_accuracy: float | None
    auc: float | None
    calibration_error: float | None
    agreement: float | None
    label_mass: float | None
    tokens_per_row: float
    dollars_per_row: float
    rows_per_s: float
    refusal: str = ""


def judge(
    labels: Mapping[str, Classes],
    asked: Mapping[str, Asked],
    gold: IntArray,
    price: Price,
    positive: str | None = None,
) -> list[Judged]:
    """In the order of ``labels``; gold: int64[n] of the rows tried, -1 without; positive: label
    that AUC is of."""
    answers = {
        name: _answers(labels[name], said, len(gold))
        for name, said in asked.items()
        if not said.refusal
    }
    return [
        _judged(name, labels[name], asked[name], gold, price, _agreement(name, answers), positive)
        for name in labels
    ]


def best(judged: Sequence[Judged], *, by_order: bool = False) -> Judged | None:
    """The one with most right answers (of equal ones the better order, then the cheaper), or
    by_order, for a label that is rare, the one with the largest AUC; without gold the one that
    agrees most with the others. Rows that one could not answer count against it. None where none
    could be asked, and without gold where fewer than three could, as two agree with each other
    alike."""
    able = [one for one in judged if not one.refusal and one.n]
    if len(able) < 3 and not any(one.accuracy for one in able):
        return None

    def merit(one: Judged) -> tuple[float, ...]:
        right = one.accuracy.rate if one.accuracy else one.agreement or 0.0
        answered = one.n / (one.n + one.unanswered)
        figures = ((one.auc or 0.0) * answered, right * answered)
        return *(figures if by_order else figures[::-1]), -one.tokens_per_row

    return max(able, key=merit, default=None)


def _corrected(labels: Classes, logprobs: FloatArray) -> FloatArray:
    if labels.prior_correction == "none" or not len(logprobs):
        return corrected(logprobs, None)
    known = labels.class_shares
    shares = None if known is None else np.array([known[label] for label in labels.classes])
    return corrected(logprobs, fit_log_prior(logprobs, shares))


def _answers(labels: Classes, said: Asked, n_rows: int) -> IntArray:
    """int64[n_rows], -1 where there is none."""
    answers = np.full(n_rows, -1)
    if len(said.place):
        answers[said.place] = _corrected(labels, said.logprobs).argmax(axis=1)
    return answers


def _agreement(name: str, answers: Mapping[str, IntArray]) -> float | None:
    own = answers.get(name)
    if own is None or len(answers) < 2:
        return None
    shares = []
    for other, theirs in answers.items():
        both = (own >= 0) & (theirs >= 0)
        if other != name and both.any():
            shares.append((own == theirs)[both].mean())
    return float(np.mean(shares)) if shares else None


def _judged(
    name: str,
    labels: Classes,
    said: Asked,
    gold: IntArray,
    price: Price,
    agreement: float | None,
    positive: str | None,
) -> Judged:
    n = len(said.place)
    probabilities = np.exp(_corrected(labels, said.logprobs)) if n else said.logprobs
    own = gold[said.place]
    known = own >= 0
    p, g = probabilities[known], own[known]
    right = p.argmax(axis=1) == g if len(g) else np.zeros(0, bool)
    counts = said.counts
    return Judged(
        name=name,
        scoring=labels.scoring,
        n=n,
        unanswered=len(gold) - n,
        accuracy=Share.of(int(right.sum()), len(g)) if len(g) else None,
        balanced_accuracy=balanced_accuracy(p.argmax(axis=1), g) if len(g) else None,
        auc=_auc(p, g, list(labels.classes), positive) if len(g) else None,
        calibration_error=expected_calibration_error(p, g) if len(g) else None,
        agreement=agreement,
        label_mass=said.label_mass,
        tokens_per_row=(counts.prompt_tokens + counts.output_tokens) / max(n, 1),
        dollars_per_row=dollars(price, counts) / max(n, 1),
        rows_per_s=n / max(counts.replica_seconds, 1e-9),
        refusal=said.refusal,
    )


def _auc(
    probabilities: FloatArray, gold: IntArray, labels: Sequence[str], positive: str | None
) -> float | None:
    n_classes = probabilities.shape[1]
    columns = [0] if n_classes == 2 else range(n_classes)
    if positive is not None:
        columns = [labels.index(positive)]
    areas = [area_under_roc(probabilities[:, c], gold == c) for c in columns]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None

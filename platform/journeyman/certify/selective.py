"""Selective agreement: of the rows that the student answers, at most a share alpha differs.

Owns the exact walk, its level, and the proof, and the sequence that is tested beside it. This risk
is not monotone in the threshold, so the argument for system agreement does not carry over.

The rule. Order the `certify` rows by score and walk from the most confident down. A prefix with e
disagreements and s agreements passes if s >= g(e), for a fixed, never falling g. The loosest
passing prefix that a threshold can cut off wins.

Why it holds. Let B be the thresholds t with P(differs | score > t) > alpha; the promise breaks
only if a t in B passes. Lay the outcomes of one row on a line, worst to best: (differs, score
falling), then (agrees, score rising). For t in B, the share of rows left of the cut (differs,
score > t) is more than alpha * P(score > t), and the share right of the cut (agrees, score > t)
less than (1 - alpha) * P(score > t): exactly the shares of a row with the same distribution of
scores whose difference is an independent coin of probability alpha. Draw row and coin row from one
uniform number by their quantiles along that line. Then, for all t in B at once, the real row
differs above t wherever the coin row does, and agrees above t only where the coin row does. Over n
such pairs E(t) >= E'(t) and S(t) <= S'(t). So if a t in B passes, S'(t) >= S(t) >= g(E(t)) >=
g(E'(t)), and the coin walk passes at some prefix of its rows. The chance of that does not depend
on the scores; dynamic programming gives it exactly, and the level of g is set so that it is at
most delta. The proof needs neither untied scores nor a shape of the risk curve, and it covers every
choice among passing thresholds.

Beside the walk, which pays for its freedom with a lower level, a fixed sequence of thresholds is
tested (`sequences`), each by Clopper-Pearson at the full one: of m rows above a fixed threshold the
disagreements are binomial. The one that `calibrate` rows forecast more of has nine tenths of delta,
the other the tenth that is left, and the looser threshold is taken; by the union bound both hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr

from journeyman.certify.certificate import (
    Certificate,
    allowed_errors,
    check_target,
    rows_needed,
)
from journeyman.certify.sequences import FAVOURED_SHARE, candidates, leading, start_where_clear
from journeyman.certify.thresholds import (
    ESCALATE_EVERYTHING,
    IntArray,
    ThresholdTable,
    threshold_table,
)
from journeyman.errors import DataError, RecipeError
from journeyman.probabilities import FloatArray

_LEVEL_STEPS = 24
_LEAST_LEVEL_SHARE = 1e-4
_WALK_FROM = 0.6  # of the forecast, where that is good enough to go by
_MIN_FORECAST_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """The rule of the walk for some n, alpha and delta.

    Attributes:
        level: nominal level of each prefix's Clopper-Pearson test; 0 if no prefix may pass.
        passes_from: int64[e + 1], shortest prefix that passes with e disagreements, strictly
            rising; a prefix with more disagreements than it has entries never passes.
    """

    level: float
    passes_from: IntArray

    def passing(self, n_accepted: npt.ArrayLike, n_errors: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which prefixes of n_accepted[m] rows with n_errors[m] disagreements pass: bool[m]."""
        never = np.iinfo(np.int64).max
        required = np.append(self.passes_from, never)
        in_table = np.minimum(np.asarray(n_errors, dtype=np.int64), len(self.passes_from))
        return np.asarray(np.asarray(n_accepted) >= required[in_table])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelectiveDesign:
    """What `calibrate` rows decide about the certificate.

    Attributes:
        thresholds: float64[k], those of the sequence, in order, ever looser.
        sequence_share: of delta, for the sequence; the rest is for the walk.
        min_agreements: from which the walk looks; see `certify_selective_agreement`.
        coverage: the forecast, share of rows that the student will be certified to answer.
    """

    thresholds: FloatArray
    sequence_share: float
    min_agreements: int
    coverage: float


def design_selective(
    scores: npt.ArrayLike, differs: npt.ArrayLike, n_certify: int, alpha: float, delta: float
) -> SelectiveDesign:
    """Fix the sequence, and how delta is shared, on `calibrate` rows.

    Args:
        scores: float[n], of the `calibrate` rows, higher is more confident.
        differs: bool[n], of the same rows.
        n_certify: rows that the certificate will have.
        alpha: target.
        delta: allowed chance of a broken promise.
    """
    table = threshold_table(scores, differs)
    if not table.n:
        raise DataError("There are no calibrate rows to forecast from. Give that split some.")
    scale = n_certify / table.n
    n_accepted, n_errors = np.floor(table.n_accepted * scale), np.ceil(table.n_errors * scale)
    at = candidates(table)
    # A forecast of a few rows may round to more errors than rows.
    of_candidates = bdtr(np.minimum(n_errors, n_accepted)[at], n_accepted[at].astype(int), alpha)
    start, passed = start_where_clear(np.asarray(of_candidates), delta)
    by_sequence = float(table.n_accepted[at[start + passed - 1]] / table.n) if passed else 0.0
    walked = np.flatnonzero(selective_walk(n_certify, alpha, delta).passing(n_accepted, n_errors))
    by_walk = float(table.n_accepted[walked[-1]] / table.n) if len(walked) else 0.0
    favoured = by_sequence >= by_walk > 0
    # On few calibrate rows the forecast is too rough to narrow the walk by: the longer prefixes
    # gain 1 to 3 points of coverage from about as many calibrate rows as certify rows.
    narrow = _WALK_FROM * by_walk * n_certify * (1 - alpha)
    return SelectiveDesign(
        thresholds=table.threshold[at[start:]],
        sequence_share=FAVOURED_SHARE if favoured else 1 - FAVOURED_SHARE,
        min_agreements=math.floor(narrow) if table.n >= _MIN_FORECAST_ROWS else 0,
        coverage=max(by_sequence, by_walk),
    )


def certify_selective_agreement(
    scores: npt.ArrayLike,
    differs: npt.ArrayLike,
    alpha: float,
    delta: float,
    design: SelectiveDesign | None = None,
) -> Certificate:
    """Certify P(differs | student answers) <= alpha with confidence 1 - delta.

    Args:
        scores: float[n], of the `certify` rows, higher is more confident.
        differs: bool[n], the student's answer is not the teacher's.
        alpha: target.
        delta: allowed chance of a broken promise.
        design: fixed without a look at `certify` rows, on `calibrate` rows; without one, the walk
            alone at all of delta. Its `min_agreements` leaves more of delta to longer prefixes of
            the walk: those with fewer agreements do not pass. In agreements, not rows, so that g
            still never falls.
    """
    check_target(alpha, delta)
    table = threshold_table(scores, differs)
    level = delta * design.sequence_share if design else 0.0
    walk = selective_walk(table.n, alpha, delta - level, design.min_agreements if design else 0)
    passing = np.flatnonzero(walk.passing(table.n_accepted, table.n_errors))
    threshold = float(table.threshold[passing[-1]]) if len(passing) else ESCALATE_EVERYTHING
    if design:
        threshold = min(threshold, _last_of_sequence(table, design.thresholds, alpha, level))
    chosen = table.index_at(threshold)
    n_accepted = int(table.n_accepted[chosen])
    k_star = int((walk.passes_from <= n_accepted).sum()) - 1
    if level:
        k_star = max(k_star, allowed_errors(n_accepted, alpha, level))
    feasible = n_accepted > 0
    return Certificate(
        kind="selective_agreement",
        alpha=alpha,
        delta=delta,
        n=table.n,
        threshold=threshold if feasible else ESCALATE_EVERYTHING,
        n_accepted=n_accepted,
        errors=int(table.n_errors[chosen]),
        # Both prove alpha for the threshold that they pick, and nothing smaller.
        upper_bound=alpha if feasible else 0.0,
        k_star=k_star,
        feasible=feasible,
        reason="" if feasible else _why_nothing_is_answered(table, walk, alpha, delta),
    )


def _last_of_sequence(
    table: ThresholdTable, thresholds: FloatArray, alpha: float, level: float
) -> float:
    """The last threshold of the sequence before the first that fails; +inf if that is the first."""
    at = np.array([table.index_at(threshold) for threshold in thresholds], dtype=np.int64)
    n_accepted = table.n_accepted[at]
    passed = leading(
        (n_accepted > 0) & (bdtr(table.n_errors[at].astype(float), n_accepted, alpha) <= level)
    )
    return float(thresholds[passed - 1]) if passed else ESCALATE_EVERYTHING


@lru_cache(maxsize=64)
def selective_walk(n: int, alpha: float, delta: float, min_agreements: int = 0) -> Walk:
    """The walk with the highest level whose chance of passing on coin rows is at most delta."""
    check_target(alpha, delta)
    if not 0 <= min_agreements <= n:
        raise RecipeError(
            f"min_agreements is {min_agreements}, expected 0 to {n}, the number of certify rows. "
            "Take it from design_selective."
        )
    best = Walk(level=0.0, passes_from=np.empty(0, dtype=np.int64))
    # The chance rises with the level; bisection over its logarithm, from delta (right where only
    # one prefix is tested) downwards.
    low, high = delta * _LEAST_LEVEL_SHARE, delta
    level = delta
    for _ in range(_LEVEL_STEPS):
        passes_from = _shortest_passing(n, alpha, level, min_agreements)
        if passing_chance(passes_from, n, alpha) <= delta:
            best, low = Walk(level=level, passes_from=passes_from), level
        else:
            high = level
        if low == delta:
            break
        level = math.sqrt(low * high)
    best.passes_from.setflags(write=False)
    return best


def passing_chance(passes_from: IntArray, n: int, alpha: float) -> float:
    """Chance that a walk of n independent coins of probability alpha passes at any prefix.

    Dynamic programming over the number of disagreements among walks that have not passed yet.
    A walk with more of them than `passes_from` has entries never passes and is dropped.
    """
    if not len(passes_from):
        return 0.0
    not_passed = np.zeros(len(passes_from))
    not_passed[0] = 1.0
    chance = 0.0
    n_passing = np.searchsorted(passes_from, np.arange(n + 1), side="right")
    for length in range(1, n + 1):
        moved = not_passed * (1 - alpha)
        moved[1:] += not_passed[:-1] * alpha
        passing = n_passing[length]
        chance += float(moved[:passing].sum())
        moved[:passing] = 0.0
        not_passed = moved
    return chance


def _shortest_passing(n: int, alpha: float, level: float, min_agreements: int) -> IntArray:
    """For e = 0, 1, ...: the least m <= n with BinomCDF(e; m, alpha) <= level: int64[e + 1].

    It rises by one at least from e to e + 1, as BinomCDF(e + 1; m + 1) >= BinomCDF(e; m); so the
    agreements asked for, g(e) = m - e, never fall, with `min_agreements` as their floor or not.
    """
    errors = np.arange(allowed_errors(n, alpha, level) + 1)
    too_short, enough = errors.copy(), np.full(len(errors), n)
    while (enough - too_short > 1).any():
        middle = (too_short + enough) // 2
        passes = bdtr(errors, middle, alpha) <= level
        too_short = np.where(passes, too_short, middle)
        enough = np.where(passes, middle, enough)
    passes_from = np.maximum(enough, errors + min_agreements)
    return np.asarray(passes_from[passes_from <= n])


def _why_nothing_is_answered(table: ThresholdTable, walk: Walk, alpha: float, delta: float) -> str:
    target = f"Selective agreement within {alpha:g} at confidence {1 - delta:g}"
    if not len(walk.passes_from):
        return (
            f"{target} takes at least {rows_needed(alpha, delta)} certify rows, even if none of "
            f"them differs; there are {table.n}. Everything is escalated: label more certify "
            "rows, or raise certify.alpha."
        )
    return (
        f"{target} takes {walk.passes_from[0]} of {table.n} certify rows without a disagreement "
        "at the top, or more rows with some; no threshold reaches that. Everything is escalated: "
        f"label more certify rows (with {walk.passes_from[0]} as the least that a threshold must "
        "accept), train a better student, or raise certify.alpha."
    )

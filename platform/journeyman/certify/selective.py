"""Selective agreement: of the rows that the student answers, at most a share alpha differs.

Owns the exact walk, its level, and the proof. This risk is not monotone in the threshold, so the
argument for system agreement does not carry over.

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
from journeyman.certify.thresholds import IntArray, ThresholdTable, threshold_table
from journeyman.errors import RecipeError

_LEVEL_STEPS = 24
_LEAST_LEVEL_SHARE = 1e-4


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


def certify_selective_agreement(
    scores: npt.ArrayLike,
    differs: npt.ArrayLike,
    alpha: float,
    delta: float,
    min_agreements: int = 0,
) -> Certificate:
    """Certify P(differs | student answers) <= alpha with confidence 1 - delta.

    Args:
        scores: float[n], of the `certify` rows, higher is more confident.
        differs: bool[n], the student's answer is not the teacher's.
        alpha: target.
        delta: allowed chance of a broken promise.
        min_agreements: a prefix with fewer agreements does not pass, which leaves more of delta
            to the longer ones. Fixed without a look at `certify` rows: `design.walk_start` gives
            it from `calibrate` rows. In agreements, not rows, so that g still never falls.
    """
    table = threshold_table(scores, differs)
    walk = selective_walk(table.n, alpha, delta, min_agreements)
    passing = np.flatnonzero(walk.passing(table.n_accepted, table.n_errors))
    chosen = int(passing[-1]) if len(passing) else 0
    n_accepted = int(table.n_accepted[chosen])
    k_star = int((walk.passes_from <= n_accepted).sum()) - 1
    return Certificate(
        kind="selective_agreement",
        alpha=alpha,
        delta=delta,
        n=table.n,
        threshold=float(table.threshold[chosen]),
        n_accepted=n_accepted,
        errors=int(table.n_errors[chosen]),
        # The walk proves alpha for the prefix that it picks, and nothing smaller.
        upper_bound=alpha if chosen > 0 else 0.0,
        k_star=k_star,
        feasible=chosen > 0,
        reason="" if chosen > 0 else _why_nothing_is_answered(table, walk, alpha, delta),
    )


@lru_cache(maxsize=64)
def selective_walk(n: int, alpha: float, delta: float, min_agreements: int = 0) -> Walk:
    """The walk with the highest level whose chance of passing on coin rows is at most delta."""
    check_target(alpha, delta)
    if not 0 <= min_agreements <= n:
        raise RecipeError(
            f"min_agreements is {min_agreements}, expected 0 to {n}, the number of certify rows. "
            "Take it from design.walk_start."
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

"""Accuracy against gold: what the student answers costs at most a share alpha of right answers.

Owns the test of one threshold, its proof, and the sequence of thresholds, which `calibrate` rows
fix. The loss of a row is 1 where the student answers and only the teacher is right, -1 where it
answers and only it is right, else 0; the promise is about its mean, the drop. The drop is not
monotone in the threshold, so the argument for system agreement does not carry over.

The test of one threshold. Let q be the chance of a loss of either sign, and d the drop. Of n rows
L have loss 1 and m a loss of either sign. Let u be the Clopper-Pearson upper bound on q, from m, at
level gamma = delta / 10. The threshold passes if u < alpha (a drop is never more than q) or if
BinomCDF(L; m, 1/2 + alpha / 2u) <= delta - gamma.

Why it holds. Suppose d > alpha. Given m, L is binomial with probability (q + d) / 2q, which is more
than 1/2 + alpha / 2u wherever q <= u; there BinomCDF at that smaller probability is a valid p-value
of L (it is stochastically larger). And q > u has a chance of at most gamma. So the threshold passes
by a chance of at most gamma + (delta - gamma). (Bounding a nuisance first and paying for it: Berger
and Boos 1994.) Compared with a betting test (Waudby-Smith and Ramdas 2024) it does not depend on
the order of the rows, which is not random where a corpus is sorted, and passes more often: with 6%
losses of each sign, n = 500 and alpha = .05, in 83% against 69% of draws.

Several thresholds cost nothing more: they are tested in a fixed sequence, each at the same level,
up to the first that fails. The promise breaks only if the first true violator in it passes.

The losses alone, without the gains to set against them, are monotone: the rule of system agreement
bounds their rate, and with it the drop, from above. Where the student is seldom the one that is
right, that rule answers more, and it has no first step to stumble at. So both are tried, the one
that `calibrate` rows forecast more of at nine tenths of delta, the other at the tenth that is left,
and the looser threshold is taken; by the union bound both hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, betaincinv

from journeyman.certify.certificate import (
    Certificate,
    allowed_errors,
    certify_system_agreement,
    check_target,
    rows_needed,
)
from journeyman.certify.sequences import FAVOURED_SHARE, candidates, leading, start_in_last_run
from journeyman.certify.thresholds import (
    ESCALATE_EVERYTHING,
    ThresholdTable,
    threshold_table,
)
from journeyman.errors import DataError
from journeyman.probabilities import FloatArray

_NUISANCE_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GoldDesign:
    """What `calibrate` rows decide about the certificate against gold.

    Attributes:
        thresholds: float64[k], in the order in which the drop is tested, ever looser.
        net_share: of delta, for that sequence; the rest is for the losses alone.
        coverage: the forecast, share of rows that the student will be certified to answer.
    """

    thresholds: FloatArray
    net_share: float
    coverage: float


def drop_passes(
    n_losses: npt.ArrayLike, n_gains: npt.ArrayLike, n: int, alpha: float, delta: float
) -> npt.NDArray[np.bool_]:
    """Whether n rows prove a drop of at most alpha at level delta: the test above, bool[...].

    Args:
        n_losses: int[...], answered rows that only the teacher gets right.
        n_gains: int[...], answered rows that only the student gets right.
        n: rows in all.
        alpha: target.
        delta: allowed chance to pass a larger drop.
    """
    gamma = _NUISANCE_SHARE * delta
    return np.asarray(_chance_of_as_few(n_losses, n_gains, n, alpha, gamma) <= delta - gamma)


def _chance_of_as_few(
    n_losses: npt.ArrayLike, n_gains: npt.ArrayLike, n: int, alpha: float, gamma: float
) -> FloatArray:
    """Of so few losses beside a larger drop, unless q is above its bound at level gamma.

    float64[...]; 0 where a larger drop cannot be.
    """
    losses = np.asarray(n_losses, dtype=np.int64)
    either = np.asarray(n_gains, dtype=np.int64) + losses
    most = betaincinv(either + 1, np.maximum(n - either, 1), 1 - gamma)
    most = np.where(either < n, most, 1.0)
    chance = bdtr(losses, either, 0.5 + alpha / (2 * np.maximum(most, alpha)))
    return np.where(most < alpha, 0.0, chance)


def design_against_gold(
    scores: npt.ArrayLike, losses: npt.ArrayLike, n_certify: int, alpha: float, delta: float
) -> GoldDesign:
    """Fix the rule and the sequence on `calibrate` rows.

    Args:
        scores: float[n], of the `calibrate` rows with gold, higher is more confident.
        losses: int[n], 1, 0 or -1: the loss of each if the student answers it.
        n_certify: `certify` rows with gold.
        alpha: target.
        delta: allowed chance of a broken promise.
    """
    table, worse, better = _tables(scores, losses)
    if not table.n:
        raise DataError(
            "No calibrate row has a gold label to design the certificate against gold by. Give "
            "that split some, or certify agreement."
        )
    scale = n_certify / table.n
    at = candidates(table)
    n_losses = np.ceil(worse[at] * scale)
    n_gains = np.minimum(np.floor(better[at] * scale), n_certify - n_losses)
    gamma = _NUISANCE_SHARE * delta
    p_values = _chance_of_as_few(n_losses, n_gains, n_certify, alpha, gamma)
    start, passed = start_in_last_run(p_values, delta - gamma)
    net = float(table.n_accepted[at[start + passed - 1]] / table.n) if passed else 0.0
    n_harmless = int((np.ceil(worse * scale) <= allowed_errors(n_certify, alpha, delta)).sum())
    harm = float(table.n_accepted[n_harmless - 1] / table.n) if n_harmless else 0.0
    return GoldDesign(
        thresholds=table.threshold[at[start:]],
        net_share=FAVOURED_SHARE if net >= harm else 1 - FAVOURED_SHARE,
        coverage=max(net, harm),
    )


def certify_accuracy(
    scores: npt.ArrayLike,
    losses: npt.ArrayLike,
    alpha: float,
    delta: float,
    design: GoldDesign,
) -> Certificate:
    """Certify that the cascade is right at most alpha less often than its teacher alone.

    Args:
        scores: float[n], of the `certify` rows with gold, higher is more confident.
        losses: int[n], 1 where only the teacher is right, -1 where only the student is, else 0.
        alpha: target, a share of all rows.
        delta: allowed chance of a broken promise.
        design: from `calibrate` rows; nothing in it may come from these.
    """
    check_target(alpha, delta)
    table, worse, better = _tables(scores, losses)
    level = design.net_share * delta
    net = _last_of_sequence(table, worse, better, design.thresholds, alpha, level)
    harm = certify_system_agreement(scores, np.asarray(losses) > 0, alpha, delta - level).threshold
    threshold = min(net, harm)
    index = table.index_at(threshold)
    feasible = bool(table.n_accepted[index] > 0)
    gains = int(better[index])
    most = max(
        _most_losses(gains, table.n, alpha, level), allowed_errors(table.n, alpha, delta - level)
    )
    return Certificate(
        kind="accuracy",
        alpha=alpha,
        delta=delta,
        n=table.n,
        threshold=threshold if feasible else ESCALATE_EVERYTHING,
        n_accepted=int(table.n_accepted[index]),
        errors=int(worse[index]),
        gains=gains,
        # The test proves alpha, and nothing smaller.
        upper_bound=alpha if feasible else 0.0,
        k_star=most,
        feasible=feasible,
        reason="" if feasible else _why_nothing_is_answered(table, alpha, delta),
    )


def _last_of_sequence(
    table: ThresholdTable,
    worse: FloatArray,
    better: FloatArray,
    thresholds: FloatArray,
    alpha: float,
    level: float,
) -> float:
    """The last threshold of the sequence before the first that fails; +inf if that is the first.

    Between two scores of these rows the calibrate row's own score stands: it is what was tested.
    """
    at = np.array([table.index_at(threshold) for threshold in thresholds], dtype=np.int64)
    passed = leading(drop_passes(worse[at], better[at], table.n, alpha, level))
    return float(thresholds[passed - 1]) if passed else ESCALATE_EVERYTHING


def _tables(
    scores: npt.ArrayLike, losses: npt.ArrayLike
) -> tuple[ThresholdTable, FloatArray, FloatArray]:
    """The thresholds, and how many losses and gains each lets through: float64[m] each."""
    loss_of_row = np.asarray(losses)
    if loss_of_row.dtype.kind not in "iu" or (np.abs(loss_of_row) > 1).any():
        raise DataError(
            f"Losses have type {loss_of_row.dtype}, expected whole numbers: 1 where only the "
            "teacher is right, -1 where only the student is, else 0."
        )
    table = threshold_table(scores, loss_of_row > 0)
    return table, table.n_errors.astype(np.float64), table.accepted_sum(loss_of_row < 0)


def _most_losses(n_gains: int, n: int, alpha: float, delta: float) -> int:
    """The most losses that would have passed beside so many gains; -1 if not even none."""
    # With more losses than these the observed drop itself is above alpha.
    n_losses = np.arange(min(math.ceil(n_gains + alpha * n), n - n_gains) + 1)
    return leading(drop_passes(n_losses, n_gains, n, alpha, delta)) - 1


def _why_nothing_is_answered(table: ThresholdTable, alpha: float, delta: float) -> str:
    target = f"A drop in accuracy of at most {alpha:g} at confidence {1 - delta:g}"
    # What the losses alone need, at their smaller share of delta.
    needed = rows_needed(alpha, (1 - FAVOURED_SHARE) * delta)
    if table.n < needed:
        return (
            f"{target} takes up to {needed} certify rows with gold where student and teacher are "
            f"right on the same rows, and more otherwise; there are {table.n}. Everything is "
            "escalated: collect gold for more certify rows, or raise certify.alpha."
        )
    return (
        f"{target} could not be shown on {table.n} certify rows with gold, not even for the most "
        "confident of them. Everything is escalated: collect gold for more certify and "
        "calibrate rows, train a better student, or raise certify.alpha."
    )

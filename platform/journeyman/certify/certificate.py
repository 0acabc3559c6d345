"""The promise: a threshold, and the finite-sample argument for why it holds.

Owns Clopper-Pearson, the certificate's type, and system agreement; selective agreement and
accuracy against gold are next door. Every statement assumes `certify` rows drawn like the traffic,
independent of each other and of everything that was fitted, and used once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Literal

import numpy.typing as npt
from scipy.special import bdtr, betaincinv

from journeyman.certify.thresholds import ThresholdTable, threshold_table
from journeyman.errors import DataError, RecipeError

GuaranteeKind = Literal["system_agreement", "selective_agreement", "accuracy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A threshold and what it promises.

    Attributes:
        kind: which risk is bounded.
        alpha: the most that risk may be.
        delta: the most that the chance of a broken promise may be, over draws of `certify` rows.
        n: `certify` rows.
        threshold: the student answers strictly above it; +inf escalates, -inf answers everything.
        n_accepted: `certify` rows above it.
        errors: how many of those differ from the teacher; of accuracy, on how many of those only
            the teacher is right.
        upper_bound: what the risk is below with confidence 1 - delta; at most `alpha`. 0 where
            nothing is answered, since then nothing can differ.
        k_star: the most errors that the rule allows, among all n rows (system, accuracy) or among
            the accepted ones (selective); -1 if it does not even allow none.
        feasible: whether the student may answer anything at all.
        reason: if not feasible, why, and how many rows the target needs; else empty.
        gains: of accuracy, on how many accepted rows only the student is right; else 0.
    """

    kind: GuaranteeKind
    alpha: float
    delta: float
    n: int
    threshold: float
    n_accepted: int
    errors: int
    upper_bound: float
    k_star: int
    feasible: bool
    reason: str
    gains: int = 0

    @property
    def coverage(self) -> float:
        """Share of the `certify` rows that the student answers."""
        return self.n_accepted / self.n if self.n else 0.0


def clopper_pearson_upper(errors: float, n: int, delta: float) -> float:
    """Exact upper confidence bound, at level 1 - delta, on a probability seen `errors` times in n.

    The p with BinomCDF(errors; n, p) = delta (Clopper and Pearson 1934), as a beta quantile, which
    lies between those of two whole numbers where errors is a mean of several counts.
    """
    if not 0 <= errors <= n:
        raise DataError(f"{errors} errors in {n} rows cannot be. Count both on the same rows.")
    if errors == n:
        return 1.0
    return float(betaincinv(errors + 1, n - errors, 1 - delta))


def clopper_pearson_interval(count: float, n: int) -> tuple[float, float]:
    """Exact two-sided 95% interval of a probability seen `count` times in n."""
    return 1 - clopper_pearson_upper(n - count, n, 0.025), clopper_pearson_upper(count, n, 0.025)


def rows_needed(alpha: float, delta: float, errors: int = 0) -> int:
    """Fewest rows in which `errors` disagreements prove a risk of at most alpha at 1 - delta.

    With none it is log(delta) / log(1 - alpha), rounded up: 299 at alpha = .01, delta = .05.
    """
    check_target(alpha, delta)
    enough = max(errors, 1)
    while bdtr(errors, enough, alpha) > delta:
        enough *= 2
    return bisect_left(
        range(enough), True, lo=errors + 1, key=lambda n: bool(bdtr(errors, n, alpha) <= delta)
    )


def allowed_errors(n: int, alpha: float, delta: float) -> int:
    """k*: the largest k with BinomCDF(k; n, alpha) <= delta; -1 if even k = 0 is too many."""
    check_target(alpha, delta)
    return bisect_right(range(n), delta, key=lambda k: float(bdtr(k, n, alpha))) - 1


def certify_system_agreement(
    scores: npt.ArrayLike, differs: npt.ArrayLike, alpha: float, delta: float
) -> Certificate:
    """Certify P(student answers and differs from its teacher) <= alpha with confidence 1 - delta.

    The loosest threshold whose Clopper-Pearson bound is at most alpha: with untied scores, accept
    strictly above the (k* + 1)-th highest score among the rows that differ.

    Why a threshold chosen on the same rows may be trusted (risk-controlling prediction sets, Bates
    et al. 2021, for this one loss in a few lines): R(t) = P(score > t, differs) never rises with
    t and is continuous from the right. Let t* be the lowest t with R(t) <= alpha. The promise
    breaks only if the chosen threshold is below t*. Then at most k* of the n rows differ with a
    score of t* or higher, although each does so with probability R(t*-) >= alpha. The chance of
    that is at most BinomCDF(k*; n, alpha) <= delta. Nothing was assumed about ties.

    The upper bound is Clopper-Pearson's at k*, or, where everything is answered, at the observed
    count. That switch is free: if R(-inf) is at most the bound at k*, only the second can fail,
    with probability delta; if it is more, a failure of the second is one of the first.

    Args:
        scores: float[n], of the `certify` rows, higher is more confident.
        differs: bool[n], the student's answer is not the teacher's.
        alpha: target.
        delta: allowed chance of a broken promise.
    """
    table = threshold_table(scores, differs)
    k_star = allowed_errors(table.n, alpha, delta)
    chosen = int((table.n_errors <= k_star).sum()) - 1 if k_star >= 0 else 0
    answers_everything = chosen > 0 and table.n_accepted[chosen] == table.n
    errors = int(table.n_errors[chosen])
    bound = clopper_pearson_upper(errors if answers_everything else max(k_star, 0), table.n, delta)
    return Certificate(
        kind="system_agreement",
        alpha=alpha,
        delta=delta,
        n=table.n,
        threshold=float(table.threshold[chosen]),
        n_accepted=int(table.n_accepted[chosen]),
        errors=errors,
        upper_bound=bound if chosen > 0 else 0.0,
        k_star=k_star,
        feasible=chosen > 0,
        reason="" if chosen > 0 else _why_nothing_is_answered(table, k_star, alpha, delta),
    )


def check_target(alpha: float, delta: float) -> None:
    """Refuse a target that no certificate can mean."""
    for name, value in (("certify.alpha", alpha), ("certify.delta", delta)):
        if not 0 < value < 1:
            raise RecipeError(f"{name} is {value}, expected a number between 0 and 1, such as .05.")


def _why_nothing_is_answered(table: ThresholdTable, k_star: int, alpha: float, delta: float) -> str:
    target = f"System agreement within {alpha:g} at confidence {1 - delta:g}"
    if k_star < 0:
        best = clopper_pearson_upper(0, table.n, delta)
        return (
            f"{target} takes at least {rows_needed(alpha, delta)} certify rows, even if none of "
            f"them differs; there are {table.n}, whose best possible bound is {best:.4f}. "
            "Everything is escalated: label more certify rows, or raise certify.alpha."
        )
    first_accepted, first_errors = int(table.n_accepted[1]), int(table.n_errors[1])
    rate = first_errors / table.n
    if rate < alpha:
        advice = (
            f"at this rate about {_rows_for_rate(rate, alpha, delta)} certify rows are needed: "
            "label more of them"
        )
    else:
        advice = "no number of rows mends that: train a better student"
    return (
        f"{target} allows {k_star} disagreements in {table.n} certify rows, but the most confident "
        f"rows ({first_accepted} with the same score) already hold {first_errors}. Everything is "
        f"escalated; {advice}, or raise certify.alpha."
    )


def _rows_for_rate(rate: float, alpha: float, delta: float) -> int:
    """About how many rows prove alpha where a share `rate` of them differs."""
    n = rows_needed(alpha, delta)
    while allowed_errors(n, alpha, delta) < rate * n:
        n += max(1, n // 50)
    return n

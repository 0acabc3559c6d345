"""How many `certify` rows a target needs, before any row is labeled.

Owns the chance that a threshold with a given true risk will be certified, for each guarantee, by
its own rule; the number of rows that makes this chance large enough follows by search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr
from scipy.stats import binom

from journeyman.certify.accuracy import drop_passes
from journeyman.certify.certificate import GuaranteeKind, allowed_errors, check_target
from journeyman.certify.sequences import FAVOURED_SHARE
from journeyman.errors import RecipeError

# Of a threshold's true risk, as shares of alpha: what a plan shows if no rate is named.
EXPECTED_SHARES = (0.0, 0.25, 0.5, 0.75)
_MOST_ROWS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the threshold is expected to be like that shall be certified.

    Attributes:
        rate: of system agreement, the share of all requests that the student answers otherwise
            than the teacher; of selective agreement, of the requests it answers; of accuracy, the
            share of all requests that it answers wrong and the teacher right.
        gains: of accuracy, the share that it answers right and the teacher wrong.
        coverage: of selective agreement, the share of requests that it answers.
    """

    rate: float
    gains: float = 0.0
    coverage: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("expected", self.rate), ("gains", self.gains)):
            if not 0 <= value < 1:
                raise RecipeError(f"--{name} is {value:g}, expected a share from 0 to 1.")
        if not 0 < self.coverage <= 1 or self.rate + self.gains > 1:
            raise RecipeError(
                f"--coverage is {self.coverage:g}, expected a share above 0, up to 1; --expected "
                f"and --gains are {self.rate + self.gains:g} together, expected at most 1."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRows:
    """An answer: `n` certify rows, among which `errors` are expected; n is None if none do."""

    expected: Expected
    n: int | None
    errors: float


def plan_rows(
    kind: GuaranteeKind, alpha: float, delta: float, expected: Expected, chance: float = 0.9
) -> PlannedRows:
    """About the fewest rows that certify such a threshold in a share `chance` of draws.

    None where the risk is not below alpha, and no number of rows will do.
    """
    check_target(alpha, delta)
    if not 0 < chance < 1:
        raise RecipeError(f"--chance is {chance:g}, expected a share between 0 and 1.")
    n = None
    if expected.rate - expected.gains < alpha:
        n = _fewest(lambda rows: chance_to_certify(kind, alpha, delta, expected, rows), chance)
    share = expected.coverage if kind == "selective_agreement" else 1.0
    return PlannedRows(expected=expected, n=n, errors=(n or 0) * share * expected.rate)


def chance_to_certify(
    kind: GuaranteeKind, alpha: float, delta: float, expected: Expected, n: int
) -> float:
    """The chance that n `certify` rows certify a threshold with the expected rates."""
    if kind == "system_agreement":
        k_star = allowed_errors(n, alpha, delta)
        return float(bdtr(k_star, n, expected.rate)) if k_star >= 0 else 0.0
    if kind == "selective_agreement":
        # By the sequence, begun where calibrate rows have clear evidence.
        accepted = math.floor(expected.coverage * n)
        k_star = allowed_errors(accepted, alpha, FAVOURED_SHARE * delta)
        return float(bdtr(k_star, accepted, expected.rate)) if k_star >= 0 else 0.0
    return _chance_against_gold(alpha, delta, expected, n)


def _chance_against_gold(alpha: float, delta: float, expected: Expected, n: int) -> float:
    """By the test of the drop along its sequence, at nine tenths of delta."""
    level = FAVOURED_SHARE * delta
    either = expected.rate + expected.gains
    middle, spread = n * either, math.sqrt(n * either * (1 - either))
    low, high = max(0, math.floor(middle - 6 * spread)), min(n, math.ceil(middle + 6 * spread))
    counts = np.arange(low, high + 1)
    most_losses = _most_losses(counts, n, alpha, level)
    share = expected.rate / either if either else 0.0
    passing = np.where(most_losses >= 0, binom.cdf(most_losses, counts, share), 0.0)
    return float((binom.pmf(counts, n, either) * passing).sum())


def _most_losses(counts: np.ndarray, n: int, alpha: float, delta: float) -> np.ndarray:
    """Of each count of rows that just one gets right: the most losses that pass, -1 if none."""
    low, high = np.full(len(counts), -1), counts + 1
    while (open_ := high - low > 1).any():
        middle = np.maximum((low + high) // 2, 0)
        passes = drop_passes(middle, counts - np.minimum(middle, counts), n, alpha, delta)
        low, high = np.where(open_ & passes, middle, low), np.where(open_ & ~passes, middle, high)
    return np.asarray(low)


def _fewest(chance_of: Callable[[int], float], chance: float) -> int | None:
    """By doubling and halving; to 2% where it is large, as the chance is jagged in n anyway."""
    high = 8
    while chance_of(high) < chance:
        if high >= _MOST_ROWS:
            return None
        high = min(2 * high, _MOST_ROWS)
    low = high // 2 if high > 8 else 0
    while high - low > (1 if high < 1000 else high // 50):
        middle = (low + high) // 2
        if chance_of(middle) >= chance:
            high = middle
        else:
            low = middle
    return high

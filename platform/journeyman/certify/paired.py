"""Two answerers on the same rows: is one right more often, and by how much?

Of n rows with gold only those count that just one of the two gets right (McNemar 1947).
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import bdtr, ndtri

CLEAR = 0.05  # two-sided: one is called better only on evidence
_APART = 1e-9  # from the estimate, where the score may be 0 / 0


def sign_test(only_one: int, only_other: int) -> float:
    """P(a fair coin splits so many rows at least so unevenly, to either side): exact."""
    tail = float(bdtr(min(only_one, only_other), only_one + only_other, 0.5))
    return min(1.0, 2 * tail)


def is_better(only_one: int, only_other: int) -> bool:
    """Whether the first is right more often, and chance does not explain it."""
    return only_one > only_other and sign_test(only_one, only_other) <= CLEAR


def difference_interval(
    only_one: float, only_other: float, n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Score interval of the first's share of right answers less the other's (Tango 1998, Statistics
    in Medicine 17, equation 14). Counts may be means of several."""
    z2 = float(ndtri((1 + confidence) / 2)) ** 2
    estimate = (only_one - only_other) / n

    def beyond(difference: float) -> float:
        """Above 0 where the score test rejects this difference."""
        b = (2 * n - only_one + only_other) * difference - only_one - only_other
        c = -only_other * difference * (1 - difference)
        # P(only the other is right), at its most likely if the difference is this one.
        other = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = 2 * other + difference * (1 - difference)
        return (only_one - only_other - n * difference) ** 2 - z2 * n * variance

    low = -1.0 if only_other == n else brentq(beyond, -1.0, estimate - _APART)
    high = 1.0 if only_one == n else brentq(beyond, estimate + _APART, 1.0)
    return float(low), float(high)

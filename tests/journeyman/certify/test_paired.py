"""Two answerers on the same rows, against SciPy's tests and a likelihood maximised by number."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, multinomial

from journeyman.certify.paired import difference_interval, is_better, sign_test


@pytest.mark.parametrize(("one", "other"), [(36, 16), (16, 36), (5, 5), (1, 0), (0, 0)])
def test_sign_test_is_scipys(one: int, other: int) -> None:
    expected = binomtest(one, one + other).pvalue if one + other else 1.0
    assert sign_test(one, other) == pytest.approx(expected)


def test_better_worse_and_too_close_exclude_each_other() -> None:
    assert is_better(36, 16) and not is_better(16, 36)
    assert not is_better(10, 8) and not is_better(8, 10) and not is_better(0, 0)
    assert binomtest(20, 28).pvalue < 0.05 < binomtest(19, 27).pvalue
    assert is_better(20, 8) and not is_better(19, 8)


def rejected(only_one: int, only_other: int, n: int, difference: float) -> float:
    """The score statistic in standard deviations; p(only the other is right) by bounded search."""

    def surprise(other: float) -> float:
        p = np.array([other + difference, other, 1 - 2 * other - difference])
        return -float(multinomial.logpmf([only_one, only_other, n - only_one - only_other], n, p))

    span = (max(0.0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9)
    other = minimize_scalar(surprise, bounds=span, method="bounded", options={"xatol": 1e-10}).x
    variance = n * (2 * other + difference - difference**2)
    return float((only_one - only_other - n * difference) / np.sqrt(variance))


@pytest.mark.parametrize("counts", [(36, 16, 400), (9, 16, 86), (3, 1, 30), (0, 7, 50)])
def test_the_interval_ends_where_the_score_test_rejects(counts: tuple[int, int, int]) -> None:
    low, high = difference_interval(*counts)
    assert rejected(*counts, low) == pytest.approx(1.959964, abs=2e-3)
    assert rejected(*counts, high) == pytest.approx(-1.959964, abs=2e-3)
    assert low < (counts[0] - counts[1]) / counts[2] < high


def test_who_is_first_only_turns_the_sign() -> None:
    low, high = difference_interval(36, 16, 400)
    assert difference_interval(16, 36, 400) == pytest.approx((-high, -low))


def test_rows_that_are_all_alike_still_leave_doubt() -> None:
    z2 = 1.959964**2
    assert difference_interval(0, 0, 100) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)))
    low, high = difference_interval(20, 0, 20)
    assert high == 1 and 0.5 < low < 1


def test_the_interval_covers_as_often_as_it_says() -> None:
    n, only_one, only_other = 50, 0.12, 0.05
    counts = np.array([(i, j, n - i - j) for i in range(20) for j in range(14)])
    chances = multinomial.pmf(counts, n, [only_one, only_other, 0.83])
    ends = np.array([difference_interval(int(i), int(j), n) for i, j, _ in counts])
    covers = (ends[:, 0] <= only_one - only_other) & (only_one - only_other <= ends[:, 1])
    assert 0.94 < chances[covers].sum() < 0.98 and chances.sum() > 0.999

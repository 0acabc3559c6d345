"""System agreement: exact bounds, the promise by simulation, ties, and targets out of reach."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from journeyman.certify.certificate import (
    allowed_errors,
    certify_system_agreement,
    clopper_pearson_upper,
    rows_needed,
)
from journeyman.errors import DataError, RecipeError

DELTA = 0.1
DRAWS = 3000


def kept(broken: int, draws: int, delta: float = DELTA) -> bool:
    """The promise stands unless a binomial test at .01 says that it breaks too often."""
    return binomtest(broken, draws, delta, alternative="greater").pvalue > 0.01


def population(overall: float, ties: bool = False, size: int = 20_000):
    """Scores and disagreements of a whole population in which doubt grows towards the end."""
    rng = np.random.default_rng(6)
    rank = (np.arange(size) + 0.5) / size
    chance = overall * 4 * rank**3
    differs = rng.random(size) < chance
    scores = 1 - rank
    return (np.round(scores * 12) / 12 if ties else scores), differs


def true_risk(scores, differs, threshold) -> float:
    return float((differs & (scores > threshold)).mean())


def broken_promises(choose, scores, differs, alpha, n, draws=DRAWS) -> int:
    rng = np.random.default_rng(7)
    broken = 0
    for _ in range(draws):
        rows = rng.integers(0, len(scores), n)
        threshold = choose(scores[rows], differs[rows])
        broken += true_risk(scores, differs, threshold) > alpha
    return broken


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("alpha", "n"), [(0.02, 200), (0.05, 100), (0.05, 1000), (0.1, 300)])
def test_promise_is_kept_as_often_as_promised(alpha, n, ties):
    scores, differs = population(0.2, ties)
    assert differs.mean() > alpha, "answering everything must break the promise"

    def certified(rows, differ):
        return certify_system_agreement(rows, differ, alpha, DELTA).threshold

    assert kept(broken_promises(certified, scores, differs, alpha, n), DRAWS)


@pytest.mark.parametrize("overall", [0.03, 0.0495, 0.0505, 0.06])
def test_upper_bound_holds_as_often_as_promised_even_where_everything_is_answered(overall):
    scores, differs = population(overall)
    rng = np.random.default_rng(8)
    broken = 0
    for _ in range(DRAWS):
        rows = rng.integers(0, len(scores), 300)
        got = certify_system_agreement(scores[rows], differs[rows], 0.05, DELTA)
        broken += true_risk(scores, differs, got.threshold) > got.upper_bound
    assert kept(broken, DRAWS)


@pytest.mark.parametrize(("alpha", "n"), [(0.02, 200), (0.05, 1000), (0.1, 300)])
def test_naive_threshold_breaks_the_promise_in_the_same_simulation(alpha, n):
    scores, differs = population(0.2)

    def naive(rows, differ):
        """Loosest threshold whose observed disagreement is at most alpha."""
        order = np.argsort(-rows)
        too_many = np.flatnonzero(np.cumsum(differ[order]) > alpha * n)
        return rows[order][too_many[0]] if len(too_many) else -math.inf

    broken = broken_promises(naive, scores, differs, alpha, n)
    assert broken / DRAWS > 0.3
    assert not kept(broken, DRAWS)


@pytest.mark.parametrize(("alpha", "n"), [(0.05, 300), (0.05, 2000), (0.1, 300)])
def test_certificate_leaves_little_of_the_risk_unused(alpha, n):
    scores, differs = population(0.2)
    threshold = certify_system_agreement(
        *(x[np.random.default_rng(9).integers(0, len(scores), n)] for x in (scores, differs)),
        alpha,
        DELTA,
    ).threshold
    spread = math.sqrt(alpha * (1 - alpha) / n)
    assert true_risk(scores, differs, threshold) > alpha - 5 * spread


@given(st.integers(1, 3000), st.data(), st.floats(0.001, 0.5))
def test_clopper_pearson_matches_scipy(n, data, delta):
    errors = data.draw(st.integers(0, n))
    got = clopper_pearson_upper(errors, n, delta)
    # A one-sided bound at delta is the upper end of a two-sided interval at 2 delta.
    interval = binomtest(errors, n).proportion_ci(1 - 2 * delta, "exact") if delta < 0.5 else None
    if interval is not None:
        assert got == pytest.approx(interval.high, rel=1e-6)
    expected = 1.0 if errors == n else beta.ppf(1 - delta, errors + 1, n - errors)
    assert got == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 500), st.floats(0.005, 0.5), st.floats(0.001, 0.5))
def test_allowed_errors_is_the_largest_count_whose_bound_meets_the_target(n, alpha, delta):
    k_star = allowed_errors(n, alpha, delta)
    # Where the two are equal, rounding decides.
    assert k_star == -1 or binom.cdf(k_star, n, alpha) <= delta * (1 + 1e-9)
    assert k_star == n - 1 or binom.cdf(k_star + 1, n, alpha) >= delta * (1 - 1e-9)


def test_rows_needed_is_the_number_that_the_design_names():
    assert rows_needed(0.01, 0.05) == 299
    assert rows_needed(0.02, 0.1) == 114


@given(st.floats(0.01, 0.5), st.floats(0.001, 0.5), st.integers(0, 20))
def test_rows_needed_is_the_least_that_allow_so_many_errors(alpha, delta, errors):
    n = rows_needed(alpha, delta, errors)
    assert allowed_errors(n, alpha, delta) >= errors
    assert allowed_errors(n - 1, alpha, delta) < errors
    if errors == 0:
        assert n == pytest.approx(max(1, math.log(delta) / math.log(1 - alpha)), abs=1 + 1e-9)


def test_threshold_is_one_order_statistic_of_the_rows_that_differ():
    rng = np.random.default_rng(10)
    scores, differs = rng.random(400), rng.random(400) < 0.3
    got = certify_system_agreement(scores, differs, 0.1, DELTA)
    of_differing = np.sort(scores[differs])[::-1]
    assert got.threshold == of_differing[got.k_star]
    assert got.errors == got.k_star == allowed_errors(400, 0.1, DELTA)
    assert got.n_accepted == (scores > got.threshold).sum()
    assert got.upper_bound == clopper_pearson_upper(got.k_star, 400, DELTA) <= 0.1
    assert got.feasible and not got.reason


def test_student_that_never_differs_answers_everything():
    got = certify_system_agreement(np.linspace(0, 1, 100), np.zeros(100, bool), 0.05, DELTA)
    assert got.threshold == -math.inf
    assert (got.n_accepted, got.errors, got.coverage) == (100, 0, 1.0)
    assert got.upper_bound == pytest.approx(1 - DELTA ** (1 / 100))


def test_too_few_rows_escalate_everything_and_say_how_many_are_needed():
    got = certify_system_agreement(np.linspace(0, 1, 298), np.zeros(298, bool), 0.01, 0.05)
    assert got.threshold == math.inf
    assert (got.n_accepted, got.errors, got.upper_bound, got.k_star) == (0, 0, 0.0, -1)
    assert not got.feasible
    assert "at least 299 certify rows" in got.reason and "there are 298" in got.reason


def test_one_row_more_is_enough():
    got = certify_system_agreement(np.linspace(0, 1, 299), np.zeros(299, bool), 0.01, 0.05)
    assert got.feasible and got.coverage == 1.0


def test_no_rows_escalate_everything():
    got = certify_system_agreement([], np.zeros(0, bool), 0.05, DELTA)
    assert got.threshold == math.inf and not got.feasible and got.coverage == 0.0
    assert "there are 0" in got.reason


def test_tie_that_holds_too_many_disagreements_escalates_and_names_the_rows_needed():
    differs = np.arange(100) < 4
    got = certify_system_agreement(np.full(100, 0.9), differs, 0.05, DELTA)
    assert got.threshold == math.inf and not got.feasible
    needed = int(got.reason.split("about ")[1].split()[0])
    assert allowed_errors(needed, 0.05, DELTA) >= 0.04 * needed
    hopeless = certify_system_agreement(np.full(100, 0.9), np.arange(100) < 30, 0.05, DELTA)
    assert "no number of rows mends that" in hopeless.reason


def test_tied_rows_are_accepted_together_or_not_at_all():
    scores = np.repeat([0.9, 0.5, 0.1], 50)
    differs = np.zeros(150, bool)
    differs[50:60] = True
    got = certify_system_agreement(scores, differs, 0.05, DELTA)
    assert (got.threshold, got.n_accepted, got.errors) == (0.5, 50, 0)
    assert got.upper_bound == clopper_pearson_upper(got.k_star, 150, DELTA)


rows_with_ties = st.lists(
    st.tuples(st.integers(0, 15).map(lambda x: x / 15) | st.floats(0, 1), st.booleans()),
    min_size=1,
    max_size=80,
)


@settings(deadline=None)
@given(rows_with_ties, st.floats(0.02, 0.6), st.floats(0.02, 0.6))
def test_looser_target_never_lowers_coverage(rows, one, other):
    scores, differs = np.array([s for s, _ in rows]), np.array([d for _, d in rows])
    strict, loose = (
        certify_system_agreement(scores, differs, alpha, DELTA) for alpha in sorted((one, other))
    )
    assert strict.threshold >= loose.threshold
    assert strict.coverage <= loose.coverage
    assert strict.upper_bound <= strict.alpha and loose.upper_bound <= loose.alpha


@given(rows_with_ties, st.randoms(), st.floats(0.02, 0.6))
def test_order_of_rows_does_not_matter(rows, random, alpha):
    one, other = (
        certify_system_agreement([s for s, _ in r], np.array([d for _, d in r]), alpha, DELTA)
        for r in (rows, random.sample(rows, len(rows)))
    )
    assert one == other


@pytest.mark.parametrize(("alpha", "delta"), [(0, 0.1), (1, 0.1), (0.1, 0), (0.1, 1.5)])
def test_target_that_means_nothing_is_refused(alpha, delta):
    with pytest.raises(RecipeError, match="expected a number between 0 and 1"):
        certify_system_agreement([0.5], np.array([True]), alpha, delta)


@pytest.mark.parametrize(
    ("scores", "differs"),
    [
        ([0.5, 0.6], np.array([True])),
        ([0.5], np.array([1])),
        ([math.nan], np.array([True])),
        ([math.inf], np.array([True])),
        ([[0.5]], np.array([[True]])),
    ],
)
def test_rows_that_cannot_be_certified_are_refused(scores, differs):
    with pytest.raises(DataError):
        certify_system_agreement(scores, differs, 0.1, 0.1)


def test_more_errors_than_rows_are_refused():
    with pytest.raises(DataError, match="3 errors in 2 rows"):
        clopper_pearson_upper(3, 2, 0.1)

"""Selective agreement: the walk's chance, and the promise against risk curves made to break it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from journeyman.certify.certificate import clopper_pearson_upper, rows_needed
from journeyman.certify.selective import (
    SelectiveDesign,
    certify_selective_agreement,
    design_selective,
    passing_chance,
    selective_walk,
)
from journeyman.errors import RecipeError

DELTA = 0.1
DRAWS = 2000
ALPHA, N = 0.1, 300
CELLS = 20_000


def constant_cumulative_risk(cumulative: np.ndarray) -> np.ndarray:
    """The chance of each cell that makes the mean over the first k cells cumulative[k - 1]."""
    total = cumulative * np.arange(1, len(cumulative) + 1)
    return np.diff(total, prepend=0.0).clip(0, 1)


RANK = (np.arange(CELLS) + 0.5) / CELLS
# The chance to differ at each share of the population, the most confident first.
ADVERSARIES = {
    "flat, just above": np.full(CELLS, ALPHA * 1.001),
    "bad first, then good": np.where(RANK < 0.3, 0.3, 0.015),
    "good first, then bad": np.where(RANK < 0.3, 0.0, 0.2),
    "worst in the middle": 0.35 * np.exp(-(((RANK - 0.4) / 0.15) ** 2)),
    "mean swings about the target": constant_cumulative_risk(
        ALPHA * (1 + 0.05 * np.sin(40 * RANK))
    ),
    "just above, then falls below": np.where(RANK < 0.5, ALPHA * 1.001, 0.06),
    "just below, then rises above": np.where(RANK < 0.5, ALPHA * 0.98, 0.16),
}


def broken_promises(choose, chance, ties=False, n=N) -> int:
    """Draw rows, let `choose` pick a threshold, and look up the true risk above it."""
    rng = np.random.default_rng(11)
    cumulative = np.cumsum(chance) / np.arange(1, CELLS + 1)
    # With ties 500 cells share a score, and a threshold lies on the border between two groups.
    group = 500 if ties else 1
    broken = 0
    for _ in range(DRAWS):
        cells = rng.integers(0, CELLS, n)
        differs = rng.random(n) < chance[cells]
        threshold = choose(-(cells // group).astype(float), differs)
        n_cells = (
            int(min(max(math.ceil(-threshold) * group, 0), CELLS))
            if (math.isfinite(threshold))
            else (0 if threshold > 0 else CELLS)
        )
        broken += n_cells > 0 and cumulative[n_cells - 1] > ALPHA
    return broken


# What calibrate rows may have said: any start of the walk, any sequence, any share of delta.
EVERY_CELL = -np.arange(200.0, CELLS, 400.0)
DESIGNS = {
    "walk": None,
    "walk from 120 agreements": (0.0, 120, EVERY_CELL),
    "sequence": (0.9, 0, EVERY_CELL[15:]),
    "half and half, and a sequence that leaps": (0.5, 0, EVERY_CELL[[40, 12, 30, 49, 20]]),
}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_promise_is_kept_against_risk_curves_made_to_break_it(name, design):
    made = None
    if DESIGNS[design] is not None:
        share, min_agreements, thresholds = DESIGNS[design]
        made = SelectiveDesign(
            thresholds=thresholds,
            sequence_share=share,
            min_agreements=min_agreements,
            coverage=0.0,
        )

    def certified(scores, differs):
        return certify_selective_agreement(scores, differs, ALPHA, DELTA, made).threshold

    broken = broken_promises(certified, ADVERSARIES[name])
    assert binomtest(broken, DRAWS, DELTA, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize("name", ["flat, just above", "mean swings about the target"])
def test_promise_is_kept_with_ties(name):
    def certified(scores, differs):
        return certify_selective_agreement(scores, differs, ALPHA, DELTA).threshold

    broken = broken_promises(certified, ADVERSARIES[name], ties=True)
    assert binomtest(broken, DRAWS, DELTA, alternative="greater").pvalue > 0.01


def test_sequence_from_calibrate_rows_answers_more_than_the_walk_alone():
    rng = np.random.default_rng(13)
    alone, both = [], []
    for _ in range(100):
        calibrate, certify = (rng.random(n) for n in (200, 500))
        rows = [(-x, rng.random(len(x)) < 0.4 * x**2) for x in (calibrate, certify)]
        design = design_selective(*rows[0], 500, ALPHA, DELTA)
        alone.append(certify_selective_agreement(*rows[1], ALPHA, DELTA).coverage)
        both.append(certify_selective_agreement(*rows[1], ALPHA, DELTA, design).coverage)
    assert np.mean(both) > np.mean(alone) + 0.01


def test_loosest_threshold_whose_bound_passes_breaks_the_promise():
    def loosest_passing(scores, differs):
        order = np.argsort(-scores)
        errors = np.cumsum(differs[order])
        rows = np.arange(1, N + 1)
        passing = np.flatnonzero(binom.cdf(errors, rows, ALPHA) <= DELTA)
        if not len(passing):
            return math.inf
        last = passing[-1]
        return scores[order][last + 1] if last + 1 < N else -math.inf

    assert broken_promises(loosest_passing, ADVERSARIES["flat, just above"]) / DRAWS > 0.2


def chance_by_enumeration(passes_from, n, alpha) -> float:
    total = 0.0
    for coins in itertools.product([0, 1], repeat=n):
        errors = np.cumsum(coins)
        if any(
            errors[m - 1] < len(passes_from) and m >= passes_from[errors[m - 1]]
            for m in range(1, n + 1)
        ):
            total += alpha ** errors[-1] * (1 - alpha) ** (n - errors[-1])
    return total


@pytest.mark.parametrize(
    "passes_from", [[], [1], [3], [3, 4, 5], [2, 5, 9], [5, 6, 10, 11], [1, 2, 3, 4], [11]]
)
def test_passing_chance_matches_enumeration_of_every_walk(passes_from):
    got = passing_chance(np.array(passes_from, dtype=np.int64), 11, 0.3)
    assert got == pytest.approx(chance_by_enumeration(passes_from, 11, 0.3), abs=1e-12)


def test_passing_chance_matches_simulated_coins():
    walk = selective_walk(400, 0.05, DELTA)
    rng = np.random.default_rng(12)
    errors = np.cumsum(rng.random((4000, 400)) < 0.05, axis=1)
    passed = walk.passing(np.arange(1, 401), errors).any(axis=1).sum()
    assert binomtest(int(passed), 4000, passing_chance(walk.passes_from, 400, 0.05)).pvalue > 0.01


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.sampled_from([0.05, 0.1, 0.3]), st.sampled_from([0.05, 0.2]))
def test_walk_spends_at_most_delta_and_asks_for_ever_more_agreements(n, alpha, delta):
    walk = selective_walk(n, alpha, delta, n // 3)
    assert passing_chance(walk.passes_from, n, alpha) <= delta
    agreements = walk.passes_from - np.arange(len(walk.passes_from))
    assert (np.diff(agreements) >= 0).all() and (agreements >= n // 3).all()
    for errors, rows in enumerate(walk.passes_from):
        assert clopper_pearson_upper(errors, int(rows), walk.level) <= alpha * (1 + 1e-9)


def test_walk_uses_nearly_all_of_delta():
    walk = selective_walk(1000, 0.05, DELTA)
    assert passing_chance(walk.passes_from, 1000, 0.05) > 0.99 * DELTA


def test_a_good_student_answers_most_requests_and_the_figures_are_those_of_the_rows():
    rng = np.random.default_rng(13)
    scores = rng.random(1000)
    differs = rng.random(1000) < 0.3 * (1 - scores) ** 2
    got = certify_selective_agreement(scores, differs, 0.05, DELTA)
    accepted = scores > got.threshold
    assert got.feasible and got.coverage > 0.5
    assert (got.n_accepted, got.errors) == (accepted.sum(), (differs & accepted).sum())
    assert got.errors <= got.k_star
    assert got.errors / got.n_accepted < got.upper_bound == 0.05


def test_a_start_from_calibrate_rows_certifies_more():
    rng = np.random.default_rng(14)
    none = np.array([math.inf])  # a sequence of one threshold that nothing is above
    from_120 = SelectiveDesign(
        thresholds=none, sequence_share=0.0, min_agreements=120, coverage=0.0
    )
    gains = []
    for _ in range(200):
        scores = rng.random(500)
        differs = rng.random(500) < 0.3 * (1 - scores) ** 2
        plain, started = (
            certify_selective_agreement(scores, differs, 0.05, DELTA, design).coverage
            for design in (None, from_120)
        )
        gains.append(started - plain)
    assert np.mean(gains) > 0


def test_too_few_rows_escalate_everything_and_say_how_many_are_needed():
    n = rows_needed(0.05, DELTA) - 1
    got = certify_selective_agreement(np.linspace(0, 1, n), np.zeros(n, bool), 0.05, DELTA)
    assert got.threshold == math.inf and not got.feasible and got.k_star == -1
    assert f"at least {n + 1} certify rows" in got.reason and f"there are {n}" in got.reason
    one_more = certify_selective_agreement(
        np.linspace(0, 1, n + 1), np.zeros(n + 1, bool), 0.05, DELTA
    )
    assert one_more.feasible and one_more.coverage == 1.0


def test_student_that_always_differs_escalates_everything():
    got = certify_selective_agreement(np.linspace(0, 1, 500), np.ones(500, bool), 0.05, DELTA)
    assert got.threshold == math.inf and not got.feasible
    assert "of 500 certify rows without a disagreement" in got.reason


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=40, max_size=40), st.randoms()
)
def test_order_of_rows_does_not_matter(rows, random):
    one, other = (
        certify_selective_agreement(
            [float(s) for s, _ in r], np.array([d for _, d in r]), 0.2, DELTA
        )
        for r in (rows, random.sample(rows, len(rows)))
    )
    assert one == other


@pytest.mark.parametrize("min_agreements", [-1, 101])
def test_start_outside_the_rows_is_refused(min_agreements):
    with pytest.raises(RecipeError, match="expected 0 to 100"):
        selective_walk(100, 0.1, 0.1, min_agreements)

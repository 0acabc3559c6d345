"""Accuracy against gold: the test's exact level, and the promise where the drop rises and falls."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest, multinomial

from journeyman.certify.accuracy import certify_accuracy, design_against_gold, drop_passes
from journeyman.certify.certificate import certify_system_agreement
from journeyman.errors import DataError

DELTA = 0.1
DRAWS = 1000
CELLS = 20_000
RANK = (np.arange(CELLS) + 0.5) / CELLS


def by_hand(n_losses: int, n_gains: int, n: int, alpha: float) -> bool:
    """The module's rule, written out with scipy.stats."""
    either = n_losses + n_gains
    most = 1.0 if either == n else beta.ppf(1 - DELTA / 10, either + 1, n - either)
    if most < alpha:
        return True
    return binom.cdf(n_losses, either, 0.5 + alpha / (2 * most)) <= DELTA - DELTA / 10


def test_rule_is_the_one_that_was_proved():
    for n, alpha in [(30, 0.1), (60, 0.05)]:
        for n_losses in range(n + 1):
            for n_gains in range(n - n_losses + 1):
                got = drop_passes(n_losses, n_gains, n, alpha, DELTA)
                assert got == by_hand(n_losses, n_gains, n, alpha), (n_losses, n_gains)


def chance_to_pass(n: int, losing: float, gaining: float, alpha: float) -> float:
    """Sum of the probabilities of every outcome of n rows that passes."""
    outcomes = np.array(
        [(a, b, n - a - b) for a in range(n + 1) for b in range(n - a + 1)], dtype=np.int64
    )
    passing = drop_passes(outcomes[:, 0], outcomes[:, 1], n, alpha, DELTA)
    shares = [losing, gaining, 1 - losing - gaining]
    return float(multinomial.pmf(outcomes[passing], n, shares).sum())


@pytest.mark.parametrize("alpha", [0.02, 0.1])
@pytest.mark.parametrize("gaining", [0.0, 0.01, 0.1, 0.3, 0.44])
def test_a_drop_above_the_target_passes_by_delta_at_most_by_enumeration(alpha, gaining):
    for n in (40, 150):
        assert chance_to_pass(n, gaining + alpha, gaining, alpha) <= DELTA
    assert chance_to_pass(150, gaining + 1.1 * alpha, gaining, alpha) <= DELTA


def test_an_equal_student_passes_more_often_than_by_a_betting_test():
    """Waudby-Smith and Ramdas 2024, with predictable plug-in bets, on the same rows."""
    rng = np.random.default_rng(3)
    n, alpha, draws = 500, 0.05, 400
    uniform = rng.random((draws, n))
    losses = (uniform < 0.06).astype(float) - ((uniform >= 0.06) & (uniform < 0.12))
    seen = np.arange(1, n + 1)
    mean = (np.cumsum(losses, axis=1) - losses) / seen
    spread = (np.cumsum(losses**2, axis=1) - losses**2 + 0.25) / seen - mean**2
    lead = alpha - mean
    bets = np.clip(lead / (spread + lead**2), 0, 0.75 / (1 - alpha))
    capital = np.cumsum(np.log1p(bets * (alpha - losses)), axis=1).max(axis=1)
    by_betting = (capital >= math.log(1 / DELTA)).mean()
    n_losses, n_gains = (losses > 0).sum(axis=1), (losses < 0).sum(axis=1)
    assert drop_passes(n_losses, n_gains, n, alpha, DELTA).mean() > by_betting + 0.05


ALPHA = 0.05
# The chance that only the teacher, and that only the student is right, the most confident first.
POPULATIONS = {
    "student worse where it doubts": (0.3 * RANK**2, 0.06 * RANK),
    "drop just above everywhere": (np.full(CELLS, 0.05 + ALPHA * 1.02), np.full(CELLS, 0.05)),
    "worse in the middle, better at the end": (
        np.where((RANK > 0.2) & (RANK < 0.6), 0.3, 0.02),
        np.where(RANK > 0.6, 0.12, 0.03),
    ),
    "a drop that swings about the target": (
        0.1 + 0.1 * np.sin(25 * RANK),
        np.full(CELLS, 0.03),
    ),
}


def some_losses(name: str, seed: int = 2) -> np.ndarray:
    losing, gaining = POPULATIONS[name]
    uniform = np.random.default_rng(seed).random(CELLS)
    return np.where(uniform < losing, 1, np.where(uniform < losing + gaining, -1, 0))


def n_answered(threshold: float) -> int:
    """Of all cells, whose scores are 0, -1, -2, ...: how many lie above the threshold."""
    if math.isinf(threshold):
        return CELLS if threshold < 0 else 0
    return int(np.clip(math.ceil(-threshold), 0, CELLS))


def draws_of(losses: np.ndarray, choose, draws: int = DRAWS) -> tuple[int, float]:
    """Broken promises, and the mean share answered."""
    rng = np.random.default_rng(4)
    drop = np.concatenate([[0.0], np.cumsum(losses) / CELLS])
    chosen = []
    for _ in range(draws):
        calibrate, certify = rng.integers(0, CELLS, 150), rng.integers(0, CELLS, 300)
        rows = [(-c.astype(float), losses[c]) for c in (calibrate, certify)]
        chosen.append(n_answered(choose(*rows)))
    counts = np.array(chosen)
    return int((drop[counts] > ALPHA).sum()), float(counts.mean() / CELLS)


@pytest.mark.parametrize("net_share", [None, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", POPULATIONS)
def test_promise_is_kept_as_often_as_promised(name, net_share):
    def certified(calibrate, certify):
        design = design_against_gold(*calibrate, len(certify[0]), ALPHA, DELTA)
        design = replace(design, net_share=net_share or design.net_share)
        return certify_accuracy(*certify, ALPHA, DELTA, design).threshold

    broken, _ = draws_of(some_losses(name), certified, DRAWS // 2)
    assert binomtest(broken, DRAWS // 2, DELTA, alternative="greater").pvalue > 0.01


def test_loosest_threshold_whose_observed_drop_is_small_enough_breaks_the_promise():
    def naive(_, certify):
        scores, losses = certify
        order = np.argsort(-scores, kind="stable")
        fine = np.flatnonzero(np.cumsum(losses[order]) <= ALPHA * len(losses))
        ranked = np.append(scores[order], -math.inf)
        return ranked[fine[-1] + 1] if len(fine) else math.inf

    broken, _ = draws_of(some_losses("drop just above everywhere"), naive)
    assert broken / DRAWS > 0.3


def test_a_better_student_answers_everything_where_its_losses_alone_would_not_let_it():
    rng = np.random.default_rng(5)
    scores, uniform = rng.random(700), rng.random(700)
    # As in the demo: where the two differ the student is right in 9% of rows, the teacher in 4%.
    losses = np.where(uniform < 0.04, 1, np.where(uniform < 0.13, -1, 0))
    calibrate, certify = (scores[:200], losses[:200]), (scores[200:], losses[200:])
    design = design_against_gold(*calibrate, 500, 0.02, DELTA)
    got = certify_accuracy(*certify, 0.02, DELTA, design)
    assert design.net_share == 0.9 and design.coverage == 1.0
    assert (got.kind, got.threshold, got.coverage) == ("accuracy", -math.inf, 1.0)
    assert got.errors == (certify[1] > 0).sum() and got.gains == (certify[1] < 0).sum()
    assert got.errors <= got.k_star and got.upper_bound == 0.02
    alone = certify_system_agreement(certify[0], certify[1] > 0, 0.02, DELTA)
    assert alone.coverage < 0.6


def test_the_losses_alone_save_what_the_sequence_loses_at_its_first_step():
    rng = np.random.default_rng(8)
    scores, losses = rng.random(500), (rng.random(500) < 0.02).astype(np.int64)
    losses[scores < 0.3] = (rng.random((scores < 0.3).sum()) < 0.3).astype(np.int64)
    design = design_against_gold(scores, losses, 500, ALPHA, DELTA)
    hopeless = replace(design, thresholds=np.array([-math.inf]))
    got = certify_accuracy(scores, losses, ALPHA, DELTA, hopeless)
    share = (1 - design.net_share) * DELTA
    alone = certify_system_agreement(scores, losses > 0, ALPHA, share)
    assert got.threshold == alone.threshold and got.coverage > 0.5


def test_most_losses_is_the_edge_of_what_passes():
    losses = np.array([1] * 8 + [-1] * 30 + [0] * 262)
    scores = np.random.default_rng(6).random(300)
    design = design_against_gold(scores, losses, 300, ALPHA, DELTA)
    got = certify_accuracy(scores, losses, ALPHA, DELTA, design)
    level = design.net_share * DELTA
    assert drop_passes(got.k_star, got.gains, got.n, ALPHA, level)
    assert not drop_passes(got.k_star + 1, got.gains, got.n, ALPHA, level)


def test_too_few_rows_escalate_everything_and_say_how_many_are_needed():
    design = design_against_gold(np.linspace(0, 1, 40), np.zeros(40, np.int64), 40, 0.05, DELTA)
    got = certify_accuracy(np.linspace(0, 1, 40), np.zeros(40, np.int64), 0.05, DELTA, design)
    assert got.threshold == math.inf and not got.feasible
    assert "up to 90 certify rows with gold" in got.reason and "there are 40" in got.reason
    enough = certify_accuracy(np.linspace(0, 1, 90), np.zeros(90, np.int64), 0.05, DELTA, design)
    assert enough.feasible and enough.coverage == 1.0


def test_a_student_that_only_harms_is_not_let_answer():
    scores, losses = np.repeat([0.3, 0.6], 200), np.ones(400, dtype=np.int64)
    design = design_against_gold(scores, losses, 400, 0.02, DELTA)
    got = certify_accuracy(scores, losses, 0.02, DELTA, design)
    assert got.threshold == math.inf and "not even for the most confident" in got.reason


def test_no_rows_escalate_everything():
    design = design_against_gold([0.5], np.zeros(1, np.int64), 0, 0.02, DELTA)
    assert not certify_accuracy([], np.zeros(0, np.int64), 0.02, DELTA, design).feasible


def test_losses_that_mean_nothing_are_refused():
    with pytest.raises(DataError, match="expected whole numbers"):
        design_against_gold([0.5], np.array([0.5]), 10, 0.1, 0.1)
    with pytest.raises(DataError, match="No calibrate row has a gold label"):
        design_against_gold([], np.zeros(0, np.int64), 10, 0.1, 0.1)

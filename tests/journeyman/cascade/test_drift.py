"""The watch: false alarms by simulation at any time, how soon a broken promise is found, and that
nothing loosens the threshold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from journeyman.cascade.drift import Audit, Watch, population_stability, start_watch
from journeyman.cascade.watching import UNANSWERED
from journeyman.errors import DataError, RecipeError


def by_hand(losses: list[int], alpha: float, largest: float) -> float:
    """Mean over bets of the sum over starts of the product of factors since then."""
    bets = [largest / 2**k for k in range(1, 9)]
    return sum(
        math.prod(1 + bet * (loss - alpha) for loss in losses[start:])
        for bet in bets
        for start in range(len(losses))
    ) / len(bets)


def level(watch: Watch) -> np.ndarray:
    return np.exp(watch.log_detectors).mean(axis=1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=25))
def test_detector_is_the_sum_over_every_start(losses):
    watch = start_watch("system_agreement", 0.1, [0.0])
    for loss in losses:
        watch = watch.audited(Audit(score=1.0, loss=loss))
    assert level(watch)[0] == pytest.approx(by_hand(losses, 0.1, 10.0), rel=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(-1, 1), min_size=1, max_size=25))
def test_detector_against_gold_takes_gains_too(losses):
    watch = start_watch("accuracy", 0.1, [0.0])
    for loss in losses:
        watch = watch.audited(Audit(score=1.0, loss=loss))
    assert level(watch)[0] == pytest.approx(by_hand(losses, 0.1, 1 / 1.1), rel=1e-9)


def first_alarms(alpha: float, risk, n_audits: int, runs: int, bound: float, seed: int = 0):
    """Audits until the alarm of one rung, inf if none came; risk: of the i-th audit."""
    rng = np.random.default_rng(seed)
    bets = (1 / alpha) / 2 ** np.arange(1, 9)
    grown, shrunk = np.log1p(bets * (1 - alpha)), np.log1p(-bets * alpha)
    log_m = np.full((runs, 8), -np.inf)
    alarm = np.full(runs, np.inf)
    for i in range(n_audits):
        wrong = rng.random(runs) < risk(i)
        log_m = np.logaddexp(log_m, 0) + np.where(wrong[:, None], grown, shrunk)
        over = np.logaddexp.reduce(log_m, axis=1) - math.log(8) >= math.log(bound)
        alarm = np.where(over & np.isinf(alarm), i + 1, alarm)
    return alarm


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_false_alarms_are_as_rare_as_promised_however_often_one_looks(alpha):
    n_audits, bound = 3000, 10_000
    alarms = np.isfinite(first_alarms(alpha, lambda _: alpha, n_audits, 1000, bound)).sum()
    assert binomtest(int(alarms), 1000, n_audits / bound, alternative="greater").pvalue > 0.01
    assert alarms < 300


def test_fixed_level_test_that_is_looked_at_again_and_again_cries_wolf():
    rng = np.random.default_rng(1)
    errors = np.cumsum(rng.random((300, 3000)) < 0.1, axis=1)
    audits = np.arange(1, 3001)
    z = (errors - 0.1 * audits) / np.sqrt(0.09 * audits)
    assert (z[:, 50:] > 2.33).any(axis=1).mean() > 0.05 > 0.01  # each look at level .01


@pytest.mark.parametrize(("alpha", "soon"), [(0.05, 600), (0.1, 350)])
def test_a_doubled_risk_is_found_soon_however_long_all_was_well(alpha, soon):
    good = 1500
    found = first_alarms(
        alpha, lambda i: alpha / 2 if i < good else 2 * alpha, good + 2500, 200, 1_000_000
    )
    assert (found > good).all() and np.isfinite(found).all()
    assert np.median(found - good) < soon


def audits(risk_of_score, n: int, seed: int = 2):
    rng = np.random.default_rng(seed)
    for score in rng.random(n):
        yield Audit(score=float(score), loss=int(rng.random() < risk_of_score(score)))


LADDER = [0.2, 0.4, 0.6, 0.8]


def test_threshold_tightens_to_a_rung_that_holds_and_stays_there():
    # All that is wrong lies below .6, so that the third rung keeps the promise.
    watch = start_watch("system_agreement", 0.05, LADDER)
    seen = []
    for audit in audits(lambda score: 0.4 if score < 0.6 else 0.01, 3000):
        watch = watch.audited(audit)
        seen.append(watch.threshold)
    assert (np.diff(seen) >= 0).all()
    assert seen[0] == 0.2 and seen[-1] == 0.6
    assert watch.n_audits == 3000


def test_everything_is_escalated_where_no_rung_holds_and_good_times_loosen_nothing():
    watch = start_watch("selective_agreement", 0.05, LADDER)
    for audit in audits(lambda _: 0.4, 600):
        watch = watch.audited(audit)
    assert watch.threshold == math.inf and watch.rung is None
    for audit in audits(lambda _: 0.0, 2000, seed=3):
        watch = watch.audited(audit)
    assert watch.threshold == math.inf


def test_selective_agreement_is_watched_among_answered_requests_alone():
    watch = start_watch("selective_agreement", 0.1, [0.5])
    before = watch.audited(Audit(score=0.9, loss=1))
    after = before.audited(Audit(score=0.1, loss=1))
    assert (after.log_detectors == before.log_detectors).all() and after.n_audits == 2
    system = start_watch("system_agreement", 0.1, [0.5]).audited(Audit(score=0.1, loss=1))
    assert level(system)[0] < 1  # an escalated request is a good one


def test_a_student_that_gains_against_gold_raises_no_alarm():
    watch = start_watch("accuracy", 0.02, [0.0])
    rng = np.random.default_rng(4)
    for value in rng.random(2000):
        loss = 1 if value < 0.04 else -1 if value < 0.13 else 0
        watch = watch.audited(Audit(score=0.5, loss=loss))
    assert watch.rung == 0


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), max_size=60),
    st.sampled_from(["system_agreement", "selective_agreement", "accuracy"]),
)
def test_threshold_never_falls(rows, kind):
    watch = start_watch(kind, 0.1, LADDER, audits_per_false_alarm=3)
    last = watch.threshold
    for score, loss in rows:
        watch = watch.audited(Audit(score=score, loss=loss))
        assert watch.threshold >= last
        last = watch.threshold


def test_population_stability_by_hand_and_where_a_bin_is_empty():
    p, q = np.array([10.5, 20.5, 30.5]) / 61.5, np.array([30.5, 20.5, 10.5]) / 61.5
    expected = ((q - p) * np.log(q / p)).sum()
    assert population_stability([10, 20, 30], [30, 20, 10]) == pytest.approx(expected)
    assert population_stability([10, 20, 30], [20, 40, 60]) < 0.001
    assert math.isfinite(population_stability([10, 0], [0, 10]))
    with pytest.raises(DataError, match="at least two"):
        population_stability([1], [1])


def test_ladders_and_audits_that_mean_nothing_are_refused():
    for thresholds in ([], [0.5, 0.5], [0.5, 0.4]):
        with pytest.raises(RecipeError, match="must rise"):
            start_watch("system_agreement", 0.1, thresholds)
    with pytest.raises(RecipeError, match="more than 1"):
        start_watch("system_agreement", 0.1, [0.5], audits_per_false_alarm=1)
    with pytest.raises(DataError, match="expected a score"):
        start_watch("system_agreement", 0.1, [0.5]).audited(Audit(score=math.nan, loss=0))


def test_what_the_student_has_no_answer_to_is_an_audit_that_every_rung_escalates():
    watch = start_watch("system_agreement", 0.1, (float("-inf"), 0.5))
    for _ in range(400):
        watch = watch.audited(UNANSWERED)
    assert watch.rung == 0
    wrong = watch.audited(Audit(score=0.9, loss=1))
    assert (wrong.log_detectors > watch.audited(UNANSWERED).log_detectors).all()

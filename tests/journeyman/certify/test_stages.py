"""More than two stages: routing by hand, the promise by simulation, and what a split would cost."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.stages import (
    StagedRows,
    certify_each_stage,
    certify_stages,
    cost_of_rows,
    plan_path,
)
from journeyman.errors import DataError

DELTA = 0.1
COSTS = (1.0, 10.0, 100.0)


def some_rows(n: int, seed: int) -> StagedRows:
    """A small and a larger student that doubt, and differ, on much the same rows."""
    rng = np.random.default_rng(seed)
    hard = rng.random(n)
    scores = 1 - np.clip(hard + 0.1 * rng.normal(size=(2, n)), 0, 1) + 1e-9 * rng.random((2, n))
    differs = rng.random((2, n)) < np.array([[0.5], [0.25]]) * hard**2
    return StagedRows(scores=scores, differs=differs)


def test_routing_errors_and_cost_by_hand():
    rows = StagedRows(
        scores=np.array([[0.9, 0.2, 0.2, 0.5], [0.1, 0.8, 0.3, 0.9]]),
        differs=np.array([[True, True, False, False], [True, False, True, True]]),
    )
    answered_by = rows.answered_by((0.5, 0.5))  # strictly above
    assert answered_by.tolist() == [0, 1, 2, 1]
    assert rows.errors(answered_by) == 2
    assert cost_of_rows(answered_by, COSTS) == (1 + 11 + 111 + 11) / 4
    assert rows.answered_by((math.inf, math.inf)).tolist() == [2] * 4
    assert rows.answered_by((-math.inf, math.inf)).tolist() == [0] * 4


def test_path_only_ever_gets_cheaper_and_ends_with_the_first_stage_alone():
    rows = some_rows(400, 0)
    path = plan_path(rows, COSTS)
    routes = [rows.answered_by(vector) for vector in path]
    assert rows.errors(routes[0]) == 0
    assert (np.diff([rows.errors(route) for route in routes]) > 0).all()
    costs = [cost_of_rows(route, COSTS) for route in routes]
    assert (np.diff(costs) < 0).all() and path[-1, 0] == -math.inf and costs[-1] == 1.0


def test_path_passes_near_the_best_of_all_vectors():
    rows = some_rows(400, 1)
    ladders = [np.concatenate([[math.inf], np.quantile(s, np.linspace(1, 0, 31)), [-math.inf]])
               for s in rows.scores]  # fmt: skip
    allowed = 20
    every = [rows.answered_by(vector) for vector in itertools.product(*ladders)]
    best = min(cost_of_rows(by, COSTS) for by in every if rows.errors(by) <= allowed)
    on_path = [rows.answered_by(vector) for vector in plan_path(rows, COSTS)]
    got = min(cost_of_rows(by, COSTS) for by in on_path if rows.errors(by) <= allowed)
    assert got <= 1.15 * best  # the path's grid is another one


@pytest.mark.parametrize(("alpha", "n"), [(0.05, 300), (0.1, 200)])
def test_promise_is_kept_and_costs_less_than_a_split(alpha, n):
    pool = some_rows(60_000, 2)
    rng = np.random.default_rng(3)
    path = plan_path(some_rows(300, 4), COSTS)
    broken, ours, split = 0, [], []
    for _ in range(300):
        index = rng.integers(0, 60_000, n)
        rows = StagedRows(scores=pool.scores[:, index], differs=pool.differs[:, index])
        got = certify_stages(rows, path, COSTS, alpha, DELTA)
        answered_by = pool.answered_by(got.thresholds)
        broken += pool.errors(answered_by) / 60_000 > alpha
        ours.append(cost_of_rows(answered_by, COSTS))
        parts = certify_each_stage(rows, (alpha / 2, alpha / 2), DELTA)
        by_parts = pool.answered_by([part.threshold for part in parts])
        split.append(cost_of_rows(by_parts, COSTS))
    assert binomtest(broken, 300, DELTA, alternative="greater").pvalue > 0.01
    assert np.mean(ours) < 0.9 * np.mean(split)


def test_cheapest_vector_whose_observed_risk_is_small_enough_breaks_the_promise():
    alpha, n = 0.05, 300
    pool = some_rows(60_000, 2)
    rng = np.random.default_rng(5)
    path = plan_path(some_rows(300, 4), COSTS)
    on_pool = [pool.errors(pool.answered_by(vector)) / 60_000 for vector in path]
    broken = 0
    for _ in range(300):
        index = rng.integers(0, 60_000, n)
        rows = StagedRows(scores=pool.scores[:, index], differs=pool.differs[:, index])
        fine = [i for i, v in enumerate(path) if rows.errors(rows.answered_by(v)) <= alpha * n]
        broken += on_pool[fine[-1]] > alpha
    assert broken / 300 > 0.3


def test_certificate_stops_at_the_first_vector_that_fails():
    rows = some_rows(300, 6)
    path = plan_path(some_rows(300, 7), COSTS)
    got = certify_stages(rows, path, COSTS, 0.05, DELTA)
    counts = [rows.errors(rows.answered_by(vector)) for vector in path]
    failing = [i for i, k in enumerate(counts) if binom.cdf(k, 300, 0.05) > DELTA]
    assert got.thresholds == tuple(path[failing[0] - 1])
    assert got.errors == counts[failing[0] - 1]
    assert sum(got.shares) == pytest.approx(1) and got.feasible and got.upper_bound == 0.05


def test_separate_promises_take_their_share_of_delta():
    rows = some_rows(500, 8)
    for i, part in enumerate(certify_each_stage(rows, (0.05, 0.02), DELTA)):
        alone = certify_system_agreement(
            rows.scores[i], rows.differs[i], (0.05, 0.02)[i], DELTA / 2
        )
        assert part == alone


def test_too_few_rows_send_everything_to_the_teacher():
    got = certify_stages(some_rows(20, 9), plan_path(some_rows(300, 7), COSTS), COSTS, 0.05, DELTA)
    assert got.thresholds == (math.inf, math.inf) and not got.feasible
    assert got.cost == 111.0 and "at least 45" in got.reason


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="for every stage"):
        StagedRows(scores=np.zeros((2, 3)), differs=np.zeros((1, 3), bool))
    with pytest.raises(DataError, match="1 targets for 2 stages"):
        certify_each_stage(some_rows(10, 0), (0.1,), DELTA)

"""The cost-quality curve against a loop over thresholds, and how it is thinned."""

import json
import math

import numpy as np
import pytest

from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.curve import CurvePoint, cost_quality_curve
from journeyman.errors import DataError


def some_rows(n: int = 300, ties: bool = False):
    rng = np.random.default_rng(15)
    scores = rng.random(n)
    if ties:
        scores = np.round(scores, 1)
    student, teacher, gold = (rng.integers(0, 3, n) for _ in range(3))
    return scores, student, teacher, gold


@pytest.mark.parametrize("ties", [False, True])
def test_curve_matches_a_loop_over_thresholds(ties):
    scores, student, teacher, gold = some_rows(ties=ties)
    curve = cost_quality_curve(scores, student != teacher, student == gold, teacher == gold)
    assert len(curve.threshold) == len(set(scores)) + 1
    for i, threshold in enumerate(curve.threshold):
        accepted = scores > threshold
        assert curve.coverage[i] == pytest.approx(accepted.mean())
        differs = (student != teacher) & accepted
        assert curve.system_disagreement[i] == pytest.approx(differs.mean())
        if accepted.any():
            expected = differs.sum() / accepted.sum()
            assert curve.selective_disagreement[i] == pytest.approx(expected)
        answers = np.where(accepted, student, teacher)
        assert curve.cascade_accuracy[i] == pytest.approx((answers == gold).mean())
    assert curve.student_accuracy == pytest.approx((student == gold).mean())
    assert curve.teacher_accuracy == pytest.approx((teacher == gold).mean())


def test_curve_runs_from_escalate_everything_to_answer_everything():
    scores, student, teacher, gold = some_rows()
    curve = cost_quality_curve(scores, student != teacher, student == gold, teacher == gold)
    assert (curve.threshold[0], curve.threshold[-1]) == (math.inf, -math.inf)
    assert (curve.coverage[0], curve.coverage[-1]) == (0.0, 1.0)
    assert np.isnan(curve.selective_disagreement[0])
    assert curve.cascade_accuracy[0] == pytest.approx(curve.teacher_accuracy)
    assert curve.cascade_accuracy[-1] == pytest.approx(curve.student_accuracy)
    assert (np.diff(curve.threshold) < 0).all() and (np.diff(curve.coverage) > 0).all()


@pytest.mark.parametrize("ties", [False, True])
def test_point_at_any_threshold_accepts_the_rows_above_it(ties):
    scores, student, teacher, _ = some_rows(60, ties)
    curve = cost_quality_curve(scores, student != teacher)
    between = (np.unique(scores)[1:] + np.unique(scores)[:-1]) / 2
    for threshold in [*scores, *between, -1.0, 2.0, math.inf, -math.inf]:
        assert curve.at(threshold).coverage == pytest.approx((scores > threshold).mean())


def test_certified_threshold_lies_on_the_curve():
    scores, student, _, _ = some_rows()
    differs = student == 0
    certificate = certify_system_agreement(scores, differs, 0.1, 0.1)
    point = cost_quality_curve(scores, differs).at(certificate.threshold)
    assert point.threshold == certificate.threshold
    assert point.coverage == certificate.coverage
    assert point.system_disagreement == pytest.approx(certificate.errors / certificate.n)


@pytest.mark.parametrize("max_points", [2, 10, 200])
def test_thinned_points_keep_both_ends_and_the_chosen_threshold(max_points):
    scores, student, teacher, _ = some_rows(1000)
    curve = cost_quality_curve(scores, student != teacher)
    chosen = float(np.sort(scores)[123])
    points = curve.to_points(max_points, keep=chosen)
    assert max_points <= len(points) <= max_points + 1
    assert points[0].threshold is None and points[0].coverage == 0
    assert points[-1].coverage == 1
    assert chosen in [p.threshold for p in points]
    assert (np.diff([p.coverage for p in points]) >= 0).all()
    if max_points > 2:
        assert np.diff([p.coverage for p in points]).max() < 1.5 / (max_points - 1)


def test_few_thresholds_are_all_kept():
    scores, student, teacher, _ = some_rows(ties=True)
    curve = cost_quality_curve(scores, student != teacher)
    points = curve.to_points(keep=math.inf)
    assert len(points) == len(curve.threshold)


def test_points_hold_nothing_that_json_lacks():
    scores, student, teacher, _ = some_rows()
    for point in cost_quality_curve(scores, student != teacher).to_points():
        text = json.dumps(point.model_dump(), allow_nan=False)
        assert CurvePoint.model_validate_json(text) == point


def test_curve_without_gold_has_no_accuracy():
    scores, student, teacher, _ = some_rows()
    curve = cost_quality_curve(scores, student != teacher)
    assert curve.cascade_accuracy is curve.student_accuracy is curve.teacher_accuracy is None
    assert curve.to_points()[0].cascade_accuracy is None


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="no rows"):
        cost_quality_curve([], np.zeros(0, bool))
    with pytest.raises(DataError, match="gold for both"):
        cost_quality_curve([0.5], np.array([True]), student_right=np.array([True]))
    with pytest.raises(DataError, match="expected \\(1,\\) bool"):
        cost_quality_curve([0.5], np.array([True]), np.array([1]), np.array([0]))
    with pytest.raises(DataError, match="at least 2"):
        cost_quality_curve([0.5], np.array([True])).to_points(1)

"""The learned score: its fit against SciPy, what it sees, and one row alone as in its batch."""

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.optimize import minimize
from scipy.special import softmax

from journeyman.certify.calibration import Calibrator
from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.confidence import Confidence
from journeyman.certify.deferral_head import (
    DeferralHead,
    class_features,
    cross_fitted,
    fit_deferral_head,
)
from journeyman.certify.scores import score
from journeyman.errors import DataError, RecipeError


def some_rows(n: int = 400, seed: int = 0):
    """Students that are wrong about class 0 far more often than their probabilities say."""
    rng = np.random.default_rng(seed)
    probabilities = softmax(rng.normal(0, 2, (n, 4)), axis=1)
    wrong = rng.random(n) < np.where(probabilities.argmax(axis=1) == 0, 0.5, 0.05)
    return probabilities, wrong


def a_head() -> DeferralHead:
    probabilities, wrong = some_rows()
    return fit_deferral_head(class_features(probabilities), wrong)


def test_features_are_those_of_a_loop_over_rows():
    probabilities, _ = some_rows(50)
    for row, got in zip(probabilities, class_features(probabilities), strict=True):
        first, second = sorted(row, reverse=True)[:2]
        shape = [np.log(first / (1 - first)), np.log(first - second), -(row * np.log(row)).sum()]
        np.testing.assert_allclose(got, [*shape, *np.eye(4)[row.argmax()]], atol=1e-12)


def test_fit_is_the_minimum_of_the_penalised_likelihood():
    probabilities, wrong = some_rows()
    features = class_features(probabilities)
    shape = features[:, :3]
    x = np.hstack([(shape - shape.mean(axis=0)) / shape.std(axis=0), features[:, 3:]])
    y = (~wrong).astype(float)

    def loss(parameters):
        p = 1 / (1 + np.exp(-(x @ parameters[:-1] + parameters[-1])))
        likelihood = (y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
        return -likelihood + (parameters[:-1] ** 2).sum() / 2

    expected = minimize(loss, np.zeros(8), method="BFGS", options={"gtol": 1e-4})
    head = fit_deferral_head(features, wrong)
    got = np.array([*head.weights, head.intercept])
    assert loss(got) == pytest.approx(loss(expected.x), abs=1e-4)
    np.testing.assert_allclose(got, expected.x, atol=0.02)
    p = 1 / (1 + np.exp(-(x @ got[:-1] + got[-1])))
    np.testing.assert_allclose(head.may_answer(features), p, rtol=1e-9)


def test_head_answers_more_where_a_class_is_not_to_be_trusted():
    probabilities, wrong = some_rows(2000, seed=1)
    few, few_wrong = some_rows(400)
    head = fit_deferral_head(class_features(few), few_wrong)
    values = head.may_answer(class_features(probabilities))
    learned = certify_system_agreement(values, wrong, 0.05, 0.1)
    fixed = certify_system_agreement(score(probabilities, "margin"), wrong, 0.05, 0.1)
    assert learned.coverage > fixed.coverage + 0.2


def test_cross_fitted_values_do_not_know_their_own_row():
    rng = np.random.default_rng(2)
    features = class_features(softmax(rng.normal(0, 2, (60, 30)), axis=1))
    wrong = rng.random(60) < 0.5  # nothing to learn
    everyone = np.ones(60, dtype=bool)
    apart = cross_fitted(features, wrong, everyone)
    inside = fit_deferral_head(features, wrong, penalty=0.01).may_answer(features)
    assert abs(np.corrcoef(apart, ~wrong)[0, 1]) < 0.35
    assert np.corrcoef(inside, ~wrong)[0, 1] > 0.6
    flipped = wrong.copy()
    flipped[7] = ~flipped[7]
    assert cross_fitted(features, flipped, everyone)[7] == apart[7]


def test_rows_that_do_not_count_teach_nothing():
    probabilities, wrong = some_rows(100)
    counted = np.arange(100) < 40
    features = class_features(probabilities)
    got = cross_fitted(features, wrong, counted)
    np.testing.assert_array_equal(got, cross_fitted(features, wrong & counted, counted))


@pytest.mark.parametrize("wrong", [np.zeros(50, bool), np.ones(50, bool)])
def test_rows_of_one_kind_still_give_a_head(wrong):
    features = class_features(some_rows(50)[0])
    values = fit_deferral_head(features, wrong).may_answer(features)
    assert np.isfinite(values).all() and ((values > 0.5) == ~wrong).all()


def test_certainty_and_ties_stay_finite():
    extremes = [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4]
    assert np.isfinite(a_head().may_answer(class_features(extremes))).all()


def test_one_row_alone_scores_bit_for_bit_as_in_its_batch():
    confidence = Confidence(
        calibrator=Calibrator(temperature=1.3),
        score="deferral_head",
        head=a_head(),
        class_thresholds=np.array([0.1, -64.0, 0.7, 64.0]),
    )
    logits = np.random.default_rng(3).normal(0, 3, (64, 4)).astype(np.float32)
    together = confidence.of(logits)[1]
    alone = np.concatenate([confidence.of(logits[i : i + 1])[1] for i in range(64)])
    assert together.tobytes() == alone.tobytes()


def test_a_class_threshold_decides_as_it_would_by_itself():
    logits = np.random.default_rng(4).normal(0, 2, (500, 3))
    plain = Confidence(calibrator=Calibrator(), score="margin")
    probabilities, scores = plain.of(logits)
    answers = probabilities.argmax(axis=1)
    # Each threshold is some row's own score: that row is escalated, the next one above is not.
    own = np.array([np.median(scores[answers == c]) for c in range(3)])
    own = np.array([scores[answers == c][np.abs(scores[answers == c] - own[c]).argmin()]
                    for c in range(3)])  # fmt: skip
    shifted = Confidence(calibrator=Calibrator(), score="margin", class_thresholds=own)
    np.testing.assert_array_equal(shifted.of(logits)[1] > 0, scores > own[answers])


def test_head_survives_json_and_refuses_what_it_cannot_score():
    head = a_head()
    assert DeferralHead.model_validate_json(head.model_dump_json()) == head
    with pytest.raises(DataError, match="fitted on 7 features and got 6"):
        head.may_answer(class_features([[0.5, 0.25, 0.25]]))
    with pytest.raises(DataError, match="one for each row"):
        fit_deferral_head(class_features([[0.5, 0.5]]), np.zeros(2, bool))
    with pytest.raises(RecipeError, match="certify again"):
        Confidence(calibrator=Calibrator(), score="deferral_head").of([[0.0, 1.0]])
    with pytest.raises(ValidationError, match="positive"):
        DeferralHead(mean=(0, 0), scale=(1, 0), weights=(1, 1), intercept=0)
    with pytest.raises(ValidationError, match="for each feature"):
        DeferralHead(mean=(0, 0), scale=(1, 1), weights=(1,), intercept=0)

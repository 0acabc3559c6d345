"""The score is picked by certified coverage; what the user is told to do."""

import math

import numpy as np
import pytest
from scipy.special import softmax

from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.design import choose_score, forecast_coverage
from journeyman.certify.metrics import area_under_risk_coverage
from journeyman.certify.recommendation import caveats, recommend, repeated
from journeyman.certify.scores import SCORES, score
from journeyman.certify.selective import certify_selective_agreement, design_selective
from journeyman.certify.sequences import leading, start_in_last_run, start_where_clear
from journeyman.errors import DataError, RecipeError


def some_rows(n: int, seed: int = 16):
    rng = np.random.default_rng(seed)
    scores = rng.random(n)
    return scores, rng.random(n) < 0.3 * (1 - scores) ** 2


def test_forecast_on_as_many_rows_is_the_certified_coverage():
    scores, differs = some_rows(400)
    got = forecast_coverage(scores, differs, 0.05, 0.1, 400)
    assert got == certify_system_agreement(scores, differs, 0.05, 0.1).coverage


def test_forecast_from_few_rows_is_near_what_many_rows_certify():
    forecasts = [forecast_coverage(*some_rows(200, s), 0.05, 0.1, 1000) for s in range(20)]
    certified = [
        certify_system_agreement(*some_rows(1000, 100 + s), 0.05, 0.1).coverage for s in range(20)
    ]
    assert np.mean(forecasts) == pytest.approx(np.mean(certified), abs=0.08)


def test_forecast_of_selective_agreement_is_near_what_many_rows_certify():
    designs = [design_selective(*some_rows(400, s), 1000, 0.05, 0.1) for s in range(20)]
    certified = [
        certify_selective_agreement(*some_rows(1000, 100 + s), 0.05, 0.1, designs[s]).coverage
        for s in range(20)
    ]
    assert np.mean([d.coverage for d in designs]) == pytest.approx(np.mean(certified), abs=0.1)


def test_forecast_says_nothing_is_answered_where_no_rows_would_do():
    scores, differs = some_rows(400)
    assert forecast_coverage(scores, differs, 0.01, 0.05, 298) == 0.0


def some_probabilities() -> np.ndarray:
    return softmax(np.random.default_rng(17).normal(0, 0.5, (2000, 30)), axis=1)


def test_score_is_picked_by_coverage_at_the_target_not_by_area():
    probabilities = some_probabilities()
    names = ("max_probability", "entropy")
    by_top = np.argsort(-score(probabilities, "max_probability"))
    # A few disagreements at the very top by max probability, which the target allows and the area
    # weighs most, and all others at its very end.
    differs = np.zeros(2000, bool)
    differs[by_top[:25]] = differs[by_top[-100:]] = True
    areas = {n: area_under_risk_coverage(score(probabilities, n), differs) for n in names}
    certified = {
        n: certify_system_agreement(score(probabilities, n), differs, 0.02, 0.1).coverage
        for n in names
    }
    assert areas["entropy"] < areas["max_probability"]
    assert certified["entropy"] < certified["max_probability"]
    scores = {name: score(probabilities, name) for name in names}
    got = choose_score(
        scores, differs, lambda values: forecast_coverage(values, differs, 0.02, 0.1, 2000)
    )
    assert got.name == "max_probability"
    assert got.coverage == certified["max_probability"] and got.coverages == certified


def test_equal_forecasts_are_decided_by_the_area():
    probabilities = some_probabilities()
    differs = score(probabilities, "entropy") < np.median(score(probabilities, "entropy"))
    # Too few certify rows for any score: all forecasts are zero.
    scores = {name: score(probabilities, name) for name in SCORES}
    got = choose_score(
        scores, differs, lambda values: forecast_coverage(values, differs, 0.01, 0.05, 10)
    )
    assert set(got.coverages.values()) == {0.0}
    assert got.name == "entropy"


def test_sequence_starts_with_the_strictest_candidate_that_has_clear_evidence():
    p_values = np.array([0.2, 0.05, 0.0009, 0.5, 0.0001, 0.05, 0.3, 0.9])
    assert start_where_clear(p_values, 0.1) == (2, 4)
    assert start_where_clear(p_values, 0.00001) == (0, 0)
    assert start_where_clear(np.array([0.5, 0.05, 0.03, 0.03, 0.08]), 0.1) == (2, 3)


def test_sequence_against_gold_starts_beyond_the_last_failure():
    p_values = np.array([0.0, 0.5, 0.08, 0.009, 0.002, 0.05, 0.3, 0.9])
    assert start_in_last_run(p_values, 0.1) == (4, 2)
    assert start_in_last_run(p_values + 0.5, 0.1) == (0, 0)
    assert start_in_last_run(np.zeros(4), 0.1) == (3, 1)  # the loosest among equals


def test_a_sequence_ends_before_its_first_failure():
    assert leading(np.array([True, True, False, True])) == 2
    assert leading(np.array([True, True])) == 2


def test_walk_is_narrowed_by_many_calibrate_rows_alone():
    assert design_selective(*some_rows(999), 1000, 0.1, 0.1).min_agreements == 0
    narrowed = design_selective(*some_rows(1000), 1000, 0.1, 0.1)
    assert 300 < narrowed.min_agreements < 0.6 * 1000 * 0.9


def test_nothing_to_pick_from_is_refused():
    with pytest.raises(RecipeError, match="No confidence score"):
        choose_score({}, np.array([True]), lambda _: 0.0)
    with pytest.raises(DataError, match="no calibrate rows"):
        forecast_coverage([], np.zeros(0, bool), 0.1, 0.1, 100)


def right(n_both: int, n_student: int, n_teacher: int) -> tuple[np.ndarray, np.ndarray]:
    student = np.repeat([True, True, False], [n_both, n_student, n_teacher])
    return student, np.repeat([True, False, True], [n_both, n_student, n_teacher])


def test_user_is_told_where_the_student_is_better_than_its_teacher():
    certificate = certify_system_agreement(*some_rows(500), 0.05, 0.1)
    text = recommend(certificate, *right(435, 45, 20))
    assert "the student is better than its teacher: 0.960 against the teacher's 0.910" in text
    assert "wrong promise" in text and "serve the student alone" in text


def test_user_is_told_where_escalation_pays_and_where_nobody_can_tell():
    certificate = certify_system_agreement(*some_rows(500), 0.05, 0.1)
    assert "escalation pays" in recommend(certificate, *right(435, 20, 45))
    assert "too close to tell" in recommend(certificate, *right(435, 34, 31))
    assert "no gold" in recommend(certificate)
    assert f"answer {certificate.coverage:.1%} of requests" in recommend(certificate)


def test_user_is_told_what_rows_of_few_groups_and_earlier_uses_are_worth():
    certificate = certify_system_agreement(*some_rows(500), 0.05, 0.1)
    assert caveats(certificate, 0.1, None) == "" == caveats(certificate, 0.1, 500)
    assert "holds together with confidence 0.7." in caveats(certificate, 0.3, None)
    assert "The 500 certify rows are of 9 groups" in caveats(certificate, 0.1, 9)


def test_user_is_told_that_the_promise_counts_repeated_texts_once():
    scores, differs = np.arange(100.0), np.zeros(100, dtype=bool)
    differs[[5, 99]] = True
    certificate = certify_system_agreement(scores, differs, 0.1, 0.1)
    assert certificate.threshold < 5
    assert repeated(certificate, np.ones(100), scores, differs) == ""
    counts = np.ones(100)
    counts[99] = 101  # the text that is answered otherwise is half of all requests
    said = repeated(certificate, counts, scores, differs)
    assert "The 100 certify rows are distinct texts, which stood 200 times" in said
    assert "counts each text once" in said
    assert f"without any bound, {102 / 200:.2%} are answered otherwise, in place of 2.00%" in said
    nothing = certify_system_agreement(*some_rows(50), 0.01, 0.05)
    assert repeated(nothing, [2] * 50, *some_rows(50)).endswith("the share of requests (by these "
        "counts, without any bound, 0.00% are answered otherwise, in place of 0.00%).")  # fmt: skip


def test_user_is_told_why_everything_is_escalated():
    certificate = certify_system_agreement(*some_rows(50), 0.01, 0.05)
    assert certificate.threshold == math.inf
    text = recommend(certificate)
    assert text.startswith("Escalate everything") and "299 certify rows" in text

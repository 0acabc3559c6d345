"""The words follow the numbers: who is better, what is promised, what came of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from journeyman.certify.bundle import Guarantee, PolicyBundle
from journeyman.certify.paired import difference_interval
from journeyman.report.data import TestRows
from journeyman.report.measure import (
    Measured,
    chance_of_as_many,
    chance_of_drop,
    measure,
)
from journeyman.report.verdict import beside_teacher, realised_of_each, verdict
from tests.journeyman.report.synthetic import report_data

BUNDLE = report_data().bundle


def rows(gold: list[int], teacher: list[int], student: list[int], accepted: list[int]) -> TestRows:
    """Test rows from answers: two labels, every answer given with probability .9."""
    sure = np.array([[0.9, 0.1], [0.1, 0.9]])
    return TestRows(
        ids=[f"{i}" for i in range(len(gold))],
        texts=["text"] * len(gold),
        gold=np.array(gold),
        teacher=sure[teacher],
        student=sure[student],
        confidence=np.array(accepted, dtype=float),
        accepted=np.array(accepted, dtype=bool),
    )


def outcome(only_student: int, only_teacher: int, both: int, accepted: bool = False) -> Measured:
    """Rows right by the student alone, by the teacher alone, by both; all accepted or none."""
    n = only_student + only_teacher + both
    teacher = [0] * only_student + [1] * (only_teacher + both)
    student = [1] * only_student + [0] * only_teacher + [1] * both
    return measure(rows([1] * n, teacher, student, [int(accepted)] * n))


def test_outcome_counts_by_hand() -> None:
    seen = measure(
        rows(
            gold=[1, 1, 0, 0, -1],
            teacher=[1, 0, 0, 1, 1],
            student=[1, 1, 1, 1, 0],
            accepted=[1, 1, 0, 0, 1],
        )
    )
    assert (seen.n, seen.n_accepted, seen.n_differs, seen.n_accepted_differs) == (5, 3, 3, 2)
    assert seen.gold is not None
    assert (seen.gold.n, seen.gold.teacher, seen.gold.student, seen.gold.cascade) == (4, 2, 2, 3)
    assert (seen.gold.only_student, seen.gold.only_teacher) == (1, 1)


def test_sign_test_and_binomial_test_match_scipy() -> None:
    gold = outcome(36, 16, 300).gold
    assert gold is not None
    assert gold.chance == pytest.approx(binomtest(16, 52, 0.5).pvalue)
    assert chance_of_as_many(60, 400, 0.1) == pytest.approx(
        binomtest(60, 400, 0.1, "greater").pvalue
    )
    assert chance_of_as_many(0, 400, 0.1) == 1


def test_better_student_is_told_that_agreement_is_the_wrong_promise() -> None:
    said = verdict(outcome(36, 16, 348), BUNDLE)
    assert "student is better" in said.headline
    assert said.warning is not None
    assert "Escalation lowers accuracy" in said.warning[0]
    assert "Agreement with the teacher is the wrong promise" in said.warning[1]
    assert "Recommended" in said.warning[1]
    assert "96.0%" in said.warning[1] and "91.0%" in said.warning[1]


def test_where_the_cascade_beats_both_escalation_is_not_blamed() -> None:
    seen = outcome(36, 16, 348)
    assert seen.gold is not None
    best = replace(seen, gold=replace(seen.gold, cascade=seen.gold.student + 5))
    warning = verdict(best, BUNDLE).warning
    assert warning is not None
    assert "lowers accuracy" not in warning[0] + warning[1]
    assert "keep escalating" in warning[1]


def test_where_the_student_answers_everything_there_is_no_escalation_to_blame() -> None:
    warning = verdict(outcome(36, 16, 348, accepted=True), BUNDLE).warning
    assert warning is not None
    assert "Agreement is the wrong promise" in warning[0]
    assert "stop paying" not in warning[1] and "certify against gold" in warning[1]


def test_a_lead_has_an_interval_and_a_word():
    for counts, word in (((36, 16), "better"), ((16, 36), "worse"), ((10, 8), "too close to tell")):
        gold = outcome(*counts, 400 - sum(counts)).gold
        assert gold is not None
        low, high = difference_interval(*counts, 400)
        lead = (counts[0] - counts[1]) / 400
        assert beside_teacher(gold) == f"{lead:+.1%} ({low:+.1%} to {high:+.1%}), {word}"
        said = " ".join(verdict(outcome(*counts, 400 - sum(counts)), BUNDLE).sentences)
        assert f"{lead:+.1%}, 95% interval {low:+.1%} to {high:+.1%}" in said


def promised_each(*guarantees: Guarantee) -> PolicyBundle:
    return BUNDLE.model_copy(update={"label_names": ("a", "b"), "class_guarantees": guarantees})


def test_promises_of_single_answers_are_held_against_test_rows():
    own = BUNDLE.guarantees[0]
    seen = measure(
        rows(
            gold=[-1] * 60,
            teacher=[0] * 20 + [1] * 8 + [0] * 32,
            student=[0] * 25 + [1] * 35,
            accepted=[1] * 24 + [0] + [1] * 34 + [0],
        )
    )
    assert [(one.n, one.n_accepted, one.n_differs) for one in seen.by_answer] == [
        (25, 24, 4), (35, 34, 31)
    ]  # fmt: skip
    bundle = promised_each(own, own)
    assert [(label, k, n) for label, _, k, n in realised_of_each(seen, bundle)] == [
        ("b", 31, 35), ("a", 4, 25)
    ]  # fmt: skip
    said = verdict(seen, bundle).sentences[-1]
    assert "0 of 2 are within their promise on test; the worst is b, 88.6% (31 of 35)" in said
    assert "do not rely on" in said
    escalated = own.model_copy(update={"feasible": False, "threshold": None, "reason": "too few"})
    said = verdict(seen, promised_each(own, escalated)).sentences[-1]
    assert "the worst is a, 16.0% (4 of 25): no more than comes by chance" in said
    of_answered = own.model_copy(update={"kind": "selective_agreement"})
    assert realised_of_each(seen, promised_each(of_answered, escalated))[0][2:] == (4, 24)
    assert realised_of_each(seen, BUNDLE) == ()


def test_a_small_lead_is_called_chance() -> None:
    said = verdict(outcome(10, 8, 382), BUNDLE)
    assert "cannot be told apart" in said.headline
    assert said.warning is not None and "may be" in said.warning[0]


def test_better_teacher_gives_no_warning() -> None:
    said = verdict(outcome(5, 40, 355), BUNDLE)
    assert "teacher is better" in said.headline
    assert said.warning is None


def test_realised_risk_is_doubted_only_beyond_chance() -> None:
    plain = replace(outcome(0, 0, 400), n_accepted=300)

    def realised(errors: int) -> str:
        return verdict(replace(plain, n_accepted_differs=errors), BUNDLE).sentences[-1]

    assert realised(40).endswith("within the promise.")
    assert "no sign that the promise is broken" in realised(48)
    assert "Do not rely on the promise" in realised(60)


def test_the_promise_names_rate_confidence_and_rows() -> None:
    said = " ".join(verdict(outcome(0, 0, 400), BUNDLE).sentences)
    assert "at most 10% of all requests" in said
    assert "90% confidence" in said
    assert "500 certify rows" in said
    selective = report_data(kind="selective_agreement").bundle
    said = " ".join(verdict(outcome(0, 0, 400), selective).sentences)
    assert "at most 10% of the requests that the student answers" in said


GOLD_BUNDLE = report_data(kind="accuracy").bundle


def test_the_promise_against_gold_names_what_it_costs_and_what_came_of_it() -> None:
    said = " ".join(verdict(outcome(5, 25, 370, accepted=True), GOLD_BUNDLE).sentences)
    assert "right on at most 10% of all requests fewer than its teacher alone" in said
    guarantee = next(g for g in GOLD_BUNDLE.guarantees if g.kind == "accuracy")
    assert f"on {guarantee.errors:,} of them only the teacher is right" in said
    assert "on 5.0% of the rows fewer than the teacher, within the promise" in said
    better = verdict(outcome(30, 5, 365, accepted=True), GOLD_BUNDLE).sentences[-1]
    assert "on 6.2% of the rows more than the teacher, within the promise" in better


def test_a_drop_is_doubted_only_beyond_chance() -> None:
    def realised(only_teacher: int) -> str:
        seen = outcome(0, only_teacher, 400 - only_teacher, accepted=True)
        return verdict(seen, GOLD_BUNDLE).sentences[-1]

    # Where only the teacher is ever better, a drop of exactly alpha makes every such row a loss.
    assert "within the promise" in realised(40)
    mixed = verdict(outcome(60, 110, 230, accepted=True), GOLD_BUNDLE).sentences[-1]
    assert "no sign that the promise is broken" in mixed
    broken = verdict(outcome(60, 160, 180, accepted=True), GOLD_BUNDLE).sentences[-1]
    assert "Do not rely on the promise" in broken


def test_chance_of_a_drop_matches_scipy() -> None:
    gold = outcome(30, 80, 290, accepted=True).gold
    assert gold is not None
    p = 0.5 + 0.1 * 400 / (2 * 110)
    assert chance_of_drop(gold, 0.1) == pytest.approx(binomtest(80, 110, p, "greater").pvalue)
    escalated = outcome(30, 80, 290).gold
    assert escalated is not None and chance_of_drop(escalated, 0.1) == 1.0


def test_a_better_student_under_the_promise_against_gold_gets_no_lecture_on_agreement() -> None:
    assert verdict(outcome(36, 16, 348, accepted=True), GOLD_BUNDLE).warning is None
    warning = verdict(outcome(36, 16, 348), GOLD_BUNDLE).warning
    assert warning is not None and warning[0] == "Escalation lowers accuracy"
    assert "Agreement" not in warning[1]


def test_what_is_certified_beside_the_served_promise_is_said() -> None:
    said = verdict(outcome(36, 16, 348), BUNDLE).sentences
    beside = [s for s in said if s.startswith("Certified beside it")]
    assert len(beside) == 2 and "against gold" in beside[1]

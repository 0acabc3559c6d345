"""The policy decides as the bundle says: against a plain loop over Python floats."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from journeyman.cascade.policy import Decision, Escalation, Policy, student_answers
from journeyman.certify.calibration import Calibrator
from journeyman.certify.confidence import Confidence
from journeyman.certify.mixture import Mixture
from journeyman.errors import DataError

LABELS = ("banking", "travel", "kitchen & dining")


def a_policy(temperature=1.0, score="margin", accept_above=0.5, prior=None) -> Policy:
    return Policy(
        label_names=LABELS,
        confidence=Confidence(calibrator=Calibrator(temperature=temperature), score=score),
        accept_above=accept_above,
        teacher_log_prior=prior,
    )


def softmax(values: list[float], temperature: float) -> list[float]:
    highest = max(values)
    powers = [math.exp((v - highest) / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def confidence_of(probabilities: list[float], score: str) -> float:
    first, second, *_ = sorted(probabilities, reverse=True)
    if score == "margin":
        return first - second
    if score == "max_probability":
        return first
    return sum(p * math.log(p) for p in probabilities if p > 0)


logits = st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3)


@given(
    rows=st.lists(logits, max_size=8),
    temperature=st.floats(0.1, 10),
    score=st.sampled_from(["margin", "max_probability", "entropy"]),
    threshold=st.floats(-1.2, 1.1),
)
def test_a_text_is_accepted_where_its_calibrated_score_is_above_the_threshold(
    rows, temperature, score, threshold
):
    policy = a_policy(temperature, score, threshold)
    decisions = policy.decide_batch(np.array(rows, dtype=np.float32).reshape(-1, 3))
    assert len(decisions) == len(rows)
    for row, decision in zip(rows, decisions, strict=True):
        probabilities = softmax(row, temperature)
        confidence = confidence_of(probabilities, score)
        [answer] = student_answers([decision])
        assert answer.probabilities == pytest.approx(probabilities, abs=1e-6)
        assert answer.confidence == pytest.approx(confidence, abs=1e-6)
        assert probabilities[LABELS.index(answer.label)] == pytest.approx(max(probabilities))
        assert answer.answered_by == "student"
        if abs(confidence - threshold) > 1e-6:
            assert isinstance(decision, Decision) == (confidence > threshold)


@given(rows=st.lists(logits, min_size=1, max_size=8))
def test_a_text_is_decided_alone_as_in_a_batch_to_the_last_bit(rows):
    policy = a_policy(1.7)
    matrix = np.array(rows, dtype=np.float32)
    for row, together in zip(matrix, policy.decide_batch(matrix), strict=True):
        alone = policy.decide(row)
        assert type(alone) is type(together)
        [a], [b] = student_answers([alone]), student_answers([together])
        assert a.confidence == b.confidence and (a.probabilities == b.probabilities).all()


def test_the_threshold_itself_is_escalated():
    row = np.array([2.0, 1.0, 0.0])
    [answer] = student_answers([a_policy().decide(row)])
    assert isinstance(a_policy(accept_above=answer.confidence).decide(row), Escalation)
    below = float(np.nextafter(answer.confidence, -1))
    assert isinstance(a_policy(accept_above=below).decide(row), Decision)


def test_without_a_threshold_everything_is_escalated():
    decisions = a_policy(accept_above=math.inf).decide_batch(np.eye(3) * 1000)
    assert all(isinstance(decision, Escalation) for decision in decisions)


def test_the_teachers_prior_is_taken_out_of_its_answer():
    logprobs = np.log([0.6, 0.3, 0.1])
    plain = a_policy().teacher_decision(logprobs)
    assert (plain.label, plain.confidence) == ("banking", None)
    assert plain.probabilities == pytest.approx([0.6, 0.3, 0.1])
    [student] = student_answers([a_policy().decide([0.0, 2.0, 0.0])])
    corrected = a_policy(prior=np.log([0.8, 0.1, 0.1])).teacher_decision(logprobs, student)
    assert corrected.probabilities == pytest.approx(np.array([0.75, 3, 1]) / 4.75)
    assert (corrected.label, corrected.confidence) == ("travel", student.confidence)
    assert corrected.answered_by == "teacher"


def test_an_escalated_text_is_answered_with_both_opinions_where_the_bundle_mixes():
    mixture = Mixture(student_weight=0.25, student_temperature=1.0, teacher_temperature=2.0)
    policy = replace(a_policy(), mixture=mixture)
    [student] = student_answers([policy.decide([0.0, 0.0, 3.0])])
    teacher = np.array([0.64, 0.09, 0.27])
    squashed = np.sqrt(teacher) / np.sqrt(teacher).sum()
    answer = policy.teacher_decision(np.log(teacher), student)
    assert answer.probabilities == pytest.approx(0.25 * student.probabilities + 0.75 * squashed)
    assert answer.label == policy.label_names[int(np.argmax(answer.probabilities))]
    alone = policy.teacher_decision(np.log(teacher))  # the student was not asked
    assert alone.probabilities == pytest.approx(teacher)


def test_a_student_with_other_labels_is_refused():
    with pytest.raises(DataError, match="4 logits a text, the bundle names 3 labels"):
        a_policy().decide_batch(np.zeros((2, 4)))

"""The rule of students that write, against the means of their log-probabilities by hand."""

import numpy as np
import pytest

from journeyman.cascade.policy import Decision, Escalation, Policy, Written
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify.calibration import Calibrator
from journeyman.certify.confidence import Confidence
from journeyman.certify.sequence_scores import WrittenConfidence
from journeyman.certify.thresholds import ESCALATE_EVERYTHING
from journeyman.teacher.answers import ClassLabels

POLICY = WrittenPolicy(
    confidence=WrittenConfidence(score="mean_logprob"), accept_above=-1.0, same=str.__eq__
)


def wrote(text: str, *logprobs: float) -> Written:
    return Written(
        text=text,
        tokens=tuple(text.split()),
        logprobs=np.array(logprobs),
        finish_reason="stop",
        n_prompt_tokens=3,
        n_output_tokens=len(logprobs),
    )


def test_an_answer_is_accepted_strictly_above_the_threshold():
    sure, just, unsure = POLICY.decide_batch(
        [wrote("it is", -0.5, -0.9), wrote("may be", -1.5, -0.5), wrote("who knows", -3.0, -1.0)]
    )
    assert isinstance(sure, Decision)
    assert (sure.answered_by, sure.label) == ("student", "it is")
    assert sure.confidence == pytest.approx(-0.7)
    assert isinstance(just, Escalation) and isinstance(unsure, Escalation)  # -1 is not above -1
    assert just.student is not None and just.student.confidence == -1.0
    assert unsure.student is not None and unsure.student.label == "who knows"


def test_a_text_without_an_answer_is_the_teachers_whatever_stands_beside_it():
    nothing, empty, sure = POLICY.decide_batch([None, wrote(""), wrote("it is", -0.5, -0.9)])
    assert isinstance(nothing, Escalation) and nothing.student is None
    assert isinstance(empty, Escalation) and empty.student is None
    [alone] = POLICY.decide_batch([wrote("it is", -0.5, -0.9)])
    assert isinstance(sure, Decision) and isinstance(alone, Decision)
    assert sure.confidence == alone.confidence


def test_the_teachers_words_are_the_answer_and_the_students_score_stays_with_it():
    [escalated] = POLICY.decide_batch([wrote("who knows", -3.0, -1.0)])
    assert isinstance(escalated, Escalation)
    answer = POLICY.escalated(wrote("forty two"), escalated.student)
    assert (answer.answered_by, answer.label, answer.confidence) == ("teacher", "forty two", -2.0)
    assert POLICY.escalated(wrote("forty two"), None).confidence is None


def test_a_rule_becomes_stricter_only():
    assert POLICY.tightened(-0.1).accept_above == -0.1
    assert POLICY.tightened(-9.0).accept_above == -1.0
    [held] = POLICY.tightened(ESCALATE_EVERYTHING).decide_batch([wrote("it is", -0.0)])
    assert isinstance(held, Escalation)


def test_words_are_no_classes_and_classes_are_no_words():
    classes = Policy(
        label_names=("no", "yes"),
        confidence=Confidence(calibrator=Calibrator(), score="max_probability"),
        accept_above=0.9,
        teacher_log_prior=None,
    )
    labels = ClassLabels(
        class_logprobs=np.log(np.array([0.5, 0.5], np.float32)), label_mass=None,
        n_prompt_tokens=1, n_output_tokens=1,
    )  # fmt: skip
    assert classes.is_answer(labels) and POLICY.is_answer(wrote("yes", -0.1))
    assert not classes.is_answer(wrote("yes", -0.1)) and not POLICY.is_answer(labels)

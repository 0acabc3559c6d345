"""A promise for each answer: by hand from its parts, and under any mixture of the answers."""

import numpy as np
import pytest
from scipy.stats import binomtest

from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.guarantees import Outcomes, ScoredOutcomes
from journeyman.certify.per_class import certify_each_class
from journeyman.certify.selective import certify_selective_agreement, design_selective

DELTA = 0.1


def scored(scores: np.ndarray, differs: np.ndarray) -> ScoredOutcomes:
    outcomes = Outcomes(
        differs=differs,
        losses=np.zeros(len(differs), dtype=np.int64),
        has_gold=np.zeros(len(differs), dtype=bool),
    )
    return ScoredOutcomes(scores=scores, outcomes=outcomes)


def some_rows(rng: np.random.Generator, n: int, shares=(0.5, 0.3, 0.2)):
    """Answers, scores and disagreements; answer 2 is wrong five times as often as answer 0."""
    answers = rng.choice(3, n, p=shares)
    scores = rng.random(n)
    differs = rng.random(n) < np.array([0.1, 0.2, 0.5])[answers] * 2 * (1 - scores)
    return answers, scores, differs


def certified(kind, rng, n=600, alpha=0.1):
    answers, scores, differs = some_rows(rng, n)
    rows = (answers, scored(scores, differs))
    return certify_each_class(kind, rows, rows, 3, alpha, DELTA), answers, scores, differs


def selective_alone(scores, differs, alpha, delta):
    design = design_selective(scores, differs, len(scores), alpha, delta)
    return certify_selective_agreement(scores, differs, alpha, delta, design)


@pytest.mark.parametrize(
    ("kind", "alone", "alpha"),
    [
        ("system_agreement", certify_system_agreement, 0.1),
        ("selective_agreement", selective_alone, 0.3),
    ],
)
def test_each_class_is_certified_on_its_own_rows_at_its_share_of_delta(kind, alone, alpha):
    got, answers, scores, differs = certified(kind, np.random.default_rng(0), alpha=alpha)
    for answer, certificate in enumerate(got.each):
        rows = answers == answer
        assert certificate == alone(scores[rows], differs[rows], alpha, DELTA / 3)
    accepted = scores - got.thresholds[answers] > 0
    assert got.together.threshold == 0.0 and got.together.n == 600
    assert got.together.n_accepted == accepted.sum()
    assert got.together.errors == (accepted & differs).sum()
    assert got.together.upper_bound == max(c.upper_bound for c in got.each) <= alpha


def test_promise_holds_for_every_mixture_of_answers_where_one_threshold_breaks_it():
    rng = np.random.default_rng(1)
    pool = some_rows(np.random.default_rng(2), 60_000, shares=(1 / 3,) * 3)
    of_class = [[x[pool[0] == c] for x in pool[1:]] for c in range(3)]
    broken = broken_by_one = 0
    for _ in range(300):
        got, _, scores, differs = certified("system_agreement", rng, n=400)
        risks = [
            (d & (s > got.thresholds[c])).mean() for c, (s, d) in enumerate(of_class)
        ]  # the worst mixture holds one class alone
        broken += max(risks) > 0.1
        one = certify_system_agreement(scores, differs, 0.1, DELTA).threshold
        broken_by_one += max((d & (s > one)).mean() for s, d in of_class) > 0.1
    assert binomtest(broken, 300, DELTA, alternative="greater").pvalue > 0.01
    assert broken_by_one / 300 > 0.9


def test_a_class_without_enough_rows_is_escalated_and_the_others_are_not():
    rng = np.random.default_rng(3)
    answers, scores, differs = some_rows(rng, 600, shares=(0.9, 0.09, 0.01))
    rows = (answers, scored(scores, differs))
    got = certify_each_class("system_agreement", rows, rows, 3, 0.1, DELTA)
    assert got.each[0].feasible and not got.each[2].feasible
    assert "certify rows" in got.each[2].reason
    assert not (scores - got.thresholds[answers] > 0)[answers == 2].any()
    assert got.together.feasible and got.together.threshold == 0.0


def test_no_class_with_enough_rows_escalates_everything():
    rng = np.random.default_rng(4)
    answers, scores, differs = some_rows(rng, 30)
    rows = (answers, scored(scores, differs))
    got = certify_each_class("system_agreement", rows, rows, 3, 0.01, DELTA).together
    assert got.threshold == np.inf and not got.feasible and "at least" in got.reason

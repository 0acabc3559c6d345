"""Scores of students that write, against NumPy's quantiles and plain counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.deferral_head import fit_deferral_head
from journeyman.certify.sequence_scores import (
    QUANTILES,
    self_consistency,
    token_features,
    token_quantile,
)
from journeyman.errors import DataError

some_answers = st.lists(
    st.lists(st.floats(-30, 0), min_size=1, max_size=12), min_size=1, max_size=8
)


@given(some_answers)
def test_features_are_numpys_quantiles_and_the_length(answers):
    got = token_features(np.concatenate(answers), [len(a) for a in answers])
    for row, answer in zip(got, answers, strict=True):
        np.testing.assert_allclose(row[:-1], np.quantile(answer, QUANTILES), atol=1e-12)
        assert row[-1] == np.log(len(answer))
    lowest = token_quantile(np.concatenate(answers), [len(a) for a in answers], 0.0)
    assert lowest.tolist() == [min(a) for a in answers]


@given(some_answers)
def test_one_answer_alone_scores_bit_for_bit_as_in_its_batch(answers):
    together = token_features(np.concatenate(answers), [len(a) for a in answers])
    alone = np.concatenate([token_features(np.array(a), [len(a)]) for a in answers])
    assert together.tobytes() == alone.tobytes()


def test_a_head_on_quantiles_and_length_answers_more_than_the_mean():
    """Answers are wrong where one token was a guess, however sure and many the others were."""
    rng = np.random.default_rng(0)

    def rows(n):
        lengths = rng.integers(5, 60, n)
        wrong = rng.random(n) < 0.15
        logprobs = -rng.exponential(0.3, lengths.sum())
        guess = np.concatenate(([0], np.cumsum(lengths)[:-1])) + rng.integers(0, lengths)
        logprobs[guess[wrong]] -= 3
        return logprobs, lengths, wrong

    logprobs, lengths, wrong = rows(500)
    head = fit_deferral_head(token_features(logprobs, lengths), wrong)
    logprobs, lengths, wrong = rows(2000)
    mean = np.add.reduceat(logprobs, np.concatenate(([0], np.cumsum(lengths)[:-1]))) / lengths
    learned = head.may_answer(token_features(logprobs, lengths))
    by_head = certify_system_agreement(learned, wrong, 0.03, 0.1).coverage
    by_mean = certify_system_agreement(mean, wrong, 0.03, 0.1).coverage
    assert by_head > by_mean + 0.15


def test_self_consistency_counts_the_samples_that_say_what_the_first_says():
    got = self_consistency([["a", "a", "b", "a"], ["x", "y"], [3, 3, 3]])
    assert got.tolist() == [0.75, 0.5, 1.0]
    with pytest.raises(DataError, match="at least two samples"):
        self_consistency([["a"]])


@pytest.mark.parametrize("lengths", [[2, 2], [3, 0], [4]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(DataError, match="at least one for each"):
        token_features([-1.0, -2.0, -3.0], lengths)

"""Confidence scores against dense references; ties; one row alone scores as in its batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy

from journeyman.certify.scores import SCORES, score
from journeyman.errors import DataError, RecipeError
from journeyman.probabilities import class_probabilities

GRID = 2.0**-24
NAMES = tuple(SCORES)


def some_probabilities(n_rows: int = 300, n_classes: int = 5, scale: float = 3.0) -> np.ndarray:
    return softmax(np.random.default_rng(0).normal(0, scale, (n_rows, n_classes)), axis=1)


def reference(row: np.ndarray, name: str) -> float:
    first, second = sorted(row, reverse=True)[:2]
    return {
        "max_probability": first,
        "margin": first - second,
        "entropy": -scipy_entropy(row),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_scores_match_a_loop_over_rows(name):
    probabilities = some_probabilities()
    expected = [reference(row, name) for row in probabilities]
    np.testing.assert_allclose(SCORES[name](probabilities), expected, rtol=0, atol=GRID)
    np.testing.assert_allclose(score(probabilities, name), expected, rtol=0, atol=2 * GRID)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["C", "F", "strided", "float32"])
def test_one_row_alone_scores_bit_for_bit_as_in_its_batch(name, layout):
    batch = some_probabilities(64, 37)
    batch = {
        "C": batch,
        "F": np.asfortranarray(batch),
        "strided": np.repeat(batch, 2, axis=1)[:, ::2],
        "float32": batch.astype(np.float32),
    }[layout]
    together = score(batch, name)
    alone = np.concatenate([score(batch[i : i + 1].copy(), name) for i in range(len(batch))])
    assert together.tobytes() == alone.tobytes()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.integers(0, 3) | st.floats(1e-12, 1)] * 3).filter(lambda row: sum(row) > 0),
        min_size=2,
        max_size=20,
    ),
    st.sampled_from(NAMES),
)
def test_refined_score_is_strictly_monotone_in_the_main_score(rows, name):
    weights = np.array(rows, dtype=np.float64)
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    main, refined = SCORES[name](probabilities), score(probabilities, name)
    above = main[:, None] > main[None, :]
    assert (refined[:, None] > refined[None, :])[above].all()
    assert (np.floor(refined / GRID) * GRID == main).all()


def test_equal_top_probabilities_are_ordered_by_entropy():
    spread, concentrated = [0.5, 0.25, 0.25], [0.5, 0.375, 0.125]
    top = SCORES["max_probability"]([spread, concentrated])
    assert top[0] == top[1]
    values = score([spread, concentrated], "max_probability")
    assert values[1] > values[0]


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_round_to_certainty_are_still_told_apart(name):
    doubts = np.array([1e-9, 1e-12, 1e-20, 1e-100, 1e-300, 0.0])
    probabilities = np.stack([1 - doubts, doubts], axis=1)
    assert (np.diff(score(probabilities, name)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_rows_tie_and_the_order_of_classes_does_not_matter_to_the_main_score(name):
    probabilities = some_probabilities(50)
    twice = score(np.concatenate([probabilities, probabilities]), name)
    assert (twice[:50] == twice[50:]).all()
    shuffled = SCORES[name](probabilities[:, ::-1])
    np.testing.assert_allclose(shuffled, SCORES[name](probabilities), atol=GRID)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([0.5, 0.5], "expected \\[rows, classes\\]"),
        ([[1.0]], "at least two classes"),
        ([[0.5, 0.5], [2.0, 3.0]], "Row 1 of 2 is not a distribution"),
        ([[1.5, -0.5]], "not logits"),
        ([[np.nan, 1.0]], "Row 0"),
    ],
)
def test_what_is_no_distribution_is_refused(values, complaint):
    with pytest.raises(DataError, match=complaint):
        class_probabilities(values)


def test_unknown_score_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match="max_probability, margin, entropy"):
        score([[0.5, 0.5]], "energy")


def test_no_rows_score_to_nothing():
    assert score(np.empty((0, 3)), "margin").shape == (0,)

"""What a classifier's training holds of its rows, against all of it in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from journeyman.errors import DataError
from journeyman.labels.dataset import ClassRows
from journeyman.student import batches, class_rows
from journeyman.student.batches import TokenRows
from journeyman.student.class_rows import HeldOutRows, Part, TrainRows

from .conftest import TOPICS, make_recipe, make_rows

STUDENT = make_recipe().learner()


def letters(texts: Sequence[str], **_: object) -> dict[str, list[list[int]]]:
    """A token for each letter."""
    return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def tokens(rows: ClassRows) -> TokenRows:
    return batches.tokenise(letters, rows.texts, max_length=99)


def whole(n_train: int = 40, n_calibrate: int = 9) -> ClassRows:
    """Shuffled; the teacher rules some classes out."""
    random = np.random.default_rng(0)
    n = n_train + n_calibrate
    logprobs = random.normal(scale=4, size=(n, len(TOPICS)))
    logprobs[random.random(n) < 0.2, 1] = -np.inf
    logprobs -= np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
    return dataclasses.replace(make_rows(n_train, n_calibrate), logprobs=logprobs).take(
        random.permutation(n)
    )


def read(
    rows: ClassRows, *, hard_labels: bool = False, cuts: Sequence[int] = (7, 8, 31)
) -> tuple[TrainRows, HeldOutRows]:
    parts = (rows.take(part) for part in np.split(np.arange(len(rows)), cuts))
    tables = (Part.of(part, letters, STUDENT).to_table() for part in parts)
    return class_rows.gathered(
        (Part.from_table(table, rows.labels) for table in tables), hard_labels=hard_labels
    )


def test_targets_are_the_teachers_to_float32_bit_by_bit() -> None:
    """Which is what the loss turned float64 into."""
    rows = whole()
    train, held_out = read(rows)
    expected = rows.split("train")
    some = np.array([3, 39, 0, 3])
    np.testing.assert_array_equal(train.targets(some), expected.logprobs[some].astype(np.float32))
    assert train.ids == expected.ids and train.gold.tolist() == expected.gold.tolist()
    np.testing.assert_array_equal(train.tokens.ids, tokens(expected).ids)
    np.testing.assert_array_equal(train.tokens.starts, tokens(expected).starts)
    # What is measured on is small, and stays as it is.
    np.testing.assert_array_equal(held_out.logprobs, rows.split("calibrate").logprobs)
    np.testing.assert_array_equal(held_out.gold, rows.split("calibrate").gold)


def test_hard_labels_are_the_first_choice_in_float64() -> None:
    """Two classes that float32 cannot tell apart: the second one is likelier, by little."""
    rows = whole()
    near = rows.logprobs.copy()
    near[:, :2] = -1.0, -1.0 + 1e-12
    near[:, 2] = -30.0
    rows = dataclasses.replace(rows, logprobs=near)
    train, _ = read(rows, hard_labels=True)
    np.testing.assert_array_equal(np.exp(train.targets(np.arange(40))), np.eye(3)[[1] * 40])
    assert train.class_counts.tolist() == [0, 40, 0]


def test_a_row_takes_four_bytes_a_class_and_four_with_hard_labels() -> None:
    assert read(whole())[0].learned.nbytes == 40 * len(TOPICS) * 4
    assert read(whole(), hard_labels=True)[0].learned.nbytes == 40 * 4


@pytest.mark.parametrize("hard_labels", [False, True])
def test_what_weighs_rows_and_classes_is_of_float64(hard_labels: bool) -> None:
    rows = whole()
    train, _ = read(rows, hard_labels=hard_labels)
    chances = np.exp(rows.split("train").logprobs)
    np.testing.assert_array_equal(train.sure, chances.max(axis=1))
    learned = np.eye(3)[chances.argmax(axis=1)] if hard_labels else chances
    np.testing.assert_allclose(train.class_counts, learned.sum(axis=0), rtol=1e-13)


@pytest.mark.parametrize(("n_train", "n_calibrate", "none"), [(0, 9, "train"), (40, 0, "calib")])
def test_a_split_without_rows_is_a_sentence(n_train: int, n_calibrate: int, none: str) -> None:
    with pytest.raises(DataError, match=f"has no {none}"):
        read(whole(n_train, n_calibrate))

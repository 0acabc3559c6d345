"""Precision and recall, counted by hand."""

from dataclasses import replace

import numpy as np

from journeyman.report.data import TestRows
from journeyman.report.detection import detections
from journeyman.report.page import render
from tests.journeyman.report.synthetic import report_data

HAM, SPAM = 0, 1
# gold, teacher's answer, student's answer, whether the student answers
ROWS = [
    (SPAM, SPAM, SPAM, True), (SPAM, SPAM, HAM, True), (SPAM, HAM, SPAM, False),
    (HAM, SPAM, HAM, True), (HAM, HAM, HAM, False), (HAM, HAM, SPAM, True),
    (-1, SPAM, SPAM, True),
]  # fmt: skip


def made_rows():
    gold, teacher, student, accepted = (np.array(column) for column in zip(*ROWS, strict=True))
    return TestRows(
        ids=[str(i) for i in range(len(ROWS))],
        texts=["a text"] * len(ROWS),
        gold=gold,
        teacher=np.eye(2)[teacher],
        student=np.eye(2)[student],
        confidence=accepted.astype(float),
        accepted=accepted.astype(bool),
    )


def test_each_answerer_has_its_own_counts_over_rows_with_gold():
    teacher, student, cascade = detections(made_rows(), SPAM)
    assert (teacher.found, teacher.said, teacher.there) == (2, 3, 3)
    assert (teacher.precision, teacher.recall) == (2 / 3, 2 / 3)
    assert (student.found, student.said) == (2, 3)
    assert (cascade.found, cascade.said, cascade.recall) == (1, 2, 1 / 3)
    np.testing.assert_allclose(cascade.balanced_accuracy, (1 / 3 + 2 / 3) / 2)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    rows = made_rows()
    spam = {"teacher": rng.integers(0, 5, len(ROWS)) / 5, "student": rng.random(len(ROWS))}
    rows = replace(rows, **{who: np.stack([1 - p, p], axis=1) for who, p in spam.items()})
    *found, cascade = detections(rows, SPAM)
    for one in found:
        p = spam[one.who]
        pairs = [(p[i], p[j]) for i in np.flatnonzero(rows.gold == SPAM)
                 for j in np.flatnonzero(rows.gold == HAM)]  # fmt: skip
        np.testing.assert_allclose(one.auc, np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))
    assert cascade.auc is None and cascade.at_median is None


def test_at_the_median_half_of_the_rows_are_said_to_be_of_the_label():
    spam = np.array([0.4, 0.3, 0.1, 0.35, 0.2, 0.05, 0.99])  # the last has no gold
    rows = replace(made_rows(), teacher=np.stack([1 - spam, spam], axis=1))
    teacher, *_ = detections(rows, SPAM)
    # Above 0.25 are rows 0, 1 (spam) and 3 (ham), though all six are ham at 0.5.
    np.testing.assert_allclose(teacher.at_median, (2 / 3 + 2 / 3) / 2)
    assert teacher.said == 0


def test_the_page_shows_them_where_the_recipe_names_a_label():
    html, _ = render(report_data(positive="travel"))
    assert "Finding travel, which" in html
    assert "Finding" not in render(report_data())[0]

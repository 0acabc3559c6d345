"""Ranking figures, counted by hand."""

import numpy as np
import pytest

from journeyman.report.data import TestRows
from journeyman.report.page import render
from journeyman.report.ranking import rankings
from tests.journeyman.report.synthetic import report_data


def made_rows(gold: list[int], student: list[float], teacher: list[float]) -> TestRows:
    n = len(gold)
    both = [np.stack([1 - np.array(p), np.array(p)], axis=1) for p in (teacher, student)]
    return TestRows(
        ids=[str(i) for i in range(n)],
        texts=["who"] * n,
        gold=np.array(gold),
        teacher=both[0],
        student=both[1],
        confidence=np.zeros(n),
        accepted=np.zeros(n, bool),
    )


def test_ranks_are_those_of_the_relevant_candidate():
    rows = made_rows(
        gold=[1, 0, 0, 0, 1, 0, 1, 1, 0, -1],
        student=[0.9, 0.1, 0.2, 0.8, 0.5, 0.1, 0.7, 0.6, 0.3, 1.0],
        teacher=[0.1, 0.5, 0.2, 0.8, 0.9, 0.1, 0.7, 0.6, 0.3, 1.0],
    )
    lists = ["a", "a", "a", "b", "b", "b", "only relevant", "only relevant", "only not", "a"]
    teacher, student = rankings(rows, lists, positive=1)
    assert (teacher.n_lists, teacher.largest) == (2, 3)
    assert teacher.mrr == pytest.approx((1 / 3 + 1) / 2) and teacher.recall_at_1 == 0.5
    assert student.mrr == pytest.approx((1 + 1 / 2) / 2) and student.recall_at_1 == 0.5


def test_a_ranker_that_says_the_same_of_all_is_as_good_as_chance():
    rows = made_rows([1, 0, 0, 0, 0] * 8, [0.5] * 40, [0.5] * 40)
    for one in rankings(rows, [i // 5 for i in range(40)], positive=1):
        assert one.recall_at_1 == pytest.approx(1 / 5) and one.mrr == pytest.approx(1 / 3)


def test_without_lists_of_both_kinds_there_is_nothing_to_say():
    assert rankings(made_rows([1, 0], [0.5, 0.6], [0.5, 0.6]), ["a", "b"], positive=1) == ()


def test_the_page_has_the_ranking_and_the_columns_of_the_rows_to_read():
    plain = report_data(positive="travel")
    metas = [{"question": i // 5, "passage": f"passage <{i}>"} for i in range(len(plain.test))]
    rows = TestRows(**{n: getattr(plain.test, n) for n in plain.test.__slots__} | {"metas": metas})
    html, _ = render(report_data(positive="travel", rank_by="question", test=rows))
    assert "ranked by the probability of travel" in html and "mean reciprocal rank" in html
    assert "<dt>passage</dt><dd>passage &lt;" in html

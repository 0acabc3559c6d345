"""Slices of the test rows, counted by plain loops."""

import numpy as np
import pytest

from journeyman.report.data import TestRows
from journeyman.report.job_tables import by_slice, escalations
from journeyman.report.page import render
from journeyman.report.slices import Slice, by_label, slices, wilson
from tests.journeyman.report.synthetic import FOUR_LABELS, report_data


def sliced_rows(gold: bool = True) -> TestRows:
    """Of the synthetic rows, with a column of two values and one of as many as there are rows."""
    test = report_data(gold=gold, texts=("a" * 3, "b" * 30, "c" * 300, "d" * 3000)).test
    metas = [{"shop": "ab"[i % 2], "row": i} for i in range(len(test))]
    return TestRows(**{name: getattr(test, name) for name in test.__slots__} | {"metas": metas})


def slices_of(rows: TestRows) -> list[Slice]:
    return slices(rows.counted, by_label(rows, FOUR_LABELS))


def test_every_slice_has_the_counts_of_its_rows():
    rows = sliced_rows()
    found = slices_of(rows)
    assert {one.by for one in found} == {"gold label", "characters", "shop"}  # each row is rare
    shop = next(one for one in found if (one.by, one.value) == ("shop", "b"))
    members = range(1, len(rows), 2)
    right = [rows.student_answer[i] == rows.gold[i] for i in members]
    by_teacher = [rows.teacher_answer[i] == rows.gold[i] for i in members]
    accepted = [bool(rows.accepted[i]) for i in members]
    assert (shop.n, shop.student, shop.teacher) == (len(members), sum(right), sum(by_teacher))
    assert shop.cascade == sum(np.where(accepted, right, by_teacher)) and shop.n_gold == shop.n
    assert shop.same == sum(not rows.differs[i] for i in members)
    assert shop.answered == sum(accepted)
    lengths = {one.value: one.n for one in found if one.by == "characters"}
    assert lengths == {"3 to 3": 100, "30 to 30": 100, "300 to 300": 100, "3,000 to 3,000": 100}


def test_of_a_column_of_many_values_the_worst_of_those_with_rows_are_shown():
    test = sliced_rows()
    metas = [
        # 320 intents of one row and 16 of five
        {"intent": f"rare {i}" if i % 5 else f"intent {i % 80}", "passage": f"{i:060}" + "." * i}
        for i in range(len(test))
    ]
    rows = TestRows(**{name: getattr(test, name) for name in test.__slots__} | {"metas": metas})
    found = slices_of(rows)
    by_intent = [one for one in found if one.by == "intent"]
    assert len(by_intent) == 16 and {one.n for one in by_intent} == {5}
    passages = [one for one in found if one.by == "characters of passage"]
    assert [one.n for one in passages] == pytest.approx([len(test) / 4] * 4, abs=1)
    many = [{"intent": f"intent {i % 40}"} for i in range(len(test))]
    rows = TestRows(**{name: getattr(test, name) for name in test.__slots__} | {"metas": many})
    shown = [one for one in slices_of(rows) if one.by == "intent"]
    assert len(shown) == 30  # of 40, the surely worst
    right = np.where(
        rows.accepted, rows.student_answer == rows.gold, rows.escalated_answer == rows.gold
    )
    upper = sorted(wilson(int(right[i::40].sum()), len(right[i::40]))[1] for i in range(40))
    assert [wilson(*one.good)[1] for one in shown] == pytest.approx(upper[:30])


def test_the_surely_worst_come_first():
    found = slices_of(sliced_rows())
    upper = [wilson(one.cascade, one.n_gold)[1] for one in found]
    assert upper == sorted(upper)
    without = slices_of(sliced_rows(gold=False))
    assert {one.by for one in without} == {"teacher's label", "characters", "shop"}
    upper = [wilson(one.same, one.n)[1] for one in without]
    assert upper == sorted(upper)
    assert "cascade right" not in by_slice(without).columns


@pytest.mark.parametrize(("k", "n"), [(0, 10), (7, 10), (10, 10), (388, 400)])
def test_intervals_are_wilsons(k: int, n: int):
    z, p = 1.959964, k / n
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    assert wilson(k, n) == pytest.approx(expected, abs=1e-6)


def test_what_escalating_was_worth_adds_up():
    rows = sliced_rows()
    table = escalations(rows.counted)
    assert sum(int(row[1]) for row in table.rows) == int((~rows.accepted).sum())
    helped = sum(
        not rows.accepted[i]
        and rows.teacher_answer[i] == rows.gold[i]
        and rows.student_answer[i] != rows.gold[i]
        for i in range(len(rows))
    )
    assert table.rows[0][1] == str(helped)
    assert escalations(sliced_rows(gold=False).counted) is None


def test_the_page_shows_slices_and_the_rows_of_each_kind():
    html, _ = render(report_data(test=sliced_rows()))
    for words in (
        '<section id="slices">',
        "What escalating was worth",
        "The teacher is wrong",
        "The student is wrong, though the teacher is right",
        "Escalated, and it helped: only its answer is right",
        "Escalated, and it harmed: only the student was right",
    ):
        assert words in html, words

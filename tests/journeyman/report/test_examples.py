"""Rows to read follow the stated rule."""

from __future__ import annotations

from journeyman.report.examples import ROWS_PER_GROUP, pick
from tests.journeyman.report.synthetic import report_data


def test_harmful_rows_are_accepted_differing_and_most_confident_first() -> None:
    data = report_data()
    harmful, agreeing, escalated = pick(data.test, data.labels)[:3]
    rows = data.test
    assert harmful.n == (rows.accepted & rows.differs).sum()
    assert len(harmful.examples) == ROWS_PER_GROUP
    assert [e.confidence for e in harmful.examples] == sorted(
        rows.confidence[rows.accepted & rows.differs], reverse=True
    )[:ROWS_PER_GROUP]
    assert all(e.student.label != e.teacher.label for e in harmful.examples)
    assert all(e.student.label == e.teacher.label for e in agreeing.examples)
    assert {e.answered_by for e in escalated.examples} == {"teacher"}
    assert [e.confidence for e in escalated.examples] == sorted(rows.confidence)[:ROWS_PER_GROUP]


def test_rows_that_one_of_the_two_gets_wrong_are_of_their_kind() -> None:
    data = report_data()
    teacher_wrong, student_wrong, helped, harmed = pick(data.test, data.labels)[3:]
    assert all(e.teacher.right is False for e in teacher_wrong.examples)
    for group, of_student in ((student_wrong, False), (helped, False), (harmed, True)):
        assert group.examples and group.n >= len(group.examples)
        assert all(e.student.right is of_student for e in group.examples)
        assert all(e.teacher.right is not of_student for e in group.examples)
    assert {e.answered_by for e in (*helped.examples, *harmed.examples)} == {"teacher"}
    assert helped.n + harmed.n <= (~data.test.accepted).sum()
    assert len(pick(report_data(gold=False).test, data.labels)) == 3


def test_rows_without_gold_are_neither_right_nor_wrong() -> None:
    data = report_data(gold=False)
    example = pick(data.test, data.labels)[0].examples[0]
    assert example.gold is None and example.student.right is None


def test_a_long_text_is_cut_and_says_so() -> None:
    data = report_data(texts=("x" * 5000,))
    text = pick(data.test, data.labels)[0].examples[0].text
    assert len(text) < 700 and text.endswith("(4,400 more characters)")

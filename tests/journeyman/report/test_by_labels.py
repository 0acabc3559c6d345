"""The page on numbers of labels: drawn where it was tried, and words that the numbers choose."""

from __future__ import annotations

import re

import numpy as np

from journeyman.certify.by_labels import Answered, LabelCurve, points, right
from journeyman.report import by_labels, page
from tests.journeyman.report.synthetic import report_data
from tests.journeyman.report.test_page import Page

M = 400


def curve(
    students: dict[int, int], cascades: dict[int, int], *, gold: bool = True, n_seeds: int = 1
) -> LabelCurve:
    """Right answers of M, by the number of labels; the mixture is right on five rows more."""

    def answered(n: int) -> Answered:
        at = np.arange(M)
        said = {"student": at < students[n], "cascade": at < cascades[n]}
        return Answered(
            against="gold" if gold else "teacher",
            teacher=at < 320,
            right=said | ({"mixture": at < cascades[n] + 5} if gold else {}),
            threshold=0.5,
            escalated=0.25,
            student_weight=0.6 if gold else None,
        )

    by_size = {n: [answered(n)] * n_seeds for n in students}
    return LabelCurve(
        student_digest="s",
        against="gold" if gold else "teacher",
        n=M,
        n_seeds=n_seeds,
        share=0.2,
        own_share=0.0,
        teacher=right([np.arange(M) < 320]),
        points=points(by_size, dict.fromkeys(students, 128)),
    )


RISING = curve({125: 280, 250: 320, 500: 336, 1000: 339}, {125: 310, 250: 331, 500: 338, 1000: 337})


def test_the_page_has_the_curve_where_there_is_one() -> None:
    html, drawn = page.render(report_data(by_labels=RISING))
    shown = Page(html)
    assert {"label-curve", "figure-label-curve"} <= set(shown.ids)
    assert len(set(shown.ids)) == len(shown.ids)
    assert "label-curve" in {figure.name for figure in drawn}
    assert all(sentence in shown.text for sentence in by_labels.words(RISING))
    assert "84.0%" in shown.text and "the run itself escalates nothing" in shown.text
    svg = by_labels.figure(RISING).svg
    assert {"125", "1,000", "student alone", "teacher alone", "cascade, both mixed"} <= set(
        re.findall(r">([^<>]+)</text>", svg)
    )
    without = Page(page.render(report_data())[0])
    assert "label-curve" not in without.ids and "figure-label-curve" not in without.ids


def test_the_words_say_when_to_stop_labeling_and_when_to_stop_escalating() -> None:
    labels, cascade, mixture, estimate = by_labels.words(RISING)
    assert labels.startswith("From 500 labels on, more gain less than these test rows can tell")
    assert "1,000 gain +0.8% (95% interval -0.2% to +2.2%)" in labels
    assert "pays up to 250 labels: +2.8%" in cascade and "at 1,000: -0.5%" in cascade
    assert "pays up to 500 labels: +1.8%" in mixture
    assert "no promise" in estimate


def test_more_labels_still_pay_where_the_last_of_them_gained() -> None:
    found = curve({250: 300, 500: 330}, {250: 320, 500: 345})
    labels, cascade, _, _ = by_labels.words(found)
    assert labels.startswith("More labels still pay: 500 in place of 250 gain +7.5% (95% interval")
    assert cascade.startswith("Having the teacher answer what is escalated still pays at 500 ")
    flat = by_labels.words(curve({250: 330, 500: 331}, {250: 329, 500: 320}))
    assert flat[0].startswith("From 250 labels on") and "gains nothing beyond chance" in flat[1]


def test_without_gold_nothing_is_said_of_escalation() -> None:
    found = curve({125: 300, 250: 380}, {125: 340, 250: 390}, gold=False)
    said = " ".join(by_labels.words(found))
    assert "More labels still pay" in said and "without gold on test rows nothing says" in said
    shown = by_labels.table(found)
    assert shown.caption.startswith("The same as the teacher") and "alone" not in shown.caption
    assert shown.columns == ("labels", "steps", "student alone", "interval", "cascade", "interval",
                             "escalated on test")  # fmt: skip
    assert "teacher alone" not in by_labels.figure(found).svg


def test_seeds_are_shown_from_the_fewest_to_the_most() -> None:
    shown = by_labels.table(curve({125: 280, 250: 320}, {125: 310, 250: 331}, n_seeds=2))
    assert shown.columns[:5] == ("labels", "steps", "student alone", "interval", "over seeds")
    assert shown.rows[0][:5] == ("125", "128", "70.0%", "65.2% to 74.5%", "70.0% to 70.0%")
    assert all(len(row) == len(shown.columns) for row in shown.rows)

"""The page of a student that writes: the same sections, as far as there is something to show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from journeyman.certify.bundle import Guarantee, WrittenBundle
from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.curve import cost_quality_curve
from journeyman.report import written
from journeyman.report.comparison import ComparedStudent
from journeyman.report.slices import slices
from journeyman.report.written import WrittenData, WrittenTest
from tests.journeyman.report.synthetic import summary
from tests.journeyman.report.test_page import Page

BETTER = "<b>three</b> & more"


def bundle(scores: np.ndarray, differs: np.ndarray) -> WrittenBundle:
    guarantee = Guarantee.from_certificate(certify_system_agreement(scores, differs, 0.2, 0.1))
    return WrittenBundle(
        student="runs/logits/student",
        teacher="package://teacher.gguf",
        student_digest="5f" * 16,
        teacher_digest="6f" * 16,
        student_tokenizer_digest="7f" * 16,
        teacher_tokenizer_digest="7f" * 16,
        prompt_digest="8f" * 16,
        score="mean_logprob",
        match="exact",
        answer_pattern=None,
        max_tokens=8,
        self_agreement=0.75,
        threshold=guarantee.threshold,
        served_guarantee="system_agreement",
        guarantees=(guarantee,),
        curve=cost_quality_curve(scores, differs).to_points(keep=guarantee.threshold),
        ledger=(),
        recommendation="Let the student answer.",
    )


def rows(accept_above: float, gold: bool) -> WrittenTest:
    """40 rows: the student differs on every fifth, and is right but for the last."""
    confidence = -np.linspace(0.1, 4, 40)
    differs = np.arange(40) % 5 == 4
    return WrittenTest(
        ids=[f"{i:032x}" for i in range(40)],
        texts=[f"how many are {i} < {i + 1}?" for i in range(40)],
        gold=[BETTER] * 40 if gold else [None] * 40,
        teacher=["two" if d else BETTER for d in differs],
        student=[*[BETTER] * 39, None],
        differs=differs,
        right=(np.arange(40) < 39, ~differs) if gold else None,
        confidence=confidence,
        accepted=confidence > accept_above,
    )


def data(**replaced: Any) -> WrittenData:
    steps = [{"kind": "steps", "step": step, "loss": 3.0 / step} for step in range(1, 9)]
    seen = {"kind": "evaluation", "epoch": 1, "step": 8, "n_rows": 20, "agreement": 0.4,
            "against": "text", "cross_entropy": 2.5, "perplexity": 12.2,
            "exact_match": 0.05}  # fmt: skip
    values: dict[str, Any] = {
        "name": "rationales",
        "created": "2026-01-02 03:04 UTC",
        "recipe_yaml": "name: rationales\n",
        "summary": summary(),
        "training": [*steps, seen],
        "learned": "The student's first choice is the text's own tokens at 40.0%.",
    }
    return WrittenData(**(values | replaced))


def certified(*, gold: bool) -> WrittenData:
    scores = -np.linspace(0.1, 4, 200)
    of = bundle(scores, np.arange(200) >= 120)  # so that some are escalated
    return data(bundle=of, test=rows(of.accept_above, gold))


def test_a_student_without_a_promise_shows_what_it_learned_and_how_to_get_one() -> None:
    html, drawn = written.render(data())
    page = Page(html)
    assert set(page.ids) >= {"verdict", "summary", "training", "recipe"}
    assert not {"promise", "cost-quality", "rows"} & set(page.ids)
    assert [figure.name for figure in drawn] == ["training"]
    assert "journeyman certify" in page.text and "at 40.0%" in page.text
    assert "cross-entropy, nats" in page.text and "2.500" in page.text
    assert not [link for link in page.links if "//" in link]  # it opens without a network


def student(name: str, **measured: Any) -> ComparedStudent:
    """One that learned text."""
    values: dict[str, Any] = {
        "size_bytes": 40_000_000, "agreement": 0.4, "against": "text", "kl": None,
        "cross_entropy": 2.5, "perplexity": 12.2, "gold_accuracy": None, "rows_per_s": 9.0,
        "n_rows": 100, "steps": 8, "seconds": 60.0, "labels_digest": "same",
    }  # fmt: skip
    return ComparedStudent(name=name, **(values | measured))


def test_students_that_learned_text_are_compared_by_what_they_were_measured_by() -> None:
    larger = student("larger", size_bytes=90_000_000, agreement=0.5, cross_entropy=1.75)
    html, drawn = written.render(data(compared=(student("rationales"), larger)))
    page = Page(html)
    assert [figure.name for figure in drawn] == ["training", "size-agreement"]
    assert "figure-size-agreement" in page.ids and "Beside other students" in page.text
    assert "Agreement of rationales, larger is with the text's own tokens." in page.text
    assert "1.750" in page.text and "KL, nats" not in page.text
    assert "teacher's first answer more often" not in page.text


def test_a_certified_one_shows_its_promise_and_rows_to_read_as_text() -> None:
    html, drawn = written.render(certified(gold=True))
    page = Page(html)
    assert set(page.ids) >= {"promise", "cost-quality", "rows"}
    assert [figure.name for figure in drawn] == ["cost-quality", "training"]
    assert "b" not in page.tags and BETTER in page.text
    assert "75.0%" in page.text  # the teacher's agreement with itself
    assert "The teacher is wrong" in page.text and "(nothing)" in page.text


def test_slices_are_of_its_rows_and_what_escalating_was_worth_is_said() -> None:
    shown = certified(gold=True)
    assert shown.test is not None
    metas = [{"shop": "ab"[i % 2]} for i in range(40)]
    place = np.arange(40)
    student, teacher = place < 36, place % 5 != 4  # of the last four the teacher has three right
    test = replace(
        shown.test,
        metas=metas,
        student_logprobs=[-1.5] * 40,
        differs=~teacher | ~student,
        right=(student, teacher),
    )
    page = Page(written.render(replace(shown, test=test))[0])
    assert {"slices", "rows"} <= set(page.ids) and "shop" in page.text
    assert "What escalating was worth" in page.text and "it helped" in page.text
    assert f"probability {np.exp(-1.5):.2g}" in page.text
    (of_b,) = [one for one in slices(test.counted) if (one.by, one.value) == ("shop", "b")]
    members = np.arange(1, 40, 2)
    right = np.where(test.accepted, student, teacher)[members]
    assert (of_b.n, of_b.n_gold, of_b.cascade) == (20, 20, right.sum())
    assert of_b.same == (~test.differs[members]).sum()
    helped = next(group for group in written.pick(test) if "it helped" in group.title)
    assert helped.n == 3 and not test.accepted[36:].any()


def test_counts_are_of_the_rows() -> None:
    shown = certified(gold=True)
    assert shown.test is not None
    seen, accepted, differs = shown.test.measured, shown.test.accepted, shown.test.differs
    assert (seen.n, seen.n_differs) == (40, 8)
    assert seen.n_accepted == accepted.sum() and 8 < seen.n_accepted < 40
    assert seen.n_accepted_differs == (accepted & differs).sum()
    assert seen.gold is not None
    assert (seen.gold.student, seen.gold.teacher) == (39, 32)
    student = np.arange(40) < 39
    assert seen.gold.cascade == np.where(accepted, student, ~differs).sum()


def test_without_gold_nothing_is_said_of_who_is_right() -> None:
    text = Page(written.render(certified(gold=False))[0]).text
    assert "Right by gold" not in text and "The teacher is wrong" not in text

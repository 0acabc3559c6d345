"""How right each is by the number of labels: against loops, and what is read off it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from journeyman.certify.by_labels import (
    RECORD,
    Answered,
    Beside,
    LabelCurve,
    Right,
    Rule,
    answer,
    kept,
    points,
    right,
)
from journeyman.certify.decisions import ScoredRows
from journeyman.certify.mixture import fit_mixture
from journeyman.errors import DataError
from journeyman.labels.dataset import ClassRows

LABELS = ("a", "b", "c")
RULE = Rule(score="margin", kind="system_agreement", mixes=False, share=0.3)


def rows(split: str, n: int, seed: int, gold_share: float = 1.0, skill: float = 1.5) -> ScoredRows:
    random = np.random.default_rng(seed)
    gold = random.integers(0, 3, n)
    student, teacher = (
        skill * np.eye(3)[gold] + random.normal(scale=1.2, size=(n, 3)) for _ in range(2)
    )
    known = ClassRows(
        labels=LABELS,
        ids=[f"{split}-{i}" for i in range(n)],
        texts=[""] * n,
        splits=np.array([split] * n, dtype=object),
        gold=np.where(random.random(n) < gold_share, gold, -1),
        logprobs=teacher - np.logaddexp.reduce(teacher, axis=1, keepdims=True),
    )
    return ScoredRows(rows=known, logits=(3 * student).astype(np.float32))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def by_hand(calibrate: ScoredRows, test: ScoredRows, share: float) -> dict[str, list[bool]]:
    """Row by row: temperature, margins, the threshold as a rank, and who is right."""
    teacher_says = [int(np.argmax(p)) for p in calibrate.rows.logprobs]

    def surprise(log_temperature: float) -> float:
        scaled = [softmax(z.astype(float) / np.exp(log_temperature)) for z in calibrate.logits]
        return -sum(np.log(p[t]) for p, t in zip(scaled, teacher_says, strict=True))

    temperature = np.exp(minimize_scalar(surprise, bounds=(-3, 3), method="bounded",
                                         options={"xatol": 1e-9}).x)  # fmt: skip

    def sure(logits: np.ndarray) -> tuple[np.ndarray, float]:
        p = softmax(logits.astype(float) / temperature)
        return p, sorted(p)[-1] - sorted(p)[-2]

    margins = sorted(sure(z)[1] for z in calibrate.logits)
    threshold = margins[round(share * len(margins)) - 1]
    own = np.array([sure(z)[0] for z in calibrate.logits])
    mixture = fit_mixture(own, np.exp(calibrate.rows.logprobs), calibrate.rows.gold)
    found: dict[str, list[bool]] = {"student": [], "cascade": [], "mixture": [], "teacher": []}
    for logits, logprobs, gold in zip(test.logits, test.rows.logprobs, test.rows.gold, strict=True):
        if gold < 0:
            continue
        p, margin = sure(logits)
        student, teacher = int(p.argmax()), int(logprobs.argmax())
        both = int(mixture.of(p[None], np.exp(logprobs)[None]).argmax())
        answers = margin > threshold
        found["student"].append(student == gold)
        found["teacher"].append(teacher == gold)
        found["cascade"].append((student if answers else teacher) == gold)
        found["mixture"].append((student if answers else both) == gold)
    return found


def test_answers_are_those_of_a_cascade_made_by_hand() -> None:
    calibrate, test = rows("calibrate", 150, 0, 0.8), rows("test", 300, 1, 0.7)
    found, wanted = answer(calibrate, test, RULE), by_hand(calibrate, test, RULE.share)
    assert found.against == "gold" and len(wanted["student"]) == (test.rows.gold >= 0).sum()
    assert found.teacher.tolist() == wanted.pop("teacher")
    assert {who: list(one) for who, one in found.right.items()} == wanted
    assert 0.2 < found.escalated < 0.4 and found.student_weight is not None


def test_the_share_of_calibrate_rows_is_escalated_by_any_score() -> None:
    calibrate = rows("calibrate", 200, 0)
    for name in ("margin", "entropy", "max_probability"):
        rule = Rule(score=name, kind="system_agreement", mixes=False, share=0.25)
        assert answer(calibrate, calibrate, rule).escalated == 0.25
    learned = Rule(score="deferral_head", kind="accuracy", mixes=True, share=0.25)
    assert answer(calibrate, rows("test", 400, 1), learned).escalated == pytest.approx(
        0.25, abs=0.1
    )


def test_test_rows_decide_nothing() -> None:
    calibrate, test = rows("calibrate", 150, 0), rows("test", 100, 1)
    whole = answer(calibrate, test, RULE)
    part = answer(
        calibrate,
        ScoredRows(rows=test.rows.take(np.arange(40)), logits=test.logits[:40]),
        RULE,
    )
    assert part.threshold == whole.threshold and part.student_weight == whole.student_weight
    assert all((part.right[who] == whole.right[who][:40]).all() for who in whole.right)


def test_without_gold_agreement_with_the_teacher_is_counted_and_nothing_is_mixed() -> None:
    calibrate, test = rows("calibrate", 150, 0, 0.0), rows("test", 100, 1, 0.0)
    found = answer(calibrate, test, RULE)
    assert found.against == "teacher" and set(found.right) == {"student", "cascade"}
    agrees = test.logits.argmax(axis=1) == test.rows.logprobs.argmax(axis=1)
    assert found.teacher.all() and (found.right["student"] == agrees).all()
    assert found.right["cascade"].sum() > agrees.sum()
    # Gold on test rows alone is enough to count by, and not to weigh two opinions by.
    assert set(answer(calibrate, rows("test", 100, 1), RULE).right) == {"student", "cascade"}


# --- the curve ---


def answered(n_student: int, n_cascade: int, n: int = 200) -> Answered:
    """Of n rows the student is right on the first, the cascade on as many of the first."""
    at = np.arange(n)
    said = {"student": at < n_student, "cascade": at < n_cascade, "mixture": at < n_cascade}
    return Answered(
        against="gold", teacher=at < 150, right=said, threshold=0.0, escalated=0.2,
        student_weight=0.5,
    )  # fmt: skip


def curve(by_size: dict[int, list[Answered]]) -> LabelCurve:
    n_seeds = len(next(iter(by_size.values())))
    first = next(iter(by_size.values()))[0]
    return LabelCurve(
        student_digest="s", against="gold", n=200, n_seeds=n_seeds, share=0.2, own_share=0.2,
        teacher=right([first.teacher]), points=points(by_size, dict.fromkeys(by_size, 10)),
    )  # fmt: skip


def test_labels_are_enough_where_no_more_of_them_gain_beyond_chance() -> None:
    rising = {50: 120, 100: 150, 200: 160, 400: 163}
    found = curve({n: [answered(k, k)] for n, k in rising.items()})
    assert found.points[0].later[400] == Beside(more=43, less=0)
    assert found.enough.n_labels == 200  # 163 beside 160 of 200 rows, and 160 beside 150 is clear
    assert (
        curve({n: [answered(k, k)] for n, k in {50: 120, 100: 150}.items()}).enough.n_labels == 100
    )


def test_escalating_pays_up_to_the_labels_at_which_it_last_gains_beyond_chance() -> None:
    found = curve({n: [answered(k, 160)] for n, k in {50: 120, 100: 145, 200: 158}.items()})
    up_to = found.pays_up_to("cascade")
    assert up_to is not None and up_to.n_labels == 100
    assert curve({50: [answered(160, 158)]}).pays_up_to("mixture") is None


def test_over_seeds_means_are_shown_with_the_fewest_and_the_most() -> None:
    found = curve({50: [answered(120, 130), answered(130, 136)], 90: [answered(140, 140)] * 2})
    assert found.points[0].right["student"] == Right(mean=125, least=120, most=130)
    assert found.points[0].beside_student["cascade"] == Beside(more=8, less=0)
    assert found.points[0].later[90] == Beside(more=15, less=0)
    one = Right(mean=125, least=125, most=125).interval(200)
    exact = binomtest(125, 200).proportion_ci(0.95, method="exact")
    assert one == pytest.approx((exact.low, exact.high))
    assert found.points[0].right["student"].interval(200) == one


def test_the_record_is_read_back_for_the_student_that_it_is_of(tmp_path: Path) -> None:
    made = curve({50: [answered(120, 130)], 90: [answered(140, 140)]})
    assert kept(tmp_path, "s") is None
    (tmp_path / RECORD).write_text(json.dumps(made.model_dump(mode="json")))
    assert kept(tmp_path, "s") == made and kept(tmp_path, "another") is None
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(DataError, match="not a curve of this version; run journeyman curve again"):
        kept(tmp_path, "s")

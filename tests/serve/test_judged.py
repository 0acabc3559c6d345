"""A cascade whose promise is by a judge's verdicts: who may watch over it. No engine, no Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from journeyman.cascade import fitting
from journeyman.cascade.judge import TeacherAsJudge
from journeyman.certify import judging, written
from journeyman.certify.bundle import JudgeRecord, Rate, WrittenBundle
from journeyman.errors import BundleMismatch
from journeyman.teacher.tasks import prompt_digest
from serve import ingress, loading
from serve.ingress import Ingress
from serve.loading import Loaded
from tests.serve.test_writers import ASKED, loaded


def judged(to: Path, **judge: Any) -> Loaded:
    """A bundle that a judge with these settings was asked for."""
    of = loaded(
        "a", certify={"match": "judge", "judge": judge}, cascade={"feedback": {"to": str(to)}}
    )
    asked = judging.asked_of_judge(of.recipe, written.question(of.recipe))
    rate = Rate(count=0, n=50, low=0.0, high=0.1)
    record = JudgeRecord(
        model="teacher", model_digest="teacher", prompt_digest=prompt_digest(asked), n_pairs=9,
        false_agreement=rate, false_difference=rate,
    )  # fmt: skip
    content = of.bundle.model_dump() | {"match": "judge", "judge": record}
    return replace(of, bundle=WrittenBundle.model_validate(content))


def test_a_promise_that_the_teacher_judged_is_watched_and_its_audits_ask_it(tmp_path: Path):
    of = judged(tmp_path)
    watch = ingress._watch(of)
    assert watch is not None and watch != "unknown" and watch.alpha == of.bundle.served.alpha
    assert isinstance(auditor(of)._judge, TeacherAsJudge)
    by_text = replace(of, bundle=loaded("a").bundle)
    assert ingress._watch(by_text) is not None and auditor(by_text)._judge is None


def test_one_that_another_model_judged_is_not(tmp_path: Path):
    assert ingress._watch(judged(tmp_path, teacher={"model": "other"})) is None


def auditor(of: Loaded) -> Any:
    rule: Any = SimpleNamespace(policy=None)
    return Ingress._auditor(SimpleNamespace(_teacher=None), of, rule, None, None)  # type: ignore[arg-type]


def test_a_recipe_that_puts_another_question_to_the_judge_does_not_fit_its_bundle(tmp_path: Path):
    of = judged(tmp_path)
    own, other = (
        loading._asked_of_judge(one.recipe, of.bundle)
        for one in (of, judged(tmp_path, prompt="{{ first }} or {{ second }}?"))
    )
    fitting.check(of.bundle, of.student, of.teacher, ASKED, own)
    with pytest.raises(BundleMismatch, match="the recipe's prompt to the judge"):
        fitting.check(of.bundle, of.student, of.teacher, ASKED, other)

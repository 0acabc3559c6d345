"""Two students in turn before a teacher: routed as by hand, in this process and over HTTP."""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from journeyman.cascade.policy import Decision, Escalation
from journeyman.certify import bundle as bundles
from journeyman.errors import BundleMismatch
from journeyman.student.models import Classifier
from serve import loading
from serve.students import Encoders, Rule, readers
from tests.serve import tiny
from tests.serve.conftest import Running
from tests.serve.several import LEFT_TO_TEACHER, Several


class Counting:
    """A classifier that notes how many texts it has read."""

    def __init__(self, inner: Classifier) -> None:
        self.inner, self.n = inner, 0

    def logits(self, texts, batch_size: int, batch_tokens: int) -> np.ndarray:
        self.n += len(texts)
        return self.inner.logits(texts, batch_size, batch_tokens)

    def unload(self) -> None:
        self.inner.unload()


def asked(several: Several, tightened: float | None = None):
    """What both students make of all texts, and how many each has read."""
    loaded = loading.load(several.folder)
    found = readers(loaded)
    counting = [Counting(one.classifier) for one in found]
    for one, counted in zip(found, counting, strict=True):
        one.classifier = counted  # type: ignore[assignment]
    rule = Rule(loaded)
    if tightened is not None:
        rule.tighten(tightened)

    async def go() -> list[Decision | Escalation]:
        student = Encoders(loaded, found, rule)
        student.start()
        try:
            one, *many = await asyncio.gather(
                student.submit(tiny.TEXTS), *(student.submit([text]) for text in tiny.TEXTS)
            )
            assert [d[0].label if isinstance(d[0], Decision) else None for d in many] == [
                d.label if isinstance(d, Decision) else None for d in one
            ]
            return one
        finally:
            await student.close()

    return asyncio.run(go()), [one.n // 2 for one in counting]


def test_each_text_goes_to_the_first_student_that_is_sure_and_no_further(several: Several):
    decided, read = asked(several)
    for i, one in enumerate(decided):
        by = one if isinstance(one, Decision) else one.student
        assert isinstance(one, Decision) == (several.by[i] < 2)
        assert by is not None and by.stage == min(several.by[i], 1) + 1
        assert by.label == several.labels[i]
        assert by.confidence == pytest.approx(several.confidence[i], abs=1e-5)
    assert read == [40, 25] and several.by.count(2) == LEFT_TO_TEACHER


def test_what_audits_forbid_goes_to_the_teacher_and_asks_no_other_student(several: Several):
    median = float(np.median([c for c in several.confidence if c > 0]))
    decided, read = asked(several, tightened=median)
    answered = [isinstance(one, Decision) for one in decided]
    assert answered == [confidence > median for confidence in several.confidence]
    assert read == [40, 25]


def test_another_student_in_the_bundles_folder_is_refused(several: Several, tmp_path: Path):
    copied = Path(shutil.copytree(several.folder, tmp_path / "copied"))
    shutil.rmtree(copied / bundles.folder_before(0))
    tiny.write_student(copied / bundles.folder_before(0), seed=3)
    with pytest.raises(BundleMismatch, match="the weights of a student that is asked before"):
        loading.load(copied)


def take_up(user_config: dict[str, Any]) -> None:
    """As Serve does with a config's user_config."""
    from ray import serve

    serve.get_app_handle("cascade").reconfigure.remote(user_config).result(timeout_s=60)


def figures_once(client: httpx.Client, true: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while not true(figures := client.get("/v1/figures").json()):
        assert time.monotonic() < deadline, figures
        time.sleep(0.2)
    return figures


def test_two_students_are_tried_beside_one_and_take_over_while_it_answers(
    several: Several, cascade: Running
):
    counts, n = Counter(several.by), len(tiny.TEXTS)
    take_up({"candidate": {"bundle": str(several.folder)}})
    figures_once(cascade.client, lambda figures: figures["candidate"])
    assert {result["stage"] for result in cascade.results(tiny.TEXTS)} == {None}
    tried = figures_once(
        cascade.client, lambda figures: sum(figures["candidate"]["totals"].values()) == n
    )["candidate"]
    assert tried["totals"]["teacher"] == counts[2]
    assert tried["by_stage"] == {"1": counts[0], "2": counts[1]}
    take_up({"bundle": str(several.folder)})
    bundle_id = several.bundle.bundle_id
    figures_once(cascade.client, lambda figures: figures["bundle"] == bundle_id)
    try:
        answers_say_which_student_gave_them(several, cascade)
    finally:
        take_up({})
        own = cascade.run.bundle.bundle_id
        figures_once(cascade.client, lambda figures: figures["bundle"] == own)
    assert {result["stage"] for result in cascade.results(tiny.TEXTS)} == {None}


def answers_say_which_student_gave_them(several: Several, cascade: Running) -> None:
    for i, result in enumerate(cascade.results(tiny.TEXTS)):
        place = several.by[i]
        assert result["answered_by"] == ("teacher" if place == 2 else "student")
        assert result["stage"] == (None if place == 2 else place + 1)
        assert result["confidence"] == pytest.approx(several.confidence[i], abs=1e-5)
        if place < 2:
            assert result["label"] == several.labels[i]
    for place in range(3):
        text, stage = tiny.TEXTS[several.by.index(place)], None if place == 2 else place + 1
        headers = cascade.classify(text).headers
        assert headers.get("x-journeyman-stage") == (stage and str(stage))
        chat = {"model": "cascade", "messages": [{"role": "user", "content": text}]}
        said = cascade.client.post("/v1/chat/completions", json=chat).json()
        assert said["journeyman"]["stage"] == [stage]
    figures, counts = cascade.client.get("/v1/figures").json(), Counter(several.by)
    assert figures["by_stage"] == {"1": counts[0] + 2, "2": counts[1] + 2}
    assert figures["totals"]["teacher"] == counts[2] + 2
    assert len(cascade.client.get("/v1/bundle").json()["stages"]["students"]) == 2

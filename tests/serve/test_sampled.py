"""A student whose confidence takes samples draws them beside its answer, as for its certificate."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from journeyman.teacher.answers import GeneratedLabels, RationaleLabels, Unparsable
from serve import loading, teacher, writers
from serve.loading import Loaded
from tests.serve.test_teacher import Engine
from tests.serve.test_writers import key, loaded


def sampled(student: str) -> Loaded:
    """The same, where its confidence takes two samples."""
    plain = loaded(student)
    changes = {"score": "self_consistency", "samples": {"n": 2, "temperature": 0.7}}
    bundle = type(plain.bundle).model_validate(plain.bundle.model_dump() | changes)
    return replace(plain, bundle=bundle)


def test_a_student_draws_the_samples_of_its_certificate_beside_its_answer(
    monkeypatch: pytest.MonkeyPatch,
):
    """Where it wrote nothing in any of them it has none, as there."""
    of, asked = sampled("a"), []
    monkeypatch.setattr(writers.loading, "student_here", lambda _: Path("a"))
    monkeypatch.setattr(writers.models, "resolve", lambda _: replace(of.student, vocab_size=10))

    async def answer(row: dict[str, str], seed: int = 0) -> GeneratedLabels:
        return GeneratedLabels(
            output="ab", token_ids=np.array([1, 2]), output_logprob=None, recorded=None,
            n_prompt_tokens=2, n_output_tokens=2, finish_reason="stop",
        )  # fmt: skip

    async def drawn(row: dict[str, str], seed: int = 0) -> RationaleLabels:
        if row["text"] == "silent":
            raise Unparsable("none of 2 samples has an answer")
        return RationaleLabels(
            reasonings=["ab", "cd"], answers=["ab", "cd"], answer="ab", reasoning="ab",
            agreement=0.5, n_unparsed=0, class_logprobs=None, label_mass=None, n_prompt_tokens=2,
            n_output_tokens=4,
        )  # fmt: skip

    def local(labels: Any, _: Any) -> Any:
        asked.append(labels)
        return SimpleNamespace(run=answer if labels.kind == "generate" else drawn)

    async def scenario() -> list[Any]:
        monkeypatch.setattr(teacher, "Engine", Engine)
        monkeypatch.setattr(teacher.models, "here", lambda model, _: model)
        monkeypatch.setattr(teacher.tasks, "local", local)
        student = writers.StudentEngine(of)
        said = await student.label(["x", "silent"])
        await student.close()
        return said  # type: ignore[return-value]

    said = asyncio.run(scenario())
    assert [(one.text, one.samples) for one in said] == [("ab", ("ab", "cd")), ("ab", ())]
    greedy, samples = asked
    assert (greedy.temperature, samples.temperature, samples.samples) == (0.0, 0.7, 2)
    assert samples.prompt == greedy.prompt


def test_a_student_that_is_sampled_is_another_than_the_same_one_that_is_not():
    """A bundle that is swapped in is answered by the draws that it was certified with."""
    assert loading.student_key(sampled("a").bundle) != key("a")

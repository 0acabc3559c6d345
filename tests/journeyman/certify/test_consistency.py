"""Self-consistency as a student's confidence: against counting, and what is served against what was
certified; its engine is stood in for, but for the last test."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from journeyman import corpus, models, recipe
from journeyman.cascade.policy import Decision, Escalation, Written
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify import bundle as bundles
from journeyman.certify import consistency, written
from journeyman.certify.bundle import Samples, WrittenBundle
from journeyman.certify.deferral_head import fit_deferral_head
from journeyman.certify.sequence_scores import WrittenConfidence
from journeyman.errors import RecipeError
from journeyman.labels import pipeline
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.teacher.answers import GeneratedLabels, RationaleLabels

from ..labels import synthetic as made
from .test_written import LIKELIEST, STUDENT, TEACHER, of_teacher, said, settings

FIVE = {"samples": 5, "sample_temperature": 0.7}
words = st.sampled_from(["yes", "no", " yes\n", "maybe"])


@given(st.lists(st.tuples(words, st.lists(words, max_size=4)), min_size=1, max_size=6))
def test_an_answers_agreement_is_its_share_of_all_that_were_asked_for(rows):
    answers, drawn = [answer for answer, _ in rows], [samples for _, samples in rows]
    got = consistency.agreements(answers, drawn, 4, lambda a, b: a.strip() == b.strip())
    same = [sum(s.strip() == a.strip() for s in samples) for a, samples in rows]
    np.testing.assert_array_equal(got, [(1 + n) / 5 for n in same])


@given(st.lists(st.tuples(st.integers(0, 64), st.floats(-30, 0)), min_size=2, max_size=8))
def test_more_samples_that_agree_count_before_likelier_tokens(rows):
    agreements, logprobs = np.array([n / 65 for n, _ in rows]), [value for _, value in rows]
    scores = WrittenConfidence(score="self_consistency").of(logprobs, [1] * len(rows), agreements)
    for (n, value), score in zip(rows, scores, strict=True):
        for (n_other, other), lower in zip(rows, scores, strict=True):
            if n > n_other or (n == n_other and value > other + 1e-6):
                assert score > lower


def test_samples_are_asked_for_as_the_answer_is_but_for_how_they_are_drawn():
    asked = written.check(settings("rationales", {"prompt": "{{ text }}?"}, **FIVE))
    sampled = consistency.question(asked, Samples(n=5, temperature=0.7))
    assert (sampled.prompt, sampled.max_tokens) == (asked.prompt, asked.max_tokens)
    assert (sampled.samples, sampled.temperature, asked.temperature) == (5, 0.7, 0.0)


class Engine:
    """Stands in for the student's: all of its tokens are as likely, whatever it writes; how many of
    its samples agree says how often its teacher does."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.dies_of = ""

    def label(self, asked: Recipe, _: Model, prompts: Path, labels: Path, __: Any) -> None:
        kind = asked.labels.kind
        if self.dies_of == kind:
            raise KeyboardInterrupt
        self.asked.append(kind)
        say = self.answer if kind == "generate" else self.samples
        shards = [
            [(row, say(row)) for row in corpus.read_shard(prompts, s["name"]).to_pylist()]
            for s in corpus.read_manifest(prompts)["shards"]
        ]
        codec = LIKELIEST if kind == "generate" else None
        made.write_dataset(labels.parent / f"made-{labels.name}", asked.labels, shards, codec=codec)
        (labels.parent / f"made-{labels.name}" / "labels").rename(labels)

    def answer(self, row: dict[str, Any]) -> GeneratedLabels:
        agrees = int(row["id"][4:8], 16) / 0xFFFF < (2 + agreeing(row["id"])) / 7
        return said("yes" if agrees else "no", [-0.5])

    def samples(self, row: dict[str, Any]) -> RationaleLabels | made.Quarantined:
        own = self.answer(row).output
        texts = [f" {own}" if i < agreeing(row["id"]) else "" for i in range(5)]
        if not any(texts):
            return made.quarantined(row, "Unparsable", "none of 5 samples has an answer")
        return dataclasses.replace(made.rationales([own or None for own in texts]),
                                   reasonings=texts)  # fmt: skip


def agreeing(row_id: str) -> int:
    return int(row_id[:4], 16) % 6


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    sources = [made.row(f"{split} {i}", split)
               for split in ("calibrate", "certify") for i in range(300)]  # fmt: skip
    taught = [(row, of_teacher("yes")) for row in sources]
    made.write_dataset(tmp_path / "t", settings().labels, [taught], codec=made.TOP3)
    engine = Engine()
    monkeypatch.setattr(pipeline, "label", engine.label)

    def certify(**changes: Any) -> WrittenBundle:
        return written.certify(
            settings(**FIVE | changes), tmp_path / "t" / "labels", tmp_path / "t" / "corpus",
            STUDENT, TEACHER, tmp_path / "answers", tmp_path / "bundle", inputs="i",
            on_progress=print,
        )  # fmt: skip

    certify.engine = engine  # type: ignore[attr-defined]
    return certify


def certified_rows(folder: Path, asked: Recipe) -> written.WrittenRows:
    answers = folder / "answers"
    return written.read(
        asked, folder / "t" / "labels", answers / "labels", "certify",
        answers / "samples-5-at-0.7",
    )  # fmt: skip


def test_where_samples_tell_more_than_tokens_they_are_the_score_and_are_served(run, tmp_path: Path):
    bundle = run()
    assert bundle.score in ("self_consistency", "sampled_head") and bundle.served.feasible
    assert bundle.samples == Samples(n=5, temperature=0.7)
    assert "5 sampled answers beside its own, of every request" in bundle.recommendation
    assert bundles.load_any(tmp_path / "bundle") == bundle
    rows = certified_rows(tmp_path, settings(**FIVE))
    shares = (1 + np.array([agreeing(i) for i in rows.ids])) / 6
    np.testing.assert_array_equal(rows.agreements, shares)
    accepted = rows.scores(bundle.confidence) > bundle.accept_above
    assert 0 < accepted.sum() < 300 and shares[accepted].mean() > shares[~accepted].mean()


@pytest.mark.parametrize("score", ["self_consistency", "sampled_head"])
def test_a_request_scores_to_the_last_bit_as_a_certify_row_with_the_same_samples(
    score: str, run, tmp_path: Path
):
    bundle, engine = run(), run.engine
    rows = certified_rows(tmp_path, settings(**FIVE))
    head = fit_deferral_head(rows.features(sampled=True), rows.outcomes.differs)
    confidence = WrittenConfidence(score=score, head=head if score == "sampled_head" else None)
    policy = dataclasses.replace(
        WrittenPolicy.from_bundle(bundle, written.comparison(settings(**FIVE))),
        confidence=confidence,
    )
    alone = engine.answer({"id": rows.ids[0]}).recorded
    stored = LIKELIEST.encode(alone.token_ids, alone.logprobs)
    rounded = LIKELIEST.decode(stored, 1).logprobs[:, 0].astype(np.float64)
    requests = []
    for row_id in rows.ids:
        drawn = engine.samples({"id": row_id, "text": "", "split": "certify", "label": None})
        samples = tuple(drawn.reasonings) if isinstance(drawn, RationaleLabels) else ()
        requests.append(Written(text=engine.answer({"id": row_id}).output, tokens=(),
                                logprobs=rounded, finish_reason="stop", n_prompt_tokens=1,
                                n_output_tokens=1, samples=samples))  # fmt: skip
    decided = [policy.decide_batch([one])[0] for one in requests]
    served = [d.student if isinstance(d, Escalation) else d for d in decided]
    assert all(isinstance(one, Decision) for one in served)
    got = np.array([one.confidence for one in served if one])
    assert got.tobytes() == rows.scores(confidence).tobytes()


def test_a_run_killed_while_it_samples_keeps_the_answers_and_other_samples_ask_for_no_others(run):
    run.engine.dies_of = "rationales"
    with pytest.raises(KeyboardInterrupt):
        run()
    run.engine.dies_of = ""
    run()
    run(alpha=0.25)
    assert run.engine.asked == ["generate", "rationales"]
    run(samples=5, sample_temperature=1.0, max_delta=0.9)
    assert run.engine.asked == ["generate", "rationales", "rationales"]


def test_a_score_that_takes_no_samples_has_none_drawn_at_serving(run):
    bundle = run(samples=0)
    assert bundle.samples is None and run.engine.asked == ["generate"]
    content = bundle.model_dump(exclude={"score", "deferral_head"})
    with pytest.raises(ValidationError, match="`samples` must be there exactly"):
        WrittenBundle.model_validate(content | {"score": "self_consistency"})
    with pytest.raises(RecipeError, match="needs samples of the student"):
        WrittenConfidence(score="self_consistency").of([-0.5], [1])


def test_what_nothing_would_read_is_refused_and_what_was_is_the_same(tmp_path: Path):
    from tests.conftest import DEMO

    with pytest.raises(RecipeError, match=r"certify\.samples would change nothing.*causal"):
        recipe.load(DEMO, ["certify.samples=5"])
    assert not {"samples", "sample_temperature"} & set(settings().certify.decisive())
    assert {"samples", "sample_temperature"} <= set(settings(**FIVE).certify.decisive())


# --- with a real engine ---


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_is_sampled_of_a_request_is_drawn_as_it_was_for_the_certificate(
    ray_cluster: None, tmp_path: Path
):
    """20 samples of each of 24 rows: the shares that agree have the same mean, to within four
    standard errors."""
    from serve.loading import Loaded
    from serve.writers import StudentEngine
    from tests.serve import tiny

    tiny.write_teacher(tmp_path / "student")
    student = models.resolve(str(tmp_path / "student"))
    values = tiny.a_recipe(tmp_path).model_dump(mode="json", exclude_unset=True) | {
        "labels": {"kind": "generate", "prompt": "Say more: {{ text }}", "max_tokens": 2},
        "student": {"model": str(tmp_path / "student"), "kind": "causal"},
        "certify": {"alpha": 0.2, "samples": 20, "sample_temperature": 0.2},
    }
    asked = recipe.parse(values)
    texts = {"calibrate": tiny.TEXTS[24:30], "certify": tiny.TEXTS[:24]}
    rows = [made.row(text, split) for split, some in texts.items() for text in some]
    taught = [(row, of_teacher("so")) for row in rows]
    made.write_dataset(tmp_path / "t", asked.labels, [taught], codec=made.TOP3)
    bundle = written.certify(
        asked, tmp_path / "t" / "labels", tmp_path / "t" / "corpus", student, student,
        tmp_path / "answers", tmp_path / "bundle", inputs="i", on_progress=lambda _: None,
    )  # fmt: skip
    samples = tmp_path / "answers" / "samples-20-at-0.2"
    drawn = consistency.read(samples)
    assert set(drawn) == {row["id"] for row in rows} and {len(d) for d in drawn.values()} == {20}
    certified = written.read(
        asked, tmp_path / "t" / "labels", tmp_path / "answers" / "labels", "certify", samples
    )
    of_samples = {"score": "self_consistency", "samples": {"n": 20, "temperature": 0.2}}
    served = WrittenBundle.model_validate(
        bundle.model_dump(exclude={"score", "deferral_head"}) | of_samples
    )
    loaded = Loaded(bundle=served, recipe=asked, student=student, teacher=student,
                    where=str(tmp_path / "bundle"))  # fmt: skip

    async def answers() -> list[Any]:
        engine = StudentEngine(loaded)
        try:
            return await engine.label(texts["certify"])  # type: ignore[return-value]
        finally:
            await engine.close()

    said = asyncio.run(answers())
    assert {len(one.samples) for one in said} == {20}
    policy = WrittenPolicy.from_bundle(served, written.comparison(asked))
    decided = [policy.decide_batch([one])[0] for one in said]
    scores = [(d.student if isinstance(d, Escalation) else d).confidence for d in decided]
    assert certified.agreements is not None and certified.agreements.std() > 0.05
    shares = np.clip(certified.agreements, 0.05, 0.95)
    error = np.sqrt(2 * (shares * (1 - shares)).sum() / 20) / 24
    assert abs(np.mean(scores) - certified.scores(served.confidence).mean()) < 4 * error

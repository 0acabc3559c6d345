"""What a cascade's teacher has said is labels already, where it was asked in the same way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from journeyman import corpus, recipe
from journeyman.cascade.feedback import Journal, table, worth_keeping
from journeyman.cascade.policy import Policy
from journeyman.certify.calibration import Calibrator
from journeyman.certify.confidence import Confidence
from journeyman.columns import packed
from journeyman.folder import Folder
from journeyman.labels import pipeline, taught
from journeyman.labels.cache import Cache
from journeyman.labels.replica import ReplicaSpec, _cache
from journeyman.labels.schema import label_schema, record
from journeyman.labels.taught import how_asked
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.teacher.answers import ClassLabels
from tests.conftest import DEMO
from tests.journeyman.labels.test_store import commit

COLUMNS = ("text", "title")
IDENTITY = {"kind": "classes", "labels": {"classes": {"yes": "Yes", "no": "No"}},
            "teacher": "digest", "corpus": "of these days"}  # fmt: skip
POLICY = Policy(
    label_names=("yes", "no"),
    confidence=Confidence(calibrator=Calibrator(temperature=1.0), score="margin"),
    accept_above=0.5,
    teacher_log_prior=np.log([0.9, 0.1]),  # what is kept is from before its correction
)


def said(i: int, **facts: Any) -> ClassLabels:
    logprobs = np.log(np.array([1 / (i + 3), 1 - 1 / (i + 3)]))
    return ClassLabels(
        class_logprobs=logprobs.astype(np.float32), label_mass=0.1 * i if i else None,
        n_prompt_tokens=7 + i, n_output_tokens=1, **facts,
    )  # fmt: skip


def text(i: int) -> str:
    return packed({"text": f"what of {i}?", "title": "t"}, COLUMNS)


def keep(to: Path, answers: dict[str, ClassLabels], asked: str) -> None:
    """As a cascade does."""
    decisions = [POLICY.escalated(labels, None) for labels in answers.values()]
    journal = Journal(to, Folder(to).put, roll_rows=2, roll_s=60)
    n = len(decisions)
    everything = frozenset(range(n))
    journal.add(worth_keeping([*answers], decisions, everything, [False] * n, 0.1, "b", 1.0, asked))
    journal.close()


def a_recipe(tmp_path: Path) -> Recipe:
    source = tmp_path / "own.jsonl"
    source.write_text(json.dumps({"text": "own", "title": "t", "label": "banking"}) + "\n")
    return recipe.load(
        DEMO,
        [
            f"corpus={{sources: [{source}], columns: {{label: label, meta: [title]}}}}",
            f"corpus.feedback={tmp_path / 'kept'}",
            "labels.target='{{ title }} {{ text }}'",
        ],
    )


def how(tmp_path: Path, identity: dict[str, Any]) -> str:
    return how_asked(a_recipe(tmp_path), identity)


def ids_of(tmp_path: Path, asked: Recipe) -> dict[str, str]:
    """Of what was kept, as `journeyman prepare` tells rows apart, by text."""
    manifest = corpus.prepare(asked, tmp_path / "corpus")
    tables = [corpus.read_shard(tmp_path / "corpus", s["name"]) for s in manifest["shards"]]
    rows = pa.concat_tables(tables).to_pylist()
    return {row["text"]: row["id"] for row in rows if row["text"] != "own"}


def test_rows_are_the_labels_that_were_paid_for_bit_for_bit(tmp_path: Path):
    answers = {text(i): said(i, finish_reason="stop", n_cached_tokens=i) for i in range(5)}
    keep(tmp_path / "kept", answers, how(tmp_path, IDENTITY | {"corpus": ""}))
    asked = a_recipe(tmp_path)
    ids = ids_of(tmp_path, asked)
    cache = Cache(tmp_path / "cache", IDENTITY)

    assert taught.collect(asked, IDENTITY, cache) == 5

    found = Cache(tmp_path / "cache", IDENTITY).lookup([*ids.values()])
    wanted = [record({"id": ids[f"what of {i}?"], "split": "train", "label": None}, said(
        i, finish_reason="stop", n_cached_tokens=i), None) for i in range(5)]  # fmt: skip
    schema = label_schema("classes")
    got = pa.Table.from_pylist([found[one["id"]] for one in wanted], schema)
    assert got == pa.Table.from_pylist(wanted, schema)


def test_a_text_that_came_often_and_a_run_that_is_started_again_add_each_row_once(tmp_path: Path):
    for _ in range(3):
        keep(tmp_path / "kept", {text(0): said(0), text(1): said(1)}, how(tmp_path, IDENTITY))
    asked, where = a_recipe(tmp_path), tmp_path / "cache"
    for _ in range(2):
        taught.collect(asked, IDENTITY, Cache(where, IDENTITY))
    kept = [pq.read_table(path) for path in where.rglob("*.parquet")]
    assert sum(map(len, kept)) == 2


@pytest.mark.parametrize(
    "other",
    [{"teacher": "another"}, {"labels": {"classes": {"no": "No", "yes": "Yes"}}}],
)
def test_what_another_teacher_said_or_to_another_question_is_asked_again(
    tmp_path: Path, other: dict[str, Any]
):
    keep(tmp_path / "kept", {text(0): said(0)}, how(tmp_path, IDENTITY | other))
    assert taught.collect(a_recipe(tmp_path), IDENTITY, Cache(tmp_path / "c", IDENTITY)) == 0


def test_a_teacher_that_read_longer_texts_is_asked_again(tmp_path: Path):
    """What is too long is left out of a dataset by what it is labeled with."""
    keep(tmp_path / "kept", {text(0): said(0)}, how(tmp_path, IDENTITY))
    asked = a_recipe(tmp_path)
    shorter = asked.teacher.model_copy(update={"max_model_len": 64})
    asked = asked.model_copy(update={"teacher": shorter})
    assert taught.collect(asked, IDENTITY, Cache(tmp_path / "c", IDENTITY)) == 0


def test_feedback_that_is_gone_or_damaged_stops_no_labeling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "kept").mkdir()
    spec = a_spec(tmp_path)
    with caplog.at_level("WARNING"):
        assert pipeline._taught(spec).taught
        (tmp_path / "kept" / "cut.parquet").write_bytes(b"PAR1")
        assert pipeline._taught(spec).taught
    assert [word in caplog.text for word in ("no Parquet file there", "cut short")] == [True] * 2


def test_feedback_of_before_and_what_the_student_answered_have_no_labels(tmp_path: Path):
    kept = tmp_path / "kept"
    student = POLICY.decide([3.0, -3.0])
    rows = worth_keeping(
        [text(0)],
        [student],
        frozenset(),
        [True],
        0.1,
        "b",
        1.0,
        how(tmp_path, IDENTITY),  # type: ignore[list-item]
    )
    assert [(row.asked, row.labels) for row in rows] == [(None, None)]
    keep(kept, {text(1): said(1)}, how(tmp_path, IDENTITY))
    [path] = kept.glob("*.parquet")
    own = table([]).schema.names[:10]
    assert own[-1] == "received_at"
    pq.write_table(pq.read_table(path).select(own), path)  # as older cascades wrote it
    assert taught.collect(a_recipe(tmp_path), IDENTITY, Cache(tmp_path / "c", IDENTITY)) == 0


def a_spec(tmp_path: Path) -> ReplicaSpec:
    asked = a_recipe(tmp_path)
    model = Model(
        reference="m", path=tmp_path, weights_digest="w", tokenizer_digest="t", size_bytes=1
    )
    return ReplicaSpec(
        recipe=asked, teacher=asked.teacher, model=model, corpus_dir=tmp_path / "corpus",
        labels=str(tmp_path / "labels"), identity=pipeline.identity(asked, model, "corpus"),
    )  # fmt: skip


def test_without_a_cache_of_its_own_a_run_copies_them_and_keeps_nothing_else(tmp_path: Path):
    spec = a_spec(tmp_path)
    keep(tmp_path / "kept", {text(0): said(0)}, how(tmp_path, spec.identity))

    cache = _cache(None, pipeline._taught(spec))

    assert cache is not None
    [known] = ids_of(tmp_path, spec.recipe).values()
    fresh = record({"id": "0" * 32, "split": "train", "label": None}, said(1), None)
    cache.add(commit(ok=1), pa.Table.from_pylist([fresh], label_schema("classes")))
    cache.refresh()
    assert set(cache.lookup([known, fresh["id"]])) == {known}

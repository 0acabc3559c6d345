"""A teacher whose words a column holds: labeled without an engine, by the same replica."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from journeyman import corpus, models, recipe
from journeyman.errors import RecipeError
from journeyman.labels import pipeline
from journeyman.labels.replica import Replica, ReplicaSpec, Work
from journeyman.labels.store import LabelStore
from journeyman.recipe import Recipe

ROWS = [
    {"text": "two and two?", "said": "They are 4.\n#### 4"},
    {"text": "ten and ten?", "said": "Ten twice is 1,020, no, 20.\n#### $20.00"},
    {"text": "how many?", "said": "I do not know."},
    {"text": "nothing said", "said": "  "},
]


def asked(folder: Path, **labels: Any) -> Recipe:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rationales = {"kind": "rationales", "prompt": "{{ text }}", "number": True,
                  "answer_pattern": r"####\s*(?P<answer>.+)"}  # fmt: skip
    return recipe.parse(
        {
            "name": "written",
            "corpus": {
                "sources": [str(source)],
                "columns": {"meta": ["said"]},
                "shares": {"train": 1.0},
            },
            "teacher": {"model": "people", "column": "said"},
            "labels": labels or rationales,
        }
    )


def labeled(folder: Path, asked_: Recipe) -> tuple[pa.Table, dict[str, str]]:
    """Labels in the order of their texts, and why rows are in quarantine."""
    manifest = corpus.prepare(asked_, folder / "corpus")
    store = LabelStore(folder / "labels")
    model = models.teacher(asked_.teacher)
    store.open(pipeline.identity(asked_, model, manifest["digest"]))
    spec = ReplicaSpec(
        recipe=asked_, teacher=asked_.teacher, model=model, corpus_dir=folder / "corpus",
        labels=store.where, identity=store.manifest()["identity"],
    )  # fmt: skip
    replica = Replica(spec, lambda *_: None)
    try:
        commit = replica.label(Work(shard="part-00000.parquet"))
    finally:
        replica.close()
    assert commit.rows == len(ROWS) == commit.ok + commit.quarantined
    quarantine = {json.loads(row.input)["text"]: f"{row.error_class}: {row.message}"
                  for row in store.read_quarantine(commit)}  # fmt: skip
    return store.read_shard(commit), quarantine


def test_reasonings_are_parsed_as_a_teachers_are(tmp_path: Path) -> None:
    table, quarantine = labeled(tmp_path, asked(tmp_path))
    found = {row["answer"]: row["reasoning"] for row in table.to_pylist()}
    assert found == {"4": ROWS[0]["said"], "20": ROWS[1]["said"]}
    assert "none of 1 samples has an answer as labels.answer_pattern" in quarantine["how many?"]
    assert "EmptyTarget: teacher.column: said is empty" in quarantine["nothing said"]


def test_answers_are_text_without_tokens(tmp_path: Path) -> None:
    table, quarantine = labeled(tmp_path, asked(tmp_path, kind="generate", prompt="{{ text }}"))
    assert set(table["output"].to_pylist()) == {row["said"] for row in ROWS[:3]}
    assert table["token_ids"].null_count == 3 and set(quarantine) == {"nothing said"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"teacher": {"model": "people", "column": "other"}}, "no column of corpus.columns.meta"),
        ({"teacher": {"model": "p", "column": "said", "url": "http://x"}}, "was written before"),
        ({"labels": {"kind": "logits"}}, "holds one text a row"),
        ({"labels": {"kind": "rationales", "prompt": "{{ text }}", "samples": 3}}, "one text a"),
    ],
)
def test_what_a_column_cannot_give_is_refused(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    values = asked(tmp_path).model_dump(mode="json") | changes
    with pytest.raises(RecipeError, match=why):
        recipe.parse(values)


def test_two_answers_to_one_question_are_two_rows_and_a_new_one_is_another(tmp_path: Path) -> None:
    """The label is made of what was written, so a row that says something else is no duplicate."""
    settings = asked(tmp_path)
    named = corpus.id_columns(settings)
    assert named == ["said", "text"] and corpus.prompt_columns(settings) == ["text"]
    source = tmp_path / "rows.jsonl"
    twice = [{"text": "two and two?", "said": said} for said in ("#### 4", "#### four")]
    source.write_text("".join(json.dumps(row) + "\n" for row in twice))
    assert corpus.prepare(settings, tmp_path / "corpus")["rows"] == 2

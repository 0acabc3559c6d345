"""Rows that Ray Data makes, shard by shard in other processes, are those that are made here."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from journeyman.errors import DataError
from journeyman.labels import dataset
from journeyman.models import Model
from journeyman.recipe import Labels
from journeyman.student import class_rows, classifying, token_rows
from journeyman.student.models import load_tokenizer

from ..labels import synthetic as made
from .conftest import TOPICS, make_recipe, make_rows
from .test_token_rows import text, tokens

SHARDS = (4, 1, 7, 3)  # rows of each
TOPIC_NAMES = tuple(TOPICS)


def labeled(folder: Path, labels: Labels) -> None:
    """Every fourth row is a calibrate one, with a gold answer."""
    numbers = itertools.count()
    shards = []
    for n in SHARDS:
        shard = []
        for i in itertools.islice(numbers, n):
            ids = tokens(4 + i)
            split, gold = ("calibrate", "w1 w2") if i % 4 == 3 else ("train", None)
            source = made.row(text(ids), split, gold)
            dense = made.distributions(len(ids) - (labels.kind == "logits"), seed=i)
            answer = made.generated(text(ids), ids, dense) if labels.kind == "generate" else (
                made.logits(ids, dense))  # fmt: skip
            n_read = len(ids) + (labels.kind == "generate")  # behind "the"
            shard.append((source, dataclasses.replace(answer, n_prompt_tokens=n_read)))
        shards.append(shard)
    made.write_dataset(folder, labels, shards, codec=made.TOP3)


def bytes_below(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", ["logits", "generate"])
def test_rows_of_tokens(
    kind: str, tiny_llama: Model, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a task gives a shard in many tables, and rows are cut."""
    labels = made.settings(kind, **({"prompt": "the {{ text }}"} if kind == "generate" else {}))
    labeled(tmp_path, labels)
    counts = {}
    for name, over in (
        ("here", dataset.made),
        ("ray", dataset.streamed),
        ("many", dataset.streamed),
    ):
        if name == "many":
            monkeypatch.setattr(token_rows, "_TABLE_BYTES", 1)
        counts[name] = token_rows.build(
            tmp_path / "labels", tmp_path / "corpus", labels, load_tokenizer(tiny_llama.path), 14,
            tmp_path / name, as_text=False, over=over,
        )  # fmt: skip
    assert counts["here"] == counts["ray"] == counts["many"]
    assert counts["here"]["train"] == 12 and counts["here"]["cut"] > 0
    here = bytes_below(tmp_path / "here")
    assert bytes_below(tmp_path / "ray") == bytes_below(tmp_path / "many") == here
    assert (f"{token_rows.GOLD}/rows.json" in here) == (kind == "generate")


@pytest.mark.parametrize("hard_labels", [False, True])
def test_rows_of_a_classifier(
    hard_labels: bool, tiny_encoder: Model, tmp_path: Path, ray_cluster: None
) -> None:
    rows, student = make_rows(21, 9), make_recipe().learner()
    shards = [
        [
            (
                made.row(rows.texts[i] + f" {i}", str(rows.splits[i]), TOPIC_NAMES[i % 3]),
                made.classes(*np.exp(rows.logprobs[i])),
            )
            for i in part
        ]
        for part in (range(11), range(11, 12), range(12, 30))
    ]
    asked = made.settings("classes", classes={t: f"the {t}" for t in TOPICS})
    made.write_dataset(tmp_path, asked, shards)
    for name, over in (("here", dataset.made), ("ray", dataset.streamed)):
        class_rows.build(
            tmp_path / "labels", tmp_path / "corpus",
            classifying.load_tokenizer(tiny_encoder.path, student), student, tmp_path / name,
            hard_labels=hard_labels, over=over,
        )  # fmt: skip
    assert bytes_below(tmp_path / "ray") == bytes_below(tmp_path / "here")
    train, held_out = class_rows.load(tmp_path / "ray")
    assert (len(train.ids), len(held_out.gold)) == (21, 9)
    (tmp_path / "ray" / "learned.npy").write_bytes(b"")
    with pytest.raises(DataError, match="cut short"):
        class_rows.load(tmp_path / "ray")

"""A finished dataset comes back whole, in corpus order, in each form; filtered rows stay out."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from journeyman.errors import DataError, JourneymanError
from journeyman.labels import dataset
from journeyman.labels.schema import Commit, label_schema, record
from journeyman.labels.store import LabelStore
from journeyman.recipe import Classes
from tests.journeyman.labels import synthetic as made
from tests.journeyman.labels.test_store import CODEC, LABELS, RECORDED, commit

N_SHARDS, N_ROWS = 3, 5


def finished(where: Path, name: str = "logits") -> LabelStore:
    """Rows s0r0, s0r1, ... of one kind of label."""
    kind, labels, codec = LABELS[name]
    store = LabelStore(where)
    store.open({"kind": kind})
    shards = [f"part-{i:05d}.parquet" for i in range(N_SHARDS)]
    for s in reversed(range(N_SHARDS)):
        rows = [
            record({"id": f"s{s}r{r}", "split": "train", "label": None}, labels, codec)
            for r in range(N_ROWS)
        ]
        table = pa.Table.from_pylist(rows, schema=label_schema(kind))
        store.write(commit(shards[s], ok=N_ROWS), table, [], [])
    store.finish({"complete": True, "shards": shards, "digest": name, "codec": CODEC.describe()})
    return store


def leave_out(store: LabelStore, *ids: str) -> None:
    """As labels.quality does."""
    store.write_table("filtered/filters.parquet", pa.table({"id": list(ids)}))
    store.finish({"filtered": {"file": "filtered/filters.parquet", "rows": len(ids)}})


ALL = [f"s{s}r{r}" for s in range(N_SHARDS) for r in range(N_ROWS)]
KEPT = [i for i in ALL if i not in ("s0r0", "s2r4")]


def test_rows_come_in_corpus_order_and_without_those_that_filters_leave_out(tmp_path: Path):
    store = finished(tmp_path)
    assert dataset.read(tmp_path)["id"].to_pylist() == ALL
    assert [len(table) for table in dataset.tables(tmp_path)] == [N_ROWS] * N_SHARDS
    store.finish({"filtered": {"file": None, "rows": 0}})
    assert dataset.read(tmp_path)["id"].to_pylist() == ALL
    leave_out(store, "s0r0", "s2r4")
    assert dataset.read(tmp_path)["id"].to_pylist() == KEPT
    assert dataset.read(f"file://{tmp_path}")["id"].to_pylist() == KEPT
    assert dataset.read(tmp_path, filtered=True)["id"].to_pylist() == ALL
    leave_out(store, *ALL)
    assert dataset.read(tmp_path) == label_schema("logits").empty_table()


@pytest.mark.parametrize("name", ["logits", "generate"])
def test_distributions_are_decoded_row_by_row(tmp_path: Path, name: str):
    store = finished(tmp_path, name)
    codec = dataset.codec_of(store.manifest())
    assert codec == CODEC
    decoded = list(dataset.distributions(dataset.read(tmp_path), codec))
    assert len(decoded) == len(ALL)
    for one in decoded:
        assert one.token_ids.tolist() == RECORDED.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, RECORDED.logprobs, atol=2e-3)


def test_a_teacher_behind_a_url_gave_no_distributions(tmp_path: Path):
    finished(tmp_path, "generate behind a URL")
    assert list(dataset.distributions(dataset.read(tmp_path), CODEC)) == [None] * len(ALL)
    assert dataset.codec_of({"codec": None}) is dataset.codec_of({}) is None


@pytest.mark.parametrize("name", LABELS)
def test_hugging_face_gets_the_same_rows(tmp_path: Path, name: str, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    store = finished(tmp_path / "labels", name)
    assert dataset.to_hf(tmp_path / "labels").to_list() == dataset.read(store.where).to_pylist()
    leave_out(store, "s0r0", "s2r4")
    assert dataset.to_hf(store.where)["id"][:] == KEPT
    assert dataset.to_hf(store.where, filtered=True)["id"][:] == ALL
    written = sorted((tmp_path / "cache" / "journeyman").iterdir())
    assert len(written) == 3 and all(path.suffix == ".arrow" for path in written)
    dataset.to_hf(store.where)
    assert sorted((tmp_path / "cache" / "journeyman").iterdir()) == written


def test_what_ray_reads_on_its_workers_is_the_same(tmp_path: Path):
    """Without Ray: the function that it runs."""
    store = finished(tmp_path)
    batch = pa.table({"commit": [_json(c) for c in store.commits().values()]})
    for left_out, expected in ((None, ALL), (pa.array(["s0r0", "s2r4"]), KEPT)):
        found = list(dataset._make(batch, store, left_out, lambda shard, table: [table]))
        assert [row_id for table in found for row_id in table["id"].to_pylist()] == expected


def test_ray_gets_the_same_rows(tmp_path: Path, ray_cluster: None):
    store = finished(tmp_path)
    leave_out(store, "s0r0", "s2r4")
    assert [row["id"] for row in dataset.read_ray(tmp_path).iter_rows()] == KEPT


def test_ray_makes_shards_into_what_is_asked_in_corpus_order(tmp_path: Path, ray_cluster: None):
    """Also where later shards are ready long before the first one."""
    finished(tmp_path)

    def named(shard: str, table: pa.Table) -> Iterator[pa.Table]:
        time.sleep(1.0 if shard == "part-00000.parquet" else 0.0)
        for row_id in table["id"].to_pylist():
            yield pa.table({"shard": [shard], "id": [row_id]})

    def rows(tables: Iterable[pa.Table]) -> list[dict[str, str]]:
        return [row for table in tables for row in table.to_pylist()]

    expected = rows(dataset.made(tmp_path, named))
    assert [row["id"] for row in expected] == ALL
    assert rows(dataset.streamed(tmp_path, named)) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("part-00001.parquet: damaged."), r"^part-00001.parquet: damaged.$"),
        (ValueError("odd\nbytes"), r"^\S+part-00001\S*\.parquet: ValueError: odd$"),
    ],
)
def test_what_is_wrong_in_a_task_of_ray_is_said_in_one_sentence(
    error: Exception, expected: str, tmp_path: Path, ray_cluster: None
):
    finished(tmp_path)

    def damaged(shard: str, table: pa.Table) -> list[pa.Table]:
        if shard == "part-00001.parquet":
            raise error
        return [table]

    with pytest.raises(JourneymanError, match=expected):
        list(dataset.streamed(tmp_path, damaged))


def test_an_unfinished_or_broken_dataset_is_refused(tmp_path: Path):
    store = finished(tmp_path)
    store.folder.delete("commits/part-00001.json")
    with pytest.raises(DataError, match=r"part-00001.parquet has no commit; run journeyman label"):
        dataset.read(tmp_path)
    store.finish({"complete": False})
    with pytest.raises(DataError, match="not finished; run journeyman label again"):
        dataset.read(tmp_path)


def test_a_dataset_is_finished_once_its_filters_are(tmp_path: Path):
    """A run that was killed between its last label and them would be read uncorrected."""
    store = finished(tmp_path)
    store.finish({"filtered": None})
    for read in (lambda: dataset.read(tmp_path), lambda: dataset.finished_manifest(store)):
        with pytest.raises(DataError, match="not finished; run journeyman label again"):
            read()
    assert len(dataset.read(tmp_path, filtered=True))


def test_class_rows_come_shard_by_shard_in_corpus_order(tmp_path: Path):
    """Each by the prior of all, and a shard without rows of the splits is passed over."""
    asked = Classes(classes={"a": "this", "b": "that"}, prompt="{{ text }}")
    named = [("one", "train", "a"), ("two", "test", None), ("three", "test", "b"),
             ("four", "train", "b"), ("five", "calibrate", None)]  # fmt: skip
    chances = {"one": 0.9, "two": 0.2, "three": 0.5, "four": 0.3, "five": 0.6}
    rows = [(made.row(*facts), made.classes(chances[facts[0]], 1 - chances[facts[0]]))
            for facts in named]  # fmt: skip
    prior = np.log([0.8, 0.2])
    made.write_dataset(tmp_path, asked, [rows[:2], rows[2:3], rows[3:]], log_prior=prior.tolist())
    given = (tmp_path / "labels", tmp_path / "corpus")
    parts = list(dataset.class_shards(*given, ("train", "calibrate")))
    assert [part.texts for part in parts] == [["one"], ["four", "five"]]
    for part in (*parts, dataset.read_classes(*given)):
        odds = np.array([chances[text] / (1 - chances[text]) / 4 for text in part.texts])
        np.testing.assert_allclose(np.exp(part.logprobs[:, 0]), odds / (1 + odds), rtol=1e-6)
    whole = dataset.read_classes(*given)
    assert whole.ids == [source["id"] for source, _ in rows]
    assert whole.gold.tolist() == [0, -1, 1, 1, -1] and whole.labels == ("a", "b")
    assert whole.splits.tolist() == [split for _, split, _ in named]
    assert dataset.read_classes(*given, ("certify",)).logprobs.shape == (0, 2)


def test_class_rows_of_another_kind_are_refused(tmp_path: Path):
    finished(tmp_path)
    with pytest.raises(DataError, match="kind logits, where class distributions are needed"):
        dataset.read_classes(tmp_path, tmp_path / "corpus")


def _json(one: Commit) -> str:
    import dataclasses
    import json

    return json.dumps(dataclasses.asdict(one))

"""A replica with a real engine: shards to commits, whatever the engine and the rows do."""

import asyncio
import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from journeyman import corpus, recipe
from journeyman.labels.cache import Cache
from journeyman.labels.replica import Counts, Replica, Work
from journeyman.labels.store import LabelStore
from journeyman.teacher import tasks
from journeyman.teacher.engine import EngineDied
from tests.conftest import children

TEXTS = ["send money to my sister", "book a table for two", "my car's engine light is on"]
LONG = "x " * 600  # longer than the recipe's max_model_len of 512 tokens


def write_shard(replica: Replica, name: str, texts: list[str]) -> list[str]:
    """Returns the rows' ids; the same text has the same id in every shard."""
    ids = [recipe.digest(text) for text in texts]
    rows = [
        {"id": i, "text": t, "label": None, "split": "train", "meta": None, "count": 1}
        for i, t in zip(ids, texts, strict=True)
    ]
    path = replica._spec.corpus_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=corpus.schema()), path)
    return ids


@pytest.fixture(scope="module")
def store(replica: Replica) -> LabelStore:
    return LabelStore(replica._spec.labels)


def test_every_row_is_labeled_or_quarantined_with_its_reason(replica: Replica, store: LabelStore):
    ids = write_shard(replica, "part-00000.parquet", [TEXTS[0], LONG, TEXTS[1]])
    commit = replica.label(Work(shard="part-00000.parquet"))
    assert (commit.rows, commit.ok, commit.quarantined, commit.filtered) == (3, 2, 1, 0)
    assert store.read_shard(commit)["id"].to_pylist() == [ids[0], ids[2]]
    (bad,) = store.read_quarantine(commit)
    assert (bad.id, bad.error_class) == (ids[1], "ContextOverflow")
    assert json.loads(bad.input)["text"] == LONG
    assert commit.prompt_tokens == sum(store.read_shard(commit)["n_prompt_tokens"].to_pylist())
    assert store.read_attempts("part-00000.parquet") is None


def test_a_shard_that_is_committed_is_not_labeled_again(replica: Replica, reports: list[Counts]):
    write_shard(replica, "part-00001.parquet", TEXTS)
    first = replica.label(Work(shard="part-00001.parquet"))
    rows_before = sum(counts.rows for counts in reports)
    assert replica.label(Work(shard="part-00001.parquet")) == first
    assert sum(counts.rows for counts in reports) == rows_before


def test_a_requeue_labels_the_quarantined_rows_and_keeps_the_others(
    replica: Replica, store: LabelStore
):
    ids = write_shard(replica, "part-00002.parquet", [LONG, *TEXTS])
    first = replica.label(Work(shard="part-00002.parquet"))
    assert first.quarantined == 1
    write_shard_with_ids(replica, "part-00002.parquet", ids, ["now short enough", *TEXTS])
    again = replica.label(Work(shard="part-00002.parquet", generation=1, before=first))
    assert (again.rows, again.ok, again.quarantined) == (4, 4, 0)
    assert store.commits()["part-00002.parquet"] == again
    table = store.read_shard(again)
    assert table["id"].to_pylist() == ids
    assert table.slice(1).equals(store.read_shard(first))
    assert again.prompt_tokens == sum(table["n_prompt_tokens"].to_pylist())


def write_shard_with_ids(replica: Replica, name: str, ids: list[str], texts: list[str]) -> None:
    write_shard(replica, name, texts)
    path = replica._spec.corpus_dir / name
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, table.schema.field("id"), pa.array(ids)), path)


def test_rows_labeled_before_are_copied_from_the_cache(
    replica: Replica, store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replica, "_cache", Cache(tmp_path / "cache", replica._spec.identity))
    write_shard(replica, "part-00003.parquet", TEXTS)
    first = replica.label(Work(shard="part-00003.parquet"))
    assert first.copied == 0
    replica._cache.refresh()
    write_shard(replica, "part-00004.parquet", [*TEXTS, "and a new one"])
    second = replica.label(Work(shard="part-00004.parquet"))
    assert (second.ok, second.copied) == (4, 3)
    copied = store.read_shard(second).slice(0, 3)
    assert copied.equals(store.read_shard(first))
    assert second.prompt_tokens == store.read_shard(second)["n_prompt_tokens"][3].as_py()


def test_an_engine_that_is_killed_is_replaced_and_no_row_is_lost(
    replica: Replica, store: LabelStore, reports: list[Counts]
):
    texts = [f"{text} number {i}" for i in range(30) for text in TEXTS]
    ids = write_shard(replica, "part-00005.parquet", texts)
    done_before = sum(counts.rows for counts in reports)

    def kill_in_mid_shard() -> None:
        while sum(counts.rows for counts in reports) == done_before:
            time.sleep(0.02)
        for process in children("EngineCore"):
            os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_in_mid_shard)
    killer.start()
    commit = replica.label(Work(shard="part-00005.parquet"))
    killer.join()
    assert commit.engine_restarts == 1
    assert (commit.ok, commit.quarantined) == (len(texts), 0)
    assert store.read_shard(commit)["id"].to_pylist() == ids


@pytest.mark.slow  # a stand-in of it is in test_poison
@pytest.mark.timeout(600)  # four engine starts
def test_a_row_that_kills_the_engine_each_time_is_found_and_the_others_are_kept(
    replica: Replica, store: LabelStore
):
    """The engine is killed for real; only the choice of the row that does it is the test's."""
    guilty = "this one kills"
    write_shard(replica, "part-00006.parquet", [TEXTS[0], guilty, TEXTS[1]])
    task, run_row = replica._task, replica._task.run

    async def deadly(row, seed):
        if row["text"] == guilty:
            died = replica._backend._died  # of this engine: by and by another takes its place
            for process in children("EngineCore"):
                os.kill(process.pid, signal.SIGKILL)
            await asyncio.wait({died})
            raise EngineDied
        return await run_row(row, seed)

    task.run = deadly
    try:
        commit = replica.label(Work(shard="part-00006.parquet"))
    finally:
        task.run = run_row
    assert (commit.ok, commit.quarantined) == (2, 1)
    (bad,) = store.read_quarantine(commit)
    assert (bad.error_class, json.loads(bad.input)["text"]) == ("EngineDied", guilty)


def test_rows_that_begin_alike_are_asked_one_behind_the_other(
    replica: Replica, store: LabelStore, monkeypatch: pytest.MonkeyPatch
):
    """So that they find each other's prompts in the engine's prefix cache."""
    reports = [f"Report {n}: {'nothing new to say ' * 8}" for n in "bac"]
    texts = [f"{report}, question {i}" for i in (2, 1) for report in reports]
    ids = write_shard(replica, "part-00009.parquet", texts)
    labels = replica._spec.recipe.labels.model_copy(
        update={"scoring": "direct", "classes": {"yes": " yes", "no": " no"},
                "prompt": "{{ text }}. Yes or no?"}
    )  # fmt: skip
    task = tasks.local(labels, replica._backend)
    asked, run_row = [], task.run

    async def listening(row, seed):
        asked.append(row["text"])
        return await run_row(row, seed)

    task.run = listening
    monkeypatch.setattr(replica, "_task", task)
    monkeypatch.setattr(replica._rows, "_task", task)
    commit = replica.label(Work(shard="part-00009.parquet"))
    assert asked == sorted(texts) != texts
    assert store.read_shard(commit)["id"].to_pylist() == ids


def test_replica_time_adds_up_over_commits(replica: Replica, store: LabelStore):
    started = time.monotonic()
    before = {c.shard for c in store.commits().values()}
    for number in (7, 8):
        write_shard(replica, f"part-{number:05d}.parquet", [f"{t} {number}" for t in TEXTS])
    replica.label(Work(shard="part-00007.parquet"))
    between = time.monotonic()
    replica.label(Work(shard="part-00008.parquet"))
    last = store.commits()["part-00008.parquet"]
    assert "part-00008.parquet" not in before
    assert 0 < last.replica_seconds <= time.monotonic() - started
    assert last.replica_seconds == pytest.approx(time.monotonic() - between, abs=0.5)
    assert dataclasses.asdict(last)["seconds"] > 0

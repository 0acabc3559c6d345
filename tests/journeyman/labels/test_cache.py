"""Rows labeled before are copied, whatever dataset they are in; a damaged cache harms nothing."""

import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from journeyman.labels.cache import Cache
from journeyman.labels.parquet import parquet_table
from journeyman.labels.schema import Commit, label_schema, record
from journeyman.teacher.answers import ClassLabels
from tests.journeyman.labels.test_store import IDENTITY, commit


def row_id(name: object) -> str:
    return hashlib.blake2b(str(name).encode(), digest_size=16).hexdigest()


def shard(ids: Sequence[str], split: str = "train") -> pa.Table:
    """Rows whose labels tell them apart."""
    rows = []
    for number, i in enumerate(ids):
        logprobs = np.array([-number - 1, int(i[:6], 16)], np.float32)
        labels = ClassLabels(
            n_prompt_tokens=9, n_output_tokens=1, class_logprobs=logprobs, label_mass=None
        )
        rows.append(record({"id": i, "split": split, "label": "yes"}, labels, None))
    return pa.Table.from_pylist(rows, schema=label_schema("classes"))


def committed(table: pa.Table, copied: int = 0) -> Commit:
    return commit(ok=len(table), copied=copied)


@pytest.fixture(params=["folder", "memory"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "cache") if request.param == "folder" else f"memory:///{uuid.uuid4()}"


IDS = [row_id(i) for i in range(100)]


def test_rows_of_an_earlier_dataset_are_found_and_come_back_exactly(where: str):
    first = Cache(where, IDENTITY | {"corpus": "one"})
    assert first.lookup(IDS) == {}
    tables = [shard(IDS[:30]), shard(IDS[30:60])]
    for table in tables:
        first.add(committed(table), table)
    later = Cache(where, IDENTITY | {"corpus": "two"})
    wanted = [*IDS[90:], *IDS[25:35][::-1]]
    found = later.lookup(wanted)
    assert set(found) == set(IDS[25:35])
    # As rows of a dataset again: bit for bit what was labeled.
    again = pa.Table.from_pylist([found[i] for i in IDS[25:35]], label_schema("classes"))
    assert again == pa.concat_tables(tables).slice(25, 10).combine_chunks()


@pytest.mark.parametrize(
    "other",
    [
        {"teacher": "two"},
        {"labels": {"classes": {"yes": "Yes", "no": "Not"}}},
        {"labels": {"classes": {"no": "No", "yes": "Yes"}}},
    ],
)
def test_labels_made_otherwise_are_not_found(where: str, other: dict):
    table = shard(IDS)
    Cache(where, IDENTITY).add(committed(table), table)
    assert len(Cache(where, IDENTITY).lookup(IDS)) == 100
    assert Cache(where, IDENTITY | other).lookup(IDS) == {}


def test_each_row_is_kept_once(tmp_path: Path):
    cache = Cache(tmp_path, IDENTITY)
    cache.add(committed(shard(IDS[:50])), shard(IDS[:50]))
    cache.add(committed(shard(IDS[:50])), shard(IDS[:50]))
    cache = Cache(tmp_path, IDENTITY)
    cache.add(committed(shard(IDS[:50]), copied=50), shard(IDS[:50]))
    cache.add(committed(shard(IDS), copied=50), shard(IDS))
    kept = [parquet_table(path.read_bytes())["id"].to_pylist() for path in data_files(tmp_path)]
    assert sorted(kept) == sorted([IDS[:50], IDS[50:]])
    assert set(Cache(tmp_path, IDENTITY).lookup(IDS)) == set(IDS)


def test_refresh_takes_in_what_others_added(where: str):
    ours, theirs = Cache(where, IDENTITY), Cache(where, IDENTITY)
    assert ours.lookup(IDS) == {}
    theirs.add(committed(shard(IDS)), shard(IDS))
    assert ours.lookup(IDS) == {}
    ours.refresh()
    assert set(ours.lookup(IDS)) == set(IDS)


def test_ids_with_the_same_first_half_are_told_apart(where: str):
    twins = ["0123456789abcdef" + tail * 16 for tail in "abc"]
    cache = Cache(where, IDENTITY)
    cache.add(committed(shard(twins[:1])), shard(twins[:1]))
    cache = Cache(where, IDENTITY)
    assert set(cache.lookup(twins)) == {twins[0]}


def test_a_row_in_two_files_is_found_though_one_of_them_is_gone(tmp_path: Path):
    """Two replicas may add the same rows at once."""
    one, two = Cache(tmp_path, IDENTITY), Cache(tmp_path, IDENTITY)
    one.lookup([]), two.lookup([])
    one.add(committed(shard(IDS)), shard(IDS))
    two.add(committed(shard(IDS[:50])), shard(IDS[:50]))
    data_files(tmp_path)[0].unlink()
    assert set(Cache(tmp_path, IDENTITY).lookup(IDS[:50])) == set(IDS[:50])


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("ending", ["parquet", "ids"])
@pytest.mark.parametrize("damage", [cut_off, zeros, empty, Path.unlink])
def test_a_damaged_entry_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, ending: str
):
    cache = Cache(tmp_path, IDENTITY)
    cache.add(committed(shard(IDS[:50])), shard(IDS[:50]))
    cache.add(committed(shard(IDS[50:])), shard(IDS[50:]))
    (bad,) = [p for p in data_files(tmp_path) if parquet_table(p.read_bytes())["id"][0].as_py()
              == IDS[0]]  # fmt: skip
    damage(bad.with_suffix(f".{ending}"))
    cache = Cache(tmp_path, IDENTITY)
    with caplog.at_level(logging.WARNING):
        assert set(cache.lookup(IDS)) == set(IDS[50:])
        assert set(cache.lookup(IDS)) == set(IDS[50:])
    if damage in (cut_off, empty) or ending == "parquet":
        assert sum("its rows are not used" in line for line in caplog.messages) == 1
    # Labeled anew, the rows are here again.
    cache.add(committed(shard(IDS[:50])), shard(IDS[:50]))
    assert set(Cache(tmp_path, IDENTITY).lookup(IDS)) == set(IDS)


def test_a_cache_that_cannot_be_written_harms_nothing(tmp_path: Path, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    cache = Cache(tmp_path / "cache", IDENTITY)
    assert cache.lookup(IDS) == {}
    with caplog.at_level(logging.WARNING):
        cache.add(committed(shard(IDS)), shard(IDS))
    assert "rows were not kept" in caplog.text


def test_several_threads_may_look_up_and_add(where: str):
    cache = Cache(where, IDENTITY)
    wrong = []

    def work(n: int) -> None:
        mine = [row_id(f"{n} {i}") for i in range(200)]
        for at in range(0, 200, 20):
            table = shard(mine[at : at + 20])
            cache.add(committed(table), table)
            cache.refresh()
            if set(cache.lookup(mine)) != set(mine[: at + 20]):
                wrong.append((n, at))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_index_takes_twelve_bytes_a_row(tmp_path: Path):
    cache = Cache(tmp_path, IDENTITY)
    cache.add(committed(shard(IDS)), shard(IDS))
    below = data_files(tmp_path)[0].parent
    for i in range(200):
        (below / f"{i:064x}.ids").write_bytes(os.urandom(16 * 10_000))
    cache = Cache(tmp_path, IDENTITY)
    started = time.perf_counter()
    assert set(cache.lookup(IDS)) == set(IDS)
    print(f"\nindex of 2 million rows: {time.perf_counter() - started:.2f} s")
    assert cache._halves.nbytes + cache._places.nbytes == 12 * (2_000_000 + len(IDS))


def data_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.parquet"), key=lambda path: -path.stat().st_size)

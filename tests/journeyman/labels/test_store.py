"""A label dataset's files: nothing lost, nothing twice, and a sentence for what is damaged."""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import pickle
import random
import subprocess
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from journeyman.errors import ClusterError, DataError, RecipeError
from journeyman.labels import prior
from journeyman.labels.codec import Codec
from journeyman.labels.schema import (
    SCHEMA_VERSION,
    Commit,
    Filtered,
    Quarantined,
    label_schema,
    record,
)
from journeyman.labels.store import LabelStore
from journeyman.teacher.answers import (
    ClassLabels,
    GeneratedLabels,
    Labeled,
    LogitLabels,
    RationaleLabels,
    Recorded,
)
from tests.journeyman.labels.object_server import Faults, ObjectServer, moto, serving

IDENTITY = {"kind": "classes", "labels": {"classes": {"yes": "Yes", "no": "No"}}, "teacher": "one"}
SHARD = "part-00000.parquet"
BAD_ROW = Quarantined(id="b", input="{}", error_class="EmptyTarget", message="m", attempts=1)
LONG_ROW = Filtered(id="c", input="{}", filter="overflow", value=5000.0)


def commit(shard: str = SHARD, generation: int = 0, ok: int = 1, **changes: object) -> Commit:
    facts = {
        "data": "", "quarantine": None, "filtered_file": None, "sha256": "", "rows": ok + 1,
        "quarantined": 1, "filtered": 0, "truncated": 0, "copied": 0, "prompt_tokens": 9,
        "cached_tokens": 0, "output_tokens": 1, "seconds": 0.1, "replica_seconds": 0.1, "bytes": 0,
        "engine_restarts": 0,
    }  # fmt: skip
    return Commit(**{"shard": shard, "generation": generation, "ok": ok, **facts, **changes})


def table(*ids: str, width: int = 2) -> pa.Table:
    labels = ClassLabels(
        n_prompt_tokens=9,
        n_output_tokens=1,
        class_logprobs=np.full(width, -0.7, np.float32),
        label_mass=0.5,
    )
    rows = [record({"id": i, "split": "train", "label": None}, labels, None) for i in ids or ("a",)]
    return pa.Table.from_pylist(rows, schema=label_schema("classes"))


@pytest.fixture(params=["folder", "file", "memory", "s3", "moto"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LabelStore]:
    """A dataset that has begun: in a folder, at its URL, in memory, and behind S3's interface, of a
    server of ours and of moto's."""
    with contextlib.ExitStack() as servers:
        s3_url = ""
        if request.param == "s3":
            _, s3_url = servers.enter_context(serving(monkeypatch))
        elif request.param == "moto":
            s3_url = servers.enter_context(moto(monkeypatch))
        where = {
            "folder": tmp_path / "a run" / "labels",
            "file": f"file://{tmp_path}/a%20run/labels",
            "memory": f"memory:///{uuid.uuid4().hex}",
            "s3": s3_url,
            "moto": f"{s3_url}/some/labels",
        }[request.param]
        store = LabelStore(where)
        store.open(IDENTITY)
        yield store


@pytest.fixture
def local(tmp_path: Path) -> LabelStore:
    store = LabelStore(tmp_path)
    store.open(IDENTITY)
    return store


def names(store: LabelStore, folder: str) -> list[str]:
    return sorted(listed.name for listed in store.folder.walk(folder))


# --- one winner ---


def race(store: LabelStore, n_threads: int, barrier: object) -> list[Commit]:
    standing = []

    def finish(i: int) -> None:
        barrier.wait()
        standing.append(store.write(commit(), table(f"row {i}"), [BAD_ROW], [LONG_ROW]))

    threads = [threading.Thread(target=finish, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return standing


def assert_one_won(store: LabelStore, standing: list[Commit]) -> None:
    assert set(standing) == {store.commits()[SHARD]}
    for folder in ("commits", "shards", "quarantine", "filtered"):
        assert len(names(store, folder)) == 1, folder
    assert store.read_shard(standing[0]).num_rows == 1
    assert store.read_quarantine(standing[0]) == [BAD_ROW]
    assert store.read_filtered(standing[0]) == [LONG_ROW]


def test_of_many_threads_that_finish_a_shard_one_wins_and_the_others_leave_nothing(store):
    standing = race(store, 16, threading.Barrier(16))
    assert len(standing) == 16
    assert_one_won(store, standing)


def _race_in_a_process(store: LabelStore, barrier: object, results: object) -> None:
    results.put(race(store, 4, barrier))


def test_of_many_processes_that_finish_a_shard_one_wins_and_the_others_leave_nothing(local):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(16), spawn.Queue()
    processes = [
        spawn.Process(target=_race_in_a_process, args=(local, barrier, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    standing = [commit for _ in processes for commit in results.get(timeout=120)]
    for process in processes:
        process.join()
    assert len(standing) == 16
    assert_one_won(local, standing)


@pytest.mark.parametrize("status", [503, 0])
def test_a_commit_whose_confirmation_is_lost_keeps_its_files(
    monkeypatch: pytest.MonkeyPatch, status: int
):
    """S3 carries out the put, then fails or falls silent: the client asks again by itself, and is
    told that there is a commit already. It is our own."""
    with serving(monkeypatch) as (server, url):
        store = LabelStore(url)
        store.open(IDENTITY)
        server.fail_after["commits/part-00000.json"] = status
        standing = store.write(commit(), table(), [BAD_ROW], [LONG_ROW])
        assert not server.fail_after
        assert_one_won(store, [standing])


def test_a_store_that_fails_now_and_then_loses_and_doubles_nothing(monkeypatch: pytest.MonkeyPatch):
    """500s, 503 SlowDown and connections cut before, after and within an answer."""
    shards = [f"part-{i:05d}.parquet" for i in range(30)]
    with serving(monkeypatch) as (server, url):
        server.faults = Faults(share=0.15, random=random.Random(0))
        store = LabelStore(url)
        store.open(IDENTITY)
        with ThreadPoolExecutor(8) as replicas:
            standing = list(replicas.map(
                lambda shard: store.write(commit(shard), table(shard), [BAD_ROW], [LONG_ROW]),
                shards,
            ))  # fmt: skip
        assert store.done() == set(shards)
        assert store.commits() == {c.shard: c for c in standing}
        assert store.compact() == store.commits()
        assert store.remove_orphans(older_than_s=-1e9) == 0
        for shard, found in store.commits().items():
            assert store.read_shard(found)["id"].to_pylist() == [shard]
            assert store.read_quarantine(found) == [BAD_ROW]
            store.clear_attempts(shard)
        assert store.finish({"complete": True})["complete"]
        assert len(server.faults.met) == 5, server.faults.met
    n_files = {folder: len(names_of(server, folder)) for folder in ("shards", "commits")}
    assert n_files == {"shards": len(shards), "commits": len(shards)}


def names_of(server: ObjectServer, folder: str) -> list[str]:
    return [name for name in server.objects if f"/{folder}/" in name]


def test_a_data_file_without_its_commit_is_not_read_as_done(store: LabelStore):
    written = store.write(commit(), table(), [], [])
    store.folder.delete("commits/part-00000.json")
    assert store.commits() == {}
    assert store.done() == set()
    again = store.write(commit(), table("other"), [], [])
    assert again.data != written.data
    assert store.read_shard(store.commits()[SHARD])["id"].to_pylist() == ["other"]


# --- what is written is what is read ---

COMMON = {"n_prompt_tokens": 7, "n_output_tokens": 3, "n_cached_tokens": 4, "truncated": True}
CODEC = Codec(name="topk_fp16", vocab_size=50000, k=2)
RECORDED = Recorded(
    token_ids=np.array([[5, 49999], [3, 2], [1, 0]], np.int32),
    logprobs=np.array([[-0.25, -2.0], [-0.5, -1.0], [0.0, -30.0]], np.float32),
)
LABELS: dict[str, tuple[str, Labeled, Codec | None]] = {
    "classes": (
        "classes",
        ClassLabels(class_logprobs=np.log([0.1, 0.9]).astype("f4"), label_mass=0.25, **COMMON),
        None,
    ),
    "channel": (
        "classes",
        ClassLabels(class_logprobs=np.log([0.1, 0.9]).astype("f4"), label_mass=None, **COMMON),
        None,
    ),
    "logits": (
        "logits",
        LogitLabels(token_ids=np.array([9, 8, 7, 49999], "i4"), recorded=RECORDED, **COMMON),
        CODEC,
    ),
    "generate": (
        "generate",
        GeneratedLabels(
            output="né\x00\n", output_logprob=-3.5, token_ids=np.array([1, 2, 3], "i4"),
            recorded=RECORDED, finish_reason="stop", **COMMON,
        ),
        CODEC,
    ),
    "generate behind a URL": (
        "generate",
        GeneratedLabels(
            output="", output_logprob=None, token_ids=np.array([], "i4"), recorded=None,
            finish_reason="stop", **COMMON,
        ),
        None,
    ),
    "rationales": (
        "rationales",
        RationaleLabels(
            reasonings=["r1", "r2", ""], answers=["4", None, "4"], answer="4", reasoning="r1",
            agreement=2 / 3, n_unparsed=1, class_logprobs=None, label_mass=None, **COMMON,
        ),
        None,
    ),
    "rationales with classes": (
        "rationales",
        RationaleLabels(
            reasonings=["r1"], answers=["4"], answer="4", reasoning="r1", agreement=1.0,
            n_unparsed=0, class_logprobs=np.log([0.5, 0.5]).astype("f4"), label_mass=0.75, **COMMON,
        ),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_every_kind_come_back_as_they_were(tmp_path: Path, name: str):
    kind, labels, codec = LABELS[name]
    store = LabelStore(tmp_path)
    store.open({"kind": kind})
    row = {"id": "a", "split": "test", "label": "yes", "text": "t"}
    rows = [record(row, labels, codec), record(row | {"id": "b", "label": None}, labels, codec)]
    written = pa.Table.from_pylist(rows, schema=label_schema(kind))
    read = store.read_shard(store.write(commit(ok=2), written, [], []))
    assert read.schema == label_schema(kind)
    assert read == written
    first = read.to_pylist()[0]
    assert first["id"] == "a" and first["split"] == "test" and first["gold"] == "yes"
    assert read["gold"].to_pylist() == ["yes", None]
    assert first["finish_reason"] == labels.finish_reason
    assert {n: first[n] for n in COMMON} == COMMON
    if codec is not None:
        assert codec.unpack_ids(first["token_ids"]).tolist() == labels.token_ids.tolist()
        assert first["n_tokens"] == len(labels.token_ids)
        decoded = codec.decode(first["logprobs"], first["n_positions"])
        assert decoded.token_ids.tolist() == RECORDED.token_ids.tolist()
        np.testing.assert_allclose(decoded.logprobs, RECORDED.logprobs, atol=2e-3)
    for column in set(first) - {"id", "split", "gold", *COMMON, "finish_reason"}:
        value = getattr(labels, column, None)
        if value is not None and column not in ("token_ids", "logprobs"):
            assert first[column] == pytest.approx(
                value.tolist() if isinstance(value, np.ndarray) else value
            ), column


def test_an_empty_shard_comes_back(local: LabelStore):
    empty = label_schema("classes").empty_table()
    standing = local.write(commit(ok=0), empty, [BAD_ROW], [])
    assert local.read_shard(standing) == empty


def test_what_replicas_note_down_of_a_shard_comes_back(store: LabelStore):
    assert store.read_attempts(SHARD) is None
    store.write_attempts(SHARD, {"suspects": ["a", "b"]})
    store.write_attempts(SHARD, {"suspects": ["b"]})
    assert store.read_attempts(SHARD) == {"suspects": ["b"]}
    store.clear_attempts(SHARD)
    store.clear_attempts(SHARD)
    assert store.read_attempts(SHARD) is None


def test_a_store_may_travel_to_another_process(local: LabelStore):
    written = local.write(commit(), table(), [], [])
    assert pickle.loads(pickle.dumps(local)).read_shard(written).num_rows == 1


# --- identity ---


def test_another_identity_is_refused_with_the_difference_and_nothing_changes(store: LabelStore):
    before = store.folder.get("manifest.json")
    with pytest.raises(DataError, match='teacher: there "one", asked "two"'):
        store.open(IDENTITY | {"teacher": "two"})
    with pytest.raises(DataError, match=r"\n  labels.k: there null, asked 64\n"):
        store.open(IDENTITY | {"labels": IDENTITY["labels"] | {"k": 64}})
    assert store.folder.get("manifest.json") == before
    store.open(IDENTITY)
    store.finish({"totals": {"rows": 3}})
    store.open(dict(reversed(IDENTITY.items())))
    assert store.manifest() == {
        "schema": SCHEMA_VERSION, "identity": IDENTITY, "totals": {"rows": 3},
    }  # fmt: skip


def test_another_order_of_the_classes_is_another_identity(store: LabelStore):
    """It is the order of class_logprobs, which neither == nor a digest of sorted keys sees."""
    turned = {"classes": dict(reversed(IDENTITY["labels"]["classes"].items()))}
    with pytest.raises(DataError, match=r'labels.classes\[0\]\[0\]: there "yes", asked "no"'):
        store.open(IDENTITY | {"labels": turned})


def test_manifest_of_another_schema_is_refused(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 99, "identity": {}}))
    with pytest.raises(DataError, match="schema 99"):
        LabelStore(tmp_path).open({})


def test_reading_where_there_is_nothing_makes_no_folder(tmp_path: Path):
    store = LabelStore(tmp_path / "none")
    with pytest.raises(DataError, match="not found; run the step that writes it first"):
        store.manifest()
    assert (store.done(), store.commits(), store.remove_orphans()) == (set(), {}, 0)
    assert not (tmp_path / "none").exists()


def test_a_url_of_an_unknown_kind_gets_a_sentence():
    with pytest.raises(RecipeError, match="ftp://host/labels: no such object store"):
        LabelStore("ftp://host/labels")


# --- generations and compaction ---


def test_the_highest_generation_of_a_shard_counts(store: LabelStore):
    first = store.write(commit(), table("old"), [BAD_ROW], [])
    other = store.write(commit("part-00001.parquet"), table("other"), [], [])
    again = store.write(commit(generation=1), table("new", "b"), [], [])
    tenth = store.write(commit(generation=10), table("newer", "b"), [], [])
    assert store.commits() == {SHARD: tenth, "part-00001.parquet": other}
    assert (store.standing(SHARD, 0), store.standing(SHARD, 1)) == (first, again)
    assert store.standing(SHARD, 2) is None
    assert store.done() == store.done(0) == {SHARD, "part-00001.parquet"}
    assert store.done(1) == store.done(10) == {SHARD}
    assert store.done(11) == set()
    assert len({c.data for c in (first, again, tenth)}) == 3


def test_done_reads_no_commit(local: LabelStore):
    for name in ("part-00000.json", "part-00007.g2.json"):
        local.folder.put(f"commits/{name}", b"not even JSON")
    assert local.done() == {SHARD, "part-00007.parquet"}
    assert local.done(1) == {"part-00007.parquet"}


def test_compaction_changes_nothing_but_the_number_of_reads(store: LabelStore):
    for i in range(20):
        store.write(commit(f"part-{i:05d}.parquet"), table(f"{i}"), [BAD_ROW] * (i % 2), [])
    before = store.commits()
    assert list(before) == sorted(before)
    assert store.compact() == before
    assert store.commits() == before
    compacted = names(store, "compacted")
    assert store.compact() == before
    assert names(store, "compacted") == compacted
    # One more shard, one generation more: both on top of what is compacted.
    new = store.write(commit("part-00020.parquet"), table("20"), [], [])
    again = store.write(commit(generation=1), table("0", "b"), [], [])
    after = before | {SHARD: again, "part-00020.parquet": new}
    assert store.commits() == after
    assert list(store.compact().items()) == list(store.commits().items()) == sorted(after.items())
    assert store.commits() == after
    assert len(names(store, "compacted")) == 1
    assert len(names(store, "commits")) == 22


def test_a_compacted_file_spares_reading_the_loose_ones(local: LabelStore, monkeypatch):
    for i in range(5):
        local.write(commit(f"part-{i:05d}.parquet"), table(f"{i}"), [], [])
    local.compact()
    local.write(commit("part-00005.parquet"), table("5"), [], [])
    read = []
    get = type(local.folder).get
    monkeypatch.setattr(
        type(local.folder), "get", lambda folder, name: read.append(name) or get(folder, name)
    )
    assert len(local.commits()) == 6
    assert read[1:] == ["commits/part-00005.json"]


def test_a_commit_that_was_removed_is_gone_and_made_anew_whatever_is_compacted(store: LabelStore):
    """Removing it is what the sentence about a damaged shard tells people to do."""
    first = store.write(commit(), table(), [], [])
    kept = store.write(commit("part-00001.parquet"), table(), [], [])
    store.compact()
    store.folder.delete("commits/part-00000.json")
    assert store.commits() == {kept.shard: kept}
    again = store.write(commit(), table("other"), [], [])
    assert store.commits() == {again.shard: again, kept.shard: kept}
    assert again != first


def test_what_a_removed_commit_named_is_an_orphan_though_it_is_compacted(store: LabelStore):
    gone = store.write(commit(), table(), [BAD_ROW], [])
    kept = store.write(commit("part-00001.parquet"), table(), [], [])
    store.compact()
    loose = store.write(commit("part-00002.parquet"), table(), [], [LONG_ROW])
    store.folder.delete("commits/part-00000.json")

    assert store.remove_orphans(older_than_s=-1e9) == 2

    left = {
        name for folder in ("shards", "quarantine", "filtered") for name in names(store, folder)
    }
    assert left.isdisjoint({gone.data, gone.quarantine})
    assert left == {kept.data, loose.data, loose.filtered_file}


def test_a_damaged_compacted_file_is_passed_over(local: LabelStore, caplog):
    local.write(commit(), table(), [], [])
    before = local.commits()
    local.compact()
    (path,) = (local.directory / "compacted").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert local.commits() == before
    assert "damaged" in caplog.text


# --- damage and full disks ---


def test_a_damaged_shard_or_commit_gets_a_sentence(local: LabelStore):
    written = local.write(commit(), table(), [BAD_ROW], [])
    path = local.directory / written.data
    mend = rf"remove {local.directory}/commits/part-00000.json and label again\."
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=f"{path}: .* bytes where the commit says .*{mend}"):
        local.read_shard(written)
    path.write_bytes(b"\0" * len(whole))
    with pytest.raises(DataError, match=f"{path}: its bytes are not those .*{mend}"):
        local.read_shard(written)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: committed, but gone; {mend}"):
        local.read_shard(written)
    (local.directory / written.quarantine).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=f"not a readable Parquet file .*{mend}"):
        local.read_quarantine(written)
    (local.directory / "commits" / "part-00000.json").write_text("{")
    with pytest.raises(DataError, match="damaged, not JSON"):
        local.commits()
    (local.directory / "commits" / "part-00000.json").write_text('{"shard": "x"}')
    with pytest.raises(DataError, match="not a commit of this version"):
        local.commits()


def test_a_shard_with_other_rows_than_its_commit_says_is_refused(local: LabelStore):
    written = local.write(commit(ok=2), table("only one"), [], [])
    with pytest.raises(DataError, match="1 rows where the commit says 2"):
        local.read_shard(written)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def incompressible(n_bytes: int) -> pa.Table:
    values = np.random.default_rng(0).standard_normal(n_bytes // 4).astype(np.float32)
    return table().set_column(
        table().schema.get_field_index("class_logprobs"),
        label_schema("classes").field("class_logprobs"),
        pa.array([values], pa.list_(pa.float32())),
    )


def test_a_full_disk_ends_in_one_sentence_and_commits_nothing(tiny_disk: Path):
    store = LabelStore(tiny_disk / "labels")
    store.open(IDENTITY)
    store.write(commit(), table(), [], [])
    before = files_below(tiny_disk)
    with pytest.raises(ClusterError, match="the disk is full") as caught:
        store.write(commit("part-00001.parquet"), incompressible(100_000), [], [])
    assert "\n" not in str(caught.value)
    assert "run the same command again" in str(caught.value)
    # The data fits, the rows in quarantine do not.
    long_row = dataclasses.replace(
        BAD_ROW, input=np.random.default_rng(0).integers(0, 9, 60_000).tobytes().hex()
    )
    with pytest.raises(ClusterError, match="the disk is full"):
        store.write(commit("part-00001.parquet"), incompressible(20_000), [long_row], [])
    assert files_below(tiny_disk) == before
    assert store.done() == {SHARD}
    standing = store.write(commit("part-00001.parquet"), incompressible(20_000), [], [])
    assert store.read_shard(standing) == incompressible(20_000)


def test_a_folder_that_cannot_be_written_ends_in_one_sentence(tiny_disk: Path):
    LabelStore(tiny_disk).open(IDENTITY)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    LabelStore(tiny_disk).open(IDENTITY)
    with pytest.raises(ClusterError, match="cannot be written"):
        LabelStore(tiny_disk).write(commit(), table(), [], [])


# --- the end of a run ---


def test_only_old_files_that_no_commit_names_are_orphans(store: LabelStore):
    first = store.write(commit(), table("a"), [BAD_ROW], [LONG_ROW])
    again = store.write(commit(generation=1), table("a", "b"), [], [])
    store.write(commit("part-00001.parquet"), table("lost"), [BAD_ROW], [LONG_ROW])
    store.folder.delete("commits/part-00001.json")
    store.write_table("filtered/filters.parquet", pa.table({"id": ["a"]}))
    assert store.remove_orphans() == 0
    assert store.remove_orphans(older_than_s=0) == 3
    assert names(store, "shards") == sorted([first.data, again.data])
    assert names(store, "quarantine") == [first.quarantine]
    assert names(store, "filtered") == sorted([first.filtered_file, "filtered/filters.parquet"])


def test_halves_of_files_that_killed_writers_left_are_removed(local: LabelStore):
    left = local.directory / "shards" / "part-00000.0123456789ab.parquet#1"
    left.parent.mkdir()
    left.write_bytes(b"half")
    local.remove_orphans()
    assert left.exists()
    local.remove_orphans(older_than_s=0)
    assert not left.exists()


def test_prior_correction_makes_the_mean_prediction_uniform_in_odds():
    """Against the definition, computed with probabilities: p / mean(p), normalised."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet([5, 1, 1], size=400)
    wanted = p / p.mean(axis=0)
    wanted /= wanted.sum(axis=1, keepdims=True)
    log_prior = prior.fit_log_prior(np.log(p).astype(np.float32))
    got = np.exp(prior.corrected(np.log(p), log_prior))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    np.testing.assert_allclose(np.exp(prior.corrected(np.log(p), None)), p, rtol=1e-9)


def test_workers_in_other_folders_find_a_dataset_named_by_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    named = LabelStore(Path("runs/labels"))
    named.open(IDENTITY)
    monkeypatch.chdir("/")
    assert LabelStore(str(tmp_path / "runs/labels")).manifest()["identity"] == IDENTITY
    monkeypatch.chdir(tmp_path)
    assert named.everywhere == str(tmp_path.resolve() / "runs/labels")

import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from journeyman.errors import DataError
from journeyman.labels import prior
from journeyman.labels.schema import Commit, Quarantined, classes_schema
from journeyman.labels.store import LabelStore


def commit(shard: str = "part-00000.parquet") -> Commit:
    return Commit(
        shard=shard, data="", quarantine=None, sha256="", rows=2, ok=1, quarantined=1, filtered=0,
        prompt_tokens=9, output_tokens=1, seconds=0.1, bytes=0, engine_restarts=0,
    )  # fmt: skip


def table(first_id: str = "a") -> pa.Table:
    row = {
        "id": first_id, "split": "train", "gold": None, "class_logprobs": [-0.1, -2.4],
        "label_mass": None, "n_prompt_tokens": 9, "n_output_tokens": 1, "finish_reason": "length",
    }  # fmt: skip
    return pa.Table.from_pylist([row], schema=classes_schema())


BAD_ROW = Quarantined(id="b", input="{}", error_class="EmptyTarget", message="m", attempts=1)


def test_of_many_replicas_that_finish_a_shard_one_wins_and_the_others_leave_nothing(tmp_path: Path):
    store = LabelStore(tmp_path)
    standing = []
    barrier = threading.Barrier(16)

    def finish(i: int) -> None:
        barrier.wait()
        standing.append(store.write(commit(), table(f"row {i}"), [BAD_ROW]))

    threads = [threading.Thread(target=finish, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(standing) == 16
    assert {s.data for s in standing} == {store.commits()["part-00000.parquet"].data}
    assert len(list((tmp_path / "shards").iterdir())) == 1
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    assert store.read_shard(standing[0]).num_rows == 1


def test_a_data_file_without_its_commit_is_not_read_as_done(tmp_path: Path):
    store = LabelStore(tmp_path)
    written = store.write(commit(), table(), [])
    (tmp_path / "commits" / "part-00000.json").unlink()
    assert store.commits() == {}
    again = store.write(commit(), table("other"), [])
    assert again.data != written.data
    assert store.read_shard(store.commits()["part-00000.parquet"])["id"].to_pylist() == ["other"]


def test_another_identity_is_refused_with_the_difference_and_nothing_changes(tmp_path: Path):
    store = LabelStore(tmp_path)
    store.open({"teacher": "one", "prompt": "p"})
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(DataError, match='teacher: there "one", asked "two"'):
        store.open({"teacher": "two", "prompt": "p"})
    assert (tmp_path / "manifest.json").read_bytes() == before
    store.open({"teacher": "one", "prompt": "p"})


def test_a_damaged_shard_or_commit_gets_a_sentence(tmp_path: Path):
    store = LabelStore(tmp_path)
    written = store.write(commit(), table(), [])
    path = tmp_path / written.data
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="bytes where the commit says"):
        store.read_shard(written)
    path.write_bytes(b"\0" * len(whole))
    with pytest.raises(DataError, match="not a readable label shard"):
        store.read_shard(written)
    path.unlink()
    with pytest.raises(DataError, match="committed, but gone"):
        store.read_shard(written)
    (tmp_path / "commits" / "part-00000.json").write_text("{")
    with pytest.raises(DataError, match="damaged, not JSON"):
        store.commits()


def test_manifest_of_a_newer_schema_is_refused(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 99, "identity": {}}))
    with pytest.raises(DataError, match="schema 99"):
        LabelStore(tmp_path).open({})


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

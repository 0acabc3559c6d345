"""The mean of several teachers' class probabilities, against a dense computation."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from journeyman.labels import ensemble
from journeyman.labels.schema import Commit, Quarantined, label_schema, record
from journeyman.labels.store import LabelStore
from tests.journeyman.labels.synthetic import classes

SHARD = "part-00000.parquet"
ROWS = [{"id": f"{i:032x}", "split": "train", "label": "yes"} for i in range(4)]


def commit(**counts: int) -> Commit:
    facts = dict.fromkeys(
        ("filtered", "truncated", "copied", "prompt_tokens", "cached_tokens", "output_tokens",
         "seconds", "replica_seconds", "bytes", "engine_restarts", "generation"), 0,
    )  # fmt: skip
    return Commit(shard=SHARD, data="", quarantine=None, filtered_file=None, sha256="",
                  **facts | counts)  # fmt: skip


def member(folder: Path, name: str, p_yes: list[float | None], log_prior: list[float] | None):
    store = LabelStore(folder / name)
    store.open({"kind": "classes", "labels": {"classes": {"yes": "Yes", "no": "No"}},
                "teacher": {"model": name, "weights": name, "tokenizer": "t"}})  # fmt: skip
    records, bad = [], []
    for row, p in zip(ROWS, p_yes, strict=True):
        if p is None:
            bad.append(Quarantined(id=row["id"], input="{}", error_class="ContextOverflow",
                                   message=f"too long for {name}", attempts=1))  # fmt: skip
        else:
            records.append(record(row, classes(p, 1 - p, label_mass=0.5), None))
    table = pa.Table.from_pylist(records, schema=label_schema("classes"))
    counts = commit(rows=4, ok=len(records), quarantined=len(bad), prompt_tokens=10)
    store.write(counts, table, bad, [])
    store.finish({"log_prior": log_prior})
    return store


def test_the_mean_is_of_corrected_probabilities_and_every_row_has_one_fate(tmp_path: Path):
    one = member(tmp_path, "one", [0.9, 0.6, None, 0.2], None)
    two = member(tmp_path, "two", [0.5, 0.8, 0.7, 0.4], [np.log(0.8), np.log(0.2)])
    together = LabelStore(tmp_path / "both")
    identity = ensemble.identity(
        {s.manifest()["identity"]["teacher"]["model"]: s.manifest()["identity"] for s in (one, two)}
    )
    together.open(identity)
    for _ in range(2):  # the second time there is nothing left to do
        ensemble.combine(together, [one, two], [SHARD])
    (done,) = together.commits().values()
    assert (done.rows, done.ok, done.quarantined, done.prompt_tokens) == (4, 3, 1, 20)
    assert [q.message for q in together.read_quarantine(done)] == ["too long for one"]
    table = together.read_shard(done)
    assert table["id"].to_pylist() == [ROWS[i]["id"] for i in (0, 1, 3)]

    first = np.array([0.9, 0.6, 0.2])
    second = np.array([0.5, 0.8, 0.4]) / 0.8
    second = second / (second + (1 - np.array([0.5, 0.8, 0.4])) / 0.2)
    p_yes = np.exp([row[0] for row in table["class_logprobs"].to_pylist()])
    np.testing.assert_allclose(p_yes, (first + second) / 2, rtol=1e-5)
    np.testing.assert_allclose(table["label_mass"].to_pylist(), 0.5)
    assert table["n_prompt_tokens"].to_pylist() == [18, 18, 18]


def test_an_ensembles_identity_names_each_teacher_and_its_order_of_labels():
    facts = {"kind": "classes", "labels": {"classes": {"yes": "Yes", "no": "No"}}}
    members = {
        name: facts | {"teacher": {"model": name, "weights": name, "tokenizer": "t"}}
        for name in ("one", "two")
    }
    got = ensemble.identity(members)
    assert got["teacher"]["model"] == "the mean of one and two"
    assert got["members"] == members
    assert (
        got["teacher"]["weights"]
        != ensemble.identity({"one": members["one"]})["teacher"]["weights"]
    )

"""The mean of several teachers' class probabilities, against a dense computation."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from journeyman.errors import DataError
from journeyman.labels import ensemble
from journeyman.labels.codec import Codec
from journeyman.labels.schema import Commit, Quarantined, label_schema, record
from journeyman.labels.store import LabelStore
from journeyman.teacher.answers import LogitLabels, Recorded
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


VOCABULARY = 300
FP16 = 3 / 1024  # a step of topk_fp16


def dense(n: int, seed: int) -> np.ndarray:
    """float64[n, VOCABULARY] next-token probabilities of one teacher."""
    logits = np.random.default_rng(seed).normal(scale=3, size=(n, VOCABULARY))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def said(tokens: list[int], codec: Codec, p: np.ndarray, seed: int) -> LogitLabels:
    """What a teacher records of these distributions, one a token."""
    if codec.name == "sampled":
        generator = np.random.default_rng(seed)
        ids = np.array([generator.choice(VOCABULARY, codec.k, p=row) for row in p])
    else:
        ids = np.argsort(-p, axis=1)[:, : codec.k]
    logprobs = np.log(np.take_along_axis(p, ids, axis=1)).astype(np.float32)
    return LogitLabels(
        token_ids=np.array(tokens),
        recorded=Recorded(token_ids=ids.astype(np.int32), logprobs=logprobs),
        n_prompt_tokens=len(tokens),
        n_cached_tokens=0,
        n_output_tokens=0,
        finish_reason="length",
        truncated=False,
    )


def of_logits(
    folder: Path, name: str, codec: Codec, p: np.ndarray, tokens: list[int], tokenizer: str = "t"
) -> LabelStore:
    """A finished dataset of one row."""
    store = LabelStore(folder / name)
    store.open({"kind": "logits", "labels": {},
                "teacher": {"model": name, "weights": name, "tokenizer": tokenizer}})  # fmt: skip
    row = record(ROWS[0], said(tokens, codec, p, seed=len(name)), codec)
    table = pa.Table.from_pylist([row], schema=label_schema("logits"))
    store.write(commit(rows=1, ok=1, quarantined=0), table, [], [])
    store.finish({"log_prior": None, "codec": codec.describe()})
    return store


def together(folder: Path, members: list[LabelStore]) -> tuple[LabelStore, Codec]:
    store = LabelStore(folder / "together")
    facts = {s.manifest()["identity"]["teacher"]["model"]: s.manifest()["identity"]
             for s in members}  # fmt: skip
    store.open(ensemble.identity(facts))
    codec = ensemble.codec_of([s.manifest()["codec"] for s in members])
    assert codec is not None
    store.finish({"codec": codec.describe()})
    ensemble.combine(store, members, [SHARD])
    return store, codec


@pytest.mark.parametrize("k", [VOCABULARY, 40])
def test_the_mean_of_next_token_distributions_is_that_of_dense_ones(tmp_path: Path, k: int):
    tokens = [5, 299, 7, 1, 1, 20]
    p = [dense(len(tokens), seed) for seed in (1, 2, 3)]
    codec = Codec(name="topk_fp16", vocab_size=VOCABULARY, k=k)
    stores = [of_logits(tmp_path, f"teacher-{i}", codec, each, tokens) for i, each in enumerate(p)]
    store, own = together(tmp_path, stores)
    [done] = store.commits().values()
    [row] = store.read_shard(done).to_pylist()
    assert own.unpack_ids(row["token_ids"]).tolist() == tokens
    assert row["n_prompt_tokens"] == len(
        tokens
    )  # as each teacher read them, and as they are learned
    got = own.decode(row["logprobs"], row["n_positions"])
    exact = np.mean(p, axis=0)
    # Off by a step of the teachers' codec and one of the mean's own; and, where teachers left an
    # entry out, by no more than their smallest entries.
    lacking = sum(np.sort(each, axis=1)[:, -k, None] for each in p) / 3 if k < VOCABULARY else 0.0
    there = got.token_ids >= 0
    expected = np.take_along_axis(exact, np.maximum(got.token_ids, 0), axis=1)
    off = np.abs(np.exp(got.logprobs.astype(np.float64)) - expected)
    assert (off <= expected * FP16 * 1.1 + lacking)[there].all()
    kept = np.exp(got.logprobs.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(kept + np.exp(got.log_tail_mass), 1, atol=2e-3)
    # The tokens that all have recorded are exact but for the codec.
    heads = np.argmax(exact, axis=1)
    np.testing.assert_array_equal(got.token_ids[:, 0], heads)


def test_draws_of_several_teachers_are_draws_from_their_mean(tmp_path: Path):
    tokens = list(range(8))
    codec = Codec(name="sampled", vocab_size=VOCABULARY, k=50)
    p = [dense(len(tokens), seed) for seed in (1, 2)]
    stores = [of_logits(tmp_path, name, codec, each, tokens)
              for name, each in zip(("one", "second"), p, strict=True)]  # fmt: skip
    store, own = together(tmp_path, stores)
    assert (own.name, own.k) == ("sampled", 100)
    counts = np.zeros((3, len(tokens), VOCABULARY))
    for i, (each, theirs) in enumerate([(store, own), (stores[0], codec), (stores[1], codec)]):
        [row] = each.read_shard(next(iter(each.commits().values()))).to_pylist()
        got = theirs.decode(row["logprobs"], row["n_positions"])
        at = got.token_ids >= 0
        counts[i, np.nonzero(at)[0], got.token_ids[at]] = np.exp(got.logprobs[at]) * theirs.k
    np.testing.assert_allclose(counts[0], counts[1] + counts[2], atol=1e-3)


def test_teachers_of_other_tokens_have_no_mean(tmp_path: Path):
    codec = Codec(name="topk_fp16", vocab_size=VOCABULARY, k=4)
    p = dense(3, 0)
    one = of_logits(tmp_path, "one", codec, p, [1, 2, 3])
    other = of_logits(tmp_path, "other", codec, p, [1, 2, 3], tokenizer="another")
    with pytest.raises(DataError, match="other has another tokenizer than one"):
        together(tmp_path, [one, other])
    cut = of_logits(tmp_path, "cut", codec, p[:2], [1, 2])
    with pytest.raises(DataError, match="as different tokens"):
        together(tmp_path / "again", [one, cut])

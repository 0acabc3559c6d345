"""Finished label datasets of every kind, made of records in view: no teacher, no Ray."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from journeyman import corpus, files, recipe
from journeyman.labels.codec import Codec
from journeyman.labels.inspect import Opened, open_dataset
from journeyman.labels.schema import Commit, Filtered, Quarantined, label_schema, record
from journeyman.labels.store import LabelStore
from journeyman.recipe import Labels, Recipe, digest
from journeyman.teacher.answers import (
    ClassLabels,
    GeneratedLabels,
    Labeled,
    LogitLabels,
    RationaleLabels,
    Recorded,
)

TEACHER = {"model": "/models/sage-7b", "weights": "w" * 64, "tokenizer": "t" * 64}
VOCABULARY = 50
TOP3 = Codec(name="topk_fp16", vocab_size=VOCABULARY, k=3)

KINDS: dict[str, dict[str, Any]] = {
    "classes": {"classes": {"yes": "Yes", "no": "No"}, "prompt": "{{ text }} Yes or no?"},
    "logits": {"kind": "logits", "k": 3},
    "generate": {"kind": "generate", "prompt": "{{ text }}", "k": 3},
    "rationales": {"kind": "rationales", "prompt": "{{ text }}", "samples": 5},
}


def recipe_of(kind: str, output: Path | str = "runs", **labels: Any) -> Recipe:
    return recipe.parse(
        {
            "name": kind,
            "output": str(output),
            "corpus": {"sources": ["rows.jsonl"], "columns": {"label": "gold"}},
            "teacher": {"model": TEACHER["model"]},
            "labels": KINDS[kind] | labels,
        }
    )


def settings(kind: str, **labels: Any) -> Labels:
    return recipe_of(kind, **labels).labels


# --- what a teacher says ---


def classes(*probabilities: float, label_mass: float | None = 0.5, **more: Any) -> ClassLabels:
    return ClassLabels(
        class_logprobs=np.log(np.array(probabilities, dtype=np.float32)),
        label_mass=label_mass,
        **{"n_prompt_tokens": 9, "n_output_tokens": 1} | more,
    )


def distributions(n_positions: int, seed: int = 0) -> np.ndarray:
    """float64[positions, vocabulary], each row sums to 1."""
    logits = np.random.default_rng(seed).normal(scale=3, size=(n_positions, VOCABULARY))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def top(probabilities: np.ndarray, k: int = 3) -> Recorded:
    ids = np.argsort(-probabilities, axis=1)[:, :k]
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.take_along_axis(probabilities, ids, axis=1))
    return Recorded(token_ids=ids.astype(np.int32), logprobs=logprobs.astype(np.float32))


def logits(token_ids: Sequence[int], probabilities: np.ndarray) -> LogitLabels:
    return LogitLabels(
        n_prompt_tokens=len(token_ids),
        n_output_tokens=0,
        token_ids=np.array(token_ids, dtype=np.int32),
        recorded=top(probabilities),
    )


def generated(
    output: str, token_ids: Sequence[int], probabilities: np.ndarray, **more: Any
) -> GeneratedLabels:
    return GeneratedLabels(
        output=output,
        token_ids=np.array(token_ids, dtype=np.int32),
        output_logprob=-1.5,
        recorded=top(probabilities),
        **{"n_prompt_tokens": 4, "n_output_tokens": len(token_ids), "finish_reason": "stop"} | more,
    )


def rationales(answers: Sequence[str | None], **more: Any) -> RationaleLabels:
    """One reasoning for each answer; the majority's is the most frequent."""
    said = [a for a in answers if a is not None]
    majority = max(said, key=said.count)
    reasonings = [f"Because of {i}, the answer is {a}." for i, a in enumerate(answers)]
    facts = {
        "n_prompt_tokens": 4,
        "n_output_tokens": 10 * len(answers),
        "finish_reason": "stop",
        "class_logprobs": None,
        "label_mass": None,
        "reasoning": reasonings[answers.index(majority)],
        "agreement": said.count(majority) / len(answers),
    }
    return RationaleLabels(
        reasonings=reasonings,
        answers=list(answers),
        answer=majority,
        n_unparsed=len(answers) - len(said),
        **facts | more,
    )


# --- tables and datasets ---


def row(text: str, split: str = "train", label: str | None = None) -> dict[str, Any]:
    return {"id": digest([text]), "text": text, "split": split, "label": label, "meta": None,
            "count": 1}  # fmt: skip


def table(
    kind: str, labeled: Sequence[tuple[str | None, Labeled]], codec: Codec = TOP3
) -> pa.Table:
    """A label table from (gold, labels)."""
    records = [
        record(row(f"row {i}", label=gold), labels, codec)
        for i, (gold, labels) in enumerate(labeled)
    ]
    return pa.Table.from_pylist(records, schema=label_schema(kind))


Fate = Labeled | Quarantined | Filtered


def quarantined(source: Mapping[str, Any], error_class: str, message: str) -> Quarantined:
    return Quarantined(
        id=source["id"], input=corpus_json(source), error_class=error_class, message=message,
        attempts=1,
    )  # fmt: skip


def skipped(source: Mapping[str, Any], value: float) -> Filtered:
    return Filtered(id=source["id"], input=corpus_json(source), filter="overflow", value=value)


def corpus_json(source: Mapping[str, Any]) -> str:
    return json.dumps(source)


def write_corpus(folder: Path, shards: Sequence[Sequence[dict[str, Any]]]) -> str:
    """A prepared corpus; returns its digest."""
    folder.mkdir(parents=True)
    named = []
    for i, rows in enumerate(shards):
        path = folder / f"part-{i:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows), schema=corpus.schema()), path)
        named.append({"name": path.name, "rows": len(rows), "sha256": files.file_digest(path)})
    every = [r for rows in shards for r in rows]
    splits = {s: sum(r["split"] == s for r in every) for s in recipe.SPLITS}
    identity = digest(named)
    files.write_json(
        folder / "manifest.json",
        {"schema": corpus.SCHEMA_VERSION, "digest": identity, "rows": len(every), "shards": named,
         "splits": splits},
    )  # fmt: skip
    return identity


def write_dataset(
    run: Path,
    labels: Labels,
    shards: Sequence[Sequence[tuple[dict[str, Any], Fate]]],
    *,
    codec: Codec | None = None,
    log_prior: Sequence[float] | None = None,
    complete: bool = True,
    teacher: Mapping[str, str] = TEACHER,
) -> LabelStore:
    """``run/corpus`` and ``run/labels``, from corpus rows and what became of each."""
    corpus_digest = write_corpus(run / "corpus", [[source for source, _ in s] for s in shards])
    store = LabelStore(run / "labels")
    store.open(
        {
            "kind": labels.kind,
            "labels": labels.asked(),
            "teacher": dict(teacher),
            "dtype": "float32",
            "corpus": corpus_digest,
        }
    )
    facts = {"codec": codec and codec.describe()}
    commits = [_write(store, labels.kind, f"part-{i:05d}.parquet", shard, codec)
               for i, shard in enumerate(shards)]  # fmt: skip
    if complete:
        numbers = [f.name for f in dataclasses.fields(Commit)
                   if f.type in ("int", "float") and f.name != "generation"]  # fmt: skip
        facts |= {
            "complete": True,
            "shards": [commit.shard for commit in commits],
            "totals": {name: sum(getattr(c, name) for c in commits) for name in numbers},
            "splits": dict(Counter(source["split"] for shard in shards for source, _ in shard)),
            "versions": {"vllm": "0.29.0"},
            "cost": {"dollars": 1.25, "price": {"per_replica_hour": 2.0}},
            "log_prior": log_prior and list(log_prior),
            "digest": digest([commit.sha256 for commit in commits]),
        }
    store.finish(facts)
    return store


def _write(
    store: LabelStore,
    kind: str,
    shard: str,
    fates: Sequence[tuple[dict[str, Any], Fate]],
    codec: Codec | None,
) -> Commit:
    bad = [fate for _, fate in fates if isinstance(fate, Quarantined)]
    out = [fate for _, fate in fates if isinstance(fate, Filtered)]
    ok = [(s, f) for s, f in fates if not isinstance(f, Quarantined | Filtered)]
    records = [record(source, said, codec) for source, said in ok]
    commit = Commit(
        shard=shard, generation=0, data="", quarantine=None, filtered_file=None, sha256="",
        rows=len(fates), ok=len(ok), quarantined=len(bad), filtered=len(out), truncated=0,
        copied=0, prompt_tokens=sum(f.n_prompt_tokens for _, f in ok), cached_tokens=0,
        output_tokens=sum(f.n_output_tokens for _, f in ok), seconds=1.0, replica_seconds=1.0,
        bytes=0, engine_restarts=0,
    )  # fmt: skip
    return store.write(commit, pa.Table.from_pylist(records, schema=label_schema(kind)), bad, out)


def opened(store: LabelStore) -> Opened:
    return open_dataset(store.where)

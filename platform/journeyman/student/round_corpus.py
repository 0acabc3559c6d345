"""Corpora made of a corpus, for a student to answer: the train prompts that fall to an on-policy
round, what the student wrote behind them, and held-out rows. All are read as any other corpus."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman import corpus, files
from journeyman.errors import DataError
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from journeyman.recipe import SPLITS, digest

if TYPE_CHECKING:
    import pyarrow as pa

TOKENS = "student_tokens"  # column of what the student wrote: a list of token ids


def taken(n: int, number: int, share: float) -> np.ndarray:
    """int64[m]: which of n prompts fall to round ``number``: one share behind the other, and from
    the beginning again once all have been taken."""
    size = max(1, round(share * n))
    return (number * size + np.arange(size)) % n


def write_prompts(
    corpus_dir: str | Path, folder: Path, number: int, share: float, rows_per_shard: int
) -> int:
    """The round's rows of the train split; how many. Raises DataError where there are none.

    In the order of their ids, which are digests, and so in no order at all.
    """
    import pyarrow.compute as pc

    every = _whole(corpus_dir)
    train = every.filter(pc.equal(every["split"], "train")).sort_by("id")
    if not len(train):
        raise DataError(f"{corpus_dir}: there are no train rows, and on-policy rounds need some.")
    return _write(folder, _cut(train.take(taken(len(train), number, share)), rows_per_shard))


def write_splits(
    corpus_dir: str | Path,
    folder: Path,
    splits: Sequence[str],
    rows_per_shard: int,
    words: int | None = None,
) -> int:
    """The rows of these splits, or the first words of each; how many. Raises DataError where a
    split is empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    every = _whole(corpus_dir)
    some = every.filter(pc.is_in(every["split"], pa.array(splits)))
    for split in splits:
        if not pc.any(pc.equal(some["split"], split)).as_py():
            raise DataError(
                f"{corpus_dir}: split {split} has no rows; give it some with corpus.split_map or "
                "corpus.shares."
            )
    if words is not None:
        texts = [" ".join(text.split()[:words]) for text in some["text"].to_pylist()]
        place, kept = some.schema.get_field_index("text"), some.schema.field("text")
        some = some.set_column(place, kept, pa.array(texts, kept.type))
    return _write(folder, _cut(some, rows_per_shard))


def write_rows(folder: Path, rows: Sequence[dict[str, Any]], rows_per_shard: int) -> int:
    """These corpus rows; how many."""
    import pyarrow as pa

    return _write(folder, _cut(pa.Table.from_pylist(list(rows), corpus.schema()), rows_per_shard))


def _whole(corpus_dir: str | Path) -> pa.Table:
    import pyarrow as pa

    names = [shard["name"] for shard in corpus.read_manifest(corpus_dir)["shards"]]
    return pa.concat_tables([corpus.read_shard(corpus_dir, name) for name in names])


def _cut(table: pa.Table, rows_per_shard: int) -> Iterator[tuple[str, pa.Table]]:
    for number, begin in enumerate(range(0, len(table), rows_per_shard)):
        yield f"part-{number:05d}.parquet", table.slice(begin, rows_per_shard)


def write_written(prompts: Path, answers: Path, folder: Path) -> int:
    """The prompts' rows with what the student wrote (``TOKENS``); how many.

    Left out are empty answers, and those to a prompt that was cut to fit. Raises DataError where
    none is left.
    """
    codec = dataset.codec_of(dataset.finished_manifest(LabelStore(answers)))
    assert codec is not None  # answers are of kind generate

    def shards() -> Iterator[tuple[str, pa.Table]]:
        import pyarrow as pa

        for name, table in dataset.shards(answers):
            asked = {r["id"]: r for r in corpus.read_shard(prompts, name).to_pylist()}
            rows = []
            for said in table.select(["id", "token_ids", "truncated"]).to_pylist():
                ids = codec.unpack_ids(said["token_ids"]).tolist()
                if ids and not said["truncated"]:
                    row = asked[said["id"]]
                    meta = json.loads(row["meta"] or "{}") | {TOKENS: ids}
                    rows.append(row | {"meta": json.dumps(meta, ensure_ascii=False)})
            if rows:
                yield name, pa.Table.from_pylist(rows, schema=corpus.schema())

    n_rows = _write(folder, shards())
    if not n_rows:
        raise DataError(
            f"{answers}: the student wrote nothing behind any prompt; train it longer before it "
            "learns from its own answers, or raise training.on_policy.temperature."
        )
    return n_rows


def _write(folder: Path, shards: Iterable[tuple[str, pa.Table]]) -> int:
    """A corpus, whole or not at all; how many rows."""
    import pyarrow.parquet as pq

    named, n_rows = [], 0
    splits = dict.fromkeys(SPLITS, 0)
    with files.replaced_directory(folder) as fresh:
        for name, table in shards:
            pq.write_table(table, fresh / name, compression="zstd")
            sha256 = files.file_digest(fresh / name)
            named.append({"name": name, "rows": len(table), "sha256": sha256})
            n_rows += len(table)
            for split, n in Counter(table["split"].to_pylist()).items():
                splits[split] += n
        files.write_json(
            fresh / "manifest.json",
            {
                "schema": corpus.SCHEMA_VERSION,
                "digest": digest([(s["name"], s["sha256"]) for s in named]),
                "rows": n_rows,
                "splits": splits,
                "shards": named,
            },
        )
    return n_rows

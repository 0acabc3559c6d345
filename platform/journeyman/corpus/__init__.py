"""Any source to canonical corpus shards: stable ids, splits, duplicates collapsed.

Writes ``part-*.parquet``, ``quarantine.parquet`` (malformed rows), ``near_duplicates.parquet``
(rows left out for one that they nearly repeat) and ``manifest.json``.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import files, sources
from journeyman.corpus.rows import (
    Repeat,
    Row,
    Tally,
    distinct,
    id_columns,
    limited,
    near_repeats,
    prompt_columns,
    source_urls,
)
from journeyman.errors import DataError
from journeyman.folder import Folder
from journeyman.recipe import SPLITS, Classes, Corpus, Recipe, digest
from journeyman.sources import Malformed

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["MANIFEST", "SCHEMA_VERSION", "id_columns", "inputs_digest", "prepare",
           "prompt_columns", "read_manifest", "read_shard", "repeats", "schema",
           "source_urls"]  # fmt: skip

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_LISTED = 20  # malformed rows that the manifest names
_MIN_ROWS = 100  # below this many rows read, the share of malformed ones says nothing
_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


def schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("split", pa.string(), nullable=False),
            pa.field("meta", pa.string()),
            pa.field("count", pa.int32(), nullable=False),
        ]
    )


def inputs_digest(recipe: Recipe, urls: Sequence[str]) -> str:
    """Digest of all that the corpus is made of: settings, templates' columns, source files."""
    facts = []
    for url in urls:
        filesystem, path = sources._filesystem(url)
        info = filesystem.info(path)
        changed = info.get("mtime") or info.get("e_tag") or info.get("ETag")
        facts.append([url, info.get("size"), str(changed)])
    settings = recipe.corpus.model_dump(mode="json")
    return digest([SCHEMA_VERSION, settings, id_columns(recipe), _gold_labels(recipe), facts])


def prepare(recipe: Recipe, out_dir: Path) -> dict[str, Any]:
    """Write the corpus and return its manifest; an older corpus there is replaced when done.

    Raises DataError: unreadable source, missing column, no rows, too many malformed rows, a gold
    label without label words. Nothing at ``out_dir`` has changed then.
    """
    started = time.monotonic()
    urls = source_urls(recipe.corpus)
    inputs = inputs_digest(recipe, urls)
    tally = Tally()
    entries = distinct(recipe, urls, tally)
    _check_malformed(recipe.corpus, tally)
    repeats = near_repeats(recipe, entries)
    for repeat in repeats:
        del entries[repeat.id]
    chosen = limited(recipe.corpus, entries)
    if not chosen:
        raise DataError(_why_empty(recipe.corpus, tally))
    tally.conflicts = sum(len(entry.gold) > 1 for _, entry in chosen)
    _check_labels(recipe, chosen)
    with files.replaced_directory(out_dir) as fresh:
        shards = _write_shards(chosen, recipe.corpus.rows_per_shard, fresh)
        _write_records(tally.malformed, fresh / "quarantine.parquet")
        _write_records(repeats, fresh / "near_duplicates.parquet")
        manifest = {
            "schema": SCHEMA_VERSION,
            "step": "prepare",
            "inputs": inputs,
            "recipe": recipe.hash,
            "digest": digest([(s["name"], s["sha256"]) for s in shards]),
            "sources": urls,
            "rows": len(chosen),
            "splits": _by_split(chosen),
            "groups": _groups(chosen),
            "labels": _label_histogram(chosen),
            "text_characters": _length_percentiles([len(entry.text) for _, entry in chosen]),
            "read": tally.read,
            "filtered": tally.filtered,
            "without_split": tally.unmapped,
            "duplicates": tally.duplicates,
            "near_duplicates": len(repeats),
            "in_several_groups": tally.straddling,
            "conflicting_gold": tally.conflicts,
            "over_limit": len(entries) - len(chosen),
            "malformed": {
                "rows": len(tally.malformed),
                "first": [
                    {"source": m.source, "line": m.line, "reason": m.reason}
                    for m in tally.malformed[:_LISTED]
                ],
            },
            "seconds": round(time.monotonic() - started, 3),
            "shards": shards,
        }
        files.write_json(fresh / MANIFEST, manifest)
    return manifest


def read_manifest(corpus_dir: str | Path) -> dict[str, Any]:
    """Of a corpus in a folder or behind a URL; raises DataError where there is none."""
    folder = Folder(corpus_dir)
    where = folder.path(MANIFEST)
    try:
        manifest = json.loads(folder.get(MANIFEST))
    except FileNotFoundError as error:
        raise DataError(f"{where}: not found; run journeyman prepare first.") from error
    except ValueError as error:
        raise DataError(
            f"{where}: damaged, not JSON ({error}); remove it and run journeyman prepare again."
        ) from error
    if manifest.get("schema") != SCHEMA_VERSION:
        raise DataError(
            f"{corpus_dir}: a corpus of schema {manifest.get('schema')}, this version reads "
            f"{SCHEMA_VERSION}; run journeyman prepare again."
        )
    return manifest


def by_id(corpus_dir: str | Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Text and further columns of every row."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for shard in read_manifest(corpus_dir)["shards"]:
        table = read_shard(corpus_dir, shard["name"]).select(["id", "text", "meta"])
        for row in table.to_pylist():
            found[row["id"]] = row["text"], json.loads(row["meta"] or "{}")
    return found


def read_shard(corpus_dir: str | Path, name: str) -> pa.Table:
    """One corpus shard; raises DataError if the file is missing, damaged or of another schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Folder(corpus_dir)
    where = folder.path(name)
    try:
        return pq.read_table(pa.BufferReader(folder.get(name)), schema=schema())
    except FileNotFoundError as error:
        raise DataError(f"{where}: the corpus shard is gone; run journeyman prepare.") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{where}: not a readable corpus shard ({str(error).splitlines()[0]}); "
            "remove the corpus folder and run journeyman prepare."
        ) from error


def repeats(corpus_dir: str | Path, split: str) -> dict[str, int]:
    """How often each row of a split stood in the sources, by id: of those that did more than once.
    Raises DataError."""
    import pyarrow.compute as pc

    found: dict[str, int] = {}
    manifest = read_manifest(corpus_dir)
    if manifest.get("duplicates") == 0:  # then no shard is worth reading for it
        return found
    for shard in manifest["shards"]:
        rows = read_shard(corpus_dir, shard["name"])
        rows = rows.filter((pc.field("split") == split) & (pc.field("count") > 1))
        found.update(zip(rows["id"].to_pylist(), rows["count"].to_pylist(), strict=True))
    return found


def _check_malformed(corpus: Corpus, tally: Tally) -> None:
    bad = tally.malformed
    if len(bad) > corpus.max_malformed * max(tally.read, _MIN_ROWS):
        first = bad[0]
        raise DataError(
            f"{len(bad)} of {tally.read} rows are malformed, more than corpus.max_malformed = "
            f"{corpus.max_malformed:g} allows; the first: {first.source}, line {first.line}: "
            f"{first.reason}."
        )


def _gold_labels(recipe: Recipe) -> list[str] | None:
    """The labels that gold may hold; None where it may be anything."""
    labels = recipe.labels
    return sorted(labels.classes) if isinstance(labels, Classes) else None


def _check_labels(recipe: Recipe, chosen: list[tuple[str, Row]]) -> None:
    known = _gold_labels(recipe)
    if known is None:
        return
    unknown = Counter(label for _, entry in chosen if (label := entry.label) and label not in known)
    if unknown:
        label, n = unknown.most_common(1)[0]
        others = f" (and {len(unknown) - 1} other labels)" if len(unknown) > 1 else ""
        raise DataError(
            f"gold label {label!r} of {n} rows{others} has no label words; add it to "
            "labels.classes, or leave its rows out with corpus.where."
        )


def _why_empty(corpus: Corpus, tally: Tally) -> str:
    if not tally.read:
        return f"the corpus is empty: {', '.join(corpus.sources)} hold no rows."
    return (
        f"the corpus is empty: of {tally.read} rows read, {len(tally.malformed)} are malformed, "
        f"{tally.filtered} are left out by corpus.where and {tally.unmapped} by corpus.split_map "
        "or corpus.feedback."
    )


def _groups(chosen: Sequence[tuple[str, Row]]) -> dict[str, int]:
    """By split, how many groups its rows are of, those in none counted each; empty without any."""
    if not any(entry.group is not None for _, entry in chosen):
        return {}
    found = {(entry.split, entry.group or row_id) for row_id, entry in chosen}
    return dict(Counter(split for split, _ in found))


def _write_shards(
    chosen: list[tuple[str, Row]], rows_per_shard: int, directory: Path
) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = []
    for number, start in enumerate(range(0, len(chosen), rows_per_shard)):
        part = chosen[start : start + rows_per_shard]
        table = pa.Table.from_pylist(
            [
                {
                    "id": row_id,
                    "text": entry.text,
                    "label": entry.label,
                    "split": entry.split,
                    "meta": json.dumps(entry.meta, ensure_ascii=False) if entry.meta else None,
                    "count": entry.count,
                }
                for row_id, entry in part
            ],
            schema=schema(),
        )
        path = directory / f"part-{number:05d}.parquet"
        pq.write_table(table, path, compression="zstd")
        shards.append({"name": path.name, "rows": len(part), "sha256": files.file_digest(path)})
    return shards


def _write_records(records: Sequence[Malformed | Repeat], path: Path) -> None:
    """A Parquet file with a column for each field; none where there are no records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if records:
        rows = [{name: getattr(record, name) for name in record.__slots__} for record in records]
        pq.write_table(pa.Table.from_pylist(rows), path)


def _by_split(chosen: list[tuple[str, Row]]) -> dict[str, int]:
    counts = Counter(entry.split for _, entry in chosen)
    return {split: counts[split] for split in SPLITS}


def _label_histogram(chosen: list[tuple[str, Row]]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for _, entry in chosen:
        if label := entry.label:
            counts[entry.split][label] += 1
    return {split: dict(sorted(counter.items())) for split, counter in counts.items()}


def _length_percentiles(lengths: list[int]) -> dict[str, float]:
    import numpy as np

    return {f"p{p}": float(v) for p, v in zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES),
                                              strict=True)}  # fmt: skip

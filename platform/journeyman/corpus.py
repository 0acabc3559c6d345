"""Any source to canonical corpus shards: stable ids, splits, duplicates collapsed.

Writes ``part-*.parquet``, ``quarantine.parquet`` (malformed rows), ``near_duplicates.parquet``
(rows left out for one that they nearly repeat) and ``manifest.json``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import files, near_duplicates, sources
from journeyman.columns import TEXT, unpacked
from journeyman.errors import DataError
from journeyman.folder import Folder
from journeyman.prompts import Prompt
from journeyman.recipe import SPLITS, Classes, Corpus, Recipe, digest
from journeyman.sources import Malformed

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_LISTED = 20  # malformed rows that the manifest names
_MIN_ROWS = 100  # below this many rows read, the share of malformed ones says nothing
_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


@dataclass(slots=True)
class _Entry:
    """One distinct row while the sources are read."""

    text: str
    split: str
    meta: dict[str, Any]
    group: str | None = None
    gold: Counter[str] = field(default_factory=Counter)
    count: int = 0
    elsewhere: bool = False  # a duplicate of another group's row that is in another split


@dataclass(frozen=True, slots=True)
class _Repeat:
    """A row that nearly repeats another one; field names are columns of the file."""

    id: str
    kept_id: str
    similarity: float


@dataclass(slots=True)
class _Tally:
    read: int = 0
    malformed: list[Malformed] = field(default_factory=list)
    filtered: int = 0  # by corpus.where
    unmapped: int = 0  # of a split that corpus.split_map or corpus.feedback leaves out
    duplicates: int = 0
    straddling: int = 0  # rows that stand in groups of several splits
    conflicts: int = 0  # distinct rows whose duplicates disagree on the gold label


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


def source_urls(corpus: Corpus) -> list[str]:
    """All files that the corpus is made of; raises DataError where a name stands for none."""
    return sources.expand(corpus.sources) + _feedback_urls(corpus)


def _feedback_urls(corpus: Corpus) -> list[str]:
    if corpus.feedback is None:
        return []
    try:
        return sources.expand([f"{corpus.feedback.rstrip('/')}/*.parquet"])
    except DataError as error:
        raise DataError(
            f"corpus.feedback: {corpus.feedback}: no Parquet file there yet. A cascade finishes "
            "one after cascade.feedback.roll_rows rows or roll_s seconds, and when it stops."
        ) from error


def id_columns(recipe: Recipe) -> list[str]:
    """Columns that tell one row from another, in a fixed order: those that the templates name, and
    that with what the teacher wrote, where there is one."""
    written = recipe.teacher.column
    return sorted({*prompt_columns(recipe), *([written] if written else [])})


def prompt_columns(recipe: Recipe) -> list[str]:
    """Columns that the templates name, in a fixed order: what a request has to bring."""
    prompts = [Prompt(source, where) for where, source in recipe.templates().items()]
    columns = ["text", *recipe.corpus.columns.meta]
    for prompt in prompts:
        prompt.check([*columns, "label"] if prompt.where.startswith("labels.") else columns)
    named = frozenset().union(*(p.variables for p in prompts)) - {"label"}
    return sorted(named | {"text"})


def prepare(recipe: Recipe, out_dir: Path) -> dict[str, Any]:
    """Write the corpus and return its manifest; an older corpus there is replaced when done.

    Raises DataError: unreadable source, missing column, no rows, too many malformed rows, a gold
    label without label words. Nothing at ``out_dir`` has changed then.
    """
    started = time.monotonic()
    urls = source_urls(recipe.corpus)
    inputs = inputs_digest(recipe, urls)
    tally = _Tally()
    entries = _distinct(recipe, urls, tally)
    _check_malformed(recipe.corpus, tally)
    repeats = _near_duplicates(recipe, entries)
    for repeat in repeats:
        del entries[repeat.id]
    chosen = _limited(recipe.corpus, entries)
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


def _distinct(recipe: Recipe, urls: Sequence[str], tally: _Tally) -> dict[str, _Entry]:
    """Rows by id, in the order in which the sources have them."""
    corpus = recipe.corpus
    named = id_columns(recipe)
    entries: dict[str, _Entry] = {}
    feedback = set(_feedback_urls(corpus))
    rows = itertools.chain(
        _source_rows(corpus, [url for url in urls if url not in feedback], named, tally),
        _feedback_rows(corpus, [url for url in urls if url in feedback], named, tally),
    )
    for row_id, fresh, gold in rows:
        entry = entries.setdefault(row_id, fresh)
        if entry is not fresh:
            tally.duplicates += 1
            entry.elsewhere |= entry.group != fresh.group and entry.split != fresh.split
            # A row that stands in two splits is kept out of the one nearer to training.
            entry.split = max(entry.split, fresh.split, key=SPLITS.index)
        entry.count += 1
        if gold is not None and str(gold).strip():  # CSV has no other way to say nothing
            entry.gold[str(gold)] += 1
    # Neither group may lie in two splits, so that such a row can be in none.
    whole = {row_id: entry for row_id, entry in entries.items() if not entry.elsewhere}
    tally.straddling = len(entries) - len(whole)
    return whole


_Found = Iterator[tuple[str, _Entry, Any]]  # a row's id, the row, its gold label


def _source_rows(
    corpus: Corpus, urls: Sequence[str], named: Sequence[str], tally: _Tally
) -> _Found:
    columns = corpus.columns
    wanted = [columns.text, *(c for c in (columns.label, columns.split, columns.group) if c)]
    wanted += [c for c in (*columns.meta, *corpus.where) if c not in wanted]
    group_splits: dict[str, str] = {}
    for row, where in _clean_rows(corpus, urls, wanted, tally):
        if any(str(row.get(c)) not in values for c, values in corpus.where.items()):
            tally.filtered += 1
            continue
        text, meta = row[columns.text], {c: _plain(row.get(c)) for c in columns.meta}
        values = {"text": text, **meta}
        row_id = digest([values[c] for c in named])
        split = _split_of(corpus, row, row_id, where)
        if split is None or (corpus.feedback and split != "train"):
            tally.unmapped += 1
            continue
        gold = row.get(columns.label) if columns.label else None
        group = _group_of(corpus, row)
        if group is not None and group_splits.setdefault(group, split) != split:
            raise DataError(
                f"{where}: the group {group!r} of column {columns.group} is in the splits "
                f"{group_splits[group]} and {split} by column {columns.split}; leave "
                "corpus.columns.split out, so that groups are dealt whole, or mend the file."
            )
        yield row_id, _Entry(text=text, split=split, meta=meta, group=group), gold


def _feedback_rows(
    corpus: Corpus, urls: Sequence[str], named: Sequence[str], tally: _Tally
) -> _Found:
    """What a cascade escalated, to train on, and what it audited, held out."""
    plain = Corpus(sources=corpus.sources, format="parquet")
    for row, _ in _clean_rows(plain, urls, ["text", "split"], tally):
        values = unpacked(row["text"], named)
        row_id = digest([values[c] for c in named])
        audited = row["split"] != "train"
        split = _draw(corpus.feedback_shares, row_id) if audited else "train"
        meta = {name: value for name, value in values.items() if name != TEXT}
        yield row_id, _Entry(text=values[TEXT], split=split, meta=meta), None


def _near_duplicates(recipe: Recipe, entries: dict[str, _Entry]) -> list[_Repeat]:
    """Rows whose text nearly repeats that of a row as far from training or farther.

    Rows that differ in another column that a template names ask the teacher another thing, so
    they repeat each other only where these columns are the same.
    """
    settings = recipe.corpus.near_duplicates
    if settings is None:
        return []
    ids, rows = list(entries), list(entries.values())
    texts = [row.text for row in rows]
    others = [column for column in id_columns(recipe) if column != "text"]
    kept = near_duplicates.find(
        texts,
        [SPLITS.index(row.split) for row in rows],
        settings,
        contexts=[digest([row.meta[c] for c in others]) for row in rows] if others else None,
    )
    return [
        _Repeat(ids[i], ids[k], near_duplicates.similarity(texts[i], texts[k], settings.shingle))
        for i, k in enumerate(kept)
        if k is not None
    ]


def _clean_rows(
    corpus: Corpus, urls: Sequence[str], wanted: Sequence[str], tally: _Tally
) -> Iterator[tuple[sources.Row, str]]:
    """Rows whose text is there and is text; counts the others. Checks that the columns exist."""
    text_column = corpus.columns.text
    for url in urls:
        seen: set[str] = set()
        n_rows = 0
        for number, row in enumerate(sources.rows(url, corpus.format, wanted), 1):
            tally.read += 1
            if isinstance(row, Malformed):
                tally.malformed.append(row)
                continue
            n_rows += 1
            seen.update(row)
            text = row.get(text_column)
            if isinstance(text, str) and text.strip():
                yield row, f"{url}: row {number}"
                continue
            reason = f"no text in column {text_column}"
            content = json.dumps(row, default=str, ensure_ascii=False).encode()
            tally.malformed.append(
                Malformed(source=url, line=number, reason=reason, content=content)
            )
        missing = [c for c in wanted if c not in seen]
        if n_rows and missing:
            raise DataError(
                f"{url}: no column {', '.join(missing)}; it has {', '.join(sorted(seen))}. "
                "Name its columns in corpus.columns."
            )


def _plain(value: Any) -> Any:
    """A value as JSON holds it: dates, decimals and bytes, which Parquet has, as text."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return json.loads(json.dumps(value, default=str))


def _group_of(corpus: Corpus, row: sources.Row) -> str | None:
    """None of a row that is in none."""
    value = row.get(corpus.columns.group) if corpus.columns.group else None
    return None if value is None or not str(value).strip() else str(value)


def _split_of(corpus: Corpus, row: sources.Row, row_id: str, where: str) -> str | None:
    columns = corpus.columns
    key = _group_of(corpus, row) or row_id
    if not columns.split:
        return _draw(corpus.shares, key)
    name = str(row.get(columns.split))
    if not corpus.split_map:
        if name not in SPLITS:
            raise DataError(
                f"{where}: split {name!r} is none of {', '.join(SPLITS)}; set corpus.split_map."
            )
        return name
    target = corpus.split_map.get(name)
    return _draw(target, key) if isinstance(target, dict) else target


def _draw(shares: dict[Any, float], key: str) -> str:
    """A split by the key's hash: the same for the same key, in the shares asked for."""
    point = _hash01(key, b"split")
    bounds = itertools.accumulate(shares.get(split, 0.0) for split in SPLITS)
    return next((s for s, bound in zip(SPLITS, bounds, strict=True) if point < bound), SPLITS[-1])


def _hash01(key: str, purpose: bytes) -> float:
    raw = hashlib.blake2b(key.encode(), digest_size=8, key=purpose).digest()
    return int.from_bytes(raw, "big") / 2**64


def _limited(corpus: Corpus, entries: dict[str, _Entry]) -> list[tuple[str, _Entry]]:
    """Rows to keep, split by split, each split in a stable random order.

    Random, so that whatever has been labeled when a run stops is a fair sample.
    """
    by_split: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for row_id, entry in entries.items():
        by_split[entry.split].append((_hash01(row_id, b"order"), row_id))
    return [
        (row_id, entries[row_id])
        for split in SPLITS
        for _, row_id in sorted(by_split[split])[: corpus.limits.get(split)]
    ]


def _check_malformed(corpus: Corpus, tally: _Tally) -> None:
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


def _check_labels(recipe: Recipe, chosen: list[tuple[str, _Entry]]) -> None:
    known = _gold_labels(recipe)
    if known is None:
        return
    unknown = Counter(
        label for _, entry in chosen if (label := _majority(entry.gold)) and label not in known
    )
    if unknown:
        label, n = unknown.most_common(1)[0]
        others = f" (and {len(unknown) - 1} other labels)" if len(unknown) > 1 else ""
        raise DataError(
            f"gold label {label!r} of {n} rows{others} has no label words; add it to "
            "labels.classes, or leave its rows out with corpus.where."
        )


def _why_empty(corpus: Corpus, tally: _Tally) -> str:
    if not tally.read:
        return f"the corpus is empty: {', '.join(corpus.sources)} hold no rows."
    return (
        f"the corpus is empty: of {tally.read} rows read, {len(tally.malformed)} are malformed, "
        f"{tally.filtered} are left out by corpus.where and {tally.unmapped} by corpus.split_map "
        "or corpus.feedback."
    )


def _majority(gold: Counter[str]) -> str | None:
    """The most frequent label; of equally frequent ones the first in the alphabet."""
    return min(gold, key=lambda label: (-gold[label], label)) if gold else None


def _groups(chosen: Sequence[tuple[str, _Entry]]) -> dict[str, int]:
    """By split, how many groups its rows are of, those in none counted each; empty without any."""
    if not any(entry.group is not None for _, entry in chosen):
        return {}
    found = {(entry.split, entry.group or row_id) for row_id, entry in chosen}
    return dict(Counter(split for split, _ in found))


def _write_shards(
    chosen: list[tuple[str, _Entry]], rows_per_shard: int, directory: Path
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
                    "label": _majority(entry.gold),
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


def _write_records(records: Sequence[Malformed | _Repeat], path: Path) -> None:
    """A Parquet file with a column for each field; none where there are no records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if records:
        rows = [{name: getattr(record, name) for name in record.__slots__} for record in records]
        pq.write_table(pa.Table.from_pylist(rows), path)


def _by_split(chosen: list[tuple[str, _Entry]]) -> dict[str, int]:
    counts = Counter(entry.split for _, entry in chosen)
    return {split: counts[split] for split in SPLITS}


def _label_histogram(chosen: list[tuple[str, _Entry]]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for _, entry in chosen:
        if label := _majority(entry.gold):
            counts[entry.split][label] += 1
    return {split: dict(sorted(counter.items())) for split, counter in counts.items()}


def _length_percentiles(lengths: list[int]) -> dict[str, float]:
    import numpy as np

    return {f"p{p}": float(v) for p, v in zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES),
                                              strict=True)}  # fmt: skip

"""A corpus's rows out of its sources: told apart, dealt to splits, repeats left out."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from journeyman import near_duplicates, sources
from journeyman.columns import TEXT, unpacked
from journeyman.errors import DataError
from journeyman.prompts import Prompt
from journeyman.recipe import SPLITS, Corpus, Recipe, digest
from journeyman.sources import Malformed


@dataclass(slots=True)
class Row:
    """One distinct row while the sources are read."""

    text: str
    split: str
    meta: dict[str, Any]
    group: str | None = None
    gold: Counter[str] = field(default_factory=Counter)
    count: int = 0
    elsewhere: bool = False  # a duplicate of another group's row that is in another split

    @property
    def label(self) -> str | None:
        """The most frequent gold label; of equally frequent ones the first in the alphabet."""
        return min(self.gold, key=lambda label: (-self.gold[label], label)) if self.gold else None


@dataclass(frozen=True, slots=True)
class Repeat:
    """A row that nearly repeats another one; field names are columns of the file."""

    id: str
    kept_id: str
    similarity: float


@dataclass(slots=True)
class Tally:
    """What became of the rows that were read."""

    read: int = 0
    malformed: list[Malformed] = field(default_factory=list)
    filtered: int = 0  # by corpus.where
    unmapped: int = 0  # of a split that corpus.split_map or corpus.feedback leaves out
    duplicates: int = 0
    straddling: int = 0  # left out, so that no group is in two splits
    conflicts: int = 0  # distinct rows whose duplicates disagree on the gold label


def source_urls(corpus: Corpus) -> list[str]:
    """All files that the corpus is made of; raises DataError where a name stands for none."""
    return sources.expand(corpus.sources) + feedback_urls(corpus)


def feedback_urls(corpus: Corpus) -> list[str]:
    """Files of what a cascade kept; raises DataError where there is none."""
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


def distinct(recipe: Recipe, urls: Sequence[str], tally: Tally) -> dict[str, Row]:
    """Rows by id, in the order in which the sources have them.

    A row counts as often as it stands there. In a cascade's feedback a held-out one counts its
    audits alone: what is escalated is kept each time that it comes, and what the student answers
    only by the coin, so that all of them together would make the escalated texts too many.

    No group is in two splits: a row that stands in groups of several is left out, and so are the
    train rows of a group of which a cascade audited one. Of feedback the group is known where a
    template names its column.
    """
    corpus = recipe.corpus
    named = id_columns(recipe)
    entries: dict[str, Row] = {}
    groups: dict[str, set[str]] = {}
    feedback = set(feedback_urls(corpus))
    rows = itertools.chain(
        _source_rows(corpus, [url for url in urls if url not in feedback], named, tally),
        _feedback_rows(corpus, [url for url in urls if url in feedback], named, tally),
    )
    for row_id, fresh, gold in rows:
        entry = entries.setdefault(row_id, fresh)
        if fresh.group is not None:
            groups.setdefault(row_id, set()).add(fresh.group)
        if entry is not fresh:
            tally.duplicates += 1
            if not corpus.feedback:
                entry.elsewhere |= entry.group != fresh.group and entry.split != fresh.split
            # A row that stands in two splits is kept out of the one nearer to training.
            split = max(entry.split, fresh.split, key=SPLITS.index)
            if corpus.feedback and split != entry.split:
                entry.count = 0
            entry.split = split
        if not corpus.feedback or fresh.split == entry.split:
            entry.count += 1
        if gold is not None and str(gold).strip():  # CSV has no other way to say nothing
            entry.gold[str(gold)] += 1
    audited: set[str] = set()
    if corpus.feedback:
        held_out = (groups.get(i, set()) for i, entry in entries.items() if entry.split != "train")
        audited = audited.union(*held_out)
    # Neither group may lie in two splits, so that a row of both can be in none.
    whole = {
        row_id: entry
        for row_id, entry in entries.items()
        if not entry.elsewhere
        and (entry.split != "train" or audited.isdisjoint(groups.get(row_id, ())))
    }
    tally.straddling = len(entries) - len(whole)
    return whole


_Found = Iterator[tuple[str, Row, Any]]  # a row's id, the row, its gold label


def _source_rows(corpus: Corpus, urls: Sequence[str], named: Sequence[str], tally: Tally) -> _Found:
    columns = corpus.columns
    wanted = [columns.text, *(c for c in (columns.label, columns.split, columns.group) if c)]
    wanted += [c for c in (*columns.meta, *corpus.where) if c not in wanted]
    group_splits: dict[str, str] = {}
    for row, where in _clean_rows(corpus, urls, wanted, tally):
        if any(str(row.get(c)) not in values for c, values in corpus.where.items()):
            tally.filtered += 1
            continue
        text, meta = row[columns.text], {c: _plain(row.get(c)) for c in columns.meta}
        values = {**meta, TEXT: text}
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
        yield row_id, Row(text=text, split=split, meta=meta, group=group), gold


def _feedback_rows(
    corpus: Corpus, urls: Sequence[str], named: Sequence[str], tally: Tally
) -> _Found:
    """What a cascade escalated, to train on, and what it audited, held out."""
    plain = Corpus(sources=corpus.sources, format="parquet")
    for row, _ in _clean_rows(plain, urls, ["text", "split"], tally):
        row_id, values = feedback_row(row["text"], named)
        group = _group_of(corpus, {corpus.columns.text: values[TEXT]} | values)
        audited = row["split"] != "train"
        split = _draw(corpus.feedback_shares, group or row_id) if audited else "train"
        meta = {name: value for name, value in values.items() if name != TEXT}
        yield row_id, Row(text=values[TEXT], split=split, meta=meta, group=group), None


def feedback_row(text: str, named: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Of a text that a cascade kept: the row's id and columns. named: ``id_columns``."""
    values = unpacked(text, named)
    return digest([values[c] for c in named]), values


def near_repeats(recipe: Recipe, entries: dict[str, Row]) -> list[Repeat]:
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
        Repeat(ids[i], ids[k], near_duplicates.similarity(texts[i], texts[k], settings.shingle))
        for i, k in enumerate(kept)
        if k is not None
    ]


def _clean_rows(
    corpus: Corpus, urls: Sequence[str], wanted: Sequence[str], tally: Tally
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


def limited(corpus: Corpus, entries: dict[str, Row]) -> list[tuple[str, Row]]:
    """Rows to keep, split by split: a random choice, in a random order in which groups stay whole.

    Random, so that whatever has been labeled when a run stops is a fair sample; whole, since rows
    of one group often begin with the same document, which the teacher then reads once.
    """
    by_split: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for row_id, entry in entries.items():
        by_split[entry.split].append((_hash01(row_id, b"order"), row_id))
    kept: list[tuple[str, Row]] = []
    for split in SPLITS:
        ids = [row_id for _, row_id in sorted(by_split[split])[: corpus.limits.get(split)]]
        places = {row_id: _hash01(entries[row_id].group or row_id, b"order") for row_id in ids}
        kept += [(row_id, entries[row_id]) for row_id in sorted(ids, key=places.__getitem__)]
    return kept

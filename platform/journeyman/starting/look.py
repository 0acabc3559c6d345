"""What a file of rows looks like: its columns, what is in them, and what each may be good for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from journeyman import sources
from journeyman.errors import DataError
from journeyman.sources import Malformed

_SAMPLE = 2000  # rows by which columns are told apart
MOST_LABELS = 500  # a column with more values holds no labels

_TEXT_NAMES = (
    "text", "body", "content", "message", "question", "query", "prompt", "request", "utterance",
    "sentence", "review", "comment", "description", "title", "document", "input",
)  # fmt: skip
_LABEL_NAMES = (
    "label", "labels", "class", "category", "intent", "target", "topic", "team", "tag", "type",
    "domain", "decision", "sentiment", "queue", "y",
)  # fmt: skip
SPLIT_ROLES = {"train": "train", "training": "train", "val": "held out", "valid": "held out",
               "validation": "held out", "dev": "held out", "eval": "held out", "test": "test",
               "calibrate": "calibrate", "certify": "certify"}  # fmt: skip


@dataclass(slots=True)
class Column:
    """What the sample's values of one column are."""

    name: str
    n_texts: int = 0
    characters: int = 0
    values: Counter[str] = field(default_factory=Counter)

    @property
    def mean_length(self) -> float:
        """In characters."""
        return self.characters / max(self.n_texts, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A file's columns, in its order.

    Attributes:
        kind: the format, as ``corpus.format`` names it.
        n_sampled: rows that were looked at.
    """

    url: str
    kind: str
    columns: tuple[Column, ...]
    n_sampled: int

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def known(self, name: str, flag: str) -> str:
        """The name, if it is a column's; raises DataError with those that there are."""
        if name in self.names:
            return name
        raise DataError(
            f"{self.url}: no column {name!r}; it has {', '.join(map(repr, self.names))}. "
            f"Name one of them with {flag}."
        )

    def text(self) -> str | None:
        """The column that holds the text: by its name, else the only one of long texts."""
        texts = [c for c in self.columns if c.n_texts > self.n_sampled / 2]
        if named := _named(texts, _TEXT_NAMES):
            return named
        long = [c for c in texts if c.mean_length >= 15 and _is_distinct(c)]
        return long[0].name if len(long) == 1 else None

    def label(self, text: str) -> str | None:
        """The column that holds gold labels: by its name, of those with few values."""
        few = [c for c in self.columns if c.name != text and 2 <= len(c.values) <= MOST_LABELS]
        repeated = [c for c in few if len(c.values) <= max(2, self.n_sampled / 2)]
        return _named(repeated, _LABEL_NAMES)

    def split(self) -> str | None:
        """The column that holds the source's own splits."""
        return next((c.name for c in self.columns if c.values and _are_splits(c.values)), None)


def look(url: str) -> Look:
    """Raises DataError: no such file, unreadable, or without a row."""
    if not sources.expand([url]) or any(c in url for c in "*?["):
        raise DataError(f"{url}: name one file, and add others to corpus.sources afterwards.")
    kind = sources.format_of(url)
    columns: dict[str, Column] = {}
    n_rows = n_malformed = 0
    first = ""  # why a row is malformed
    for row in sources.rows(url, kind, sources.columns(url, kind)):
        if isinstance(row, Malformed):
            n_malformed += 1
            first = first or row.reason
            continue
        n_rows += 1
        _count(columns, row)
        if n_rows == _SAMPLE:
            break
    if not n_rows:
        why = "it has no rows"
        if n_malformed:
            why = f"all of its {n_malformed} rows are malformed ({first})"
        advice = f"; {sources.AS_UTF8}" if "UTF-8" in first else "."
        raise DataError(f"{url}: {why}, so that there is nothing to make a recipe for{advice}")
    _check_delimiter(url, kind, list(columns))
    return Look(
        url=url,
        kind=kind,
        columns=tuple(columns.values()),
        n_sampled=n_rows,
    )


@dataclass(slots=True, kw_only=True)
class Counted:
    """Over a whole file: rows with a text, those that cannot be read, why the first of them cannot,
    and how many of the former have each label and lie in each of the source's own splits.

    cut_group: of the first group that lies in several of these splits; empty where none does."""

    n_rows: int = 0
    n_malformed: int = 0
    first_malformed: str = ""
    labels: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    cut_group: str = ""


def count(
    url: str, kind: str, text: str, label: str | None, split: str | None, group: str | None = None
) -> Counted:
    """Raises DataError for more labels than ``MOST_LABELS``."""
    counted = Counted()
    found = counted.labels
    group_splits: dict[str, str] = {}
    for row in sources.rows(url, kind, [text, *(c for c in (label, split, group) if c)]):
        why = row.reason if isinstance(row, Malformed) else _lack(row.get(text))
        if isinstance(row, Malformed) or why:
            counted.n_malformed += 1
            counted.first_malformed = counted.first_malformed or why
            continue
        counted.n_rows += 1
        if split and (name := _said(row, split)):
            counted.splits[name] += 1
            of_group = _said(row, group) if group else ""
            role = SPLIT_ROLES.get(name.strip().lower(), name)
            if of_group and group_splits.setdefault(of_group, role) != role:
                counted.cut_group = counted.cut_group or of_group
        if label and (name := _said(row, label)):
            found[name] += 1
        if len(found) > MOST_LABELS:
            raise DataError(
                f"{url}: column {label!r} has more than {MOST_LABELS} different values, and looks "
                "like no label; name another one with --label, or none with --no-label."
            )
    return counted


def _said(row: sources.Row, column: str) -> str:
    """Empty where the row says nothing there."""
    value = "" if row.get(column) is None else str(row[column])
    return value if value.strip() else ""


def _lack(text: object) -> str:
    return "" if isinstance(text, str) and text.strip() else "no text"


def _count(columns: dict[str, Column], row: dict[str, Any]) -> None:
    for name, value in row.items():
        column = columns.setdefault(name, Column(name))
        if value is None or value == "" or isinstance(value, dict | list):
            continue
        column.values[str(value)] += 1
        if isinstance(value, str) and value.strip():
            column.n_texts += 1
            column.characters += len(value)


def _check_delimiter(url: str, kind: str, names: Sequence[str]) -> None:
    other = next((c for c in ";\t|" if len(names) == 1 and c in names[0]), None)
    if kind == "csv" and other:
        raise DataError(
            f"{url}: its only column is called {names[0]!r}: the file seems to separate by "
            f"{other!r}, and a .csv is read by commas. Save it with commas, or as .tsv with tabs."
        )


def _named(columns: Sequence[Column], names: Sequence[str]) -> str | None:
    """The column called by the first of the names, whole or as one of its words."""
    for name in names:
        for column in columns:
            if column.name.strip().lower() == name:
                return column.name
    for name in names:
        for column in columns:
            words = "".join(c if c.isalnum() else " " for c in column.name.lower()).split()
            if name in words and "id" not in words:
                return column.name
    return None


def _are_splits(values: Iterable[str]) -> bool:
    return {value.strip().lower() for value in values} <= set(SPLIT_ROLES)


def _is_distinct(column: Column) -> bool:
    return len(column.values) > 0.5 * sum(column.values.values())

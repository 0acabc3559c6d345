"""What a cascade's teacher has said of the texts that it kept, to copy: it was paid for once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from journeyman import sources
from journeyman.corpus import rows
from journeyman.labels import cache, schema
from journeyman.labels.cache import Cache
from journeyman.recipe import Recipe, digest

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_A_FILE = 10_000
_OF_CORPUS = ("id", "split", "gold")


def how_asked(recipe: Recipe, identity: dict[str, Any]) -> str:
    """As for a cache, but of teachers that also read as long a text, since one that is too long is
    left out of a dataset by what it is labeled with."""
    return digest([cache.how_asked(identity), recipe.teacher.max_model_len])


def collect(recipe: Recipe, identity: dict[str, Any], to: Cache) -> int:
    """Put into the cache what is in ``corpus.feedback`` of a teacher that was asked in the way of
    this identity; returns how many texts that is. Raises DataError where a file is unreadable."""
    n_rows = 0
    for table in _tables(recipe, how_asked(recipe, identity)):
        to.keep(table)
        n_rows += len(table)
    return n_rows


def _tables(recipe: Recipe, asked: str) -> Iterator[pa.Table]:
    """Each text once."""
    import pyarrow as pa

    columns = schema.label_schema("classes")
    seen: set[str] = set()
    found: list[dict[str, Any]] = []
    for record in _records(recipe, asked, [c for c in columns.names if c not in _OF_CORPUS]):
        if record["id"] not in seen:
            seen.add(record["id"])
            found.append(record)
        if len(found) == _ROWS_A_FILE:
            yield pa.Table.from_pylist(found, columns)
            found = []
    if found:
        yield pa.Table.from_pylist(found, columns)


def _records(recipe: Recipe, asked: str, of_labels: list[str]) -> Iterator[dict[str, Any]]:
    named = rows.id_columns(recipe)
    for url in rows.feedback_urls(recipe.corpus):
        for row in sources.rows(url, "parquet", ["text", "asked", *of_labels]):
            if isinstance(row, dict) and row.get("asked") == asked:
                row_id, _ = rows.feedback_row(row["text"], named)
                labels = {name: row[name] for name in of_labels}
                yield {"id": row_id, "split": "train", "gold": None, **labels}

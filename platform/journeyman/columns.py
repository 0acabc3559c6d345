"""A row of several columns as one text, and back.

A cascade takes, remembers and keeps texts. Where its templates name further columns, such a text is
the canonical JSON of the row's columns; where they name the text alone, it is the text itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from journeyman.errors import DataError

TEXT = "text"


def packed(row: str | Mapping[str, str], columns: Sequence[str]) -> str:
    """columns: those that are needed, no others may be there. Raises DataError with a sentence that
    names columns, and nothing of what they hold."""
    needed = ", ".join(columns)
    if isinstance(row, str):
        if list(columns) == [TEXT]:
            return row
        raise DataError(f"an object with the columns {needed} is needed, and a text was sent.")
    if missing := [name for name in columns if name not in row]:
        raise DataError(f"column {missing[0]} is missing; needed are {needed}.")
    if any(name not in columns for name in row):
        raise DataError(f"there are other columns than {needed}; send these alone.")
    if not row[TEXT].strip():
        raise DataError(f"column {TEXT} is blank.")
    if list(columns) == [TEXT]:
        return row[TEXT]
    return json.dumps({name: row[name] for name in sorted(columns)}, ensure_ascii=False)


def n_characters(row: Mapping[str, object], columns: Sequence[str]) -> int:
    """Of these columns together, as long as a row may be for a request."""
    return sum(len(str(row.get(name, ""))) for name in columns)


def unpacked(text: str, columns: Sequence[str]) -> dict[str, str]:
    """The row that was packed; columns: the same as then."""
    if list(columns) == [TEXT]:
        return {TEXT: text}
    row: dict[str, str] = json.loads(text)
    return row

"""Pieces of text that commands print."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from journeyman.labels.inspect import Share

_FIGURE = re.compile(r"[-+\d.,e%]*")


def printable(text: str) -> str:
    """Control characters of a text would be obeyed by the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "�" for c in text)


def counts(by_name: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in by_name.items()) or "none"


def interval(share: Share) -> str:
    return f"{share.rate:.3f} (95%: {share.low:.3f} to {share.high:.3f})"


def size(n_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.1f} {unit}"
    return f"{n_bytes} bytes"


def one_line(text: str, limit: int = 110) -> str:
    words = printable(" ".join(text.split()))
    return words if len(words) <= limit else words[: limit - 1] + "…"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned text; columns of figures to the right, the last column as it is."""
    if not rows:
        return ""
    n_columns = max(map(len, rows))
    full = [[*row, *[""] * (n_columns - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in full) for i in range(n_columns)]
    figures = [_is_figures([row[i] for row in full]) for i in range(n_columns)]
    return "\n".join(
        "  ".join(
            cell.rjust(widths[i]) if figures[i] else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ).rstrip()
        for row in full
    )


def _is_figures(cells: Sequence[str]) -> bool:
    """Whether a column, its head aside, holds nothing but numbers."""
    return len(cells) > 1 and all(_FIGURE.fullmatch(cell) for cell in cells[1:])

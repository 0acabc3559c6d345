"""Rows of a label dataset, for a person: the text beside what the teacher said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from journeyman.cli.text import printable
from journeyman.labels.inspect import Opened, Row, Token

_BAR = 16  # cells of a bar
_EIGHTHS = " ▏▎▍▌▋▊▉"
_CLASSES = 8  # shown of a row
_CHARACTERS = 700  # shown of a text


def print_rows(opened: Opened, rows: Sequence[Row], *, whole: bool = False) -> None:
    """Each row as a block: who it is, then its text beside what the teacher said.

    whole: texts of any length; else they are cut.
    """
    console = Console(highlight=False)
    limit = None if whole else _CHARACTERS
    for line in _preamble(opened, rows):
        print(line)
    for row in rows:
        print()
        _print(console, _head(row))
        _print(console, _side_by_side(row, limit))
        if row.tokens:
            _print(console, _tokens(row))


def _print(console: Console, what: RenderableType) -> None:
    """Without the spaces that fill a table's lines."""
    with console.capture() as capture:
        console.print(what, soft_wrap=isinstance(what, Text))
    print("\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n")))


def _preamble(opened: Opened, rows: Sequence[Row]) -> Iterator[str]:
    yield f"{opened.where}   {opened.labels.kind} labels by {opened.teacher}"
    yield from opened.notes
    if opened.why_no_text:
        yield f"Without texts: {opened.why_no_text}."
    if any(row.tokens_are_ids for row in rows):
        yield "Tokens by their ids: the teacher's tokenizer is not on this machine."
    if not rows:
        yield "No such row."


def _head(row: Row) -> RenderableType:
    parts = [f"{row.id}  {row.split}"]
    if row.gold is not None:
        parts.append(f"gold {printable(row.gold)}")
    if row.fate:
        parts.append(printable(row.fate))
    return Text("  ".join(parts), style="bold")


def _side_by_side(row: Row, limit: int | None) -> RenderableType:
    said = list(_said(row, limit))
    grid = Table.grid(expand=True, padding=(0, 3, 0, 0))
    text = _cut(row.text, limit) if row.text is not None else "(text not at hand)"
    if not said:
        grid.add_column()
        grid.add_row(Text(text))
        return grid
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    right = Table.grid()
    right.add_column()
    for part in said:
        right.add_row(part)
    grid.add_row(Text(text), right)
    return grid


def _said(row: Row, limit: int | None) -> Iterator[RenderableType]:
    for i, (reasoning, answer) in enumerate(row.samples, start=1):
        words = "no answer found" if answer is None else f"answer: {printable(answer)}"
        number = f"{i}. " if len(row.samples) > 1 else ""
        yield Text(f"{number}{_cut(reasoning, limit)}\n   → {words}")
    if row.samples:
        yield Text(f"majority: {printable(row.answer or '')}, agreement {row.agreement:.2f}")
    elif row.answer is not None and not row.probabilities:
        cut_off = " … (cut off at max_tokens)" if row.finish_reason == "length" else ""
        yield Text(_cut(row.answer, limit) + cut_off)
    if row.probabilities:
        yield _bars(row.probabilities)
    if row.label_mass is not None:
        yield Text(f"label mass {row.label_mass:.3g}")


def _bars(probabilities: Sequence[tuple[str, float]]) -> RenderableType:
    bars = Table.grid(padding=(0, 1, 0, 0))
    for label, p in probabilities[:_CLASSES]:
        bars.add_row(Text(printable(label)), f"{p:.3f}", bar(p))
    if len(probabilities) > _CLASSES:
        rest = probabilities[_CLASSES:]
        bars.add_row(f"{len(rest)} more", f"{sum(p for _, p in rest):.3f}", "")
    return bars


def bar(share: float) -> str:
    """A bar of up to 16 cells, in eighths."""
    whole, eighths = divmod(round(share * _BAR * 8), 8)
    return ("█" * whole + _EIGHTHS[eighths]).rstrip()


def _tokens(row: Row) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row("", "token", "p", "likeliest", style="dim")
    for token in row.tokens:
        own = "-" if token.probability is None else f"{token.probability:.3f}"
        grid.add_row(str(token.position), Text(_quoted(token.text)), own, Text(_likeliest(token)))
    if row.n_positions > len(row.tokens):
        grid.add_row("", f"{row.n_positions - len(row.tokens):,} more", "", "")
    return grid


def _likeliest(token: Token) -> str:
    shown = [f"{_quoted(text)} {p:.3f}" for text, p in token.top]
    return "  ".join([*shown, f"beyond the stored {token.tail:.3f}"])


def _quoted(text: str) -> str:
    """A token with its spaces in sight; a bare id as it is."""
    return text if text.isdigit() else printable(json.dumps(text, ensure_ascii=False))


def _cut(text: str, limit: int | None) -> str:
    text = printable(text.strip())
    if limit is None or len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} … ({len(text) - limit:,} more characters)"

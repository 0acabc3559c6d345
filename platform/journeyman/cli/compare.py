"""``journeyman compare``: finished students side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from journeyman import files
from journeyman.cli.arguments import command
from journeyman.cli.text import table
from journeyman.errors import DataError

_WORDS = """\
Students side by side, from the folders of their runs (or their own): how large they are, how well
they follow their teacher on held-out rows, and what their training took. Students of different
corpora were measured on different rows.
"""

_EXAMPLES = """\
examples:
  journeyman compare runs/small runs/large
  journeyman compare runs/*
"""


def add_command(commands: Any) -> None:
    compare = command(
        commands, "compare", "finished students side by side", _compare, _WORDS, _EXAMPLES
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder")


def _compare(options: argparse.Namespace) -> int:
    records = [_record(run) for run in options.runs]
    heads = ("run", "MB", "agreement", "KL", "accuracy", "perplexity", "rows", "steps", "seconds")
    cells = [_cells(run, *found) for run, found in zip(options.runs, records, strict=True)]
    print(table([heads, *cells]))
    if len({found["labels"] for found, _ in records}) > 1:
        print("\nThese students learned from different labels: compare them with care.")
    return 0


def _record(run: Path) -> tuple[dict[str, Any], int]:
    """A student's own record, and the bytes of its weights."""
    for folder in (run / "student", run):
        if (folder / "journeyman.json").is_file():
            record = files.read_json(folder / "journeyman.json")
            if record.get("kind") == "student":
                size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                return record, size
    raise DataError(f"{run}: no finished student here; run journeyman train first.")


def _cells(run: Path, record: dict[str, Any], size: int) -> tuple[str, ...]:
    best = record["best"]
    return (
        run.name,
        f"{size / 1e6:,.0f}",
        f"{best['agreement']:.3f}",
        f"{best['kl']:.3f}",
        *(_or_dash(best.get(key), form) for key, form in
          (("gold_accuracy", ".3f"), ("perplexity", ",.1f"))),
        f"{record['rows']:,}",
        f"{record['steps']:,}",
        f"{record['seconds']:,.0f}",
    )  # fmt: skip


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

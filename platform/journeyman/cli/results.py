"""``journeyman results``: finished runs side by side, as Markdown."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from journeyman import files
from journeyman.cli.arguments import command

_WORDS = """\
What finished runs came to, side by side, as a page of Markdown: teacher, student and cascade
against gold, the promise and what was realised, requests a second, and how long each step took.
"""

_EXAMPLES = """\
examples:
  journeyman results runs/routing runs/policy                        the page, to the terminal
  journeyman results runs/* --to docs/results.md --into README.md
"""


def add_command(commands: Any) -> None:
    results = command(
        commands, "results", "finished runs as a page of Markdown", _results, _WORDS, _EXAMPLES
    )
    results.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder or URL")
    results.add_argument("--to", metavar="FILE", type=Path, help="write the page there")
    results.add_argument(
        "--into",
        metavar="FILE",
        type=Path,
        help="put the tables of quality between this file's marks",
    )


def _results(options: argparse.Namespace) -> int:
    from journeyman import results, run_folder

    runs = [results.read(run_folder.here(run)) for run in options.runs]
    page = results.page(runs)
    if options.to is None and options.into is None:
        print(page)
    if options.to:
        files.write_bytes(options.to, page.encode())
        print(f"results   {options.to}")
    if options.into:
        table = results.for_readme(runs)
        text = results.between_marks(options.into.read_text("utf-8"), table)
        files.write_bytes(options.into, text.encode())
        print(f"table     {options.into}")
    return 0

"""``journeyman compare``: finished students side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import files
from journeyman.cli.arguments import command
from journeyman.cli.text import table

if TYPE_CHECKING:
    from journeyman.report.comparison import ComparedStudent

_WORDS = """\
Students side by side, from the folders of their runs (or their own): how large they are, how well
they follow their teacher on held-out rows, how many of those rows they answered in a second (while
they were trained, on that device), and what their training took. Students of different corpora were
measured on different rows.
"""

_EXAMPLES = """\
examples:
  journeyman compare runs/small runs/large
  journeyman compare runs/* --plot students.svg      size against agreement
  journeyman compare runs/* --report                 the same on the runs' pages
"""


def add_command(commands: Any) -> None:
    compare = command(
        commands, "compare", "finished students side by side", _compare, _WORDS, _EXAMPLES
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder or URL")
    compare.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw size against agreement, as SVG"
    )
    compare.add_argument(
        "--report",
        action="store_true",
        help="keep the comparison in the runs' folders, or behind their URLs: journeyman report "
        "draws it on their pages",
    )


def _compare(options: argparse.Namespace) -> int:
    from journeyman import run_folder
    from journeyman.report import comparison

    students = [comparison.read(run_folder.here(run)) for run in options.runs]
    heads = ("run", "MB", "agreement", "accuracy", "KL", "cross-entropy", "perplexity", "exact",
             "rows/s", "train rows", "steps", "seconds")  # fmt: skip
    print(table([heads, *map(_cells, students)]))
    if notes := comparison.agreement_notes(students):
        print("\n" + "\n".join(notes))
    if len({student.labels_digest for student in students}) > 1:
        print("\nThese students learned from different labels: compare them with care.")
    if options.plot:
        from journeyman.report import plots

        files.write_bytes(options.plot, plots.size_agreement(students).encode())
        print(f"\nplot      {options.plot}")
    if options.report:
        for run in options.runs:
            comparison.keep(students, run)
        print("\nkept; journeyman report R draws it on the page of each run")
    return 0


def _cells(student: ComparedStudent) -> tuple[str, ...]:
    return (
        student.name,
        f"{student.size_bytes / 1e6:,.0f}",
        f"{student.agreement:.3f}",
        _or_dash(student.gold_accuracy, ".3f"),
        _or_dash(student.kl, ".3f"),
        _or_dash(student.cross_entropy, ".3f"),
        _or_dash(student.perplexity, ",.1f"),
        _or_dash(student.exact_match, ".3f"),
        _or_dash(student.rows_per_s, ",.0f"),
        f"{student.n_rows:,}",
        f"{student.steps:,}",
        f"{student.seconds:,.0f}",
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

"""``journeyman labels``: look at what the teacher said, hand it on, and try again what failed."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman import recipe
from journeyman.cli.arguments import add_overrides, add_recipe, command, load, positive
from journeyman.errors import DataError, RecipeError
from journeyman.folder import Folder

if TYPE_CHECKING:
    from journeyman.labels.inspect import Opened

_DESCRIPTION = """\
Look at label datasets, hand them on, and label again what failed.

Every command takes a recipe (then it means the labels of its run), a run's folder, or the folder or
URL of a label dataset. A dataset may be looked at while it is being made.
"""

_EXAMPLES = """\
examples:
  journeyman labels stats my.yaml                       is it any good? counts, accuracy, reasons
  journeyman labels show my.yaml --only wrong           rows where the teacher misses the gold label
  journeyman labels show my.yaml --only quarantined     rows that could not be labeled, and why
  journeyman labels requeue my.yaml                     label those again
  journeyman labels diff runs/a runs/b                  what a changed prompt changed
  journeyman labels export my.yaml --format hf --out labels-hf
"""

_SHOW = """\
Show rows with what the teacher said of them: text on the left; class probabilities, likeliest
tokens, the answer, or reasonings and answers on the right.
"""

_SHOW_EXAMPLES = """\
examples:
  journeyman labels show my.yaml                        the first five rows
  journeyman labels show my.yaml --only wrong --rows 20
  journeyman labels show runs/routing --id 3f2a91          one row, its text and answers in full
"""

_STATS = """\
A label dataset in figures: what became of every row, the teacher's labels against gold, label mass
and entropy, tokens, bytes, and why rows are in quarantine.
"""

_DIFF = """\
Compare two label datasets of one kind row by row, for instance of two prompts or two codecs: how
often they agree, how far apart their distributions are, and the rows that differ most.
"""

_DIFF_EXAMPLES = """\
examples:
  journeyman labels diff a.yaml b.yaml                  the labels of two recipes' runs
  journeyman labels diff runs/a/labels s3://bucket/b --rows 20 --json
"""

_EXPORT = """\
Write a label dataset, with its texts, for other tools.

  hf       a folder that datasets.load_from_disk opens
  jsonl    one JSON object a line, probabilities by label; compressed if PATH ends in .gz
  parquet  one Parquet file

Rows that filters leave out are left out. Token distributions stay packed (a README.md says how to
read them) unless --decode is given, and are then many times larger.
"""

_EXPORT_EXAMPLES = """\
examples:
  journeyman labels export my.yaml --format jsonl --out labels.jsonl.gz
  journeyman labels export my.yaml --format hf --out labels-hf --split train --decode
"""

_REQUEUE = """\
Label the rows in quarantine again, once what their reasons name is mended (journeyman labels stats
lists the reasons). What fails again stays in quarantine; all other rows are left as they are.
"""


def add_commands(commands: Any) -> None:
    group = commands.add_parser(
        "labels",
        help="look at label datasets: show, stats, diff, export, card, requeue",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = group.add_subparsers(required=True, metavar="ACTION")
    _add_show(actions)
    _add_stats(actions)
    _add_diff(actions)
    _add_export(actions)
    card = command(actions, "card", "write the dataset card, README.md, anew", _card)
    _add_dataset(card)
    requeue = command(actions, "requeue", "label the rows in quarantine again", _requeue, _REQUEUE)
    add_recipe(requeue)


def _add_show(actions: Any) -> None:
    show = command(
        actions, "show", "rows, and what the teacher said of them", _show, _SHOW, _SHOW_EXAMPLES
    )
    _add_dataset(show)
    show.add_argument(
        "--rows", metavar="N", type=positive, default=5, help="rows to show (default 5)"
    )
    show.add_argument(
        "--id",
        dest="ids",
        metavar="ID",
        action="append",
        default=[],
        help="only rows whose id begins so; may be given again",
    )
    show.add_argument("--split", metavar="NAME", help="only rows of this split")
    show.add_argument(
        "--only",
        choices=("wrong", "filtered", "quarantined"),
        help="wrong: the teacher misses the gold label; filtered, quarantined: rows set aside",
    )
    show.add_argument(
        "--positions",
        metavar="N",
        type=positive,
        default=12,
        help="token labels: positions of a row (default 12)",
    )
    show.add_argument(
        "--top",
        metavar="N",
        type=positive,
        default=4,
        help="token labels: likeliest tokens of a position (default 4)",
    )


def _add_stats(actions: Any) -> None:
    stats = command(actions, "stats", "a dataset in figures", _stats, _STATS)
    _add_dataset(stats)
    _add_json(stats)


def _add_diff(actions: Any) -> None:
    diff = command(
        actions, "diff", "two datasets held against each other", _diff, _DIFF, _DIFF_EXAMPLES
    )
    for name in ("A", "B"):
        diff.add_argument(
            name.lower(),
            metavar=name,
            help="a recipe, or a run's or a dataset's folder or URL",
        )
    _add_corpus(diff)
    add_overrides(diff)
    diff.add_argument(
        "--rows", metavar="N", type=positive, default=5, help="rows that differ most (default 5)"
    )
    _add_json(diff)


def _add_export(actions: Any) -> None:
    export = command(
        actions, "export", "a copy for other tools", _export, _EXPORT, _EXPORT_EXAMPLES
    )
    _add_dataset(export)
    export.add_argument("--format", required=True, help="hf, jsonl or parquet")
    export.add_argument("--out", metavar="PATH", required=True, type=Path, help="where to write it")
    export.add_argument(
        "--decode", action="store_true", help="token distributions as lists of numbers"
    )
    export.add_argument("--split", metavar="NAME", help="only rows of this split")
    export.add_argument("--force", action="store_true", help="replace what is at PATH")


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "where",
        metavar="RECIPE-or-FOLDER",
        help="a recipe, or a run's or a dataset's folder or URL",
    )
    _add_corpus(parser)
    add_overrides(parser)


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus",
        metavar="FOLDER",
        help="the corpus that was labeled, or its URL, for its texts; default the run's",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


# --- which dataset is meant ---


def _open(where: str, overrides: list[str], corpus_dir: str | None = None) -> Opened:
    from journeyman.labels.inspect import open_dataset

    folder, run_corpus = _dataset(where, overrides)
    return open_dataset(folder, corpus_dir, run_corpus)


def _dataset(where: str, overrides: list[str]) -> tuple[str, str | Path | None]:
    """A dataset's folder or URL, and where its run has the corpus if a recipe says so."""
    path = Path(where)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _of_recipe(path, overrides)
    if overrides:
        raise RecipeError(f"--set changes a recipe, and {where} is none: give the recipe's file.")
    below = f"{where.rstrip('/')}/labels"
    for found in (where, below):
        if Folder(found).has("manifest.json"):
            return found, None
    raise DataError(f"{where}: there is no label dataset (no manifest.json); name its folder, "
                    "that of its run, or the recipe.")  # fmt: skip


def _of_recipe(path: Path, overrides: list[str]) -> tuple[str, str | Path]:
    from journeyman.run_folder import RunFolder

    loaded = recipe.load(path, overrides)
    run = RunFolder(loaded)
    where = str(run.labels)
    if "://" not in where and not (Path(where) / "manifest.json").exists():
        raise DataError(f"{where}: there are no labels yet; run journeyman label {path}.")
    return where, run.corpus


# --- the actions ---


def _show(options: argparse.Namespace) -> int:
    from journeyman.cli.rows import print_rows
    from journeyman.labels import inspect

    opened = _open(options.where, options.overrides, options.corpus)
    found = inspect.rows(
        opened,
        options.rows,
        ids=tuple(options.ids),
        split=options.split,
        only=options.only,
        n_positions=options.positions,
        n_top=options.top,
    )
    print_rows(opened, found, whole=bool(options.ids))
    return 0


def _stats(options: argparse.Namespace) -> int:
    from journeyman.cli import figures
    from journeyman.labels import inspect

    stats = inspect.stats(_open(options.where, options.overrides, options.corpus))
    if options.json:
        print(json.dumps(dataclasses.asdict(stats), indent=2, ensure_ascii=False))
    else:
        print(figures.stats_text(stats))
    return 0


def _diff(options: argparse.Namespace) -> int:
    from journeyman.cli import figures
    from journeyman.labels import inspect

    a = _open(options.a, options.overrides, options.corpus)
    b = _open(options.b, options.overrides)
    difference = inspect.diff(a, b, options.rows)
    if options.json:
        print(json.dumps(dataclasses.asdict(difference), indent=2, ensure_ascii=False))
    else:
        print(figures.diff_text(difference))
    return 0


def _export(options: argparse.Namespace) -> int:
    from journeyman.cli.text import size
    from journeyman.labels import inspect

    exported = inspect.export(
        _open(options.where, options.overrides, options.corpus),
        options.format,
        options.out,
        decode=options.decode,
        split=options.split,
        force=options.force,
    )
    print(f"{exported.path}: {exported.rows:,} rows, {size(exported.bytes)}.")
    for note in exported.notes:
        print(note)
    return 0


def _card(options: argparse.Namespace) -> int:
    from journeyman.labels import card

    opened = _open(options.where, options.overrides, options.corpus)
    card.write(opened.store)
    print(opened.store.folder.path(card.NAME))
    return 0


def _requeue(options: argparse.Namespace) -> int:
    from journeyman import steps
    from journeyman.cli import figures

    loaded = load(options)
    before = _open(options.recipe, options.overrides)
    n_before = sum(commit.quarantined for commit in before.commits)
    if not n_before:
        print("No row is in quarantine: there is nothing to label again.")
        return 0
    run = steps.Run(loaded)
    with run.locked():
        run.requeue()
    after = _open(options.recipe, options.overrides)
    print(figures.requeued_text(before, after))
    return 0

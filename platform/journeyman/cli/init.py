"""``journeyman init``: a first recipe for a file of one's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from journeyman import files
from journeyman.cli.arguments import command
from journeyman.cli.text import counts, one_line
from journeyman.errors import DataError, RecipeError
from journeyman.recipe import Corpus
from journeyman.starting import draft
from journeyman.starting.draft import Choices
from journeyman.starting.look import Counted, Look, count, look

_WORDS = """\
Look at a file (CSV, TSV, JSONL, Parquet, text, or a Hugging Face dataset folder) and write a first
recipe for it, with comments. In a terminal it asks for what no flag says; elsewhere it takes what
is plain, and stops with a sentence at what is not.
"""

_EXAMPLES = """\
examples:
  journeyman init tickets.csv
  journeyman init tickets.csv --text body --label team --group customer --yes
  journeyman init mails.parquet --text body --no-label --class spam=advertising --class ham=friends
"""

_ASKED_WORDS = 20  # of more labels the words are edited in the file

Ask = Callable[[str, str], str]  # a question and what Enter stands for, to the answer


def add_command(commands: Any) -> None:
    init = command(commands, "init", "write a first recipe for a file", _init, _WORDS, _EXAMPLES)
    init.add_argument("file", metavar="FILE", help="a file of rows, or a dataset folder")
    init.add_argument("--text", metavar="COLUMN", help="the column with the text")
    labels = init.add_mutually_exclusive_group()
    labels.add_argument("--label", metavar="COLUMN", help="the column with gold labels")
    labels.add_argument("--no-label", action="store_true", help="the file has no gold labels")
    init.add_argument(
        "--class", dest="classes", metavar="LABEL=WORDS", action="append", default=[],
        help="the words that name a label to the teacher; may be given again",
    )  # fmt: skip
    init.add_argument("--group", metavar="COLUMN", help="rows with the same value: in one split")
    init.add_argument("--split", metavar="COLUMN", help="the column with the file's own splits")
    init.add_argument(
        "--meta", metavar="COLUMN", action="append", default=[],
        help="a further column to carry along, for prompts and to read; may be given again",
    )  # fmt: skip
    init.add_argument("--teacher", metavar="MODEL", default=draft.DEMO_TEACHER,
                      help="default: the demo's")  # fmt: skip
    init.add_argument("--student", metavar="MODEL", default=draft.DEMO_STUDENT,
                      help="default: the demo's")  # fmt: skip
    init.add_argument("--scoring", choices=("direct", "verbalizer", "channel"),
                      help="default: channel with the demo's teacher, else verbalizer")  # fmt: skip
    init.add_argument("--name", help="of the run; default, of the file's name")
    init.add_argument("--to", metavar="RECIPE", type=Path, help="default NAME.yaml")
    init.add_argument("--yes", action="store_true", help="ask nothing")


def _init(options: argparse.Namespace) -> int:
    seen = look(options.file)
    asks = sys.stdin.isatty() and not options.yes
    chosen = choose(options, seen, _asked if asks else None)
    to = options.to or Path(f"{chosen.name}.yaml")
    if to.exists():
        raise RecipeError(f"{to}: there already; name another file with --to, or remove it.")
    text = draft.draft(chosen)
    files.write_bytes(to, text.encode())
    print(f"recipe    {to}")
    print(f"rows      {chosen.n_rows:,} of {chosen.source}")
    print(f"columns   {', '.join(_columns(chosen))}")
    print(f"labels    {one_line(counts_of(chosen))}")
    for note in draft.notes(chosen):
        print(f"note      {note}")
    print(f"\nnext      journeyman recipe check {to}\n          journeyman run {to}")
    return 0


def choose(options: argparse.Namespace, seen: Look, ask: Ask | None) -> Choices:
    """Flags first, then answers (ask: None where nobody can be asked), then what is plain.

    Raises DataError or RecipeError where none of them says.
    """
    text = _text(options, seen, ask)
    label = _label(options, seen, text, ask)
    split = (
        seen.known(options.split, "--split") if options.split else _split(seen, text, label, ask)
    )
    group = _group(options, seen, ask)
    counted = count(seen.url, seen.kind, text, label, split, group)
    n_rows, found = counted.n_rows, counted.labels
    _check_readable(seen, counted, text)
    if split and (why := _no_splits(counted, group)):
        if options.split:
            raise RecipeError(f"--split {split}: {why}; leave it out, and rows are dealt anew.")
        print(f"note      the splits of column {split} are not kept: {why}")
        split = None
    return Choices(
        name=options.name or draft.run_name(seen.url),
        source=seen.url,
        text=text,
        label=label,
        group=group,
        split=split,
        splits=counted.splits if split else {},
        meta=tuple(seen.known(name, "--meta") for name in options.meta),
        classes=_classes(options.classes, found, ask),
        n_rows=n_rows,
        teacher=options.teacher,
        student=options.student,
        scoring=options.scoring,
    )


def _check_readable(seen: Look, counted: Counted, text: str) -> None:
    """Raises DataError where too much of the file is not."""
    n_rows = counted.n_rows
    if not n_rows:
        raise DataError(f"{seen.url}: no row has a text in column {text!r}; name another one with "
                        "--text.")  # fmt: skip
    allowed = Corpus.model_fields["max_malformed"].default
    if counted.n_malformed > allowed * (n_rows + counted.n_malformed):
        raise DataError(
            f"{seen.url}: {counted.n_malformed:,} of {n_rows + counted.n_malformed:,} rows cannot "
            f"be read, or have no text in column {text!r} (the first: {counted.first_malformed}): "
            "mend the file (in a .tsv a quotation mark is text, and no field spans lines; all is "
            "UTF-8), or name another column with --text."
        )
    quoted = next((label for label in counted.labels if label[0] == label[-1] == '"'), None)
    if quoted and seen.kind == "tsv":
        raise DataError(
            f"{seen.url}: the label {quoted} stands in quotation marks, which are text in a .tsv, "
            "where no field spans lines: save the file as .csv, or without them."
        )


def _no_splits(counted: Counted, group: str | None) -> str:
    """Why a recipe cannot keep the file's own splits; empty if it can."""
    if counted.cut_group:
        return f"the group {counted.cut_group!r} of column {group} is in several of them"
    return draft.no_splits(list(counted.splits))


def _columns(chosen: Choices) -> list[str]:
    named = (("text", chosen.text), ("gold label", chosen.label), ("group", chosen.group),
             ("split", chosen.split))  # fmt: skip
    return [f"{column} ({role})" for role, column in named if column]


def counts_of(chosen: Choices) -> str:
    return ", ".join(f"{label} ({words})" for label, words in chosen.classes.items())


def _text(options: argparse.Namespace, seen: Look, ask: Ask | None) -> str:
    if options.text:
        return seen.known(options.text, "--text")
    found = seen.text()
    if ask:
        print(f"{seen.url}: {seen.kind}, columns {', '.join(seen.names)}")
        return seen.known(ask("Which column holds the text?", found or seen.names[0]), "--text")
    if found is None:
        raise DataError(
            f"{seen.url}: which column holds the text is not plain; name it with --text: it has "
            f"{', '.join(map(repr, seen.names))}."
        )
    return found


def _label(options: argparse.Namespace, seen: Look, text: str, ask: Ask | None) -> str | None:
    if options.no_label:
        return None
    if options.label:
        return seen.known(options.label, "--label")
    found = seen.label(text)
    if ask is None or (options.classes and found is None):
        return found
    said = ask("Which column holds gold labels? (- for none)", found or "-")
    return None if said == "-" else seen.known(said, "--label")


def _group(options: argparse.Namespace, seen: Look, ask: Ask | None) -> str | None:
    if options.group:
        return seen.known(options.group, "--group")
    if ask is None or len(seen.names) < 3:
        return None
    said = ask("Which column's rows must stay in one split (a customer's, say)? (- for none)", "-")
    return None if said == "-" else seen.known(said, "--group")


def _split(seen: Look, text: str, label: str | None, ask: Ask | None) -> str | None:
    found = seen.split()
    if found is None or found in (text, label) or ask is None:
        return None if found in (text, label) else found
    return found if ask(f"Keep the splits of column {found}? (y/n)", "y") != "n" else None


def _classes(given: list[str], found: Mapping[str, int], ask: Ask | None) -> dict[str, str]:
    words = dict(_label_and_words(text) for text in given)
    if found and (unknown := sorted(set(words) - set(found))):
        raise RecipeError(
            f"--class {unknown[0]}: no row has this label; there are {counts(dict(found))}."
        )
    labels = sorted(found, key=lambda label: (-found[label], label)) or list(words)
    if ask and not found and not words:
        said = ask("Labels, separated by commas?", "")
        labels = [label.strip() for label in said.split(",") if label.strip()]
    proposed = {label: words.get(label) or draft.words_of(label) for label in labels}
    if ask is None or len(proposed) > _ASKED_WORDS:
        return proposed
    return {
        label: own if label in words else ask(f"Words for the label {label}?", own)
        for label, own in proposed.items()
    }


def _label_and_words(text: str) -> tuple[str, str]:
    label, equals, words = text.partition("=")
    if not equals or not label or not words.strip():
        raise RecipeError(f"--class {text}: write it as LABEL=WORDS, e.g. spam=advertising.")
    return label, words.strip()


def _asked(question: str, default: str) -> str:
    try:
        said = input(f"{question} [{default}] ").strip()
    except EOFError:
        return default
    return said or default

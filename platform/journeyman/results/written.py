"""Finished runs with students that write, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from journeyman import corpus, files, recipe
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import Bundle, Guarantee
from journeyman.certify.bundle_recipe import RECIPE_FILE
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from journeyman.report import comparison
from journeyman.report.comparison import ComparedStudent
from journeyman.report.tables import interval
from journeyman.report.verdict import share
from journeyman.results.facts import (
    NOTHING,
    percent_of,
    promised,
    proved,
    run_folder_of,
    seconds_of,
    table,
)
from journeyman.run_folder import folder_of
from journeyman.summary.written import times_the_teacher, writing_rates

LEGEND = (
    "Agreement, perplexity and answers to the letter (with an exact 95% interval) are on "
    "`calibrate` rows: agreement with the teacher's first choice, token by token; perplexity of "
    "the text's own tokens. Realised and what the student answers are on `test` rows. Rows a "
    "second are what each wrote on the held-out rows, a replica each, batched."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A run with a student that writes.

    Attributes:
        bundle: None where it is not certified.
        test: what came of the promise, as the certify step has it; None where it has nothing.
        has_no_test_rows: its corpus is known to have none. Where it has, and the step nothing, it
            did not ask them, as it once did not, or they are all in quarantine.
        rates: rows a second of each replica of who wrote on the held-out rows, as far as known.
        seconds: by step, as far as known.
        nobody_asked: the teacher's answers stood in the corpus.
    """

    student: ComparedStudent
    bundle: Bundle | None = None
    test: Mapping[str, int] | None = None
    has_no_test_rows: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    nobody_asked: bool = False

    @property
    def name(self) -> str:
        return self.student.name

    @property
    def hardware(self) -> Mapping[str, Any] | None:
        return self.student.hardware


def read_written(run_dir: Path, student: ComparedStudent) -> Written:
    settings = folder_of(run_dir, "certify") / RECIPE_FILE
    if not settings.is_file():
        labels = folder_of(run_dir, "label")
        there = LabelStore(labels).manifest() if dataset.is_finished(labels) else {}
        return Written(
            student=student,
            seconds=seconds_of(run_dir, folder_of(run_dir, "prepare"), labels),
            nobody_asked=bool(there.get("teacher_column")),
        )
    run = run_folder_of(recipe.parse(files.read_json(settings), str(settings)), run_dir)
    return Written(
        student=student,
        bundle=bundles.load_any(run.path("certify")),
        test=files.read_json(run.path("certify") / "manifest.json").get("test"),
        has_no_test_rows=_has_no_test_rows(run.path("prepare")),
        rates=writing_rates(run_dir),
        seconds=seconds_of(run_dir, run.corpus, run.labels),
    )


def section(runs: Sequence[Written]) -> str:
    """Empty without runs."""
    if not runs:
        return ""
    students = [run.student for run in runs]
    return (
        f"\n## Students that write\n\n{writing(runs)}\n\n{LEGEND}\n"
        + "".join(f"{note}\n" for note in comparison.agreement_notes(students))
        + "\n"
        + "".join(f"- {_certified(run)}\n" for run in runs)
    )


def writing(runs: Sequence[Written]) -> str:
    """The table of students that write, which the README shows too."""
    heads = ("recipe", "agreement", "perplexity", "to the letter", "interval", "student answers",
             "promised", "realised", "student rows/s", "teacher rows/s", "train rows")  # fmt: skip
    return table(heads, [_writes(run) for run in runs])


def _writes(run: Written) -> tuple[str, ...]:
    student, rates = run.student, run.rates
    ratio = times_the_teacher(rates)
    times = "" if ratio is None else f" ({ratio:,.1f}×)"
    return (
        run.name,
        f"{student.agreement:.3f}",
        NOTHING if student.perplexity is None else f"{student.perplexity:,.1f}",
        *_to_the_letter(student),
        percent_of(run.test["n_accepted"], run.test["n"]) if run.test else NOTHING,
        promised(run.bundle.served) if run.bundle else "nothing",
        _realised(run.bundle.served, run.test) if run.bundle and run.test else NOTHING,
        f"{rates['student']:,.1f}{times}" if "student" in rates else NOTHING,
        f"{rates['teacher']:,.1f}" if "teacher" in rates else NOTHING,
        f"{student.n_rows:,}",
    )


def _to_the_letter(student: ComparedStudent) -> tuple[str, str]:
    n, rate = student.n_held_out, student.exact_match
    if n is None or rate is None:
        return NOTHING, NOTHING
    count = round(rate * n)
    return f"{count:,} of {n:,}", interval(count, n)


def _certified(run: Written) -> str:
    """What a student that writes may answer, and what came of it on test rows."""
    if run.nobody_asked:
        return (
            f"`{run.name}`: nothing is promised: the answers that it learned stood in its corpus, "
            "so that there is no teacher to escalate to."
        )
    if run.bundle is None:
        return f"`{run.name}`: not certified; its run ends with the student."
    guarantee, test = run.bundle.served, run.test
    words = f"`{run.name}`: {proved(guarantee)}"
    if test is None:
        why = "no test rows" if run.has_no_test_rows else "not measured on test rows"
        return f"{words}; {why}. {run.bundle.recommendation}"
    return (
        f"{words}; realised on test {_realised(guarantee, test)}, where the student answers "
        f"{share(test['n_accepted'], test['n'])}. {run.bundle.recommendation}"
    )


def _realised(guarantee: Guarantee, test: Mapping[str, int]) -> str:
    """What it bounds, as it came out."""
    if guarantee.kind == "accuracy":
        drop = (test["teacher"] - test["cascade"]) / test["n"] if "teacher" in test else None
        return "no gold" if drop is None else f"{drop:+.1%}"
    system = guarantee.kind == "system_agreement"
    return share(test["n_accepted_differs"], test["n" if system else "n_accepted"])


def _has_no_test_rows(corpus_dir: Path) -> bool:
    """As far as is known: a corpus may be gone since."""
    there = (corpus_dir / corpus.MANIFEST).is_file()
    return there and not corpus.read_manifest(corpus_dir)["splits"].get("test")

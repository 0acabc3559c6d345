"""Finished runs side by side as a page of Markdown: every figure is read from the runs' folders.

Above ``summary``, which shows one run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from journeyman import corpus, files, recipe, summary
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import Bundle, Guarantee
from journeyman.certify.bundle_recipe import RECIPE_FILE
from journeyman.errors import DataError
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from journeyman.progress import duration
from journeyman.recipe import Recipe
from journeyman.report import comparison
from journeyman.report.comparison import ComparedStudent
from journeyman.report.data import ReportData
from journeyman.report.detection import detections
from journeyman.report.measure import AgainstGold, Measured, measure
from journeyman.report.ranking import rankings
from journeyman.report.tables import interval
from journeyman.report.verdict import beside_teacher, percent, realised_of_each, share
from journeyman.run_folder import RunFolder, folder_of
from journeyman.summary.written import times_the_teacher, writing_rates

BEGIN, END = "<!-- results: written by `make recipes` -->", "<!-- end of results -->"
_NOTHING = "–"
_STEPS = ("prepare", "label", "train", "certify", "serve and measure")
_OF_WRITING = (
    "Agreement, perplexity and answers to the letter (with an exact 95% interval) are on "
    "`calibrate` rows: agreement with the teacher's first choice, token by token; perplexity of "
    "the text's own tokens. Realised and what the student answers are on `test` rows. Rows a "
    "second are what each wrote on the held-out rows, a replica each, batched."
)
_PAGE = """\
# What the recipes gain

Written by `journeyman results`, from the folders of the runs; `make recipes` makes them anew. \
{machine}

## Classifiers, certified and served

{quality}

On `test` rows, which nothing was fitted, chosen or certified on. Right: share of rows whose \
answer is the gold label. *Beside the teacher*: the student alone. How many times as often it is \
right; its share less its teacher's, with a 95% interval for answers that are paired row by row \
(Tango 1998); and better or worse only where an exact two-sided sign test at 0.05 says so, on the \
rows that just one of the two gets right. Realised: what the promise bounds, as it came out. \
Requests a second over HTTP: student and teacher alone, the same requests in batches of 32.

{promises}

{jobs}
{written}
## What it took

{costs}

Steps with their models' starts; `label` includes rows that an earlier start of the run labeled; \
of students that write, `certify` includes what both write on the held-out rows.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A run with a certified cascade."""

    data: ReportData
    measured: Measured
    serving: dict[str, Any]
    seconds: dict[str, float]  # by step

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def hardware(self) -> Mapping[str, Any] | None:
        """Of the step that measures; None where it was not recorded yet."""
        return self.serving.get("hardware")


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


def read(run_dir: Path) -> Finished | Written:
    """A run's facts; raises DataError where the run is not finished."""
    settings = run_dir / "bundle" / RECIPE_FILE
    if not settings.is_file() or files.read_json(settings)["labels"]["kind"] != "classes":
        student = comparison.read(run_dir)
        if student.perplexity is None:  # it classifies
            raise DataError(f"{run_dir}: not certified yet; run journeyman run first.")
        return _read_written(run_dir, student)
    run = _run_folder(recipe.parse(files.read_json(settings), str(settings)), run_dir)
    if not (run.path("measure") / "manifest.json").is_file():
        raise DataError(f"{run_dir}: not measured yet; run journeyman run first.")
    data = summary.report_data(run)
    return Finished(
        data=data,
        measured=measure(data.test),
        serving=files.read_json(run.path("measure") / "manifest.json"),
        seconds=_seconds(run.directory, run.corpus, run.labels),
    )


def _read_written(run_dir: Path, student: ComparedStudent) -> Written:
    settings = folder_of(run_dir, "certify") / RECIPE_FILE
    if not settings.is_file():
        labels = folder_of(run_dir, "label")
        there = LabelStore(labels).manifest() if dataset.is_finished(labels) else {}
        return Written(
            student=student,
            seconds=_seconds(run_dir, folder_of(run_dir, "prepare"), labels),
            nobody_asked=bool(there.get("teacher_column")),
        )
    run = _run_folder(recipe.parse(files.read_json(settings), str(settings)), run_dir)
    return Written(
        student=student,
        bundle=bundles.load_any(run.path("certify")),
        test=files.read_json(run.path("certify") / "manifest.json").get("test"),
        has_no_test_rows=_has_no_test_rows(run.path("prepare")),
        rates=writing_rates(run_dir),
        seconds=_seconds(run_dir, run.corpus, run.labels),
    )


def _run_folder(recorded: Recipe, run_dir: Path) -> RunFolder:
    """Of a run that may have been moved."""
    if recorded.run_url is None and recorded.run_dir.resolve() != run_dir.resolve():
        where = {"output": str(run_dir.resolve().parent), "name": run_dir.resolve().name}
        recorded = recorded.model_copy(update=where)
    return RunFolder(recorded, run_dir)


def page(runs: Sequence[Finished | Written]) -> str:
    """The whole page."""
    finished = [run for run in runs if isinstance(run, Finished)]
    written = [run for run in runs if isinstance(run, Written)]
    return _PAGE.format(
        machine=_machine(runs),
        quality=quality(finished),
        promises=_promises(finished),
        jobs=_jobs(finished),
        costs=_costs(runs),
        written=_written(written),
    )


def quality(finished: Sequence[Finished]) -> str:
    """The table that the README shows too."""
    heads = ("recipe", "teacher right", "student right", "beside the teacher", "cascade right",
             "student answers", "promised", "realised", "student/s", "teacher/s")  # fmt: skip
    return _table(heads, [_quality(run) for run in finished])


def for_readme(runs: Sequence[Finished | Written]) -> str:
    """The tables of both kinds of students, as far as there are some."""
    finished = [run for run in runs if isinstance(run, Finished)]
    written = [run for run in runs if isinstance(run, Written)]
    tables = [quality(finished)] if finished else []
    if written:
        tables.append(f"{writing(written)}\n\n{_OF_WRITING}")
    return "\n\n".join(tables)


def between_marks(text: str, table: str) -> str:
    """A text with a table between its marks; raises DataError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"no lines {BEGIN} and {END} to put the table between; add them.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _quality(run: Finished) -> tuple[str, ...]:
    measured, guarantee = run.measured, run.data.bundle.served
    gold, serving = measured.gold, run.serving
    ratio = serving["student_rows_per_s"] / serving["teacher_rows_per_s"]
    right = (
        (_NOTHING,) * 4
        if gold is None
        else (
            f"{gold.teacher / gold.n:.3f}",
            f"{gold.student / gold.n:.3f}",
            _beside(gold),
            f"{gold.cascade / gold.n:.3f}",
        )
    )
    return (
        run.name,
        *right,
        percent_of(measured.n_accepted, measured.n),
        _promised(guarantee),
        summary.realised(measured, guarantee),
        f"{serving['student_rows_per_s']:,.0f} ({ratio:,.0f}×)",
        f"{serving['teacher_rows_per_s']:,.1f}",
    )


def percent_of(count: int, n: int) -> str:
    return f"{count / n:.1%}" if n else _NOTHING


def _beside(gold: AgainstGold) -> str:
    ratio = gold.student / gold.teacher if gold.teacher else float("inf")
    return f"{ratio:.2f}×, {beside_teacher(gold)}"


def _promises(finished: Sequence[Finished]) -> str:
    lines = []
    for run in finished:
        bundle, n = run.data.bundle, len(run.data.test)
        lines.append(
            f"- `{run.name}`: {_proved(bundle.served)}; {n:,} test rows. {_of_each(run)}"
            f"{bundle.recommendation}"
        )
    return "\n".join(lines)


def _of_each(run: Finished) -> str:
    """What came of the promises of single answers; empty where there are none."""
    seen = realised_of_each(run.measured, run.data.bundle)
    said = "; ".join(f"{label} {share(errors, of)}" for label, _, errors, of in seen)
    return f"It holds for each answer by itself; realised on test: {said}. " if seen else ""


def _jobs(finished: Sequence[Finished]) -> str:
    rows = []
    for run in finished:
        data = run.data
        if data.positive is None:
            continue
        place = data.labels.index(data.positive)
        ranked = (
            {one.who: one for one in rankings(data.test, data.test.column(data.rank_by), place)}
            if data.rank_by
            else {}
        )
        for one in detections(data.test, place):
            ranking = ranked.get(one.who)
            rows.append(
                (
                    data.name,
                    data.positive,
                    one.who,
                    f"{one.precision:.3f}" if one.said else _NOTHING,
                    f"{one.recall:.3f}",
                    f"{one.balanced_accuracy:.3f}",
                    _NOTHING if one.at_median is None else f"{one.at_median:.3f}",
                    _NOTHING if one.auc is None else f"{one.auc:.3f}",
                    f"{ranking.mrr:.3f}" if ranking else _NOTHING,
                    f"{ranking.recall_at_1:.3f}" if ranking else _NOTHING,
                )
            )
    heads = ("recipe", "label", "who answers", "precision", "recall", "balanced accuracy",
             "at the median", "AUC",
             "MRR", "recall at 1")  # fmt: skip
    return _table(heads, rows)


def _costs(runs: Sequence[Finished | Written]) -> str:
    known = {step for run in runs for step in run.seconds}
    steps = [step for step in _STEPS if step in known]
    rows = [
        (
            run.name,
            *(duration(run.seconds[s]) if s in run.seconds else _NOTHING for s in steps),
            duration(sum(run.seconds.values())) if _is_whole(run) else _NOTHING,
        )
        for run in runs
        if run.seconds
    ]
    return _table(("recipe", *steps, "all"), rows)


def _is_whole(run: Finished | Written) -> bool:
    """Whether what its labels took is known: they may be kept elsewhere."""
    return {"prepare", "label", "train"} <= set(run.seconds)


def _written(runs: Sequence[Written]) -> str:
    if not runs:
        return ""
    students = [run.student for run in runs]
    return (
        f"\n## Students that write\n\n{writing(runs)}\n\n{_OF_WRITING}\n"
        + "".join(f"{note}\n" for note in comparison.agreement_notes(students))
        + "\n"
        + "".join(f"- {_certified(run)}\n" for run in runs)
    )


def writing(runs: Sequence[Written]) -> str:
    """The table of students that write, which the README shows too."""
    heads = ("recipe", "agreement", "perplexity", "to the letter", "interval", "student answers",
             "promised", "realised", "student rows/s", "teacher rows/s", "train rows")  # fmt: skip
    return _table(heads, [_writes(run) for run in runs])


def _writes(run: Written) -> tuple[str, ...]:
    student, rates = run.student, run.rates
    ratio = times_the_teacher(rates)
    times = "" if ratio is None else f" ({ratio:,.1f}×)"
    return (
        run.name,
        f"{student.agreement:.3f}",
        _NOTHING if student.perplexity is None else f"{student.perplexity:,.1f}",
        *_to_the_letter(student),
        percent_of(run.test["n_accepted"], run.test["n"]) if run.test else _NOTHING,
        _promised(run.bundle.served) if run.bundle else "nothing",
        _realised(run.bundle.served, run.test) if run.bundle and run.test else _NOTHING,
        f"{rates['student']:,.1f}{times}" if "student" in rates else _NOTHING,
        f"{rates['teacher']:,.1f}" if "teacher" in rates else _NOTHING,
        f"{student.n_rows:,}",
    )


def _promised(guarantee: Guarantee) -> str:
    return f"≤ {percent(guarantee.alpha)}" if guarantee.feasible else "escalates everything"


def _to_the_letter(student: ComparedStudent) -> tuple[str, str]:
    n, rate = student.n_held_out, student.exact_match
    if n is None or rate is None:
        return _NOTHING, _NOTHING
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
    words = f"`{run.name}`: {_proved(guarantee)}"
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


def _proved(guarantee: Guarantee) -> str:
    said = f"{guarantee.kind.replace('_', ' ')} at {percent(guarantee.alpha)}"
    what = f"proved {guarantee.upper_bound:.1%} on {guarantee.n:,} certify rows"
    reason = what if guarantee.feasible else f"no threshold meets it: {guarantee.reason}"
    return f"{said}, confidence {percent(1 - guarantee.delta)}; {reason}"


def _seconds(run_dir: Path, corpus_dir: str | Path, labels: str | Path) -> dict[str, float]:
    """Of each step whose folder is there, as its manifest says."""
    found: dict[str, float] = {}
    with contextlib.suppress(DataError):
        found["prepare"] = corpus.read_manifest(corpus_dir)["seconds"]
    if dataset.is_finished(labels):
        found["label"] = LabelStore(labels).manifest()["seconds"]
    later = (("train", "train", "journeyman.json"), ("certify", "certify", "manifest.json"),
             ("serve and measure", "measure", "manifest.json"))  # fmt: skip
    for name, step, manifest in later:
        if (path := folder_of(run_dir, step) / manifest).is_file():
            found[name] = files.read_json(path)["seconds"]
    return found


def _machine(runs: Sequence[Finished | Written]) -> str:
    """What the runs themselves recorded: this one may be another machine."""
    made_on: dict[str, list[str]] = {}
    for run in runs:
        made_on.setdefault(_hardware(run.hardware), []).append(f"`{run.name}`")
    several = len(made_on) > 1
    said = (f"{what} ({', '.join(of)})" if several else what for what, of in made_on.items())
    return f"Made on {'; '.join(said)}, where other work may have run beside it."


def _hardware(hardware: Mapping[str, Any] | None) -> str:
    if hardware is None:
        return "what the run did not record"
    gpus, nodes = hardware["gpus"], hardware["nodes"]
    named = f" {', '.join(hardware['accelerators'])}" if hardware["accelerators"] else ""
    return (
        f"{hardware['cpus']} CPU cores ({hardware['architecture']})"
        + (f" and {gpus}{named} GPU{'s' * (gpus > 1)}" if gpus else "")
        + (f" of {nodes} nodes" if nodes > 1 else "")
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)

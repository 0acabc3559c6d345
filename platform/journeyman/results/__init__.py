"""Finished runs side by side as a page of Markdown: every figure is read from the runs' folders.

Above ``summary``, which shows one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journeyman import files, recipe, summary
from journeyman.certify.bundle_recipe import RECIPE_FILE
from journeyman.errors import DataError
from journeyman.progress import duration
from journeyman.report import comparison
from journeyman.report.data import ReportData
from journeyman.report.detection import detections
from journeyman.report.measure import AgainstGold, Measured, measure
from journeyman.report.ranking import rankings
from journeyman.report.verdict import beside_teacher, realised_of_each, share
from journeyman.results.facts import (
    NOTHING,
    percent_of,
    promised,
    proved,
    run_folder_of,
    seconds_of,
    table,
)
from journeyman.results.written import LEGEND, Written, read_written, section, writing

BEGIN, END = "<!-- results: written by `make recipes` -->", "<!-- end of results -->"
_STEPS = ("prepare", "label", "train", "certify", "serve and measure")
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


def read(run_dir: Path) -> Finished | Written:
    """A run's facts; raises DataError where the run is not finished."""
    settings = run_dir / "bundle" / RECIPE_FILE
    if not settings.is_file() or files.read_json(settings)["labels"]["kind"] != "classes":
        student = comparison.read(run_dir)
        if student.perplexity is None:  # it classifies
            raise DataError(f"{run_dir}: not certified yet; run journeyman run first.")
        return read_written(run_dir, student)
    run = run_folder_of(recipe.parse(files.read_json(settings), str(settings)), run_dir)
    if not (run.path("measure") / "manifest.json").is_file():
        raise DataError(f"{run_dir}: not measured yet; run journeyman run first.")
    data = summary.report_data(run)
    return Finished(
        data=data,
        measured=measure(data.test),
        serving=files.read_json(run.path("measure") / "manifest.json"),
        seconds=seconds_of(run.directory, run.corpus, run.labels),
    )


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
        written=section(written),
    )


def quality(finished: Sequence[Finished]) -> str:
    """The table that the README shows too."""
    heads = ("recipe", "teacher right", "student right", "beside the teacher", "cascade right",
             "student answers", "promised", "realised", "student/s", "teacher/s")  # fmt: skip
    return table(heads, [_quality(run) for run in finished])


def for_readme(runs: Sequence[Finished | Written]) -> str:
    """The tables of both kinds of students, as far as there are some."""
    finished = [run for run in runs if isinstance(run, Finished)]
    written = [run for run in runs if isinstance(run, Written)]
    tables = [quality(finished)] if finished else []
    if written:
        tables.append(f"{writing(written)}\n\n{LEGEND}")
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
        (NOTHING,) * 4
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
        promised(guarantee),
        summary.realised(measured, guarantee),
        f"{serving['student_rows_per_s']:,.0f} ({ratio:,.0f}×)",
        f"{serving['teacher_rows_per_s']:,.1f}",
    )


def _beside(gold: AgainstGold) -> str:
    ratio = gold.student / gold.teacher if gold.teacher else float("inf")
    return f"{ratio:.2f}×, {beside_teacher(gold)}"


def _promises(finished: Sequence[Finished]) -> str:
    lines = []
    for run in finished:
        bundle, n = run.data.bundle, len(run.data.test)
        lines.append(
            f"- `{run.name}`: {proved(bundle.served)}; {n:,} test rows. {_of_each(run)}"
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
                    f"{one.precision:.3f}" if one.said else NOTHING,
                    f"{one.recall:.3f}",
                    f"{one.balanced_accuracy:.3f}",
                    NOTHING if one.at_median is None else f"{one.at_median:.3f}",
                    NOTHING if one.auc is None else f"{one.auc:.3f}",
                    f"{ranking.mrr:.3f}" if ranking else NOTHING,
                    f"{ranking.recall_at_1:.3f}" if ranking else NOTHING,
                )
            )
    heads = ("recipe", "label", "who answers", "precision", "recall", "balanced accuracy",
             "at the median", "AUC",
             "MRR", "recall at 1")  # fmt: skip
    return table(heads, rows)


def _costs(runs: Sequence[Finished | Written]) -> str:
    known = {step for run in runs for step in run.seconds}
    steps = [step for step in _STEPS if step in known]
    rows = [
        (
            run.name,
            *(duration(run.seconds[s]) if s in run.seconds else NOTHING for s in steps),
            duration(sum(run.seconds.values())) if _is_whole(run) else NOTHING,
        )
        for run in runs
        if run.seconds
    ]
    return table(("recipe", *steps, "all"), rows)


def _is_whole(run: Finished | Written) -> bool:
    """Whether what its labels took is known: they may be kept elsewhere."""
    return {"prepare", "label", "train"} <= set(run.seconds)


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

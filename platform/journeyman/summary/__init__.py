"""What a finished run shows: the table at the end of ``journeyman run``, and the report's data."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from journeyman import corpus, files
from journeyman.certify import bundle as bundles
from journeyman.certify import by_labels
from journeyman.certify.bundle import Guarantee, PolicyBundle
from journeyman.certify.step import read_test_logits
from journeyman.labels import dataset
from journeyman.labels.dataset import ClassRows
from journeyman.labels.store import LabelStore
from journeyman.recipe import Report
from journeyman.report import comparison
from journeyman.report.data import ReportData, SummaryRow, TestRows
from journeyman.report.detection import detections
from journeyman.report.in_turn import expected_cost, of_stages
from journeyman.report.measure import Measured, measure
from journeyman.report.ranking import rankings
from journeyman.report.verdict import beside_teacher, percent, realised_of_each, share
from journeyman.run_folder import RunFolder


def report_data(run: RunFolder) -> ReportData:
    """Everything on the report's page, read from the run's folders."""
    rows = dataset.read_classes(run.labels, run.corpus)
    bundle = bundles.load(run.path("certify"))
    test = _test_rows(rows.split("test"), run.path("certify"), bundle)
    answers = Counter(rows.labels[i] for i in rows.logprobs.argmax(axis=1))
    return ReportData(
        **page_facts(run),
        labels=rows.labels,
        label_histogram=corpus.read_manifest(run.corpus)["labels"],
        teacher_histogram={label: answers[label] for label in rows.labels},
        summary=summary(run, test, bundle),
        positive=run.recipe.report.positive,
        rank_by=run.recipe.report.rank_by,
        bundle=bundle,
        test=test,
        by_labels=by_labels.kept(run.path("curve"), bundle.student_digest),
    )


def page_facts(run: RunFolder) -> dict[str, Any]:
    """What the page of any student has."""
    return {
        "name": run.recipe.name,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "recipe_yaml": yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False),
        "training": files.read_json_lines(run.path("train") / "training.jsonl"),
        "compared": comparison.kept(run.where),
    }


def summary(run: RunFolder, test: TestRows, bundle: PolicyBundle) -> list[SummaryRow]:
    """The closing table: quality on test rows, the promise, speed, sizes, and what it took."""
    measured = measure(test)
    return [
        *_quality(measured, test),
        *_detection(test, bundle.label_names, run.recipe.report.positive),
        *_ranking(test, bundle.label_names, run.recipe.report),
        *_promise(measured, bundle),
        *_stages(test, bundle),
        *_speed(run),
        *sizes(run),
        *costs(run),
    ]


def _test_rows(rows: ClassRows, bundle_dir: Path, bundle: PolicyBundle) -> TestRows:
    routed = bundle.chain.of(read_test_logits(bundle_dir))
    student, confidence = routed.probabilities, routed.confidence
    teacher = np.exp(rows.logprobs)
    return TestRows(
        ids=rows.ids,
        texts=rows.texts,
        gold=rows.gold,
        teacher=teacher,
        student=student,
        confidence=confidence,
        accepted=confidence > bundle.accept_above,
        metas=rows.metas,
        mixed=bundle.mixture.of(student, teacher) if bundle.mixture else None,
        stage=routed.stage if bundle.stages else None,
    )


def _quality(measured: Measured, test: TestRows) -> list[SummaryRow]:
    agreement = 1 - measured.n_differs / measured.n
    lines = [("student agrees with teacher", f"{agreement:.3f}", "answering everything")]
    if gold := measured.gold:
        majority = np.bincount(test.gold[test.has_gold]).max() / gold.n
        both = ("accuracy of both, mixed", f"{gold.escalated / gold.n:.3f}", "all escalated")
        mixed = [] if test.mixed is None else [both]
        lines = [
            ("teacher accuracy", f"{gold.teacher / gold.n:.3f}", f"majority class {majority:.3f}"),
            (
                "student accuracy",
                f"{gold.student / gold.n:.3f}",
                f"less the teacher's: {beside_teacher(gold)}",
            ),
            *mixed,
            ("cascade accuracy", f"{gold.cascade / gold.n:.3f}", ""),
            *lines,
        ]
    group = f"quality, {measured.n:,} test rows"
    return [SummaryRow(group=group, name=n, value=v, note=note) for n, v, note in lines]


def _detection(test: TestRows, labels: Sequence[str], positive: str | None) -> list[SummaryRow]:
    if positive is None:
        return []
    return [
        SummaryRow(
            group=f"finding {positive}, {found.there:,} of the test rows",
            name=f"{found.who} precision, recall",
            value=f"{f'{found.precision:.3f}' if found.said else 'none said'}, {found.recall:.3f}",
            note=f"balanced accuracy {found.balanced_accuracy:.3f}"
            + (f", at the median {found.at_median:.3f}" if found.at_median is not None else "")
            + (f", AUC {found.auc:.3f}" if found.auc is not None else ""),
        )
        for found in detections(test, list(labels).index(positive))
    ]


def _ranking(test: TestRows, labels: Sequence[str], settings: Report) -> list[SummaryRow]:
    if settings.rank_by is None or settings.positive is None:
        return []
    found = rankings(test, test.column(settings.rank_by), list(labels).index(settings.positive))
    return [
        SummaryRow(
            group=f"ranking, {one.n_lists:,} lists of up to {one.largest}",
            name=f"{one.who} MRR, recall at 1",
            value=f"{one.mrr:.3f}, {one.recall_at_1:.3f}",
        )
        for one in found
    ]


def _promise(measured: Measured, bundle: PolicyBundle) -> list[SummaryRow]:
    guarantee = bundle.served
    words = {
        "system_agreement": "P(student answers and differs)",
        "selective_agreement": "P(differs | student answers)",
        "accuracy": "accuracy lost to the teacher alone",
    }[guarantee.kind]
    confidence = f"confidence {percent(1 - guarantee.delta)}"
    each = ", for each answer" if bundle.class_guarantees else ""
    rows = [
        ("promised", f"at most {percent(guarantee.alpha)}", f"{words}{each}, {confidence}"),
        ("realised on test", realised(measured, guarantee), ""),
        *[
            ("  of the worst answer", share(errors, of), label)
            for label, _, errors, of in realised_of_each(measured, bundle)[:1]
        ],
        ("answered by the student", share(measured.n_accepted, measured.n), ""),
    ]
    for other in bundle.guarantees:
        if other.kind != guarantee.kind:
            name = f"  by {other.kind.replace('_', ' ')}"
            rows.append((name, share(other.n_accepted, other.n), "certified beside it"))
    if not guarantee.feasible:
        rows.append(("escalates everything", "yes", guarantee.reason))
    return [SummaryRow(group="the promise", name=n, value=v, note=note) for n, v, note in rows]


def _stages(test: TestRows, bundle: PolicyBundle) -> list[SummaryRow]:
    """Of several students who answers how much of the test rows, and what that costs."""
    if bundle.stages is None:
        return []
    seen = of_stages(test, bundle.stages)
    lines = [
        (
            "teacher" if one.is_teacher else f"student {place}",
            share(one.n_accepted, len(test)),
            "" if one.is_teacher else f"{one.n_differs:,} of these otherwise than the teacher",
        )
        for place, one in enumerate(seen, start=1)
    ]
    cost, alone = expected_cost(seen), bundle.stages.teacher_cost
    unit = " s" * (bundle.stages.cost_unit == "seconds")
    lines.append(("cost of a request", f"{cost:.3g}{unit}", f"the teacher alone {alone:.3g}{unit}"))
    group = "who answers, on test"
    return [SummaryRow(group=group, name=n, value=v, note=note) for n, v, note in lines]


def realised(measured: Measured, guarantee: Guarantee) -> str:
    """What the guarantee bounds, as it came out on the test rows."""
    if guarantee.kind == "accuracy":
        gold = measured.gold
        return "no gold" if gold is None else f"{(gold.escalated - gold.cascade) / gold.n:+.1%}"
    system = guarantee.kind == "system_agreement"
    return share(measured.n_accepted_differs, measured.n if system else measured.n_accepted)


def _speed(run: RunFolder) -> list[SummaryRow]:
    serving = files.read_json(run.path("measure") / "manifest.json")
    student, teacher = serving["student_rows_per_s"], serving["teacher_rows_per_s"]
    rows = [
        ("student", f"{student:,.0f} requests/s", f"{student / teacher:.0f} times the teacher"),
        ("teacher", f"{teacher:,.1f} requests/s",
         f"both over HTTP, the same {serving['compared_rows']} requests"),
        ("cascade", f"{serving['requests_per_s']:,.0f} requests/s",
         f"{serving['answered_by_student']:.1%} of {serving['requests']} by the student"),
    ]  # fmt: skip
    for who, words in (("student", "answered by the student"), ("teacher", "escalated")):
        if serving[f"{who}_p50_ms"] is not None:
            rows.append((f"  {words}", f"{serving[f'{who}_p50_ms']:,.0f} ms", "median, 8 clients"))
    return [SummaryRow(group="speed", name=n, value=v, note=note) for n, v, note in rows]


def sizes(run: RunFolder) -> list[SummaryRow]:
    """Bytes of the weights."""
    student = sum(f.stat().st_size for f in run.path("train").glob("*.safetensors"))
    teacher = run.teacher.size_bytes
    if not teacher:  # behind a URL, or in a column
        return [SummaryRow(group="weights", name="student", value=_megabytes(student))]
    note = f"{teacher / student:.1f} times smaller"
    return [
        SummaryRow(group="weights", name="teacher", value=_megabytes(teacher)),
        SummaryRow(group="weights", name="student", value=_megabytes(student), note=note),
    ]


def costs(run: RunFolder) -> list[SummaryRow]:
    """What each step took; of a run that ends with its labels, too."""
    prepared = corpus.read_manifest(run.corpus)
    labels = LabelStore(run.labels).manifest()
    totals = labels["totals"]
    tokens = totals["prompt_tokens"] + totals["output_tokens"]
    quarantined = totals["quarantined"]
    accounted = f"{totals['rows']:,} rows = {totals['ok']:,} labeled + {quarantined:,} quarantined"
    rows = [
        ("prepare", prepared["seconds"], f"{prepared['rows']:,} rows of {prepared['read']:,} read"),
        ("label", labels["seconds"], f"{tokens:,} tokens; {accounted}"),
    ]
    if run.recipe.student is not None:
        student = files.read_json(run.path("train") / "journeyman.json")
        rows.append(("train", student["seconds"], _training_note(student)))
    certified = run.path("certify") / "manifest.json"
    if certified.is_file() and run.recipe.student is not None:
        note = f"{prepared['splits']['certify']:,} rows"
        rows.append(("certify", files.read_json(certified)["seconds"], note))
    if run.recipe.labels.kind == "classes" and run.recipe.student is not None:
        rows.append(("serve and measure", _seconds(run, "measure"), ""))
    return [
        SummaryRow(group="what it took", name=n, value=f"{s:,.1f} s", note=note)
        for n, s, note in rows
    ]


def _training_note(student: dict[str, Any]) -> str:
    early = ""
    if student["stopped_early"]:
        early = f"; stopped early, after step {student['steps']:,} of {student['planned_steps']:,}"
    if "on_policy" in student:
        early += f"; the last of {len(student['on_policy']) - 1} on-policy rounds"
    return f"{student['rows']:,} rows, {student['world_size']} workers{early}"


def _seconds(run: RunFolder, step: str) -> float:
    return float(files.read_json(run.path(step) / "manifest.json")["seconds"])


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"


def table(rows: Sequence[SummaryRow]) -> str:
    """The summary as aligned text, group by group."""
    names = max(len(row.name) for row in rows)
    values = max(len(row.value) for row in rows)
    lines: list[str] = []
    for i, row in enumerate(rows):
        if i == 0 or row.group != rows[i - 1].group:
            lines.append(("\n" if lines else "") + row.group)
        lines.append(f"  {row.name:<{names}}  {row.value:>{values}}  {row.note}".rstrip())
    return "\n".join(lines)

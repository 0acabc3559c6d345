"""The page itself: figures, tables and words put into one file that needs no network.

`index.html` holds everything; `figures/*.svg` are the same figures for use elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from journeyman import files
from journeyman.report import by_labels, examples, figures, in_turn, job_tables, style, tables
from journeyman.report.data import ReportData, SummaryRow
from journeyman.report.detection import Detection, detections
from journeyman.report.figures import Figure
from journeyman.report.measure import measure
from journeyman.report.ranking import Ranking, rankings
from journeyman.report.slices import by_label, slices
from journeyman.report.verdict import verdict

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # every text on the page may come from the user's data
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write(data: ReportData, directory: Path) -> Path:
    """Write the report's folder, whole or not at all; returns the path of `index.html`."""
    return put(*render(data), directory)


def put(html: str, drawn: Sequence[Figure], directory: Path) -> Path:
    """Write a page and its figures, whole or not at all; returns the path of `index.html`."""
    with files.replaced_directory(directory) as fresh:
        (fresh / "figures").mkdir()
        for figure in drawn:
            (fresh / "figures" / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
        (fresh / "index.html").write_text(html, encoding="utf-8")
    return directory / "index.html"


def render(data: ReportData) -> tuple[str, list[Figure]]:
    """The page's HTML and its figures, in the order in which they stand on it."""
    curve, gold_curve = figures.test_curves(data.test)
    cost_quality = figures.cost_quality(data.bundle, curve, gold_curve)
    labels = figures.labels(data)
    training, reliability = figures.training(data), figures.reliability(data)
    confusions, comparison = figures.confusions(data), figures.comparison(data)
    label_curve = by_labels.figure(data.by_labels) if data.by_labels else None
    html = template("page.html.j2").render(
        data=data,
        bundle=data.bundle,
        summary=grouped(data.summary),
        inline=inline,
        **_words_and_tables(data),
        figures={
            "cost_quality": cost_quality,
            "labels": labels,
            "training": training,
            "comparison": comparison,
            "label_curve": label_curve,
            "reliability": reliability,
            "confusions": confusions,
        },
    )
    drawn = [cost_quality, labels, training, comparison, label_curve, reliability, *confusions]
    return html, [figure for figure in drawn if figure]


def _words_and_tables(data: ReportData) -> dict[str, Any]:
    measured = measure(data.test)
    curve, gold_curve = figures.test_curves(data.test)
    against = ["teacher", "gold"] if measured.gold else ["teacher"]
    counts = {name: figures.confusion_counts(data.test, len(data.labels), name) for name in against}
    return {
        "verdict": verdict(measured, data.bundle),
        "accuracies": tables.accuracies(measured, mixed=data.test.mixed is not None),
        "detection": job_tables.detection(_detections(data), data.positive),
        "ranking": job_tables.ranking(_rankings(data), data.rank_by, data.positive),
        "guarantees": tables.guarantees(data.bundle, curve, gold_curve),
        "stages": in_turn.table(data.bundle, data.test),
        "class_guarantees": tables.class_guarantees(data.bundle, measured),
        "cost_table": tables.cost_quality(curve, gold_curve, data.bundle.served),
        "label_table": tables.label_counts(
            figures.all_labels(data), data.label_histogram, data.teacher_histogram
        ),
        "evaluations": tables.evaluations(data.evaluations),
        "students": tables.students(data.compared),
        "label_curve": by_labels.table(data.by_labels) if data.by_labels else None,
        "label_words": by_labels.words(data.by_labels) if data.by_labels else [],
        "calibration": tables.calibration(data.test),
        "per_label": tables.per_label(data.test, data.labels),
        "differences": [
            tables.commonest_differences(counts[name], data.labels, name) for name in against
        ],
        "slices": job_tables.by_slice(slices(data.test.counted, by_label(data.test, data.labels))),
        "escalations": job_tables.escalations(data.test.counted),
        "example_groups": examples.pick(data.test, data.labels),
    }


def _detections(data: ReportData) -> tuple[Detection, ...]:
    return detections(data.test, data.labels.index(data.positive)) if data.positive else ()


def _rankings(data: ReportData) -> tuple[Ranking, ...]:
    if data.positive is None or data.rank_by is None:
        return ()
    return rankings(data.test, data.test.column(data.rank_by), data.labels.index(data.positive))


def template(name: str) -> jinja2.Template:
    """One of this folder's."""
    return _TEMPLATES.get_template(name)


def grouped(summary: Sequence[SummaryRow]) -> list[tuple[str, list[SummaryRow]]]:
    """Lines of one group together."""
    return [(group, list(rows)) for group, rows in groupby(summary, key=lambda row: row.group)]


def inline(figure: Figure) -> Markup:
    """The figure's SVG with its colours as CSS variables, so that it follows light and dark."""
    return Markup(style.with_variables(figure.svg))  # matplotlib has escaped the labels in it

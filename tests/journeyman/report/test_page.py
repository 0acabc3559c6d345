"""The page: opens anywhere, shows every figure, keeps the user's text as text, never changes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from journeyman.errors import DataError
from journeyman.report import figures, page, style
from journeyman.report.data import ReportData
from journeyman.report.measure import measure
from tests.journeyman.report.synthetic import report_data

VOID = {"meta", "br", "hr", "img", "input", "link"}
SECTIONS = {
    "verdict",
    "summary",
    "promise",
    "cost-quality",
    "labels",
    "training",
    "calibration",
    "confusion",
    "slices",
    "rows",
    "recipe",
}


class Page(HTMLParser):
    """Collects what the tests ask for, and fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[k] for k in ("src", "href", "xlink:href", "srcset") if k in values]
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(values.values()))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data


def parsed(data: ReportData) -> Page:
    return Page(page.render(data)[0])


def test_page_has_each_section_with_a_heading_and_each_figure() -> None:
    shown = parsed(report_data())
    assert set(shown.ids) >= SECTIONS
    assert len(shown.headings) == len(SECTIONS) and all(shown.headings)
    names = ["cost-quality", "labels", "training", "reliability"]
    names += ["confusion-teacher", "confusion-gold"]
    assert {f"figure-{name}" for name in names} <= set(shown.ids)
    assert shown.tags.count("svg") == shown.tags.count("figcaption") == len(names)


def test_page_needs_no_network() -> None:
    html, _ = page.render(report_data())
    links = Page(html).links
    assert links and all(link.startswith("#") for link in links)
    assert not re.findall(r"url\((?!#)|@import|<(?:script|link|img|iframe)\b", html)


def test_ids_are_unique_and_every_reference_finds_its_target() -> None:
    shown = parsed(report_data())
    assert len(set(shown.ids)) == len(shown.ids)
    assert {link.removeprefix("#") for link in shown.links} <= set(shown.ids)


def test_users_text_stays_text() -> None:
    evil = "<script>alert('x')</script> & \"quoted\" $1 $2"
    labels = ("<b>bold</b>", "$5 & $6", "plain")
    data = report_data(
        labels=labels, texts=(evil,), name="<i>n</i>", recipe_yaml="a: </pre><script>"
    )
    html, drawn = page.render(data)
    shown = Page(html)
    assert {"script", "b", "i"}.isdisjoint(shown.tags)
    assert evil in shown.text
    assert all(label in shown.text for label in labels)
    assert all("<b>" not in figure.svg for figure in drawn)


def test_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    first = page.write(report_data(), tmp_path / "one")
    second = page.write(report_data(), tmp_path / "two")
    assert first == tmp_path / "one" / "index.html"
    for path in sorted((tmp_path / "one").rglob("*.*")):
        other = second.parent / path.relative_to(first.parent)
        assert path.read_bytes() == other.read_bytes()
    assert len(list((tmp_path / "two" / "figures").glob("*.svg"))) == 6


def test_writing_again_replaces_the_page(tmp_path: Path) -> None:
    page.write(report_data(name="before"), tmp_path / "report")
    path = page.write(report_data(name="after", gold=False), tmp_path / "report")
    assert "<h1>after</h1>" in path.read_text()
    assert not (path.parent / "figures" / "confusion-gold.svg").exists()


def test_works_without_gold() -> None:
    shown = parsed(report_data(gold=False))
    assert set(shown.ids) >= SECTIONS
    assert "figure-confusion-gold" not in shown.ids
    assert "no gold labels" in shown.text


def test_works_with_gold_for_some_rows() -> None:
    data = report_data()
    data.test.gold[::2] = -1
    assert "200 test rows with gold" in parsed(data).text


def test_escalate_everything_says_why() -> None:
    data = report_data(alpha=0.001)
    reason = data.bundle.guarantees[0].reason
    shown = parsed(data)
    assert reason and reason in shown.text
    assert "The student answers nothing" in shown.text
    assert "escalates everything" in shown.text


@pytest.mark.parametrize("kind", ["accuracy", "selective_agreement"])
def test_every_guarantee_can_be_the_served_one(kind) -> None:
    html, _ = page.render(report_data(kind=kind))
    text = Page(html).text
    for words in ("system agreement", "selective agreement", "accuracy against gold"):
        assert words in text
    assert ("promised: teacher's less 10%" in html) is (kind == "accuracy")


def test_promises_for_each_answer_are_listed() -> None:
    bundle = report_data().bundle
    own = [g.model_copy(update={"n": 100 + i}) for i, g in enumerate([bundle.guarantees[0]] * 4)]
    per_class = bundle.model_copy(update={"class_guarantees": tuple(own)})
    data = report_data(bundle=per_class)
    text = Page(page.render(data)[0]).text
    assert "A promise for each answer that the student gives" in text
    first = measure(data.test).by_answer[0]
    assert f"{first.n_differs / first.n:.1%}" in text and "answered on test" in text
    assert "103" in text and "It holds for each of the student's answers by itself" in text


def test_label_missing_from_test_rows_is_still_named() -> None:
    data = report_data(never=(2,))
    assert not (data.test.gold == 2).any() and not (data.test.student_answer == 2).any()
    assert data.labels[2] in parsed(data).text


def test_works_without_training_records() -> None:
    shown = parsed(report_data(training=[]))
    assert "figure-training" not in shown.ids
    assert "no training records" in shown.text


def test_works_with_a_single_test_row() -> None:
    assert set(parsed(report_data(n=1)).ids) >= SECTIONS - {"slices"}  # of one row there are none


@pytest.mark.parametrize("n_labels", [30, 60])
def test_many_labels_are_all_named(n_labels: int) -> None:
    labels = tuple(f"intent_{i}" for i in range(n_labels))
    shown = parsed(report_data(labels=labels, n=600))
    assert all(label in shown.text for label in labels)


def test_a_folded_matrix_keeps_every_row() -> None:
    counts = np.random.default_rng(0).integers(0, 5, (60, 60))
    folded, labels = figures.fold_rare(counts, [f"label {i}" for i in range(60)])
    assert folded.shape == (len(labels),) * 2 and len(labels) < 60
    assert folded.sum() == counts.sum()
    assert labels[-1] == "all others"


def test_every_colour_of_the_figures_is_in_the_style_sheet_for_light_and_dark() -> None:
    sheet = Path(page.__file__).with_name("page.css").read_text()
    for color, name in style.PALETTE.items():
        assert f"--{name}: {color};" in sheet
        assert sheet.count(f"--{name}: ") == 2
    html, drawn = page.render(report_data())
    assert not re.findall(r"(?:fill|stroke): #", html)
    allowed = set(style.PALETTE)
    for figure in drawn:
        assert set(re.findall(r"#[0-9a-f]{6}\b", figure.svg)) <= allowed


def test_drawing_changes_nothing_global() -> None:
    before = dict(matplotlib.rcParams)
    page.render(report_data())
    assert dict(matplotlib.rcParams) == before


def test_rows_marked_as_answered_must_be_those_above_the_threshold() -> None:
    data = report_data()
    data.test.accepted[:] = True
    with pytest.raises(DataError, match="marked as answered"):
        report_data(test=data.test)


def test_training_interrupted_before_its_first_evaluation_is_still_drawn() -> None:
    steps = [{"kind": "steps", "step": 1, "epoch": 1, "loss": 0.7}]
    assert "figure-training" in parsed(report_data(training=steps)).ids

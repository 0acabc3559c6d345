"""Students of several runs, read from their folders, and drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from journeyman import cli, summary
from journeyman.errors import DataError
from journeyman.mirror import Mirror
from journeyman.report import comparison, page, tables
from journeyman.run_folder import RunFolder
from tests.journeyman.labels import synthetic as made
from tests.journeyman.labels.object_server import serving
from tests.journeyman.report.synthetic import report_data
from tests.journeyman.report.test_page import Page


def make_run(folder: Path, *, megabytes: float, agreement: float, labels: str = "same") -> Path:
    """A run's folder with a student that was best at its first evaluation."""
    student = folder / "student"
    student.mkdir(parents=True)
    (student / "model.safetensors").write_bytes(bytes(int(megabytes * 1e6)))
    best = {"epoch": 1, "step": 10, "agreement": agreement, "kl": 0.25, "n_rows": 40,
            "gold_accuracy": 0.5, "perplexity": None}  # fmt: skip
    record = {"kind": "student", "best": best, "rows": 100, "steps": 20, "seconds": 9.5,
              "labels": labels}  # fmt: skip
    (student / "journeyman.json").write_text(json.dumps(record))
    curve = [
        {"kind": "steps", "step": 10, "loss": 1.0, "rows_per_s": 7.0},
        {"kind": "evaluation", "step": 10, "rows_per_s": 123.0},
        {"kind": "evaluation", "step": 20, "rows_per_s": 321.0},
    ]
    (student / "training.jsonl").write_text("".join(json.dumps(r) + "\n" for r in curve))
    return folder


def test_students_stand_side_by_side_with_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        make_run(tmp_path / "small", megabytes=0.5, agreement=0.8),
        make_run(tmp_path / "large", megabytes=8, agreement=0.9, labels="others"),
    ]
    plot = tmp_path / "plots" / "students.svg"
    assert cli.main(["compare", *map(str, runs), "--plot", str(plot)]) == 0
    heads, first, second, *rest = capsys.readouterr().out.splitlines()
    assert heads.split()[2:9] == [
        "agreement", "accuracy", "KL", "cross-entropy", "perplexity", "exact", "rows/s"
    ]  # fmt: skip
    assert first.split()[2:9] == ["0.800", "0.500", "0.250", "-", "-", "-", "123"]
    assert second.split()[:3] == ["large", "8", "0.900"]
    assert any("different labels" in line for line in rest)
    svg = plot.read_text()
    assert "math" not in svg  # sizes far apart: a log axis, in plain numbers
    assert svg.startswith("<svg") and {"small", "large"} <= set(re.findall(r">(\w+)<", svg))
    assert not (runs[0] / "comparison.json").exists()


def test_what_agreement_is_with_is_said_where_it_is_not_the_teachers_first_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / n, megabytes=1, agreement=0.8) for n in ("known", "text")]
    record = runs[1] / "student" / "journeyman.json"
    values = json.loads(record.read_text())
    del values["best"]["kl"]
    values["best"] |= {"against": "text", "cross_entropy": 1.25, "perplexity": 3.5}
    record.write_text(json.dumps(values))
    assert cli.main(["compare", *map(str, runs), "--report"]) == 0
    _, _, second, _, note, *rest = capsys.readouterr().out.splitlines()
    assert second.split()[4:6] == ["-", "1.250"]
    assert note == "Agreement of text is with the text's own tokens."
    students = comparison.kept(runs[0])
    assert students[1].cross_entropy == 1.25
    assert rest[-1].startswith("kept")
    html, drawn = page.render(report_data(name="known", compared=students))
    shown = Page(html).text
    assert note in shown and "teacher's first answer more often" not in shown
    assert "further up its agreement is higher (the table says with what)" in shown
    svg = next(figure.svg for figure in drawn if figure.name == "size-agreement")
    assert "same as teacher" not in svg and ">agreement<" in svg


def test_a_page_has_the_figures_that_a_compared_student_has(tmp_path: Path) -> None:
    plain = comparison.read(make_run(tmp_path / "plain", megabytes=1, agreement=0.8))
    text = dataclasses.replace(
        plain, name="text", kl=None, cross_entropy=1.25, perplexity=3.5, exact_match=0.125,
        against="text",
    )  # fmt: skip
    alone = tables.students([plain])
    assert alone is not None
    assert alone.columns == ("run", "MB", "agreement", "right by gold", "KL, nats", "rows/s")
    assert alone.caption == "Students side by side, each on its calibrate rows."
    both = tables.students([plain, text])
    assert both is not None and both.columns[4:8] == (
        "KL, nats", "cross-entropy, nats", "perplexity", "written to the letter"
    )  # fmt: skip
    assert [row[4:8] for row in both.rows] == [
        ("0.250", *["–"] * 3), ("–", "1.250", "3.5", "12.5%")
    ]  # fmt: skip
    assert both.caption.endswith("Agreement of text is with the text's own tokens.")


def test_a_student_of_text_that_called_its_cross_entropy_kl_is_read_by_what_it_is(
    tmp_path: Path,
) -> None:
    found = []
    for name, perplexity in (("text", math.exp(0.25)), ("distributions", 3.5)):
        run = make_run(tmp_path / name, megabytes=1, agreement=0.8)
        record = run / "student" / "journeyman.json"
        values = json.loads(record.read_text())
        values["best"] |= {"perplexity": perplexity, "gold_accuracy": None}
        record.write_text(json.dumps(values))
        found.append(comparison.read(run))
    of_text, other = found
    assert (of_text.kl, of_text.cross_entropy, of_text.against) == (None, 0.25, "text")
    assert (other.kl, other.cross_entropy, other.against) == (0.25, None, "distributions")
    assert comparison.agreement_notes(found) == ["Agreement of text is with the text's own tokens."]


def test_a_comparison_is_kept_for_the_pages(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / n, megabytes=1, agreement=0.8) for n in ("one", "two")]
    assert cli.main(["compare", *map(str, runs), "--report"]) == 0
    students = comparison.kept(runs[0])
    assert students == comparison.kept(runs[1]) == tuple(map(comparison.read, runs))
    html, drawn = page.render(report_data(name="one", compared=students))
    shown = Page(html)
    assert "figure-size-agreement" in shown.ids and "Beside other students" in shown.text
    assert "further up it gives its teacher's first answer more often" in shown.text
    assert "size-agreement" in {figure.name for figure in drawn}
    assert "figure-size-agreement" not in Page(page.render(report_data())[0]).ids


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A run in a folder, ``here``, and the URL of a store with another, ``far``."""
    monkeypatch.setenv("JOURNEYMAN_CACHE", str(tmp_path / "cache"))
    here = make_run(tmp_path / "here", megabytes=0.5, agreement=0.8)
    there = make_run(tmp_path / "there", megabytes=0.5, agreement=0.9)
    with serving(monkeypatch) as (_, url):
        Mirror(local=there / "student", url=f"{url}/far/student").push()
        yield here, url


def test_a_run_in_a_store_stands_beside_one_on_a_disk(
    apart: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    here, url = apart
    assert cli.main(["compare", str(here), f"{url}/far"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:3]
    assert [row.split()[::2][:2] for row in rows] == [["here", "0.800"], ["far", "0.900"]]
    assert cli.main(["compare", f"{url}/none"]) == 1
    assert f"{url}/none: there is no run with a student" in capsys.readouterr().err


def test_a_comparison_is_kept_for_the_page_of_a_run_in_a_store(apart: tuple[Path, str]) -> None:
    here, url = apart
    run = RunFolder(made.recipe_of("classes", url).model_copy(update={"name": "far"}))
    run.fetch("train")
    assert summary.page_facts(run)["compared"] == ()
    assert cli.main(["compare", str(here), f"{url}/far", "--report"]) == 0
    students = summary.page_facts(run)["compared"]
    assert [student.name for student in students] == ["here", "far"]
    assert students == comparison.kept(here)


def test_what_cannot_be_compared_gets_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", str(tmp_path)]) == 1
    assert "no finished student here" in capsys.readouterr().err
    (tmp_path / "comparison.json").write_text('[{"size": 3}]')
    with pytest.raises(DataError, match="run journeyman compare --report again"):
        comparison.kept(tmp_path)

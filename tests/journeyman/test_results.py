"""The page of finished runs: its figures are those of the runs' own folders."""

import shutil
from pathlib import Path

import pytest
from scipy.stats import binomtest

from journeyman import files, results
from journeyman.errors import DataError
from journeyman.labels.store import LabelStore
from journeyman.report.comparison import ComparedStudent
from journeyman.report.data import ReportData
from journeyman.report.measure import measure
from journeyman.results import BEGIN, END, Finished, Written
from journeyman.summary.written import writing_rates
from tests.journeyman.labels.synthetic import (
    TOP3,
    distributions,
    generated,
    row,
    settings,
    write_dataset,
)
from tests.journeyman.report.synthetic import report_data

TWO_CORES = {"nodes": 1, "cpus": 2, "gpus": 0, "accelerators": [], "architecture": "x86_64"}


def finished(data: ReportData, **hardware: object) -> Finished:
    return Finished(
        data=data,
        measured=measure(data.test),
        serving={
            "student_rows_per_s": 300.0,
            "teacher_rows_per_s": 10.0,
            "hardware": TWO_CORES | hardware,
        },
        seconds={"prepare": 1.0, "label": 300.0, "train": 60.0},
    )


def cells(page: str, recipe: str) -> list[list[str]]:
    """The rows of its tables that begin with a recipe's name."""
    lines = [line.strip("| ").split(" | ") for line in page.split("\n") if line.startswith("|")]
    return [line for line in lines if line[0] == recipe]


def test_every_figure_is_the_runs_own():
    data = report_data(positive="travel", name="routing")
    page = results.page([finished(data)])
    quality, *detected, costs = cells(page, "routing")
    gold, test = measure(data.test).gold, data.test
    assert gold is not None
    assert quality[1:3] == [f"{gold.teacher / 400:.3f}", f"{gold.student / 400:.3f}"]
    assert quality[3].startswith(f"{gold.student / gold.teacher:.2f}×")
    realised = int((test.accepted & test.differs).sum())
    assert quality[5:8] == [
        f"{test.accepted.mean():.1%}", "≤ 10%", f"{realised / 400:.1%} ({realised} of 400)"
    ]  # fmt: skip
    assert quality[8:] == ["300 (30×)", "10.0"]
    said = test.teacher_answer == 1
    assert detected[0][2:5] == [
        "teacher",
        f"{(said & (test.gold == 1)).sum() / said.sum():.3f}",
        f"{(said & (test.gold == 1)).sum() / (test.gold == 1).sum():.3f}",
    ]
    assert costs == ["routing", "0:01", "5:00", "1:00", "6:01"]


def test_who_is_better_is_said_only_where_chance_does_not_explain_it():
    words = [
        cells(results.quality([finished(report_data(student_skill=skill))]), "demo")[0][3]
        for skill in (1.2, 2.2, 4.5)
    ]
    assert [one.split(", ")[-1] for one in words] == ["worse", "too close to tell", "better"]


def test_what_came_of_each_answers_promise_is_on_the_page():
    data = report_data()
    own = (data.bundle.guarantees[0],) * 4
    each = data.bundle.model_copy(update={"class_guarantees": own})
    page = results.page([finished(report_data(bundle=each))])
    said, test = data.test.student_answer == 2, data.test
    wrong = int((said & test.accepted & test.differs).sum())
    assert f"{data.labels[2]} {wrong / said.sum():.1%} ({wrong} of {said.sum()})" in page


def test_a_bundle_that_escalates_everything_says_why():
    data = report_data(alpha=0.0001)
    page = results.page([finished(data)])
    assert "escalates everything" in page and "no threshold meets it: " in page


def test_students_that_write_have_a_table_of_their_own():
    student = ComparedStudent(
        name="rationales", size_bytes=1, agreement=0.5, kl=1.0, gold_accuracy=None, perplexity=9.0,
        rows_per_s=None, n_rows=480, steps=3, seconds=60.0, labels_digest="d",
        exact_match=0.25, n_held_out=200,
    )  # fmt: skip
    exact = binomtest(50, 200).proportion_ci()
    alone = results.page([finished(report_data()), Written(student=student)])
    own = ["rationales", "0.500", "9.0", "50 of 200", f"{exact.low:.1%} to {exact.high:.1%}"]
    assert cells(alone, "rationales") == [[*own, "–", "nothing", "–", "–", "–", "480"]]
    assert "`rationales`: not certified; its run ends with the student." in alone
    bundle, test = report_data().bundle, {"n": 200, "n_accepted": 120, "n_accepted_differs": 9}
    page = results.page([Written(student=student, bundle=bundle, test=test)])
    proved = f"proved {bundle.served.upper_bound:.1%} on 500 certify rows"
    assert f"`rationales`: system agreement at 10%, confidence 90%; {proved}; realised" in page
    assert "realised on test 4.5% (9 of 200), where the student answers 60.0% (120 of 200)" in page
    took = {"prepare": 1.0, "label": 40.0, "train": 60.0, "certify": 90.0}
    rates = {"student": 30.0, "teacher": 12.0}
    whole = Written(student=student, bundle=bundle, test=test, seconds=took, rates=rates)
    writes, costs = cells(results.page([whole, finished(report_data())]), "rationales")
    assert writes == [*own, "60.0%", "≤ 10%", "4.5% (9 of 200)", "30.0 (2.5×)", "12.0", "480"]
    assert costs == ["rationales", "0:01", "0:40", "1:00", "1:30", "3:11"]
    both = results.for_readme([whole, finished(report_data())])
    assert len(cells(both, "rationales")) == len(cells(both, "demo")) == 1
    none = results.page([Written(student=student, nobody_asked=True)])
    assert "`rationales`: nothing is promised: the answers that it learned stood in its" in none
    page = results.page([Written(student=student, bundle=bundle)])
    assert "on 500 certify rows; not measured on test rows." in page  # once they were not asked
    page = results.page([Written(student=student, bundle=bundle, has_no_test_rows=True)])
    assert "on 500 certify rows; no test rows." in page
    selective = report_data(kind="selective_agreement").bundle
    page = results.page([Written(student=student, bundle=selective, test=test)])
    assert "realised on test 7.5% (9 of 120)" in page
    against_gold = report_data(kind="accuracy").bundle
    test |= {"student": 150, "teacher": 160, "cascade": 156}
    page = results.page([Written(student=student, bundle=against_gold, test=test)])
    assert "realised on test +2.0%, where" in page
    assert "Students that write" not in results.page([finished(report_data())])


def test_the_machine_is_that_of_the_runs():
    page = results.page([finished(report_data()), finished(report_data(name="other"))])
    assert "Made on 2 CPU cores (x86_64), where" in page
    on_a_gpu = finished(report_data(name="large"), gpus=4, accelerators=["H100"], nodes=2)
    old = ComparedStudent(
        name="old", size_bytes=1, agreement=0.5, kl=1.0, gold_accuracy=None, perplexity=9.0,
        rows_per_s=None, n_rows=480, steps=3, seconds=60.0, labels_digest="d",
    )  # fmt: skip
    page = results.page([finished(report_data()), on_a_gpu, Written(student=old)])
    assert (
        "Made on 2 CPU cores (x86_64) (`demo`); 2 CPU cores (x86_64) and 4 H100 GPUs of 2 nodes "
        "(`large`); what the run did not record (`old`), where"
    ) in page


def test_the_table_goes_between_the_marks_and_nowhere_else():
    text = f"a\n{BEGIN}\nold\n{END}\nb\n"
    once = results.between_marks(text, "| new |")
    assert once == f"a\n{BEGIN}\n| new |\n{END}\nb\n"
    assert results.between_marks(once, "| new |") == once
    with pytest.raises(DataError, match="no lines"):
        results.between_marks("a\nb\n", "| new |")


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(DataError, match="no finished student here"):
        results.read(tmp_path)


def learned(run: Path) -> LabelStore:
    """A run that ended with a student that writes; its labels."""
    rows = [(row("Capital of France?"), generated("Paris.", [1, 2], distributions(2)))]
    labels = write_dataset(run, settings("generate"), [rows], codec=TOP3)
    labels.finish({"seconds": 40.0})
    prepared = files.read_json(run / "corpus" / "manifest.json")
    files.write_json(run / "corpus" / "manifest.json", prepared | {"seconds": 2.0})
    best = {"step": 3, "n_rows": 20, "agreement": 0.5, "perplexity": 9.0, "against": "text"}
    record = {"kind": "student", "best": best, "rows": 480, "steps": 3, "seconds": 60.0,
              "labels": "d"}  # fmt: skip
    (run / "student").mkdir()
    files.write_json(run / "student" / "journeyman.json", record)
    (run / "student" / "training.jsonl").write_text("")
    return labels


def test_what_steps_took_is_read_where_they_left_it(tmp_path: Path):
    labels = learned(tmp_path / "r")
    found = results.read(tmp_path / "r")
    assert isinstance(found, Written) and not found.nobody_asked and not found.rates
    assert found.seconds == {"prepare": 2.0, "label": 40.0, "train": 60.0}
    assert "`r`: not certified; its run ends with the student." in results.page([found])
    labels.finish({"teacher_column": "solution"})
    (tmp_path / "r" / "corpus" / "manifest.json").unlink()  # of a corpus that is gone
    found = results.read(tmp_path / "r")
    assert isinstance(found, Written) and found.nobody_asked
    assert cells(results.page([found]), "r")[-1] == ["r", "0:40", "1:00", "–"]


def test_rates_are_of_the_rows_that_were_written_for_the_certificate(tmp_path: Path):
    for name, seconds, copied in (("labels", 2.0, 0), ("teacher", 50.0, 1)):
        rows = [(row(f"Capital number {i}?"), generated("Paris.", [1, 2], distributions(2)))
                for i in range(6)]  # fmt: skip
        written = write_dataset(tmp_path / name, settings("generate"), [rows], codec=TOP3)
        totals = written.manifest()["totals"] | {"replica_seconds": seconds, "copied": copied}
        written.finish({"totals": totals})
        shutil.copytree(tmp_path / name / "labels", tmp_path / "r" / "answers" / name)
    found = writing_rates(tmp_path / "r")
    assert found == {"student": 6 / 2, "teacher": 5 / 50}  # a copied row took nobody's time
    assert writing_rates(tmp_path) == {}

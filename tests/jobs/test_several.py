"""Two runs over the same labels, certified, served and reported as one cascade."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from journeyman import steps, summary
from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import PolicyBundle
from journeyman.errors import DataError
from journeyman.labels import dataset
from tests.conftest import small_recipe


@pytest.fixture(scope="module")
def second(small_run: steps.Run) -> steps.Run:
    """Of another student on the labels of the first, which is asked before it."""
    first = small_run.directory
    shutil.copytree(first, first.with_name("second"))
    run = steps.Run(
        small_recipe(
            first.parent, "name=second", "training.seed=7", "certify.besides=[]",
            f"certify.before=[{first}]",
        )
    )  # fmt: skip
    for name in ("prepare", "label", "train", "certify"):
        run.execute(name)
    return run


def certified(run: steps.Run) -> PolicyBundle:
    return bundles.load(run.path("certify"))


def test_the_bundle_has_both_students_and_what_was_spent_of_their_rows(
    small_run: steps.Run, second: steps.Run
):
    bundle, first = certified(second), certified(small_run)
    assert bundle.stages is not None and bundle.stages.cost_unit == "seconds"
    assert [one.student_digest for one in bundle.stages.students] == [
        first.student_digest,
        bundle.student_digest,
    ]
    assert first.student_digest != bundle.student_digest
    assert bundle.ledger[:-1] == first.ledger  # the copied one's, and the run's itself: once
    assert second.execute("certify").seconds is None
    copied = second.path("certify") / bundles.folder_before(0) / "model.safetensors"
    assert copied.read_bytes() == (small_run.path("train") / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_cascade_answers_over_http_as_certified_and_the_report_says_who_did(
    second: steps.Run,
):
    served = second.execute("measure").manifest
    data = summary.report_data(second)
    assert served["answered_by_student"] == data.test.accepted.mean()
    stages = certified(second).stages
    assert stages is not None and data.test.stage is not None
    rows = dataset.read_classes(second.labels, second.corpus, ("test",))
    teacher = rows.logprobs.argmax(axis=1)
    page = Path(second.execute("report").manifest["page"]).read_text()
    lines = {row.name: row for row in data.summary}
    paid = 0.0
    for i, student in enumerate(stages.students):
        answered = data.test.accepted & (data.test.stage == i)
        wrong = int((answered & (data.test.student_answer != teacher)).sum())
        line = lines[f"student {i + 1}"]
        assert line.value == f"{answered.mean():.1%} ({answered.sum()} of 40)"
        assert line.note == f"{wrong} of these otherwise than the teacher"
        assert line.value in page and student.student in page
        paid += student.cost * np.mean(data.test.stage >= i)
    paid += stages.teacher_cost * np.mean(~data.test.accepted)
    assert lines["cost of a request"].value == f"{paid:.3g} s"


def test_a_student_of_other_labels_is_refused(small_run: steps.Run, tmp_path: Path):
    other = Path(shutil.copytree(small_run.directory, tmp_path / "other"))
    path = other / "student" / "journeyman.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"labels": "others"}))
    run = steps.Run(small_recipe(small_run.directory.parent, "certify.besides=[]",
                                 f"certify.before=[{other}]"))  # fmt: skip
    with pytest.raises(DataError, match="has learned other labels than this run's"):
        run.execute("certify")

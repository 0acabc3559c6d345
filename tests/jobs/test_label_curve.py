"""``journeyman curve`` on a tiny student, from labels to the record."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from journeyman import files, label_curve, models, recipe
from journeyman.certify.by_labels import LabelCurve, kept
from journeyman.certify.step import read_test_logits
from journeyman.cli import main
from journeyman.errors import DataError
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from journeyman.mirror import Mirror
from journeyman.recipe import Recipe
from journeyman.steps import Run
from tests.chaos.training import Rows, write_run
from tests.journeyman.labels import synthetic as made
from tests.journeyman.labels.object_server import serving
from tests.journeyman.student.conftest import FILLERS, TOPICS

N = {"train": 160, "calibrate": 80, "certify": 120, "test": 100}
SETTINGS = [
    "corpus.columns.label=topic",
    "training.epochs=2",
    "training.batch_size=16",
    "certify={alpha: 0.2, scores: [margin]}",
]


@pytest.fixture(scope="module", autouse=True)
def impatient_ray_train() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        yield


def rows(_: Rows) -> Rows:
    """A teacher that is right in four of five rows."""
    words = random.Random(0)
    found: Rows = []
    for split, n in N.items():
        for i in range(n):
            topic = words.randrange(3)
            said = [*words.choices(FILLERS, k=3), words.choice(list(TOPICS.values())[topic])]
            judged = topic if words.random() < 0.8 else words.randrange(3)
            odds = np.where(np.arange(3) == judged, 0.8, 0.1)
            source = made.row(f"{' '.join(said)} {split} {i}", split, list(TOPICS)[topic])
            found.append((source, made.classes(*odds)))
    return found


@pytest.fixture(scope="module")
def path(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run that is trained and certified."""
    path = write_run(tmp_path_factory.mktemp("runs"), "classifier", "run", rows, workers=1)
    for step in ("train", "certify"):
        Run(settings(path)).execute(step)
    return path


def settings(path: Path) -> Recipe:
    return recipe.load(path, SETTINGS)


@pytest.fixture(scope="module")
def run(path: Path) -> Run:
    return Run(settings(path))


@pytest.fixture(scope="module")
def before(run: Run) -> dict[str, bytes]:
    return files_of(run)


def files_of(run: Run) -> dict[str, bytes]:
    """Of the student and of the bundle, with its ledger."""
    folders = (run.path("train"), run.path("certify"))
    return {str(f): f.read_bytes() for folder in folders for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def drawn(run: Run, before: dict[str, bytes], said: list[str]) -> LabelCurve:
    """Two students of 16 labels and two of all; ended at the first by Ctrl-C, and run again."""

    def interrupted(text: str) -> None:
        said.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_curve.draw(run, [16], n_seeds=2, share=0.3, say=interrupted)
    assert not (run.path("curve") / "curve.json").exists()
    return label_curve.draw(run, [16], n_seeds=2, share=0.3, say=said.append)


@pytest.mark.slow
def test_a_command_that_was_ended_goes_on_and_trains_no_student_twice(
    drawn: LabelCurve, run: Run, said: list[str]
) -> None:
    told = [text.split(",")[:2] for text in said]
    assert [(size, rest.rpartition(" in ")[0] or rest) for size, rest in told] == [
        ("16 labels", " seed 0: trained"),
        ("16 labels", " seed 0: there already"),
        ("160 labels", " seed 0: the run's own student"),
        ("16 labels", " seed 1: trained"),
        ("160 labels", " seed 1: trained"),
    ]
    written = {f: f.stat().st_mtime_ns for f in run.path("curve").glob("*.npz")}
    again: list[str] = []
    other = label_curve.draw(run, [16], n_seeds=2, share=0.5, say=again.append)
    assert all(text.endswith("there already") for text in again) and len(again) == 4
    assert {f: f.stat().st_mtime_ns for f in run.path("curve").glob("*.npz")} == written
    assert other.share == 0.5
    assert [p.right["student"] for p in other.points] == [p.right["student"] for p in drawn.points]
    assert label_curve.draw(run, [16], n_seeds=2, share=0.3, say=again.append) == drawn


@pytest.mark.slow
def test_every_student_took_as_many_steps_as_the_runs_own(drawn: LabelCurve) -> None:
    assert [(p.n_labels, p.n_steps) for p in drawn.points] == [(16, 20), (160, 20)]


@pytest.mark.slow
def test_right_answers_are_counted_row_by_row_on_test_rows(drawn: LabelCurve, run: Run) -> None:
    test = dataset.read_classes(run.labels, run.corpus, ("test",))
    teacher = [int(np.argmax(p)) == g for p, g in zip(test.logprobs, test.gold, strict=True)]
    assert (drawn.against, drawn.n, drawn.n_seeds) == ("gold", 100, 2)
    assert drawn.teacher.mean == sum(teacher)
    by_student = {}
    for point in drawn.points:
        for seed in (0, 1):
            file = run.path("curve") / f"labels-{point.n_labels}-seed-{seed}.npz"
            with np.load(file) as arrays:
                answers = [int(np.argmax(z)) for z in arrays["test"]]
            by_student[point.n_labels, seed] = [
                a == g for a, g in zip(answers, test.gold, strict=True)
            ]
        counts = [sum(by_student[point.n_labels, seed]) for seed in (0, 1)]
        found = point.right["student"]
        assert (found.mean, found.least, found.most) == (sum(counts) / 2, min(counts), max(counts))
    assert by_student[16, 0] != by_student[16, 1]  # each seed has a subset of its own
    later = drawn.points[0].later[160]
    pairs = [
        (a, b) for seed in (0, 1)
        for a, b in zip(by_student[16, seed], by_student[160, seed], strict=True)
    ]  # fmt: skip
    assert 2 * later.more == sum(b and not a for a, b in pairs)
    assert 2 * later.less == sum(a and not b for a, b in pairs)
    [logits] = read_test_logits(run.path("certify"))
    own = logits.argmax(axis=1) == test.gold
    assert list(own) == by_student[160, 0]


@pytest.mark.slow
def test_student_and_bundle_are_left_as_they_were(
    drawn: LabelCurve, run: Run, before: dict[str, bytes]
) -> None:
    assert files_of(run) == before
    assert not list(run.directory.glob(".curve-work*/*"))


@pytest.mark.slow
def test_the_command_prints_the_table_and_what_it_says(
    drawn: LabelCurve, run: Run, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"--set={one}" for one in SETTINGS]
    assert main(["curve", str(path), *asked, "--labels", "16", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "curve     16 labels, seed 0: there already" in out
    served = json.loads((run.path("certify") / "bundle.json").read_text())["guarantees"][0]
    student = models.resolve(str(run.path("train"))).weights_digest
    record = kept(run.path("curve"), student)
    assert (
        record is not None and record.points[0].right["student"] == drawn.points[0].right["student"]
    )
    assert record.own_share == pytest.approx(1 - served["n_accepted"] / served["n"])
    assert record.share == (record.own_share if 0 < record.own_share < 1 else 0.2)
    assert "The teacher alone: " in out
    assert f"the least confident {record.share:.1%} of calibrate rows" in out
    heads = next(line for line in out.splitlines() if line.startswith("labels"))
    assert heads.split()[:4] == ["labels", "steps", "student", "alone"]
    assert "no promise" in out


@pytest.mark.slow
def test_a_record_that_was_damaged_is_made_again(drawn: LabelCurve, run: Run) -> None:
    file = run.path("curve") / "labels-160-seed-0.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert label_curve.draw(run, [16], n_seeds=2, share=0.3, say=print) == drawn
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.slow
def test_the_runs_page_has_it(drawn: LabelCurve, run: Run) -> None:
    manifest = run.path("prepare") / "manifest.json"
    told = {"labels": {}, "seconds": 1.0, "read": sum(N.values())}
    files.write_json(manifest, files.read_json(manifest) | told)
    LabelStore(run.labels).finish({"seconds": 1.0})
    speeds = dict.fromkeys(("student_rows_per_s", "teacher_rows_per_s", "requests_per_s"), 1.0)
    served = {"compared_rows": 1, "requests": 1, "answered_by_student": 0.5, "seconds": 1.0}
    served |= {"student_p50_ms": None, "teacher_p50_ms": None}
    files.write_json(run.path("measure") / "manifest.json", speeds | served)
    page = Path(run.execute("report").manifest["page"]).read_text()
    assert 'id="figure-label-curve"' in page and ">160</td>" in page


@pytest.mark.slow
def test_a_run_in_a_store_is_read_and_kept_there(
    drawn: LabelCurve, run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNEYMAN_CACHE", str(tmp_path / "cache"))
    copy = shutil.copytree(run.directory, tmp_path / "run")
    (copy / "curve" / "curve.json").unlink()
    with serving(monkeypatch) as (server, url):
        for folder in ("corpus", "labels"):
            for file in filter(Path.is_file, (copy / folder).rglob("*")):
                key = f"{url.removeprefix('s3://')}/run/{file.relative_to(copy)}"
                server.objects[key] = file.read_bytes()
        for folder in ("student", "bundle", "curve"):
            Mirror(local=copy / folder, url=f"{url}/run/{folder}").push()
        there = Run(recipe.load(path, [*SETTINGS, f"output={url}"]))
        told: list[str] = []
        assert label_curve.draw(there, [16], n_seeds=2, share=0.3, say=told.append) == drawn
        assert len(told) == 4 and all(text.endswith("there already") for text in told)
        record = server.objects[f"{url.removeprefix('s3://')}/run/curve/curve.json"]
        assert LabelCurve.model_validate_json(record) == drawn


# --- sentences ---


def sentence(capsys: pytest.CaptureFixture[str], path: Path, *more: str) -> str:
    assert main(["curve", str(path), *(f"--set={one}" for one in SETTINGS), *more]) == 1
    (found,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("journeyman: ")
    ]
    return found


def test_more_labels_than_there_are(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--labels 500: the run has 160 labeled train rows; ask for at most as many" in sentence(
        capsys, path, "--labels", "20", "500"
    )


def test_other_settings_than_the_student_was_trained_with(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sentence(capsys, path, "--set", "training.epochs=9")
    assert "no student of these labels and settings here; run journeyman train first" in found


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("train", "no student of these labels and settings here; run journeyman train first"),
        ("certify", "There is no policy bundle at"),
    ],
)
def test_a_run_that_is_not_so_far(
    step: str, words: str, path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.path(step)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    try:
        assert words in sentence(capsys, path)
    finally:
        elsewhere.rename(folder)


def test_a_student_that_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writes = write_run(tmp_path, "causal", "run", workers=1)
    assert main(["curve", str(writes)]) == 1
    found = capsys.readouterr().err
    assert "is for classifiers" in found and "student.kind: causal, labels.kind: logits" in found


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-1"])
def test_a_share_that_escalates_nothing_or_everything(
    share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["curve", "any.yaml", f"--escalate={share}"])
    assert "is not between 0 and 1" in capsys.readouterr().err


def test_a_bundle_of_another_student_is_refused(path: Path, run: Run, tmp_path: Path) -> None:
    weights = run.path("train") / "model.safetensors"
    own = weights.read_bytes()
    weights.write_bytes(own[:-4] + bytes(4))
    try:
        with pytest.raises(DataError, match=r"is of another student than .* certify again"):
            label_curve.draw(Run(settings(path)), [16], say=print)
    finally:
        weights.write_bytes(own)

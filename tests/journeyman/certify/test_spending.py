"""Where the ledger is kept: runs beside one another find what each has spent, whatever happens."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from journeyman import recipe
from journeyman.certify import bundle as bundles
from journeyman.certify import spending
from journeyman.certify.bundle import PolicyBundle
from journeyman.certify.certificate import certify_system_agreement
from journeyman.certify.ledger import LedgerEntry, RowSet
from journeyman.certify.spending import spend_rows
from journeyman.certify.step import certify
from journeyman.errors import DataError
from journeyman.folder import Folder
from journeyman.labels.dataset import ClassRows
from journeyman.models import Model
from journeyman.run_folder import RunFolder
from tests.journeyman.certify.test_step import DEMO, Scorer, some_rows
from tests.journeyman.labels.object_server import serving

IDS = [f"{i:032x}" for i in range(100)]
LEDGER = ".ledger"


def a_student(name: str) -> Model:
    return Model(reference=name, path=Path(name), weights_digest=name, tokenizer_digest="t",
                 size_bytes=1)  # fmt: skip


def settings(*overrides: str) -> recipe.Recipe:
    return recipe.load(DEMO, ["certify={alpha: 0.1, max_delta: 0.2}", *overrides])


def certified(
    folder: Path, rows: ClassRows, logits: np.ndarray, student: str, *overrides: str, run: str = "a"
) -> PolicyBundle:
    """The bundle of a run in this folder, beside others."""
    return certify(
        settings(f"name={run}", *overrides),
        rows,
        None,
        Scorer(logits),
        a_student(student),
        a_student("teacher"),
        folder / run / "bundle",
        inputs="i",
        shared=Folder(folder / LEDGER),
    )


def spend(folder: Path, student: str, ids: Sequence[str] = IDS, run: str = "a", *overrides: str):
    given = {"calibrate": ["c"], "certify": ids}
    asked = settings(f"name={run}", *overrides)
    shared = Folder(folder / LEDGER)
    return spend_rows(asked, given, [a_student(student)], (), folder / run / "bundle", shared)


def uses(folder: Path) -> list[str]:
    return [entry.words for entry in spending.read(Folder(folder / LEDGER))[0].entries]


def test_another_student_in_another_run_spends_the_same_rows_and_is_refused_in_the_end(
    tmp_path: Path,
):
    rows, logits = some_rows(2.0, 2.6)
    certified(tmp_path, rows, logits, "first")
    second = certified(tmp_path, rows, logits, "second", run="longer")
    assert [entry.run for entry in second.ledger] == ["a", "longer"]
    assert "holds together with confidence 0.8" in second.recommendation
    words = (
        r"These certify rows have spent 0\.2 of 0\.2 on: system_agreement at 0\.1, student first "
        r"\(run a\); .* \(run longer\)\."
    )
    with pytest.raises(DataError, match=words):
        certified(tmp_path, rows, logits, "third", run="longest")
    assert not (tmp_path / "longest" / "bundle").exists() and len(uses(tmp_path)) == 2


@pytest.mark.parametrize("ids", [IDS[:-1], [*IDS, "new"], [*IDS[50:], *"abcde"]])
def test_a_row_less_or_a_row_more_makes_no_fresh_rows(tmp_path: Path, ids: list[str]):
    spend(tmp_path, "first")
    spend(tmp_path, "second", ids)
    with pytest.raises(DataError, match=r"certify rows have spent 0\.2 of 0\.2 on"):
        spend(tmp_path, "third", ids)
    spend(tmp_path, "third", ["f", "r", "e", "s", "h"])


def test_rounds_of_feedback_whose_audited_rows_grow_spend_those_of_the_first_each_time(
    tmp_path: Path,
):
    audited = [IDS[:40], IDS[:70], IDS]
    for i in (0, 1):
        spend(tmp_path, f"student {i}", audited[i], f"feedback-{i}")
    with pytest.raises(DataError, match=r"Some of these .* on 40 of these 100; .* on 70 of these"):
        spend(tmp_path, "student 2", audited[2], "feedback-2")
    spend(tmp_path, "student 2", IDS[40:], "feedback-2")  # those of later days alone


def test_the_same_again_is_the_same_use_in_any_folder_and_other_settings_are_another(
    tmp_path: Path,
):
    rows, logits = some_rows(2.0, 2.6)
    first = certified(tmp_path, rows, logits, "first", "certify.max_delta=0.3")
    shutil.rmtree(tmp_path / "a")
    for run in ("a", "a", "b"):
        assert certified(tmp_path, rows, logits, "first", run=run).ledger == first.ledger
    besides = certified(tmp_path, rows, logits, "first", "certify.besides=[accuracy]")
    assert [entry.use.split()[0] for entry in besides.ledger] == ["system_agreement", "accuracy"]
    with pytest.raises(DataError, match=r"'system_agreement at 0\.1, student first' would"):
        certified(tmp_path, rows, logits, "first", "certify.scores=[margin]")
    fewer = rows.take(np.flatnonzero(np.arange(len(rows)) != 0))  # of calibrate
    with pytest.raises(DataError, match=r"would take 0\.1"):
        certified(tmp_path, fewer, logits, "first")


def test_a_use_is_on_record_before_its_bundle_and_once_where_that_was_killed_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows, logits = some_rows(2.0, 2.6)
    with monkeypatch.context() as patched:
        patched.setattr(bundles, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            certified(tmp_path, rows, logits, "first")
    assert len(uses(tmp_path)) == 1 and not (tmp_path / "a" / "bundle").exists()
    assert len(certified(tmp_path, rows, logits, "first").ledger) == 1
    assert len(uses(tmp_path)) == 1


def test_what_fails_before_anything_is_decided_spends_nothing(tmp_path: Path):
    rows, logits = some_rows(2.0, 2.6, gold_share=0.0)
    with pytest.raises(DataError, match="needs gold labels"):
        certified(tmp_path, rows, logits, "first", "certify.guarantee=accuracy")
    assert uses(tmp_path) == []


@pytest.mark.parametrize("in_store", [False, True])
def test_of_many_at_once_no_more_pass_than_max_delta_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_store: bool
):
    def tried(shared: Folder, i: int) -> bool:
        given = {"calibrate": ["c"], "certify": IDS[i:]}
        asked = settings("certify.max_delta=0.5")
        try:
            spend_rows(asked, given, [a_student(f"{i}")], (), tmp_path / f"{i}", shared)
        except DataError:
            return False
        return True

    with serving(monkeypatch) as (_, url), ThreadPoolExecutor(8) as pool:
        shared = Folder(f"{url}/{LEDGER}" if in_store else tmp_path / LEDGER)
        passed = list(pool.map(lambda i: tried(shared, i), range(8)))
        there, last = spending.read(shared)
    assert sum(passed) == len(there.entries) == last == 5
    assert there.delta_spent(RowSet.of(IDS)).max() == pytest.approx(0.5)
    assert len({entry.use for entry in there.entries}) == 5


def test_a_bundle_that_was_copied_elsewhere_tells_which_rows_it_has_spent(tmp_path: Path):
    rows, logits = some_rows(2.0, 2.6)
    certified(tmp_path / "here", rows, logits, "first")
    certified(tmp_path / "here", rows, logits, "second", run="b")
    copied = tmp_path / "there" / "b" / "bundle"
    shutil.copytree(tmp_path / "here" / "b" / "bundle", copied)
    assert bundles.load(copied).bundle_id == bundles.load(tmp_path / "here/b/bundle").bundle_id
    for path in (copied, *copied.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    certify_rows = rows.split("certify").ids
    of_it = spending.of_bundle(copied)
    assert of_it.delta_spent(RowSet.of(certify_rows[:-3])).max() == pytest.approx(0.2)
    with pytest.raises(DataError, match=r"student first \(run a\), on 697 of these 698"):
        spend(tmp_path / "there", "third", [*certify_rows[:-3], "new"], "b")
    spend(tmp_path / "there", "third", certify_rows, "c")  # no ledger beside it knows of them


def test_a_run_from_before_has_spent_what_its_bundle_says(tmp_path: Path):
    rows, logits = some_rows(2.0, 2.6)
    bundle = certified(tmp_path, rows, logits, "first")
    shutil.rmtree(tmp_path / LEDGER)
    shutil.rmtree(tmp_path / "a" / "bundle" / "ledger")
    old = LedgerEntry.model_validate(bundle.ledger[0].model_dump(exclude={"way", "run"}))
    earlier = PolicyBundle.model_validate(bundle.model_dump() | {"ledger": (old, old)})
    bundles.save(earlier, tmp_path / "a" / "bundle")
    with pytest.raises(DataError, match=r"have spent 0\.2 of 0\.2 on: system_agreement"):
        certified(tmp_path, rows, logits, "second")


def test_a_damaged_use_is_said_and_none_is_forgotten_for_damaged_rows(tmp_path: Path):
    spend(tmp_path, "first")
    [of_rows] = (tmp_path / LEDGER / "rows").iterdir()
    assert of_rows.stat().st_size == 8 * len(IDS)
    of_rows.write_bytes(b"half")
    spend(tmp_path, "second")
    with pytest.raises(DataError, match=r"have spent 0\.2"):
        spend(tmp_path, "third")
    path = tmp_path / LEDGER / "uses" / "000002.json"
    assert json.loads(path.read_text())[0]["run"] == "a"
    path.write_text("[{")
    with pytest.raises(DataError, match=r"000002\.json: damaged; it says what certify rows"):
        spend(tmp_path, "third")


def test_another_outcome_of_the_same_is_another_look(tmp_path: Path):
    """As costs that were measured anew, or gold that was corrected, may bring."""
    given, shared = {"calibrate": ["c"], "certify": IDS}, Folder(tmp_path / LEDGER)

    def came_out(threshold: float) -> int:
        scores, differs = np.linspace(0, 1, 200), np.arange(200) < 20
        found = certify_system_agreement(scores, differs, 0.1, 0.1)
        found = dataclasses.replace(found, n_accepted=int((scores > threshold).sum()))
        asked = settings("certify.max_delta=0.9")
        student, bundle = [a_student("s")], tmp_path / "a" / "bundle"
        return len(spend_rows(asked, given, student, [found], bundle, shared).entries)

    assert [came_out(at) for at in (0.5, 0.5, 0.6, 0.5)] == [1, 1, 2, 2]


def test_what_a_cascade_of_students_spends_is_seen_where_one_of_them_is_certified_alone(
    tmp_path: Path,
):
    given, shared = {"calibrate": ["c"], "certify": IDS}, Folder(tmp_path / LEDGER)
    both = [a_student("small"), a_student("medium")]
    spend_rows(settings("name=medium"), given, both, (), tmp_path / "medium" / "bundle", shared)
    spend(tmp_path, "small", run="small")
    with pytest.raises(DataError, match=r"student medium behind small \(run medium\); system_agr"):
        spend(tmp_path, "other", run="small")


def test_the_ledger_lies_beside_the_runs_and_each_job_has_its_own(tmp_path: Path):
    def ledger(*overrides: str) -> str:
        return RunFolder(settings(*overrides)).ledger.where

    here = f"output={tmp_path}"
    assert Path(ledger(here)).parent == tmp_path / LEDGER
    assert ledger(here) == ledger(here, "name=longer", "labels.target=Q {{ text }}")
    other = ("labels.classes={a: [a], b: [b]}", "labels.class_shares=null")
    assert ledger(here) != ledger(here, *other)
    far = ledger("output=s3://bucket/runs/")
    assert far == f"s3://bucket/runs/.ledger/{Path(ledger(here)).name}"
    spend(tmp_path, "first")
    assert not list(tmp_path.glob("[!.]*"))  # what runs/* stands for

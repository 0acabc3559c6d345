"""Which runs' students may be asked before a run's own: those that learned the same."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from journeyman import models, recipe
from journeyman.certify import asked
from journeyman.certify.bundle import save
from journeyman.certify.ledger import LedgerEntry
from journeyman.errors import DataError
from journeyman.recipe import Recipe
from tests.journeyman.certify.test_bundle import a_bundle
from tests.journeyman.certify.test_step import DEMO
from tests.serve import tiny

IDENTITY: dict[str, Any] = {
    "kind": "classes",
    "labels": {"classes": {"a": ["a"], "b": ["b"]}, "prompt": "{{ label }}: {{ text }}"},
    "teacher": {"model": "big", "weights": "w", "tokenizer": "t"},
    "corpus": "c0ffee",
}


def a_run(folder: Path, learned: str, **record: Any) -> Path:
    """A run's folder with a tiny student in it."""
    tiny.write_student(folder / "student")
    kept = {
        "kind": "student",
        "labels": learned,
        "reads": {"text": "{{ text }}", "text_pair": None},
    }
    (folder / "student" / "journeyman.json").write_text(json.dumps(kept | record))
    return folder


def write_labels(run: Path, digest: str, **changed: Any) -> dict[str, Any]:
    content = {"schema": 2, "complete": True, "digest": digest, "filtered": {},
               "identity": deepcopy(IDENTITY) | changed}  # fmt: skip
    (run / "labels").mkdir(exist_ok=True)
    (run / "labels" / "manifest.json").write_text(json.dumps(content))
    return content


def found(run: Path, labels: dict[str, Any], columns: tuple[str, ...] = ("text",)):
    return asked.before(a_recipe(run), labels, columns, an_own_student(run.parent))


def a_recipe(run: Path) -> Recipe:
    return recipe.load(DEMO, ["certify={alpha: 0.1}", f"certify.before=[{run}]"])


def an_own_student(folder: Path) -> models.Model:
    return models.Model(reference="own", path=folder, weights_digest="own", tokenizer_digest="t",
                        size_bytes=1)  # fmt: skip


def test_a_student_of_the_same_labels_is_asked_with_its_own_templates_and_ledger(tmp_path):
    pair = {"text": "{{ text }}!", "text_pair": "{{ passage }}"}
    run = a_run(tmp_path / "small", "d1", reads=pair)
    labels = write_labels(tmp_path, "d1")
    [one] = found(run, labels, ("passage", "text"))
    assert one.reads.templates() == {"student.text": "{{ text }}!",
                                     "student.text_pair": "{{ passage }}"}  # fmt: skip
    assert one.scorer.logits(["book a flight"]).shape == (1, len(tiny.LABELS))
    assert one.ledger.entries == ()
    use = LedgerEntry(use="of the small one", rows_digest="r", delta=0.1)
    save(a_bundle(ledger=(use,)), run / "bundle")
    assert found(run, labels, ("passage", "text"))[0].ledger.entries == (use,)


def test_labels_that_a_run_made_by_itself_in_the_same_way_will_do(tmp_path):
    run = a_run(tmp_path / "small", "d2")
    write_labels(run, "d2")
    assert len(found(run, write_labels(tmp_path, "d1"))) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"corpus": "beef"}, 'another corpus .corpus: there "beef", asked "c0ffee"'),
        ({"teacher": IDENTITY["teacher"] | {"weights": "v"}}, "another teacher .teacher.weights"),
        ({"labels": IDENTITY["labels"] | {"classes": {"b": ["b"], "a": ["a"]}}}, "other classes"),
        ({"labels": IDENTITY["labels"] | {"prompt": "?"}}, "labels made in another way .labels.pr"),
    ],
)
def test_a_student_of_other_labels_is_refused_with_the_difference(tmp_path, changed, words):
    run = a_run(tmp_path / "small", "d2")
    write_labels(run, "d2", **changed)
    with pytest.raises(DataError, match=f"the student of .*small has learned {words}") as caught:
        found(run, write_labels(tmp_path, "d1"))
    assert "\n" not in str(caught.value)


def test_labels_that_are_gone_cannot_be_compared(tmp_path):
    run = a_run(tmp_path / "small", "d2")
    write_labels(run, "d3")  # made again since
    with pytest.raises(DataError, match=r"other labels than this run's, and they are not in its"):
        found(run, write_labels(tmp_path, "d1"))


def test_a_run_without_a_student_a_column_nobody_brings_and_the_same_student_are_refused(tmp_path):
    labels = write_labels(tmp_path, "d1")
    with pytest.raises(DataError, match="has no finished student; run journeyman train there"):
        found(tmp_path / "none", labels)
    run = a_run(tmp_path / "small", "d1", reads={"text": "{{ passage }}", "text_pair": None})
    with pytest.raises(DataError, match="reads the column passage, which no template of this"):
        found(run, labels)
    own = models.resolve(str(a_run(tmp_path / "same", "d1") / "student"))
    with pytest.raises(DataError, match="has the same student as another of this cascade"):
        asked.before(a_recipe(tmp_path / "same"), labels, ["text"], own)


def test_what_a_student_from_before_reads_is_known_from_its_bundle(tmp_path):
    run, labels = a_run(tmp_path / "small", "d1", reads=None), write_labels(tmp_path, "d1")
    with pytest.raises(DataError, match=r"nothing says what the student of .* reads"):
        found(run, labels)
    (run / "bundle").mkdir()
    said = {"student": {"text": "Q: {{ text }}", "text_pair": None}}
    (run / "bundle" / "recipe.json").write_text(json.dumps(said))
    assert found(run, labels)[0].reads.text == "Q: {{ text }}"

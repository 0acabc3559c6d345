"""A language model from its teacher, as a user runs it: the recipe, the table, the student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from journeyman import models, recipe, steps
from journeyman.errors import RecipeError
from journeyman.labels import dataset
from journeyman.mirror import Mirror
from journeyman.student import step
from tests.conftest import DEMO, ROOT, journeyman

RECIPE = ROOT / "jobs" / "recipes" / "logits.yaml"
SMALL = (
    "corpus.limits={train: 48, calibrate: 16, certify: 24, test: 12}",
    "student.layers=3",
    "training.epochs=2",
    "training.batch_size=16",
    "training.workers=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("runs")
    overrides = [part for one in (*SMALL, f"output={output}") for part in ("--set", one)]
    done = journeyman("run", str(RECIPE), *overrides)
    assert done.returncode == 0, done.stderr
    return output / "logits", done.stdout


@pytest.mark.slow
def test_run_ends_with_a_student_that_learned(run: tuple[Path, str]) -> None:
    folder, printed = run
    record = json.loads((folder / "student" / "journeyman.json").read_text())
    first, last = record["evaluations"]
    assert last["kl"] < first["kl"] and record["best"] == last
    assert record["hardware"]["cpus"] >= 1 and record["hardware"]["nodes"] == 1
    assert f"{last['kl']:.3f} nats" in printed and str(folder / "student") in printed
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert model.config.num_hidden_layers == 3
    page = (folder / "report" / "index.html").read_text()
    assert f"{last['agreement']:.1%}" in page and '<section id="promise">' in page


@pytest.mark.slow
def test_it_is_skipped_when_nothing_has_changed(run: tuple[Path, str]) -> None:
    output = run[0].parent
    current = steps.Run(recipe.load(RECIPE, [*SMALL, f"output={output}"]))
    assert [current.execute(step).seconds for step in ("train", "certify")] == [None, None]


@pytest.mark.slow
def test_students_stand_side_by_side(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = run
    compared = journeyman("compare", str(folder), str(folder / "student"))
    assert compared.returncode == 0, compared.stderr
    heads, first, second = compared.stdout.splitlines()
    assert "rows/s" in heads and "logits" in first and "student" in second
    nothing = journeyman("compare", str(tmp_path))
    assert nothing.returncode == 1 and "no finished student here" in nothing.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_is_certified_for_writing_on_and_what_came_of_it_is_shown(
    run: tuple[Path, str],
) -> None:
    folder, printed = run
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    assert manifest["test"]["n"] == 12
    listed = journeyman("results", str(folder))
    assert listed.returncode == 0 and "- `logits`: system agreement at 20%" in listed.stdout
    assert "realised on test" in listed.stdout and "of 12)" in listed.stdout
    assert f"({manifest['test']['n_accepted']} of 12)" in printed and "rows/s" in printed
    page = (folder / "report" / "index.html").read_text()
    assert '<section id="promise">' in page and "Rows to read" in page
    assert f"({manifest['test']['n_accepted']} of 12)" in page


@pytest.mark.parametrize(
    ("path", "override", "words"),
    [
        (RECIPE, "student.kind=classifier", "student.kind: classifier learns class distributions"),
        (RECIPE, "student.layers=null", "start: pruned needs layers"),
        (DEMO, "student.kind=causal", "student.kind: causal learns tokens"),
    ],
)
def test_students_that_do_not_fit_get_a_sentence(path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        step.check(recipe.load(path, [override]))


def test_a_student_that_cannot_learn_the_labels_is_refused_before_they_are_paid_for(
    tmp_path: Path,
) -> None:
    overrides = ["--set", "labels.k=4", "--set", "student.start=pretrained", "--set",
                 "student.layers=null", "--set", "student.kind=classifier", "--set",
                 f"output={tmp_path}"]  # fmt: skip
    for command in (("run",), ("recipe", "check")):
        refused = journeyman(*command, str(RECIPE), *overrides)
        assert refused.returncode == 1 and "set student.kind: causal" in refused.stderr
    assert not any(tmp_path.rglob("*.parquet"))


def test_another_vocabulary_is_refused_before_a_worker_starts(tmp_path: Path) -> None:
    loaded = recipe.load(RECIPE)
    encoder = models.resolve(recipe.load(DEMO).learner().model)
    with pytest.raises(RecipeError, match="has another vocabulary than the teacher"):
        given = encoder, models.teacher(loaded.teacher), Mirror(local=tmp_path / "rows")
        step._causal(loaded, tmp_path, tmp_path, *given, dataset.made)

"""``journeyman train`` on labels that it cannot learn: one sentence, status 1, nothing damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from journeyman.cli import main
from journeyman.labels.store import LabelStore
from journeyman.student.checkpoints import Checkpoints
from tests.chaos.training import PER_EPOCH, Rows, write_run
from tests.journeyman.labels import synthetic as made
from tests.journeyman.student.conftest import make_tiny_llama

pytestmark = pytest.mark.usefixtures("ray_cluster")


def refused(capsys: pytest.CaptureFixture[str], recipe: Path, *settings: str) -> str:
    """The sentence."""
    assert main(["train", str(recipe), *(f"--set={one}" for one in settings)]) == 1
    said = capsys.readouterr().err
    (sentence,) = [line for line in said.splitlines() if line.startswith("journeyman: ")]
    assert said.endswith(sentence + "\n") and "Traceback" not in said
    assert not (recipe.with_suffix("") / "student").exists()
    return sentence


def test_more_workers_than_the_machine_has_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = write_run(tmp_path, "classifier", "run", workers=1)
    sentence = refused(
        capsys, recipe, "training.workers=512", "training.batch_size=512",
        "training.cpus_per_worker=1",
    )  # fmt: skip
    assert "512 CPUs, where the cluster has" in sentence and "Lower training.workers" in sentence


def store(recipe: Path) -> LabelStore:
    return LabelStore(recipe.with_suffix("") / "labels")


def change_identity(recipe: Path, **teacher: str) -> None:
    identity = store(recipe).manifest()["identity"]
    store(recipe).finish({"identity": identity | {"teacher": identity["teacher"] | teacher}})


def change_codec(recipe: Path, **facts: Any) -> None:
    store(recipe).finish({"codec": store(recipe).manifest()["codec"] | facts})


def change_schema(recipe: Path) -> None:
    store(recipe).finish({"schema": 99})


def cut_a_shard(recipe: Path) -> None:
    path = next((recipe.with_suffix("") / "labels" / "shards").iterdir())
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("kind", "breaks", "words"),
    [
        (
            "causal",
            lambda recipe: change_identity(recipe, tokenizer="other", model="test/other"),
            r"labels is in the tokens of test/other, and teacher\.model, \S+/student, has another "
            r"tokenizer; name the teacher that labeled, or label again with journeyman label --new",
        ),
        (
            "causal",
            lambda recipe: change_codec(recipe, layout=2),
            r"written in the codec topk_fp16, layout 2, and this version of Journeyman reads "
            r"topk_fp16, topk_q8, sampled, layout 1; install the version that wrote them",
        ),
        ("causal", lambda recipe: change_codec(recipe, name="topk_fp4"), "the codec topk_fp4"),
        ("causal", change_schema, "schema 99, this version reads 2. Install the version of Journ"),
        ("causal", cut_a_shard, r"\.parquet: \d+ bytes where the commit says \d+; remove "),
        ("classifier", cut_a_shard, r"\.parquet: \d+ bytes where the commit says \d+; remove "),
    ],
)
def test_labels_that_cannot_be_read(
    kind: str,
    breaks: Callable[[Path], None],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_run(tmp_path, kind, "run", workers=1)
    breaks(recipe)
    assert re.search(words, refused(capsys, recipe))


def test_labels_that_were_asked_for_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_run(tmp_path, "causal", "run", workers=1)
    sentence = refused(capsys, recipe, "labels.k=77")
    assert re.search(r"made otherwise than the recipe asks now \(labels\.k: there \d+, asked 77\)",
                     sentence)  # fmt: skip


@pytest.mark.parametrize("split", ["train", pytest.param("calibrate", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["classifier", pytest.param("causal", marks=pytest.mark.slow)])
def test_an_empty_split(
    kind: str, split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(rows: Rows) -> Rows:
        return [(source, said) for source, said in rows if source["split"] != split]

    recipe = write_run(tmp_path, kind, "run", without, workers=1)
    sentence = refused(capsys, recipe)
    assert f"the label dataset has no {split} rows, and training needs some; give " in sentence


def test_a_student_of_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_run(tmp_path, "causal", "run", workers=1)
    other = make_tiny_llama(tmp_path / "other", swap=True)
    sentence = refused(capsys, recipe, f"student.model={other}")
    assert "has another vocabulary than the teacher ('w2' is 5 to the teacher and 6 to" in sentence


def test_labels_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    causal = write_run(tmp_path, "causal", "run", workers=1)
    asked = json.dumps(made.KINDS["generate"])
    assert "holds labels of kind logits, and labels.kind is generate; set labels.kind: " in refused(
        capsys, causal, f"labels={asked}"
    )


def test_a_row_that_is_no_number_is_named_and_what_was_learned_before_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad: list[str] = []

    def no_number(rows: Rows) -> Rows:
        bad.append(rows[100][0]["id"])
        rows[100] = (rows[100][0], made.classes(*[np.nan] * 3))
        return rows

    recipe = write_run(tmp_path, "classifier", "run", no_number, workers=1, seed=3)
    sentence = refused(capsys, recipe)
    found = re.search(
        r"stopped at step (\d+) of 120: the loss is nan for the rows (\S+); ", sentence
    )
    assert found and [found[2]] == bad
    step = int(found[1])
    assert 1 < step <= PER_EPOCH, "choose another seed"
    (work,) = recipe.with_suffix("").glob(".student-work-*")
    checkpoints = Checkpoints.claim(work)
    latest = checkpoints.latest()
    assert latest is not None and 1 <= latest.step < step
    model = AutoModelForSequenceClassification.from_pretrained(checkpoints.model(latest.step))
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_a_rate_that_is_far_too_high(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_run(
        tmp_path, kind, "run", workers=1, learning_rate=1e30, head_learning_rate=1e30, warmup=0.0
    )
    sentence = refused(capsys, recipe)
    assert "training stopped at step " in sentence and "lower training.learning_rate" in sentence

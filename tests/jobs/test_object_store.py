"""Labeling and training through S3's interface while one call in twenty fails."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from journeyman import files, steps
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from tests.chaos import labeling
from tests.chaos.test_chaos import WITHOUT_ENGINE, write_recipe
from tests.conftest import DEMO, SMALL, journeyman
from tests.journeyman.labels.object_server import Faults, ObjectServer, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ALONE = {"RAY_ADDRESS": "local"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectServer, str]]:
    with serving(monkeypatch) as (server, url):
        yield server, url


def test_a_corpus_is_read_and_labels_are_written_without_losing_a_row(
    store: tuple[ObjectServer, str], tmp_path: Path
):
    server, url = store
    recipe = write_recipe(
        tmp_path,
        [f"row {i}" for i in range(1500)],
        rows_per_shard=25,
        teacher={
            "model": labeling.nothing_but_a_name(tmp_path / "model"),
            "max_model_len": 512,
            "max_num_seqs": 32,
            "engine_args": {"row_s": 0.01, "start_s": 0.1},
        },
        labels={"kind": "logits", "k": 4},
    )
    source = f"{url.removesuffix('/some/labels')}/rows.jsonl"
    server.objects[source.removeprefix("s3://")] = (tmp_path / "rows.jsonl").read_bytes()
    given = {**ALONE, **WITHOUT_ENGINE}
    for name, *settings in (("undisturbed",), ("far", f"corpus.sources=[{source}]",
                                               f"labels.destination={url}")):  # fmt: skip
        server.faults = Faults(share=0.05, random=random.Random(1)) if settings else None
        arguments = [f"--set={each}" for each in (f"name={name}", *settings)]
        for step in ("prepare", "label"):
            done = labeling.journeyman(tmp_path, step, str(recipe), *arguments, **given)
            assert done.returncode == 0, done.stderr
    assert server.faults and server.faults.met.total() > 10, "too few calls failed"
    server.faults = None
    totals = LabelStore(url).manifest()["totals"]
    assert totals["rows"] == totals["ok"] == 1500
    undisturbed = dataset.read(tmp_path / "undisturbed" / "labels")
    assert dataset.read(url).equals(undisturbed)


def test_a_student_learns_from_labels_there_and_is_certified(
    store: tuple[ObjectServer, str], small_run: steps.Run, tmp_path: Path
):
    server, url = store
    labels = small_run.path("label")
    for file in labels.rglob("*"):
        if file.is_file():
            key = f"{url.removeprefix('s3://')}/{file.relative_to(labels)}"
            server.objects[key] = file.read_bytes()
    run = tmp_path / "small"
    shutil.copytree(small_run.path("prepare"), run / "corpus")
    server.faults = Faults(share=0.05, random=random.Random(2))
    settings = [*SMALL, f"output={tmp_path}", f"labels.destination={url}"]
    for step in ("train", "certify"):
        done = journeyman(
            step, str(DEMO), *(f"--set={each}" for each in settings), env=os.environ | ALONE
        )
        assert done.returncode == 0, done.stderr
    assert server.faults.met, "no call failed"
    here, far = (
        files.read_json(folder / "journeyman.json")
        for folder in (small_run.path("train"), run / "student")
    )
    assert {k: far[k] for k in ("labels", "rows", "steps")} == {
        k: here[k] for k in ("labels", "rows", "steps")
    }
    assert json.loads((run / "bundle" / "bundle.json").read_text())["ledger"]

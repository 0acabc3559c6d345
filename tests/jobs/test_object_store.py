"""Labeling and training through S3's interface while one call in twenty fails."""

import json
import os
import random
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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(800)]
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


def test_a_run_there_is_trained_certified_served_and_reported(
    store: tuple[ObjectServer, str], small_run: steps.Run, tmp_path: Path
):
    """All but the teacher's work, which the other test has."""
    server, url = store
    url = url.removesuffix("/labels")
    prefix = f"{url.removeprefix('s3://')}/{small_run.recipe.name}"
    for name in ("corpus", "labels"):
        folder = small_run.directory / name
        for file in filter(Path.is_file, folder.rglob("*")):
            server.objects[f"{prefix}/{name}/{file.relative_to(folder)}"] = file.read_bytes()
    server.faults = Faults(share=0.05, random=random.Random(2))
    settings = [f"--set={each}" for each in (*SMALL, f"output={url}")]

    def run(*command: str, cache: str) -> str:
        here = {"JOURNEYMAN_CACHE": str(tmp_path / cache)}
        done = journeyman(*command, str(DEMO), *settings, env=os.environ | ALONE | here)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train", cache="one")
    run("certify", cache="another")  # a machine that has seen nothing of it
    again = run("run", cache="one")
    assert server.faults.met, "no call failed"
    assert [line.split()[0] for line in again.splitlines() if "already done" in line] == [
        "prepare", "label", "train", "certify",
    ]  # fmt: skip
    there = {key.removeprefix(f"{prefix}/") for key in server.objects if key.startswith(prefix)}
    assert {"student/model.safetensors", "bundle/bundle.json", "serving/manifest.json",
            "report/index.html"} <= there  # fmt: skip
    assert not [name for name in there if name.startswith(".student-work")]
    far = json.loads(server.objects[f"{prefix}/student/journeyman.json"])
    here = files.read_json(small_run.path("train") / "journeyman.json")
    assert {k: far[k] for k in ("labels", "rows", "steps")} == {
        k: here[k] for k in ("labels", "rows", "steps")
    }
    assert json.loads(server.objects[f"{prefix}/bundle/bundle.json"])["ledger"]
    elsewhere = os.environ | ALONE | {"JOURNEYMAN_CACHE": str(tmp_path / "third")}
    read = journeyman("results", f"{url}/{small_run.recipe.name}", env=elsewhere)
    assert read.returncode == 0, read.stderr
    assert f"`{small_run.recipe.name}`: system agreement" in read.stdout

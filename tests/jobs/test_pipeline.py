"""The pipeline's promises: nothing lost, nothing doubled, nothing done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray

from journeyman import corpus, steps, summary
from journeyman.cascade import keys
from journeyman.errors import DataError
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from tests.conftest import DEMO, ROOT, SMALL, journeyman, small_recipe


def test_every_row_of_the_corpus_is_labeled_once(small_run: steps.Run):
    table = dataset.read(small_run.path("label"))
    ids = [
        row_id
        for shard in corpus.read_manifest(small_run.path("prepare"))["shards"]
        for row_id in corpus.read_shard(small_run.path("prepare"), shard["name"])["id"].to_pylist()
    ]
    assert table["id"].to_pylist() == ids
    totals = LabelStore(small_run.path("label")).manifest()["totals"]
    assert totals["rows"] == totals["ok"] == len(ids)
    sums = np.exp(np.array(table["class_logprobs"].to_pylist())).sum(axis=1)
    np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_the_nodes_logs_say_what_became_of_each_shard_and_never_a_text(small_run: steps.Run):
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "journeyman"
    written = "".join(path.read_text() for path in folder.glob("label-*.log"))
    said = [json.loads(line) for line in written.splitlines()]
    own = [line for line in said if line["labels"] == str(small_run.path("label").resolve())]
    assert {(line["run"], line["recipe"]) for line in own} == {("small", small_run.recipe.hash)}
    committed = [line for line in own if line["event"] == "shard committed"]
    rows = {s["name"]: s["rows"] for s in corpus.read_manifest(small_run.path("prepare"))["shards"]}
    assert {line["shard"]: line["ok"] for line in committed} == rows
    trained = "".join(path.read_text() for path in folder.glob("train-*.log"))
    events = [line["event"] for line in map(json.loads, trained.splitlines())
              if line["run"] == "small"]  # fmt: skip
    assert events[0] == "training" and events.count("evaluation") == 2
    texts = corpus.read_shard(small_run.path("prepare"), min(rows))["text"].to_pylist()
    assert texts and not any(text in written for text in texts)


def test_prior_is_fitted_on_train_rows_alone(small_run: steps.Run):
    table = dataset.read(small_run.path("label"))
    train = table.filter(pa.compute.equal(table["split"], "train"))
    p = np.exp(np.array(train["class_logprobs"].to_pylist(), dtype=np.float64))
    manifest = LabelStore(small_run.path("label")).manifest()
    np.testing.assert_allclose(manifest["log_prior"], np.log(p.mean(axis=0)), rtol=1e-6)


def test_steps_that_are_done_are_skipped(small_run: steps.Run):
    again = steps.Run(small_run.recipe)
    for name in ("prepare", "label", "train", "certify"):
        assert again.execute(name).seconds is None, name


def test_a_changed_setting_runs_the_steps_that_depend_on_it(small_run: steps.Run):
    other = steps.Run(
        small_recipe(Path(small_run.recipe.output), "certify.guarantee=selective_agreement")
    )
    assert other.execute("train").seconds is None
    before = json.loads((small_run.path("certify") / "bundle.json").read_text())
    assert other.execute("certify").seconds is not None
    after = json.loads((small_run.path("certify") / "bundle.json").read_text())
    assert after["served_guarantee"] == "selective_agreement"
    assert len(after["ledger"]) == len(before["ledger"]) + 1
    assert small_run.execute("certify").seconds is not None


def test_keys_that_came_after_certifying_are_in_the_bundle_that_is_served(small_run: steps.Run):
    bundle = small_run.path("certify")
    before = {name: (bundle / name).read_bytes() for name in ("bundle.json", "recipe.json")}
    changes = ("cascade.api_keys=/etc/keys", "teacher.price.per_million_prompt_tokens=2")
    later = steps.Run(small_recipe(Path(small_run.recipe.output), *changes)).execute("certify")
    assert later.seconds is None and "cascade.api_keys" in later.note
    served = json.loads((bundle / "recipe.json").read_text())
    assert served["cascade"]["api_keys"] == "/etc/keys"
    assert (bundle / "bundle.json").read_bytes() == before["bundle.json"]
    small_run.execute("certify")
    assert (bundle / "recipe.json").read_bytes() == before["recipe.json"]


def test_labels_of_another_prompt_are_refused_with_the_difference(small_run: steps.Run):
    other = steps.Run(small_recipe(Path(small_run.recipe.output), "labels.target=Q {{ text }}"))
    with pytest.raises(DataError, match=r"(?s)made otherwise:.*labels\.target: there.*--new"):
        other.execute("label")
    assert small_run.execute("label").seconds is None


def test_the_cascade_answers_over_http_as_certified_and_the_report_shows_it(
    small_run: steps.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Measuring has a key of its own, which the limits of others are not for."""
    (tmp_path / "keys").write_text(keys.line_of("shop", keys.new_key(), per_minute=1))
    monkeypatch.setenv("JOURNEYMAN_API_KEYS", str(tmp_path / "keys"))
    served = small_run.execute("measure").manifest
    assert served["hardware"]["cpus"] == ray.cluster_resources()["CPU"]
    data = summary.report_data(small_run)
    assert served["requests"] == len(data.test) == 40
    assert served["answered_by_student"] == data.test.accepted.mean()
    assert served["student_rows_per_s"] > served["teacher_rows_per_s"]
    page = Path(small_run.execute("report").manifest["page"]).read_text()
    table = summary.table(data.summary)
    for row in data.summary:
        assert row.value in page and row.value in table
    agreement = 1 - data.test.differs.mean()
    assert f"{agreement:.3f}" in table


def shards_done(run: Path) -> int:
    return len(list((run / "labels" / "commits").glob("*.json")))


def processes_of(output: Path) -> list[psutil.Process]:
    """Engine cores and Ray workers that a killed command may have left behind."""
    found = []
    for process in psutil.process_iter():
        try:
            named = " ".join(process.cmdline())
            if "VLLM::" in named and str(output) in process.environ().get("JOURNEYMAN_TEST", ""):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.slow  # two engines; tests/chaos has a short one of it
def test_killed_run_finishes_without_losing_or_doubling_rows(tmp_path: Path):
    """SIGKILL in the middle of labeling; the same command then completes the labels."""
    run = tmp_path / "small"
    arguments = [str(DEMO), *(f"--set={s}" for s in (*SMALL, f"output={tmp_path}"))]
    marked = {**os.environ, "JOURNEYMAN_TEST": str(tmp_path)}
    assert journeyman("prepare", *arguments).returncode == 0
    command = [sys.executable, "-m", "journeyman.cli", "label", *arguments]
    killed = subprocess.Popen(command, cwd=ROOT, env=marked, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not shards_done(run) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    n_shards = len(corpus.read_manifest(run / "corpus")["shards"])
    assert 0 < shards_done(run) < n_shards
    committed = {p.name: p.read_bytes() for p in (run / "labels" / "commits").iterdir()}
    while processes_of(tmp_path) and time.monotonic() < deadline + 30:
        time.sleep(0.5)
    assert processes_of(tmp_path) == []  # no engine lives on, holding memory and cores

    finished = journeyman("label", *arguments)
    assert finished.returncode == 0, finished.stderr
    for name, content in committed.items():
        assert (run / "labels" / "commits" / name).read_bytes() == content
    wanted = [
        row_id
        for shard in corpus.read_manifest(run / "corpus")["shards"]
        for row_id in corpus.read_shard(run / "corpus", shard["name"])["id"].to_pylist()
    ]
    assert dataset.read(run / "labels")["id"].to_pylist() == wanted


def test_filters_change_what_readers_see_and_ask_the_teacher_nothing(small_run: steps.Run):
    labels = small_run.path("label")
    before, commits = dataset.read(labels), LabelStore(labels).commits()
    filtered = steps.Run(
        small_recipe(Path(small_run.recipe.output), "labels.filters={matches_gold: true}")
    )
    assert filtered.execute("label").seconds is not None
    assert filtered.execute("label").seconds is None
    left = dataset.read(labels)
    manifest = LabelStore(labels).manifest()
    assert 0 < len(left) == len(before) - manifest["filtered"]["rows"] < len(before)
    assert LabelStore(labels).commits() == commits
    rows = dataset.read_classes(labels, small_run.path("prepare"))
    right, train = rows.logprobs.argmax(axis=1) == rows.gold, rows.splits == "train"
    assert right[train].all() and not right[~train].all()  # held-out rows all stay
    small_run.execute("label")
    assert dataset.read(labels).equals(before)


@pytest.mark.slow  # an engine of its own
def test_an_estimate_prices_a_run_and_writes_nothing(ray_cluster: None, tmp_path: Path):
    run = steps.Run(small_recipe(tmp_path, "teacher.price={per_million_prompt_tokens: 5}"))
    run.execute("prepare")
    got = run.estimate(12)
    assert (got.rows, got.sampled, got.quarantined) == (190, 12, 0)
    assert got.prompt_tokens[0] > 190 * 4 * 20  # four prompts a row, of more than 20 tokens
    assert got.dollars is not None
    assert got.dollars[0] == pytest.approx(got.prompt_tokens[0] * 5 / 1e6, rel=1e-3)
    assert not run.path("label").exists()


def test_an_estimate_of_a_finished_dataset_says_so(small_run: steps.Run):
    with pytest.raises(DataError, match="every row is labeled already"):
        small_run.estimate(10)

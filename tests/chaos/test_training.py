"""Whatever is killed in mid-epoch: the student is the one of a training that nobody disturbed."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from journeyman.mirror import copy_of
from journeyman.student.checkpoints import Checkpoints, read_curve
from tests.chaos import labeling, training
from tests.chaos import nodes as nodes_script
from tests.chaos.training import N_STEPS, PER_EPOCH, Disturbed, assert_same
from tests.conftest import ROOT, small_disk
from tests.journeyman.labels.object_server import Faults, serving

EQUAL = 1e-6  # as many workers: the same sums in the same order
# Another number of workers adds up in another order, and Adam carries that on.
AS_GOOD_AS_EQUAL = 2e-4


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in training.SHORT_WAITS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow  # a killed driver of a classifier is in student/test_loop.py, which is not
@pytest.mark.parametrize("student", ["causal", "classifier"])
@pytest.mark.parametrize("killed", ["driver", "worker", "node"])
def test_a_training_that_is_killed_in_mid_epoch_ends_with_the_same_student(
    tmp_path: Path, killed: str, student: str
):
    with labeling.cluster(2, tmp_path) as nodes:
        disturbed = Disturbed(tmp_path, student, nodes)
        try:
            disturbed.at_step(PER_EPOCH + 5)
            step = disturbed.kill(killed)
            if killed == "node":
                nodes.replace_dead_node()
            disturbed.command.wait(240)
        finally:
            disturbed.command.stop()
        undisturbed = training.train_undisturbed(tmp_path, student, nodes.address)
    expected = [-signal.SIGKILL, 0] if killed == "driver" else [0]
    assert disturbed.command.statuses == expected, disturbed.command.log()
    print(f"killed {killed} at step {step} of {N_STEPS}")
    assert_same(disturbed.run, undisturbed, EQUAL)


@pytest.mark.slow
def test_a_student_in_parts_on_two_workers_is_the_one_that_each_could_hold_whole(tmp_path: Path):
    """``training.parallel: fsdp`` over two nodes, one worker killed in mid-epoch."""
    with labeling.cluster(2, tmp_path) as nodes:
        disturbed = Disturbed(tmp_path, "causal", nodes, parallel="fsdp")
        try:
            disturbed.at_step(PER_EPOCH + 5)
            disturbed.kill("worker")
            disturbed.command.wait(240)
        finally:
            disturbed.command.stop()
        undisturbed = training.train_undisturbed(tmp_path, "causal", nodes.address)
    assert disturbed.command.statuses == [0], disturbed.command.log()
    assert_same(disturbed.run, undisturbed, AS_GOOD_AS_EQUAL)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["causal", "classifier"])
def test_nodes_that_share_a_store_and_no_disk_lose_one_and_end_with_the_same_student(
    tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch
):
    """5% of the store's calls fail."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("JOURNEYMAN_CACHE", str(cache))
    with (
        serving(monkeypatch) as (server, url),
        labeling.cluster(2, tmp_path, **{nodes_script.OWN_DISK: str(cache)}) as nodes,
    ):
        disturbed = Disturbed(tmp_path, student, nodes, store=(server, url))
        server.faults = Faults(share=0.05, random=random.Random(5))
        try:
            disturbed.at_step(PER_EPOCH + 5)
            disturbed.kill("node")
            nodes.replace_dead_node()
            disturbed.command.wait(400)
        finally:
            disturbed.command.stop()
        assert server.faults.met, "no call failed"
        server.faults = None
        assert disturbed.command.statuses == [0], disturbed.command.log()
        undisturbed = training.train_undisturbed(tmp_path, student, nodes.address)
        run = f"{url.removeprefix('s3://')}/disturbed"
        left = {key.removeprefix(f"{run}/").split("/")[0] for key in server.objects}
    assert left == {"corpus", "labels", "student"}
    assert not list(cache.rglob("checkpoints")), "the driver's disk was a worker's"
    assert_same(copy_of(f"{url}/disturbed"), undisturbed, EQUAL)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["causal", "classifier"])
def test_a_training_that_loses_a_node_goes_on_with_fewer_workers_and_grows_back(
    tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JOURNEYMAN_TEST_STEP_S", "0.4")
    with labeling.cluster(2, tmp_path) as nodes:
        disturbed = Disturbed(tmp_path, student, nodes, min_workers=1)
        try:
            disturbed.at_step(PER_EPOCH // 2, workers=2)
            disturbed.kill("node")
            nodes.have(1)
            disturbed.at_step(PER_EPOCH + 5, workers=1)
            nodes.have(2)
            disturbed.at_step(PER_EPOCH + 6, workers=2)
            disturbed.command.wait(240)
        finally:
            disturbed.command.stop()
        undisturbed = training.train_undisturbed(tmp_path, student, nodes.address)
    assert disturbed.command.statuses == [0], disturbed.command.log()
    assert "1 of its workers missing" in disturbed.command.log()
    curve = read_curve(disturbed.run / "student" / "training.jsonl")
    workers = [record["workers"] for record in curve if record["kind"] == "steps"]
    changes = [n for before, n in zip([0, *workers], workers, strict=False) if n != before]
    assert changes == [2, 1, 2]
    assert_same(disturbed.run, undisturbed, AS_GOOD_AS_EQUAL)


@pytest.mark.slow
def test_a_training_may_go_on_with_other_workers_than_it_began_with(tmp_path: Path):
    with labeling.cluster(2, tmp_path) as nodes:
        disturbed = Disturbed(tmp_path, "causal", nodes)
        disturbed.at_step(PER_EPOCH + 5)
        disturbed.command.stop()
        fewer = labeling.journeyman(
            tmp_path, "train", str(tmp_path / "disturbed.yaml"), "--set=training.workers=1",
            "--set=training.accumulate=2", f"--set=cluster.address={nodes.address}",
        )  # fmt: skip
        assert fewer.returncode == 0, fewer.stderr
        undisturbed = training.train_undisturbed(tmp_path, "causal", nodes.address)
    curve = read_curve(disturbed.run / "student" / "training.jsonl")
    workers = [record["workers"] for record in curve if record["kind"] == "steps"]
    assert workers[0] == 2 and workers[-1] == 1
    record = json.loads((disturbed.run / "student" / "journeyman.json").read_text())
    assert record["steps"] == N_STEPS
    assert_same(disturbed.run, undisturbed, AS_GOOD_AS_EQUAL)


def fill(disk: Path, until_ended: subprocess.Popen[str]) -> None:
    """Leave no room: also not what a training frees."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        while until_ended.poll() is None:
            with contextlib.suppress(OSError):
                filler.write(bytes(4096))
                continue
            time.sleep(0.01)


@pytest.mark.slow
def test_a_full_disk_stops_a_training_in_one_sentence_and_room_lets_it_go_on(tmp_path: Path):
    with (
        small_disk(tmp_path / "disk", "16m") as disk,
        labeling.cluster(1, disk) as nodes,
    ):
        recipe = training.write_run(disk, "causal", "disturbed", workers=1)
        arguments = ["train", str(recipe), f"--set=cluster.address={nodes.address}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "journeyman.cli", *arguments],
            cwd=ROOT, env=labeling.environment(disk), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        labeling.until(lambda: list(disk.glob("disturbed/.student-work-*/checkpoints/step-*")), 150)
        fill(disk, process)
        _, said = process.communicate()
        assert process.returncode == 1 and "Traceback" not in said
        assert said.splitlines()[-1].startswith("journeyman: ") and "the disk is full; " in said
        (work,) = disk.glob("disturbed/.student-work-*")
        (disk / "filler").unlink()
        latest = Checkpoints(work, "").latest()
        assert latest is not None and 0 < latest.step < N_STEPS
        AutoModelForCausalLM.from_pretrained(Checkpoints(work, "").model(latest.step))
        again = labeling.journeyman(disk, *arguments)
        assert again.returncode == 0, again.stderr
        undisturbed = training.train_undisturbed(disk, "causal", nodes.address, workers=1)
        assert_same(disk / "disturbed", undisturbed, EQUAL)

"""Curves in TensorBoard, MLflow and Weights & Biases, read back by their own readers, and the live
figures as Prometheus reads them."""

from __future__ import annotations

import importlib
import itertools
import json
import pickle
import struct
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from journeyman.errors import ClusterError, RecipeError
from journeyman.folder import Folder
from journeyman.mirror import Mirror
from journeyman.models import Model
from journeyman.student import loop, trackers
from journeyman.student.checkpoints import Checkpoints
from journeyman.student.learner import Learner, Measured
from journeyman.student.lesson import Load
from journeyman.student.live import TrainProgress
from journeyman.student.told import Told
from journeyman.student.trackers import Tracked, Trackers
from tests.conftest import scraped
from tests.journeyman.labels.object_server import serving

from .conftest import loader, make_recipe, make_rows

Curve = list[dict[str, Any]]
Series = dict[str, list[tuple[int, float]]]


def records(steps: Sequence[int]) -> Curve:
    """Of steps, each with an evaluation behind it."""
    curve: Curve = []
    for step in steps:
        curve.append({"kind": "steps", "step": step, "total_steps": 9, "loss": 1 / step,
                      "learning_rate": 0.1 * step, "seconds": 0.5})  # fmt: skip
        curve.append({"kind": "evaluation", "step": step, "agreement": step / 10, "kl": None})
    return curve


def opened(name: str, folder: Path, memory: str, curve: Curve) -> Trackers:
    settings = {"epochs": 3, "trackers": [name]}
    return Trackers([name], "tiny", folder, settings, folder / memory, curve)


def tell(name: str, folder: Path) -> None:
    """A run that is killed behind step 3 of which the checkpoint has 2; then twice again, the
    second time killed earlier than it had been before; and another run in the same folder."""
    first = opened(name, folder, "memory", [])
    for record in records([1, 2, 3]):
        first.record(record)
    again = opened(name, folder, "memory", records([1, 2]))
    again.record(records([3])[0])
    last = opened(name, folder, "memory", records([1, 2]))
    for record in records([3, 4, 5]):
        last.record(record)
    last.record({"kind": "stopped", "step": 5, "best_step": 4})
    last.close(finished=True)
    other = opened(name, folder, "others", [])
    other.record({"kind": "steps", "step": 7, "loss": 9.0})
    other.close(finished=False)


EXPECTED = {
    "train/loss": [(step, pytest.approx(1 / step)) for step in range(1, 6)],
    "train/learning_rate": [(step, pytest.approx(0.1 * step)) for step in range(1, 6)],
    "train/seconds": [(step, 0.5) for step in range(1, 6)],
    "evaluation/agreement": [(step, pytest.approx(step / 10)) for step in range(1, 6)],
}


def tensorboard_runs(folder: Path) -> list[Series]:
    """Every folder of event files, as TensorBoard reads them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = []
    for run in sorted((folder / "tensorboard").iterdir()):
        events = reader.EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        found.append({
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        })  # fmt: skip
    return sorted(found, key=len, reverse=True)


def test_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tell("tensorboard", tmp_path)
    first, other = tensorboard_runs(tmp_path)
    assert first == EXPECTED
    assert other == {"train/loss": [(7, 9.0)]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What a tracker's server was told, of which run."""
    said: list[tuple[str, int]] = []

    class Client:
        def __init__(self, tracked: Tracked) -> None:
            self._id = tracked.id

        def log(self, step: int, values: Mapping[str, float]) -> None:
            said.extend((self._id, step) for name in values if name == "train/loss")

        def close(self, finished: bool) -> None: ...

    name = "journeyman.student.trackers.wandb"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(start=Client))
    return said


def started(run: Mirror) -> tuple[Trackers, Told]:
    """As rank 0 begins on a node, with no checkpoint of the run."""
    work = run.below(".student-work")
    held = Checkpoints.claim(work)
    held.start_curve(0)
    assert work.url
    kept = Told(work.local, work.url, every_s=0.01)
    names, memory = ["tensorboard", "wandb"], work.local / "trackers"
    return Trackers(names, "tiny", run.local, {}, memory, [], kept.changed), kept


def test_of_a_run_in_a_store_another_node_tells_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: list[tuple[str, int]]
) -> None:
    """Killed before its first checkpoint."""
    pytest.importorskip("tensorboard")
    with serving(monkeypatch) as (_, url):
        for node, steps in (("one", [1, 2, 3]), ("other", [1, 2, 3, 4, 5])):
            told, kept = started(Mirror(local=tmp_path / node, url=url))
            for record in records(steps):
                told.record(record)
            if node == "other":
                told.close(finished=True)
            kept.close()
        run = Folder(url)
        for item in run.walk("tensorboard"):
            run.get_file(item.name, tmp_path / "all" / item.name, item.size)
    assert tensorboard_runs(tmp_path / "all") == [EXPECTED]
    assert server == [(server[0][0], step) for step in range(1, 6)]


def test_a_store_that_fails_neither_holds_up_a_step_nor_costs_a_tracker(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And where the run goes on on the same node, nothing is told twice that the store missed."""
    run, put, fails = Mirror(local=tmp_path / "run"), Folder.put, threading.Event()

    def unsteady(folder: Folder, name: str, content: bytes) -> None:
        if fails.is_set() and "attempt" not in name:
            raise ClusterError("memory://: cannot be written; mend that.")
        put(folder, name, content)

    monkeypatch.setattr(Folder, "put", unsteady)
    with serving(monkeypatch) as (_, url):
        run = Mirror(local=tmp_path / "run", url=url)
        told, kept = started(run)
        told.record(records([1])[0])
        while not (has := Folder(url).has(".student-work/trackers/told-wandb")):
            time.sleep(0.005)
        fails.set()
        for record in records([2, 3]):
            told.record(record)
        kept.close()  # the process is killed
        assert has and "mend that. Until then TensorBoard's newest" in capsys.readouterr().err
        fails.clear()
        again, kept = started(run)
        for record in records([1, 2, 3, 4]):
            again.record(record)
        kept.close()
        listed = Folder(url).get(".student-work/trackers/told-wandb").decode().split("\n")
    assert server == [(server[0][0], step) for step in range(1, 5)]
    assert {f"steps {step}" for step in range(1, 5)} < set(listed)


def test_mlflow_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tell("mlflow", tmp_path)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    other, first = client.search_runs([experiment.experiment_id])
    found = {
        name: [(m.step, m.value) for m in client.get_metric_history(first.info.run_id, name)]
        for name in first.data.metrics
    }
    assert found == EXPECTED
    assert first.data.params["epochs"] == "3" and first.info.status == "FINISHED"
    assert other.data.metrics == {"train/loss": 9.0} and other.info.status == "FAILED"


def test_wandb_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell("wandb", tmp_path)
    found: dict[str, Series] = {}
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        run = path.stem.removeprefix("run-")
        for step, values in wandb_history(path):
            for name, value in values.items():
                found.setdefault(run, {}).setdefault(name, []).append((step, value))
    first, other = sorted(found.values(), key=len, reverse=True)
    assert first == EXPECTED
    assert other == {"train/loss": [(7, 9.0)]}


def wandb_history(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Our own values of each record in a run's file."""
    from wandb.proto import wandb_internal_pb2

    history = []
    for data in leveldb_records(path.read_bytes()[7:]):  # behind wandb's own header
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            ours = {k: v for k, v in values.items() if k.startswith(("train/", "evaluation/"))}
            history.append((values["step"], ours))
    return history


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: parts of 7 bytes (crc, length, kind) and content, none over the end
    of a block of 32 KiB; the first block is 7 bytes shorter here."""
    place, record = 0, b""
    while place + 7 <= len(data):
        left = (1 << 15) - (place + 7) % (1 << 15)
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


class _Broken:
    """Fails at its second record."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)
        if len(self.steps) > 1:
            raise ConnectionError("no route to the server\nTraceback")

    def close(self, finished: bool) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = _Broken()
    module = types.SimpleNamespace(start=lambda _: broken)
    monkeypatch.setitem(sys.modules, "journeyman.student.trackers.wandb", module)
    told = opened("wandb", tmp_path, "memory", [])
    for record in records([1, 2, 3]):
        told.record(record)
    told.close(finished=True)
    assert broken.steps == [1, 1]
    (said,) = capsys.readouterr().err.splitlines()
    assert "wandb failed (ConnectionError: no route to the server)" in said


def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name)
    )
    with pytest.raises(RecipeError, match="mlflow needs the package mlflow; pip install mlflow"):
        trackers.check(["tensorboard", "mlflow"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """A training whose second and last evaluation begins when Prometheus has read the first."""

    result: loop.TrainResult
    folder: Path
    live: TrainProgress  # what the live line said meanwhile
    scraped: dict[str, float]


@pytest.fixture(scope="module")
def followed(
    ray_cluster: None, tiny_encoder: Model, tmp_path_factory: pytest.TempPathFactory
) -> Followed:
    folder = tmp_path_factory.mktemp("followed")
    rows, is_read = folder / "rows.pickle", folder / "read"
    rows.write_bytes(pickle.dumps(make_rows(n_train=60, n_calibrate=20)))
    recipe = make_recipe(epochs=2, workers=1, trackers=["tensorboard"])
    recipe = recipe.model_copy(update={"name": "followed"})
    live: list[TrainProgress] = []
    reads: list[dict[str, float]] = []

    def look(progress: TrainProgress) -> None:
        """Until Prometheus has what the live line says, or a minute is over."""
        if not progress.evaluating or progress.step < progress.total_steps or live:
            return
        live.append(progress)
        deadline = time.monotonic() + 60
        # Twice the same, as the first read may have been in the midst of an export.
        while not (reads[1:] and reads[-1] == reads[-2] and reads[-1].get("step") == progress.step):
            reads.append(scraped("ray_journeyman_train_", "followed"))
            if time.monotonic() > deadline:
                break
            time.sleep(1)
        is_read.touch()

    result = loop.train(
        recipe, waiting(loader(recipe, tiny_encoder.path, rows), is_read), tiny_encoder,
        folder / "student", inputs="followed", labels_digest="labels", on_progress=look,
    )  # fmt: skip
    return Followed(result=result, folder=folder, live=live[0], scraped=reads[-1])


def waiting(load: Load, is_read: Path) -> Load:
    """The same student, but its second evaluation waits for a file."""

    def waits(folder: Path | None, device: torch.device) -> Learner:
        learner = load(folder, device)
        evaluate, number = learner.evaluate, itertools.count(1)

        def when_read(*given: Any) -> Measured:
            deadline = time.monotonic() + 90
            late = next(number) == 2
            while late and not is_read.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            return evaluate(*given)

        learner.evaluate = when_read
        return learner

    return waits


@pytest.mark.slow
def test_a_training_is_followed_from_its_first_step_to_its_last(followed: Followed) -> None:
    pytest.importorskip("tensorboard")
    result = followed.result
    (found,) = tensorboard_runs(followed.folder)
    assert [step for step, _ in found["train/loss"]] == list(range(1, result.steps + 1))
    for name in ("learning_rate", "gradient_norm", "rows_per_s", "tokens_per_s"):
        assert len(found[f"train/{name}"]) == result.steps
        assert all(value >= 0 for _, value in found[f"train/{name}"])
    assert "train/mfu" not in found
    agreements = [e.agreement for e in result.evaluations]
    assert [v for _, v in found["evaluation/agreement"]] == pytest.approx(agreements)


@pytest.mark.slow
def test_prometheus_reads_what_the_live_line_says_and_the_newest_evaluation(
    followed: Followed,
) -> None:
    live, (first, _) = followed.live, followed.result.evaluations
    assert live.agreement == first.agreement
    # A classifier on a CPU has neither MFU nor perplexity, and writes nothing.
    assert followed.scraped == {
        "step": live.step,
        "total_steps": live.total_steps,
        "epoch": live.epoch,
        "loss": live.loss,
        "rows_per_second": live.rows_per_s,
        "tokens_per_second": live.tokens_per_s,
        "eta_seconds": live.eta_s,
        "missing_workers": live.missing_workers,
        "agreement": first.agreement,
        "kl": first.kl,
        "accuracy": first.gold_accuracy,
        "calibration_error": first.calibration_error,
        "gold_calibration_error": first.gold_calibration_error,
    }

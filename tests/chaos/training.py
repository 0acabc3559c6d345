"""``journeyman train`` on finished labels of a tiny student, while its processes are killed."""

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from journeyman import models
from journeyman.recipe import parse
from journeyman.student.checkpoints import read_curve
from tests.chaos.labeling import Cluster, Command, journeyman, processes, until
from tests.journeyman.labels import synthetic as made
from tests.journeyman.labels.object_server import ObjectServer
from tests.journeyman.student.conftest import (
    FILLERS,
    TOPICS,
    make_tiny_encoder,
    make_tiny_llama,
)

EPOCHS, PER_EPOCH, BATCH = 4, 30, 8
N_STEPS = EPOCHS * PER_EPOCH
N_TRAIN, N_CALIBRATE = PER_EPOCH * BATCH - 3, 20
# Of every process of a run: short waits, and steps that take as long as a kill does.
SHORT_WAITS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "JOURNEYMAN_TEST_RESIZE_S": "2",
    "JOURNEYMAN_TEST_STEP_S": "0.03",
}


Rows = list[tuple[dict[str, Any], Any]]  # corpus rows and what the teacher says of them


def write_run(
    folder: Path,
    kind: str,
    name: str,
    change: Callable[[Rows], Rows] = lambda rows: rows,
    **training: Any,
) -> Path:
    """A run's folder with finished labels for a student of this kind; returns its recipe."""
    student = folder / "student"
    if not student.exists():
        (make_tiny_encoder if kind == "classifier" else make_tiny_llama)(student)
        _drop_nothing(student)
    asked: dict[str, Any] = {"kind": "logits", "k": 3}
    if kind == "classifier":
        asked = {"classes": {t: f"the {t}" for t in TOPICS}, "prompt": "{{ text }}"}
    rows = change((_classes if kind == "classifier" else _logits)(random.Random(0)))
    recipe = _recipe(folder, kind, name, asked, training)
    codec = made.TOP3 if kind == "causal" else None
    store = made.write_dataset(
        folder / name, parse(recipe).labels, [rows[::2], rows[1::2]], codec=codec
    )
    identity = store.manifest()["identity"] | {"teacher": models.resolve(str(student)).identity}
    store.finish({"identity": identity, "filtered": {"inputs": "none", "file": None}})
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def _recipe(
    folder: Path, kind: str, name: str, labels: dict[str, Any], training: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "output": str(folder),
        "corpus": {"sources": ["rows.jsonl"]},
        "teacher": {"model": str(folder / "student")},
        "labels": labels,
        "student": {"kind": kind, "model": str(folder / "student"), "max_length": 16},
        "training": {
            "workers": 2,
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "learning_rate": 3e-3,
            "checkpoint_every_s": 0,
            **training,
        },
    }


def _drop_nothing(student: Path) -> None:
    """Dropout's draws depend on the number of workers."""
    config = json.loads((student / "config.json").read_text())
    none = {name: 0.0 for name in config if name.endswith("dropout_prob")}
    (student / "config.json").write_text(json.dumps(config | none))


def _splits() -> list[str]:
    return ["train"] * N_TRAIN + ["calibrate"] * N_CALIBRATE


def _classes(words: random.Random) -> Rows:
    rows = []
    for i, split in enumerate(_splits()):
        topic = words.randrange(len(TOPICS))
        said = [*words.choices(FILLERS, k=words.randrange(1, 9)),
                words.choice(list(TOPICS.values())[topic])]  # fmt: skip
        odds = np.where(np.arange(len(TOPICS)) == topic, 0.9, 0.05)
        rows.append((made.row(f"{' '.join(said)} {i}", split), made.classes(*odds)))
    return rows


def _logits(words: random.Random) -> Rows:
    rows = []
    for i, split in enumerate(_splits()):
        tokens = [words.randrange(3, 48) for _ in range(words.randrange(4, 12))]
        source = made.row(" ".join(f"w{t - 3}" for t in tokens), split)
        said = made.logits(tokens, made.distributions(len(tokens) - 1, seed=i))
        rows.append((source | {"id": f"{i:032x}"}, replace(said, n_prompt_tokens=len(tokens))))
    return rows


def train_undisturbed(folder: Path, kind: str, address: str, **training: Any) -> Path:
    """The same training in a run of its own; returns its folder."""
    recipe = write_run(folder, kind, "undisturbed", **training)
    done = journeyman(folder, "train", str(recipe), f"--set=cluster.address={address}",
                      JOURNEYMAN_TEST_STEP_S="0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "undisturbed"


class Disturbed:
    """A training in a process of its own, whose processes can be killed at a step."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        cluster: Cluster,
        store: tuple[ObjectServer, str] | None = None,
        **training: Any,
    ) -> None:
        """store: where the run lies then, in place of the folder."""
        self.run = folder / "disturbed"
        self._folder, self._cluster, self._store = folder, cluster, store
        recipe = write_run(folder, kind, "disturbed", **training)
        settings = [f"--set=cluster.address={cluster.address}"]
        if store:
            server, url = store
            for file in filter(Path.is_file, self.run.rglob("*")):
                key = f"{url.removeprefix('s3://')}/disturbed/{file.relative_to(self.run)}"
                server.objects[key] = file.read_bytes()
            settings.append(f"--set=output={url}")
        self.command = Command(folder, "train", str(recipe), *settings)

    def curve(self) -> list[dict[str, Any]]:
        """Of the run that is under way; of one in a store, as of its last checkpoint."""
        if self._store:
            keys = [key for key in list(self._store[0].objects)
                    if key.endswith("/training.jsonl") and "/.student-work-" in key]  # fmt: skip
            lines = [line for key in keys for line in self._store[0].objects[key].splitlines()]
            return [r for r in map(json.loads, lines) if r["kind"] == "steps"]
        for work in self.run.glob(".student-work-*"):
            with contextlib.suppress(FileNotFoundError):
                return [r for r in read_curve(work / "training.jsonl") if r["kind"] == "steps"]
        return []

    def at_step(self, step: int, workers: int | None = None) -> None:
        """Wait until that step is done (by so many workers)."""

        def reached() -> bool:
            assert not self.command.statuses, self.command.log()
            newest = self.curve()[-1:]
            return bool(newest) and newest[0]["step"] >= step and (
                workers in (None, newest[0]["workers"])
            )  # fmt: skip

        until(reached, 240, 0.01)

    def kill(self, kind: str) -> int:
        """SIGKILL one; returns the step that was the newest then."""
        pid = {
            "driver": lambda: self.command.process.pid,
            "worker": lambda: random.choice(self.workers()).pid,
            "node": self._raylet,
        }[kind]()
        step = self.curve()[-1]["step"]
        os.kill(pid, signal.SIGKILL)
        assert step % PER_EPOCH and step < N_STEPS, "not in mid-epoch"
        return step

    def workers(self) -> list[psutil.Process]:
        return processes(self._folder, "RayTrainWorker")

    def _raylet(self) -> int:
        """Of a node that has a worker."""
        parents = {p.pid for p in random.choice(self.workers()).parents()}
        (raylet,) = parents & set(self._cluster.raylets)
        return raylet


def losses(run: Path) -> dict[int, float]:
    """Of each optimizer step, from an exported student's curve, which has each step once."""
    records = [r for r in read_curve(run / "student" / "training.jsonl") if r["kind"] == "steps"]
    assert [r["step"] for r in records] == list(range(1, N_STEPS + 1))
    return {r["step"]: r["loss"] for r in records}


def evaluations(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "student" / "journeyman.json").read_text())["evaluations"]


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "student" / "model.safetensors")


def assert_same(run: Path, other: Path, tolerance: float) -> None:
    """Loss curves, evaluations and weights; absolute, in nats."""
    ours, theirs = losses(run), losses(other)
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=tolerance)
    for one, another in zip(evaluations(run), evaluations(other), strict=True):
        assert one["step"] == another["step"]
        np.testing.assert_allclose(one["kl"], another["kl"], atol=tolerance)
    mine, wanted = weights(run), weights(other)
    assert mine.keys() == wanted.keys()
    for name, value in mine.items():
        np.testing.assert_allclose(value, wanted[name], atol=tolerance, err_msg=name)

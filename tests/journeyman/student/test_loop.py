"""Training end to end: Ray Train, two workers on gloo, a tiny BERT."""

from __future__ import annotations

import dataclasses
import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from journeyman.errors import ClusterError, DataError
from journeyman.models import Model
from journeyman.student import checkpoints, export, loop, worker
from journeyman.student.lesson import Task, load
from journeyman.student.live import TrainProgress
from journeyman.student.models import Classifier
from journeyman.student.place import Place

from ..test_probabilities import calibration_error_by_loop
from .conftest import TOPICS, loader, make_recipe, make_rows

# Many short epochs: a run that can be killed between two checkpoints.
RECIPE = make_recipe(epochs=10, gold_weight=0.2, evaluate_every=4)
ROWS = make_rows(n_train=131, n_calibrate=30)
N_STEPS = 10 * 9


@pytest.fixture(scope="module", autouse=True)
def impatient_ray_train() -> Iterator[None]:
    """Ray Train takes one report in two seconds; these epochs take a tenth of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        yield


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.pickle"
    path.write_bytes(pickle.dumps(ROWS))
    return path


@pytest.fixture(scope="module")
def progress() -> list[TrainProgress]:
    return []


@pytest.fixture(scope="module")
def trained(
    ray_cluster: None,
    tiny_encoder: Model,
    rows_file: Path,
    progress: list[TrainProgress],
    tmp_path_factory: pytest.TempPathFactory,
) -> loop.TrainResult:
    return loop.train(
        RECIPE,
        loader(RECIPE, tiny_encoder.path, rows_file),
        tiny_encoder,
        tmp_path_factory.mktemp("trained") / "student",
        inputs="abc",
        labels_digest="labels",
        on_progress=progress.append,
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def curve(folder: Path) -> list[dict[str, Any]]:
    """The records of training.jsonl without what a clock says."""
    lines = (folder / "training.jsonl").read_text().splitlines()
    clock = {"seconds", "rows_per_s", "tokens_per_s"}
    return [{k: v for k, v in json.loads(li).items() if k not in clock} for li in lines]


def test_student_learns_its_teacher(trained: loop.TrainResult) -> None:
    assert trained.best.agreement > 0.9
    assert trained.best.gold_accuracy is not None and trained.best.gold_accuracy > 0.9
    assert trained.steps == N_STEPS and trained.n_rows == 131 and trained.world_size == 2
    probabilities = _softmax(Classifier.load(trained.path).logits(ROWS.split("calibrate").texts))
    teacher, gold = ROWS.split("calibrate").logprobs.argmax(axis=1), ROWS.split("calibrate").gold
    known = gold >= 0
    assert [trained.best.calibration_error, trained.best.gold_calibration_error] == pytest.approx(
        [
            calibration_error_by_loop(probabilities, teacher, 15),
            calibration_error_by_loop(probabilities[known], gold[known], 15),
        ],
        abs=1e-5,
    )
    assert [e.step for e in trained.evaluations] == [*range(4, N_STEPS, 4), N_STEPS]
    ranked = sorted(trained.evaluations, key=lambda e: (-e.agreement, e.kl))
    assert trained.best == ranked[0]
    steps = [r for r in curve(trained.path) if r["kind"] == "steps"]
    assert [r["step"] for r in steps] == list(range(1, N_STEPS + 1))
    assert np.mean([r["loss"] for r in steps[-5:]]) < 0.5 * steps[0]["loss"]


def test_progress_reaches_the_driver(
    trained: loop.TrainResult, progress: list[TrainProgress]
) -> None:
    assert progress[-1].step == progress[-1].total_steps == N_STEPS
    assert progress[-1].agreement == pytest.approx(trained.evaluations[-1].agreement)
    assert "epoch 10/10, step 90/90, loss" in progress[-1].text()


def test_export_needs_nothing_of_ours(trained: loop.TrainResult, tmp_path: Path) -> None:
    texts = ["my loan", "how do i need the bread with salt please", "what engine"]
    script = tmp_path / "plain.py"
    script.write_text(
        "import json, sys, torch\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "batch = tokenizer(json.loads(sys.argv[2]), padding=True, return_tensors='pt')\n"
        "assert 'journeyman' not in sys.modules\n"
        "with torch.no_grad():\n"
        "    print(json.dumps([model(**batch).logits.tolist(), model.config.id2label]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(trained.path), json.dumps(texts)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    logits, names = json.loads(done.stdout)
    student = Classifier.load(trained.path)
    assert tuple(names.values()) == student.labels == tuple(TOPICS)
    np.testing.assert_allclose(student.logits(texts, batch_size=2), logits, atol=1e-5)


def test_export_says_where_it_comes_from(trained: loop.TrainResult, tiny_encoder: Model) -> None:
    record = json.loads((trained.path / "journeyman.json").read_text())
    assert record["inputs"] == "abc" and record["labels"] == "labels"
    assert record["recipe"] == RECIPE.hash and record["parent"] == tiny_encoder.identity
    assert record["best"] == dataclasses.asdict(trained.best)
    card = (trained.path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model: test/tiny" in card
    assert f"{trained.best.agreement:.3f}" in card and "test/teacher" in card
    assert not list(trained.path.parent.glob(".student-work-*"))


KILLED = """
import sys
from pathlib import Path
import ray
from journeyman.student import loop
from tests.journeyman.student import conftest
from tests.journeyman.student.test_loop import RECIPE
from journeyman.models import Model

rows, encoder, out = map(Path, sys.argv[1:])
model = Model(reference="test/tiny", path=encoder, weights_digest="w", tokenizer_digest="t",
              size_bytes=1)
ray.init(num_cpus=2, include_dashboard=False)
load = conftest.loader(RECIPE, encoder, rows)
loop.train(RECIPE, load, model, out, inputs="killed", labels_digest="labels")
"""


def test_killed_run_goes_on_as_if_it_had_not_been(
    trained: loop.TrainResult, tiny_encoder: Model, rows_file: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "student", tmp_path / ".student-work-killed"
    driver = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(rows_file), str(tiny_encoder.path), str(out)],
    )
    deadline = time.monotonic() + 120
    while not list(work.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        assert driver.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()

    # Its workers live on for a moment, and must not write behind what is torn here.
    checkpoints.Checkpoints.claim(work)
    # A checkpoint cut short, and a curve that is ahead of the checkpoint and ends in half a line.
    torn = work / "checkpoints" / ".step-00000089.0.tmp"
    torn.mkdir()
    with (work / "training.jsonl").open("a") as file:
        file.write('{"kind": "steps", "step": 89, "loss": 99')

    resumed = loop.train(
        RECIPE,
        loader(RECIPE, tiny_encoder.path, rows_file),
        tiny_encoder,
        out,
        inputs="killed",
        labels_digest="labels",
    )
    assert 4 <= resumed.resumed_from_step < N_STEPS  # within an epoch, as a rule
    whole, continued = curve(trained.path), curve(out)
    assert [(r["kind"], r["step"]) for r in whole] == [(r["kind"], r["step"]) for r in continued]
    for a, b in zip(whole, continued, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.slow
def test_a_run_that_gets_no_better_stops_on_all_workers_and_stays_stopped(
    trained: loop.TrainResult,
    tiny_encoder: Model,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe(epochs=10, gold_weight=0.2, evaluate_every=2, patience=2)
    progress: list[TrainProgress] = []

    def train() -> loop.TrainResult:
        return loop.train(
            recipe,
            loader(recipe, tiny_encoder.path, rows_file),
            tiny_encoder,
            tmp_path / "student",
            inputs="patient",
            labels_digest="labels",
            on_progress=progress.append,
        )

    with monkeypatch.context() as patch:  # killed when all was done but the export
        patch.setattr(export, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train()
    assert progress[-1].stopped_early and ", stopped early\n" in progress[-1].text()
    older = tmp_path / ".student-work-older" / "checkpoints"  # of settings that were changed
    older.mkdir(parents=True)
    work = tmp_path / ".student-work-patient"
    before = (work / "training.jsonl").read_bytes()
    task = Task(
        training=recipe.training, checkpoints=checkpoints.Checkpoints.claim(work), load=None
    )
    with monkeypatch.context() as patch:  # a worker that Ray has started again
        alone = Place(rank=0, world_size=1, device=None)
        patch.setattr(Place, "of_ray_train", lambda: alone)
        state = worker.run(task)
    assert isinstance(state, checkpoints.State) and state.stopped_early

    assert older.exists()  # until there is another student
    result = train()
    assert not list(tmp_path.glob(".student-work-*"))
    assert (result.path / "training.jsonl").read_bytes() == before
    assert result.stopped_early and result.resumed_from_step == result.steps < N_STEPS
    ranks = [(e.agreement, -e.kl) for e in result.evaluations]
    assert ranks.index(max(ranks)) == len(ranks) - 3
    assert [e.step for e in result.evaluations] == list(range(2, result.steps + 1, 2))
    assert result.best.step == result.steps - 4
    records = curve(result.path)
    assert records[-1] == {
        "kind": "stopped", "step": result.steps, "best_step": result.best.step,
    }  # fmt: skip
    said = json.loads((result.path / "journeyman.json").read_text())
    assert said["stopped_early"] and said["steps"] == result.steps
    assert said["planned_steps"] == N_STEPS
    assert f"(stopped early, after step {result.steps})" in (result.path / "README.md").read_text()
    # Evaluating more often changes nothing of what is learned.
    losses = [r["loss"] for r in records if r["kind"] == "steps"]
    others = [r["loss"] for r in curve(trained.path) if r["kind"] == "steps"]
    assert losses == pytest.approx(others[: len(losses)], abs=1e-6)


@pytest.mark.slow
def test_a_row_that_is_no_number_stops_the_run_by_name(
    ray_cluster: None, tiny_encoder: Model, tmp_path: Path
) -> None:
    rows = make_rows(n_train=20, n_calibrate=4)
    rows.logprobs[13] = np.nan
    (tmp_path / "rows.pickle").write_bytes(pickle.dumps(rows))
    recipe = make_recipe(max_failures=2)
    with pytest.raises(DataError, match=r"step \d of 8: the loss is nan for the rows row-13; "):
        loop.train(
            recipe,
            loader(recipe, tiny_encoder.path, tmp_path / "rows.pickle"),
            tiny_encoder,
            tmp_path / "student",
            inputs="nan",
            labels_digest="labels",
        )
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("empty", ["train", "calibrate"])
def test_empty_split_is_named(empty: str, tiny_encoder: Model, tmp_path: Path) -> None:
    rows = make_rows(n_train=0 if empty == "train" else 5, n_calibrate=5 * (empty == "train"))
    (tmp_path / "rows.pickle").write_bytes(pickle.dumps(rows))
    recipe = make_recipe()
    task = Task(
        training=recipe.training,
        checkpoints=checkpoints.Checkpoints.claim(tmp_path),
        load=loader(recipe, tiny_encoder.path, tmp_path / "rows.pickle"),
    )
    with pytest.raises(DataError, match=f"has no {empty} rows"):
        load(task, None, torch.device("cpu"))


def test_a_controller_that_ray_loses_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayActorError

    class Lost:
        def __init__(self, *_: object, **__: object) -> None: ...

        def fit(self) -> None:
            raise RayActorError(error_msg="The actor died unexpectedly.\nmore of it")

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Lost)
    claimed = checkpoints.Checkpoints.claim(tmp_path / "work")
    task = Task(training=RECIPE.training, checkpoints=claimed, load=None)
    with pytest.raises(ClusterError, match=r"work: Ray lost the training \(The actor died"):
        loop._fit(task, tmp_path / "work")

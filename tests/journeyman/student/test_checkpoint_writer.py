"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import MambaConfig, MambaForCausalLM

from journeyman.errors import ClusterError, DataError, JourneymanError
from journeyman.models import Model
from journeyman.student import batches, token_dataset, token_rows, worker
from journeyman.student.causal_learner import Causal
from journeyman.student.checkpoints import Checkpoints, State, read_curve
from journeyman.student.journal import Journal
from journeyman.student.lesson import Lesson, Task, load, prepare
from journeyman.student.plan import Plan
from journeyman.student.token_dataset import TokenRow

from .conftest import VOCABULARY
from .test_worker import ALONE, classifying, model_of, writing


class Gate:
    """Holds checkpoints up between their snapshot and the disk; counts those that are there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.inside, self.most_inside, self.saved = 0, 0, []
        save = Checkpoints.save

        def held(checkpoints: Checkpoints, state: State, *rest: Any) -> None:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            self.reached.set()
            assert self.open.wait(30)
            save(checkpoints, state, *rest)
            self.saved.append(state.step)
            self.inside -= 1

        patch.setattr(Checkpoints, "save", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


class Steps:
    """A training that is taken step by step, one worker."""

    def __init__(self, kind: str, model: Path, work: Path, peak_flops: float | None = None) -> None:
        make = {"classifier": classifying, "causal": writing}[kind]
        recipe, loads = make(model, workers=1, epochs=6, checkpoint_every_s=0)
        self.task = Task(training=recipe.training, checkpoints=Checkpoints.claim(work), load=loads)
        self.lesson: Lesson = prepare(self.task, None, load(self.task, None, ALONE.device), ALONE)
        self.plan = Plan.of(recipe.training, self.lesson.state.total_steps)
        self.journal = Journal(self.task, self.lesson, self.plan, 1, peak_flops)
        self.steps = worker.Steps(self.task, self.lesson, ALONE, self.plan, self.journal)

    def take(self, step: int) -> None:
        learner, training = self.lesson.learner, self.task.training
        order = batches.epoch_batches(
            learner.lengths, training.batch_size, seed=0, epoch=self.plan.epoch(step) - 1
        )
        share = worker.share(order[(step - 1) % len(order)], training, ALONE)
        loss = self.steps.take(step - 1, share, learner.batches(iter(share.parts)))
        if isinstance(loss, JourneymanError):
            raise loss
        self.steps.write_down(step, loss, share.batch)
        if self.steps._trouble:  # which the next step tells all workers
            raise self.steps._trouble

    def evaluate(self, step: int) -> bool:
        ends = self.steps.evaluate(step)
        if isinstance(ends, JourneymanError):
            raise ends
        return ends

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.lesson.learner.module.named_parameters()}


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_weights_that_a_gradient_made_no_numbers_are_in_no_checkpoint(
    kind: str, tiny_encoder: Model, tiny_llama: Model, tmp_path: Path
) -> None:
    """The loss was a number: it is the next one that would tell."""
    steps = Steps(kind, model_of(kind, tiny_encoder, tiny_llama, tmp_path), tmp_path / "work")
    steps.take(1)
    steps.journal._writer.wait()
    learner = steps.lesson.learner
    loss, weight = learner.loss, next(p for p in learner.module.parameters() if p.requires_grad)

    def kinked(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, of_rows = loss(*given)
        return total + (0 * weight.sum()).sqrt(), of_rows  # 0, of an infinite slope

    learner.loss = kinked
    with pytest.raises(DataError, match=r"stopped at step 3 of .* norm is nan; lower training"):
        steps.take(3)
    assert steps.task.checkpoints.latest().step == 1


def test_a_student_without_attention_is_trained_without_mfu(
    tiny_encoder: Model, tiny_llama: Model, tmp_path: Path
) -> None:
    folder = model_of("causal", tiny_encoder, tiny_llama, tmp_path)

    def first_record(work: Path) -> dict[str, Any]:
        steps = Steps("causal", folder, work, peak_flops=1e12)
        steps.take(1)
        return read_curve(steps.task.checkpoints.curve)[0]

    assert first_record(tmp_path / "attention")["mfu"] >= 0
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0
    )
    MambaForCausalLM(config).save_pretrained(folder)
    record = first_record(tmp_path / "mamba")
    assert record["tokens_per_s"] > 0 and "mfu" not in record


def test_rows_a_second_are_of_the_held_out_rows_alone(
    tiny_encoder: Model, tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the further pass over right answers, which counts no rows."""
    folder = model_of("causal", tiny_encoder, tiny_llama, tmp_path)
    right = TokenRow(id="right", tokens=np.array([4, 5, 6]), first=1)
    token_dataset.write(folder / "rows" / token_rows.GOLD, [right], None)
    written = Causal._n_written
    monkeypatch.setattr(Causal, "_n_written", lambda *a: time.sleep(0.5) or written(*a))
    steps = Steps("causal", folder, tmp_path / "work")
    steps.take(1)
    began = time.monotonic()
    steps.evaluate(1)
    took = time.monotonic() - began
    record = read_curve(steps.task.checkpoints.curve)[-1]
    assert record["gold_accuracy"] is not None
    assert record["n_rows"] / record["rows_per_s"] < took - 0.45


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_steps_go_on_while_a_checkpoint_is_written_of_what_was_there_when_it_began(
    kind: str, gate: Gate, tiny_encoder: Model, tiny_llama: Model, tmp_path: Path
) -> None:
    steps = Steps(kind, model_of(kind, tiny_encoder, tiny_llama, tmp_path), tmp_path / "work")
    steps.take(1)
    then = steps.weights()
    moments = steps.lesson.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    assert gate.reached.wait(10)
    steps.take(3)  # of two batches an epoch: the second of each is followed by an evaluation
    assert gate.saved == [] and gate.inside == 1
    gate.open.set()
    steps.journal._writer.wait()
    assert gate.saved[0] == 1 and gate.most_inside == 1
    folder = steps.task.checkpoints.path(1)
    saved = on_disk(folder)
    assert saved
    for name, value in saved.items():
        prefix = "model." if kind == "causal" else ""
        torch.testing.assert_close(value, then[prefix + name], rtol=0, atol=0)
    of_one = torch.load(folder / "optimizer.pt")["optimizer"]["state"][0]
    torch.testing.assert_close(of_one["exp_avg"], moments, rtol=0, atol=0)
    now = steps.weights()
    assert any(not value.equal(now[name]) for name, value in then.items())


def test_never_two_at_a_time_and_the_end_waits_for_the_last(
    gate: Gate, tiny_encoder: Model, tmp_path: Path
) -> None:
    steps = Steps("classifier", tiny_encoder.path, tmp_path)
    last = steps.plan.total_steps
    ended = threading.Event()

    def train() -> None:
        for step in range(1, last + 1):
            steps.take(step)
            if steps.plan.evaluates(step):
                assert steps.evaluate(step) is False
        ended.set()

    thread = threading.Thread(target=train)
    thread.start()
    assert gate.reached.wait(10) and not ended.wait(0.5)
    gate.open.set()
    thread.join(30)
    assert ended.is_set() and gate.most_inside == 1 and gate.saved[-1] == last
    latest = steps.task.checkpoints.latest()
    assert latest is not None and latest.finished


@contextmanager
def disk_full(patch: pytest.MonkeyPatch) -> Iterator[None]:
    with patch.context() as inside:

        def save(*_: object) -> None:
            raise ClusterError("the disk is full")

        inside.setattr(Checkpoints, "save", save)
        yield


def test_what_goes_wrong_in_writing_is_told_to_the_step_behind_it(
    tiny_encoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps("classifier", tiny_encoder.path, tmp_path)
    steps.take(1)
    steps.journal._writer.wait()
    with disk_full(monkeypatch):
        steps.take(3)
        until(lambda: steps.journal._writer._under_way.done())
    with pytest.raises(ClusterError, match="the disk is full"):
        steps.take(5)
    latest = steps.task.checkpoints.latest()
    assert latest is not None and latest.step == 1


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        threading.Event().wait(0.01)
    raise TimeoutError


def test_what_goes_wrong_in_writing_the_last_one_is_told_by_the_evaluation(
    tiny_encoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps("classifier", tiny_encoder.path, tmp_path)
    steps.journal._checkpoint_every_s = 1000
    last = steps.plan.total_steps
    steps.take(last)
    with disk_full(monkeypatch), pytest.raises(ClusterError, match="the disk is full"):
        steps.evaluate(last)


def test_a_worker_takes_no_step_for_which_another_is_in_trouble(
    tiny_encoder: Model, tmp_path: Path
) -> None:
    steps = Steps("classifier", tiny_encoder.path, tmp_path)
    before, trouble = steps.weights(), ClusterError("the disk is full")
    steps.steps._trouble = trouble
    with pytest.raises(ClusterError) as told:
        steps.take(1)
    assert told.value is trouble
    assert all(value.equal(before[name]) for name, value in steps.weights().items())

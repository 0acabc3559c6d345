"""Rank 0's book-keeping: the loss curve, the evaluations, the checkpoints, and who watches."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from journeyman.student.checkpoint_writer import CheckpointWriter
from journeyman.student.checkpoints import Evaluation, read_curve
from journeyman.student.lesson import Lesson, Task
from journeyman.student.live import WINDOW_S, Pace, TrainProgress
from journeyman.student.plan import Plan
from journeyman.student.trackers import Trackers

_SHOW_EVERY_S = 1.0


class Journal:
    """Told of every step; decides what to write of it."""

    def __init__(
        self, task: Task, lesson: Lesson, plan: Plan, n_workers: int, peak_flops: float | None
    ) -> None:
        """peak_flops: FLOP/s of all workers' devices together, where it is known."""
        self.state = lesson.state
        self.metrics: dict[str, float] = {}  # of the newest evaluation, for Ray Train
        self._plan = plan
        self._n_workers = n_workers
        self._lesson = lesson
        self._checkpoints = task.checkpoints
        self._writer = CheckpointWriter(task.checkpoints)
        self._training = task.training
        self._peak_flops = peak_flops
        self._began = self._saved = time.monotonic()
        self._shown = -_SHOW_EVERY_S
        self._seconds_before, self._first_step = lesson.state.seconds, lesson.state.step
        self._losses: list[float] = []  # since the last record
        self._loss = math.nan
        self._since_record = Pace()
        self._pace = Pace(WINDOW_S)
        self._trackers = Trackers(
            task.training.trackers,
            task.name,
            task.checkpoints.work.parent,
            task.training.model_dump(mode="json"),
            task.checkpoints.work / "trackers",
            read_curve(task.checkpoints.curve),
        )

    def after_step(self, step: int, loss: float, rows: np.ndarray) -> None:
        """step: done so far; loss: mean over the step's rows, int64[b], of all workers.

        Raises ClusterError, also for a checkpoint that was begun behind an earlier step."""
        busy = self._writer.busy()
        self._losses.append(loss)
        self._loss = sum(self._losses) / len(self._losses)
        learner = self._lesson.learner
        lengths = learner.lengths[rows]
        did = (len(rows), float(lengths.sum()), learner.work.of(lengths, learner.n_learned[rows]))
        self._pace.add(*did)
        self._since_record.add(*did)
        self._show(step, evaluating=False)
        if not self._plan.records(step):
            return
        self._record_steps(step)
        # Only behind a record: what a resumed run records is then what it would have recorded.
        if not self._plan.evaluates(step) and not busy and self._due():
            self._save(step)
            self._go_on()

    def evaluate(self, step: int) -> bool:
        """Evaluate behind a step's record, and save what may be needed; whether training ends.

        If it does, the last checkpoint is whole. Raises DataError or ClusterError."""
        self._show(step, evaluating=True)
        began = time.monotonic()
        measured = self._lesson.learner.evaluate()
        rate = round(measured.n_rows / max(time.monotonic() - began, 1e-9), 1)
        epoch = self._plan.epoch(step)
        found = Evaluation(epoch=epoch, step=step, **dataclasses.asdict(measured))
        self.metrics = {k: v for k, v in dataclasses.asdict(found).items() if v is not None}
        self._record(kind="evaluation", **self.metrics, rows_per_s=rate)
        evaluations = (*self.state.evaluations, found)
        stops = self._plan.gives_up(evaluations)
        self.state = dataclasses.replace(self.state, evaluations=evaluations, stopped_early=stops)
        best = self.state.best
        assert best is not None
        if stops:
            self._record(kind="stopped", step=step, best_step=best.step)
        if best.step == step or stops or self._plan.ends_epoch(step) or self._due():
            self._save(step)
        if self.state.finished:
            self._writer.wait()
        self._show(step, evaluating=False, now=True)
        self._go_on()
        return stops

    def _go_on(self) -> None:
        """What is no step is in no rate."""
        self._pace.go_on()
        self._since_record.go_on()

    def close(self) -> None:
        """However training has ended; a checkpoint that was begun is made whole first."""
        self._writer.settle()
        self._trackers.close(self.state.finished)

    def _due(self) -> bool:
        return time.monotonic() - self._saved > self._training.checkpoint_every_s

    def _record_steps(self, step: int) -> None:
        rates = self._since_record.rates()
        used = self._used(rates.flops_per_s)
        self._record(
            kind="steps",
            step=step,
            total_steps=self.state.total_steps,
            epoch=self._plan.epoch(step),
            loss=self._loss,
            learning_rate=self._lesson.schedule.get_last_lr()[0],
            workers=self._n_workers,
            gradient_norm=self._gradient_norm(),
            rows_per_s=round(rates.rows_per_s, 1),
            tokens_per_s=round(rates.tokens_per_s, 1),
            **({} if used is None else {"mfu": round(used, 4)}),
            seconds=round(self._seconds(), 3),
        )
        self._losses, self._since_record = [], Pace()

    def _record(self, **values: Any) -> None:
        self._checkpoints.record(**values)
        self._trackers.record(values)

    def _gradient_norm(self) -> float:
        """Of the last step, over all parameters; its gradients stay until the next step."""
        import torch

        gradients = [p.grad for p in self._lesson.learner.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _used(self, flops_per_s: float) -> float | None:
        return None if self._peak_flops is None else flops_per_s / self._peak_flops

    def _show(self, step: int, *, evaluating: bool, now: bool = False) -> None:
        """Let the driver see where the run stands, once in a second."""
        clock = time.monotonic()
        if not evaluating and not now and clock - self._shown < _SHOW_EVERY_S:
            return
        self._shown = clock
        rates = self._pace.rates()
        last = self.state.evaluations[-1] if self.state.evaluations else None
        steps = max(1, step - self._first_step)
        progress = TrainProgress(
            step=step,
            total_steps=self.state.total_steps,
            epoch=self._plan.epoch(step),
            epochs=self._training.epochs,
            loss=self._loss,
            rows_per_s=rates.rows_per_s,
            tokens_per_s=rates.tokens_per_s,
            eta_s=(self.state.total_steps - step) * (clock - self._began) / steps,
            mfu=self._used(rates.flops_per_s),
            agreement=last.agreement if last else None,
            calibration_error=last.calibration_error if last else None,
            perplexity=last.perplexity if last else None,
            evaluating=evaluating,
            stopped_early=self.state.stopped_early,
            missing_workers=self._training.workers - self._n_workers,
        )
        self._checkpoints.show(dataclasses.asdict(progress))

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _save(self, step: int) -> None:
        self.state = dataclasses.replace(self.state, step=step, seconds=self._seconds())
        self._writer.begin(self.state, self._snapshot, _bytes_of(self._lesson))
        self._saved = time.monotonic()

    def _snapshot(self) -> Callable[[Path], None]:
        import torch

        write_model = self._lesson.learner.snapshot()
        tensors = {
            "optimizer": _on_cpu(self._lesson.optimizer.state_dict()),
            "schedule": self._lesson.schedule.state_dict(),
        }

        def write(folder: Path) -> None:
            write_model(folder / "model")
            torch.save(tensors, folder / "optimizer.pt")

        return write


def _on_cpu(optimizer: dict[str, Any]) -> dict[str, Any]:
    """A copy of an optimizer's state, its tensors in the host's memory."""
    return {
        "state": {
            number: {name: value.to("cpu", copy=True) for name, value in of_one.items()}
            for number, of_one in optimizer["state"].items()
        },
        "param_groups": copy.deepcopy(optimizer["param_groups"]),
    }


def _bytes_of(lesson: Lesson) -> int:
    """Of a checkpoint: the weights, and AdamW's two moments of those that learn."""
    weights = list(lesson.learner.module.parameters())
    learning = [p for p in weights if p.requires_grad]
    return sum(p.nbytes for p in weights) + 2 * sum(p.nbytes for p in learning)

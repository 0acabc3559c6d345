"""Rank 0's book-keeping: the loss curve, the evaluations, the checkpoints, and who watches."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from journeyman.logs import Log
from journeyman.student import told
from journeyman.student.checkpoint_writer import CheckpointWriter
from journeyman.student.checkpoints import Evaluation, read_curve
from journeyman.student.gauges import Gauges
from journeyman.student.learner import Measured
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
        self.metrics: dict[str, float | str] = {}  # of the newest evaluation, for Ray Train
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
        self._log = Log.of_ray(f"train-{task.checkpoints.attempt[:8]}", run=task.name)
        self._log.info("training", step=lesson.state.step, of=lesson.state.total_steps,
                       workers=n_workers)  # fmt: skip
        self._gauges = Gauges(task.name)
        self._told = task.checkpoints.told() if task.training.trackers else None
        self._trackers = Trackers(
            task.training.trackers,
            task.name,
            task.checkpoints.work.parent,
            task.training.model_dump(mode="json"),
            task.checkpoints.work / told.FOLDER,
            read_curve(task.checkpoints.curve),
            self._told.changed if self._told else lambda: None,
        )

    def after_step(
        self, step: int, loss: float, rows: np.ndarray, gradient_norm: float | None
    ) -> bool:
        """Whether a checkpoint is due behind this step.

        step: done so far; loss: mean over the step's rows, int64[b], of all workers; gradient_norm:
        of a step that the plan records. Raises ClusterError, also for a checkpoint that was begun
        behind an earlier step."""
        busy = self._writer.busy()
        self._losses.append(loss)
        self._loss = sum(self._losses) / len(self._losses)
        learner = self._lesson.learner
        lengths = learner.lengths[rows]
        work = learner.work.of(lengths, learner.n_learned[rows]) if learner.work else 0.0
        did = (len(rows), float(lengths.sum()), work)
        self._pace.add(*did)
        self._since_record.add(*did)
        self._show(step, evaluating=False)
        # Only behind a record: what a resumed run records is then what it would have recorded.
        if not self._plan.records(step):
            return False
        self._record_steps(step, gradient_norm)
        return not self._plan.evaluates(step) and not busy and self._due()

    def evaluating(self, step: int) -> None:
        """An evaluation begins behind a step's record."""
        self._show(step, evaluating=True)

    def evaluated(self, step: int, measured: Measured) -> bool:
        """Whether a checkpoint is to be saved of what was measured; ``state`` says whether training
        ends with it. Raises ClusterError, for a checkpoint that was begun earlier."""
        rate = round(measured.n_rows / max(self._lesson.learner.measured_in_s, 1e-9), 1)
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
        saves = best.step == step or stops or self._plan.ends_epoch(step) or self._due()
        if saves:
            self._writer.wait()
        return saves

    def save(self, step: int, snapshot: Callable[[], Callable[[Path], None]]) -> None:
        """Have a checkpoint written of what ``snapshot`` takes of the step that is done."""
        self.state = dataclasses.replace(self.state, step=step, seconds=self._seconds())
        self._writer.begin(self.state, snapshot, _bytes_of(self._lesson))
        self._saved = time.monotonic()
        self._log.info("checkpoint begun", step=step)

    def go_on(self, step: int) -> None:
        """Steps go on behind an evaluation or a checkpoint, which are in no rate; if none are left,
        the last checkpoint is whole first. Raises ClusterError."""
        if self.state.finished:
            self._writer.wait()
        self._show(step, evaluating=False, now=True)
        self._pace.go_on()
        self._since_record.go_on()

    def close(self) -> None:
        """However training has ended; a checkpoint that was begun is made whole first."""
        self._writer.settle()
        self._trackers.close(self.state.finished)
        self._gauges.close()
        if self._told:
            self._told.close()
        self._checkpoints.leave(self.state.finished)

    def _due(self) -> bool:
        return time.monotonic() - self._saved > self._training.checkpoint_every_s

    def _record_steps(self, step: int, gradient_norm: float | None) -> None:
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
            gradient_norm=gradient_norm,
            rows_per_s=round(rates.rows_per_s, 1),
            tokens_per_s=round(rates.tokens_per_s, 1),
            **({} if used is None else {"mfu": round(used, 4)}),
            seconds=round(self._seconds(), 3),
        )
        self._losses, self._since_record = [], Pace()

    def _record(self, **values: Any) -> None:
        self._checkpoints.record(**values)
        if values["kind"] != "steps":
            self._log.info(values["kind"], **{k: v for k, v in values.items() if k != "kind"})
        self._trackers.record(values)

    def _used(self, flops_per_s: float) -> float | None:
        if self._peak_flops is None or self._lesson.learner.work is None:
            return None
        return flops_per_s / self._peak_flops

    def _show(self, step: int, *, evaluating: bool, now: bool = False) -> None:
        """Let the driver and Prometheus see where the run stands, once in a second."""
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
            against=last.against if last else "distributions",
            calibration_error=last.calibration_error if last else None,
            perplexity=last.perplexity if last else None,
            evaluating=evaluating,
            stopped_early=self.state.stopped_early,
            missing_workers=self._training.workers - self._n_workers,
        )
        self._checkpoints.show(dataclasses.asdict(progress))
        self._gauges.show(progress, last)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began


def _bytes_of(lesson: Lesson) -> int:
    """Of a checkpoint: the weights that learn, and AdamW's two moments of each."""
    return 3 * sum(p.nbytes for p in lesson.learner.module.parameters() if p.requires_grad)

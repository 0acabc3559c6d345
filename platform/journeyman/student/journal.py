"""Rank 0's book-keeping: the loss curve, the evaluations and the checkpoints."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from journeyman.student.checkpoints import Evaluation
from journeyman.student.lesson import Lesson, Task
from journeyman.student.plan import Plan

_CURVE_RECORDS = 1000  # at most about so many in a run


class Journal:
    """Told of every step; decides what to write of it."""

    def __init__(self, task: Task, lesson: Lesson, plan: Plan) -> None:
        self.state = lesson.state
        self.metrics: dict[str, float] = {}  # of the newest evaluation, for Ray Train
        self._plan = plan
        self._lesson = lesson
        self._checkpoints = task.checkpoints
        self._checkpoint_every_s = task.training.checkpoint_every_s
        self._every = max(1, lesson.state.total_steps // _CURVE_RECORDS)
        self._began = self._saved = self._recorded = time.monotonic()
        self._seconds_before = lesson.state.seconds
        self._losses: list[float] = []
        self._rows = 0  # since the last record

    def after_step(self, step: int, loss: float, n_rows: int) -> None:
        """step: done so far; loss: mean over the step's n_rows rows."""
        self._losses.append(loss)
        self._rows += n_rows
        evaluates, ends_epoch = self._plan.evaluates(step), self._plan.ends_epoch(step)
        if step % self._every and not evaluates and not ends_epoch:
            return
        self._record(step)
        # Only behind a record: what a resumed run records is then what it would have recorded.
        if not evaluates and self._due():
            self._save(step)

    def evaluate(self, step: int) -> bool:
        """Evaluate behind a step's record, and save what may be needed; whether training ends."""
        began = time.monotonic()
        measured = self._lesson.learner.evaluate()
        rate = round(measured.n_rows / max(time.monotonic() - began, 1e-9), 1)
        epoch = self._plan.epoch(step)
        found = Evaluation(epoch=epoch, step=step, **dataclasses.asdict(measured))
        self.metrics = {k: v for k, v in dataclasses.asdict(found).items() if v is not None}
        self._checkpoints.record(kind="evaluation", **self.metrics, rows_per_s=rate)
        evaluations = (*self.state.evaluations, found)
        stops = self._plan.gives_up(evaluations)
        self.state = dataclasses.replace(self.state, evaluations=evaluations, stopped_early=stops)
        best = self.state.best
        assert best is not None
        if stops:
            self._checkpoints.record(kind="stopped", step=step, best_step=best.step)
        if best.step == step or stops or self._plan.ends_epoch(step) or self._due():
            self._save(step)
        self._recorded = time.monotonic()
        return stops

    def _due(self) -> bool:
        return time.monotonic() - self._saved > self._checkpoint_every_s

    def _record(self, step: int) -> None:
        now = time.monotonic()
        self._checkpoints.record(
            kind="steps",
            step=step,
            total_steps=self.state.total_steps,
            epoch=self._plan.epoch(step),
            loss=sum(self._losses) / len(self._losses),
            learning_rate=self._lesson.schedule.get_last_lr()[0],
            rows_per_s=round(self._rows / max(now - self._recorded, 1e-9), 1),
            seconds=round(self._seconds(), 3),
        )
        self._recorded, self._losses, self._rows = now, [], 0

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _save(self, step: int) -> None:
        self.state = dataclasses.replace(self.state, step=step, seconds=self._seconds())
        self._checkpoints.save(self.state, self._write, _bytes_of(self._lesson))
        self._saved = time.monotonic()

    def _write(self, folder: Path) -> None:
        import torch

        lesson = self._lesson
        lesson.learner.save(folder / "model")
        torch.save(
            {
                "optimizer": lesson.optimizer.state_dict(),
                "schedule": lesson.schedule.state_dict(),
            },
            folder / "optimizer.pt",
        )


def _bytes_of(lesson: Lesson) -> int:
    """Of a checkpoint: the weights, and AdamW's two moments of those that learn."""
    weights = list(lesson.learner.module.parameters())
    learning = [p for p in weights if p.requires_grad]
    return sum(p.nbytes for p in weights) + 2 * sum(p.nbytes for p in learning)

"""When a run evaluates and when it gives up: functions of step numbers and evaluations alone.

So that all workers, and a run that goes on after a kill, come to the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from journeyman.recipe import Training
from journeyman.student.checkpoints import Evaluation, comparable

_CURVE_RECORDS = 1000  # at most about so many in a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The steps of a run, numbered from 1."""

    total_steps: int
    per_epoch: int
    evaluate_every: int
    patience: int | None  # evaluations without a better one
    record_every: int = 1

    @classmethod
    def of(cls, training: Training, total_steps: int) -> Plan:
        per_epoch = total_steps // training.epochs
        return cls(
            total_steps=total_steps,
            per_epoch=per_epoch,
            evaluate_every=training.evaluate_every or per_epoch,
            patience=training.patience,
            record_every=max(1, total_steps // _CURVE_RECORDS),
        )

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that a step belongs to."""
        return (step - 1) // self.per_epoch + 1

    def ends_epoch(self, step: int) -> bool:
        return step % self.per_epoch == 0

    def evaluates(self, step: int) -> bool:
        """Whether the student is evaluated once so many steps are done; always after the last."""
        return step % self.evaluate_every == 0 or step == self.total_steps

    def records(self, step: int) -> bool:
        """Whether the curve gets a record behind a step."""
        return step % self.record_every == 0 or self.evaluates(step) or self.ends_epoch(step)

    def gives_up(self, evaluations: Sequence[Evaluation]) -> bool:
        """Whether training ends behind the newest of these, since no better one has come for long.

        An evaluation as good as the best one is no improvement.
        """
        if self.patience is None or evaluations[-1].step >= self.total_steps:
            return False
        ranks = [e.rank() for e in comparable(evaluations)]
        return len(ranks) - 1 - ranks.index(max(ranks)) >= self.patience

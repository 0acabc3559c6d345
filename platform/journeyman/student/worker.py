"""One data-parallel worker of a training run: what each rank does, from rows to checkpoints.

Ray Train calls ``run`` in every worker, with the process group up. The collectives here are the
only places where ranks meet; an error that the user can mend is shared there and returned, not
raised, so that no rank waits for one that has left and Ray does not try again in vain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import DataError, JourneymanError
from journeyman.recipe import Training
from journeyman.student import batches
from journeyman.student.checkpoints import State
from journeyman.student.journal import Journal
from journeyman.student.learner import Measured
from journeyman.student.lesson import Lesson, Task, load, prepare
from journeyman.student.place import Place
from journeyman.student.plan import Plan

if TYPE_CHECKING:
    import torch


def run(task: Task) -> State | JourneymanError:
    """Train to the end from the newest checkpoint, or from the pretrained model."""
    place = Place.of_ray_train()
    # Rank 0 looks, so that all start from the same checkpoint.
    begun = place.led(task.checkpoints.restarted)
    if isinstance(begun, JourneymanError):
        return begun
    task = dataclasses.replace(task, checkpoints=begun)
    state = place.gather(begun.latest() if place.leads else None)[0]
    if state and state.finished:  # a worker was lost behind its last checkpoint
        return state
    learner, error = None, None
    try:
        learner = load(task, state, place.device)
    except JourneymanError as own:
        error = own
    errors = [e for e in place.gather(error) if e is not None]
    if errors or learner is None:
        return errors[0]
    lesson = prepare(task, state, learner, place)
    cut = place.led(lambda: task.checkpoints.start_curve(lesson.state.step))
    return cut or _train(task, lesson, place)


def _train(task: Task, lesson: Lesson, place: Place) -> State | JourneymanError:
    """All steps that the checkpoint has not taken, or until evaluations get no better."""
    plan = Plan.of(task.training, lesson.state.total_steps)
    if not place.leads:
        return Steps(task, lesson, place, plan, None).all()
    with contextlib.closing(
        Journal(task, lesson, plan, place.world_size, place.peak_flops)
    ) as journal:
        return Steps(task, lesson, place, plan, journal).all()


class Steps:
    """The steps of one worker."""

    def __init__(
        self, task: Task, lesson: Lesson, place: Place, plan: Plan, journal: Journal | None
    ) -> None:
        """journal: rank 0's."""
        self._training = task.training
        self._lesson = lesson
        self._place = place
        self._plan = plan
        self._journal = journal
        self._norm: float | None = None  # of the last step's gradients, where it was looked at
        # This worker's: with its rows, or rank 0's with the disk; the next step tells all.
        self._trouble: JourneymanError | None = None

    def all(self) -> State | JourneymanError:
        """Where training ended, or what is wrong with it."""
        from ray import train as ray_train

        learner, training, begin = self._lesson.learner, self._training, self._lesson.state
        per_epoch = self._plan.per_epoch
        for epoch in range(begin.step // per_epoch, training.epochs):
            order = batches.epoch_batches(
                learner.lengths, training.batch_size, seed=training.seed, epoch=epoch
            )
            first = max(begin.step, epoch * per_epoch)
            shares = [share(batch, training, self._place) for batch in order[first % per_epoch :]]
            loaded = learner.batches(part for share in shares for part in share.parts)
            for step, mine in enumerate(shares, first):
                loss = self.take(step, mine, loaded)
                if isinstance(loss, JourneymanError):
                    return loss
                self.write_down(step + 1, loss, mine.batch)
                if self._plan.evaluates(step + 1):
                    ends = self.evaluate(step + 1)
                    if isinstance(ends, JourneymanError):
                        return ends
                    if ends:
                        return self._state
            # No more often: Ray takes one report in two seconds, and lets the next one wait.
            ray_train.report(self._journal.metrics if self._journal else {})
        return self._state

    @property
    def _state(self) -> State:
        return self._journal.state if self._journal else self._lesson.state

    def take(self, step: int, share: Share, loaded: Iterator[Any]) -> float | JourneymanError:
        """One optimizer step, the step-th from 0; the mean loss over the global batch, or what is
        wrong. For a worker's trouble no step is taken and all return it."""
        import torch

        # A seed a step, in place of saved generators: dropout after a resume, at any step, is what
        # it would have been.
        torch.manual_seed(_dropout_seed(self._training.seed, step, self._place.rank))
        lesson, place = self._lesson, self._place
        learner, held = lesson.learner, lesson.held
        part = self._read(loaded)
        if trouble := self._anyones_trouble():
            return trouble
        size = learner.sizes[share.batch].sum()
        factor = batches.share_of_mean(size, place.world_size)
        lesson.optimizer.zero_grad()
        row_losses = []
        for i, weight in enumerate(share.weights):
            if i:
                part = self._read(loaded, instead=part)
            with held.in_sync(i + 1 == len(share.weights)):
                loss, of_rows = learner.loss(held.module, part)
                (loss * (factor * weight)).backward()
            row_losses.append(of_rows * weight)
        found = torch.cat(row_losses)
        loss_sum = found.double().sum() / size
        mean, n_troubled = place.total(torch.stack([loss_sum, self._in_trouble])).tolist()
        if n_troubled:
            return self._shared_trouble()
        if not math.isfinite(mean):
            bad = np.concatenate(share.parts)[~found.isfinite().cpu().numpy()]
            return _not_finite(mean, step, [i for part in place.gather(bad) for i in part], lesson)
        if error := self._clip(step):
            return error
        lesson.optimizer.step()
        lesson.schedule.step()
        return mean

    def _read(self, loaded: Iterator[Any], instead: Any = None) -> Any:
        """This worker's next batch, None behind the last one.

        In the place of one whose rows are damaged there is ``instead``: workers meet within a step,
        where nobody must be missing, and no step is taken of it.
        """
        if self._trouble:
            return instead
        try:
            return next(loaded, None)
        except JourneymanError as error:
            self._trouble = error
            return instead

    @property
    def _in_trouble(self) -> torch.Tensor:
        """float64, 1 or 0: of this worker."""
        import torch

        troubled = float(self._trouble is not None)
        return torch.tensor(troubled, dtype=torch.float64, device=self._place.device)

    def _anyones_trouble(self) -> JourneymanError | None:
        """A meeting point."""
        return self._shared_trouble() if self._place.total(self._in_trouble).item() else None

    def _shared_trouble(self) -> JourneymanError:
        """Where there is some; a meeting point."""
        return next(e for e in self._place.gather(self._trouble) if e is not None)

    def _all_read(self, loaded: Iterator[Any]) -> Iterator[Any]:
        """Batches that all workers take at the same time; what one of them cannot read is raised by
        all."""
        while True:
            batch = self._read(loaded)
            if trouble := self._anyones_trouble():
                raise trouble
            if batch is None:
                return
            yield batch

    def _clip(self, step: int) -> JourneymanError | None:
        """Scale the gradients to the recipe's norm; the same on all workers."""
        largest, held = self._training.max_grad_norm, self._lesson.held
        if largest is None:
            return None
        self._norm = held.gradient_norm()
        if not math.isfinite(self._norm):
            return self._no_norm(step + 1, self._norm)
        if self._norm > largest:
            held.scale_gradients(largest / self._norm)
        return None

    def _no_norm(self, step: int, norm: float) -> DataError:
        """step: from 1."""
        return DataError(
            f"training stopped at step {step} of {self._lesson.state.total_steps}: the gradients' "
            f"norm is {norm}; lower training.learning_rate."
        )

    def write_down(self, step: int, loss: float, rows: np.ndarray) -> None:
        """What there is to say of a step that is done, and a checkpoint where one is due."""
        held, journal, due = self._lesson.held, self._journal, False
        recorded = self._plan.records(step)
        norm = self._norm
        if norm is None and recorded and (journal or held.together):
            norm = held.gradient_norm()
        try:
            due = journal is not None and journal.after_step(step, loss, rows, norm)
        except JourneymanError as error:
            self._trouble = error
        if held.together and recorded:
            due = self._place.gather(due)[0]
        if not due:
            return
        norm = held.gradient_norm() if norm is None else norm
        if not math.isfinite(norm):  # the weights are no numbers now
            self._trouble = self._no_norm(step, norm)
            return
        self._save(step)
        try:
            if journal:
                journal.go_on(step)
        except JourneymanError as error:
            self._trouble = error

    def evaluate(self, step: int) -> bool | JourneymanError:
        """Whether rank 0 says that training ends here; what may be needed of it is saved."""
        place, held, journal = self._place, self._lesson.held, self._journal
        begun = place.led(lambda: self._begin_evaluation(step))
        if begun is not None:
            return begun
        measured: Measured | JourneymanError | None = None
        if journal or held.together:
            try:
                measured = self._lesson.learner.evaluate(self._all_read if held.together else iter)
            except JourneymanError as error:
                measured = error

        def written_down() -> bool:
            if isinstance(measured, JourneymanError):
                raise measured
            assert journal is not None and measured is not None
            return journal.evaluated(step, measured)

        saves = place.led(written_down)
        if isinstance(saves, JourneymanError):
            return saves
        if saves:
            self._save(step)

        def went_on() -> bool:
            assert journal is not None
            journal.go_on(step)
            return journal.state.stopped_early

        return place.led(went_on)

    def _begin_evaluation(self, step: int) -> None:
        assert self._journal is not None
        if self._trouble:
            raise self._trouble
        self._journal.evaluating(step)

    def _save(self, step: int) -> None:
        """A checkpoint, written by rank 0; together where each worker holds a part."""
        if self._journal:
            self._journal.save(step, self._lesson.snapshot)
        elif self._lesson.held.together:
            self._lesson.snapshot()


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One worker's part of a global batch, in as many micro-batches as every other worker has.

    parts: row numbers, int64[b] each; weights: of each part, 0 for rows that only fill a place:
    a worker that got fewer rows of a short batch still must meet the others.
    """

    batch: np.ndarray
    parts: list[np.ndarray]
    weights: list[float]


def share(batch: np.ndarray, training: Training, place: Place) -> Share:
    """This worker's; batch: row numbers, int64[b]."""
    mine = batches.shard(batch, place.rank, place.world_size)
    # As large as they would be with all workers, however few there are.
    most = batches.n_batches(training.batch_size, training.workers * training.accumulate)
    n_parts = batches.n_batches(batches.n_batches(len(batch), place.world_size), most)
    parts = [part for part in np.array_split(mine, n_parts) if len(part)]
    missing = n_parts - len(parts)
    return Share(
        batch=batch,
        parts=[*parts, *[batch[:1]] * missing],
        weights=[1.0] * len(parts) + [0.0] * missing,
    )


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed % 2**64, step, rank]).generate_state(1)[0])


def _not_finite(mean: float, step: int, rows: list[int], lesson: Lesson) -> DataError:
    ids = list(dict.fromkeys(lesson.learner.row_ids[i] for i in rows))
    named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return DataError(
        f"training stopped at step {step + 1} of {lesson.state.total_steps}: the loss is {mean} "
        f"for the rows {named}; look at their labels, or lower training.learning_rate and "
        "training.head_learning_rate if all rows of a batch are named."
    )

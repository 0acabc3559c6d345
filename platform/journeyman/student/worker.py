"""One data-parallel worker of a training run: what each rank does, from rows to checkpoints.

Ray Train calls ``run`` in every worker, with the process group up. The collectives here are the
only places where ranks meet; an error that the user can mend is shared there and returned, not
raised, so that no rank waits for one that has left and Ray does not try again in vain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from journeyman.errors import DataError, JourneymanError
from journeyman.recipe import Training
from journeyman.student import batches, flops
from journeyman.student.checkpoints import State
from journeyman.student.journal import Journal
from journeyman.student.lesson import Lesson, Task, prepare
from journeyman.student.plan import Plan

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A worker's place among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def peak_flops(self) -> float | None:
        """Of all workers' devices, taken to be alike, at best; None where it is not known."""
        if self.device.type != "cuda":
            return None
        import torch

        own = flops.peak(torch.cuda.get_device_name(self.device))
        return own and own * self.world_size

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, in the order of the ranks; a meeting point."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; a meeting point."""
        if self.world_size > 1:
            from torch import distributed

            distributed.all_reduce(value)
        return value


def run(task: Task) -> State | JourneymanError:
    """Train to the end from the newest checkpoint, or from the pretrained model."""
    place = _place()
    # Rank 0 looks, so that all start from the same checkpoint.
    begun = _led(place, task.checkpoints.restarted)
    if isinstance(begun, JourneymanError):
        return begun
    task = dataclasses.replace(task, checkpoints=begun)
    state = place.gather(begun.latest() if place.leads else None)[0]
    if state and state.finished:  # a worker was lost behind its last checkpoint
        return state
    lesson, error = None, None
    try:
        lesson = prepare(task, state, place.device)
    except JourneymanError as own:
        error = own
    errors = [e for e in place.gather(error) if e is not None]
    if errors or lesson is None:
        return errors[0]
    began = lesson.state.step
    cut = _led(place, lambda: task.checkpoints.start_curve(began))
    return cut or _train(task, lesson, place)


def _led(place: Place, do: Callable[[], T]) -> T | JourneymanError:
    """What rank 0 gets from ``do``, or the error that it meets there; a meeting point."""
    found: T | JourneymanError | None = None
    if place.leads:
        try:
            found = do()
        except JourneymanError as error:
            found = error
    return place.gather(found)[0]


def _place() -> Place:
    import torch
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    device = get_device()
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // context.get_local_world_size()))
    return Place(rank=context.get_world_rank(), world_size=context.get_world_size(), device=device)


def _train(task: Task, lesson: Lesson, place: Place) -> State | JourneymanError:
    """All steps that the checkpoint has not taken, or until evaluations get no better."""
    plan = Plan.of(task.training, lesson.state.total_steps)
    if not place.leads:
        return _steps(task, lesson, place, plan, None)
    with contextlib.closing(
        Journal(task, lesson, plan, place.world_size, place.peak_flops)
    ) as journal:
        return _steps(task, lesson, place, plan, journal)


def _steps(
    task: Task, lesson: Lesson, place: Place, plan: Plan, journal: Journal | None
) -> State | JourneymanError:
    from ray import train as ray_train

    training, begin = task.training, lesson.state
    per_epoch = plan.per_epoch
    parallel = _parallel(lesson.learner.module, place)
    trouble: JourneymanError | None = None  # rank 0's with the disk, which the next step tells all
    for epoch in range(begin.step // per_epoch, training.epochs):
        order = batches.epoch_batches(
            lesson.learner.lengths, training.batch_size, seed=training.seed, epoch=epoch
        )
        first = max(begin.step, epoch * per_epoch)
        shares = [_share(batch, training, place) for batch in order[first % per_epoch :]]
        loaded = lesson.learner.batches(part for share in shares for part in share.parts)
        for step, share in enumerate(shares, first):
            loss = _step(parallel, share, loaded, step, task, lesson, place, trouble)
            if isinstance(loss, JourneymanError):
                return loss
            trouble = _written_down(journal, step + 1, loss, share.batch)
            if plan.evaluates(step + 1):
                ends = _led(place, partial(_evaluated, journal, step + 1, trouble))
                if isinstance(ends, JourneymanError):
                    return ends
                if ends:
                    return journal.state if journal else begin
        # No more often: Ray takes one report in two seconds, and lets the next one wait.
        ray_train.report(journal.metrics if journal else {})
    return journal.state if journal else begin


def _written_down(
    journal: Journal | None, step: int, loss: float, rows: np.ndarray
) -> JourneymanError | None:
    try:
        if journal:
            journal.after_step(step, loss, rows)
    except JourneymanError as error:
        return error
    return None


def _evaluated(journal: Journal | None, step: int, trouble: JourneymanError | None) -> bool:
    """Whether rank 0, which evaluates, says that training ends here."""
    assert journal is not None
    if trouble:
        raise trouble
    return journal.evaluate(step)


def _parallel(module: Any, place: Place) -> Any:
    """The student as its gradients are averaged over the workers."""
    module.train()
    if place.world_size == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        module,
        device_ids=[place.device] if place.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # no second copy of the gradients
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """One worker's part of a global batch, in micro-batches; row numbers, int64[b] each.

    weight: 0 for a worker that got no row of a short batch, and still must take part in DDP.
    """

    batch: np.ndarray
    parts: list[np.ndarray]
    weight: float


def _share(batch: np.ndarray, training: Training, place: Place) -> _Share:
    mine = batches.shard(batch, place.rank, place.world_size)
    if not len(mine):
        return _Share(batch=batch, parts=[batch[:1]], weight=0.0)
    # As large as they would be with all workers, however few there are.
    most = batches.n_batches(training.batch_size, training.workers * training.accumulate)
    parts = np.array_split(mine, batches.n_batches(len(mine), most))
    return _Share(batch=batch, parts=parts, weight=1.0)


def _step(
    parallel: Any,
    share: _Share,
    loaded: Iterator[Any],
    step: int,
    task: Task,
    lesson: Lesson,
    place: Place,
    trouble: JourneymanError | None = None,
) -> float | JourneymanError:
    """One optimizer step; the mean loss over the global batch, or what is wrong with it.

    trouble: a worker's, for which no step is taken and which all return.
    """
    import torch

    # A seed a step, in place of saved generators: dropout after a resume, at any step, is what
    # it would have been.
    torch.manual_seed(_dropout_seed(task.training.seed, step, place.rank))
    learner = lesson.learner
    size = learner.sizes[share.batch].sum()
    factor = share.weight * batches.share_of_mean(size, place.world_size)
    lesson.optimizer.zero_grad()
    row_losses = []
    for i, _ in enumerate(share.parts, 1):
        with _in_sync(parallel, i == len(share.parts)):
            loss, of_rows = learner.loss(parallel, next(loaded))
            (loss * factor).backward()
        row_losses.append(of_rows)
    found = torch.cat(row_losses)
    loss_sum = found.double().sum() * (share.weight / size)
    told = torch.stack([loss_sum, torch.full_like(loss_sum, trouble is not None)])
    mean, troubled = place.total(told).tolist()
    if troubled:
        return next(e for e in place.gather(trouble) if e is not None)
    if not math.isfinite(mean):
        bad = np.concatenate(share.parts)[~found.isfinite().cpu().numpy()]
        return _not_finite(mean, step, [i for part in place.gather(bad) for i in part], lesson)
    lesson.optimizer.step()
    lesson.schedule.step()
    return mean


def _in_sync(parallel: Any, last: bool) -> AbstractContextManager[Any]:
    """Gradients are averaged over the workers with a step's last micro-batch only."""
    if last or not hasattr(parallel, "no_sync"):
        return contextlib.nullcontext()
    return parallel.no_sync()


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

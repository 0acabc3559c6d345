"""One data-parallel worker of a training run: what each rank does, from rows to checkpoints.

Ray Train calls ``run`` in every worker, with the process group up. The collectives here are the
only places where ranks meet; an error that the user can mend is shared there and returned, not
raised, so that no rank waits for one that has left and Ray does not try again in vain.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import DataError, JourneymanError
from journeyman.recipe import Training
from journeyman.student import batches, losses, models
from journeyman.student.checkpoints import State
from journeyman.student.journal import Journal
from journeyman.student.lesson import Lesson, Task, prepare

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A worker's place among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

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
    state = place.gather(task.checkpoints.latest() if place.leads else None)[0]
    lesson, error = None, None
    try:
        lesson = prepare(task, state, place.device)
    except JourneymanError as own:
        error = own
    errors = [e for e in place.gather(error) if e is not None]
    if errors or lesson is None:
        return errors[0]
    if place.leads:
        task.checkpoints.start_curve(lesson.state.step)
    return _train(task, lesson, place)


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
    """All steps that the checkpoint has not taken; evaluates and saves after each epoch."""
    from ray import train as ray_train

    training, begin = task.training, lesson.state
    per_epoch = begin.total_steps // training.epochs
    parallel = _parallel(lesson.model, place)
    journal = Journal(task, lesson) if place.leads else None
    for epoch in range(begin.step // per_epoch, training.epochs):
        order = batches.epoch_batches(
            lesson.train_tokens.lengths, training.batch_size, seed=training.seed, epoch=epoch
        )
        for step in range(max(begin.step, epoch * per_epoch), (epoch + 1) * per_epoch):
            batch = order[step % per_epoch]
            loss = _step(parallel, batch, step, task, lesson, place)
            if isinstance(loss, DataError):
                return loss
            if journal:
                journal.after_step(step + 1, loss, len(batch))
        ray_train.report(journal.after_epoch(epoch + 1) if journal else {})
    return journal.state if journal else begin


def _parallel(model: Any, place: Place) -> Any:
    """The model as its gradients are averaged over the workers."""
    model.train()
    if place.world_size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        model,
        device_ids=[place.device] if place.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # no second copy of the gradients
    )


def _step(
    parallel: Any, batch: np.ndarray, step: int, task: Task, lesson: Lesson, place: Place
) -> float | DataError:
    """One optimizer step; the mean loss over the global batch, or what is wrong with it."""
    import torch

    # A seed a step, in place of saved generators: dropout after a resume, at any step, is what
    # it would have been.
    torch.manual_seed(_dropout_seed(task.training.seed, step, place.rank))
    mine = batches.shard(batch, place.rank, place.world_size)
    # A worker without a row in a short batch must still take part in DDP: a row of weight 0.
    weight, mine = (1.0, mine) if len(mine) else (0.0, batch[:1])
    loss = _losses(parallel, mine, task.training, lesson, place)
    mean = place.total(loss.detach().double().sum() * (weight / len(batch))).item()
    if not math.isfinite(mean):
        bad = mine[~loss.detach().isfinite().cpu().numpy()]
        return _not_finite(mean, step, [i for part in place.gather(bad) for i in part], lesson)
    share = batches.share_of_mean(len(batch), place.world_size)
    lesson.optimizer.zero_grad()
    (loss.sum() * (weight * share)).backward()
    lesson.optimizer.step()
    lesson.schedule.step()
    return mean


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed % 2**64, step, rank]).generate_state(1)[0])


def _losses(
    parallel: Any, rows: np.ndarray, training: Training, lesson: Lesson, place: Place
) -> torch.Tensor:
    """float32[b], one loss a row, with gradients."""
    import torch

    input_ids, mask = models.tensors(lesson.train_tokens, rows, lesson.pad_id, place.device)
    with torch.autocast("cuda", torch.bfloat16, enabled=place.device.type == "cuda"):
        logits = parallel(input_ids=input_ids, attention_mask=mask).logits
    return losses.distillation(
        logits.float(),
        torch.from_numpy(lesson.train.logprobs[rows]).to(place.device, torch.float32),
        torch.from_numpy(lesson.train.gold[rows]).to(place.device),
        temperature=training.temperature,
        gold_weight=training.gold_weight,
    )


def _not_finite(mean: float, step: int, rows: list[int], lesson: Lesson) -> DataError:
    ids = list(dict.fromkeys(lesson.train.ids[i] for i in rows))
    named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return DataError(
        f"training stopped at step {step + 1} of {lesson.state.total_steps}: the loss is {mean} "
        f"for the rows {named}; look at their labels, or lower training.learning_rate and "
        "training.head_learning_rate if all rows of a batch are named."
    )

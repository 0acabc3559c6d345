"""What a worker loads before it trains: a student with its rows, and its optimizer.

The same for the first start and for a resumed run: only the folder of the weights differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.recipe import Training
from journeyman.student import batches
from journeyman.student.checkpoints import Checkpoints, State
from journeyman.student.holding import Holding, hold
from journeyman.student.learner import Learner
from journeyman.student.place import Place

if TYPE_CHECKING:
    import torch

Load = Callable[[Path | None, "torch.device"], Learner]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that a worker is sent; load: makes the student on a device, with the weights in a folder
    (a checkpoint's) or from the start. Raises DataError or ModelError."""

    training: Training
    checkpoints: Checkpoints
    load: Load
    name: str = "training"  # the recipe's, for trackers


@dataclass(slots=True, kw_only=True)
class Lesson:
    """What a worker has loaded, as the checkpoint has it."""

    learner: Learner
    held: Holding
    optimizer: Any  # torch.optim.AdamW
    schedule: Any  # torch.optim.lr_scheduler.LambdaLR
    state: State

    def snapshot(self) -> Callable[[Path], None]:
        """What writes a checkpoint's tensors as they are now, on rank 0; ``Holding`` says whether
        this is a meeting point. Until it is dropped, a copy of the tensors is in memory."""
        import torch

        module = self.held.copy()
        tensors = {
            "optimizer": self.held.optimizer_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
        }

        def write(folder: Path) -> None:
            self.learner.write(module, folder / "model")
            torch.save(tensors, folder / "optimizer.pt")

        return write


def load(task: Task, state: State | None, device: torch.device) -> Learner:
    """Rows, tokens and the model as its checkpoint has it; raises DataError or ModelError."""
    folder = task.checkpoints.model(state.step) if state else None
    learner = task.load(folder, device)
    if task.training.compile:  # here: for an export, on the driver, there is nothing to speed up
        learner.compile()
    return learner


def prepare(task: Task, state: State | None, learner: Learner, place: Place) -> Lesson:
    """Spread what was loaded over the workers, and make its optimizer; a meeting point."""
    import torch

    total = task.training.epochs * batches.n_batches(len(learner.row_ids), task.training.batch_size)
    held = hold(learner.module, place, task.training.parallel)
    optimizer, schedule = _optimizer(learner, task.training, total)
    if state:
        file = task.checkpoints.fetch(state.step) / "optimizer.pt"
        saved = torch.load(file, map_location="cpu")
        held.restore(optimizer, saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    return Lesson(
        learner=learner,
        held=held,
        optimizer=optimizer,
        schedule=schedule,
        state=state
        or State(
            step=0, total_steps=total, seconds=0.0, n_rows=len(learner.row_ids), evaluations=()
        ),
    )


def _optimizer(learner: Learner, training: Training, total_steps: int) -> tuple[Any, Any]:
    """AdamW and its schedule: linear from 0 up over the warmup, then linear down to 0."""
    import torch

    warmup = training.warmup * total_steps

    def factor(step: int) -> float:
        rising = (step + 1) / warmup if warmup > 0 else 1.0
        falling = (total_steps - step) / max(1.0, total_steps - warmup)
        return min(1.0, rising, falling)

    optimizer = torch.optim.AdamW(
        learner.groups(training), weight_decay=training.weight_decay, fused=True
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

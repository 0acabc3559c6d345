"""What a worker loads before it trains: rows as arrays, model and optimizer as they stand.

The same for the first start and for a resumed run: only the folder of the weights differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from journeyman.errors import DataError
from journeyman.labels.dataset import ClassRows
from journeyman.recipe import Student, Training
from journeyman.student import batches, models
from journeyman.student.checkpoints import Checkpoints, State

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that a worker is sent."""

    training: Training
    student: Student
    model_dir: Path
    checkpoints: Checkpoints
    read_rows: Callable[[], ClassRows]


@dataclass(slots=True, kw_only=True)
class Lesson:
    """What a worker has loaded: rows as arrays, model and optimizer as the checkpoint has them."""

    train: ClassRows
    train_tokens: batches.TokenRows
    held_out: ClassRows
    held_out_tokens: batches.TokenRows
    tokenizer: Any
    model: Any  # transformers.PreTrainedModel
    optimizer: Any  # torch.optim.AdamW
    schedule: Any  # torch.optim.lr_scheduler.LambdaLR
    state: State

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id or 0


def prepare(task: Task, state: State | None, device: torch.device) -> Lesson:
    """Rows, tokens, model, optimizer; raises DataError or ModelError."""
    rows = task.read_rows()
    train, held_out = _split(rows, "train"), _split(rows, "calibrate")
    tokenizer = models.load_tokenizer(task.model_dir, task.student.max_length)

    def tokens(part: ClassRows) -> batches.TokenRows:
        return batches.tokenise(tokenizer, part.texts, task.student.max_length)

    total = task.training.epochs * batches.n_batches(len(train), task.training.batch_size)
    folder = task.checkpoints.path(state.step) if state else None
    model = models.build(
        folder / "model" if folder else task.model_dir, rows.labels, task.training.seed
    ).to(device)
    optimizer, schedule = _optimizer(model, task.training, total)
    if folder:
        import torch

        saved = torch.load(folder / "optimizer.pt", map_location=device)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    return Lesson(
        train=train,
        train_tokens=tokens(train),
        held_out=held_out,
        held_out_tokens=tokens(held_out),
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        state=state
        or State(step=0, total_steps=total, seconds=0.0, n_rows=len(train), evaluations=()),
    )


def _split(rows: ClassRows, name: str) -> ClassRows:
    part = rows.split(name)
    if not len(part):
        raise DataError(
            f"the label dataset has no {name} rows, and training needs some; give the {name} "
            "split rows in the recipe's corpus section (split_map, shares or limits) and label "
            "them."
        )
    return part


def _optimizer(model: Any, training: Training, total_steps: int) -> tuple[Any, Any]:
    """AdamW and its schedule: linear from 0 up over the warmup, then linear down to 0."""
    import torch

    warmup = training.warmup * total_steps

    def factor(step: int) -> float:
        rising = (step + 1) / warmup if warmup > 0 else 1.0
        falling = (total_steps - step) / max(1.0, total_steps - warmup)
        return min(1.0, rising, falling)

    groups = models.parameter_groups(
        model, encoder_rate=training.learning_rate, head_rate=training.head_learning_rate
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

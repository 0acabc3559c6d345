"""What a training loop asks of a student: batches, losses, how good it is, its files.

One for each kind of student: ``classifying`` and ``causal_learner``. The loop (``worker``) knows
steps, ranks and checkpoints, and nothing of what a row is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from journeyman.errors import DataError
from journeyman.recipe import Training
from journeyman.student.flops import Work

if TYPE_CHECKING:
    import torch


# What held-out rows say of the teacher: its distributions, true draws from them, or a text alone.
Against = Literal["distributions", "draws", "text"]
AGREES_WITH: dict[Against, str] = {
    "distributions": "the teacher's first choice",
    "draws": "the teacher's draws",
    "text": "the text's own tokens",
}
LOSS: dict[Against, str] = {
    "distributions": "KL(teacher ‖ student)",
    "draws": "cross-entropy from the teacher, by its draws",
    "text": "cross-entropy of the text's own tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A student on the held-out rows.

    Of a classifier means are over rows, of a causal student over the tokens that are learned.
    """

    # Share of rows or tokens where the student's first choice is what ``AGREES_WITH`` says, 0 to 1;
    # of draws, the mean share of a token's draws that are its first choice.
    agreement: float
    n_rows: int
    against: Against = "distributions"
    kl: float | None = None  # mean KL(teacher ‖ student), nats; only where it can be known
    cross_entropy: float | None = None  # in its place, nats
    # Over the rows that have gold; of a causal student the share whose right answer it writes to
    # the letter, greedily (of ``rationales``, asked for its answer alone).
    gold_accuracy: float | None = None
    perplexity: float | None = None  # of the text's own tokens
    # Share of the texts of which a causal student's first choice is every token: those that it
    # writes to the letter, greedily.
    exact_match: float | None = None
    # A classifier's expected calibration error, 0 to 1, where the teacher's first choice is right,
    # and where gold is.
    calibration_error: float | None = None
    gold_calibration_error: float | None = None


def no_rows(split: str) -> DataError:
    """What to say of a label dataset without rows to train, or to evaluate, on."""
    return DataError(
        f"the label dataset has no {split} rows, and training needs some; give the {split} split "
        "rows in the recipe's corpus section (split_map, shares or limits) and label them."
    )


class Learner(Protocol):
    """A student with its rows."""

    @property
    def module(self) -> torch.nn.Module:
        """What is trained, made on the CPU and spread by ``holding``; ``loss`` calls it or its
        wrapper."""

    @property
    def row_ids(self) -> Sequence[str]:
        """Of the train rows."""

    @property
    def lengths(self) -> np.ndarray:
        """int64[n]: tokens of each train row."""

    @property
    def work(self) -> Work | None:
        """FLOP of a step on a row; None where they cannot be counted."""

    @property
    def n_learned(self) -> np.ndarray:
        """int64[n]: tokens of each train row that are learned; of classifiers, 1."""

    @property
    def sizes(self) -> np.ndarray:
        """int64[n]: what each train row counts in a mean, 1 or the tokens that are learned."""

    @property
    def measured_in_s(self) -> float:
        """Seconds that the held-out rows took in the newest evaluation; of language models without
        the further pass over right answers."""

    def compile(self) -> None:
        """Have torch.compile make code of what is trained; raises ModelError where it cannot."""

    def groups(self, training: Training) -> list[dict[str, Any]]:
        """AdamW's parameter groups."""

    def batches(self, parts: Iterator[np.ndarray]) -> Iterator[Any]:
        """What ``loss`` takes, for row numbers int64[b] each, prepared ahead where that pays."""

    def loss(self, parallel: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over the batch, with gradients; and each row's, float[b], without."""

    def evaluate(self, take: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> Measured:
        """The student on the held-out rows. take: hands on batches as they are read from disk;
        where workers evaluate together, to all or to none. Raises DataError where rows are damaged,
        or the student says nothing any more."""

    def write(self, module: Any, folder: Path) -> None:
        """Write ``module``, a copy of the own one on the CPU, and use it up; may be called in
        another thread while this one trains on. A Hugging Face folder, but of low-rank matrices,
        which are written alone (``checkpoints.LORA``)."""

    def export(self, folder: Path) -> None:
        """Write the own student, on the CPU, as a Hugging Face folder, and use it up."""

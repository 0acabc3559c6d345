"""Nested subsets of the train rows: the first so many of them in an order that hashes give.

A subset is the last place in that order, so that its rows are found shard by shard, and
whether a row is in it depends neither on the other rows nor on the shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from journeyman.labels.dataset import ClassRows
from journeyman.recipe import Training
from journeyman.student.batches import n_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """The train rows up to a place; seed: of the order."""

    seed: int
    last: str

    def has(self, row_id: str) -> bool:
        """Whether a train row is in it."""
        return _place(row_id, self.seed) <= self.last

    def of(self, rows: ClassRows) -> ClassRows:
        """Of the train rows those that are in it, and all others."""
        kept = [
            split != "train" or self.has(row_id)
            for split, row_id in zip(rows.splits, rows.ids, strict=True)
        ]
        return rows.take(np.flatnonzero(kept))


def first(row_ids: Iterable[str], n: int, seed: int) -> Subset:
    """The n rows of these that come first; there are as many, n is at least 1."""
    return Subset(seed=seed, last=sorted(_place(row_id, seed) for row_id in row_ids)[n - 1])


def _place(row_id: str, seed: int) -> str:
    """Of the id and the seed, not the id itself: splits may have been drawn by that."""
    return blake2b(f"{seed} {row_id}".encode(), digest_size=16).hexdigest()


def as_many_steps(training: Training, n_rows: int, n_all: int) -> Training:
    """Settings with which n_rows are trained for as many optimizer steps as n_all are by these, as
    near as whole epochs come, and evaluated at the same steps.

    With as many epochs few rows would get few steps, and their student would lack training as well
    as labels.
    """
    per_epoch, of_all = (n_batches(n, training.batch_size) for n in (n_rows, n_all))
    return training.model_copy(
        update={
            "epochs": max(1, round(training.epochs * of_all / per_epoch)),
            "evaluate_every": training.evaluate_every or of_all,
        }
    )

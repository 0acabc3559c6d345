"""A classifier's rows as a training holds them, read part by part.

Each worker has all train rows in memory, and most of them are the teacher's distributions: they are
held as the loss reads them, in float32, and with hard labels as the chosen class alone. What weighs
rows and classes is taken of each part at its full precision, before.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from journeyman.labels import confidence
from journeyman.labels.dataset import ClassRows
from journeyman.student import batches, losses
from journeyman.student.batches import TokenRows
from journeyman.student.learner import no_rows

Tokenised = Callable[[ClassRows], TokenRows]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRows:
    """n rows.

    gold: int64[n], as in ``ClassRows``; learned: float32[n, c], the teacher's log-probabilities,
    or of hard labels int32[n], its first choices; class_counts: float64[c], sums over the rows of
    the probabilities that are learned; sure: float64[n], the teacher's largest probabilities.
    """

    labels: tuple[str, ...]
    ids: list[str]
    tokens: TokenRows
    gold: np.ndarray
    learned: np.ndarray
    class_counts: np.ndarray
    sure: np.ndarray

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """float32[b, c]: the log-probabilities that these rows are to learn."""
        if self.learned.ndim == 1:
            return losses.certain(self.learned[rows], len(self.labels))
        targets: np.ndarray = self.learned[rows]
        return targets


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRows:
    """Arrays as in ``ClassRows``."""

    tokens: TokenRows
    gold: np.ndarray
    logprobs: np.ndarray


def read(
    parts: Iterable[ClassRows], tokenised: Tokenised, *, hard_labels: bool
) -> tuple[TrainRows, HeldOutRows]:
    """Train and calibrate rows; raises DataError where one of the two has none."""
    train, held_out = _Train(hard_labels), _HeldOut()
    for part in parts:
        for split, kept in (("train", train), ("calibrate", held_out)):
            rows = part.split(split)
            if len(rows):
                kept.add(rows, tokenised(rows))
    return train.rows(), held_out.rows()


class _Train:
    """Takes parts in, and grows in place: no part stays beside the whole."""

    def __init__(self, hard_labels: bool) -> None:
        self._hard = hard_labels
        self._learned = array("i" if hard_labels else "f")
        self._sure = array("d")
        self._labels: tuple[str, ...] = ()
        self._ids: list[str] = []
        self._tokens: list[TokenRows] = []
        self._gold: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, rows: ClassRows, tokens: TokenRows) -> None:
        self._labels = rows.labels
        self._ids += rows.ids
        self._tokens.append(tokens)
        self._gold.append(rows.gold)
        _extend(self._sure, confidence.of_classes(rows.logprobs))
        if self._hard:
            chosen = rows.logprobs.argmax(axis=1)
            self._counts.append(np.bincount(chosen, minlength=len(rows.labels)))
            _extend(self._learned, chosen)
        else:
            self._counts.append(np.exp(rows.logprobs).sum(axis=0))
            _extend(self._learned, rows.logprobs)

    def rows(self) -> TrainRows:
        if not self._ids:
            raise no_rows("train")
        learned = np.asarray(self._learned)
        return TrainRows(
            labels=self._labels,
            ids=self._ids,
            tokens=batches.joined(self._tokens),
            gold=np.concatenate(self._gold),
            learned=learned if self._hard else learned.reshape(len(self._ids), -1),
            class_counts=np.stack(self._counts).sum(axis=0, dtype=np.float64),
            sure=np.asarray(self._sure),
        )


class _HeldOut:
    def __init__(self) -> None:
        self._parts: list[HeldOutRows] = []

    def add(self, rows: ClassRows, tokens: TokenRows) -> None:
        self._parts.append(HeldOutRows(tokens=tokens, gold=rows.gold, logprobs=rows.logprobs))

    def rows(self) -> HeldOutRows:
        if not self._parts:
            raise no_rows("calibrate")
        return HeldOutRows(
            tokens=batches.joined([part.tokens for part in self._parts]),
            gold=np.concatenate([part.gold for part in self._parts]),
            logprobs=np.concatenate([part.logprobs for part in self._parts]),
        )


def _extend(held: array[float] | array[int], values: np.ndarray) -> None:
    """In its own type, the values in their order."""
    held.frombytes(np.ascontiguousarray(values, held.typecode).data.cast("B"))

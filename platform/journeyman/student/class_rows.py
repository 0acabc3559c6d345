"""A classifier's rows as a training reads them: made shard by shard, mapped by the workers.

Most of them are the teacher's distributions: they are held as the loss reads them, in float32, and
with hard labels as the chosen class alone. What weighs rows and classes is taken of each part at
its full precision, before.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman import files
from journeyman.labels import confidence, dataset
from journeyman.labels.dataset import ClassRows
from journeyman.recipe import Student
from journeyman.student import batches, losses
from journeyman.student.batches import TokenRows
from journeyman.student.carried import Carried
from journeyman.student.inputs import Inputs
from journeyman.student.learner import no_rows
from journeyman.student.subset import Subset
from journeyman.student.token_dataset import cut_short, take_name

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_MANIFEST = "rows.json"
_ARRAYS = (
    "tokens", "starts", "gold", "learned", "class_counts", "sure",
    "held_out_tokens", "held_out_starts", "held_out_gold", "held_out_logprobs",
)  # fmt: skip


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


def build(
    labels_dir: str | Path,
    corpus_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    student: Student,
    folder: Path,
    *,
    hard_labels: bool,
    subset: Subset | None = None,
    over: dataset.Over = dataset.made,
) -> None:
    """Write train and calibrate rows to ``folder``, whole or not at all.

    tokenizer: the student's; subset: the train rows that are learned, all by default; over: who
    makes the rows of shards. Raises DataError where a split is empty, or the dataset damaged or
    made of another corpus.
    """
    read = dataset.ClassReader.of(labels_dir, corpus_dir, ("train", "calibrate"))
    make = _Shards(read=read, subset=subset, tokenizer=Carried(tokenizer), student=student)
    parts = (Part.from_table(table, read.labels) for table in over(labels_dir, make))
    train, held_out = gathered(parts, hard_labels=hard_labels)
    with files.scratch_folder(folder) as fresh:
        for name, values in _arrays(train, held_out).items():
            np.save(fresh / f"{name}.npy", values)
        files.write_json(fresh / _MANIFEST, {"labels": train.labels, "ids": train.ids})
        take_name(fresh, folder)


def load(folder: Path) -> tuple[TrainRows, HeldOutRows]:
    """As ``build`` wrote them, mapped; raises DataError if the folder is not whole."""
    about = files.read_json(folder / _MANIFEST)
    try:
        found = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS
        }
    except (OSError, ValueError, EOFError) as error:  # what numpy raises for half a file
        raise cut_short(folder, str(error)) from error
    train = TrainRows(
        labels=tuple(about["labels"]),
        ids=about["ids"],
        tokens=TokenRows(ids=found["tokens"], starts=found["starts"]),
        gold=found["gold"],
        learned=found["learned"],
        class_counts=found["class_counts"],
        sure=found["sure"],
    )
    held_out = HeldOutRows(
        tokens=TokenRows(ids=found["held_out_tokens"], starts=found["held_out_starts"]),
        gold=found["held_out_gold"],
        logprobs=found["held_out_logprobs"],
    )
    return train, held_out


def _arrays(train: TrainRows, held_out: HeldOutRows) -> dict[str, np.ndarray]:
    arrays = (
        train.tokens.ids, train.tokens.starts, train.gold, train.learned, train.class_counts,
        train.sure, held_out.tokens.ids, held_out.tokens.starts, held_out.gold, held_out.logprobs,
    )  # fmt: skip
    return dict(zip(_ARRAYS, arrays, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some rows: fields as of ``ClassRows``, their inputs as tokens."""

    labels: tuple[str, ...]
    ids: list[str]
    splits: np.ndarray
    gold: np.ndarray
    logprobs: np.ndarray
    tokens: TokenRows

    @classmethod
    def of(cls, rows: ClassRows, tokenizer: Callable[..., Any], student: Student) -> Part:
        inputs = Inputs(student).all(rows.columns)
        return cls(
            labels=rows.labels,
            ids=rows.ids,
            splits=rows.splits,
            gold=rows.gold,
            logprobs=rows.logprobs,
            tokens=batches.tokenise(tokenizer, inputs, student.max_length),
        )

    def to_table(self) -> pa.Table:
        import pyarrow as pa

        n, c = self.logprobs.shape
        return pa.table(
            {
                "id": self.ids,
                "split": pa.array(self.splits, pa.string()),
                "gold": self.gold,
                "logprobs": pa.LargeListArray.from_arrays(
                    np.arange(n + 1) * c, self.logprobs.reshape(-1)
                ),
                "tokens": pa.LargeListArray.from_arrays(self.tokens.starts, self.tokens.ids),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table, labels: tuple[str, ...]) -> Part:
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        lengths = columns["tokens"].value_lengths().to_numpy()
        return cls(
            labels=labels,
            ids=columns["id"].to_pylist(),
            splits=np.array(columns["split"].to_pylist(), dtype=object),
            gold=columns["gold"].to_numpy(),
            logprobs=columns["logprobs"].flatten().to_numpy().reshape(len(table), len(labels)),
            tokens=TokenRows(
                ids=columns["tokens"].flatten().to_numpy(),
                starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            ),
        )

    def split(self, name: str) -> Part:
        index = np.flatnonzero(self.splits == name)
        return Part(
            labels=self.labels,
            ids=[self.ids[i] for i in index],
            splits=self.splits[index],
            gold=self.gold[index],
            logprobs=self.logprobs[index],
            tokens=self.tokens.take(index),
        )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shards:
    """Makes a shard's rows, in any process."""

    read: dataset.ClassReader
    subset: Subset | None
    tokenizer: Carried[PreTrainedTokenizerBase]
    student: Student

    def __call__(self, shard: str, labeled: pa.Table) -> Iterator[pa.Table]:
        rows = self.read(shard, labeled)
        if self.subset is not None:
            rows = self.subset.of(rows)
        if len(rows):
            yield Part.of(rows, self.tokenizer.value, self.student).to_table()


def gathered(parts: Iterable[Part], *, hard_labels: bool) -> tuple[TrainRows, HeldOutRows]:
    """Train and calibrate rows of all parts; raises DataError where one of the two has none."""
    train, held_out = _Train(hard_labels), _HeldOut()
    for part in parts:
        for split, kept in (("train", train), ("calibrate", held_out)):
            rows = part.split(split)
            if len(rows):
                kept.add(rows)
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

    def add(self, rows: Part) -> None:
        self._labels = rows.labels
        self._ids += rows.ids
        self._tokens.append(rows.tokens)
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

    def add(self, rows: Part) -> None:
        self._parts.append(HeldOutRows(tokens=rows.tokens, gold=rows.gold, logprobs=rows.logprobs))

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

"""A label dataset and its corpus to the rows of tokens of each split, shard by shard.

What a shard's rows are is a matter of that shard alone, so that tasks make them, of all shards; the
rows are written here, in corpus order: the same bytes whoever made them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman import corpus, files
from journeyman.errors import DataError
from journeyman.folder import Folder
from journeyman.labels import confidence, dataset
from journeyman.labels.codec import Codec
from journeyman.labels.rows import columns_of
from journeyman.labels.store import LabelStore
from journeyman.recipe import Generate, Labels, Rationales, RowWeight
from journeyman.student import row_makers, token_dataset
from journeyman.student.carried import Carried
from journeyman.student.learner import no_rows
from journeyman.student.token_dataset import TokenRow, Writer

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer"  # beside the splits: the one that their prompts are made with
SPLITS = ("train", "calibrate")
GOLD = "gold"  # beside the splits: gold answers to calibrate rows, which nothing learns
_TABLE_BYTES = 64 << 20  # of payloads in one table that a task gives
_AT_ONCE = 256  # labeled rows that are Python's objects


def build(
    labels_dir: str | Path,
    corpus_dir: str | Path,
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    folder: Path,
    *,
    as_text: bool,
    row_weight: RowWeight = "none",
    reasonings: bool = True,
    teacher: PreTrainedTokenizerBase | None = None,
    splits: Sequence[str] = SPLITS,
    gold: bool = True,
    over: dataset.Over = dataset.made,
) -> dict[str, int]:
    """Write the rows of each split to ``folder``/SPLIT; how many there are, how many were cut, and
    how many left out: those with nothing to learn, and those whose cut prompt is not found again.
    With gold, where answers are learned, what would be right of calibrate rows goes to
    ``folder``/GOLD.

    tokenizer: the teacher's; with as_text (no distributions) the student's, and so with
    ``teacher``, whose distributions are aligned with the student's tokens then. row_weight: what
    becomes their ``weight``, of all rows of a labeled text alike. reasonings: of ``rationales``,
    whether there are rows of them, each behind its answer's. over: who makes the rows of shards.
    Rows of more than max_length tokens lose the beginning of their context first, then the end of
    their text. Raises DataError where a split is empty, or the dataset damaged or made of another
    corpus or prompt.
    """
    manifest = dataset.finished_manifest(LabelStore(labels_dir))
    identity = manifest["identity"]
    dataset.check_corpus(labels_dir, identity, corpus_dir)
    make = _Shards(
        corpus_dir=Folder(corpus_dir).everywhere,
        labels=labels,
        tokenizers=Carried((tokenizer, teacher)),
        codec=dataset.codec_of(manifest),
        as_text=as_text,
        context=identity.get("max_model_len"),
        reasonings=reasonings,
        row_weight=row_weight,
        max_length=max_length,
        splits=tuple(splits),
        gold=gold,
        table_bytes=_TABLE_BYTES,
    )
    make.check()
    counts: Counter[str] = Counter()
    with files.scratch_folder(folder) as fresh:
        # Gold first: splits that are there when a run goes on say that it is, too.
        names = (GOLD, *splits)
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(Writer(fresh / name, make.codec_for(name)))
                for name in names
            }
            for table in over(labels_dir, make):
                _take(table, writers, counts)
        for split in splits:
            counts[split] = writers[split].n_rows
            if not counts[split]:
                raise no_rows(split)
        n_rows = sum(counts[split] for split in splits)
        if teacher is not None and counts["aligned"] <= n_rows < counts["encoded"]:
            raise DataError(  # only where texts begin, or not even there
                f"{labels_dir}: no token of the student begins where one of the teacher's does: "
                "its tokenizer changes the text (to lower case, say); take another student, or "
                "labels.kind: generate without training.divergence: uld, which is learned as text."
            )
        folder.mkdir(exist_ok=True)
        for name in names:
            if writers[name].n_rows:
                token_dataset.take_name(fresh / name, folder / name)
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shards:
    """Makes a shard's rows, in any process: fields as the arguments of ``build``."""

    corpus_dir: str | Path
    labels: Labels
    tokenizers: Carried[
        tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]
    ]  # teacher's last
    codec: Codec | None  # that the dataset is written in
    as_text: bool
    context: int | None
    reasonings: bool
    row_weight: RowWeight
    max_length: int
    splits: tuple[str, ...]
    gold: bool
    table_bytes: int

    def check(self) -> None:
        """Raises DataError where labels of this kind hold nothing to learn."""
        self._learned()

    def codec_for(self, name: str) -> Codec | None:
        return None if self.as_text or name == GOLD else self.codec

    def __call__(self, shard: str, labeled: pa.Table) -> Iterator[pa.Table]:
        import pyarrow as pa
        import pyarrow.compute as pc

        labeled = labeled.filter(pc.is_in(labeled["split"], pa.array(self.splits)))
        if not len(labeled):
            return
        read = corpus.read_shard(self.corpus_dir, shard)
        texts = read.filter(pc.is_in(read["id"], labeled["id"].combine_chunks()))
        columns = {row["id"]: columns_of(row) for row in texts.to_pylist()}
        made: list[dict[str, Any]] = []
        n_bytes = 0
        for record in self._records(_rows(labeled), columns):
            made.append(record)
            n_bytes += len(record["payload"] or b"")
            if n_bytes >= self.table_bytes:
                yield pa.Table.from_pylist(made, _schema())
                made, n_bytes = [], 0
        yield pa.Table.from_pylist(made, _schema())

    def _records(
        self, labeled: Iterable[dict[str, Any]], columns: dict[str, dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        learned = self._learned()
        right: row_makers.Rows | None = None
        if self.gold and isinstance(self.labels, Generate | Rationales):
            tokenizer, teacher = self.tokenizers.value
            tokens_of = None if self.as_text or teacher else self.codec
            right = row_makers.gold(self.labels, learned, tokenizer, tokens_of)
        for row in labeled:
            seen, split = columns[row["id"]], row["split"]
            weight = confidence.of_record(row, self.row_weight, self.codec)
            for one in learned(row, seen):
                weighted = one and dataclasses.replace(one, weight=weight)
                yield _record(split, weighted, self.max_length)
            if right is not None and split == "calibrate":
                for one in right(row, seen):
                    if one and len(one.tokens) - one.first < self.max_length:
                        yield _record(GOLD, one, self.max_length)

    def _learned(self) -> row_makers.Rows:
        tokenizer, teacher = self.tokenizers.value
        codec = None if self.as_text else self.codec
        return row_makers.learned(
            self.labels, tokenizer, codec, self.context, self.reasonings, teacher
        )


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """A few at a time: of a shard all would take several times its memory."""
    for batch in table.to_batches(max_chunksize=_AT_ONCE):
        yield from batch.to_pylist()


def _schema() -> pa.Schema:
    """Of rows on their way to their folder; tokens: null where a row is left out."""
    import pyarrow as pa

    return pa.schema(
        {
            "folder": pa.string(), "cut": pa.bool_(), "id": pa.string(),
            "tokens": pa.large_binary(), "first": pa.int64(), "payload": pa.large_binary(),
            "n_encoded": pa.int64(), "aligned": pa.large_binary(), "weight": pa.float64(),
            "reasoning": pa.bool_(),
        }
    )  # fmt: skip


def _record(folder: str, row: TokenRow | None, max_length: int) -> dict[str, Any]:
    """A row as the schema has it, within max_length tokens."""
    fitted = row and _fitted(row, max_length)
    if fitted is None or fitted.first >= len(fitted.tokens):
        return {"folder": folder, "payload": None}
    aligned = fitted.aligned
    return {
        "folder": folder,
        "cut": fitted is not row,
        "id": fitted.id,
        "tokens": np.asarray(fitted.tokens, np.int32).tobytes(),
        "first": fitted.first,
        "payload": fitted.payload,
        "n_encoded": fitted.n_encoded,
        "aligned": None if aligned is None else np.asarray(aligned, np.int32).tobytes(),
        "weight": fitted.weight,
        "reasoning": fitted.reasoning,
    }


def _take(table: pa.Table, writers: dict[str, Writer], counts: Counter[str]) -> None:
    """Write a table's rows, each to its folder."""
    for batch in table.to_batches():
        columns = (column.to_pylist() for column in batch.columns)
        for (
            folder,
            cut,
            row_id,
            tokens,
            first,
            payload,
            n_encoded,
            aligned,
            weight,
            reasoning,
        ) in zip(*columns, strict=True):
            of_split = folder != GOLD
            if tokens is None:
                counts["left_out"] += of_split
                continue
            counts["cut"] += cut and of_split
            at = None if aligned is None else np.frombuffer(aligned, np.int32)
            if at is not None:
                counts["encoded"] += n_encoded
                counts["aligned"] += int((at >= 0).sum())
            writers[folder].add(
                TokenRow(
                    id=row_id, tokens=np.frombuffer(tokens, np.int32), first=first,
                    payload=payload, n_encoded=n_encoded, aligned=at, weight=weight,
                    reasoning=reasoning,
                )
            )  # fmt: skip


def _fitted(row: TokenRow, max_length: int) -> TokenRow:
    """The row within max_length tokens; itself if it is."""
    excess = len(row.tokens) - max_length
    if excess <= 0:
        return row
    from_context = min(excess, row.first - 1)
    return dataclasses.replace(
        row,
        tokens=row.tokens[from_context : from_context + max_length],
        first=row.first - from_context,
    )

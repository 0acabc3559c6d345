"""A label dataset and its corpus to rows of tokens that a language model learns.

``logits`` and ``generate``: the teacher's tokens with its distributions, behind the context that it
read. Text alone, in the student's own tokens, where it has another tokenizer than the teacher, and
for ``rationales``: two rows for each, Distilling step-by-step (Hsieh et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman import corpus
from journeyman.errors import DataError
from journeyman.labels import dataset
from journeyman.labels.codec import Codec
from journeyman.labels.rows import columns_of
from journeyman.labels.store import LabelStore
from journeyman.recipe import Generate, Labels, Logits, Rationales
from journeyman.student import token_dataset
from journeyman.student.token_dataset import TokenRow
from journeyman.teacher.classes import prompting
from journeyman.teacher.prompting import Encoder, Prompting, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "calibrate")
_ANSWER, _REASONING = "[label] ", "[rationale] "  # task prefixes (Hsieh et al. 2023, section 3.2)

Rows = Callable[[dict[str, Any], dict[str, Any]], Sequence[TokenRow]]


def build(
    labels_dir: str | Path,
    corpus_dir: Path,
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    folder: Path,
    *,
    as_text: bool,
) -> dict[str, int]:
    """Write the rows of each split to ``folder``/SPLIT; how many there are, and how many were cut.

    tokenizer: the teacher's; with as_text (no distributions) the student's. Rows of more than
    max_length tokens lose the beginning of their context first, then the end of their text.
    Raises DataError where a split is empty, or the dataset damaged.
    """
    manifest = dataset.finished_manifest(LabelStore(labels_dir))
    codec = None if as_text else dataset.codec_of(manifest)
    make = _maker(labels, tokenizer, codec)
    counts = {"cut": 0}
    for split in SPLITS:

        def fitting(split: str = split) -> Iterator[TokenRow]:
            for row in _rows(labels_dir, corpus_dir, split, make):
                fitted = _fitted(row, max_length)
                counts["cut"] += fitted is not row
                if fitted.first < len(fitted.tokens):
                    yield fitted

        counts[split] = token_dataset.write(folder / split, fitting(), codec)
        if not counts[split]:
            raise DataError(
                f"the label dataset has no {split} rows, and training needs some; give the {split} "
                "split rows in the recipe's corpus section (split_map, shares or limits) and label "
                "them."
            )
    return counts


def _rows(labels_dir: str | Path, corpus_dir: Path, split: str, make: Rows) -> Iterator[TokenRow]:
    for shard, table in dataset.shards(labels_dir):
        labeled = table.to_pylist()
        if not any(row["split"] == split for row in labeled):
            continue
        texts = {row["id"]: row for row in corpus.read_shard(corpus_dir / shard).to_pylist()}
        for row in labeled:
            if row["split"] == split:
                yield from make(row, columns_of(texts[row["id"]]))


def _maker(labels: Labels, tokenizer: PreTrainedTokenizerBase, codec: Codec | None) -> Rows:
    encoder = Encoder(tokenizer, max_tokens=2**31, overflow="truncate_left")
    match labels:
        case Logits() if codec is not None:
            return _of_logits(labels, encoder, codec)
        case Generate() if codec is not None:
            return _of_answers(labels, encoder, codec)
        case Generate():
            return _of_answers_as_text(labels, encoder)
        case Rationales():
            return _of_rationales(labels, encoder)
    raise DataError(f"labels of kind {labels.kind} hold no tokens to learn.")


def _of_logits(labels: Logits, encoder: Encoder, codec: Codec) -> Rows:
    context = Prompting(labels.context, where="labels.context")

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow]:
        before = encoder.raw(context.render(columns).segments, begin=True)
        tokens = np.concatenate([np.asarray(before, np.int32), codec.unpack_ids(row["token_ids"])])
        return [_recorded(row, tokens, first=max(1, len(before)))]

    return make


def _of_answers(labels: Generate, encoder: Encoder, codec: Codec) -> Rows:
    asked = prompting(labels)

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow]:
        rendered = asked.render(columns, tokenizer=encoder.tokenizer)
        before = encoder.raw(rendered.segments, begin=rendered.messages is None)
        if row["token_ids"] is None:
            raise DataError("these labels hold no tokens: they come from a teacher behind a URL.")
        tokens = np.concatenate([np.asarray(before, np.int32), codec.unpack_ids(row["token_ids"])])
        return [_recorded(row, tokens, first=len(before))]

    return make


def _recorded(row: dict[str, Any], tokens: np.ndarray, first: int) -> TokenRow:
    if len(tokens) - first != row["n_positions"]:
        raise DataError(
            f"row {row['id']} has {len(tokens) - first} tokens to learn and distributions for "
            f"{row['n_positions']}: its labels were made with another prompt or tokenizer."
        )
    return TokenRow(
        id=row["id"], tokens=tokens, first=first, payload=row["logprobs"],
        n_encoded=row["n_positions"],
    )  # fmt: skip


def _of_answers_as_text(labels: Generate, encoder: Encoder) -> Rows:
    asked = prompting(labels)

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow]:
        rendered = asked.render(columns, tokenizer=encoder.tokenizer)
        return [_text(row["id"], encoder, rendered.segments, row["output"])]

    return make


def _of_rationales(labels: Rationales, encoder: Encoder) -> Rows:
    asked = prompting(labels)

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow]:
        prompt = asked.render(columns, tokenizer=encoder.tokenizer).segments
        return [
            _text(row["id"], encoder, [(_ANSWER, False), *prompt], row["answer"]),
            _text(row["id"], encoder, [(_REASONING, False), *prompt], row["reasoning"]),
        ]

    return make


def _text(row_id: str, encoder: Encoder, prompt: Sequence[Segment], answer: str) -> TokenRow:
    """Prompt and answer in the student's tokens, and the token that ends a text."""
    before = encoder.raw(prompt, begin=True)
    end = encoder.tokenizer.eos_token_id
    after = encoder.raw([(answer, True)]) + ([] if end is None else [end])
    tokens = np.asarray([*before, *after], np.int32)
    return TokenRow(id=row_id, tokens=tokens, first=max(1, len(before)))


def _fitted(row: TokenRow, max_length: int) -> TokenRow:
    """The row within max_length tokens; itself if it is."""
    excess = len(row.tokens) - max_length
    if excess <= 0:
        return row
    from_context = min(excess, row.first - 1)
    return TokenRow(
        id=row.id,
        tokens=row.tokens[from_context : from_context + max_length],
        first=row.first - from_context,
        payload=row.payload,
        n_encoded=row.n_encoded,
    )

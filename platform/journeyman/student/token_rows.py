"""A label dataset and its corpus to rows of tokens that a language model learns.

``logits`` and ``generate``: the teacher's tokens with its distributions, behind the context that it
read; or, where the student has another tokenizer, its own tokens, with the distribution of the
teacher's token that begins at the same place. Text alone, in the student's own tokens, where no
distributions are asked for, and for ``rationales``: two rows for each, Distilling step-by-step
(Hsieh et al. 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman import corpus
from journeyman.errors import DataError
from journeyman.labels import confidence, dataset, quality
from journeyman.labels.codec import Codec
from journeyman.labels.rows import columns_of
from journeyman.labels.store import LabelStore
from journeyman.recipe import Generate, Labels, Logits, Rationales, RowWeight
from journeyman.student import alignment, token_dataset
from journeyman.student.learner import no_rows
from journeyman.student.token_dataset import TokenRow
from journeyman.teacher.answers import ContextOverflow
from journeyman.teacher.classes import prompting
from journeyman.teacher.prompting import Encoder, Prompting, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer"  # beside the splits: the one that their prompts are made with
SPLITS = ("train", "calibrate")
GOLD = "gold"  # beside the splits: gold answers to calibrate rows, which nothing learns
ANSWER, _REASONING = "[label] ", "[rationale] "  # task prefixes (Hsieh et al. 2023, section 3.2)

Rows = Callable[[dict[str, Any], dict[str, Any]], Sequence[TokenRow | None]]


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
) -> dict[str, int]:
    """Write the rows of each split to ``folder``/SPLIT; how many there are, how many were cut, and
    how many left out: those with nothing to learn, and those whose cut prompt is not found again.
    With gold, where answers are learned, what would be right of calibrate rows goes to
    ``folder``/GOLD.

    tokenizer: the teacher's; with as_text (no distributions) the student's, and so with
    ``teacher``, whose distributions are aligned with the student's tokens then. row_weight: what
    becomes their ``weight``, of all rows of a labeled text alike. reasonings: of ``rationales``,
    whether there are rows of them, each behind its answer's. Rows of more than max_length tokens
    lose the beginning of their context first, then the end of their text. Raises DataError where a
    split is empty, or the dataset damaged or made of another corpus or prompt.
    """
    manifest = dataset.finished_manifest(LabelStore(labels_dir))
    identity = manifest["identity"]
    dataset.check_corpus(labels_dir, identity, corpus_dir)
    recorded = dataset.codec_of(manifest)
    codec = None if as_text else recorded
    make = _maker(labels, tokenizer, codec, identity.get("max_model_len"), reasonings, teacher)

    def weighted(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow | None]:
        weight = confidence.of_record(row, row_weight, recorded)
        return [one and dataclasses.replace(one, weight=weight) for one in make(row, columns)]

    counts = {"cut": 0, "left_out": 0, "aligned": 0, "encoded": 0}
    for split in splits:

        def fitting(split: str = split) -> Iterator[TokenRow]:
            for row in _rows(labels_dir, corpus_dir, split, weighted):
                fitted = row and _fitted(row, max_length)
                if fitted is None or fitted.first >= len(fitted.tokens):
                    counts["left_out"] += 1
                    continue
                counts["cut"] += fitted is not row
                if fitted.aligned is not None:
                    counts["encoded"] += fitted.n_encoded
                    counts["aligned"] += int((fitted.aligned >= 0).sum())
                yield fitted

        if split == "calibrate" and gold and isinstance(labels, Generate | Rationales):
            # Before calibrate: what is there when a run goes on says that these are, too.
            of_gold = _of_gold(labels, make, tokenizer, None if as_text or teacher else codec)
            right = _rows(labels_dir, corpus_dir, split, of_gold)
            whole = (row for row in right if row and len(row.tokens) - row.first < max_length)
            token_dataset.write(folder / GOLD, (_fitted(row, max_length) for row in whole), None)
        counts[split] = token_dataset.write(folder / split, fitting(), codec)
        if not counts[split]:
            raise no_rows(split)
        if teacher is not None and counts["aligned"] <= counts[split] < counts["encoded"]:
            raise DataError(  # only where texts begin, or not even there
                f"{labels_dir}: no token of the student begins where one of the teacher's does: "
                "its tokenizer changes the text (to lower case, say); take another student, or "
                "labels.kind: generate without training.divergence: uld, which is learned as text."
            )
    return counts


def _rows(
    labels_dir: str | Path, corpus_dir: str | Path, split: str, make: Rows
) -> Iterator[TokenRow | None]:
    import pyarrow.compute as pc

    for shard, table in dataset.shards(labels_dir):
        labeled = table.filter(pc.equal(table["split"], split))
        if not len(labeled):
            continue
        read = corpus.read_shard(corpus_dir, shard)
        texts = read.filter(pc.is_in(read["id"], labeled["id"].combine_chunks()))
        columns = {row["id"]: columns_of(row) for row in texts.to_pylist()}
        for row in labeled.to_pylist():
            yield from make(row, columns[row["id"]])


def _maker(
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
    codec: Codec | None,
    context: int | None,
    reasonings: bool,
    teacher: PreTrainedTokenizerBase | None,
) -> Rows:
    """context: the teacher's, in tokens, where the dataset names it."""
    encoder = Encoder(tokenizer, max_tokens=2**31, overflow="truncate_left")
    match labels:
        case Logits() if codec is not None and teacher is not None:
            return _of_logits_aligned(labels, encoder, codec, teacher)
        case Generate() if codec is not None and teacher is not None:
            return _of_answers_aligned(labels, encoder, codec, teacher)
        case Logits() if codec is not None:
            return _of_logits(labels, encoder, codec)
        case Generate() if codec is not None:
            return _of_answers(labels, encoder, codec, context)
        case Generate():
            return _of_answers_as_text(labels, encoder)
        case Rationales():
            return _of_rationales(labels, encoder, reasonings)
    raise DataError(f"labels of kind {labels.kind} hold no tokens to learn.")


def _of_logits(labels: Logits, encoder: Encoder, codec: Codec) -> Rows:
    context = prompting(labels)

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow]:
        before = _prompt(context, columns, encoder)
        target = codec.unpack_ids(row["token_ids"])
        _check_prompt(row, len(before) + len(target))
        return [_recorded(row, before, target, first=max(1, len(before)))]

    return make


def _prompt(prompt: Prompting, columns: dict[str, Any], encoder: Encoder) -> list[int]:
    rendered = prompt.render(columns, tokenizer=encoder.tokenizer)
    return encoder.raw(rendered.segments, begin=rendered.messages is None)


def _of_logits_aligned(
    labels: Logits, encoder: Encoder, codec: Codec, teacher: PreTrainedTokenizerBase
) -> Rows:
    context, target = prompting(labels), Prompting(labels.target, where="labels.target")

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow | None]:
        if row["truncated"]:
            return [None]  # where it was cut is a matter of the teacher's tokens
        before = _prompt(context, columns, encoder)
        if labels.tokens:
            said = teacher.decode(codec.unpack_ids(row["token_ids"]), skip_special_tokens=True)
            after = encoder.raw([(said, True)])
        else:
            after = encoder.raw(target.render(columns).segments)
        return [_aligned(row, encoder, before, after, codec, teacher)]

    return make


def _of_answers_aligned(
    labels: Generate, encoder: Encoder, codec: Codec, teacher: PreTrainedTokenizerBase
) -> Rows:
    as_text = _of_answers_as_text(labels, encoder)

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow | None]:
        (one,) = as_text(row, columns)
        assert one is not None
        before, after = one.tokens[: one.first].tolist(), one.tokens[one.first :].tolist()
        return [_aligned(row, encoder, before, after, codec, teacher)]

    return make


def _aligned(
    row: dict[str, Any],
    encoder: Encoder,
    before: Sequence[int],
    after: Sequence[int],
    codec: Codec,
    teacher: PreTrainedTokenizerBase,
) -> TokenRow:
    """The student's tokens, each with the teacher's distribution from the same place on."""
    theirs = codec.unpack_ids(row["token_ids"]).tolist()
    at = alignment.aligned(encoder.tokenizer, after, teacher, theirs)
    n_without = len(theirs) - row["n_positions"]  # the first one, where nothing is in front of it
    at = np.where(at >= n_without, at - n_without, -1)
    first = max(1, len(before))
    return TokenRow(
        id=row["id"], tokens=np.asarray([*before, *after], np.int32), first=first,
        payload=row["logprobs"], n_encoded=row["n_positions"], aligned=at[first - len(before) :],
    )  # fmt: skip


def _of_answers(labels: Generate, encoder: Encoder, codec: Codec, context: int | None) -> Rows:
    asked = prompting(labels)

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow | None]:
        if row["token_ids"] is None:
            raise DataError(
                f"row {row['id']} has no tokens: it comes from a teacher behind a URL; label it "
                "with a teacher that runs here, or take a student with a tokenizer of its own."
            )
        before = _prompt(asked, columns, encoder)
        if row["truncated"]:
            room = context - labels.max_tokens if context else row["n_prompt_tokens"]
            rendered = asked.render(columns, tokenizer=encoder.tokenizer)
            before = _cut_as_then(rendered, Encoder(encoder.tokenizer, room, labels.overflow))
            if len(before) != row["n_prompt_tokens"]:
                return [None]
        _check_prompt(row, len(before))
        return [_recorded(row, before, codec.unpack_ids(row["token_ids"]), first=len(before))]

    return make


def _cut_as_then(rendered: Rendered, encoder: Encoder) -> list[int]:
    """The prompt as the teacher read it; none where it cannot be cut to what was there."""
    try:
        return encoder.fit(rendered)[0]
    except ContextOverflow:
        return []


def _check_prompt(row: dict[str, Any], n_tokens: int) -> None:
    if n_tokens != row["n_prompt_tokens"]:
        raise DataError(
            f"the teacher read {row['n_prompt_tokens']} tokens for row {row['id']}, and its prompt "
            f"has {n_tokens} now: the labels were made with another prompt or tokenizer; run "
            "journeyman label --new."
        )


def _recorded(
    row: dict[str, Any], before: Sequence[int], target: np.ndarray, first: int
) -> TokenRow:
    tokens = np.concatenate([np.asarray(before, np.int32), target])
    if len(tokens) - first != row["n_positions"]:
        raise DataError(
            f"row {row['id']} has {len(tokens) - first} tokens to learn and distributions for "
            f"{row['n_positions']}; label its shard again."
        )
    return TokenRow(
        id=row["id"], tokens=tokens, first=first, payload=row["logprobs"],
        n_encoded=row["n_positions"],
    )  # fmt: skip


def _of_answers_as_text(labels: Generate, encoder: Encoder) -> Rows:
    asked = prompting(labels)

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow]:
        rendered = asked.render(columns, tokenizer=encoder.tokenizer)
        return [_text(row, encoder, rendered, row["output"], ends=_ended(row))]

    return make


def _of_rationales(labels: Rationales, encoder: Encoder, reasonings: bool) -> Rows:
    # A prefix is part of the user's message: in front of a chat template's own begin token the
    # model would not be where it was trained.
    answer, reasoning = (
        prompting(labels.model_copy(update={"prompt": prefix + labels.prompt}))
        for prefix in (ANSWER, _REASONING)
    )

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow]:
        asked = answer.render(columns, tokenizer=encoder.tokenizer)
        rows = [_text(row, encoder, asked, row["answer"], ends=True)]
        if reasonings:
            asked = reasoning.render(columns, tokenizer=encoder.tokenizer)
            one = _text(row, encoder, asked, row["reasoning"], ends=_ended(row))
            rows.append(dataclasses.replace(one, reasoning=True))
        return rows

    return make


def _of_gold(
    labels: Generate | Rationales,
    learned: Rows,
    tokenizer: PreTrainedTokenizerBase,
    codec: Codec | None,
) -> Rows:
    """What would be right behind the prompt that the student is asked for its answer with: what is
    learned where the teacher's answer is right ("1,000", say), else the gold one in its form.

    codec: of the teacher's tokens, where those are learned.
    """
    encoder = Encoder(tokenizer, max_tokens=2**31, overflow="truncate_left")

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow]:
        gold = row["gold"]
        answer = None if gold is None else learned(row, columns)[0]
        if answer is None:
            return []
        if isinstance(labels, Rationales):
            same = quality.same_answer(row["answer"], gold, labels)
            after = [*encoder.raw([(labels.classes.get(gold, gold), True)]), *_end(tokenizer)]
        else:
            same = quality.same_answer(row["output"], gold, labels)
            after = _in_form(row, gold.strip(), encoder, codec, labels.max_tokens)
        if same:
            return [dataclasses.replace(answer, payload=None, n_encoded=0, aligned=None)]
        tokens = np.asarray([*answer.tokens[: answer.first], *after], np.int32)
        return [TokenRow(id=row["id"], tokens=tokens, first=answer.first)]

    return make


def _in_form(
    row: dict[str, Any], gold: str, encoder: Encoder, codec: Codec | None, max_tokens: int
) -> list[int]:
    """Gold between the blanks of the teacher's answer, and with its end: a stop string, or the
    token that ends its turn. Where it was cut off, the tokenizer's own, if there is room for it."""
    said, tokenizer = row["output"], encoder.tokenizer
    core = said.strip()
    before = said[: said.find(core)]
    if not _ended(row):
        after = encoder.raw([(before + gold, True)])
        return after if len(after) >= max_tokens else [*after, *_end(tokenizer)]
    ids = [] if codec is None else codec.unpack_ids(row["token_ids"]).tolist()
    n = len(ids)
    while n and not tokenizer.decode(ids[n - 1 : n], skip_special_tokens=True):
        n -= 1
    whole = said if codec is None else tokenizer.decode(ids[:n], skip_special_tokens=True)
    behind = whole[whole.find(core) + len(core) :] if core in whole else ""
    end = ids[n:] or ([] if codec and behind else _end(tokenizer))
    return [*encoder.raw([(before + gold + behind, True)]), *end]


def _ended(row: dict[str, Any]) -> bool:
    """Whether the teacher came to an end, or was cut off at labels.max_tokens."""
    return bool(row["finish_reason"] != "length")


def _text(
    row: dict[str, Any], encoder: Encoder, prompt: Rendered, answer: str, *, ends: bool
) -> TokenRow:
    """Prompt and answer in the student's tokens; and the one that ends a text, where it ends."""
    before = encoder.raw(prompt.segments, begin=prompt.messages is None)
    after = encoder.raw([(answer, True)]) + (_end(encoder.tokenizer) if ends else [])
    tokens = np.asarray([*before, *after], np.int32)
    return TokenRow(id=row["id"], tokens=tokens, first=max(1, len(before)))


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends a text, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return [] if end is None else [end]


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

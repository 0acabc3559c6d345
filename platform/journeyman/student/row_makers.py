"""A labeled text to rows of tokens that a language model learns.

``logits`` and ``generate``: the teacher's tokens with its distributions, behind the context that it
read; or, where the student has another tokenizer, its own tokens, with the distribution of the
teacher's token that begins at the same place. Text alone, in the student's own tokens, where no
distributions are asked for, and for ``rationales``: two rows for each, Distilling step-by-step
(Hsieh et al. 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import DataError
from journeyman.labels import quality
from journeyman.labels.codec import Codec
from journeyman.recipe import Generate, Labels, Logits, Rationales
from journeyman.student import alignment
from journeyman.student.token_dataset import TokenRow
from journeyman.teacher.answers import ContextOverflow
from journeyman.teacher.classes import prompting
from journeyman.teacher.prompting import Encoder, Prompting, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER, _REASONING = "[label] ", "[rationale] "  # task prefixes (Hsieh et al. 2023, section 3.2)

Rows = Callable[[dict[str, Any], dict[str, Any]], Sequence[TokenRow | None]]


def learned(
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


def gold(
    labels: Generate | Rationales,
    make_learned: Rows,
    tokenizer: PreTrainedTokenizerBase,
    codec: Codec | None,
) -> Rows:
    """What would be right behind the prompt that the student is asked for its answer with: what is
    learned where the teacher's answer is right ("1,000", say), else the gold one in its form.

    codec: of the teacher's tokens, where those are learned.
    """
    encoder = Encoder(tokenizer, max_tokens=2**31, overflow="truncate_left")

    def make(row: dict[str, Any], columns: dict[str, Any]) -> Sequence[TokenRow]:
        right = row["gold"]
        answer = None if right is None else make_learned(row, columns)[0]
        if answer is None:
            return []
        if isinstance(labels, Rationales):
            same = quality.same_answer(row["answer"], right, labels)
            after = [*encoder.raw([(labels.classes.get(right, right), True)]), *_end(tokenizer)]
        else:
            same = quality.same_answer(row["output"], right, labels)
            after = _in_form(row, right.strip(), encoder, codec, labels.max_tokens)
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

"""Rows of a label dataset, ready to be read by a person."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from journeyman import models
from journeyman.errors import JourneymanError, RecipeError
from journeyman.labels import quality
from journeyman.labels.codec import Distributions
from journeyman.labels.inspect.opened import Opened
from journeyman.labels.schema import Commit
from journeyman.recipe import Filters, Generate, Logits, Rationales

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

Only = Literal["wrong", "filtered", "quarantined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One position: the token that stands there, and the teacher's likeliest ones.

    text, and that of top: the token's id where the tokenizer is not at hand; probability: of the
    token itself, None where it is not among those stored; tail: of all tokens that are not.
    """

    position: int
    text: str
    probability: float | None
    top: tuple[tuple[str, float], ...]
    tail: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row and what the teacher said of it; what its kind of label lacks is empty.

    fate: why readers do not get it, or empty; answer: the likeliest class, the output, or the
    majority's answer; probabilities: by falling probability; samples: reasoning and answer.
    """

    id: str
    split: str
    gold: str | None
    text: str | None
    fate: str = ""
    answer: str | None = None
    probabilities: tuple[tuple[str, float], ...] = ()
    label_mass: float | None = None
    tokens: tuple[Token, ...] = ()
    tokens_are_ids: bool = False
    n_positions: int = 0
    samples: tuple[tuple[str, str | None], ...] = ()
    agreement: float | None = None
    finish_reason: str | None = None


def rows(
    opened: Opened,
    n_rows: int,
    *,
    ids: tuple[str, ...] = (),
    split: str | None = None,
    only: Only | None = None,
    n_positions: int = 12,
    n_top: int = 4,
) -> list[Row]:
    """The first n_rows rows, of those whose id begins so, of a split, or of one fate.

    only: wrong, where the teacher misses the gold label; filtered; quarantined. n_positions,
    n_top: token distributions shown of a row, and tokens of each.
    """
    tokens = _Tokens(opened, n_positions, n_top)
    found = (
        row
        for commit in opened.commits
        for row in _of_shard(opened, commit, only, tokens)
        if (not ids or row.id.startswith(ids)) and split in (None, row.split)
    )
    return list(islice(found, n_rows))


def _of_shard(opened: Opened, commit: Commit, only: Only | None, tokens: _Tokens) -> Iterator[Row]:
    sources = opened.corpus_rows(commit)
    if only not in ("filtered", "quarantined"):
        table = opened.kept(opened.store.read_shard(commit))
        if only == "wrong":
            table = table.take(_wrong(opened, table))
        yield from _labeled(opened, table, sources, tokens)
    if only in (None, "filtered"):
        yield from _left_out(opened, commit, sources, tokens)
        for row in opened.store.read_filtered(commit):
            yield _unlabeled(row.id, row.input, f"filtered: {row.filter} {row.value:g}")
    if only in (None, "quarantined"):
        for bad in opened.store.read_quarantine(commit):
            fate = f"quarantined: {bad.error_class}: {bad.message}"
            yield _unlabeled(bad.id, bad.input, fate)


def _wrong(opened: Opened, table: pa.Table) -> pa.Array:
    """Places of the rows that the filter matches_gold would leave out."""
    if isinstance(opened.labels, Logits):
        raise RecipeError("logits labels give no answer that a gold label could be compared with.")
    import pyarrow as pa

    gold = Filters(matches_gold=True)
    failures = quality.failed(table, opened.labels, gold, log_prior=opened.log_prior)
    return pa.array([failure.row for failure in failures], pa.int64())


def _left_out(
    opened: Opened, commit: Commit, sources: Mapping[str, Any], tokens: _Tokens
) -> Iterator[Row]:
    """Labeled rows that the recipe's filters leave out."""
    import pyarrow.compute as pc

    if opened.left_out is None:
        return
    table = opened.store.read_shard(commit)
    table = table.filter(pc.is_in(table["id"], opened.left_out["id"]))
    found = opened.left_out.filter(pc.is_in(opened.left_out["id"], table["id"])).to_pylist()
    fates = {
        row["id"]: f"filtered: {row['filter']}"
        + ("" if row["value"] is None else f" {row['value']:.4g}")
        for row in found
    }
    for row in _labeled(opened, table, sources, tokens):
        yield replace(row, fate=fates[row.id])


def _labeled(
    opened: Opened, table: pa.Table, sources: Mapping[str, Any], tokens: _Tokens
) -> Iterator[Row]:
    for at in range(len(table)):
        one = table.slice(at, 1)
        record = one.to_pylist()[0]
        source = sources.get(record["id"], {})
        yield Row(
            id=record["id"],
            split=record["split"],
            gold=record["gold"],
            text=source.get("text"),
            finish_reason=record["finish_reason"],
            label_mass=record.get("label_mass"),
            agreement=record.get("agreement"),
            **_said(opened, one, record, tokens),
        )


def _said(opened: Opened, one: pa.Table, record: dict[str, Any], tokens: _Tokens) -> dict[str, Any]:
    """The fields of a Row that its kind of label has."""
    if isinstance(opened.labels, Logits | Generate):
        shown = tokens.shown(record)
        return {"answer": record.get("output"), "tokens": shown,
                "tokens_are_ids": bool(shown) and tokens.are_ids,
                "n_positions": record["n_positions"]}  # fmt: skip
    said: dict[str, Any] = {}
    if record["class_logprobs"] is not None:
        probabilities = np.exp(opened.class_logprobs(one)[0])
        order = np.argsort(-probabilities, kind="stable")
        said["probabilities"] = tuple((opened.classes[i], float(probabilities[i])) for i in order)
        said["answer"] = opened.classes[order[0]]
    if isinstance(opened.labels, Rationales):
        said["answer"] = record["answer"]
        said["samples"] = tuple(zip(record["reasonings"], record["answers"], strict=True))
    return said


def _unlabeled(row_id: str, input_: str, fate: str) -> Row:
    source = json.loads(input_)
    return Row(
        id=row_id,
        split=source.get("split") or "",
        gold=source.get("label"),
        text=source.get("text"),
        fate=fate,
    )


class _Tokens:
    """Token distributions as text; token ids where the teacher's tokenizer is not at hand."""

    def __init__(self, opened: Opened, n_positions: int, n_top: int) -> None:
        self._opened, self._n_positions, self._n_top = opened, n_positions, n_top

    @cached_property
    def _words(self) -> Callable[[int], str]:
        tokenizer = tokenizer_of(self._opened)
        if tokenizer is None:
            return str
        return lambda token_id: tokenizer.decode([token_id])

    @property
    def are_ids(self) -> bool:
        return self._words is str

    def shown(self, record: dict[str, Any]) -> tuple[Token, ...]:
        codec, n = self._opened.codec, record["n_positions"]
        if codec is None or not n:
            return ()
        read = codec.decode(record["logprobs"], n)
        ids = codec.unpack_ids(record["token_ids"])[-n:]
        return tuple(
            self._token(position, int(ids[position]), read)
            for position in range(min(n, self._n_positions))
        )

    def _token(self, position: int, token_id: int, read: Distributions) -> Token:
        ids, logprobs = read.token_ids[position], read.logprobs[position]
        own = logprobs[ids == token_id]
        return Token(
            position=position,
            text=self._words(token_id),
            probability=float(np.exp(own[0])) if len(own) else None,
            top=tuple(
                (self._words(int(i)), float(np.exp(p)))
                for i, p in zip(ids[: self._n_top], logprobs[: self._n_top], strict=True)
                if i >= 0
            ),
            tail=float(np.exp(read.log_tail_mass[position])),
        )


def tokenizer_of(opened: Opened) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer, where it lies on this machine and is the one that was used.

    Fetches nothing: a teacher may be larger than this machine.
    """
    teacher = opened.manifest["identity"]["teacher"]
    reference = teacher["model"].split(" with ")[0]  # a LoRA adapter leaves the tokenizer as it is
    try:
        if not reference.startswith("package://") and not Path(reference).expanduser().exists():
            return _tokenizer(reference, revision=teacher.get("revision"))
        model = models.resolve(reference)
    except (JourneymanError, OSError, ValueError):
        return None
    return _tokenizer(model.path) if model.tokenizer_digest == teacher.get("tokenizer") else None


def _tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    at = {} if revision is None else {"revision": revision}
    return AutoTokenizer.from_pretrained(source, local_files_only=True, **at)

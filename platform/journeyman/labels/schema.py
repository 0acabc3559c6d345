"""The columns of a label dataset, named once, and its records."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from journeyman.teacher.answers import (
    ClassLabels,
    GeneratedLabels,
    Labeled,
    LogitLabels,
    RationaleLabels,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from journeyman.labels.codec import Codec

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What became of one corpus shard; its file's existence makes the shard done.

    rows = ok + quarantined + filtered. Files are named by their path under the dataset.
    """

    shard: str
    generation: int  # 0; each requeue of the shard's quarantined rows makes the next one
    data: str
    quarantine: str | None  # where rows are in quarantine
    filtered_file: str | None  # where rows were left out
    sha256: str  # of the data file
    rows: int
    ok: int
    quarantined: int
    filtered: int
    truncated: int  # rows of ok whose text was cut to fit
    copied: int  # rows of ok taken from the cache
    prompt_tokens: int
    cached_tokens: int  # of prompt_tokens, read from the engine's prefix cache
    output_tokens: int
    seconds: float  # from the shard's first row to its file
    replica_seconds: float  # its part of its replica's time, which it shares with other shards
    bytes: int  # of the data file
    engine_restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A row that could not be labeled, and why."""

    id: str
    input: str  # the whole corpus row, JSON
    error_class: str
    message: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """A row that was left out on purpose, unlabeled, and by which filter."""

    id: str
    input: str  # the whole corpus row, JSON
    filter: str  # its name, `overflow` for one
    value: float  # what it saw: of `overflow`, the prompt's tokens


@functools.cache
def label_schema(kind: str) -> pa.Schema:
    """Columns of a dataset of this kind; those that all kinds have stand first."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("gold", pa.string()),
            pa.field("n_prompt_tokens", pa.int32(), nullable=False),
            pa.field("n_cached_tokens", pa.int32(), nullable=False),
            pa.field("n_output_tokens", pa.int32(), nullable=False),
            pa.field("finish_reason", pa.string(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            *_KINDS[kind](),
        ]
    )


def _classes_fields() -> list[pa.Field]:
    import pyarrow as pa

    return [
        # Natural log, in the order of the identity's classes, before prior correction.
        pa.field("class_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("label_mass", pa.float32()),
    ]


def _logits_fields() -> list[pa.Field]:
    import pyarrow as pa

    return [
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("token_ids", pa.binary(), nullable=False),  # Codec.unpack_ids
        pa.field("n_positions", pa.int32(), nullable=False),
        pa.field("logprobs", pa.binary(), nullable=False),  # Codec.decode
    ]


def _generate_fields() -> list[pa.Field]:
    import pyarrow as pa

    return [
        pa.field("output", pa.string(), nullable=False),
        pa.field("output_logprob", pa.float32()),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("token_ids", pa.binary()),  # null, as logprobs, of a teacher behind a URL
        pa.field("n_positions", pa.int32(), nullable=False),
        pa.field("logprobs", pa.binary()),
    ]


def _rationales_fields() -> list[pa.Field]:
    import pyarrow as pa

    return [
        pa.field("answer", pa.string(), nullable=False),
        pa.field("reasoning", pa.string(), nullable=False),
        pa.field("agreement", pa.float32(), nullable=False),
        pa.field("n_unparsed", pa.int32(), nullable=False),
        pa.field("reasonings", pa.list_(pa.string()), nullable=False),
        pa.field("answers", pa.list_(pa.string()), nullable=False),  # null where unparsable
        pa.field("class_logprobs", pa.list_(pa.float32())),
        pa.field("label_mass", pa.float32()),
    ]


_KINDS = {
    "classes": _classes_fields,
    "logits": _logits_fields,
    "generate": _generate_fields,
    "rationales": _rationales_fields,
}


def quarantine_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("input", pa.string(), nullable=False),
            pa.field("error_class", pa.string(), nullable=False),
            pa.field("message", pa.string(), nullable=False),
            pa.field("attempts", pa.int32(), nullable=False),
        ]
    )


def filtered_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("input", pa.string(), nullable=False),
            pa.field("filter", pa.string(), nullable=False),
            pa.field("value", pa.float64(), nullable=False),
        ]
    )


def record(row: dict[str, Any], labels: Labeled, codec: Codec | None) -> dict[str, Any]:
    """One corpus row and what the teacher said of it, as a record of ``label_schema``.

    codec: of the kinds that record distributions; None where the teacher gives none. What it
    packs is packed here, so that a shard in work holds bytes and not arrays.
    """
    return {
        "id": row["id"],
        "split": row["split"],
        "gold": row["label"],
        "n_prompt_tokens": labels.n_prompt_tokens,
        "n_cached_tokens": labels.n_cached_tokens,
        "n_output_tokens": labels.n_output_tokens,
        "finish_reason": labels.finish_reason,
        "truncated": labels.truncated,
        **_of_kind(labels, codec),
    }


def _of_kind(labels: Labeled, codec: Codec | None) -> dict[str, Any]:
    match labels:
        case ClassLabels():
            return {"class_logprobs": labels.class_logprobs, "label_mass": labels.label_mass}
        case LogitLabels():
            return _recorded(labels, codec)
        case GeneratedLabels():
            return {
                "output": labels.output,
                "output_logprob": labels.output_logprob,
                **_recorded(labels, codec),
            }
        case RationaleLabels():
            return {
                "answer": labels.answer,
                "reasoning": labels.reasoning,
                "agreement": labels.agreement,
                "n_unparsed": labels.n_unparsed,
                "reasonings": labels.reasonings,
                "answers": labels.answers,
                "class_logprobs": labels.class_logprobs,
                "label_mass": labels.label_mass,
            }


def _recorded(labels: LogitLabels | GeneratedLabels, codec: Codec | None) -> dict[str, Any]:
    recorded = labels.recorded
    if codec is None or recorded is None:  # a teacher behind a URL only counts its tokens
        return {
            "n_tokens": labels.n_output_tokens,
            "token_ids": None,
            "n_positions": 0,
            "logprobs": None,
        }
    return {
        "n_tokens": len(labels.token_ids),
        "token_ids": codec.pack_ids(labels.token_ids),
        "n_positions": len(recorded),
        "logprobs": codec.encode(recorded.token_ids, recorded.logprobs),
    }

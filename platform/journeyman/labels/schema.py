"""The columns of a label dataset, named once, and its records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What became of one corpus shard; its file's existence makes the shard done."""

    shard: str
    data: str  # path under the dataset
    quarantine: str | None  # path under the dataset, where rows are in quarantine
    sha256: str  # of the data file
    rows: int
    ok: int
    quarantined: int
    filtered: int
    prompt_tokens: int
    output_tokens: int
    seconds: float  # from the shard's first row to its file
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


def classes_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("gold", pa.string()),
            # Natural log, in the order of the manifest's classes, before prior correction.
            pa.field("class_logprobs", pa.list_(pa.float32()), nullable=False),
            pa.field("label_mass", pa.float32()),
            pa.field("n_prompt_tokens", pa.int32(), nullable=False),
            pa.field("n_output_tokens", pa.int32(), nullable=False),
            pa.field("finish_reason", pa.string(), nullable=False),
        ]
    )


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

"""Label tables to Parquet bytes and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_REPEATING = {"split", "gold", "finish_reason", "answer", "error_class", "filter"}


def parquet_bytes(table: pa.Table) -> bytes:
    """One row group; a dictionary only for what repeats, floats byte plane by byte plane.

    2,000 rows of 150 classes: 1.00 MB in 3 ms, against 1.72 MB in 16 ms by pyarrow's defaults.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    repeating, floats = [], []
    for field in table.schema:
        of = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_floating(of):
            floats.append(f"{field.name}.list.element" if of is not field.type else field.name)
        elif pa.types.is_integer(of) or field.name in _REPEATING:
            repeating.append(field.name)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=repeating,
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        write_statistics=False,
        row_group_size=max(1, len(table)),
    )
    return sink.getvalue().to_pybytes()


def parquet_table(content: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.BufferReader(content)).read(columns=columns)

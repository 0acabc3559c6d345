"""Any source to plain rows: Parquet, JSONL, CSV, TSV, text, Hugging Face dataset folders.

Yields a dict for each row and a Malformed for each that cannot be read; decides nothing about
ids, splits or duplicates.
"""

from __future__ import annotations

import csv
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from journeyman import object_store
from journeyman.errors import DataError

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]

_SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
AS_UTF8 = "save the file as UTF-8, for instance: iconv -f latin1 -t utf-8 OLD > NEW."


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """A row that cannot be read: where it stands, why, and what it holds."""

    source: str
    line: int  # from 1; of the file, or of the table for Parquet and Hugging Face folders
    reason: str
    content: bytes


def expand(patterns: Sequence[str]) -> list[str]:
    """Paths and URLs that the patterns name, sorted; raises DataError where one names none."""
    found: list[str] = []
    for pattern in patterns:
        filesystem, path = _filesystem(pattern)
        if any(c in pattern for c in "*?["):
            matches = [filesystem.unstrip_protocol(p) for p in sorted(filesystem.glob(path))]
        else:
            matches = [pattern] if filesystem.exists(path) else []
        if not matches:
            raise DataError(
                f"corpus.sources: {pattern}: no such file; paths are relative to {Path.cwd()}."
            )
        found += matches
    return found


def rows(url: str, kind: str, columns: Sequence[str]) -> Iterator[Row | Malformed]:
    """Rows of one source, with the wanted columns only (those that it has).

    Raises DataError if the source is unreadable, or has no ``columns[0]`` (the text) at all.
    """
    kind = format_of(url) if kind == "auto" else kind
    if kind == "hf":
        yield from _hf_rows(url, columns)
        return
    try:
        if kind == "parquet":
            yield from _parquet_rows(url, columns)
            return
        with _open(url) as file:
            if kind == "jsonl":
                yield from _jsonl_rows(url, file)
            elif kind == "text":
                yield from _text_rows(url, file, columns[0])
            else:
                yield from _csv_rows(url, file, "\t" if kind == "tsv" else ",")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # of compressed ones, too
        raise DataError(f"{url}: cannot be read ({error}).") from error


def columns(url: str, kind: str) -> list[str]:
    """Columns that a source declares, in its order; of JSONL, which declares none, the first row's.

    Raises DataError where it is unreadable.
    """
    if kind == "text":
        return ["text"]
    try:
        if kind == "parquet":
            return _parquet_columns(url)
        if kind == "hf":
            return _hf_columns(url)
        first = next(
            (row for row in rows(url, kind, ["text"]) if not isinstance(row, Malformed)), {}
        )
        return list(first)
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error}).") from error


def format_of(url: str) -> str:
    """Format by the file's name; a folder with dataset_info.json or dataset_dict.json is hf."""
    filesystem, path = _filesystem(url)
    if any(filesystem.exists(f"{path}/{f}") for f in ("dataset_dict.json", "dataset_info.json")):
        return "hf"
    name = url
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    kind = _SUFFIXES.get(Path(name).suffix.lower())
    if kind is None and filesystem.isdir(path):
        raise DataError(
            f"{url}: a folder, but none that datasets' save_to_disk wrote (no dataset_info.json); "
            f"name the files in it, for instance {url.rstrip('/')}/*.parquet in corpus.sources, or "
            "one of them for journeyman init."
        )
    if kind is None:
        raise DataError(
            f"{url}: the format cannot be told from the name; let it end in one of "
            f"{', '.join(_SUFFIXES)} (a .jsonl has an object in each line), or set corpus.format "
            "in a recipe."
        )
    return kind


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    protocol, _, path = url.partition("://")
    if path and protocol in object_store.PROTOCOLS:
        return object_store.Files(protocol), path
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # of file systems beside those, such as hdfs
        raise DataError(f"{url}: {error}.") from error
    except ValueError as error:
        raise DataError(f"{url}: not a path or URL that fsspec knows ({error}).") from error


def _open(url: str) -> Any:
    import fsspec

    filesystem, path = _filesystem(url)
    if not isinstance(filesystem, object_store.Files):
        return fsspec.open(url, "rb", compression="infer").open()
    file, compression = filesystem.open(path), fsspec.utils.infer_compression(path)
    return fsspec.compression.compr[compression](file, mode="rb") if compression else file


def _utf8(url: str, line: int, content: bytes) -> str | Malformed:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
        return Malformed(source=url, line=line, reason=reason, content=content)


def _jsonl_rows(url: str, file: BinaryIO) -> Iterator[Row | Malformed]:
    for number, content in enumerate(file, 1):
        if not content.strip():
            continue
        text = _utf8(url, number, content)
        if isinstance(text, Malformed):
            yield text
            continue
        try:
            row = json.loads(text)
            reason = "" if isinstance(row, dict) else "not a JSON object"
            if "\\u" in text:  # an escape can spell half a character, which no file can hold
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            reason = "an escape spells half of a surrogate pair"
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error}"
        if reason:
            yield Malformed(source=url, line=number, reason=reason, content=content)
        else:
            yield row


def _text_rows(url: str, file: BinaryIO, column: str) -> Iterator[Row | Malformed]:
    for number, content in enumerate(file, 1):
        text = _utf8(url, number, content.rstrip(b"\r\n"))
        if isinstance(text, Malformed):
            yield text
        elif text.strip():
            yield {column: text}


def _csv_rows(url: str, file: BinaryIO, delimiter: str) -> Iterator[Row | Malformed]:
    # A quoted field may span lines, so bytes that are not UTF-8 are told after parsing: they
    # come through as lone surrogates.
    lines = (line.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape")
             for i, line in enumerate(file))  # fmt: skip
    if delimiter == "\t":  # a TSV file has no quoting: a quotation mark there is text
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=delimiter)
    header: list[str] | None = None
    try:
        for fields in reader:
            if header is None:
                header = _header(url, fields)
            elif fields:
                yield _csv_row(url, reader.line_num, header, fields, delimiter)
    except csv.Error as error:
        raise DataError(f"{url}: line {reader.line_num}: not valid CSV ({error}).") from error


def _header(url: str, fields: list[str]) -> list[str]:
    try:
        " ".join(fields).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{url}: the header is not UTF-8; {AS_UTF8}") from error
    if repeated := next((name for name, n in Counter(fields).items() if name and n > 1), None):
        raise DataError(
            f"{url}: two columns are called {repeated!r}; give one of them another name, so that "
            "it is plain which is meant."
        )
    return fields


def _csv_row(
    url: str, line: int, header: list[str], fields: list[str], delimiter: str
) -> Row | Malformed:
    content = delimiter.join(fields).encode("utf-8", "surrogateescape")
    text = _utf8(url, line, content)
    if isinstance(text, Malformed):
        return text
    if len(fields) != len(header):
        reason = f"{len(fields)} fields where the header has {len(header)}"
        return Malformed(source=url, line=line, reason=reason, content=content)
    return dict(zip(header, fields, strict=True))


def _parquet_rows(url: str, columns: Sequence[str]) -> Iterator[Row | Malformed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(url) as file:
        try:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            n_before = 0
            for batch in table.iter_batches(columns=[c for c in columns if c in names]):
                yield from _batch_rows(url, n_before, batch)
                n_before += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{url}: not a readable Parquet file ({reason}); it may be cut short: copy it anew."
            ) from error


def _parquet_columns(url: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(url) as file:
        try:
            names: list[str] = pq.ParquetFile(file).schema_arrow.names
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{url}: not a readable Parquet file ({reason}).") from error
    return names


def _batch_rows(url: str, n_before: int, batch: Any) -> Iterator[Row | Malformed]:
    """Rows of an Arrow batch; Parquet's strings may hold any bytes."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 at byte {error.start}"
                yield Malformed(
                    source=url, line=n_before + i + 1, reason=reason, content=error.object
                )


def _hf_parts(url: str) -> list[tuple[str | None, datasets.Dataset]]:
    """The folder's datasets by split, None where it has no splits."""
    import datasets

    try:
        loaded = datasets.load_from_disk(url)
    except (OSError, ValueError, KeyError, TypeError) as error:  # as its files are damaged
        raise DataError(
            f"{url}: not a readable Hugging Face dataset folder ({type(error).__name__}: {error}); "
            "it may be cut short: copy it anew."
        ) from error
    return [*loaded.items()] if isinstance(loaded, datasets.DatasetDict) else [(None, loaded)]


def _hf_columns(url: str) -> list[str]:
    parts = _hf_parts(url)
    own: list[str] = parts[0][1].column_names
    return own if parts[0][0] is None else ["split", *own]


def _hf_rows(url: str, columns: Sequence[str]) -> Iterator[Row]:
    import datasets

    for split, part in _hf_parts(url):
        names = {
            name: feature
            for name, feature in part.features.items()
            if isinstance(feature, datasets.ClassLabel)
        }
        wanted = part.select_columns([c for c in columns if c in part.column_names])
        for name, feature in wanted.features.items():  # no picture or sound is wanted as such
            if getattr(feature, "decode", False):
                wanted = wanted.cast_column(name, replace(feature, decode=False))
        for row in wanted:
            for name in names.keys() & row.keys():
                given = row[name]
                row[name] = None if given is None or given < 0 else names[name].int2str(given)
            yield row if split is None else {"split": split, **row}

"""A label dataset written out for other tools: Hugging Face datasets, JSON lines, one Parquet file.

Shard by shard, so that no dataset is too large; the result appears when it is whole.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman import files
from journeyman.errors import DataError, RecipeError
from journeyman.labels import dataset
from journeyman.labels.codec import Codec, Distributions
from journeyman.labels.inspect.opened import Opened
from journeyman.labels.schema import Commit
from journeyman.recipe import Generate, Logits

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("hf", "jsonl", "parquet")

# Columns as they are stored, in the order in which they are written out.
_AS_STORED = (
    "output",
    "output_logprob",
    "answer",
    "reasoning",
    "agreement",
    "n_unparsed",
    "reasonings",
    "answers",
    "label_mass",
    "n_prompt_tokens",
    "n_output_tokens",
    "finish_reason",
    "truncated",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written. notes: what a user should know of it, one sentence each."""

    path: Path
    rows: int
    bytes: int
    notes: tuple[str, ...]


def export(
    opened: Opened,
    format_: str,
    out: Path,
    *,
    decode: bool = False,
    split: str | None = None,
    force: bool = False,
) -> Exported:
    """Write the rows that readers get, with their texts where the corpus is at hand.

    decode: token distributions as lists of numbers, many times larger than the packed bytes.
    force: in place of what is at ``out``. Raises RecipeError (unknown format), DataError (no rows;
    out is there already).
    """
    if format_ not in FORMATS:
        raise RecipeError(f"--format {format_}: there is no such format; take one of hf, jsonl, "
                          "parquet.")  # fmt: skip
    if ":/" in str(out):  # a Path has made one slash of two
        raise RecipeError(f"--out {out}: name a file or folder on this machine.")
    if out.exists() and not force:
        raise DataError(f"{out} is there already; name another, or replace it with --force.")
    tables = _Tables(opened, format_, decode, split)
    with _moved_when_whole(out) as temporary:
        _WRITERS[format_](tables, out, temporary)
        if not tables.n_rows:
            of_split = f" of split {split}" if split else ""
            raise DataError(f"{opened.where} has no labeled row{of_split} to export yet.")
        size = sum(f.stat().st_size for f in [temporary, *temporary.rglob("*")] if f.is_file())
    notes = list(tables.notes())
    if format_ == "parquet":
        readme = out.with_name(f"{out.name}.README.md")
        files.write_bytes(readme, _readme(tables, out).encode())
        notes.append(f"How to read it: {readme}")
    return Exported(path=out, rows=tables.n_rows, bytes=size, notes=tuple(notes))


@contextlib.contextmanager
def _moved_when_whole(out: Path) -> Iterator[Path]:
    """A name beside ``out`` to write to; it takes ``out``'s place when the block ends well."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with files.disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if out.is_dir() or temporary.is_dir():
                _remove(out)
            temporary.replace(out)
        finally:
            _remove(temporary)


def _remove(path: Path) -> None:
    """A file or a whole folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Tables:
    """The dataset as the tables that are written, all of one schema; counts what went by."""

    def __init__(self, opened: Opened, format_: str, decode: bool, split: str | None) -> None:
        self.opened = opened
        self.format = format_
        self.decode = decode
        self.n_rows = 0
        self._split = split

    @property
    def has_tokens(self) -> bool:
        return isinstance(self.opened.labels, Logits | Generate) and self.opened.codec is not None

    @property
    def packed(self) -> bool:
        """Whether distributions are written as they are stored."""
        return self.has_tokens and not self.decode and self.format != "jsonl"

    def __iter__(self) -> Iterator[pa.Table]:
        import pyarrow.compute as pc

        for commit, table in self.opened.shards():
            rows = table.filter(pc.equal(table["split"], self._split)) if self._split else table
            if len(rows):
                self.n_rows += len(rows)
                yield self._columns(commit, rows)

    def _columns(self, commit: Commit, rows: pa.Table) -> pa.Table:
        import pyarrow as pa

        columns: dict[str, Any] = {name: rows[name] for name in ("id", "split", "gold")}
        if self.opened.corpus_dir is not None:
            sources = self.opened.corpus_rows(commit)
            found = [sources.get(row_id, {}) for row_id in columns["id"].to_pylist()]
            for name in ("text", "meta"):
                columns[name] = pa.array([row.get(name) for row in found], pa.string())
        columns |= self._classes(rows)
        columns |= {name: rows[name] for name in _AS_STORED if name in rows.column_names}
        if self.has_tokens:
            columns |= self._tokens(rows)
        return pa.table(columns)

    def _classes(self, rows: pa.Table) -> dict[str, Any]:
        """The likeliest class, and the distribution as readers get it: prior corrected."""
        import pyarrow as pa

        if not self.opened.classes or rows["class_logprobs"].null_count:
            return {}
        logprobs = self.opened.class_logprobs(rows)
        best = logprobs.argmax(axis=1)
        n_rows, n_classes = logprobs.shape
        offsets = np.arange(n_rows + 1, dtype=np.int32) * np.int32(n_classes)
        probabilities = np.exp(logprobs).astype(np.float32).ravel()
        return {
            "label": pa.array(best)
            if self.format == "hf"
            else pa.array(self.opened.classes).take(pa.array(best)),
            "probabilities": pa.ListArray.from_arrays(offsets, probabilities),
        }

    def _tokens(self, rows: pa.Table) -> dict[str, Any]:
        codec = self.opened.codec
        assert codec is not None
        columns = {"token_ids": unpacked_ids(rows, codec)}
        if self.decode:
            return columns | decoded(rows, codec)
        if self.packed:
            return columns | {n: rows[n] for n in ("n_positions", "logprobs")}
        return columns

    def notes(self) -> Iterator[str]:
        opened = self.opened
        yield from opened.notes
        if opened.why_no_text:
            yield f"Without texts: {opened.why_no_text}."
        if self.has_tokens and self.format == "jsonl" and not self.decode:
            yield "Without token distributions: --decode writes them as lists of numbers."


def unpacked_ids(rows: pa.Table, codec: Codec) -> pa.Array:
    """list<int32>: the column token_ids; empty where a teacher behind a URL gave none."""
    import pyarrow as pa

    packed = rows["token_ids"].to_pylist()
    ids = codec.unpack_ids(b"".join(p for p in packed if p))
    counts = np.where([p is None for p in packed], 0, rows["n_tokens"].to_numpy())
    return pa.ListArray.from_arrays(_offsets(counts), ids)


def decoded(rows: pa.Table, codec: Codec) -> dict[str, pa.Array]:
    """Token distributions as lists: one entry a position, in it one a stored token."""
    import pyarrow as pa

    read = [one or _nothing(codec) for one in dataset.distributions(rows, codec)]
    positions = _offsets([len(one.log_tail_mass) for one in read])
    stored = [one.token_ids >= 0 for one in read]
    entries = _offsets(np.concatenate([at.sum(axis=1) for at in stored]))

    def per_token(values: list[np.ndarray]) -> pa.Array:
        kept = np.concatenate([v[at] for v, at in zip(values, stored, strict=True)])
        return pa.ListArray.from_arrays(positions, pa.ListArray.from_arrays(entries, kept))

    return {
        "top_token_ids": per_token([one.token_ids for one in read]),
        "top_logprobs": per_token([one.logprobs for one in read]),
        "log_tail_mass": pa.ListArray.from_arrays(
            positions, np.concatenate([one.log_tail_mass for one in read])
        ),
    }


def _nothing(codec: Codec) -> Distributions:
    """Of a row to which a teacher behind a URL gave none."""
    nothing = np.empty((0, codec.k))
    return Distributions(
        token_ids=nothing.astype(np.int32),
        logprobs=nothing.astype(np.float32),
        log_tail_mass=np.empty(0, dtype=np.float32),
    )


def _offsets(counts: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


# --- one writer a format ---


def _write_parquet(tables: _Tables, _: Path, to: Path) -> None:
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        writer = None
        for table in tables:
            if writer is None:
                about = {"journeyman": json.dumps(_about(tables))}
                columns = table.schema.with_metadata(about)
                writer = stack.enter_context(pq.ParquetWriter(to, columns, compression="zstd"))
            writer.write_table(table)


def _write_jsonl(tables: _Tables, out: Path, to: Path) -> None:
    compressed = out.name.endswith(".gz")
    opener = gzip.open if compressed else open
    with opener(to, "wt", encoding="utf-8") as file:
        for table in tables:
            for row in table.to_pylist():
                record = _json_record(row, tables.opened.classes)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _json_record(row: dict[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """Probabilities by label, in their six digits; JSON has no -inf, so no tail at all is null."""
    if row.get("probabilities") is not None:
        digits = [float(f"{p:.6g}") for p in row["probabilities"]]
        row["probabilities"] = dict(zip(classes, digits, strict=True))
    if "log_tail_mass" in row:
        row["log_tail_mass"] = [m if np.isfinite(m) else None for m in row["log_tail_mass"]]
    if row.get("meta"):
        row["meta"] = json.loads(row["meta"])
    return row


def _write_hf(tables: _Tables, out: Path, to: Path) -> None:
    """By way of one Arrow file, which ``datasets`` maps and copies in parts of a bearable size."""
    datasets = _datasets()
    rows = to.with_name(f"{to.name}.arrow")
    try:
        _write_arrow(datasets, tables, rows)
        if tables.n_rows:
            with _without_progress_bars(datasets):
                datasets.Dataset.from_file(str(rows)).save_to_disk(to)
            (to / "README.md").write_text(_readme(tables, out), encoding="utf-8")
    finally:
        rows.unlink(missing_ok=True)


def _write_arrow(datasets: Any, tables: _Tables, to: Path) -> None:
    import pyarrow as pa

    with contextlib.ExitStack() as stack:
        writer = None
        for table in tables:
            if writer is None:
                columns = _features(datasets, table.schema, tables.opened.classes).arrow_schema
                writer = stack.enter_context(pa.ipc.new_stream(str(to), columns))
            writer.write_table(table.cast(columns))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "--format hf needs the package datasets, which is not installed: pip install datasets, "
            "or take --format parquet, which datasets.load_dataset reads as well."
        ) from error
    return datasets


def _features(datasets: Any, schema: pa.Schema, classes: tuple[str, ...]) -> Any:
    """The label's numbers carry their names: in this order stand the probabilities, too."""
    features = datasets.Features.from_arrow_schema(schema)
    if "label" in features:
        features["label"] = datasets.ClassLabel(names=list(classes))
    return features


@contextlib.contextmanager
def _without_progress_bars(datasets: Any) -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


_WRITERS: dict[str, Callable[[_Tables, Path, Path], None]] = {
    "hf": _write_hf,
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
}


# --- what a reader of the copy must know ---


def _about(tables: _Tables) -> dict[str, Any]:
    manifest = tables.opened.manifest
    return {
        "labels": manifest.get("digest"),
        "identity": manifest["identity"],
        "classes": list(tables.opened.classes),
        "codec": manifest.get("codec"),
    }


def _readme(tables: _Tables, out: Path) -> str:
    opened = tables.opened
    load = {
        "hf": f'from datasets import load_from_disk\n\nrows = load_from_disk("{out}")',
        "parquet": f'import pyarrow.parquet as pq\n\nrows = pq.read_table("{out}").to_pylist()',
    }[tables.format]
    parts = [
        f"# {opened.labels.kind} labels by {opened.teacher}\n",
        f"Exported by `journeyman labels export --format {tables.format}` from `{opened.where}`.\n",
        f"```python\n{load}\n```\n",
    ]
    if opened.classes:
        names = ", ".join(f"`{label}`" for label in opened.classes)
        parts.append(f"`probabilities` stand in this order: {names}.\n")
    if tables.packed:
        parts.append(_how_to_decode(opened.codec))
    elif tables.has_tokens and tables.decode:
        parts.append(
            "`top_token_ids` and `top_logprobs` hold the stored tokens of each position and their "
            "natural log-probabilities; `log_tail_mass` is the log of the probability of all other "
            "tokens. Position i is the distribution over the token "
            "`token_ids[len(token_ids) - len(log_tail_mass) + i]`, given all before it.\n"
        )
    return "\n".join(parts)


def _how_to_decode(codec: Codec | None) -> str:
    assert codec is not None
    return f"""\
`logprobs` holds a row's token distributions, packed. They are read with
(`pip install journeyman`, or write them out with `--decode`):

```python
from journeyman.labels.codec import Codec

codec = Codec(name="{codec.name}", vocab_size={codec.vocab_size}, k={codec.k})
read = codec.decode(rows[0]["logprobs"], rows[0]["n_positions"])
read.token_ids      # int32[positions, k], -1 where a position has fewer entries
read.logprobs       # float32[positions, k], natural log
read.log_tail_mass  # float32[positions]: of all other tokens
```

Position i is the distribution over the token `token_ids[len(token_ids) - n_positions + i]`, given
all before it.
"""

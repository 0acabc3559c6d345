"""Rows of tokens on disk as a training reads them: at random, mapped, decoded batch by batch.

Distributions stay as the label dataset encodes them until their batch is due; the workers of a node
share the pages, and a dataset may be larger than memory. Knows arrays and files, no torch.

    tokens.bin int32[total]   starts.npy int64[n + 1]   first.npy int64[n]   ids.json
    payloads.bin   payload_starts.npy int64[n + 1]   n_encoded.npy int64[n]   rows.json
    weights.npy float64[n]   reasoning.npy bool[n]   aligned.bin int32[learned tokens]
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from journeyman import files
from journeyman.errors import DataError
from journeyman.labels.codec import Codec, Distributions
from journeyman.student.batches import TokenRows
from journeyman.student.learner import Against

_MANIFEST = "rows.json"
_AHEAD = 4  # batches that are decoded before they are asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One text that the student learns from its token ``first`` on; before that is its context.

    payload: its distributions, encoded, the first of them for token ``first``; None where there are
    none. There may be more than tokens: a text that was cut keeps those of the part that is left.
    """

    id: str
    tokens: np.ndarray  # int[t]
    first: int  # 1 to t - 1
    payload: bytes | None = None
    n_encoded: int = 0  # positions in payload
    # int[t - first] at least: each token's position in payload, -1 for none; default in order.
    aligned: np.ndarray | None = None
    weight: float = 1.0  # before it is normalised over the split
    reasoning: bool = False  # the reasoning behind the answer that is the row before it


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """b rows; m learned tokens, row by row.

    token_ids: int64[m, k], logprobs: float32[m, k], log_tail_mass: float32[m], as
    ``labels.codec.Distributions``; None where the dataset has no distributions.
    """

    numbers: np.ndarray  # int64[b]: the rows, as the dataset counts them
    rows: TokenRows
    token_rows: np.ndarray  # int64[m]: each token's row, 0 to b - 1
    columns: np.ndarray  # int64[m]: where in its row the hidden state stands that predicts it
    targets: np.ndarray  # int64[m]: the tokens
    token_ids: np.ndarray | None
    logprobs: np.ndarray | None
    log_tail_mass: np.ndarray | None

    @property
    def n_rows(self) -> int:
        return len(self.rows)

    def padded(self, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """input_ids and attention_mask, int64[b, t]; where the m hidden states stand in b · t."""
        input_ids, mask = self.rows.padded(np.arange(self.n_rows), pad_id)
        return input_ids, mask, self.token_rows * input_ids.shape[1] + self.columns


class TokenDataset:
    """The rows of one split."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if the folder is not whole."""
        if not (folder / _MANIFEST).exists():
            raise DataError(f"{folder}: no rows to train on; run journeyman train again.")
        about = files.read_json(folder / _MANIFEST)
        codec = about["codec"]
        self._codec = Codec(**codec) if codec else None
        self.ids: list[str] = files.read_json(folder / "ids.json")["ids"]
        try:
            self._rows = TokenRows(
                ids=_mapped(folder / "tokens.bin", np.int32), starts=np.load(folder / "starts.npy")
            )
            self._first = np.load(folder / "first.npy")
            self._n_encoded = np.load(folder / "n_encoded.npy")
            self.weights = np.load(folder / "weights.npy")
            self.reasoning = np.load(folder / "reasoning.npy")
            self._payload_starts = np.load(folder / "payload_starts.npy")
            self._payloads = _mapped(folder / "payloads.bin", np.uint8)
            self._aligned = _mapped(folder / "aligned.bin", np.int32) if about["aligned"] else None
        except (OSError, ValueError, EOFError) as error:  # what numpy raises for half a file
            raise cut_short(folder, str(error)) from error
        arrays = (
            (self._rows.starts, 1), (self._payload_starts, 1), (self._first, 0),
            (self._n_encoded, 0), (self.weights, 0), (self.reasoning, 0),
            (self.ids, 0),
        )  # fmt: skip
        if any(len(held) != about["rows"] + more for held, more in arrays):
            raise cut_short(folder, f"its files do not all hold {about['rows']} rows")
        for held, starts in (
            (self._rows.ids, self._rows.starts),
            (self._payloads, self._payload_starts),
        ):
            if len(held) != starts[-1]:
                raise cut_short(folder, f"{len(held)} entries where {starts[-1]} were written")
        # Once: over all rows, they would be most of a batch's cost.
        self._lengths = self._rows.lengths
        self._n_learned = self._lengths - self._first
        if self._aligned is not None:
            self._aligned_starts = _sums(self._n_learned)
            if len(self._aligned) != self._aligned_starts[-1]:
                raise cut_short(folder, f"{len(self._aligned)} tokens are aligned")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def other_tokens(self) -> bool:
        """Whether the distributions are over the tokens of another vocabulary."""
        return self._aligned is not None

    @property
    def sampled(self) -> bool:
        return self._codec is not None and self._codec.name == "sampled"

    @property
    def against(self) -> Against:
        """What a student can be measured against."""
        if self._codec is None or self.other_tokens:
            return "text"
        return "draws" if self.sampled else "distributions"

    @property
    def examples(self) -> np.ndarray:
        """int64[e + 1]: where each labeled text's rows begin; a reasoning is of the same text as
        the answer in front of it."""
        if not self.reasoning.any():
            return np.arange(len(self) + 1)
        changes = [a != b for a, b in itertools.pairwise(self.ids)]
        return np.concatenate([[0], np.flatnonzero(changes) + 1, [len(self)]])

    @property
    def lengths(self) -> np.ndarray:
        """int64[n], in tokens."""
        return self._lengths

    @property
    def n_learned(self) -> np.ndarray:
        """int64[n]: tokens of each row that are learned."""
        return self._n_learned

    def batch(self, rows: np.ndarray) -> TokenBatch:
        """Some rows, decoded; raises DataError where a payload is damaged."""
        lengths, learned = self.lengths[rows], self.n_learned[rows]
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        where = [slice(*self._rows.starts[i : i + 2]) for i in rows]
        tokens = np.concatenate([self._rows.ids[part] for part in where])
        token_rows = np.repeat(np.arange(len(rows)), learned)
        at = np.concatenate(
            [np.arange(f, n) for f, n in zip(self._first[rows], lengths, strict=True)]
        )
        token_ids, logprobs, tail = self._distributions(rows, learned)
        return TokenBatch(
            numbers=rows,
            rows=TokenRows(ids=tokens, starts=starts),
            token_rows=token_rows,
            columns=at - 1,
            targets=tokens[starts[token_rows] + at].astype(np.int64),
            token_ids=token_ids,
            logprobs=logprobs,
            log_tail_mass=tail,
        )

    def _distributions(
        self, rows: np.ndarray, learned: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        if self._codec is None:
            return None, None, None
        parts = []
        for row, n in zip(rows, learned, strict=True):
            data = self._payloads[slice(*self._payload_starts[row : row + 2])].tobytes()
            try:
                decoded = self._codec.decode(data, int(self._n_encoded[row]))
            except DataError as error:
                raise DataError(f"the labels of row {self.ids[row]}: {error}") from error
            parts.append(self._placed(decoded, row, n))
        widest = max(ids.shape[1] for ids, _, _ in parts)
        return (
            np.concatenate([_wide(ids, widest, -1) for ids, _, _ in parts]).astype(np.int64),
            np.concatenate([_wide(values, widest, -np.inf) for _, values, _ in parts]),
            np.concatenate([tail for _, _, tail in parts]),
        )

    def _placed(
        self, decoded: Distributions, row: int, n: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A row's distributions, one for each learned token: of no token where it has none."""
        if self._aligned is None:
            return decoded.token_ids[:n], decoded.logprobs[:n], decoded.log_tail_mass[:n]
        at = self._aligned[slice(*self._aligned_starts[row : row + 2])]
        none = at < 0
        token_ids, logprobs = decoded.token_ids[at], decoded.logprobs[at]
        tail = decoded.log_tail_mass[at]
        token_ids[none], logprobs[none], tail[none] = -1, -np.inf, 0.0
        return token_ids, logprobs, tail


def _mapped(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """A raw file's values; an empty one cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def cut_short(folder: Path, why: str) -> DataError:
    return DataError(f"{folder}: cut short ({why}); remove it and run journeyman train again.")


def _wide(entries: np.ndarray, width: int, fill: float) -> np.ndarray:
    """Entries that a row does not have: draws differ in how many tokens they hit."""
    if entries.shape[1] == width:
        return entries
    padding = np.full((len(entries), width - entries.shape[1]), fill, entries.dtype)
    return np.concatenate((entries, padding), axis=1)


def prefetch(parts: Iterator[np.ndarray], rows: TokenDataset) -> Iterator[TokenBatch]:
    """The batches of these row numbers, decoded ahead in a thread of its own.

    Its errors are raised here; the thread ends when the caller stops asking.
    """
    ready: queue.Queue[Any] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def decode() -> None:
        try:
            for part in parts:
                if stopped.is_set():
                    return
                put(rows.batch(part))
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=decode, name="decoding", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()


def write(folder: Path, rows: Iterable[TokenRow], codec: Codec | None) -> int:
    """Write a split's rows, whole or not at all; how many there are. Of none, nothing is written.

    codec: of the payloads; None where rows have none. A folder that is there already stays.
    """
    with files.scratch_folder(folder) as fresh:
        with Writer(fresh, codec) as writer:
            for row in rows:
                writer.add(row)
        if writer.n_rows:
            take_name(fresh, folder)
    return writer.n_rows


def take_name(fresh: Path, folder: Path) -> None:
    """Of two that write at the same time the first wins: a full folder is not renamed over."""
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.exists():
            raise


class Writer:
    """Row by row into a folder, which is whole when the block ends well: what is held in memory
    are ids and numbers of rows."""

    def __init__(self, folder: Path, codec: Codec | None) -> None:
        """folder: made where it is missing. codec: as of ``write``."""
        self._folder, self._codec = folder, codec
        self._ids: list[str] = []
        self._lengths, self._first, self._n_encoded, self._sizes = (array("q") for _ in range(4))
        self._weights, self._reasoning = array("d"), array("b")
        self._open = contextlib.ExitStack()

    @property
    def n_rows(self) -> int:
        return len(self._ids)

    def __enter__(self) -> Self:
        self._folder.mkdir(exist_ok=True)
        self._tokens, self._payloads, self._aligned = (
            self._open.enter_context((self._folder / name).open("wb"))
            for name in ("tokens.bin", "payloads.bin", "aligned.bin")
        )
        return self

    def add(self, row: TokenRow) -> None:
        self._ids.append(row.id)
        self._lengths.append(len(row.tokens))
        self._first.append(row.first)
        self._n_encoded.append(row.n_encoded)
        self._weights.append(row.weight)
        self._reasoning.append(row.reasoning)
        self._sizes.append(len(row.payload or b""))
        self._tokens.write(np.asarray(row.tokens, np.int32).tobytes())
        self._payloads.write(row.payload or b"")
        if row.aligned is not None:
            n_learned = len(row.tokens) - row.first
            self._aligned.write(np.asarray(row.aligned[:n_learned], np.int32).tobytes())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        has_aligned = self._aligned.tell() > 0
        self._open.close()
        if kind is None:
            self._write_numbers(has_aligned)

    def _write_numbers(self, has_aligned: bool) -> None:
        folder, codec = self._folder, self._codec
        np.save(folder / "starts.npy", _sums(self._lengths))
        np.save(folder / "payload_starts.npy", _sums(self._sizes))
        np.save(folder / "first.npy", np.asarray(self._first, np.int64))
        np.save(folder / "n_encoded.npy", np.asarray(self._n_encoded, np.int64))
        np.save(folder / "weights.npy", np.asarray(self._weights, np.float64))
        np.save(folder / "reasoning.npy", np.asarray(self._reasoning, bool))
        files.write_json(folder / "ids.json", {"ids": self._ids})
        about = codec and {"name": codec.name, "vocab_size": codec.vocab_size, "k": codec.k}
        files.write_json(
            folder / _MANIFEST, {"rows": self.n_rows, "codec": about, "aligned": has_aligned}
        )


def _sums(sizes: array[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(sizes, np.int64))])

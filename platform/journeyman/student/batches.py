"""Which rows make which batch, and the batch as arrays. No torch, no process group.

The order is a function of (seed, epoch) alone: a resumed run needs no state to find it again,
and any number of workers walks through the same global batches.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Rows are sorted by length within so many batches: less padding, while the order stays random.
_WINDOW = 8
_SHORT = 32  # tokens: below, a pass of its own costs more than the padding that it saves
_AT_ONCE = 1024  # texts that a tokenizer is given: its own objects are kilobytes for each


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Token ids of n rows, one behind the other.

    ids: int32[total]; starts: int64[n + 1], row i is ids[starts[i]:starts[i + 1]].
    """

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64[n], in tokens."""
        return np.diff(self.starts)

    def take(self, rows: np.ndarray) -> TokenRows:
        """Some rows, in this order."""
        parts = [self.ids[slice(*self.starts[i : i + 2])] for i in rows]
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.lengths[rows], out=starts[1:])
        return TokenRows(ids=np.concatenate([np.zeros(0, np.int32), *parts]), starts=starts)

    def padded(self, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask of some rows, padded to the longest: int64[b, t] each."""
        lengths = self.lengths[rows]
        columns = np.arange(lengths.max(initial=1))
        mask = columns < lengths[:, None]
        # Behind its end a row points at its first token, and the mask puts the padding there.
        source = self.starts[rows][:, None] + np.where(mask, columns, 0)
        return np.where(mask, self.ids[source], pad_id).astype(np.int64), mask.astype(np.int64)


def tokenise(
    tokenizer: Callable[..., Any], texts: Sequence[str | tuple[str, str]], max_length: int
) -> TokenRows:
    """Token ids with the model's special tokens; what has more than max_length tokens is cut.

    texts: all of them texts, or all of them pairs. One without any token, as there may be where
    nothing special begins or ends a text, has the one that ends texts.
    """
    ids, lengths = array("i"), array("q")
    for begin in range(0, len(texts), _AT_ONCE):
        part = texts[begin : begin + _AT_ONCE]
        pairs = [text for text in part if isinstance(text, tuple)]
        rows = tokenizer(
            *([list(side) for side in zip(*pairs, strict=True)] if pairs else [list(part)]),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        for row in rows:
            row = row or [getattr(tokenizer, "eos_token_id", None) or 0]
            ids.extend(row)
            lengths.append(len(row))
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return TokenRows(ids=np.asarray(ids, np.int32), starts=starts)


def joined(parts: Sequence[TokenRows]) -> TokenRows:
    """The rows of all parts, of which there is one at least, in their order."""
    starts = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
    return TokenRows(
        ids=np.concatenate([part.ids for part in parts]), starts=np.cumsum(starts, dtype=np.int64)
    )


def n_batches(n_rows: int, batch_size: int) -> int:
    return -(-n_rows // batch_size)


def epoch_batches(
    lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int
) -> list[np.ndarray]:
    """The global batches of one epoch: row indices, int64[<= batch_size] each, each row once.

    lengths: int64[n], tokens a row. Only one batch is short, where batch_size does not divide n.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), _WINDOW * batch_size):
        window = order[start : start + _WINDOW * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        cut = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        batches += [cut[i] for i in random.permutation(len(cut))]
    return batches


def passes(lengths: np.ndarray, most_rows: int, most_tokens: int | None) -> Iterator[np.ndarray]:
    """Rows of each forward pass, as indices, the shortest first: so many at most, as few as have no
    more than most_tokens, padding included, or one; then none that is over twice as long as the
    pass's shortest, unless it is short itself.

    lengths: int64[n], tokens a row.
    """
    order, start = np.argsort(lengths, kind="stable"), 0
    while start < len(order):
        batch = order[start : start + most_rows]
        if most_tokens is not None:  # padded to each in turn, as the longest
            padded = lengths[batch] * np.arange(1, len(batch) + 1)
            n_fit = int(np.searchsorted(padded, most_tokens, side="right"))
            alike = max(2 * lengths[batch[0]], _SHORT)
            n_alike = int(np.searchsorted(lengths[batch], alike, side="right"))
            batch = batch[: max(1, min(n_fit, n_alike))]
        yield batch
        start += len(batch)


def shard(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The rows of a global batch that fall to one worker; the workers' shards add up to it.

    A batch is sorted by length, so every world_size-th row gives all workers like work. Shards
    may differ by a row, or be empty: see ``share_of_mean``.
    """
    return batch[rank::world_size]


def share_of_mean(n_global: int, world_size: int) -> float:
    """What a worker multiplies the sum of its rows' losses with.

    DDP divides the sum of the workers' gradients by their number; with this factor the result
    is the gradient of the mean over the global batch, however its rows were dealt.
    """
    return world_size / n_global

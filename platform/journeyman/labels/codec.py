"""Logprob codecs: a row's next-token distributions as one bytes value, and back.

Knows arrays only: the teacher fills them, ``labels.dataset`` writes the bytes. A payload is a zlib
stream of byte planes, rank by rank (the first entries of all positions, then the second ones):
sorted log-probabilities become small differences, and each kind of byte has a Huffman table of its
own. Left to Parquet's zstd, which has one table for all of them, the planes take 6 to 9% more.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from journeyman.errors import DataError

CodecName = Literal["topk_fp16", "topk_q8", "sampled"]

_LAYOUT = 1  # goes up when payloads written before can no longer be read

# topk_fp16: 16 bits of fixed point, not IEEE half: that one is off by up to 3.9e-3 at -8 to -16,
# and 2e-3 is promised. This step is off by 1.465e-3 at most, which leaves 5e-4 to what two float32
# engines differ by. Its multiples are exact in float32, and reach down to -192 nats.
_FP16_STEP = 3 / 1024
_FP16_ABSENT = 0xFFFF  # an entry that is not there, or a tail without mass

# topk_q8: levels below a position's first entry, 1/16 nat each; up to 1/8 where entries span more
# than 15.9 nats. Entries over 31.75 nats below the first are raised to that.
_Q8_STEP = 1 / 16
_Q8_LOWEST = 254
_Q8_ABSENT = 255
_LOGIT_STEP = 1 / 64
_NO_TAIL, _EVEN, _ALL_TAIL = 0, 0x8000, 0xFFFF

_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]

_MOST_MASS = 1.01  # a log-softmax in bfloat16 is normalised to about 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Distributions:
    """One row's next-token distributions.

    A position's entries stand by falling probability (topk_*) or by token id (sampled).
    """

    token_ids: np.ndarray  # int32[positions, k]; -1 where a position has fewer entries
    logprobs: np.ndarray  # float32[positions, k]; -inf where fewer. sampled: log(count / draws)
    log_tail_mass: np.ndarray  # float32[positions]: of all other tokens together; -inf if none


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """One way to write distributions over a vocabulary; ``describe`` says what it promises.

    k: entries a position (topk_*), or draws a position (sampled).
    """

    name: str
    vocab_size: int
    k: int

    def __post_init__(self) -> None:
        if self.name not in get_args(CodecName):
            known = ", ".join(get_args(CodecName))
            raise DataError(f"There is no logprob codec {self.name!r}; there are {known}.")
        if not 1 <= self.vocab_size <= 1 << 31 or not 1 <= self.k < 1 << 16:
            raise DataError(
                f"{self.name}: vocab_size {self.vocab_size} must lie in 1 to 2**31, and k {self.k} "
                "in 1 to 65535."
            )

    @classmethod
    def described(cls, manifest: Mapping[str, Any]) -> Codec:
        """The codec that ``describe`` gave; raises DataError for one of a newer version."""
        name, layout = manifest["name"], manifest.get("layout", _LAYOUT)
        if name not in get_args(CodecName) or layout != _LAYOUT:
            raise DataError(
                f"the labels are written in the codec {name}, layout {layout}, and this version of "
                f"Journeyman reads {', '.join(get_args(CodecName))}, layout {_LAYOUT}; install the "
                "version that wrote them, or label again."
            )
        entries = manifest["draws" if name == "sampled" else "k"]
        return cls(name=name, vocab_size=manifest["vocab_size"], k=entries)

    def encode(self, token_ids: np.ndarray, logprobs: np.ndarray) -> bytes:
        """One row's payload; raises DataError for what is no distribution over the vocabulary.

        topk_*: token_ids int[positions, k'] and logprobs float32[positions, k'], k' up to k:
        natural logs, normalised over the whole vocabulary, falling; an entry of -inf is none.
        sampled: token_ids int[positions, k], true draws with replacement, in any order; logprobs
        are not read, as counts are all that the estimate needs.
        """
        token_ids = np.asarray(token_ids)
        if self.name == "sampled":
            return self._encode_draws(token_ids)
        return self._encode_topk(token_ids, np.asarray(logprobs, dtype=np.float32))

    def decode(self, data: bytes, n_positions: int) -> Distributions:
        """A payload's distributions; raises DataError if it is damaged or of another length."""
        if self.name == "sampled":
            return self._decode_draws(data, n_positions)
        return self._decode_topk(data, n_positions)

    def pack_ids(self, token_ids: np.ndarray) -> bytes:
        """A row's own tokens, int[n], as little-endian integers of the fewest whole bytes."""
        ids = np.asarray(token_ids)
        self._check_ids(ids)
        return np.ascontiguousarray(_planes(ids, self._id_bytes).T).tobytes()

    def unpack_ids(self, data: bytes) -> np.ndarray:
        """int32[n] from ``pack_ids``."""
        if len(data) % self._id_bytes:
            raise self._damaged(
                f"{len(data)} bytes are no whole number of {self._id_bytes}-byte ids"
            )
        return _joined(np.frombuffer(data, np.uint8).reshape(-1, self._id_bytes).T)

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the codec: all that a reader needs, and what it may trust."""
        estimator = f"the {self.k} largest probabilities, and the mass of all other tokens"
        if self.name == "sampled":
            estimator = (
                f"p(token) = count / {self.k}, of draws with replacement: unbiased, with variance "
                f"p (1 - p) / {self.k}"
            )
        return {
            "name": self.name,
            "draws" if self.name == "sampled" else "k": self.k,
            "vocab_size": self.vocab_size,
            "layout": _LAYOUT,
            "bytes_per_token_uncompressed": {
                "topk_fp16": 2 + self.k * (self._id_bytes + 2),
                "topk_q8": 2 + self.k * (self._id_bytes + 1),
                "sampled": self.k * (self._id_bytes + self._count_bytes),  # at most
            }[self.name],
            "estimator": estimator,
            "error_bound": {
                "topk_fp16": "each log-probability, and the log of the tail's mass, within 1.5e-3 "
                "nat of its float32 value; below -192 nats it is -inf",
                "topk_q8": "KL(exact || decoded) over the entries and the tail is at most 5e-4 "
                "nat where the entries of a position span up to 15.8 nats, and 2e-3 anywhere; "
                "decoded probabilities and tail sum to 1",
                "sampled": "the counts are exact",
            }[self.name],
        }

    @property
    def _id_bytes(self) -> int:
        return _whole_bytes(self.vocab_size - 1)

    @property
    def _count_bytes(self) -> int:
        return _whole_bytes(self.k)

    def _encode_topk(self, token_ids: np.ndarray, logprobs: np.ndarray) -> bytes:
        ids, logprobs = self._by_rank(token_ids, logprobs)  # [k, positions] from here on
        mass, tail = _masses(logprobs)
        if not (mass <= _MOST_MASS).all():
            raise DataError(
                f"{self.name}: the probabilities of a position sum to {mass.max():.4g}; pass "
                "natural logs that are normalised over the whole vocabulary."
            )
        encoded = _encode_fp16 if self.name == "topk_fp16" else _encode_q8
        levels, tail_code, absent = encoded(logprobs, mass, tail)
        if absent.any():
            ids = np.where(absent, 0, ids)
        self._check_ids(ids)
        tail_low, tail_high = _planes(tail_code, 2)
        first_ids, *more_ids = _planes(ids, self._id_bytes)
        first_levels, *more_levels = levels
        blocks = [[tail_low, first_ids], *([plane] for plane in more_ids)]
        blocks += [[tail_high, first_levels], *([plane] for plane in more_levels)]
        # High bytes of 16-bit differences are runs of zeros; elsewhere looking for runs costs 1%.
        return _deflated(blocks, zlib.Z_RLE if more_levels else zlib.Z_HUFFMAN_ONLY)

    def _decode_topk(self, data: bytes, n_positions: int) -> Distributions:
        level_bytes = 2 if self.name == "topk_fp16" else 1
        n_rows = 2 + self.k * (self._id_bytes + level_bytes)
        body = self._inflated(data, n_rows * n_positions)
        if len(body) != n_rows * n_positions:
            raise self._damaged(
                f"{len(body)} bytes are not the {n_rows * n_positions} of {n_positions} positions"
            )
        rows = body.reshape(n_rows, n_positions)
        tail_row = 1 + self.k * self._id_bytes
        ids = _joined(rows[1:tail_row].reshape(self._id_bytes, self.k, n_positions))
        levels = rows[tail_row + 1 :].reshape(level_bytes, self.k, n_positions)
        tail_code = _joined(rows[[0, tail_row]])
        decoded = _decode_fp16 if self.name == "topk_fp16" else _decode_q8
        logprobs, log_tail, absent = decoded(levels, tail_code)
        ids[absent] = -1
        return Distributions(
            token_ids=np.ascontiguousarray(ids.T),
            logprobs=np.ascontiguousarray(logprobs.T),
            log_tail_mass=log_tail,
        )

    def _encode_draws(self, draws: np.ndarray) -> bytes:
        """Unique ids of each position, rising, as differences across the row; and their counts."""
        if draws.ndim != 2 or draws.shape[1] != self.k:
            raise DataError(
                f"sampled: expected draws of shape [positions, {self.k}], got {draws.shape}."
            )
        self._check_ids(draws)
        draws = np.sort(draws.astype(np.int32), axis=1)
        is_first = np.ones(draws.shape, dtype=bool)
        np.not_equal(draws[:, 1:], draws[:, :-1], out=is_first[:, 1:])
        ids, counts = draws[is_first], np.diff(np.flatnonzero(is_first), append=draws.size)
        steps = np.diff(ids, prepend=np.int32(0))  # negative where a position begins: they wrap
        planes = [*_planes(steps, self._id_bytes), *_planes(counts, self._count_bytes)]
        return _deflated([[plane] for plane in planes], zlib.Z_RLE)

    def _decode_draws(self, data: bytes, n_positions: int) -> Distributions:
        n_rows = self._id_bytes + self._count_bytes
        body = self._inflated(data, n_rows * self.k * n_positions)
        if len(body) % n_rows:
            raise self._damaged(f"{len(body)} bytes are no whole number of {n_rows}-byte entries")
        rows = body.reshape(n_rows, -1)
        ids = np.cumsum(_joined(rows[: self._id_bytes]), dtype=np.int64)
        ids &= (1 << 8 * self._id_bytes) - 1
        counts = _joined(rows[self._id_bytes :])
        drawn = np.cumsum(counts, dtype=np.int64)
        is_last = drawn % self.k == 0
        ends = np.flatnonzero(is_last) + 1
        # Rising sums that reach n * k by way of n of its multiples pass through all of them.
        if (
            (counts < 1).any()
            or len(ends) != n_positions
            or drawn[-1:].sum() != n_positions * self.k
        ):
            raise self._damaged(f"its counts are not those of {n_positions} times {self.k} draws")
        position = np.cumsum(is_last) - is_last
        at = position, np.arange(len(ids)) - np.append(0, ends)[position]
        token_ids = np.full((n_positions, self.k), -1, dtype=np.int32)
        token_ids[at] = ids
        logprobs = np.full((n_positions, self.k), -np.inf, dtype=np.float32)
        logprobs[at] = np.log(counts / self.k)
        log_tail = np.full(n_positions, -np.inf, dtype=np.float32)
        return Distributions(token_ids=token_ids, logprobs=logprobs, log_tail_mass=log_tail)

    def _by_rank(self, ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and logprobs as contiguous [k, positions], falling along ranks, padded with -inf."""
        if logprobs.ndim != 2 or ids.shape != logprobs.shape or ids.shape[1] > self.k:
            raise DataError(
                f"{self.name}: expected token ids and logprobs of shape [positions, up to "
                f"{self.k}], got {ids.shape} and {logprobs.shape}."
            )
        if missing := self.k - ids.shape[1]:
            ids = np.pad(ids, ((0, 0), (0, missing)))
            logprobs = np.pad(logprobs, ((0, 0), (0, missing)), constant_values=-np.inf)
        ids, logprobs = np.ascontiguousarray(ids.T), np.ascontiguousarray(logprobs.T)
        if not (logprobs[1:] <= logprobs[:-1]).all():
            order = np.argsort(-logprobs, axis=0, kind="stable")
            ids = np.take_along_axis(ids, order, axis=0)
            logprobs = np.take_along_axis(logprobs, order, axis=0)
        return ids, logprobs

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise DataError(
                f"{self.name}: token ids {ids.min()} to {ids.max()} do not fit a vocabulary of "
                f"{self.vocab_size}; give the codec the size of the teacher's output layer."
            )

    def _inflated(self, data: bytes, most_bytes: int) -> np.ndarray:
        stream = zlib.decompressobj()
        try:
            body = stream.decompress(data, most_bytes + 1)
        except zlib.error as error:
            raise self._damaged(str(error)) from None
        if not stream.eof or stream.unused_data:
            raise self._damaged(f"its {len(data)} bytes are cut short or of another length")
        return np.frombuffer(body, dtype=np.uint8)

    def _damaged(self, why: str) -> DataError:
        return DataError(
            f"This is no {self.name} payload with k = {self.k}: {why}. The file is damaged, or was "
            "written with another codec than its manifest names; label its shard again."
        )


def _masses(logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64[positions] each: the entries' probability and the rest, exact where that is tiny.

    logprobs: float32[k, positions]. A rest below 1e-7 is the float32 log-softmax's own noise.
    """
    rest = np.exp(logprobs[1:], dtype=np.float64).sum(axis=0)
    first = logprobs[0].astype(np.float64)
    return np.exp(first) + rest, np.maximum(-np.expm1(first) - rest, 0)


def _encode_fp16(logprobs: np.ndarray, mass: np.ndarray, tail: np.ndarray) -> _Arrays:
    """Levels' differences uint8[2, k, positions], the tail's code, and which entries are absent."""
    levels = np.rint(logprobs * np.float32(-1 / _FP16_STEP)).clip(0, _FP16_ABSENT).astype(np.uint16)
    with np.errstate(divide="ignore"):
        tail_code = np.rint(np.log(tail) / -_FP16_STEP).clip(0, _FP16_ABSENT).astype(np.uint16)
    differences = np.diff(levels, axis=0, prepend=np.uint16(0))
    return _planes(differences, 2), tail_code, levels == _FP16_ABSENT


def _decode_fp16(planes: np.ndarray, tail_code: np.ndarray) -> _Arrays:
    levels = np.cumsum(_joined(planes), axis=0, dtype=np.uint16)
    absent = levels == _FP16_ABSENT
    logprobs = levels * np.float32(-_FP16_STEP)
    logprobs[absent] = -np.inf
    log_tail = tail_code.astype(np.float32) * np.float32(-_FP16_STEP)
    log_tail[tail_code == _FP16_ABSENT] = -np.inf
    return logprobs, log_tail, absent


def _encode_q8(logprobs: np.ndarray, mass: np.ndarray, tail: np.ndarray) -> _Arrays:
    """As ``_encode_fp16``, one byte each: how far entries lie below the first, and the tail's odds.

    The first entry itself follows from the odds, as all must sum to 1; in its row stands the step.

    The bound: with every log-probability off by at most e before they are normalised, Hoeffding's
    lemma gives KL <= e**2 / 2. Given that a token is among the entries, e is half a step: at most
    1/32, or 1/16 (entries raised from below e**-31 of the first add 1e-9 to it at k = 65535). The
    odds' half step adds at most (1/128)**2 / 8. In all 5e-4, or 2e-3.
    """
    absent = (logprobs == -np.inf) | (mass == 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        depth = np.where(absent, 0, logprobs[0] - logprobs)
        logit = (np.log(tail) - np.log(mass)) / _LOGIT_STEP
    wider = depth.max(axis=0) / np.float32(_Q8_LOWEST * _Q8_STEP) - 1
    scale = np.ceil(wider * 255).clip(0, 255)
    levels = np.rint(depth / _q8_step(scale)).clip(0, _Q8_LOWEST).astype(np.uint8)
    levels[absent] = _Q8_ABSENT
    differences = np.diff(levels, axis=0, prepend=np.uint8(0))
    differences[0] = scale
    tail_code = (np.rint(logit) + _EVEN).clip(_NO_TAIL + 1, _ALL_TAIL - 1)
    tail_code = np.where(tail > 0, np.where(mass > 0, tail_code, _ALL_TAIL), _NO_TAIL)
    return differences[None], tail_code.astype(np.uint16), absent


def _decode_q8(planes: np.ndarray, tail_code: np.ndarray) -> _Arrays:
    levels = planes[0].copy()
    levels[0] = 0
    np.cumsum(levels, axis=0, dtype=np.uint8, out=levels)
    absent = (levels == _Q8_ABSENT) | (tail_code == _ALL_TAIL)
    depth = levels * _q8_step(planes[0, 0].astype(np.float32))
    depth[absent] = np.inf
    logit = np.where(tail_code == _NO_TAIL, -np.inf, (tail_code - _EVEN) * _LOGIT_STEP)
    logit[tail_code == _ALL_TAIL] = np.inf
    with np.errstate(invalid="ignore", divide="ignore"):
        first = -np.logaddexp(0, logit) - np.log(np.exp(-depth).sum(axis=0))
        logprobs = first.astype(np.float32) - depth
    logprobs[absent] = -np.inf
    return logprobs, (-np.logaddexp(0, -logit)).astype(np.float32), absent


def _q8_step(scale: np.ndarray) -> np.ndarray:
    return np.float32(_Q8_STEP) * (1 + scale.astype(np.float32) / np.float32(255))


def _whole_bytes(largest: int) -> int:
    return max(1, (largest.bit_length() + 7) // 8)


def _planes(values: np.ndarray, n_bytes: int) -> np.ndarray:
    """uint8[n_bytes, ...]: the low bytes of integers, lowest first."""
    return np.stack([(values >> 8 * i).astype(np.uint8) for i in range(n_bytes)])


def _joined(planes: np.ndarray) -> np.ndarray:
    """int32[...] from ``_planes``."""
    values = planes[0].astype(np.int32)
    for i, plane in enumerate(planes[1:], start=1):
        values |= plane.astype(np.int32) << 8 * i
    return values


def _deflated(blocks: Sequence[Sequence[np.ndarray]], strategy: int) -> bytes:
    """A zlib stream of byte arrays; each block gets a Huffman table of its own."""
    stream = zlib.compressobj(level=1, strategy=strategy)
    out = []
    for block in blocks:
        out += [stream.compress(part.tobytes()) for part in block]
        out.append(stream.flush(zlib.Z_BLOCK))
    return b"".join([*out, stream.flush()])

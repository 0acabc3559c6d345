"""Codecs against dense float64 distributions: round trips, error bounds, unbiasedness, damage."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from journeyman.errors import DataError
from journeyman.labels.codec import Codec

TOPK = ("topk_fp16", "topk_q8")


def dense(logits: np.ndarray) -> np.ndarray:
    """float64[positions, vocabulary] log-probabilities."""
    logits = np.asarray(logits, dtype=np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def top(logprobs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, :k]
    values = np.take_along_axis(logprobs, ids, axis=-1)
    return ids.astype(np.int32), values.astype(np.float32)


def log_tail(logprobs: np.ndarray, k: int) -> np.ndarray:
    """float64[positions]: log of the sum of all but the k largest, added up one by one."""
    rest = np.sort(logprobs, axis=-1)[:, : logprobs.shape[-1] - k]
    return np.logaddexp.reduce(rest, axis=-1)


def kl(logprobs: np.ndarray, k: int, codec: Codec) -> np.ndarray:
    """float64[positions]: KL(exact || decoded) over the k entries and the tail as one bucket.

    A tail below 1e-6 is left out: float32 log-probabilities do not determine it.
    """
    ids, values = top(logprobs, k)
    decoded = codec.decode(codec.encode(ids, values), len(ids))
    exact = np.take_along_axis(logprobs, ids, axis=-1)
    there = exact > -80  # below: exp() of float32 is no number worth the name
    gaps = np.where(there, exact - np.where(there, decoded.logprobs, 0), 0)
    tail = log_tail(logprobs, k)
    tail_gap = np.where(tail > np.log(1e-6), tail - decoded.log_tail_mass.clip(-99), 0)
    return (np.exp(exact) * gaps).sum(axis=-1) + np.exp(tail) * tail_gap


rows = st.builds(
    lambda seed, n, vocab_size, spread: dense(
        np.random.default_rng(seed).standard_normal((n, vocab_size)) * spread
    ),
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(2, 300),
    st.floats(0, 60),
)


@pytest.mark.parametrize("name", TOPK)
@given(logprobs=rows, k=st.integers(1, 80))
@settings(max_examples=300)
def test_ids_come_back_in_their_order(name: str, logprobs: np.ndarray, k: int) -> None:
    vocab_size = logprobs.shape[1]
    ids, values = top(logprobs, k)
    codec = Codec(name=name, vocab_size=vocab_size, k=k)
    decoded = codec.decode(codec.encode(ids, values), len(ids))
    padded = np.pad(ids, ((0, 0), (0, k - ids.shape[1])))
    there = decoded.token_ids >= 0
    np.testing.assert_array_equal(decoded.token_ids[there], padded[there])
    np.testing.assert_array_equal(there, np.isfinite(decoded.logprobs))
    expected = values >= -192 if name == "topk_fp16" else np.exp(values) > 0
    assert (there.sum(axis=1) >= expected.sum(axis=1)).all()
    assert (decoded.token_ids.dtype, decoded.logprobs.dtype) == (np.int32, np.float32)
    assert (np.diff(decoded.logprobs.clip(-1e9), axis=1) <= 0).all()


@given(logprobs=rows, k=st.integers(1, 80))
@settings(max_examples=300)
def test_fp16_is_within_2e_3_of_every_entry_and_of_the_tail(logprobs: np.ndarray, k: int) -> None:
    k = min(k, logprobs.shape[1])
    ids, values = top(logprobs, k)
    codec = Codec(name="topk_fp16", vocab_size=logprobs.shape[1], k=k)
    decoded = codec.decode(codec.encode(ids, values), len(ids))
    there = values > -190
    np.testing.assert_allclose(decoded.logprobs[there], values[there], rtol=0, atol=1.5e-3)
    tail = log_tail(logprobs, k)
    known = tail > np.log(1e-3)  # below, float32 entries alone move the tail's log by over 1e-4
    np.testing.assert_allclose(decoded.log_tail_mass[known], tail[known], rtol=0, atol=2e-3)
    assert (decoded.log_tail_mass[~known] < np.log(1.1e-3)).all()


@pytest.mark.parametrize(("name", "within"), [("topk_fp16", 1.5e-3), ("topk_q8", 1 / 127)])
def test_a_tiny_tail_keeps_its_size(name: str, within: float) -> None:
    tails = np.array([1e-3, 1e-6, 1e-12, 1e-30])
    values = np.log1p(-tails)[:, None].astype(np.float32)
    codec = Codec(name=name, vocab_size=9, k=1)
    decoded = codec.decode(codec.encode(np.ones((4, 1), np.int32), values), 4)
    exact = np.log(-np.expm1(values[:, 0].astype(np.float64)))
    np.testing.assert_allclose(decoded.log_tail_mass, exact, rtol=0, atol=within)


@given(logprobs=rows, k=st.integers(1, 80))
@settings(max_examples=300)
def test_q8_keeps_its_bound_on_random_distributions(logprobs: np.ndarray, k: int) -> None:
    k = min(k, logprobs.shape[1])
    codec = Codec(name="topk_q8", vocab_size=logprobs.shape[1], k=k)
    spans = np.ptp(top(logprobs, k)[1], axis=1)
    assert (kl(logprobs, k, codec) <= np.where(spans < 15.8, 5e-4, 2e-3)).all()


@pytest.mark.parametrize("span", [0.0, 0.03, 1.0, 9.9, 15.87, 15.9, 31.7, 31.8, 60.0, 1e3])
@pytest.mark.parametrize("shape", ["two levels", "line", "cliff", "near flat"])
def test_q8_keeps_its_bound_on_odd_distributions(span: float, shape: str) -> None:
    vocab_size, k = 2000, 64
    rank = np.arange(vocab_size)
    logits = {
        "two levels": np.where(rank < k // 2, 0.0, -span),
        "line": -span * np.minimum(rank, k) / k,
        "cliff": np.where(rank < k, -(rank % 3) / 48, -span),
        "near flat": -(span / k) * (rank % 2) / 2**10,
    }[shape]
    codec = Codec(name="topk_q8", vocab_size=vocab_size, k=k)
    assert kl(dense(logits[None]), k, codec)[0] <= (5e-4 if span < 15.8 else 2e-3)


@pytest.mark.parametrize(("span", "bound"), [(1.0, 5e-4), (15.8, 5e-4), (31.7, 2e-3), (90.0, 2e-3)])
def test_q8_bound_is_tight(span: float, bound: float) -> None:
    """The worst case: half the mass just above the middle between two levels, half just below."""
    depths = np.linspace(0, 0.25, 251)
    logits = np.repeat(-depths[:, None], 100, axis=1)
    logits[:, :50] += 1.1e-3
    logits[:, 0] = 0
    logits[:, -1] = -span
    worst = kl(dense(logits), 100, Codec(name="topk_q8", vocab_size=100, k=100)).max()
    assert 0.9 * bound < worst <= bound


@given(logprobs=rows, k=st.integers(1, 80))
@settings(max_examples=300)
def test_q8_decodes_to_a_whole_distribution(logprobs: np.ndarray, k: int) -> None:
    ids, values = top(logprobs, k)
    codec = Codec(name="topk_q8", vocab_size=logprobs.shape[1], k=k)
    decoded = codec.decode(codec.encode(ids, values), len(ids))
    total = np.exp(decoded.logprobs.astype(float)).sum(axis=1) + np.exp(decoded.log_tail_mass)
    np.testing.assert_allclose(total, 1, atol=1e-5)


@given(
    draws=st.integers(1, 300).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 299), min_size=n, max_size=n), min_size=1, max_size=4
        )
    )
)
def test_sampled_counts_each_draw_once(draws: list[list[int]]) -> None:
    n_draws = len(draws[0])
    codec = Codec(name="sampled", vocab_size=300, k=n_draws)
    decoded = codec.decode(codec.encode(np.array(draws), np.zeros((1, 1))), len(draws))
    assert decoded.token_ids.shape == (len(draws), n_draws)
    for position, drawn in enumerate(draws):
        ids, counts = np.unique(drawn, return_counts=True)
        there = decoded.token_ids[position] >= 0
        np.testing.assert_array_equal(decoded.token_ids[position][there], ids)
        shares = np.exp(decoded.logprobs[position].astype(float))
        np.testing.assert_allclose(shares[there], counts / n_draws, rtol=1e-5)
        assert shares.sum() == pytest.approx(1)
    assert (decoded.log_tail_mass == -np.inf).all()


def test_sampled_is_unbiased() -> None:
    """Mean decoded shares over positions of one distribution, against that distribution."""
    p = np.exp(dense(np.random.default_rng(1).standard_normal((1, 40)) * 1.5)[0])
    draws = np.random.default_rng(2).choice(40, size=(9000, 50), p=p)
    codec = Codec(name="sampled", vocab_size=40, k=50)
    decoded = codec.decode(codec.encode(draws, np.zeros((0, 0))), 9000)
    there = decoded.token_ids >= 0
    shares = np.bincount(
        decoded.token_ids[there], np.exp(decoded.logprobs[there].astype(float)), minlength=40
    )
    n = draws.size
    assert scipy.stats.chisquare(np.rint(shares * 50), p * n).pvalue > 0.01
    dense_shares = np.zeros((9000, 40))
    dense_shares[np.nonzero(there)[0], decoded.token_ids[there]] = np.exp(decoded.logprobs[there])
    np.testing.assert_allclose(dense_shares.var(axis=0), p * (1 - p) / 50, rtol=0.25)


@pytest.mark.parametrize(
    ("vocab_size", "id_bytes"),
    [(1, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 3), (200_000, 3), (1 << 24, 3),
     ((1 << 24) + 1, 4), (1 << 31, 4)],
)  # fmt: skip
def test_ids_take_the_fewest_whole_bytes(vocab_size: int, id_bytes: int) -> None:
    ids = np.array([0, vocab_size - 1, vocab_size // 2, vocab_size // 3, 0], dtype=np.int32)
    codec = Codec(name="topk_fp16", vocab_size=vocab_size, k=5)
    packed = codec.pack_ids(ids)
    assert len(packed) == 5 * id_bytes
    assert int.from_bytes(packed[id_bytes : 2 * id_bytes], "little") == vocab_size - 1
    np.testing.assert_array_equal(codec.unpack_ids(packed), ids)
    assert codec.describe()["bytes_per_token_uncompressed"] == 2 + 5 * (id_bytes + 2)

    logprobs = np.log(np.full((1, 5), 0.2, dtype=np.float32))
    for name in TOPK:
        codec = Codec(name=name, vocab_size=vocab_size, k=5)
        decoded = codec.decode(codec.encode(ids[None], logprobs), 1)
        np.testing.assert_array_equal(decoded.token_ids[0], ids)
    codec = Codec(name="sampled", vocab_size=vocab_size, k=5)
    decoded = codec.decode(codec.encode(np.array([ids, ids[::-1]]), logprobs), 2)
    unique = np.unique(ids)
    np.testing.assert_array_equal(decoded.token_ids[:, : len(unique)], [unique, unique])


@pytest.mark.parametrize("name", TOPK)
def test_entries_of_no_probability_are_left_out(name: str) -> None:
    """A teacher that samples from its top 3 has three entries; the rest is -inf."""
    logprobs = np.full((3, 4), -np.inf, dtype=np.float32)
    logprobs[0, :3] = np.log([0.5, 0.3, 0.2])
    logprobs[1, 0] = 0.0
    ids = np.array([[7, 8, 9, 99], [6, 99, 99, 99], [99, 99, 99, 99]])  # 99: not in the vocabulary
    codec = Codec(name=name, vocab_size=10, k=6)
    decoded = codec.decode(codec.encode(ids, logprobs), 3)
    expected = [[7, 8, 9, -1, -1, -1], [6, -1, -1, -1, -1, -1], [-1] * 6]
    np.testing.assert_array_equal(decoded.token_ids, expected)
    np.testing.assert_allclose(np.exp(decoded.logprobs[0, :3]), [0.5, 0.3, 0.2], rtol=0.04)
    assert np.isneginf(decoded.logprobs[decoded.token_ids < 0]).all()
    assert decoded.log_tail_mass[0] < np.log(1e-6)
    assert decoded.log_tail_mass[1] == -np.inf
    assert decoded.log_tail_mass[2] == 0


@pytest.mark.parametrize("name", TOPK)
def test_unsorted_entries_are_sorted(name: str) -> None:
    codec = Codec(name=name, vocab_size=10, k=3)
    logprobs = np.log(np.array([[0.1, 0.6, 0.2]], dtype=np.float32))
    decoded = codec.decode(codec.encode(np.array([[1, 2, 3]]), logprobs), 1)
    np.testing.assert_array_equal(decoded.token_ids, [[2, 3, 1]])
    np.testing.assert_allclose(np.exp(decoded.logprobs), [[0.6, 0.2, 0.1]], rtol=0.04)
    assert np.exp(decoded.log_tail_mass[0]) == pytest.approx(0.1, rel=8e-3)


@pytest.mark.parametrize("name", [*TOPK, "sampled"])
def test_a_row_may_have_no_positions(name: str) -> None:
    codec = Codec(name=name, vocab_size=300, k=4)
    data = codec.encode(np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32))
    decoded = codec.decode(data, 0)
    assert decoded.token_ids.shape == decoded.logprobs.shape == (0, 4)
    assert decoded.log_tail_mass.shape == (0,)
    assert codec.unpack_ids(codec.pack_ids(np.zeros(0, np.int32))).shape == (0,)
    with pytest.raises(DataError):
        codec.decode(data, 1)


@pytest.mark.parametrize("name", [*TOPK, "sampled"])
def test_damage_is_told(name: str) -> None:
    codec = Codec(name=name, vocab_size=300, k=4)
    ids = np.random.default_rng(0).integers(0, 300, (20, 4))
    logprobs = np.log(np.full((20, 4), 0.2, np.float32))
    data = codec.encode(ids, logprobs)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    halved = zlib.compress(zlib.decompress(data)[:-1])
    for damaged in (b"", data[:-1], data[: len(data) // 2], data + b"x", bytes(flipped), halved):
        with pytest.raises(DataError, match=f"no {name} payload"):
            codec.decode(damaged, 20)
    for n_positions in (0, 19, 21):
        with pytest.raises(DataError, match=f"no {name} payload"):
            codec.decode(data, n_positions)
    for other in (
        Codec(name=name, vocab_size=300, k=5),
        Codec(name=name, vocab_size=70_000, k=4),
        Codec(name="topk_q8" if name == "topk_fp16" else "topk_fp16", vocab_size=300, k=4),
    ):
        with pytest.raises(DataError):
            other.decode(data, 20)
    with pytest.raises(DataError):
        codec.unpack_ids(b"abc")


def test_what_is_no_distribution_is_refused() -> None:
    codec = Codec(name="topk_q8", vocab_size=10, k=2)
    half = np.log(np.full((1, 2), 0.5, np.float32))
    for ids, logprobs, reason in (
        ([[1, 2]], half + 1, "sum to 2.718"),
        ([[1, 2]], half * np.nan, "sum to nan"),
        ([[1, 10]], half, "vocabulary of 10"),
        ([[1, -1]], half, "vocabulary of 10"),
        ([[1, 2, 3]], half, "shape"),
        ([[1, 2, 3]], np.log(np.full((1, 3), 0.3, np.float32)), "up to 2"),
    ):
        with pytest.raises(DataError, match=reason):
            codec.encode(np.array(ids), logprobs)
    with pytest.raises(DataError, match="vocabulary of 10"):
        codec.pack_ids(np.array([10]))
    with pytest.raises(DataError, match="expected draws"):
        Codec(name="sampled", vocab_size=10, k=3).encode(np.array([[1, 2]]), half)
    with pytest.raises(DataError, match="no logprob codec 'gzip'"):
        Codec(name="gzip", vocab_size=10, k=3)
    with pytest.raises(DataError, match="k 0"):
        Codec(name="sampled", vocab_size=10, k=0)


@pytest.mark.parametrize("name", [*TOPK, "sampled"])
def test_the_description_is_json_and_true(name: str) -> None:
    codec = Codec(name=name, vocab_size=49_152, k=16)
    described = json.loads(json.dumps(codec.describe()))
    assert described["name"] == name
    assert described["draws" if name == "sampled" else "k"] == 16
    ids = np.tile(np.arange(16), (7, 1))
    data = codec.encode(ids, np.log(np.full((7, 16), 1 / 20, np.float32)))
    assert len(zlib.decompress(data)) == 7 * described["bytes_per_token_uncompressed"]

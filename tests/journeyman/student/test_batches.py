from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from journeyman.models import Model
from journeyman.student import batches
from journeyman.student.models import load_tokenizer

from .conftest import make_rows

row_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=300).map(np.array)


@given(row_lengths, st.integers(1, 40), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_each_row_once_an_epoch_for_any_number_of_workers(
    lengths: np.ndarray, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    order = batches.epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert len(order) == batches.n_batches(len(lengths), batch_size)
    assert max(len(batch) for batch in order) <= batch_size
    dealt = [batches.shard(b, rank, world_size) for b in order for rank in range(world_size)]
    assert sorted(np.concatenate(dealt)) == list(range(len(lengths)))
    for batch in order:
        sizes = [len(batches.shard(batch, rank, world_size)) for rank in range(world_size)]
        assert max(sizes) - min(sizes) <= 1


@given(row_lengths, st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_order_depends_on_seed_and_epoch_alone(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> None:
    first = batches.epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    again = batches.epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_epochs_and_seeds_differ_and_rows_move_between_batches() -> None:
    lengths = np.random.default_rng(0).integers(3, 30, size=400)
    orders = [
        np.concatenate(batches.epoch_batches(lengths, 8, seed=seed, epoch=epoch)).tolist()
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_bucketing_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 30, size=1000)

    def computed(order: Sequence[np.ndarray]) -> int:
        return sum(int(lengths[batch].max()) * len(batch) for batch in order)

    random = np.array_split(np.random.default_rng(1).permutation(1000), 32)
    bucketed = batches.epoch_batches(lengths, 32, seed=0, epoch=0)
    assert computed(bucketed) < 0.75 * computed(random)


def test_a_long_text_pads_no_short_ones() -> None:
    lengths = np.array([7, 512, *[6] * 30])
    rows = [len(batch) for batch in batches.passes(lengths, 8, 512)]
    assert rows == [8, 8, 8, 7, 1]
    [*_, last] = batches.passes(lengths, 8, 512)
    assert last.tolist() == [1]
    assert [len(batch) for batch in batches.passes(lengths, 8, None)] == [8] * 4


@given(row_lengths, st.integers(1, 10), st.none() | st.integers(1, 100))
def test_each_row_has_one_pass_which_is_as_large_as_its_limits_let_it_be(
    lengths: np.ndarray, most_rows: int, most_tokens: int | None
) -> None:
    found = list(batches.passes(lengths, most_rows, most_tokens))
    assert sorted(np.concatenate(found)) == list(range(len(lengths)))
    most = np.inf if most_tokens is None else most_tokens
    for batch, after in zip(found, [*found[1:], None], strict=True):
        longest = lengths[batch].max()
        assert len(batch) <= most_rows and (len(batch) == 1 or len(batch) * longest <= most)
        if after is not None:
            following, shortest = lengths[after[0]], lengths[batch].min()
            assert longest <= following
            one_more = (len(batch) + 1) * following
            unlike = most_tokens is not None and following > max(2 * shortest, 32)
            assert len(batch) == most_rows or one_more > most or unlike


def test_texts_of_a_pass_are_alike_unless_they_are_short() -> None:
    lengths = np.array([20, 5, 64, 32, 60, 33, 90])
    found = [lengths[batch].tolist() for batch in batches.passes(lengths, 8, 512)]
    assert found == [[5, 20, 32], [33, 60, 64], [90]]


@pytest.mark.parametrize("pairs", [False, True])
def test_many_texts_have_the_tokens_that_each_has_alone(
    pairs: bool, tiny_encoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_AT_ONCE", 3)
    tokenizer, columns = load_tokenizer(tiny_encoder.path), make_rows(5, 2).texts
    texts = list(zip(columns, columns[::-1], strict=True)) if pairs else columns
    rows = batches.tokenise(tokenizer, texts, max_length=8)
    alone = [
        tokenizer(*(text if pairs else [text]), truncation=True, max_length=8)["input_ids"]
        for text in texts
    ]
    halves = [batches.tokenise(tokenizer, part, 8) for part in (texts[:4], texts[4:])]
    for found in (rows, batches.joined(halves)):
        assert found.ids.dtype == np.int32 and len(found) == 7
        assert [ids.tolist() for ids in np.split(found.ids, found.starts[1:-1])] == alone
    assert len(batches.tokenise(tokenizer, [], 8)) == 0


def test_padding_and_mask() -> None:
    rows = batches.TokenRows(ids=np.arange(1, 7, dtype=np.int32), starts=np.array([0, 3, 4, 6]))
    input_ids, mask = rows.padded(np.array([1, 0, 2]), pad_id=9)
    assert input_ids.tolist() == [[4, 9, 9], [1, 2, 3], [5, 6, 9]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]


@given(st.integers(1, 9), st.integers(1, 4))
def test_gradient_of_unequal_shards_is_that_of_the_whole_batch(n: int, world_size: int) -> None:
    """DDP's mean over workers, done by hand: also where a worker has no row at all."""
    random = np.random.default_rng(n)
    inputs, weight = torch.tensor(random.normal(size=(n, 3))), torch.tensor(random.normal(size=3))

    def gradient(rows: np.ndarray, factor: float) -> torch.Tensor:
        w = weight.clone().requires_grad_()
        ((inputs[rows] @ w) ** 2 * factor).sum().backward()
        assert w.grad is not None
        return w.grad

    batch = np.arange(n)
    share = batches.share_of_mean(n, world_size)
    workers = [gradient(batches.shard(batch, r, world_size), share) for r in range(world_size)]
    np.testing.assert_allclose(
        torch.stack(workers).mean(0), gradient(batch, 1 / n), rtol=1e-10, atol=1e-12
    )

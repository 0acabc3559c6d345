"""Nested subsets of the train rows."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from journeyman.labels import dataset
from journeyman.student import batches, subset

from ..labels import synthetic as made
from .conftest import make_recipe

IDS = [f"{i:032x}" for i in range(300)]


def members(n: int, seed: int = 0, ids: list[str] = IDS) -> set[str]:
    found = subset.first(ids, n, seed)
    return {row_id for row_id in ids if found.has(row_id)}


@given(st.lists(st.integers(1, 300), min_size=2, max_size=5), st.integers(0, 5))
def test_each_subset_has_as_many_rows_as_asked_and_is_part_of_the_larger_ones(
    sizes: list[int], seed: int
) -> None:
    found = [members(n, seed) for n in sorted(sizes)]
    assert [len(one) for one in found] == sorted(sizes)
    assert all(a <= b for a, b in itertools.pairwise(found))


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does() -> None:
    shuffled = random.Random(0).sample(IDS, len(IDS))
    assert members(50) == members(50, ids=shuffled)
    assert len(members(50) & members(50, seed=1)) < 30  # about eight by chance
    assert members(50) != set(IDS[:50])


def test_rows_are_left_out_of_train_alone(tmp_path: Path) -> None:
    splits = ("train", "calibrate", "test")
    rows = [(made.row(f"text {i}", splits[i % 3]), made.classes(0.3, 0.7)) for i in range(90)]
    made.write_dataset(tmp_path, made.settings("classes"), [rows[:31], rows[31:]])
    where = tmp_path / "labels", tmp_path / "corpus"
    dataset.LabelStore(where[0]).finish({"filtered": {"inputs": "none", "file": None}})
    ids = {s: [row["id"] for row, _ in rows if row["split"] == s] for s in splits}
    wanted = subset.first(ids["train"], 11, 3)
    read = dataset.ClassReader.of(*where, splits)
    kept = [wanted.of(read(*shard)) for shard in dataset.shards(where[0])]
    seen = {split: [i for part in kept for i in part.split(split).ids] for split in splits}
    assert set(seen["train"]) == members(11, 3, ids["train"])
    assert (seen["calibrate"], seen["test"]) == (ids["calibrate"], ids["test"])


@pytest.mark.parametrize(("n_rows", "epochs"), [(1000, 4), (500, 8), (100, 32), (10, 128)])
def test_few_rows_are_trained_for_as_many_steps_as_all(n_rows: int, epochs: int) -> None:
    training = make_recipe(epochs=4, batch_size=32).training  # 32 steps an epoch of 1,000 rows
    found = subset.as_many_steps(training, n_rows, 1000)
    assert (found.epochs, found.evaluate_every) == (epochs, 32)
    steps = found.epochs * batches.n_batches(n_rows, 32)
    assert abs(steps - 128) <= batches.n_batches(n_rows, 32) / 2
    own = make_recipe(epochs=4, batch_size=32, evaluate_every=5).training
    assert subset.as_many_steps(own, n_rows, 1000).evaluate_every == 5

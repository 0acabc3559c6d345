"""Codec ``sampled``: draws made in vLLM's worker are true draws from the whole distribution."""

import asyncio

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare
from transformers import AutoModelForCausalLM

from journeyman import models, recipe
from journeyman.models import Model
from journeyman.teacher import worker
from journeyman.teacher.engine import Engine
from tests.benchmarks import tiny_teacher
from tests.conftest import DEMO

DRAWS = 200
N_ROWS = 60


@pytest.fixture(scope="module")
def drawn(teacher_model: Model, tmp_path_factory: pytest.TempPathFactory):
    """Draws at every position of one text, by 60 seeds, and the full distributions there."""
    path = tiny_teacher.make(tmp_path_factory.mktemp("tiny"), teacher_model)
    settings = recipe.load(DEMO).teacher

    async def draw():
        engine = Engine(settings, models.resolve(str(path)), draws=DRAWS)
        await engine.start()
        ids = engine.tokenizer.encode("the quick brown fox jumps over the lazy dog again")
        try:
            rows = await asyncio.gather(
                *(engine.record_target(ids, 1, DRAWS, seed=s) for s in range(N_ROWS))
            )
            again, _ = await engine.record_target(ids, 1, DRAWS, seed=7)
            behind, _ = await engine.record_target(ids, 5, DRAWS, seed=7)
        finally:
            engine.close()
        return ids, [r.token_ids for r, _ in rows], again.token_ids, behind.token_ids

    ids, rows, again, behind = asyncio.run(draw())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        full = model(torch.tensor([ids])).logits[0, :-1].double().softmax(-1).numpy()
    return np.stack(rows), again, behind, full


@pytest.mark.slow
def test_draws_have_the_full_distribution(drawn):
    """Chi-square with the vocabulary in bins of at least 20 expected draws, all positions."""
    rows, _, _, full = drawn
    statistic, freedom = 0.0, 0
    for position, probabilities in enumerate(full):
        counts = np.bincount(rows[:, position].ravel(), minlength=len(probabilities))
        order = np.argsort(-probabilities)
        expected = probabilities[order] * N_ROWS * DRAWS
        bins = np.minimum(np.floor(np.cumsum(expected) / 20), np.floor(expected.sum() / 20) - 1)
        _, bins = np.unique(bins, return_inverse=True)
        wanted, got = np.bincount(bins, expected), np.bincount(bins, counts[order])
        if len(wanted) > 1:
            statistic += chisquare(got, wanted * got.sum() / wanted.sum()).statistic
            freedom += len(wanted) - 1
    assert freedom > 10 * len(full)  # the distributions are not all on one token
    assert chi2.sf(statistic, freedom) > 1e-4


@pytest.mark.slow
def test_a_rows_draws_are_its_own_wherever_they_are_made(drawn):
    rows, again, behind, _ = drawn
    np.testing.assert_array_equal(again, rows[7])
    np.testing.assert_array_equal(behind, again[4:])  # scored from the fifth token on
    assert (rows[7] != rows[8]).any()


def test_the_tail_is_drawn_from_too():
    """Half of the mass is spread over 100,000 tokens that no top-k would hold."""
    probabilities = torch.full((1, 100_003), 0.5 / 100_002)
    probabilities[0, 41_234] = 0.5
    points = torch.from_numpy(worker.uniform(1, 0, 1, 20_000))
    ids = worker.draw(probabilities, points)[0].numpy()
    assert (ids == 41_234).mean() == pytest.approx(0.5, abs=0.02)
    rest = ids[ids != 41_234]
    assert rest.max() < 100_003
    counts, _ = np.histogram(rest, bins=50, range=(0, 100_003))
    assert chisquare(counts).pvalue > 1e-4


def test_a_prompt_in_pieces_gets_the_numbers_of_a_whole_one():
    whole = worker.uniform(99, 0, 20, 50)
    pieces = np.concatenate([worker.uniform(99, 0, 7, 50), worker.uniform(99, 7, 13, 50)])
    np.testing.assert_array_equal(whole, pieces)
    assert len(np.unique(whole)) == whole.size


@pytest.mark.parametrize("vocabulary", [640, 4096, 50_257])
def test_the_largest_entries_by_blocks_are_the_largest_of_all(vocabulary: int):
    values = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(1))
    values[3] = 0.0  # ties
    got, ids = worker._top_k(values, 10)
    torch.testing.assert_close(got, values.topk(10, dim=-1).values)
    torch.testing.assert_close(values.gather(1, ids), got)


@pytest.mark.parametrize("vocabulary", [640, 49_152, 50_257])
def test_the_likeliest_token_by_blocks_is_the_first_of_the_largest(vocabulary: int):
    values = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(1))
    values[3] = 0.0
    values[4, [100, 90, 600]] = 50.0  # in two blocks, and twice in one
    values[5] = -torch.inf
    values[5, 7] = -3.0
    found = worker.likeliest(values)
    np.testing.assert_array_equal(found.numpy(), values.numpy().argmax(axis=1))

"""Where vLLM is not the version that capture was written for, its own way gives the same arrays."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from journeyman import models, recipe
from journeyman.errors import ModelError
from journeyman.models import Model
from journeyman.teacher import capture
from journeyman.teacher.engine import Engine
from journeyman.teacher.prompting import Sampling
from tests.benchmarks import tiny_teacher
from tests.conftest import DEMO


@pytest.mark.slow  # an engine of its own
def test_stock_capture_gives_the_same_arrays(
    teacher_model: Model, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    path = tiny_teacher.make(tmp_path / "tiny", teacher_model)

    async def not_this_version(self: Engine) -> None:
        self.stock_capture = "vLLM of another version"

    monkeypatch.setattr(Engine, "_take_over_capture", not_this_version)
    monkeypatch.setattr(capture, "marks", lambda start=None: {})

    async def ask():
        engine = Engine(recipe.load(DEMO).teacher, models.resolve(str(path)))
        await engine.start()
        try:
            ids = engine.tokenizer.encode("the quick brown fox jumps over the lazy dog again")
            # One kind of request at a time, as in labeling: in one batch vLLM 0.29 gives them all
            # the entries of those with logprob_token_ids.
            return ids, (
                await engine.score_target(ids, 4),
                await engine.record_target(ids, 4, 8),
                await engine.score_next(ids, range(100, 300)),
                await engine.generate(ids, Sampling(max_tokens=3), k=4),
            )
        finally:
            engine.close()

    ids, (target, (recorded, _), candidates, spoken) = asyncio.run(ask())
    answer = spoken.completions[0]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([ids + answer.token_ids.tolist()])).logits[0]
    full = logits.double().log_softmax(-1).numpy()
    behind = full[3 : len(ids) - 1]
    np.testing.assert_allclose(target.logprobs, behind[np.arange(len(ids) - 4), ids[4:]], atol=2e-3)
    np.testing.assert_array_equal(recorded.token_ids, np.argsort(-behind, axis=1)[:, :8])
    wanted = np.take_along_axis(behind, recorded.token_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(recorded.logprobs, wanted, atol=2e-3)
    np.testing.assert_allclose(candidates.logprobs, full[len(ids) - 1, 100:300], atol=2e-3)
    written = full[len(ids) - 1 : -1]
    wanted = np.take_along_axis(written, answer.recorded.token_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(answer.recorded.logprobs, wanted, atol=2e-3)


def test_true_draws_are_refused_rather_than_made_from_a_part(
    teacher_model: Model, monkeypatch: pytest.MonkeyPatch
):
    engine = Engine(recipe.load(DEMO).teacher, teacher_model, draws=5)

    class OtherVersion:
        async def collective_rpc(self, *_: object, **__: object) -> list[str]:
            return ["vLLM of another version"]

    engine._llm = OtherVersion()
    with pytest.raises(ModelError, match="needs draws from the whole distribution"):
        asyncio.run(engine._take_over_capture())

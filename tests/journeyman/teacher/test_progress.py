"""What is told of an answer before its end: its beginning, and what it has taken so far. No engine:
vLLM's own front end, fed with tokens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from journeyman import recipe
from journeyman.models import Model
from journeyman.teacher import capture
from journeyman.teacher.engine import Engine
from journeyman.teacher.progress import Begun, Spent, hearing, spending
from journeyman.teacher.prompting import Sampling

WORDS = ("<unk>", "▁say", "▁Paris", ",", "▁not", "▁Rome", "END", "▁then")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """As those of Llama 2 and Mistral: the blank in front of a text's first word is none."""
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bare.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")


class FrontEnd:
    """Of vLLM: says these tokens, one a step."""

    errored = False
    vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))

    def __init__(self, tokenizer: PreTrainedTokenizerFast, says: list[int]) -> None:
        self.get_tokenizer = lambda: tokenizer
        self._says = says

    async def generate(
        self, prompt: Any, sampling: Any, request_id: str, **_: Any
    ) -> AsyncIterator[Any]:
        from vllm.v1.engine import output_processor
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        asked = SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], request_id=request_id,
                                sampling_params=sampling, prompt_embeds=None)  # fmt: skip
        words = IncrementalDetokenizer.from_new_request(
            self.get_tokenizer() if sampling.detokenize else None, asked
        )
        kept = output_processor.LogprobsProcessor.from_new_request(None, asked)
        for n, token in enumerate(self._says, 1):
            await asyncio.sleep(0)
            stopped = words.update([token], False)
            arrays = SimpleNamespace(logprob_token_ids=np.array([[token]]),
                                     logprobs=np.array([[-0.5]]))  # fmt: skip
            kept.update_from_output(
                SimpleNamespace(new_token_ids=[token], new_logprobs=arrays,
                                new_prompt_logprobs_tensors=None)
            )  # fmt: skip
            finished = bool(stopped) or n == len(self._says)
            if finished or sampling.output_kind.name == "CUMULATIVE":
                answer = SimpleNamespace(
                    text=words.get_next_output_text(finished, delta=False),
                    token_ids=self._says[:n],
                    logprobs=kept.logprobs,
                    finish_reason="stop" if stopped else "length",
                )
                yield SimpleNamespace(outputs=[answer], finished=finished, num_cached_tokens=0)
            if stopped:
                return


def engine(tokenizer: PreTrainedTokenizerFast, says: list[int]) -> Engine:
    """Use it in an event loop."""
    capture.install()
    settings = recipe.Teacher(model="m")
    model = Model(reference="m", path=Path("m"), weights_digest="m", tokenizer_digest="t",
                  size_bytes=1)  # fmt: skip
    asked = Engine(settings, model)
    asked._llm = FrontEnd(tokenizer, says)
    asked._died = asyncio.get_running_loop().create_future()
    return asked


PROMPT = [1]  # say
SAYS = [2, 3, 4, 5, 6, 7]  # Paris, not Rome END then


@pytest.mark.parametrize("stop", [(), ("END",)])
def test_what_is_heard_of_an_answer_is_its_beginning(
    tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]
):
    heard: list[Begun] = []

    async def scenario() -> str:
        hearing.set(heard.append)
        spoken = await engine(tokenizer, SAYS).generate(
            PROMPT, Sampling(max_tokens=8, stop=stop), k=0
        )
        return spoken.completions[0].text

    said = asyncio.run(scenario())
    assert said == (" Paris, not Rome" if stop else "Paris, not RomeEND then")
    assert all(said.startswith(begun.text) for begun in heard)
    assert [begun.token_ids for begun in heard] == [SAYS[: n + 1] for n in range(len(heard))]
    assert len({begun.text for begun in heard}) >= 4


def test_an_answer_that_is_given_up_has_taken_what_was_read_and_written_until_then(
    tokenizer: PreTrainedTokenizerFast,
):
    async def scenario(n_steps: int) -> Spent:
        spending.set(spent := Spent())
        asked = engine(tokenizer, SAYS * 100)
        call = asyncio.create_task(asked.generate(PROMPT * 5, Sampling(max_tokens=600), k=0))
        while spent.n_output_tokens < n_steps:
            await asyncio.sleep(0)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        return spent

    assert asyncio.run(scenario(3)) == Spent(n_prompt_tokens=5, n_output_tokens=3)

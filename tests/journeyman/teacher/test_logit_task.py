"""What is read and what is recorded of a row of kind ``logits``, by an engine that only listens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from journeyman.recipe import Logits
from journeyman.teacher.answers import ContextOverflow, EmptyTarget, LogitLabels, Recorded
from journeyman.teacher.tokens import LogitTask

WORDS = ["<eos>", "ask", "say", "one", "two", "three", "be", "brief"]


class Listener:
    """Stands in for an engine: notes what it is given to read."""

    def __init__(self, max_model_len: int = 12) -> None:
        tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<eos>"))
        tokenizer.pre_tokenizer = Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
        self.tokenizer.chat_template = (
            "{% for m in messages %}{{ 'be' if m['role'] == 'system' else 'ask' }} "
            "{{ m['content'] }} {% endfor %}say"
        )
        self.max_model_len = max_model_len
        self.read: list[tuple[list[int], int]] = []

    async def record_target(
        self, token_ids: Sequence[int], start: int, k: int, seed: int = 0
    ) -> tuple[Recorded, int]:
        self.read.append((list(token_ids), start))
        shape = (len(token_ids) - start, k)
        return Recorded(token_ids=np.zeros(shape, np.int32), logprobs=np.zeros(shape)), 0


def run(engine: Listener, row: dict[str, Any], **settings: Any) -> LogitLabels:
    task = LogitTask(Logits(k=2, **settings), engine)  # type: ignore[arg-type]
    return asyncio.run(task.run(row))


def test_given_tokens_are_scored_as_they_are_behind_a_chat() -> None:
    engine = Listener()
    said = run(
        engine, {"text": "one two", "said": [4, 3, 3, 0]}, tokens="said", context="{{ text }}",
        chat=True, system="brief",
    )  # fmt: skip
    prompt = engine.tokenizer.encode("be brief ask one two say")
    assert engine.read == [([*prompt, 4, 3, 3, 0], len(prompt))]
    assert said.token_ids.tolist() == [4, 3, 3, 0] and len(said.recorded) == 4
    assert said.n_prompt_tokens == len(prompt) + 4 and not said.truncated


@pytest.mark.parametrize(
    ("overflow", "kept"), [("truncate_left", [5, 0]), ("truncate_right", [3, 4])]
)
def test_given_tokens_are_cut_where_the_recipe_says(overflow: str, kept: list[int]) -> None:
    engine = Listener(max_model_len=4)
    row = {"text": "ask", "said": [3, 4, 5, 0]}
    said = run(engine, row, tokens="said", context="{{ text }}", overflow=overflow)
    assert said.token_ids.tolist() == kept and said.truncated
    with pytest.raises(ContextOverflow):
        run(engine, row, tokens="said", context="{{ text }}")


def test_no_tokens_are_nothing_to_score() -> None:
    with pytest.raises(EmptyTarget):
        run(Listener(), {"text": "ask", "said": []}, tokens="said", context="{{ text }}")


def test_datasets_that_were_made_before_chats_keep_their_identity() -> None:
    assert Logits().asked().keys().isdisjoint({"chat", "system", "examples", "tokens"})
    assert Logits(tokens="said").asked()["tokens"] == "said"

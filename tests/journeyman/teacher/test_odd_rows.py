"""Rows that nothing can be done with, and such as need care, by a stand-in engine."""

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

from journeyman import recipe
from journeyman.errors import RecipeError
from journeyman.labels.store import in_order
from journeyman.recipe import Classes, Logits
from journeyman.teacher.answers import (
    EmptyTarget,
    InvalidRequest,
    NotFinite,
    Recorded,
    RowError,
    Unrendered,
)
from journeyman.teacher.classes import ClassTask
from journeyman.teacher.engine import Scored
from journeyman.teacher.prompting import Prompting
from journeyman.teacher.tokens import LogitTask
from tests.journeyman.labels import synthetic as made

WORDS = ["<unk>", "a", "b", "long", "longer", "words", *(f"w{i}" for i in range(20))]


class Engine:
    """Every token has the log-probability -1, or what it is told."""

    def __init__(self, says: float = -1.0, max_model_len: int = 13) -> None:
        tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        self.max_model_len = max_model_len
        self.says = says
        self.targets: list[list[int]] = []

    async def score_target(self, token_ids: Sequence[int], start: int) -> Scored:
        self.targets.append(list(token_ids[start:]))
        values = np.full(len(token_ids) - start, self.says, np.float32)
        return Scored(logprobs=values, n_cached_tokens=0)

    async def score_next(self, token_ids: Sequence[int], ids: Sequence[int]) -> Scored:
        return Scored(logprobs=np.full(len(ids), self.says, np.float32), n_cached_tokens=0)

    async def record_target(
        self, token_ids: Sequence[int], start: int, k: int, seed: int = 0
    ) -> tuple[Recorded, int]:
        shape = (len(token_ids) - start, k)
        logprobs = np.full(shape, self.says, np.float32)
        return Recorded(token_ids=np.zeros(shape, np.int32), logprobs=logprobs), 0


def classes(engine: Engine, **settings: Any) -> ClassTask:
    words = {"classes": {"short": "a", "long": "long longer words"}}
    return ClassTask(Classes.model_validate(words | settings), engine)  # type: ignore[arg-type]


def run(task: Any, **row: Any) -> Any:
    return asyncio.run(task.run({"text": "w0", **row}))


@pytest.mark.parametrize("overflow", ["truncate_left", "truncate_right"])
def test_a_text_too_long_is_cut_alike_behind_every_label(overflow: str) -> None:
    """A sum over fewer tokens is larger, whatever they are."""
    engine = Engine()
    task = classes(engine, scoring="channel", prompt="b {{ label }} ", overflow=overflow)
    said = run(task, text=" ".join(f"w{i}" for i in range(20)))
    assert len({tuple(target) for target in engine.targets}) == 1 and said.truncated
    np.testing.assert_allclose(np.exp(said.class_logprobs), [0.5, 0.5])


@pytest.mark.parametrize("scoring", ["direct", "verbalizer"])
def test_an_empty_prompt_is_no_question(scoring: str) -> None:
    task = classes(Engine(), scoring=scoring, prompt="{{ text }}", classes={"yes": "a", "no": "b"})
    with pytest.raises(EmptyTarget, match="nothing stands before the answer"):
        run(task, text="")


@pytest.mark.parametrize("scoring", ["direct", "verbalizer", "channel"])
def test_log_probabilities_that_are_no_numbers_are_no_labels(scoring: str) -> None:
    prompt = "b {{ label }}" if scoring == "channel" else "b"
    task = classes(
        Engine(float("nan")), scoring=scoring, prompt=prompt, classes={"yes": "a", "no": "b"}
    )
    with pytest.raises(NotFinite, match=r"teacher\.dtype"):
        run(task)
    with pytest.raises(NotFinite):
        run(LogitTask(Logits(k=2), Engine(float("nan"))), text="a b w1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "error"),
    [(None, EmptyTarget), ("3, 4", InvalidRequest), ([1, 2.5], InvalidRequest), ([True], RowError)],
)
def test_a_column_of_tokens_that_holds_none_is_the_rows_fault(tokens: Any, error: type) -> None:
    task = LogitTask(Logits(k=2, tokens="ids", context="a"), Engine())  # type: ignore[arg-type]
    with pytest.raises(error, match="ids is n"):
        run(task, ids=tokens)


@pytest.mark.parametrize(
    "template", ["{{ title.upper() }}", "{{ tags|join(', ') }}", "{{ title[:3] }}", "{{ n // 0 }}"]
)
def test_a_template_that_fails_on_a_row_is_the_rows_fault(template: str) -> None:
    with pytest.raises(Unrendered, match=r"labels\.prompt: .* for this row"):
        Prompting(template).render({"title": None, "tags": None, "n": 1})


def test_the_order_of_an_answers_properties_is_part_of_what_is_asked() -> None:
    def identity(*names: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        labels = made.settings("generate", structured={"json_schema": schema})
        return in_order({"labels": labels.asked()})

    assert identity("why", "answer") == identity("why", "answer")
    assert recipe.digest(identity("why", "answer")) != recipe.digest(identity("answer", "why"))


@pytest.mark.parametrize(
    ("argument", "words"),
    [("dtype", r"teacher\.dtype"), ("max_lora_rank", r"teacher\.lora"),
     ("logprobs_mode", "cannot be set")],
)  # fmt: skip
def test_engine_arguments_that_the_recipe_sets_are_refused(argument: str, words: str) -> None:
    content = made.recipe_of("generate").model_dump(mode="json")
    content["teacher"]["engine_args"] = {argument: "x"}
    with pytest.raises(RecipeError, match=words):
        recipe.parse(content)

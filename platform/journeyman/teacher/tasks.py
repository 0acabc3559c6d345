"""What the teacher is asked about a row, and what is made of its answers.

Used alike by labeling and by serving, so that both score a text the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from journeyman.errors import RecipeError
from journeyman.prompts import Prompt, encode
from journeyman.recipe import Labels, digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

_MAX_NEXT_TOKENS = 128  # vLLM's bound on logprob_token_ids


class RowError(Exception):
    """A row that can never be labeled as it is; its class name is the kind of error."""


class ContextOverflow(RowError):  # noqa: N818 - the field's term
    """The prompt is longer than the teacher's context."""


class EmptyTarget(RowError):  # noqa: N818
    """Nothing is left to score when the template is rendered."""


class Scorer(Protocol):
    """What a task needs of an engine: see ``engine.Engine``."""

    async def score_target(self, token_ids: Sequence[int], start: int) -> np.ndarray: ...
    async def score_next(
        self, token_ids: Sequence[int], candidates: Sequence[int]
    ) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLabels:
    """The teacher's distribution over the classes for one row.

    class_logprobs: float32[c], natural log, normalised over the classes, before prior correction;
    label_mass: probability of any label word at all, None for channel scoring.
    """

    class_logprobs: np.ndarray
    label_mass: float | None
    n_prompt_tokens: int
    n_output_tokens: int


class ClassTask:
    """Kind ``classes``, scoring ``direct`` or ``channel``."""

    def __init__(
        self, labels: Labels, tokenizer: PreTrainedTokenizerBase, max_model_len: int
    ) -> None:
        """Raises RecipeError where label words do not fit the scoring."""
        self.labels = tuple(labels.classes)
        self.prompts_per_row = len(self.labels) if labels.scoring == "channel" else 1
        self._words = tuple(labels.classes.values())
        self._scoring = labels.scoring
        self._prompt = Prompt(labels.prompt, "labels.prompt")
        self._target = Prompt(labels.target, "labels.target")
        self._tokenizer = tokenizer
        self._max_prompt = max_model_len - 1  # vLLM generates one token behind the prompt
        if labels.scoring == "direct":
            self._word_ids = _single_tokens(tokenizer, labels.classes)

    async def run(self, engine: Scorer, row: Mapping[str, Any]) -> ClassLabels:
        """Score one row; raises RowError, and whatever the engine raises."""
        if self._scoring == "channel":
            return await self._channel(engine, row)
        return await self._direct(engine, row)

    async def _direct(self, engine: Scorer, row: Mapping[str, Any]) -> ClassLabels:
        prompt = encode(self._tokenizer, self._prompt.segments(row))
        self._check_length(len(prompt))
        raw = (await engine.score_next(prompt, self._word_ids)).astype(np.float64)
        log_mass = np.logaddexp.reduce(raw)
        return ClassLabels(
            class_logprobs=(raw - log_mass).astype(np.float32),
            label_mass=float(np.exp(log_mass)),
            n_prompt_tokens=len(prompt),
            n_output_tokens=1,
        )

    async def _channel(self, engine: Scorer, row: Mapping[str, Any]) -> ClassLabels:
        """P(label | text) under a uniform prior, from log P(text | label) (Min et al. 2022)."""
        prompts = [self._channel_prompt(row, words) for words in self._words]
        scores = await asyncio.gather(*(engine.score_target(ids, start) for ids, start in prompts))
        loglik = np.array([score.sum(dtype=np.float64) for score in scores])
        return ClassLabels(
            class_logprobs=(loglik - np.logaddexp.reduce(loglik)).astype(np.float32),
            label_mass=None,
            n_prompt_tokens=sum(len(ids) for ids, _ in prompts),
            n_output_tokens=len(prompts),
        )

    def _channel_prompt(self, row: Mapping[str, Any], words: str) -> tuple[list[int], int]:
        """Tokens, and where the target starts. The two are encoded apart, so that the boundary
        is a token's for every label and the target's tokens are the same behind each."""
        context = encode(self._tokenizer, self._prompt.segments(row, words))
        target = encode(self._tokenizer, self._target.segments(row, words))
        if not context:
            raise EmptyTarget("labels.prompt is empty for this row, so its first token has no "
                              "probability.")  # fmt: skip
        if not target:
            raise EmptyTarget("labels.target is empty for this row: there is nothing to score.")
        self._check_length(len(context) + len(target))
        return context + target, len(context)

    def _check_length(self, n_tokens: int) -> None:
        if n_tokens > self._max_prompt:
            raise ContextOverflow(
                f"the prompt has {n_tokens} tokens, the teacher takes {self._max_prompt}."
            )


def prompt_digest(labels: Labels) -> str:
    """Digest of all that decides what the teacher is asked: templates, words and scoring."""
    return digest([labels.kind, labels.scoring, labels.classes, labels.prompt, labels.target])


def row_values(text: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """A row's columns as templates see them."""
    return {**meta, "text": text}


def _single_tokens(tokenizer: PreTrainedTokenizerBase, classes: Mapping[str, str]) -> list[int]:
    """Token id of each label's words; raises RecipeError unless each is one token of its own."""
    if len(classes) > _MAX_NEXT_TOKENS:
        raise RecipeError(
            f"labels.classes: direct scoring takes at most {_MAX_NEXT_TOKENS} classes, got "
            f"{len(classes)}; use scoring: channel."
        )
    ids = {}
    for label, words in classes.items():
        tokens = tokenizer.encode(words, add_special_tokens=False)
        if len(tokens) != 1:
            raise RecipeError(
                f"labels.classes.{label}: {words!r} is {len(tokens)} tokens for this teacher, and "
                "direct scoring reads one; choose a shorter word (a leading space counts), or use "
                "scoring: channel."
            )
        ids[label] = tokens[0]
    return list(ids.values())

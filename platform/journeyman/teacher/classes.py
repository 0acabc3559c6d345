"""Kind ``classes``: the teacher's distribution over label words."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import RecipeError
from journeyman.recipe import Classes, Logits
from journeyman.teacher.answers import ClassLabels, EmptyTarget, NotFinite
from journeyman.teacher.progress import at_once
from journeyman.teacher.prompting import Encoder, Prompting
from journeyman.teacher.remembered import Prompt, Remembered
from journeyman.teacher.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from journeyman.teacher.engine import Scored
    from journeyman.teacher.remote import RemoteTeacher

_ROW_REQUESTS_PER_LABELS = 128  # vLLM's bound on the ids of one request
_rows = itertools.count()  # of all tasks of this process, which has one engine


class ClassTask:
    """Scoring ``direct``, ``verbalizer`` or ``channel`` on an engine of ours."""

    def __init__(
        self, labels: Classes, engine: Scorer, remembered: Remembered | None = None
    ) -> None:
        """remembered: of this engine, where equal targets are to be scored once.

        Raises RecipeError where label words do not fit the scoring.
        """
        self.labels = tuple(labels.classes)
        self._wordings = labels.wordings()
        self._engine = engine
        self._remembered = remembered
        self._prompting = prompting(labels)
        self._target = Prompting(labels.target, where="labels.target")
        # vLLM generates one token behind the prompt.
        self._encoder = Encoder(engine.tokenizer, engine.max_model_len - 1, labels.overflow)
        self._score = {
            "direct": self._direct,
            "verbalizer": self._verbalizer,
            "channel": self._channel,
        }[labels.scoring]
        self._channeled = labels.scoring == "channel"
        n_words = sum(map(len, self._wordings))
        asked_at_once = _ROW_REQUESTS_PER_LABELS if labels.scoring == "direct" else 1
        self.requests_per_row = -(-n_words // asked_at_once)
        if labels.scoring == "direct":
            self._word_ids = _single_tokens(engine.tokenizer, labels.one_wording())
        elif labels.scoring == "verbalizer":
            self._phrases = phrases(engine.tokenizer, labels.one_wording())

    async def run(self, row: Mapping[str, Any], seed: int = 0) -> ClassLabels:
        return await self._score(row)

    def prefix(self, row: Mapping[str, Any]) -> str:
        # The label stands in front of the text: rows share nothing but what all of them share.
        return "" if self._channeled else self._prompting.render(row).text

    async def _direct(self, row: Mapping[str, Any]) -> ClassLabels:
        rendered = self._prompting.render(row, tokenizer=self._encoder.tokenizer)
        prompt, truncated = await self._encoder.fit_soon(rendered)
        _check_not_empty(prompt)
        scored = await self._engine.score_next(prompt, self._word_ids)
        logprobs, log_mass = normalised(scored.logprobs)
        return ClassLabels(
            class_logprobs=logprobs,
            label_mass=float(np.exp(log_mass)),
            n_prompt_tokens=len(prompt),
            n_cached_tokens=scored.n_cached_tokens,
            n_output_tokens=self.requests_per_row,
            truncated=truncated,
        )

    async def _verbalizer(self, row: Mapping[str, Any]) -> ClassLabels:
        """P(label words | prompt), each the product over its tokens."""
        rendered = self._prompting.render(row, tokenizer=self._encoder.tokenizer)
        longest = max(len(phrase) for phrase in self._phrases)
        prompt, truncated = await self._encoder.fit_soon(rendered, reserve=longest)
        _check_not_empty(prompt)
        loglik, n_cached = await score_phrases(self._engine, prompt, self._phrases)
        logprobs, log_mass = normalised(loglik)
        return ClassLabels(
            class_logprobs=logprobs,
            label_mass=float(np.exp(log_mass)),
            n_prompt_tokens=sum(len(prompt) + len(phrase) for phrase in self._phrases),
            n_cached_tokens=n_cached,
            n_output_tokens=len(self._phrases),
            truncated=truncated,
        )

    async def _channel(self, row: Mapping[str, Any]) -> ClassLabels:
        """P(label | text) under a uniform prior, from log P(text | label) (Min et al. 2022)."""
        words = [one for own in self._wordings for one in own]
        contexts = [self._channel_context(row, one) for one in words]
        # A target too long is cut alike behind all labels: likelihoods of more or fewer tokens
        # say nothing of one another.
        room = max(map(len, contexts))
        prompts = await asyncio.gather(
            *(self._channel_prompt(row, *one, room) for one in zip(words, contexts, strict=True))
        )
        scores = await self._targets([(ids, start) for ids, start, _ in prompts])
        loglik = np.array([score.logprobs.sum(dtype=np.float64) for score in scores])
        loglik = mixtures(loglik, [len(own) for own in self._wordings])
        return ClassLabels(
            class_logprobs=normalised(loglik)[0],
            label_mass=None,
            n_prompt_tokens=sum(len(ids) for ids, _, _ in prompts),
            n_cached_tokens=sum(score.n_cached_tokens for score in scores),
            n_output_tokens=len(prompts),
            truncated=any(truncated for _, _, truncated in prompts),
        )

    async def _targets(self, asked: Sequence[Prompt]) -> Sequence[Scored]:
        ask = functools.partial(_scored, self._engine)
        return await (self._remembered.scored(asked, ask) if self._remembered else ask(asked))

    def _channel_context(self, row: Mapping[str, Any], words: str) -> list[int]:
        context = self._encoder.raw(self._prompting.render(row, words).segments, begin=True)
        if not context:
            raise EmptyTarget("labels.prompt is empty for this row, so its first token has no "
                              "probability.")  # fmt: skip
        return context

    async def _channel_prompt(
        self, row: Mapping[str, Any], words: str, context: list[int], reserve: int
    ) -> tuple[list[int], int, bool]:
        """Tokens, where the target starts, whether it was cut. The two are encoded apart, so that
        the boundary is a token's for every label and the target's tokens are the same behind each.
        """
        rendered = self._target.render(row, words)
        target, truncated = await self._encoder.fit_target(rendered.segments, reserve=reserve)
        if not target:
            raise EmptyTarget("labels.target is empty for this row: there is nothing to score.")
        return context + target, len(context), truncated


class RemoteClassTask:
    """Scoring ``direct`` behind a URL, from the top log-probabilities that an API gives."""

    requests_per_row = 1

    def __init__(self, labels: Classes, teacher: RemoteTeacher) -> None:
        self.labels = tuple(labels.classes)
        self._words = tuple(labels.one_wording().values())
        self._prompting = prompting(labels)
        self._teacher = teacher

    async def run(self, row: Mapping[str, Any], seed: int = 0) -> ClassLabels:
        raw, n_prompt, n_output, n_cached = await self._teacher.next_logprobs(
            self._prompting.render(row), self._words
        )
        logprobs, log_mass = normalised(raw)
        return ClassLabels(
            class_logprobs=logprobs,
            label_mass=float(np.exp(min(0.0, log_mass))),
            n_prompt_tokens=n_prompt,
            n_output_tokens=n_output,
            n_cached_tokens=n_cached,
        )

    def prefix(self, row: Mapping[str, Any]) -> str:
        return self._prompting.render(row).text


def prompting(labels: Any) -> Prompting:
    """The prompt of a labels section: of ``logits``, the context."""
    context = isinstance(labels, Logits)
    return Prompting(
        labels.context if context else labels.prompt,
        chat=labels.chat,
        system=labels.system,
        examples=labels.examples,
        where="labels.context" if context else "labels.prompt",
    )


async def score_phrases(
    engine: Scorer, prompt: list[int], phrases: Sequence[list[int]]
) -> tuple[np.ndarray, int]:
    """float64[c]: log P(phrase | prompt), summed over its tokens; and tokens read from cache."""
    scores = await _scored(engine, [([*prompt, *phrase], len(prompt)) for phrase in phrases])
    loglik = np.array([score.logprobs.sum(dtype=np.float64) for score in scores])
    return loglik, sum(score.n_cached_tokens for score in scores)


async def _scored(engine: Scorer, prompts: Sequence[Prompt]) -> list[Scored]:
    """All of a row, which is answered with the last of them."""
    before = at_once.set((next(_rows), len(prompts)) if len(prompts) > 1 else None)
    try:
        return await asyncio.gather(*(engine.score_target(ids, start) for ids, start in prompts))
    finally:
        at_once.reset(before)


def mixtures(loglik: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """float64[c]: log of each label's mean likelihood over its wordings.

    loglik: float64[sum(sizes)], the wordings of each label one behind the other.
    """
    ends = np.cumsum(sizes)[:-1]
    return np.array([np.logaddexp.reduce(own) - np.log(len(own)) for own in np.split(loglik, ends)])


def _check_not_empty(prompt: Sequence[int]) -> None:
    if not prompt:
        raise EmptyTarget("labels.prompt is empty for this row: nothing stands before the answer.")


def normalised(loglik: np.ndarray) -> tuple[np.ndarray, float]:
    """float32[c], log of each one's share; and the log of their sum. Raises NotFinite."""
    loglik = loglik.astype(np.float64)
    with np.errstate(invalid="ignore"):  # which is found below
        log_mass = float(np.logaddexp.reduce(loglik))
    if not np.isfinite(log_mass):
        raise NotFinite
    return (loglik - log_mass).astype(np.float32), log_mass


def phrases(tokenizer: PreTrainedTokenizerBase, classes: Mapping[str, str]) -> list[list[int]]:
    """Token ids of each label's words."""
    return [tokenizer.encode(words, add_special_tokens=False) for words in classes.values()]


def _single_tokens(tokenizer: PreTrainedTokenizerBase, classes: Mapping[str, str]) -> list[int]:
    """Token id of each label's words; raises RecipeError unless each is one token of its own."""
    for (label, words), tokens in zip(classes.items(), phrases(tokenizer, classes), strict=True):
        if len(tokens) != 1:
            raise RecipeError(
                f"labels.classes.{label}: {words!r} is {len(tokens)} tokens for this teacher, and "
                "direct scoring reads one; choose a shorter word (a leading space counts), or use "
                "scoring: verbalizer."
            )
    return [tokens[0] for tokens in phrases(tokenizer, classes)]

"""Kinds ``logits`` and ``generate``: the teacher's distribution at every token, of a given text or
of an answer of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from journeyman.errors import RecipeError
from journeyman.recipe import Generate, Logits, Rationales
from journeyman.teacher.answers import (
    EmptyTarget,
    GeneratedLabels,
    InvalidRequest,
    LogitLabels,
    NotFinite,
    Recorded,
    Spoken,
)
from journeyman.teacher.classes import prompting
from journeyman.teacher.prompting import Encoder, Prompting, Sampling
from journeyman.teacher.scorer import Scorer

if TYPE_CHECKING:
    from journeyman.teacher.remote import RemoteTeacher


def entries(labels: Logits | Generate) -> int:
    """Entries kept of each position: the k most likely tokens, or draws."""
    return labels.draws if labels.codec == "sampled" else labels.k


class LogitTask:
    """Teacher-forced over the row's own text."""

    requests_per_row = 1

    def __init__(self, labels: Logits, engine: Scorer) -> None:
        self._engine = engine
        self._entries = entries(labels)
        self._context = prompting(labels)
        self._tokens = labels.tokens
        self._target = Prompting(labels.target, where="labels.target")
        self._encoder = Encoder(engine.tokenizer, engine.max_model_len - 1, labels.overflow)

    async def run(self, row: Mapping[str, Any], seed: int = 0) -> LogitLabels:
        rendered = self._context.render(row, tokenizer=self._encoder.tokenizer)
        context = self._encoder.raw(rendered.segments, begin=rendered.messages is None)
        if self._tokens:
            given = _token_ids(row[self._tokens], self._tokens)
            target, truncated = self._encoder.fit_ids(given, reserve=len(context))
        else:
            target, truncated = await self._encoder.fit_target(
                self._target.render(row).segments, reserve=len(context)
            )
        start = max(1, len(context))
        ids = context + target
        if len(ids) <= start:
            raise EmptyTarget("labels.target has no token with another in front of it.")
        recorded, n_cached = await self._engine.record_target(ids, start, self._entries, seed)
        _check_numbers(recorded)
        return LogitLabels(
            token_ids=np.asarray(target, dtype=np.int32),
            recorded=recorded,
            n_prompt_tokens=len(ids),
            n_output_tokens=1,
            n_cached_tokens=n_cached,
            truncated=truncated,
        )

    def prefix(self, row: Mapping[str, Any]) -> str:
        return self._context.render(row).text


def _check_numbers(recorded: Recorded | None) -> None:
    if recorded is not None and np.isnan(recorded.logprobs).any():
        raise NotFinite


def _token_ids(given: Any, column: str) -> list[int]:
    """Raises EmptyTarget, InvalidRequest."""
    if given is None:
        raise EmptyTarget(f"{column} is null for this row: there is nothing to score.")
    if not isinstance(given, list) or not all(type(token) is int for token in given):
        raise InvalidRequest(f"{column} is no list of token ids for this row.")
    return given


class Speaker(Protocol):
    """Lets the teacher write behind a row's prompt."""

    async def speak(
        self, row: Mapping[str, Any], sampling: Sampling, n: int, k: int | None
    ) -> Spoken: ...

    def prefix(self, row: Mapping[str, Any]) -> str: ...


class LocalSpeaker:
    """On an engine of ours."""

    def __init__(self, labels: Generate | Rationales, engine: Scorer) -> None:
        """Raises RecipeError where answers leave no room for a prompt."""
        room = engine.max_model_len - labels.max_tokens
        if room < 1:
            raise RecipeError(
                f"labels.max_tokens ({labels.max_tokens}) leaves no room for a prompt in the "
                f"teacher's context of {engine.max_model_len} tokens."
            )
        self._engine = engine
        self.prompting = prompting(labels)
        self.encoder = Encoder(engine.tokenizer, room, labels.overflow)

    async def speak(
        self, row: Mapping[str, Any], sampling: Sampling, n: int, k: int | None
    ) -> Spoken:
        rendered = self.prompting.render(row, tokenizer=self.encoder.tokenizer)
        ids, truncated = await self.encoder.fit_soon(rendered)
        if not ids:
            raise EmptyTarget("labels.prompt is empty for this row.")
        spoken = await self._engine.generate(ids, sampling, n, k)
        return dataclasses.replace(spoken, truncated=truncated)

    def prefix(self, row: Mapping[str, Any]) -> str:
        return self.prompting.render(row).text


class RemoteSpeaker:
    """Behind a URL, which records no distributions."""

    def __init__(self, labels: Generate | Rationales, teacher: RemoteTeacher) -> None:
        self._prompting = prompting(labels)
        self._teacher = teacher

    async def speak(
        self, row: Mapping[str, Any], sampling: Sampling, n: int, k: int | None
    ) -> Spoken:
        return await self._teacher.speak(self._prompting.render(row), sampling, n)

    def prefix(self, row: Mapping[str, Any]) -> str:
        return self._prompting.render(row).text


def sampling_of(labels: Generate | Rationales) -> Sampling:
    return Sampling(
        max_tokens=labels.max_tokens,
        temperature=labels.temperature,
        top_p=labels.top_p,
        stop=labels.stop,
        structured=labels.structured if isinstance(labels, Generate) else None,
    )


class GenerateTask:
    """The teacher's answer to a row's prompt."""

    requests_per_row = 1

    def __init__(self, labels: Generate, speaker: Speaker) -> None:
        self._speaker = speaker
        self._sampling = sampling_of(labels)
        self._entries = entries(labels)

    async def run(self, row: Mapping[str, Any], seed: int = 0) -> GeneratedLabels:
        spoken = await self._speaker.speak(row, self._sampling, 1, self._entries)
        answer = spoken.completions[0]
        logprobs = answer.token_logprobs
        _check_numbers(answer.recorded)
        return GeneratedLabels(
            output=answer.text,
            token_ids=answer.token_ids,
            output_logprob=None if logprobs is None else float(logprobs.sum(dtype=np.float64)),
            recorded=answer.recorded,
            n_prompt_tokens=spoken.n_prompt_tokens,
            n_output_tokens=spoken.n_output_tokens,
            n_cached_tokens=spoken.n_cached_tokens,
            finish_reason=answer.finish_reason,
            truncated=spoken.truncated,
        )

    def prefix(self, row: Mapping[str, Any]) -> str:
        return self._speaker.prefix(row)

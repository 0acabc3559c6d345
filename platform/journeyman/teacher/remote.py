"""The teacher behind an OpenAI-compatible URL: the second backend, beside ``engine.Engine``.

Owns the requests, their pace and retries, and what an answer or an error means for a row. Text
goes in and text comes out: tokenizer and chat template are the server's, and so is what it makes
of a special token that a row's text spells.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from journeyman.errors import ModelError
from journeyman.recipe import Teacher
from journeyman.recipe.labels import Structured
from journeyman.teacher.answers import Completion, Refused, Spoken
from journeyman.teacher.pace import Pace
from journeyman.teacher.prompting import Rendered, Sampling
from journeyman.teacher.replies import (
    FILTERED,
    N_QUOTED,
    Answer,
    Usage,
    cause_of,
    chat_choice,
    not_connected,
    retry_after_s,
    text_choice,
    usage_of,
    word_logprobs,
    words_of,
)

if TYPE_CHECKING:
    import httpx2
    import openai

Form = TypeVar("Form")
Given = TypeVar("Given")

_START_RETRIES = 2  # a wrong URL is told in seconds
_LONGEST_PAUSE_S = 120.0  # that a Retry-After may ask for; openai 3.57 gives up on longer ones
_CHARACTERS_PER_TOKEN = 4.0
_NO_ACCESS = (401, 402, 403)
_NOT_OFFERED = (404, 405, 501)
_TEMPORARY = (408, 409, 425, 429)
_N_NAMED = 5  # models that a message names


class Unreachable(Exception):  # noqa: N818 - says what happened, is no mistake of the caller's
    """The API answers nobody: no connection, 429 or 5xx until all retries were used up.

    Rarely the row's fault, so worth another try, as is a TimeoutError.
    """


class RateLimited(Unreachable):
    """429: too many requests, whoever made them. retry_after_s: what the API asks for, or 0."""

    def __init__(self, sentence: str, retry_after_s: float) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class RemoteTeacher:
    """One model of an OpenAI-compatible API. Use it from one event loop.

    ``speak`` and ``next_logprobs`` raise Refused (the API will never answer this request),
    Unreachable, TimeoutError (no answer within ``request_timeout_s``, nor in the retries), and
    ModelError (it will answer none: key, quota, model, URL). No request carries a seed.
    """

    def __init__(self, settings: Teacher, replicas: int = 1) -> None:
        """settings.url is set. replicas: among how many the rate limits are shared, evenly."""
        self.settings = settings
        self._url = str(settings.url).rstrip("/")
        self._client: openai.AsyncOpenAI | None = None
        self._loop: asyncio.AbstractEventLoop
        self._seats = asyncio.Semaphore(settings.max_num_seqs)
        tries = settings.max_retries + 1
        self._longest_s = tries * (settings.request_timeout_s + _LONGEST_PAUSE_S)
        self._limits = _Limits(settings, replicas)
        self._quiet_until = 0.0  # by time.monotonic: the API asked for silence, of all rows
        self._answered = False
        # Forms of a request that APIs differ in, the best first; what one accepts is kept. Of the
        # log-probabilities at a position: how many besides the token's own, or none at all.
        self._top_logprobs: list[int | None] = [20, 5]
        self._own_logprobs: list[int | None] = [0, None]
        self._max_tokens_name = "max_tokens"  # only OpenAI's reasoning models want another one

    @property
    def alive(self) -> bool:
        return self._client is not None

    async def start(self) -> None:
        """Look once whether the URL answers and serves the model; raises ModelError."""
        import openai

        if self.alive:
            return
        client = openai.AsyncOpenAI(
            base_url=self._url,
            api_key=os.environ.get(self.settings.api_key_env) or "none",
            timeout=openai.Timeout(self.settings.request_timeout_s, pool=None),
            max_retries=self.settings.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(
                event_hooks={"request": [self._be_quiet], "response": [self._heed]}
            ),
        )
        try:
            self._check_served(await self._listed(client))
        except ModelError:
            await client.close()
            raise
        self._loop = asyncio.get_running_loop()
        self._client = client

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(client.close(), self._loop)

    async def speak(self, prompt: Rendered, sampling: Sampling, n: int = 1) -> Spoken:
        """n completions: of the chat, where the prompt has messages, else of its text.

        sampling.structured: a json_schema goes out as OpenAI's ``response_format``; regex, choice
        and grammar as ``structured_outputs``, which vLLM's server knows since 0.12 (not as the
        ``guided_*`` of older ones); another server refuses that, or takes no notice.
        Completions have no token ids; their tokens' log-probabilities where the API gives them.
        """
        completions: list[Completion] = []
        usage = Usage()
        while len(completions) < n:  # some APIs answer once, whatever n says
            ask = functools.partial(self._ask, prompt, sampling, n - len(completions))
            answer = await _accepted(self._own_logprobs, ask)
            completions += [choice.completion for choice in answer.choices]
            usage += answer.usage
            if all(completion.finish_reason == FILTERED for completion in completions):
                raise Refused(answer.choices[0].refusal)
        return Spoken(
            completions=completions,
            n_prompt_tokens=usage.n_prompt_tokens,
            n_output_tokens=usage.n_output_tokens,
            n_cached_tokens=usage.n_cached_tokens,
        )

    async def next_logprobs(
        self, prompt: Rendered, words: Sequence[str]
    ) -> tuple[np.ndarray, int, int, int]:
        """float32[len(words)]: log P(word is the next token), and the tokens that it took: of
        the prompt, of the output, and of the prompt's those that were cached.

        An API gives the 20 or 5 most likely tokens only: see ``word_logprobs`` for the others. A
        model that thinks before it answers cannot be scored so. Raises ModelError where the API
        gives none at all.
        """
        ask = functools.partial(self._ask, prompt, Sampling(max_tokens=1), 1)
        answer = await _accepted(self._top_logprobs, ask)
        choice = answer.choices[0]
        if choice.completion.finish_reason == FILTERED:
            raise Refused(choice.refusal)
        if not choice.top:
            raise ModelError(
                f"teacher.url: {self._url} gives no log-probabilities of {self.settings.model}, "
                "which labels.scoring: direct reads; use labels.kind: rationales, or run the "
                "teacher in an engine of our own (no teacher.url)."
            )
        return (
            word_logprobs(choice.top, words),
            answer.usage.n_prompt_tokens,
            answer.usage.n_output_tokens,
            answer.usage.n_cached_tokens,
        )

    async def _be_quiet(self, _: httpx2.Request) -> None:
        """Before each try of each request: a limit that one row met holds for all of them."""
        while (left_s := self._quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(left_s)

    async def _heed(self, response: httpx2.Response) -> None:
        if response.status_code == 429:
            pause_s = min(retry_after_s(response), _LONGEST_PAUSE_S)
            self._quiet_until = max(self._quiet_until, time.monotonic() + pause_s)

    async def _listed(self, client: openai.AsyncOpenAI) -> object:
        """What GET /models answers; None where the API has no such list."""
        import openai

        once = client.with_options(max_retries=min(_START_RETRIES, self.settings.max_retries))
        try:
            async with asyncio.timeout(self.settings.start_timeout_s):
                return await once.get("/models", cast_to=object)
        except openai.APIStatusError as error:
            if error.status_code in _NO_ACCESS:
                raise self._no_access(error) from error
            if error.status_code in (*_NOT_OFFERED, 429):
                return None
            raise ModelError(
                f"teacher.url: {self._url} answers {error.status_code} ({words_of(error)})."
            ) from error
        except (openai.APIError, TimeoutError) as error:
            raise ModelError(
                f"teacher.url: {self._url} does not answer ({cause_of(error)}); is the server up, "
                "and can the machine that labels reach it?"
            ) from error

    def _check_served(self, listed: object) -> None:
        if listed is None:
            return
        if not isinstance(listed, dict):
            raise ModelError(
                f"teacher.url: {self._url} does not speak OpenAI's protocol; most servers have it "
                "below /v1."
            )
        served = [str(model["id"]) for model in listed.get("data") or () if "id" in model]
        if served and self.settings.model not in served:
            nearest = difflib.get_close_matches(self.settings.model, served, _N_NAMED, cutoff=0)
            others = f" and {len(served) - len(nearest)} others" if served[_N_NAMED:] else ""
            raise ModelError(
                f"teacher.model: {self._url} does not serve {self.settings.model!r}; it serves "
                f"{', '.join(nearest)}{others}."
            )

    async def _ask(
        self, prompt: Rendered, sampling: Sampling, n: int, logprobs: int | None
    ) -> Answer:
        """One request in its turn, retried as the recipe says."""
        estimate = _n_characters(prompt) / _CHARACTERS_PER_TOKEN + n * sampling.max_tokens
        async with self._seats:
            await asyncio.sleep(self._limits.reserve(estimate))
            sent = await self._sent(prompt, sampling, n, logprobs)
        if not getattr(sent, "choices", None):  # some gateways wrap an error in a 200
            raise Unreachable(f"{self._url} answered without a choice: {str(sent)[:N_QUOTED]}")
        self._answered = True
        read = text_choice if prompt.messages is None else chat_choice
        answer = Answer([read(choice) for choice in sent.choices], usage_of(sent.usage))
        if n_tokens := answer.usage.n_prompt_tokens + answer.usage.n_output_tokens:
            self._limits.correct(n_tokens - estimate)
        return answer

    async def _sent(
        self, prompt: Rendered, sampling: Sampling, n: int, logprobs: int | None
    ) -> Any:
        """The answer as openai's types have it, but APIs leave out fields that those promise."""
        import openai

        assert self._client is not None, "start it first"
        endpoint: Any = self._client.completions
        if prompt.messages is not None:
            endpoint = self._client.chat.completions
        try:
            # Each try has a deadline of its own; this one ends an answer that trickles on and on.
            async with asyncio.timeout(self._longest_s):
                return await endpoint.create(**self._body(prompt, sampling, n, logprobs))
        except openai.BadRequestError as error:
            if (error.code, error.param) != ("unsupported_parameter", "max_tokens"):
                raise self._meaning(error) from error
        except openai.APIError as error:
            raise self._meaning(error) from error
        self._max_tokens_name = "max_completion_tokens"
        return await self._sent(prompt, sampling, n, logprobs)

    def _body(
        self, prompt: Rendered, sampling: Sampling, n: int, logprobs: int | None
    ) -> dict[str, Any]:
        """Arguments of openai's ``create``."""
        body: dict[str, Any] = {
            "model": self.settings.model,
            self._max_tokens_name: sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.temperature > 0:  # else vLLM's server takes it from generation_config.json
            body["top_p"] = sampling.top_p
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if n > 1:
            body["n"] = n
        if sampling.structured:
            body["extra_body"] = _constraint(sampling.structured)
        if prompt.messages is None:
            body["prompt"] = prompt.text
            if logprobs is not None:
                body["logprobs"] = logprobs
            return body
        body["messages"] = [{"role": role, "content": text} for role, text in prompt.messages]
        if logprobs is not None:
            body["logprobs"] = True
        if logprobs:
            body["top_logprobs"] = logprobs
        return body

    def _meaning(self, error: openai.APIError) -> Exception:
        """What an error of the API says of the row, or of all rows."""
        import openai

        if isinstance(error, openai.APITimeoutError) and not not_connected(error):
            return TimeoutError(f"no answer within {self.settings.request_timeout_s:g} s")
        if not isinstance(error, openai.APIStatusError):
            return Unreachable(f"{self._url} does not answer ({cause_of(error)}).")
        status, words = error.status_code, words_of(error)
        if status in _NO_ACCESS and not (status == 403 and self._answered):
            return self._no_access(error)  # 403 after answers: of this row's content
        if error.code == "insufficient_quota":
            return ModelError(f"teacher.url: {self._url} has no quota left for this key ({words}).")
        if status == 429:
            said = f"{self._url} answered 429: {words}"
            return RateLimited(said, retry_after_s(error.response))
        if status in _TEMPORARY or status >= 500:
            return Unreachable(f"{self._url} answered {status}: {words}")
        if status in _NOT_OFFERED and not self._answered:
            return ModelError(
                f"teacher.url: {self._url} answers {status} ({words}); look at teacher.url (most "
                "servers have the API below /v1), teacher.model and labels.chat, which decides "
                "between its /chat/completions and its /completions."
            )
        return Refused(words)

    def _no_access(self, error: openai.APIStatusError) -> ModelError:
        name = self.settings.api_key_env
        key = f"the key in {name} does not open it" if os.environ.get(name) else f"{name} is unset"
        return ModelError(
            f"teacher.api_key_env: {self._url} answers {error.status_code} ({words_of(error)}): "
            f"{key}; set it where the replicas run."
        )


class _Limits:
    """The recipe's rate limits, where it has any."""

    def __init__(self, settings: Teacher, replicas: int) -> None:
        requests, tokens = settings.requests_per_minute, settings.tokens_per_minute
        self._requests = Pace(requests / replicas) if requests else None
        self._tokens = Pace(tokens / replicas) if tokens else None

    def reserve(self, n_tokens: float) -> float:
        """Take one request of about so many tokens; returns the seconds to wait before it."""
        return max(
            self._requests.reserve(1) if self._requests else 0.0,
            self._tokens.reserve(n_tokens) if self._tokens else 0.0,
        )

    def correct(self, n_tokens: float) -> None:
        """Tokens that a request took beyond those reserved, or less (negative)."""
        if self._tokens:
            self._tokens.correct(n_tokens)


async def _accepted(forms: list[Form], ask: Callable[[Form], Awaitable[Given]]) -> Given:
    """Ask in the first form and, where it is refused, in the next; keep the one accepted."""
    for form in forms[:-1]:
        try:
            given = await ask(form)
        except Refused:
            continue
        forms[:] = [form]
        return given
    form = forms[-1]
    given = await ask(form)
    forms[:] = [form]
    return given


def _constraint(structured: Structured) -> dict[str, Any]:
    if structured.json_schema is not None:
        schema = {"name": "answer", "schema": structured.json_schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"structured_outputs": structured.model_dump(mode="json", exclude_none=True)}


def _n_characters(prompt: Rendered) -> int:
    if prompt.messages is None:
        return len(prompt.text)
    return sum(len(content) for _, content in prompt.messages)

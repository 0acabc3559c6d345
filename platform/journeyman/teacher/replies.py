"""What an OpenAI-compatible API says: of its answers, and of its errors in words."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.teacher.answers import Completion

if TYPE_CHECKING:
    import httpx2
    import openai

FILTERED = "content_filter"
N_QUOTED = 500  # characters of an API's answer in a message
_LOWEST_LOGPROB = -9999.0  # what OpenAI and vLLM write in place of minus infinity


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the API counted them; none where it does not say."""

    n_prompt_tokens: int = 0
    n_output_tokens: int = 0
    n_cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.n_prompt_tokens + other.n_prompt_tokens,
            self.n_output_tokens + other.n_output_tokens,
            self.n_cached_tokens + other.n_cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """top: the most likely tokens at its first position, each with its log-probability."""

    completion: Completion
    top: list[tuple[str, float]]
    refusal: str


@dataclass(frozen=True, slots=True)
class Answer:
    choices: list[Choice]
    usage: Usage


def chat_choice(choice: Any) -> Choice:
    refusal = choice.message.refusal
    positions = (choice.logprobs and choice.logprobs.content) or []
    top = positions[0].top_logprobs if positions else []
    return _choice(
        choice.message.content,
        FILTERED if refusal else choice.finish_reason,
        [position.logprob for position in positions],
        [(token.token, token.logprob) for token in top or ()],
        refusal,
    )


def text_choice(choice: Any) -> Choice:
    logprobs = choice.logprobs
    top = (logprobs and logprobs.top_logprobs) or [{}]
    return _choice(
        choice.text,
        choice.finish_reason,
        (logprobs and logprobs.token_logprobs) or [],
        list((top[0] or {}).items()),
        None,
    )


def _choice(
    text: str | None,
    finish_reason: str | None,
    token_logprobs: list[float],
    top: list[tuple[str, float]],
    refusal: str | None,
) -> Choice:
    return Choice(
        completion=Completion(
            text=text or "",
            token_ids=np.empty(0, dtype=np.int32),
            finish_reason=finish_reason or "stop",
            token_logprobs=np.array(token_logprobs, np.float32) if token_logprobs else None,
        ),
        top=[(token, max(logprob, _LOWEST_LOGPROB)) for token, logprob in top],
        refusal=(refusal or "the API's content filter took the answer away.")[:N_QUOTED],
    )


def usage_of(usage: Any) -> Usage:
    if usage is None:
        return Usage()
    details = usage.prompt_tokens_details
    return Usage(
        usage.prompt_tokens or 0,
        usage.completion_tokens or 0,
        (details and details.cached_tokens) or 0,
    )


def words_of(error: openai.APIStatusError) -> str:
    """The API's own message, in one line."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else body
    return " ".join(str(message or error.message).split())[:N_QUOTED]


def cause_of(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__


def word_logprobs(top: Sequence[tuple[str, float]], words: Sequence[str]) -> np.ndarray:
    """float32[len(words)]: log-probability of each word among the most likely next tokens.

    A word's token is the one of the same text; failing that, those that differ from it in the
    spaces around them and are no other word's, their probabilities added up. A word that is not
    among them gets the lowest log-probability there is: a bound from above, since all tokens left
    out are less likely than that.
    """
    floor = min(logprob for _, logprob in top)
    taken = set(words)
    found = []
    for word in words:
        same = [logprob for token, logprob in top if token == word] or [
            logprob
            for token, logprob in top
            if token.strip() == word.strip() and token not in taken
        ]
        found.append(np.logaddexp.reduce(same) if same else floor)
    return np.array(found, dtype=np.float32)


def not_connected(error: openai.APIError) -> bool:
    """Whether nobody was there to wait for: no row's fault."""
    import httpx2

    return isinstance(error.__cause__, httpx2.ConnectTimeout | httpx2.PoolTimeout)


def retry_after_s(response: httpx2.Response) -> float:
    """As a number of seconds or an HTTP date; 0 where there is none."""
    written = response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(written))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(written).timestamp() - time.time())
    return 0.0

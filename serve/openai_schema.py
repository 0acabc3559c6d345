"""What travels over OpenAI's endpoints, as far as an answer that is a label has a use for it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from journeyman.cascade.answering import Asked
from journeyman.cascade.policy import AnsweredBy
from serve.schema import MAX_CHARACTERS, MAX_TEXTS, Body, Promise, Text

MAX_TOP_LOGPROBS = 20  # OpenAI's
MAX_PARTS = 64


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_CHARACTERS)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user"] = Field(
        description="The cascade is certified for one prompt, which has a place for a user's text "
        "and for nothing else."
    )
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _is_a_text(self) -> Message:
        if not self.text.strip():
            raise ValueError("is blank")
        if len(self.text) > MAX_CHARACTERS:
            raise ValueError(f"has more than {MAX_CHARACTERS} characters")
        return self


def _of_its_type(value: int) -> BeforeValidator:
    """To Python, and so to a Literal, 1 is true and 0 is false."""

    def check(given: object) -> object:
        if type(given) is not type(value):
            raise ValueError(f"input should be {json.dumps(value)}")
        return given

    return BeforeValidator(check)


# What is sent is the one answer that was certified, whatever is asked for of these; a label is
# never cut by its length.
_OF_SAMPLING = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
_OF_LENGTH = ("max_tokens", "max_completion_tokens")

One = Annotated[Literal[1], _of_its_type(1)]
Off = Annotated[Literal[False], _of_its_type(False)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(Body):
    """Parameters of both endpoints.

    An answer is one of the labels, or the one that was certified: temperature, top_p, seed and
    penalties are taken, as clients send them by default, and change nothing, which the answer says
    (``ignored``). A limit on its length cuts one that was written, and a stop string any, and then
    nothing is promised.
    """

    model: Asked
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = Field(
        None,
        description="The answer ends in front of the first of these; nothing is promised of one "
        "that is cut.",
    )
    n: One | None = None
    user: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    def ignored(self, *, has_tokens: bool) -> list[str]:
        """Parameters that were sent and changed nothing, in our order; has_tokens: the answer does,
        so that a limit on its length could cut it."""
        without_effect = _OF_SAMPLING + (() if has_tokens else _OF_LENGTH)
        return [name for name in without_effect if getattr(self, name, None) is not None]

    def cut(self, answer: str) -> str:
        """The answer up to the first stop string."""
        ends = [answer.find(stop) for stop in self.stops if stop in answer]
        return answer[: min(ends)] if ends else answer

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_tokens


class ChatRequest(_Common):
    """One user message."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    store: Off | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _logprobs_asked(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(_Common):
    """One prompt or several."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Off | None = None
    best_of: One | None = None
    suffix: None = None

    @property
    def texts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Note(BaseModel):
    """What the cascade says beside OpenAI's fields: of each choice, in order."""

    bundle: str
    guarantee: Promise | None = Field(
        description="Null where one model was asked for, or an answer was cut by stop or a limit."
    )
    answered_by: list[AnsweredBy]
    confidence: list[float | None]
    stage: list[int | None]
    probabilities: list[dict[str, float]]
    ignored: list[str] = Field(
        description="Parameters that the request set and that had no effect: those of sampling, "
        "as the one answer that was certified is sent, and limits on the length of a label."
    )


class TokenUsage(BaseModel):
    """Tokens that the teacher read and wrote; 0 where the student answered."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ModelCard(BaseModel):
    id: Asked
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["journeyman"] = "journeyman"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Choice(BaseModel):
    """Of a chat: message or delta; of a completion: text."""

    index: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: dict[str, Any] | None = None


class ChatChoice(Choice):
    message: dict[str, Any]


class TextChoice(Choice):
    text: str


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: Asked
    choices: list[ChatChoice]
    usage: TokenUsage
    system_fingerprint: str
    journeyman: Note


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: Asked
    choices: list[TextChoice]
    usage: TokenUsage
    system_fingerprint: str
    journeyman: Note

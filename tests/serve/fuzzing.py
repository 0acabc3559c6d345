"""Applications to be fuzzed, with the real policies and without Ray, and a client that sends bytes
as they are: no header or body is too wrong for it."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from journeyman.cascade.answering import Cascade, Hear, Said, Unlabeled
from journeyman.cascade.keys import Keyring
from journeyman.cascade.policy import Decision, Escalation, Policy, Written
from journeyman.cascade.refusals import TeacherUnavailable
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify.sequence_scores import WrittenConfidence
from journeyman.recipe import Cascade as Settings
from journeyman.teacher.answers import ClassLabels
from serve.http import api
from tests.serve import tiny
from tests.serve.test_openai_written import BUNDLE

HANGS_AFTER_S = 20  # many times any deadline in here
WRITING = WrittenPolicy(
    confidence=WrittenConfidence(score="mean_logprob"), accept_above=-1.0, same=str.__eq__
)


class Teacher:
    """Classifies any text, by its length alone."""

    async def labels(self, texts: Sequence[str], hear: Hear | None = None) -> list[Said]:
        return [
            ClassLabels(
                class_logprobs=np.log(np.roll([0.7, 0.2, 0.1], len(text)).astype(np.float32)),
                label_mass=None,
                n_prompt_tokens=len(text),
                n_output_tokens=1,
            )
            for text in texts
        ]


class Student:
    """Decides by the text's length."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        return self._policy.decide_batch([np.roll([3.0, 1.0, 0.5], len(x)) for x in items])


class Writer:
    """Writes a text back, and has no answer to some; sure of every second one."""

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        return WRITING.decide_batch(
            [wrote(text, -0.5 if _fate(text) % 2 else -3.0) if _fate(text) % 5 else None
             for text in items]
        )  # fmt: skip


class WritingTeacher:
    """Writes a text back, token by token. Of others it is gone at once or in the middle, cannot
    ever answer, or never ends."""

    async def labels(self, texts: Sequence[str], hear: Hear | None = None) -> list[Said]:
        fates = [_fate(text) % 11 for text in texts]
        if 6 in fates:
            raise TeacherUnavailable("gone", 1.0)
        whole = [wrote(text, -0.7) for text in texts]
        if hear:
            await _say(whole[0], hear, fates[0])
        if 8 in fates:
            await asyncio.sleep(3600)
        return [
            Unlabeled(reason="too long") if fate == 9 else one
            for one, fate in zip(whole, fates, strict=True)
        ]


def classifying(bundle: Any, keyring: Keyring | None = None) -> Any:
    policy = Policy.from_bundle(bundle)
    cascade = Cascade(policy, Student(policy), Teacher(), Settings(request_timeout_s=5.0))
    return api(tiny.live(cascade, bundle), lambda: None, keyring)


def writing(keyring: Keyring | None = None, **settings: Any) -> Any:
    cascade = Cascade(WRITING, Writer(), WritingTeacher(), Settings(**settings))
    return api(tiny.live(cascade, BUNDLE), lambda: None, keyring)


def wrote(text: str, logprob: float) -> Written:
    tokens = tuple(text[i : i + 3] for i in range(0, min(len(text), 60), 3))
    return Written(
        text="".join(tokens),
        tokens=tokens,
        logprobs=np.full(len(tokens) + 1, logprob),
        finish_reason="stop",
        n_prompt_tokens=7,
        n_output_tokens=len(tokens) + 1,
    )


@dataclass(slots=True)
class Answer:
    """What came back; failure: what the application raised beside it."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False
    failure: Exception | None = None


def send(
    app: Any,
    method: str,
    path: str,
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: Sequence[bytes] = (),
    query: bytes = b"",
    cut: bool = False,
    stalls: bool = False,
) -> Answer:
    """path: as it is decoded; body: in pieces; cut: the client leaves behind the last of them;
    stalls: it stays, and sends no more. Raises TimeoutError where there is no answer."""
    pieces = [*body] or [b""]
    sent = [
        {"type": "http.request", "body": piece, "more_body": cut or stalls or i < len(pieces) - 1}
        for i, piece in enumerate(pieces)
    ]
    answer = Answer()

    async def call() -> None:
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not sent and not cut:
                await gone.wait()
            return sent.pop(0) if sent else {"type": "http.disconnect"}

        async def take(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {
                    name.decode("latin-1").lower(): value.decode("latin-1")
                    for name, value in message["headers"]
                }
            elif message["type"] == "http.response.body":
                answer.body += message.get("body", b"")
                answer.ended = not message.get("more_body", False)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "surrogatepass"),
            "root_path": "",
            "query_string": query,
            "headers": [(name.lower(), value) for name, value in headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        try:
            async with asyncio.timeout(HANGS_AFTER_S):
                await app(scope, receive, take)
        except TimeoutError:
            raise
        except Exception as error:
            answer.failure = error

    asyncio.run(call())
    return answer


def events(answer: Answer) -> list[Any]:
    """Of a stream: each a JSON value, or the word that ends it."""
    found = []
    for line in answer.body.decode().split("\n\n")[:-1]:
        said = line.removeprefix("data: ")
        found.append(said if said == "[DONE]" else json.loads(said))
    return found


async def _say(whole: Written, hear: Hear, fate: int) -> None:
    for n in range(1, len(whole.tokens) + 1):
        hear(_beginning(whole, n))
        await asyncio.sleep(0)
        if fate == 7 and n > 1:
            raise TeacherUnavailable("gone", 1.0)


def _beginning(whole: Written, n: int) -> Written:
    return Written(
        text="".join(whole.tokens[:n]),
        tokens=whole.tokens[:n],
        logprobs=whole.logprobs[:n],
        finish_reason="stop",
        n_prompt_tokens=7,
        n_output_tokens=n,
    )


def _fate(text: str) -> int:
    return zlib.crc32(text.encode())

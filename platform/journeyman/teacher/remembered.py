"""Targets that many rows ask for, scored once.

Candidates of one question share what the question is worth without any passage: behind that label
the prompt is the same in each of their rows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from journeyman.teacher.engine import Scored

Prompt = tuple[list[int], int]  # token ids, and where the target starts in them
Ask = Callable[[Sequence[Prompt]], Awaitable[Sequence["Scored"]]]

_MOST = 16_384  # some hundred bytes each


class Remembered:
    """The last scores of one engine; use it from one event loop."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._known: dict[bytes, asyncio.Future[Scored]] = {}

    async def scored(self, prompts: Sequence[Prompt], ask: Ask) -> list[Scored]:
        """Scores as ``ask`` gives them; what was asked before, or is just being asked, is not asked
        again, and counts as read from the cache.

        Raises what ``ask`` raises; others that waited for the same then ask for themselves.
        """
        keys = [_key(prompt) for prompt in prompts]
        open_ = dict(zip(keys, prompts, strict=True))
        scores: dict[bytes, Scored] = {}
        while open_:
            theirs = {key: self._known[key] for key in open_ if key in self._known}
            mine = {key: prompt for key, prompt in open_.items() if key not in theirs}
            scores |= await self._asked(mine, ask)
            if theirs:
                await asyncio.wait(theirs.values())
            for key, future in theirs.items():
                if not future.cancelled():
                    scores[key] = _read(future.result(), len(open_[key][0]))
            open_ = {key: prompt for key, prompt in open_.items() if key not in scores}
        return [scores[key] for key in keys]

    async def _asked(self, prompts: dict[bytes, Prompt], ask: Ask) -> dict[bytes, Scored]:
        if not prompts:
            return {}
        loop = asyncio.get_running_loop()
        futures: dict[bytes, asyncio.Future[Scored]] = {k: loop.create_future() for k in prompts}
        self._known |= futures
        try:
            scores = dict(zip(prompts, await ask(list(prompts.values())), strict=True))
        except BaseException:
            for key, future in futures.items():
                future.cancel()
                self._known.pop(key, None)
            raise
        for key, future in futures.items():
            future.set_result(scores[key])
        while len(self._known) > self._most:
            del self._known[next(iter(self._known))]
        return scores


def _key(prompt: Prompt) -> bytes:
    token_ids, start = prompt
    content = np.asarray([start, *token_ids], dtype=np.int32).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _read(score: Scored, n_tokens: int) -> Scored:
    return dataclasses.replace(score, n_cached_tokens=n_tokens)

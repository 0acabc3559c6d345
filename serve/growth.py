"""A growing answer between replicas: each part holds what is new, and whoever hears has the whole.

What is sent is in all as long as the answer, where the whole text so far each time would be the
square of it. A text may also change what it ended with (a decoder that thinks better of it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from journeyman.cascade.policy import Written

_NO_CHARACTER = "\ufffd"  # what decoders make of the first bytes of one


@dataclass(frozen=True, slots=True, kw_only=True)
class More:
    """Behind the first ``at`` characters that were there the text goes on with this one; tokens:
    further ones."""

    at: int
    text: str
    tokens: tuple[str, ...]


def gained(before: str, after: str, tokens: tuple[str, ...]) -> More:
    """What makes the one text the other."""
    at = len(before)
    if not after.startswith(before):
        pairs = enumerate(zip(before, after, strict=False))
        at = next((i for i, (one, other) in pairs if one != other), len(after))
    return More(at=at, text=after[at:], tokens=tokens)


class Pieces:
    """What each token of an answer adds to its text.

    A token decoded by itself is not that: a tokenizer that marks blanks drops one at a beginning,
    and a character of several tokens is none until its last. So each is decoded behind those
    before it, of which few are needed.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # since the piece before the last one that is there
        self._n_before = 0  # of these, tokens whose piece is there

    def add(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Of the next tokens; "" for one that ends within a character."""
        return tuple(map(self._piece, ids))

    def rest(self) -> str:
        """Of tokens behind the last whole character."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._n_before])) :]

    def _piece(self, token: int) -> str:
        before = self._decode(self._ids[: self._n_before])
        self._ids.append(token)
        now = self._decode(self._ids)
        if now.endswith(_NO_CHARACTER) or not now.startswith(before):
            return ""
        self._ids, self._n_before = self._ids[self._n_before :], len(self._ids) - self._n_before
        return now[len(before) :]


class Whole:
    """An answer so far, from the parts of one call."""

    def __init__(self) -> None:
        self._text = ""
        self._tokens: tuple[str, ...] = ()

    def add(self, more: More) -> Written:
        """The answer with it, as far as it is written."""
        self._text = self._text[: more.at] + more.text
        self._tokens += more.tokens
        return Written(
            text=self._text,
            tokens=self._tokens,
            logprobs=np.empty(0),
            finish_reason="stop",
            n_prompt_tokens=0,
            n_output_tokens=len(self._tokens),
        )

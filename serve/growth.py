"""A growing answer between replicas: each part holds what is new, and whoever hears has the whole.

What is sent is in all as long as the answer, where the whole text so far each time would be the
square of it. A text may also change what it ended with (a decoder that thinks better of it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from journeyman.cascade.policy import Written


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

"""What a caller may learn of its requests before they end: how an answer begins, and the tokens
that they have taken; and what else it may say of all that it asks: that it can wait, and that it
belongs together.

Set in the task that asks the engine; the engine tells as it works.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The beginning of an answer; token_ids: all so far. text: as the whole answer will begin,
    without what may still become a character, or a string that ends it."""

    text: str
    token_ids: list[int]


@dataclass(slots=True, kw_only=True)
class Spent:
    """Tokens that the engine has read and written; a prompt counts once it was read as a whole."""

    n_prompt_tokens: int = 0
    n_output_tokens: int = 0

    def add(self, other: Spent) -> None:
        self.n_prompt_tokens += other.n_prompt_tokens
        self.n_output_tokens += other.n_output_tokens


class Counting:
    """Adds to what was spent as the tokens of one request come."""

    def __init__(self, spent: Spent, n_prompt_tokens: int) -> None:
        self._spent, self._unread = spent, n_prompt_tokens

    def came(self, n_tokens: int) -> None:
        self._spent.n_prompt_tokens += self._unread
        self._spent.n_output_tokens += n_tokens
        self._unread = 0  # several answers to one prompt read it once


hearing: ContextVar[Callable[[Begun], None] | None] = ContextVar("hearing", default=None)
spending: ContextVar[Spent | None] = ContextVar("spending", default=None)
# As vLLM's: those with more wait for all with less, and make room for them.
priority: ContextVar[int] = ContextVar("priority", default=0)
# A number of its own of the row that asks several prompts at once, and how many: see ``siblings``.
at_once: ContextVar[tuple[int, int] | None] = ContextVar("at_once", default=None)
counting: ContextVar[Counting | None] = ContextVar("counting", default=None)  # of one request

"""A row to what the teacher reads: templates, chat turns, few-shot examples, and the context's end.

Text of a row stays text: a special token that it spells is never taken as a control token.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from journeyman import prompts
from journeyman.errors import ModelError, RecipeError
from journeyman.prompts import Prompt, encode
from journeyman.recipe import Example
from journeyman.recipe.labels import Structured
from journeyman.teacher.answers import ContextOverflow, Unrendered
from journeyman.teacher.together import Together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Segment = tuple[str, bool]  # a piece of a prompt, and whether it is text of the row
Overflow = Literal["quarantine", "truncate_left", "truncate_right", "skip"]

_CUTS = 8  # a cut text may need more tokens than it had there: cut again, so often at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """One prompt: in pieces, and as (role, content) turns where the recipe says chat."""

    segments: tuple[Segment, ...]
    messages: tuple[tuple[str, str], ...] | None = None

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is drawn. temperature 0 is greedy; max_tokens bounds each completion."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    structured: Structured | None = None


class Prompting:
    """The prompt of a recipe's labels section, over any row."""

    def __init__(
        self,
        template: str,
        *,
        chat: bool = False,
        system: str | None = None,
        examples: Sequence[Example] = (),
        where: str = "labels.prompt",
    ) -> None:
        self._prompt = Prompt(template, where)
        self._chat = chat
        self._system = system
        self._examples = examples

    def render(
        self,
        row: Mapping[str, Any],
        label: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Rendered:
        """The prompt for a row; label: the label's words; tokenizer: whose chat template to use
        (an API has its own). Raises Unrendered for a row that the template fails on, ModelError
        where the teacher has no chat template."""
        with self._of_row():
            if not self._chat:
                return Rendered(segments=tuple(self._prompt.segments(row, label)))
            content = self._prompt.render(row, label)
        turns = [("system", self._system)] if self._system is not None else []
        for example in self._examples:
            turns += [("user", self._example(example)), ("assistant", example.answer)]
        turns.append(("user", content))
        messages = tuple((role, prompts.plain(content)) for role, content in turns)
        if tokenizer is None:
            return Rendered(segments=((messages[-1][1], True),), messages=messages)
        marked = _chat_text(tokenizer, turns)
        return Rendered(segments=tuple(prompts.split_marked(marked)), messages=messages)

    @contextlib.contextmanager
    def _of_row(self) -> Iterator[None]:
        """A template may do anything with a row's values, and so fail on them in any way."""
        try:
            yield
        except Exception as error:
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Unrendered(f"{self._prompt.where}: {words} for this row.") from error

    def _example(self, example: Example) -> str:
        try:
            return prompts.plain(self._prompt.render(example.row, None))
        except jinja2.UndefinedError as error:
            raise RecipeError(
                f"labels.examples: a row lacks a column that the prompt names ({error.message})."
            ) from error


def _chat_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str:
    conversation = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
    except (ValueError, jinja2.TemplateError) as error:
        raise ModelError(
            f"labels.chat: the teacher's chat template cannot be used ({error}); set labels.chat: "
            "false and write the turns into labels.prompt."
        ) from error


class Encoder:
    """Prompts to token ids that fit the teacher's context."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, overflow: Overflow
    ) -> None:
        """max_tokens: the longest prompt that may be sent, the room for an answer left out."""
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._overflow = overflow
        self._together = Together(tokenizer)
        bos = tokenizer.bos_token_id
        self._begin = [bos] if bos is not None and tokenizer.encode("") == [bos] else []

    def raw(self, segments: Sequence[Segment], *, begin: bool = False) -> list[int]:
        """Token ids as they are; begin: with the tokenizer's own begin token, where it has one."""
        return self._begun(encode(self.tokenizer, segments), begin)

    def fit(self, rendered: Rendered, reserve: int = 0) -> tuple[list[int], bool]:
        """Token ids within ``max_tokens`` less ``reserve``, and whether text was cut for it.

        Raises ContextOverflow where the recipe says so, or where the text is not what is too long.
        """
        begin = rendered.messages is None
        ids = self.raw(rendered.segments, begin=begin)
        return self._within(ids, rendered.segments, begin, reserve)

    async def fit_soon(self, rendered: Rendered, reserve: int = 0) -> tuple[list[int], bool]:
        """The same, encoded together with what other tasks ask for now."""
        begin = rendered.messages is None
        ids = self._begun(await self._together.encode(rendered.segments), begin)
        return self._within(ids, rendered.segments, begin, reserve)

    async def fit_target(self, segments: Sequence[Segment], reserve: int) -> tuple[list[int], bool]:
        """The same for a text that stands behind ``reserve`` tokens of something else."""
        ids = await self._together.encode(segments)
        return self._within(ids, segments, False, reserve)

    def fit_ids(self, ids: Sequence[int], reserve: int) -> tuple[list[int], bool]:
        """The same for a text that is token ids already."""
        limit = self.max_tokens - reserve
        if len(ids) <= limit:
            return list(ids), False
        if not self._overflow.startswith("truncate") or limit < 1:
            raise ContextOverflow(len(ids), limit)
        return list(ids[-limit:] if self._overflow == "truncate_left" else ids[:limit]), True

    def _begun(self, ids: list[int], begin: bool) -> list[int]:
        return [*self._begin, *ids] if begin and ids[: len(self._begin)] != self._begin else ids

    def _within(
        self, ids: list[int], segments: Sequence[Segment], begin: bool, reserve: int
    ) -> tuple[list[int], bool]:
        """The ids of these segments, or of as much of them as there is room for."""
        limit = self.max_tokens - reserve
        if len(ids) <= limit:
            return ids, False
        n_tokens = len(ids)
        if not self._overflow.startswith("truncate"):
            raise ContextOverflow(n_tokens, limit)
        for _ in range(_CUTS):
            segments = self._cut(list(segments), len(ids) - limit)
            ids = self.raw(segments, begin=begin)
            if len(ids) <= limit:
                return ids, True
        raise ContextOverflow(n_tokens, limit)

    def _cut(self, segments: list[Segment], excess: int) -> list[Segment]:
        """The longest piece of text, shorter by so many tokens at the recipe's end of it."""
        texts = [i for i, (_, is_text) in enumerate(segments) if is_text]
        if not texts:
            return segments
        longest = max(texts, key=lambda i: len(segments[i][0]))
        ids = self.tokenizer.encode(
            segments[longest][0], add_special_tokens=False, split_special_tokens=True
        )
        keep = max(0, len(ids) - excess)
        kept = ids[len(ids) - keep :] if self._overflow == "truncate_left" else ids[:keep]
        text = self.tokenizer.decode(kept, skip_special_tokens=False)
        cut = list(segments)
        cut[longest] = (text.strip("\ufffd"), True)  # a character cut in two
        return cut


def with_more(rendered: Rendered, *segments: Segment) -> Rendered:
    """A prompt with further pieces behind it."""
    return dataclasses.replace(rendered, segments=(*rendered.segments, *segments))

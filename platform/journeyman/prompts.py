"""Prompt templates over a row's columns, and their tokens.

Special tokens count as control tokens only where the template itself, or a label's words, spell
them out: text that comes from a row is always plain text, whatever it spells.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
import jinja2.nodes

from journeyman.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters around what a template's expressions print mark it as text. Whatever an
# expression prints is text, filtered or not; only a label's own words count as template.
_OPEN, _CLOSE = "\ue000", "\ue001"


class _LabelWords(str):
    __slots__ = ()


class Prompt:
    """One compiled template."""

    def __init__(self, source: str, where: str) -> None:
        """where: YAML path of the template, for messages. Raises RecipeError."""
        self.source = source
        self.where = where
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
            finalize=_mark,
            autoescape=False,
        )
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(
                f"{where}: line {error.lineno} of the template: {error.message}."
            ) from error
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
        self._pieces = _pieces(tree)

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.source.encode(), digest_size=16).hexdigest()

    @property
    def leading(self) -> str | None:
        """The column that comes first; None where the template does more than to print columns."""
        return next((piece for piece, is_name in self._pieces or () if is_name), None)

    def check(self, columns: Sequence[str]) -> None:
        """Raises RecipeError if the template names a column that rows do not have."""
        unknown = sorted(self.variables - set(columns))
        if unknown:
            raise RecipeError(
                f"{self.where}: the template names {', '.join(unknown)}, but a row has only "
                f"{', '.join(columns)}; add the column to corpus.columns.meta."
            )

    def segments(self, row: Mapping[str, Any], label: str | None = None) -> list[tuple[str, bool]]:
        """Rendered pieces in order, each with whether it is text from the row."""
        if self._pieces is None or label is not None or not self.variables <= row.keys():
            return split_marked(self.render(row, label))
        filled = [
            (plain(str(row[piece])), True) if is_name else (piece, False)
            for piece, is_name in self._pieces
        ]
        return [(piece, is_text) for piece, is_text in filled if piece]

    def render(self, row: Mapping[str, Any], label: str | None = None) -> str:
        """The rendered template, its text still marked: for ``split_marked`` or ``plain``."""
        values: dict[str, Any] = dict(row)
        if label is not None:
            values["label"] = _LabelWords(label)
        return self._template.render(values)


def split_marked(rendered: str) -> list[tuple[str, bool]]:
    """Pieces of a marked string in order, each with whether it is text from the row."""
    pieces: list[tuple[str, bool]] = []
    for i, part in enumerate(rendered.split(_OPEN)):
        text, _, template = part.partition(_CLOSE) if i else ("", "", part)
        pieces += [(text, True), (template, False)]
    return [(piece, is_text) for piece, is_text in pieces if piece]


def plain(rendered: str) -> str:
    """A marked string without its marks."""
    return rendered.replace(_OPEN, "").replace(_CLOSE, "")


def encode(tokenizer: PreTrainedTokenizerBase, segments: Sequence[tuple[str, bool]]) -> list[int]:
    """Token ids of a rendered template, without the tokenizer's own begin or end tokens.

    Text that spells no special token is encoded together with the template around it, as the
    model was trained; only text that does spell one is encoded on its own, as plain text.
    """
    special = _special_tokens(tokenizer)
    ids: list[int] = []
    together: list[tuple[str, bool]] = []

    def encode_together() -> None:
        """What spells no token by itself may do so with what stands beside it."""
        parts = [piece for piece, _ in together]
        apart = _spelled(special, together)
        for part in parts if apart else filter(None, ["".join(parts)]):
            ids.extend(encode_texts(tokenizer, [part])[0])
        together.clear()

    for piece, is_text in segments:
        if is_text and any(token in piece for token in special):
            encode_together()
            ids += _as_text(tokenizer, piece)
        else:
            together.append((piece, is_text))
    encode_together()
    return ids


def _spelled(special: Sequence[str], segments: Sequence[tuple[str, bool]]) -> bool:
    """Whether text of the row spells a special token, by itself or with what stands beside it."""
    joined = "".join(piece for piece, _ in segments)
    return any(
        joined.count(token) != sum(piece.count(token) for piece, is_text in segments if not is_text)
        for token in special
        if token in joined
    )


def _as_text(tokenizer: PreTrainedTokenizerBase, piece: str) -> list[int]:
    """Token ids of a text that spells added tokens; those that are not special in the tokenizer's
    sense (``<tool_call>``) are found all the same unless they are cut in two."""
    added = _not_special(tokenizer)
    parts = [piece]
    for token in added:
        parts = [half for part in parts for half in _halves(part, token)]
    return [
        token_id
        for part in parts
        for token_id in tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
    ]


def _halves(text: str, token: str) -> list[str]:
    """The text in pieces, cut behind the first character of each such token; one of a single
    character cannot be cut."""
    if len(token) < 2 or token not in text:
        return [text]
    first, *others = text.split(token)
    pieces = [first + token[0], *(token[1:] + other + token[0] for other in others)]
    pieces[-1] = pieces[-1][:-1]
    return pieces


def one_text(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[tuple[str, bool]]
) -> str | None:
    """What ``encode`` encodes, where that is one piece; None where text spells a special token."""
    if _spelled(_special_tokens(tokenizer), segments):
        return None
    return "".join(piece for piece, _ in segments)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """What ``tokenizer.encode`` gives for each, without the offsets that nobody reads (89 against
    133 us for 130 tokens)."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or fast.truncation or fast.padding or fast.encode_special_tokens:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [e.ids for e in fast.encode_batch_fast(list(texts), add_special_tokens=False)]


def _mark(value: object) -> object:
    if isinstance(value, _LabelWords):
        return value
    return f"{_OPEN}{plain(str(value))}{_CLOSE}"


def _pieces(tree: jinja2.nodes.Template) -> list[tuple[str, bool]] | None:
    """A template of nothing but text and names, in pieces, each with whether it is a name: filled
    in by hand, ten times as fast as Jinja does it. None for any other template."""
    pieces: list[tuple[str, bool]] = []
    for output in tree.body:
        for node in getattr(output, "nodes", [output]):
            if isinstance(node, jinja2.nodes.TemplateData):
                pieces.append((node.data, False))
            elif isinstance(node, jinja2.nodes.Name):
                pieces.append((node.name, True))
            else:
                return None
    return pieces


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder.values()
    return tuple({str(token) for token in added} | set(tokenizer.all_special_tokens))


@functools.lru_cache(maxsize=8)
def _not_special(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder.values()
    return tuple(str(token) for token in added if not getattr(token, "special", True))

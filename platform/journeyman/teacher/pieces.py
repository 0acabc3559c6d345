"""What each token of an answer adds to its text, and which of them are in the text that is left of
it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_NO_CHARACTER = "\ufffd"  # what decoders make of the first bytes of one


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


def fitted(pieces: Sequence[str], text: str) -> tuple[str, ...]:
    """Of all pieces of an answer those that are wholly in a text that it begins with: up to a
    string that ends answers, say, whose tokens were written, too.

    An engine that looks for such strings decodes behind the prompt and keeps a blank in front of
    the first piece, which tokenizers drop that mark blanks.
    """
    whole = "".join(pieces)
    if pieces and text[:1].isspace() and not whole.startswith(text):
        pieces = (text[0] + pieces[0], *pieces[1:])
    n, n_characters = 0, 0
    for i, piece in enumerate(pieces, 1):
        n_characters += len(piece)
        if n_characters > len(text):
            break
        if piece:  # else it is in the text only if the character is that it begins
            n = i
    return tuple(pieces[:n])
